"""From a configuration to objects. Heavy modules are imported where they are needed, so that a
user's mistake shows at once."""

from __future__ import annotations

import logging
import sys
import warnings
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from comet_pl.config.schema import (
    AgentData,
    Config,
    PasskeyData,
    ScrollsData,
    StrategyConfig,
    TextData,
    UserBehaviorData,
)
from comet_pl.errors import UserError, first_line
from comet_pl.experiment.run_folder import Run

if TYPE_CHECKING:
    import lightning
    import torch
    from transformers import PreTrainedTokenizerBase

    from comet_pl import CometForCausalLM
    from comet_pl.parallel.strategy import LayerPipelineStrategy
    from comet_pl.training.lit_module import CometModule
    from data.kinds import DataSection


def check_device(config: Config) -> None:
    """Refuses an accelerator that is not here, and train.compile where it has no compiler.

    Raises:
        UserError
    """
    import torch

    asked = config.trainer.accelerator
    here = {"cpu": True, "auto": True, "mps": torch.backends.mps.is_available()}
    here["cuda"] = torch.cuda.is_available() and torch.cuda.device_count() > 0
    here["gpu"] = here["cuda"] or here["mps"]
    if not here.get(asked, True):
        allowed = ", ".join(name for name, present in here.items() if present)
        raise UserError(
            f"trainer.accelerator: {asked} given, but there is no such device here, allowed: "
            f"{allowed}"
        )
    if config.train.compile and (asked == "cpu" or (asked == "auto" and not here["gpu"])):
        from torch._inductor.cpp_builder import get_cpp_compiler
        from torch._inductor.exc import InvalidCxxCompiler

        try:
            get_cpp_compiler()
        except InvalidCxxCompiler:
            raise UserError(
                "train.compile: true given, but no C++ compiler is found here; install g++, name "
                "one in the variable CXX, or leave it false"
            ) from None


def check_launch(config: Config) -> None:
    """Raises UserError for the variables of a launcher that has started other processes."""
    import torch

    from comet_pl.config.launch import check_place

    on_gpu = config.trainer.accelerator in ("cuda", "gpu", "auto")
    available = torch.cuda.device_count() if on_gpu else 1
    check_place(config.trainer.devices, config.trainer.num_nodes, max(available, 1))


def build_tokenizer(config: Config) -> PreTrainedTokenizerBase:
    """The pre-trained decoder's tokenizer; from scratch: one trained on the data's texts.

    Raises:
        UserError: backbone.path is no folder or hub id with a tokenizer; the data cannot be read.
    """
    path, data = config.backbone.path, config.data
    if path is not None:
        from comet_pl.experiment.loading import load_tokenizer
        from comet_pl.files import check_built

        check_built(path, "backbone.path")
        return load_tokenizer(path, f"backbone.path: {path}: no tokenizer can be loaded")
    from data.tokenizer import AGENT_TOKENS, train_tokenizer

    more = AGENT_TOKENS if isinstance(data, AgentData) else ()
    whole_words = isinstance(data, UserBehaviorData) and data.whole_words
    return train_tokenizer(
        _batches(data).texts(data), config.backbone.vocab_size, more, whole_words
    )


def build_model(config: Config, tokenizer: PreTrainedTokenizerBase) -> CometForCausalLM:
    """A pre-trained decoder with memory plugged in, a CoMeT folder, or a decoder from scratch;
    weights drawn from the current random state.

    What train.parameters leaves out is frozen, in bf16-mixed in bfloat16; LoRA is in place.

    Raises:
        UserError: an impossible combination of keys; backbone.path cannot be loaded.
    """
    from comet_pl.experiment.new_model import new_model
    from comet_pl.training.trainable import add_adapters, halve_frozen

    model = new_model(config, tokenizer)
    add_adapters(model, config.train)
    if config.trainer.precision == "bf16-mixed":
        halve_frozen(model)
    return model


