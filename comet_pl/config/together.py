"""Values that are possible each for itself, but not together, or without an effect."""

from comet_pl.config.schema import Config, PasskeyData, TrainConfig
from comet_pl.errors import UserError


def check_together(config: Config, command: str) -> None:
    """Raises UserError for keys that contradict each other."""
    b = config.backbone
    if command == "train" and config.resume and config.run.name is None:
        raise UserError(
            "resume: true given without run.name, so there is no run to go on with; add "
            "run.name=NAME"
        )
    if b.path is None and b.num_attention_heads % b.num_key_value_heads:
        raise UserError(
            f"backbone.num_key_value_heads: {b.num_key_value_heads} given, it must divide "
            f"num_attention_heads={b.num_attention_heads}"
        )
    if b.path is None and b.head_dim % 2:
        raise UserError(
            f"backbone.head_dim: {b.head_dim} given, allowed: an even number (rotary embedding)"
        )
    if isinstance(config.data, PasskeyData) and config.eval.examples is None:
        raise UserError(
            "eval.examples: null given, allowed with data.kind=passkey: integer >= 1 (examples a "
            "cell)"
        )
    if config.eval.baselines and config.data.kind != "text":
        raise UserError(
            f"eval.baselines: {config.eval.baselines} given, but data.kind is {config.data.kind}; "
            "it needs text"
        )
    if command == "train":
        check_parameters(config)
        check_memory_of_a_step(config)
        check_gate_penalty(config)
        check_distillation(config)


def check_parameters(config: Config) -> None:
    """train.parameters fits the model, and its companions have an effect."""
    train, default, model = config.train, TrainConfig(), config.model
    for name in ("lora_rank", "lora_alpha", "lora_dropout"):
        if getattr(train, name) != getattr(default, name) and "lora" not in train.parameters:
            raise UserError(
                f"train.{name}: given, but train.parameters is {train.parameters}; it needs lora "
                "or memory+lora"
            )
    no_memory = not model.global_size and model.compression_stride is None
    if "memory" in train.parameters and no_memory:
        raise UserError(
            f"train.parameters: {train.parameters} given, but model.global_size=0 and "
            "model.compression_stride=null leave no memory to train, allowed: all, lora"
        )


def check_memory_of_a_step(config: Config) -> None:
    """train.recompute and train.compile fit the strategy; train.offload has an effect."""
    train, sharding = config.train, config.strategy.sharding
    if train.offload and train.recompute != "chunk":
        raise UserError(
            f"train.offload: true given, but train.recompute is {train.recompute}; it needs chunk"
        )
    if train.recompute == "chunk" and config.trainer.strategy == "layer_pipeline":
        raise UserError(
            "train.recompute: chunk given, but trainer.strategy is layer_pipeline, whose devices "
            "keep their own chunks, allowed: none, cell"
        )
    if train.compile and sharding != "none":
        raise UserError(
            f"train.compile: true given, but strategy.sharding is {sharding}, which hooks itself "
            "into each layer, allowed: false, or strategy.sharding=none"
        )


def check_gate_penalty(config: Config) -> None:
    """There are gates, gradients reach them, and the target has an effect."""
    train, model = config.train, config.model
    if train.gate_target != TrainConfig().gate_target and not train.gate_pull:
        raise UserError(
            f"train.gate_target: {train.gate_target} given, but train.gate_pull is 0; it needs a "
            "weight > 0"
        )
    for name in ("gate_pull", "gate_entropy"):
        if not getattr(train, name):
            continue
        start = f"train.{name}: {getattr(train, name)} given"
        if not model.global_size or model.gate == "none":
            key = "model.gate=none" if model.global_size else "model.global_size=0"
            raise UserError(
                f"{start}, but {key} leaves no gates, allowed: 0, or another {key.split('=')[0]}"
            )
        if train.bptt_chunks == 1:
            raise UserError(
                f"{start}, but with train.bptt_chunks=1 no gradient reaches a gate, allowed: 0, or "
                "train.bptt_chunks >= 2"
            )


def check_distillation(config: Config) -> None:
    """There is a teacher: a decoder that stays what it is, on a device that reads whole texts."""
    train = config.train
    if train.teacher_length is not None and not train.distill:
        raise UserError(
            f"train.teacher_length: {train.teacher_length} given, but train.distill is 0; it needs "
            "a weight > 0"
        )
    if train.distill and train.parameters == "all":
        raise UserError(
            f"train.distill: {train.distill} given, but train.parameters=all changes the decoder, "
            "which is the teacher, allowed: 0, or train.parameters=memory, lora, memory+lora"
        )
    if train.distill and config.trainer.strategy == "layer_pipeline":
        raise UserError(
            f"train.distill: {train.distill} given, but trainer.strategy is layer_pipeline, whose "
            "devices read parts of a text, allowed: 0, or another trainer.strategy"
        )
