"""Evaluates a trained CoMeT: python eval.py ckpt=PATH|FOLDER [out=DIR] [conf=NAME] [key=value ...]; --help lists the confs and keys.

ckpt is a run's folder (its last.ckpt, else its best.ckpt), a .ckpt file, or a model folder with config.json. A checkpoint knows its own
configuration; conf and keys go over it. Results go into the run's folder, or into out.
"""

from __future__ import annotations

import sys
from pathlib import Path

from comet_pl.config import eval_paths, load
from comet_pl.errors import UserError, run_cli


def find_checkpoint(path: Path) -> tuple[Path, Path]:
    """(what to load, the folder for its results) of what ckpt= names.

    Raises:
        UserError: there is no such path, or no checkpoint in it.
    """
    if not path.exists():
        raise UserError(f"ckpt: {path} does not exist")
    if path.is_file():
        return path, path.parent.parent if path.parent.name == "checkpoints" else path.parent
    for folder in (path / "checkpoints", path):
        for name in ("last.ckpt", "best.ckpt"):
            if (folder / name).is_file():
                return folder / name, path.parent if folder == path and path.name == "checkpoints" else path
    if (path / "config.json").is_file():
        return path, path
    raise UserError(f"ckpt: {path} holds neither checkpoints/last.ckpt, checkpoints/best.ckpt nor a model's config.json")


def main(argv: list[str]) -> None:
    given, out = eval_paths(argv)
    if given is None:
        load(argv, "eval")  # prints the help
        return
    checkpoint, folder = find_checkpoint(given)

    from comet_pl.build import device_of, load_checkpoint
    from comet_pl.evaluation import evaluate

    model, tokenizer, config = load_checkpoint(checkpoint, argv)
    print(f"evaluates {checkpoint}", flush=True)
    evaluate(model.to(device_of(config)), tokenizer, config, out or folder)  # type: ignore[arg-type]


if __name__ == "__main__":
    try:
        run_cli(main)
    except KeyboardInterrupt:
        sys.exit(130)
