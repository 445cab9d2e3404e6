"""The schema of every command: what can be set, its type, default, possible values and meaning.

`--help` prints the one line of meaning of each key. load.py fills these classes from the conf files
and the command line; rules.py explains the rules. Neither torch nor Lightning is imported.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

PARAMETERS = ("all", "memory", "lora", "memory+lora")
PACKING = ("none", "documents", "shared")
PLANS = ("fixed", "right_aligned", "random", "uniform", "sentence", "mixture")
RECOMPUTE = ("none", "cell", "chunk")
SCHEDULES = ("layer_level", "interleaved", "chunk_level")
SHARDING = ("none", "zero2", "zero3")
AMOUNT = "integer >= 1, or fraction > 0.0 and <= 1.0"


def key(default: Any, meaning: str, **rules: Any) -> Any:
    """A dataclass field with its one-line meaning and the rules of its values."""
    metadata = {"help": meaning, **rules}
    if isinstance(default, list):
        return field(default_factory=lambda: list(default), metadata=metadata)
    return field(default=default, metadata=metadata)


MOST_DAYS = 36_500  # a century, so that years keep four digits


def _folder_name(name: str) -> bool:
    return name.strip() == name and name not in (".", "..") and not set(name) & set("/\\\n")


def _length_schedule(pairs: list[list[int]]) -> bool:
    steps = [pair[0] for pair in pairs]
    return (
        all(len(pair) == 2 and pair[1] >= 1 for pair in pairs)
        and steps[0] == 0
        and sorted(set(steps)) == steps
    )


def _least_most(values: list[int]) -> bool:
    return len(values) == 2 and values[0] <= values[1]


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
class ModelConfig:
    """Keys of CometConfig; the paper's notation in brackets."""

    chunk_size: int = key(64, "text tokens a chunk (C)", min=1)
    global_size: int = key(
        8, "readout tokens = global memory slots (m); 0: no global memory", min=0
    )
    compression_stride: int | None = key(
        8, "a compression token after every s text tokens (s); null: no temporary memory", min=1
    )
    temporary_capacity: int = key(64, "temporary memory slots, oldest leave first (K)", min=1)
    adapter_rank: int = key(8, "rank of the residual adapters (r)", min=1)
    shared_adapter: bool = key(
        False,
        "one adapter for both memories, as the paper says (false: one each, as the authors' code)",
    )
    gate: str = key(
        "scalar",
        "scalar: one gate value a slot; elementwise: low-rank, one a channel; none",
        choices=("scalar", "elementwise", "none"),
    )
    gate_bias: float | None = key(
        None,
        "start value of a gate bias, > 0 keeps the old state at first; null: no bias, as the "
        "authors",
    )
    rollover: bool = key(
        True,
        "a full chunk closes and a new one opens while generating; false: the last chunk grows",
    )


@dataclass(frozen=True)
class BackboneConfig:
    path: str | None = key(
        None,
        "folder or hub id of a pre-trained decoder or a CoMeT; null: from scratch, with the keys "
        "below",
    )
    model_type: str = key(
        "qwen3",
        "from scratch: decoder family",
        choices=("qwen3", "qwen2", "llama", "mistral", "smollm3"),
    )
    hidden_size: int = key(128, "from scratch: width (d)", min=1)
    num_hidden_layers: int = key(2, "from scratch: layers (L)", min=1)
    num_attention_heads: int = key(4, "from scratch: query heads", min=1)
    num_key_value_heads: int = key(
        4, "from scratch: key/value heads; they divide the query heads", min=1
    )
    head_dim: int = key(32, "from scratch: width of a head; even, for the rotary embedding", min=2)
    intermediate_size: int = key(384, "from scratch: width of the MLP", min=1)
    rope_theta: float = key(10000.0, "from scratch: base of the rotary embedding", above=0)
    initializer_range: float = key(0.02, "from scratch: standard deviation of new weights", above=0)
    tie_word_embeddings: bool = key(True, "from scratch: the head shares the embedding's weights")
    vocab_size: int = key(
        512,
        "from scratch: size of the tokenizer that is trained on the data (256 are bytes)",
        min=260,
    )
    lookback: list[int] | None = key(
        None,
        "from scratch, with qwen2: a start that looks things up; how far back each head of layer 1 "
        "looks; null: all drawn",
        min=0,
        max=65536,
    )
    attn_implementation: str = key("sdpa", "attention kernel", choices=("sdpa", "eager"))


