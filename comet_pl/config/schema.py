"""The schema of every command: what can be set, its type, default, possible values and meaning.

`--help` prints the one line of meaning of each key. load.py fills these classes from the conf files
and the command line; rules.py explains the rules. Neither torch nor Lightning is imported.
"""

from dataclasses import dataclass, field
from typing import Any

from comet_pl.config.data_schema import (
    DATA_KINDS,
    AgentData,
    PasskeyData,
    PlainTextData,
    ScrollsData,
    TextData,
    UserBehaviorData,
)
from comet_pl.config.key import key
from comet_pl.config.model_schema import BackboneConfig, ModelConfig, comet_keys

__all__ = [
    "DATA_KINDS",
    "AgentData",
    "BackboneConfig",
    "Config",
    "ModelConfig",
    "PasskeyData",
    "PlainTextData",
    "ScrollsData",
    "TextData",
    "UserBehaviorData",
    "comet_keys",
    "key",
]

PARAMETERS = ("all", "memory", "lora", "memory+lora")
RECOMPUTE = ("none", "cell", "chunk")
SCHEDULES = ("layer_level", "interleaved", "chunk_level")
BASELINES = ("full", "blocks", "window")
SHARDING = ("none", "zero2", "zero3")
AMOUNT = "integer >= 1, or fraction > 0.0 and <= 1.0"


def _folder_name(name: str) -> bool:
    plain = name.strip() == name and name not in (".", "..") and not set(name) & set("/\\\n")
    return plain and 0 < len(name.encode()) <= 200


def _interval(value: int | float) -> bool:
    return 0 < value <= 1 if isinstance(value, float) else value >= 1


def _interval_or_none(value: int | float) -> bool:
    return value == 0 or _interval(value)


def _pair(values: list[float]) -> bool:
    return len(values) == 2


def _devices(value: Any) -> bool:
    if isinstance(value, str):
        return value == "auto" or all(part.strip().isdigit() for part in value.split(","))
    if isinstance(value, list):
        return bool(value) and all(type(index) is int and index >= 0 for index in value)
    return type(value) is int and (value >= 1 or value == -1)


@dataclass(frozen=True)
class RunConfig:
    root: str = key("runs", "folder that holds all runs")
    name: str | None = key(
        None,
        "this run's folder is <root>/<conf>/<name>; null: a time stamp",
        check=_folder_name,
        needs="folder name (no slashes) or null",
    )


@dataclass(frozen=True)
class TrainConfig:
    parameters: str = key(
        "all",
        "what learns; memory: its modules and the rows of new tokens; lora: low-rank updates of "
        "the decoder",
        choices=PARAMETERS,
    )
    lora_rank: int = key(8, "with lora: rank of the updates", min=1)
    lora_alpha: float = key(
        16.0, "with lora: the updates are scaled by lora_alpha / lora_rank", above=0
    )
    lora_dropout: float = key(
        0.0, "with lora: share of the inputs to the updates that is dropped", min=0, below=1
    )
    lr: float = key(3e-4, "peak learning rate of all but the memory modules", above=0, max=1e9)
    memory_lr_factor: float = key(
        5.0, "the memory modules' learning rate, as a multiple of lr (paper: 5)", min=0, max=1e9
    )
    betas: list[float] = key(
        [0.9, 0.999], "AdamW's betas", min=0, below=1, check=_pair, needs="two numbers >= 0 and < 1"
    )
    weight_decay: float = key(
        0.0, "AdamW's weight decay; norms and biases are never decayed", min=0
    )
    warmup_steps: int = key(10, "steps of linear warm-up", min=0)
    final_lr: float = key(0.0, "end of the cosine, as a fraction of the peak", min=0, max=1)
    clip: float | None = key(1.0, "largest global gradient norm; null: no clipping", above=0)
    accumulate: int = key(
        1,
        "micro-batches of data.batch_size added up in one step (the loader reads them together)",
        min=1,
    )
    bptt_chunks: int | None = key(
        None,
        "chunks a window: gradients flow within it, memory flows on; null: through all chunks",
        min=1,
    )
    distill: float = key(
        0.0,
        "weight of KL(teacher || model) in the loss, the rest is cross-entropy; the teacher is the "
        "decoder without memory, which therefore must not learn (train.parameters)",
        min=0,
        max=1,
    )
    teacher_length: int | None = key(
        None,
        "with distill: tokens that the teacher sees at once; of longer texts, halves overlap; "
        "null: as many as the decoder has positions",
        min=2,
    )
    gate_pull: float = key(
        0.0,
        "penalty gate_pull * (mean g - gate_target)^2, averaged over chunks and layers: pulls "
        "gates to a value; 0: off",
        min=0,
    )
    gate_target: float = key(
        0.9, "with gate_pull: the mean g that gates are pulled to", min=0, max=1
    )
    gate_entropy: float = key(
        0.0,
        "penalty -gate_entropy * mean of -g ln g - (1-g) ln(1-g), averaged likewise: keeps gates "
        "undecided; 0: off",
        min=0,
    )
    recompute: str = key(
        "none",
        "less memory, more time; cell: its activations are computed again in the backward pass; "
        "chunk: all but the memory between chunks",
        choices=RECOMPUTE,
        needs="none (once false), cell (once true), chunk",
    )
    offload: bool | None = key(
        None, "with recompute=chunk: the memory between chunks waits on the CPU; null: on a GPU"
    )
    compile: bool = key(
        False,
        "torch.compile of each layer, also in evaluation: minutes at the first step of each "
        "length, then less time",
    )
    peak_tflops: float | None = key(
        None,
        "what a device can do, 10^12 operations a second in this precision; then train/mfu is "
        "logged; null: unknown",
        above=0,
    )
    max_skipped: int = key(
        10, "stop after so many steps in a row with a non-finite gradient norm", min=1
    )