def build_data(config: Config, tokenizer: PreTrainedTokenizerBase) -> lightning.LightningDataModule:
    """The data module of data.kind.

    Raises:
        UserError: the data cannot be read or are impossible.
    """
    from data.datamodule import DataModule

    more: dict[str, Any] = {
        "seed": config.seed,
        "accumulate": config.train.accumulate,
        "max_steps": config.trainer.max_steps,
    }
    if isinstance(config.data, TextData):
        model = config.model
        more |= {
            "chunk_size": model.chunk_size,
            "stride": model.compression_stride,
            "max_epochs": config.trainer.max_epochs,
        }
    batches = _batches(config.data)(config.data, tokenizer, **more)
    return DataModule(batches, config.trainer.max_epochs)


def _batches(data: DataSection) -> Any:
    from data.kinds import batches_of

    return batches_of(data)


def data_content(config: Config) -> dict[str, list[list[Any]]]:
    """What identifies the data: their content, wherever the files are; see data/kinds.py."""
    from data.kinds import content_of

    return content_of(config.data)


def build_module(config: Config, model: CometForCausalLM) -> CometModule:
    """The LightningModule that trains the model."""
    from comet_pl.training.lit_module import CometModule

    return CometModule(model, config.train, config.trainer.max_steps)


def build_trainer(config: Config, run: Run, content: dict[str, Any]) -> lightning.Trainer:
    """Lightning's Trainer with the run's logger, checkpoints and callbacks. Nothing is written yet.

    Args:
        content: goes into each checkpoint under the key "comet" (see
            comet_pl/experiment/checkpoint.py).

    Raises:
        UserError: Lightning refuses a trainer key.
    """
    import lightning
    from lightning.pytorch.utilities.exceptions import MisconfigurationException

    from callbacks.checkpoints import AtomicCheckpointIO, RunCheckpoints
    from callbacks.cpu_share import CpuShare
    from callbacks.predictions import Predictions
    from callbacks.progress import StepProgress
    from callbacks.random_state import RandomState
    from callbacks.run_logger import LogConfig, RunLogger
    from callbacks.throughput import Throughput

    quiet_lightning()
    t = config.trainer
    # A run that is shorter than the interval is validated at its end.
    val_interval = (
        min(t.val_check_interval, t.max_steps)
        if isinstance(t.val_check_interval, int)
        else t.val_check_interval
    )
    callbacks = [LogConfig(config, run), RandomState(config.seed), Throughput(), CpuShare()]
    if config.monitor.gates:
        from callbacks.gate_monitor import GateMonitor

        callbacks.append(GateMonitor(run.path / "monitor", config.monitor.gates_every))
    predictions = Predictions(run.path / "monitor") if config.monitor.predictions else None
    if isinstance(config.data, PasskeyData):
        from callbacks.passkey_heatmap import PasskeyHeatmap

        callbacks.append(PasskeyHeatmap(config.data.train_length, predictions))
    elif isinstance(config.data, UserBehaviorData):
        from callbacks.behavior_scores import BehaviorScores

        callbacks.append(BehaviorScores(predictions))
    elif isinstance(config.data, ScrollsData) and config.eval.val_questions:
        from callbacks.scrolls_scores import ScrollsScores

        callbacks.append(ScrollsScores(config.eval, predictions))
    callbacks += [predictions] if predictions else []  # after those that fill it
    callbacks += _monitors(config, run)
    callbacks += [StepProgress(), RunCheckpoints(run.checkpoints, config.checkpoint, content)]
    strategy = build_strategy(config)
    try:
        trainer = lightning.Trainer(
            accelerator=t.accelerator,
            devices=t.devices,
            num_nodes=t.num_nodes,
            strategy=strategy,
            precision=t.precision,  # type: ignore[arg-type]
            max_steps=t.max_steps,
            max_epochs=-1,  # data/datamodule.py knows how many steps they are
            limit_train_batches=t.limit_train_batches,
            limit_val_batches=t.limit_val_batches,
            val_check_interval=val_interval,
            check_val_every_n_epoch=None
            if isinstance(val_interval, int)
            else 1,  # None: counted over all epochs
            log_every_n_steps=t.log_every_n_steps,
            logger=RunLogger(run.path, purge_step=run.step + 1 if run.checkpoint else 0),
            callbacks=callbacks,
            plugins=[AtomicCheckpointIO()],
            default_root_dir=run.path,
            num_sanity_val_steps=0,
            enable_model_summary=False,
            enable_autolog_hparams=False,
            use_distributed_sampler=False,  # the loaders deal the rows out themselves
        )
    except (MisconfigurationException, ValueError, TypeError, RuntimeError, ImportError) as error:
        raise UserError(f"trainer: {first_line(error)}") from None
    if not isinstance(strategy, str):
        check_pipeline(config, strategy)
    return trainer