@dataclass(frozen=True)
class PasskeyData:
    kind: str = key("passkey", "which data: chooses the keys of this section")
    train_length: int = key(
        1024, "tokens of a training example, question and answer included", min=1
    )
    length_schedule: list[list[int]] | None = key(
        None,
        "lengths by step, clipped to trainer.max_steps; null: always train_length",
        check=_length_schedule,
        needs="[[0, length], [step, length], ...] with growing steps and lengths >= 1, or null",
    )
    haystack: str | None = key(
        None, "a text file to hide the keys in; null: sentences that the project makes itself"
    )
    batch_size: int = key(32, "rows a batch", min=1)
    num_workers: int = key(0, "worker processes that make batches", min=0)
    val_lengths: list[int] | None = key(
        None, "lengths of the validation heat-map; null: [train_length]", min=1
    )
    val_depths: int = key(5, "depths of the validation heat-map, evenly spaced from 0 to 1", min=1)
    val_examples: int = key(4, "examples a cell of the validation heat-map", min=1)


@dataclass(frozen=True)
class TextData:
    """What all data of texts share (data/text/batches.py)."""

    kind: str = key("", "which data: chooses the keys of this section")
    max_length: int = key(
        2048,
        "tokens of a row; what a longer text loses depends on data.kind, and is counted",
        min=1,
    )
    batch_size: int = key(4, "rows a batch", min=1)
    packing: str = key(
        "none",
        "several texts in a row; documents: each with a memory of its own; shared: one memory, as "
        "the authors",
        choices=PACKING,
    )
    chunk_plan: str = key(
        "fixed",
        "how training texts are cut into chunks; mixture: one kind drawn for each, as the authors",
        choices=PLANS,
    )
    dynamic_stride: bool = key(
        False, "draw each training row's compression stride from s, 2s, 4s, ... up to 128"
    )
    streaming: bool = key(
        False, "read and tokenise rows when they are needed, instead of once into data.cache"
    )
    shuffle_window: int = key(
        1024, "with streaming: rows that are shuffled, and packed, together", min=1
    )
    cache: str = key(
        "runs/cache",
        "folder for tokenised texts, by tokenizer, files and options; used again, never cleared",
    )
    num_workers: int = key(0, "worker processes that tokenise and make batches", min=0)
    on_error: str = key(
        "raise",
        "a malformed row: raise (one line, naming file and line) or skip (counted and shown)",
        choices=("raise", "skip"),
    )


@dataclass(frozen=True)
class ScrollsData(TextData):
    kind: str = key("scrolls", "which data: chooses the keys of this section")
    root: str | None = key(
        None, "folder with <task>/<split>.jsonl[.xz|.gz|.zst]; null: the hub's tau/scrolls"
    )
    tasks: list[str] | None = key(None, "tasks to read; null: every task folder in root")
    weights: list[float] | None = key(
        None,
        "how often an epoch has the rows of each task, in the order of tasks; null: once",
        min=0,
    )
    max_length: int = key(
        2048,
        "tokens of a row; a longer document loses its left part, never question or answer",
        min=1,
    )
    val_examples: int | None = key(64, "validation questions a task; null: all", min=1)


@dataclass(frozen=True)
class AgentData(TextData):
    kind: str = key("agent", "which data: chooses the keys of this section")
    root: str | None = key(
        None,
        "traces: a jsonl file, or a folder of them, plain, .xz, .gz or .zst; or one with train.* "
        "and validation.*",
    )
    max_length: int = key(
        16384, "tokens of a row; a longer trace is unusable (see on_error)", min=1
    )
    val_share: float = key(
        0.1, "share of the tasks to validate on, where the files don't tell", min=0, below=1
    )
    min_reward: float | None = key(
        None,
        "traces with less reward, or without one, are left out and counted; null: all are used",
    )
    last_turns: int | None = key(
        None, "loss on the last so many turns of the assistant; null: on all", min=1
    )
    val_examples: int | None = key(16, "validation traces; null: all", min=1)