@dataclass(frozen=True)
class EvalConfig:
    after_fit: bool = key(True, "train.py evaluates when it has finished")
    lengths: list[int] | None = key(
        None, "passkey: lengths in tokens; null: 1, 4, 16 and 32 times train_length", min=1
    )
    depths: int = key(11, "passkey: depths, evenly spaced from 0 to 1", min=1)
    examples: int | None = key(
        10,
        "passkey: examples a cell; scrolls: questions a task (null: all); agent: traces; "
        "user_behavior: questions",
        min=1,
    )
    split: str = key(
        "validation",
        "scrolls: questions to answer; test: those of the submission, scored only if answers are "
        "given",
        choices=("validation", "test"),
    )
    budget: int = key(
        4096,
        "user_behavior: tokens of history that truncation and retrieval show the same model",
        min=1,
    )
    val_questions: int = key(
        0,
        "scrolls: questions a task that are answered and scored at each validation while training",
        min=0,
    )
    baselines: list[str] | None = key(
        None,
        "text: what the decoder without memory makes of the same rows: full: of all before a "
        "token; blocks: of its own block of chunk_size; window: of a sliding window with attention "
        "sinks, as many keys as there are memory slots; null: none",
        choices=BASELINES,
    )
    max_new_tokens: int | None = key(
        None, "scrolls, agent: longest answer in tokens; null: by task, 256", min=1
    )
    priming: int | None = key(
        None,
        "scrolls, user_behavior: tokens of a prompt's last chunk, which the answer continues; "
        "null: as chunk_size leaves it",
        min=1,
    )
    batch_size: int = key(8, "scrolls, user_behavior: prompts generated at once", min=1)


@dataclass(frozen=True)
class MonitorConfig:
    """What is watched while training, for the run's monitor/ folder and TensorBoard."""

    gates: bool = key(
        True,
        "mean, variance and half-life of each layer's gates, histograms, a heat-map, a warning of "
        "collapsed gates",
    )
    gates_every: int = key(100, "with gates: steps between histograms", min=1)
    memory: bool = key(
        True,
        "at validations: norms, effective rank and likeness of the memories, and who attends to "
        "them, on one text",
    )
    memory_every: int = key(
        1, "with memory: only at validations after a multiple of so many steps", min=1
    )
    length_report: bool = key(True, "at validations: loss by position in the document, in chunks")
    predictions: bool = key(
        True,
        "at validations that predict answers: each of them as text, in TensorBoard and as jsonl",
    )


