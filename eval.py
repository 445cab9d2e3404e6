"""Evaluates a trained CoMeT: python eval.py ckpt=PATH|FOLDER [out=DIR] [conf=NAME] [key=value ...]

--help lists the confs and keys. ckpt is a run's folder (its last.ckpt, else its best.ckpt), a .ckpt
file, or a model folder with config.json. A checkpoint knows its own configuration; conf and keys
override it. Results go into the run's folder, or into out.
"""

from __future__ import annotations

from comet_pl.config.help import help_asked
from comet_pl.config.launch import check_variables
from comet_pl.config.load import eval_paths
from comet_pl.errors import importing, run_cli
from comet_pl.experiment.checkpoint import find_checkpoint, steps_of


def main(argv: list[str]) -> None:
    help_asked(argv, "eval")
    path, out = eval_paths(argv)
    checkpoint, folder = find_checkpoint(path)

    check_variables()
    with importing():
        from comet_pl.build import device_of, load_checkpoint
        from comet_pl.evaluation import evaluate

    model, tokenizer, config = load_checkpoint(checkpoint, argv)
    print(f"evaluates {checkpoint}", flush=True)
    model = model.to(device_of(config))
    evaluate(model, tokenizer, config, out or folder, steps_of(checkpoint))


if __name__ == "__main__":
    run_cli(main)
