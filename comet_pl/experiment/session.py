"""One training from its configuration to its evaluation: build, fit, and how it ends."""

import shlex
import sys

import lightning
import torch
from lightning.pytorch import seed_everything
from lightning.pytorch.utilities import rank_zero_only
from lightning.pytorch.utilities.exceptions import MisconfigurationException

from comet_pl import build
from comet_pl.config.schema import Config
from comet_pl.errors import OnAllRanks, TrainingStopped, UserError, first_line
from comet_pl.evaluation import evaluate
from comet_pl.experiment.checkpoint import checkpoint_content, restore_tokenizer
from comet_pl.experiment.lock import release
from comet_pl.experiment.run_folder import Run, plan_run
from comet_pl.experiment.same_run import check_backbone, check_data
from comet_pl.training.trainable import count_parameters, describe, merge_adapters


def run_session(config: Config, argv: list[str]) -> None:
    """Trains, then evaluates if eval.after_fit is true.

    Args:
        argv: what the command was given, for the line that says how to resume.

    Raises:
        UserError: in one line, whatever the user or the machine did.
        SystemExit: the training was stopped (128 + signal), or another rank reports the mistake.
    """
    build.check_device(config)
    build.check_launch(config)
    run = plan_run(config, rank_zero_only.rank)  # type: ignore[attr-defined]
    try:
        train_and_evaluate(run, argv)
    finally:
        release(run.path)


def train_and_evaluate(run: Run, argv: list[str]) -> None:
    """The planned run, from building its parts to its evaluation. Raises as run_session."""
    config = run.config
    torch.set_float32_matmul_precision(config.trainer.matmul_precision)
    seed_everything(config.seed, verbose=False)
    tokenizer = restore_tokenizer(run.saved) if run.saved else build.build_tokenizer(config)
    # Before a changed corpus is tokenised; a fresh run's mistakes are those of reading it.
    files = build.data_content(config) if run.saved else None
    notes = check_data(run, files) if files is not None else []
    data = build.build_data(config, tokenizer)
    model = build.build_model(config, tokenizer)
    check_backbone(run, model)
    content = checkpoint_content(config, tokenizer, model)
    content["data"] = build.data_content(config) if files is None else files
    trainer = build.build_trainer(config, run, content)
    if trainer.is_global_zero:
        run.create()
        start = "starts"
        if run.checkpoint:
            gone = " of best.ckpt (there is no last.ckpt)" * (run.checkpoint.name != "last.ckpt")
            start = f"continues from step {run.step}{gone}"
        line = f"{run.path} {start}: {describe(count_parameters(model))}"
        print(line, *notes, sep="\n", flush=True)
        if config.train.compile:
            print(
                "train.compile: the first step of each length takes minutes, and a stop waits for "
                "it",
                flush=True,
            )
    try:
        trainer.fit(build.build_module(config, model), datamodule=data, ckpt_path=run.checkpoint)
    except (TrainingStopped, SystemExit, UserError, MisconfigurationException) as error:
        end(error, trainer, run, argv)
    except Exception as error:
        # Lightning forgets the checkpoint once all of it is restored.
        if not trainer._checkpoint_connector._loaded_checkpoint:
            raise
        reason = first_line(error)
        raise UserError(f"{run.checkpoint}: cannot be resumed: {reason}") from None
    if not trainer.is_global_zero:
        return
    print(
        f"trained {trainer.global_step} steps{why_no_more(config, trainer.global_step, run.step)}; "
        f"weights in {run.checkpoints}, curves: tensorboard --logdir {run.path}"
    )
    if config.eval.after_fit:
        # With sharding this process holds a part of the weights only.
        if config.strategy.sharding != "none":
            model, _, _ = build.load_checkpoint(run.checkpoints / "last.ckpt", [])
        merge_adapters(model)
        model.to(build.device_of(config))  # type: ignore[arg-type]
        evaluate(model, tokenizer, config, run.path, trainer.global_step)


def why_no_more(config: Config, step: int, start: int) -> str:
    """What ended a training before trainer.max_steps, or before its first step; else ''.

    Args:
        step: that it ended after. start: that it resumed after.
    """
    keys = config.trainer
    none = ", none of them now" if step == start else ""
    if step >= keys.max_steps:
        return f"{none}: trainer.max_steps is {keys.max_steps}" if none else ""
    return (
        f"{none}: trainer.max_epochs={keys.max_epochs} ends it before trainer.max_steps="
        f"{keys.max_steps} (a larger one with resume=true goes on)"
    )


def end(error: BaseException, trainer: lightning.Trainer, run: Run, argv: list[str]) -> None:
    """Raises what an interrupted fit ends with."""
    if isinstance(error, TrainingStopped):
        keys = [argument for argument in argv if not argument.startswith(("resume=", "run.name="))]
        name = f"run.name={run.config.run.name}"
        again = shlex.join(["python", "train.py", *keys, name, "resume=true"])
        if trainer.is_global_zero:
            print(
                f"stopped after step {error.step}, saved in {run.checkpoints / 'last.ckpt'}; go on "
                f"with: {again}"
            )
        sys.exit(128 + error.number)
    if isinstance(error, SystemExit):
        # Before the first step Lightning itself ends on Ctrl-C, with status 1.
        if isinstance(error.__context__, KeyboardInterrupt):
            raise KeyboardInterrupt from None
        raise error
    if trainer.global_step == 0 and trainer.is_global_zero:
        run.discard()
    if not trainer.is_global_zero and isinstance(error, (MisconfigurationException, OnAllRanks)):
        sys.exit(2)  # rank 0 reports it
    if isinstance(error, UserError):
        raise error
    # Lightning's: limits of which no batch is left.
    raise UserError(f"trainer: {str(error).splitlines()[0]}") from None