@dataclass(frozen=True)
class UserBehaviorData:
    kind: str = key("user_behavior", "which data: chooses the keys of this section")
    root: str | None = key(
        None, "event log: a jsonl, csv or parquet file, or a folder with one named events"
    )
    items: str | None = key(
        None, "table of item descriptions; null: items.* beside the events, if it is there"
    )
    user_column: str = key("user_id", "name of the column")
    time_column: str = key("timestamp", "name of the column; ISO times")
    action_column: str | None = key(
        "action", "name of the column; null: all events are of data.action"
    )
    item_column: str = key("item", "name of the column, in the item table too")
    quantity_column: str | None = key("quantity", "name of the column; null: none")
    price_column: str | None = key("price", "name of the column; null: none")
    description_column: str = key("description", "name of the column of the item table")
    descriptions: bool = key(
        True, "items by description and number; false: by number alone, which is shorter"
    )
    action: str = key("purchase", "the action that questions are about")
    kinds: list[str] | None = key(
        None, "kinds of questions (data/behavior/questions.py); null: all that the columns allow"
    )
    questions: int = key(
        1, "questions that a training row asks about its window, one after the other", min=1
    )
    layout: str = key(
        "days",
        "history: the day once above its events, in each of the lines, or lines that begin with "
        "item and day (then questions name numbers)",
        choices=("days", "lines", "items"),
    )
    whole_words: bool = key(
        True,
        "a tokenizer trained here: an item, day, time or price is one token where vocab_size "
        "allows; false: digit by digit",
    )
    keep_events: float = key(
        1.0,
        "training windows leave out events at random: the least share that is kept (next_item is "
        "then the next kept)",
        above=0,
        max=1,
    )
    shift_days: int = key(
        0,
        "training windows have their days moved, all alike, by up to so many",
        min=0,
        max=MOST_DAYS,
    )
    new_days: list[int] | None = key(
        None,
        "training windows have their events spread over a span of [least, most] days, within "
        "shift_days of the log; null: as they are",
        min=1,
        max=MOST_DAYS,
        check=_least_most,
        needs=f"[least, most] with 1 <= least <= most <= {MOST_DAYS}, or null",
    )
    duplicates: str = key(
        "keep", "equal rows: keep, or drop all but the first", choices=("keep", "drop")
    )
    train_length: int = key(
        4096, "tokens of a training example, question and answer included", min=1
    )
    length_schedule: list[list[int]] | None = key(
        None,
        "lengths by step, clipped to trainer.max_steps; null: always train_length",
        check=_length_schedule,
        needs="[[0, length], [step, length], ...] with growing steps and lengths >= 1, or null",
    )
    batch_size: int = key(16, "rows a batch", min=1)
    num_workers: int = key(0, "worker processes that make batches", min=0)
    on_error: str = key(
        "raise",
        "a malformed row: raise (one line, naming file and line) or skip (counted and shown)",
        choices=("raise", "skip"),
    )
    val_examples: int = key(64, "validation questions", min=1)


DATA_KINDS: dict[str, type] = {
    "passkey": PasskeyData,
    "scrolls": ScrollsData,
    "agent": AgentData,
    "user_behavior": UserBehaviorData,
}
"""data.kind -> the schema of the data section."""


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
    lr: float = key(3e-4, "peak learning rate of all but the memory modules", above=0)
    memory_lr_factor: float = key(
        5.0, "the memory modules' learning rate, as a multiple of lr (paper: 5)", min=0
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
    offload: bool = key(False, "with recompute=chunk: the memory between chunks waits on the CPU")
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
        "seconds within which a dead rank ends all others; longer than a rank may be too busy to "
        "answer",
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
    data: PasskeyData | ScrollsData | AgentData | UserBehaviorData = field(
        default_factory=PasskeyData
    )
    train: TrainConfig = field(default_factory=TrainConfig)
    eval: EvalConfig = field(default_factory=EvalConfig)
    monitor: MonitorConfig = field(default_factory=MonitorConfig)
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    trainer: TrainerConfig = field(default_factory=TrainerConfig)
    strategy: StrategyConfig = field(default_factory=StrategyConfig)