def _monitors(config: Config, run: Run) -> list[lightning.Callback]:
    """The callbacks that the monitor section switches on; what is off is not there."""
    monitors: list[lightning.Callback] = []
    if config.monitor.memory:
        from callbacks.memory_monitor import MemoryMonitor

        monitors.append(MemoryMonitor(run.path / "monitor", config.monitor.memory_every))
    if config.monitor.length_report:
        from callbacks.length_report import LengthReport

        monitors.append(LengthReport(run.path / "monitor"))
    return monitors


def build_strategy(config: Config) -> str | LayerPipelineStrategy:
    """What trainer.strategy names; layer_pipeline with the strategy section's keys.

    Raises:
        UserError: keys of that section for another strategy, which would have no effect.
    """
    asked = asdict(config.strategy)
    if config.trainer.strategy != "layer_pipeline":
        changed = [
            name for name, value in asked.items() if value != getattr(StrategyConfig(), name)
        ]
        if changed:
            raise UserError(
                f"strategy.{changed[0]}: given, but trainer.strategy is {config.trainer.strategy}; "
                "it needs layer_pipeline"
            )
        return config.trainer.strategy
    from comet_pl.parallel.strategy import LayerPipelineStrategy

    return LayerPipelineStrategy(process_group_backend=asked.pop("backend"), **asked)


def check_pipeline(config: Config, strategy: LayerPipelineStrategy) -> None:
    """Refuses what the strategy cannot run on the trainer's devices, and warns of ranks that will
    have nothing to do.

    Raises:
        UserError
    """
    strategy.check()
    if config.strategy.sharding != "none" and config.trainer.precision == "16-mixed":
        raise UserError(
            "trainer.precision: 16-mixed given, but its loss scaling cannot work on shards; "
            "allowed: bf16-mixed, bf16-true"
        )
    data, size = config.data, config.model.chunk_size
    length = data.max_length if isinstance(data, TextData) else data.train_length
    chunks = min(config.train.bptt_chunks or length, -(-length // size))
    idle = strategy.pipeline_size - chunks
    if idle > 0 and strategy.global_rank == 0:
        print(
            f"warning: strategy.pipeline_size: {strategy.pipeline_size} ranks share a text, of "
            f"which {chunks} chunk(s) at most are read "
            f"together, so that {idle} of them are always idle; fewer ranks, longer texts, smaller "
            "chunks or more train.bptt_chunks help",
            file=sys.stderr,
            flush=True,
        )


def quiet_lightning() -> None:
    """Silences what is no news to the user; warnings about real trouble stay."""
    logging.getLogger("lightning.pytorch").setLevel(logging.WARNING)
    for message in (
        ".*does not have many workers.*",
        ".*LeafSpec.*",
        ".*`lr_scheduler.step\\(\\)` before.*",  # a first step that the loss scaler skips
        ".*eval mode at the start.*",
        # The module itself logs the first step, and steps across epochs.
        ".*smaller than the logging interval.*",
        ".*sync_dist=True.*",  # the metrics have summed over ranks already
    ):
        warnings.filterwarnings("ignore", message=message)


def device_of(config: Config) -> torch.device:
    """Where evaluation runs: the accelerator that the trainer section asks for.

    Raises:
        UserError: it is not here.
    """
    import torch

    check_device(config)
    asked = config.trainer.accelerator
    if asked in ("cuda", "gpu", "auto") and torch.cuda.is_available():
        return torch.device("cuda")
    if asked in ("mps", "gpu", "auto") and torch.backends.mps.is_available():
        return torch.device("mps")
    return torch.device("cpu")


def load_checkpoint(
    path: Path | str, argv: list[str]
) -> tuple[CometForCausalLM, PreTrainedTokenizerBase, Config]:
    """What eval.py and the notebook start from; see comet_pl/experiment/checkpoint.py."""
    from comet_pl.experiment.checkpoint import load_trained

    return load_trained(Path(path), argv)