@dataclass(frozen=True)
class CheckpointConfig:
    every_steps: int | None = key(
        500, "write last.ckpt every so many steps; null: never by steps", min=1
    )
    every_minutes: float | None = key(
        10.0, "write last.ckpt every so many minutes; null: never by time", above=0
    )
    monitor: str = key("val/loss", "logged value that decides which checkpoint is best.ckpt")
    mode: str = key(
        "min", "whether the least or the greatest monitored value is best", choices=("min", "max")
    )


@dataclass(frozen=True)
class TrainerConfig:
    """Passed to lightning.Trainer under the same names."""

    accelerator: str = key(
        "auto", "kind of device", choices=("auto", "cpu", "gpu", "cuda", "mps", "tpu")
    )
    # OmegaConf has no unions with lists; the check knows the types.
    devices: Any = key(
        "auto",
        "how many, or which ([0,1])",
        check=_devices,
        needs="auto, integer >= 1, -1 (all) or indices as in [0,1]",
    )
    num_nodes: int = key(1, "machines", min=1)
    strategy: str = key(
        "auto", "Lightning's strategy, or layer_pipeline: one text over several devices"
    )
    precision: str = key(
        "32-true",
        "numbers of weights and of arithmetic (fp32: 32-true)",
        choices=("32-true", "bf16-mixed", "bf16-true", "16-mixed"),
    )
    matmul_precision: str = key(
        "highest",
        "of float32 products: high takes a GPU's TF32, several times faster, with 10 bits",
        choices=("highest", "high"),
    )
    max_steps: int = key(1000, "optimizer steps; the learning rate's cosine ends there", min=1)
    max_epochs: int | None = key(None, "passes over the data; null: until max_steps", min=1)
    limit_train_batches: int | float = key(
        1.0, "training batches an epoch, as number or as fraction", check=_interval, needs=AMOUNT
    )
    limit_val_batches: int | float = key(
        1.0,
        "validation batches; 0: no validation",
        check=_interval_or_none,
        needs=f"{AMOUNT}, or 0",
    )
    val_check_interval: int | float = key(
        500, "batches between validations, or a fraction of an epoch", check=_interval, needs=AMOUNT
    )
    log_every_n_steps: int = key(10, "steps between logged values", min=1)


@dataclass(frozen=True)
class StrategyConfig:
    """For trainer.strategy=layer_pipeline (comet_pl/parallel/strategy.py)."""

    pipeline_size: int | None = key(None, "ranks that share a text (P); null: all devices", min=1)
    sharding: str = key(
        "none",
        "of weights and optimizer: zero2 over all ranks; zero3 over data-parallel ranks, layer by "
        "layer",
        choices=SHARDING,
    )
    schedule: str | None = key(
        None,
        "who runs which chunks when; null: interleaved, but layer_level with zero3",
        choices=SCHEDULES,
    )
    timeout: float = key(
        60.0,
        "seconds within which a rank that dies, or never comes, ends all others; longer than a "
        "rank may be too busy to answer",
        above=0,
    )
    backend: str | None = key(
        None, "how ranks talk; null: nccl on GPUs, gloo on CPUs", choices=("gloo", "nccl")
    )


@dataclass(frozen=True)
class Config:
    """Everything that a command needs to know; plain Python values throughout."""

    conf: str | None = key(
        "passkey", "which conf/<name>.yaml; eval.py: the checkpoint's own", needs="name of a conf"
    )
    resume: bool = key(
        False, "go on from the run's last.ckpt, or start if there is none (needs run.name)"
    )
    seed: int = key(0, "seed of weights, data and order", min=0, max=2**32 - 1)
    run: RunConfig = field(default_factory=RunConfig)
    model: ModelConfig = field(default_factory=ModelConfig)
    backbone: BackboneConfig = field(default_factory=BackboneConfig)
    data: PasskeyData | ScrollsData | AgentData | UserBehaviorData | PlainTextData = field(
        default_factory=PasskeyData
    )
    train: TrainConfig = field(default_factory=TrainConfig)
    eval: EvalConfig = field(default_factory=EvalConfig)
    monitor: MonitorConfig = field(default_factory=MonitorConfig)
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    trainer: TrainerConfig = field(default_factory=TrainerConfig)
    strategy: StrategyConfig = field(default_factory=StrategyConfig)
