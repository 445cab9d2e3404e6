"""Trains a CoMeT, then evaluates it: python train.py [conf=NAME] [key=value ...]; --help lists the confs and keys."""

from __future__ import annotations

import shlex
import sys

from comet_pl.config.load import load
from comet_pl.errors import OnAllRanks, TrainingStopped, UserError, run_cli


def main(argv: list[str]) -> None:
    config = load(argv)

    from lightning.pytorch import seed_everything
    from lightning.pytorch.utilities import rank_zero_only
    from lightning.pytorch.utilities.exceptions import MisconfigurationException

    from comet_pl import build
    from comet_pl.experiment.checkpoint import (
        checkpoint_content,
        read_checkpoint,
        restore_tokenizer,
    )
    from comet_pl.experiment.run_folder import plan_run
    from comet_pl.training.trainable import count_parameters, describe, merge_adapters

    build.check_device(config)
    run = plan_run(config, rank_zero_only.rank)  # type: ignore[attr-defined]
    config = run.config
    seed_everything(config.seed, verbose=False)
    resumed = run.checkpoint and read_checkpoint(run.checkpoint, mmap=True)["comet"]
    tokenizer = restore_tokenizer(resumed) if resumed else build.build_tokenizer(config)
    data = build.build_data(config, tokenizer)
    model = build.build_model(config, tokenizer)
    trainer = build.build_trainer(config, run, checkpoint_content(config, tokenizer, model))
    if trainer.is_global_zero:
        run.create()
        start = f"goes on from step {run.step}" if run.checkpoint else "starts"
        print(f"{run.path} {start}: {describe(count_parameters(model))}", flush=True)
        if config.train.compile:
            print(
                "train.compile: the first step of each length takes minutes, and a stop waits for it",
                flush=True,
            )
    try:
        trainer.fit(build.build_module(config, model), datamodule=data, ckpt_path=run.checkpoint)
    except TrainingStopped as stopped:
        keys = [argument for argument in argv if not argument.startswith(("resume=", "run.name="))]
        again = shlex.join(
            ["python", "train.py", *keys, f"run.name={config.run.name}", "resume=true"]
        )
        if trainer.is_global_zero:
            print(
                f"stopped after step {stopped.step}, saved in {run.checkpoints / 'last.ckpt'}; go on with: {again}"
            )
        sys.exit(128 + stopped.number)
    except SystemExit as stopped:
        if isinstance(
            stopped.__context__, KeyboardInterrupt
        ):  # before the first step Lightning itself ends on Ctrl-C, with status 1
            raise KeyboardInterrupt from None
        raise
    except (UserError, MisconfigurationException) as error:
        if trainer.global_step == 0 and trainer.is_global_zero:
            run.discard()
        if not trainer.is_global_zero and isinstance(
            error, (MisconfigurationException, OnAllRanks)
        ):
            sys.exit(2)  # rank 0 reports it
        # Lightning's: limits of which no batch is left
        raise (
            error
            if isinstance(error, UserError)
            else UserError(f"trainer: {str(error).splitlines()[0]}")
        ) from None
    if trainer.is_global_zero:
        print(
            f"trained {trainer.global_step} steps; weights in {run.checkpoints}, curves: tensorboard --logdir {run.path}"
        )
        if config.eval.after_fit:
            from comet_pl.evaluation import evaluate

            if config.strategy.sharding != "none":  # this process holds a part of the weights only
                model, _, _ = build.load_checkpoint(run.checkpoints / "last.ckpt", [])
            merge_adapters(model)
            model.to(build.device_of(config))  # type: ignore[arg-type]
            evaluate(model, tokenizer, config, run.path)


if __name__ == "__main__":
    run_cli(
        main
    )  # Ctrl-C while building or evaluating ends it at once; training stops between two steps
