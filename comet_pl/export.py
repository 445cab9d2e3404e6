"""Writes a trained model as a Hugging Face folder: python -m comet_pl.export CKPT FOLDER [--dtype float32|bfloat16|float16].

CKPT is a run's folder (its last.ckpt, else its best.ckpt), a .ckpt file, or a model folder. LoRA and separately trained rows are merged
into plain weights. CometForCausalLM.from_pretrained(FOLDER) loads it; after `import comet_pl`, so does AutoModelForCausalLM.
"""

from __future__ import annotations

import argparse
import os
import tempfile
from pathlib import Path

from comet_pl.errors import Parser, UserError, run_cli

DTYPES = ("float32", "bfloat16", "float16")


def export(checkpoint: Path, folder: Path, dtype: str | None = None) -> None:
    """Writes `folder` (weights, configuration, tokenizer) at once, whole.

    Args:
        dtype: of the weights, one of DTYPES; None: as the checkpoint's.

    Raises:
        UserError: no such checkpoint, or not a whole one; a folder that is there already or cannot be written.
    """
    if folder.exists() or folder.is_symlink():
        raise UserError(f"{folder}: is there already; remove it first, or give another folder")
    import torch
    import transformers

    from comet_pl.experiment.checkpoint import load_trained

    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()

    model, tokenizer, _ = load_trained(checkpoint, [])
    if dtype is not None:
        model = model.to(getattr(torch, dtype))
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=folder.parent, prefix=f".{folder.name}.") as work:
            made = Path(work) / "folder"
            model.save_pretrained(made)
            tokenizer.save_pretrained(made)
            os.replace(made, folder)
    except OSError as error:
        raise UserError(f"{folder}: cannot be written: {error.strerror or error}") from None


def parse(argv: list[str]) -> argparse.Namespace:
    parser = Parser(
        prog="python -m comet_pl.export",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "checkpoint", metavar="CKPT", type=Path, help="run folder, .ckpt file or model folder"
    )
    parser.add_argument(
        "folder", metavar="FOLDER", type=Path, help="folder to write; it must not be there"
    )
    parser.add_argument(
        "--dtype", choices=DTYPES, help="of the weights (default: as the checkpoint's)"
    )
    return parser.parse_args(argv)


def main(argv: list[str]) -> None:
    given = parse(argv)
    folder = given.folder.expanduser()
    export(given.checkpoint.expanduser(), folder, given.dtype)
    print(f"wrote {folder}", flush=True)


if __name__ == "__main__":
    run_cli(main)
