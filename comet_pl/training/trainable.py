"""What is trained: all weights, the memory alone, LoRA on the decoder, or both; by peft, in place.

The model stays a CometForCausalLM. Single modules in it are wrapped, which changes names
(`q_proj.weight` -> `q_proj.base_layer.weight`); `merge_adapters` restores plain weights and names.
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from torch import nn

from comet_pl.config.schema import TrainConfig
from comet_pl.model.configuration_comet import CometConfig
from comet_pl.model.modeling_comet import CometForCausalLM

if TYPE_CHECKING:
    from peft import PeftConfig

# Whole names: the memory modules have projections of the same last names.
DECODER_LINEARS = r"model\.layers\.\d+\.(self_attn\.[qkvo]_proj|mlp\.(gate|up|down)_proj)"
ROWS = "trainable_tokens_delta"
ADAPTERS = {ROWS, "lora_A", "lora_B"}  # in the names of peft's parameters


def add_adapters(
    model: CometForCausalLM, train: TrainConfig, rows: Sequence[int] | None = None
) -> None:
    """Makes trainable what train.parameters names, and freezes the rest.

    - all: everything; the model is left as it is.
    - memory: the memory modules and the new tokens' rows of the embedding, which a tied head
      shares. An untied head is frozen: no new token is ever a target.
    - lora: low-rank matrices at the decoder's attention and MLP projections.
    - memory+lora: both.

    Load a checkpoint's weights after this call, a plain model's before it.

    Args:
        rows: ids of the new tokens; None: those of the model's configuration (a checkpoint may have
            others).
    """
    parts = train.parameters.split("+")
    if "all" in parts:
        return
    from peft import LoraConfig, TrainableTokensConfig

    rows = new_rows(model.config) if rows is None else rows
    if "memory" in parts and rows:
        target = ["embed_tokens"]
        _inject(model, TrainableTokensConfig(token_indices=list(rows), target_modules=target))
    if "lora" in parts:
        alpha: Any = train.lora_alpha  # peft takes any number
        options = {"r": train.lora_rank, "lora_alpha": alpha, "lora_dropout": train.lora_dropout}
        _inject(model, LoraConfig(target_modules=DECODER_LINEARS, **options))
    model.requires_grad_(False)
    trained = [p for name, p in model.named_parameters() if is_adapter(name)]
    if "memory" in parts:
        trained += [p for _, p in model.memory_parameters()]
    for parameter in trained:
        parameter.requires_grad_(True)


def _inject(model: CometForCausalLM, settings: PeftConfig) -> None:
    from peft import inject_adapter_in_model

    with warnings.catch_warnings():
        # It says that the head's rows are not tied to the embedding's; TrainableTokensConfig ties.
        warnings.filterwarnings("ignore", message=".*tie_word_embeddings=True.*")
        inject_adapter_in_model(settings, model)
    del model.peft_config  # peft would refuse the next kind of adapter


def halve_frozen(model: CometForCausalLM) -> None:
    """Frozen weights in bfloat16: autocast would make a copy of them in every cell."""
    for parameter in model.parameters():
        if not parameter.requires_grad:
            parameter.data = parameter.data.bfloat16()


def merge_adapters(model: CometForCausalLM) -> None:
    """Writes LoRA and new rows into their weights, removes peft's modules and makes all weights
    trainable. A model without adapters is left as it is."""
    from peft.tuners.tuners_utils import BaseTunerLayer

    wrapped = [(name, m) for name, m in model.named_modules() if isinstance(m, BaseTunerLayer)]
    for name, layer in wrapped:
        layer.merge()
        plain = layer.get_base_layer()
        assert isinstance(plain, nn.Module)
        model.set_submodule(name, plain)
    if wrapped:
        model.requires_grad_(True)


def count_parameters(model: CometForCausalLM) -> dict[str, int]:
    """Numbers of weights, with adapters or without; tied ones count once.

    Returns:
        decoder (without the new rows), memory (its modules), rows (of new tokens, in the
        embedding), lora; and learning, those of all of them that are not frozen.
    """
    memory = sum(p.numel() for _, p in model.memory_parameters())
    rows = len(new_rows(model.config)) * model.config.backbone_config.hidden_size
    lora = plain = 0
    for name, parameter in model.named_parameters():
        if not is_adapter(name):
            plain += parameter.numel()
        elif ROWS not in name:
            lora += parameter.numel()
    learning = sum(p.numel() for p in model.parameters() if p.requires_grad)
    decoder = plain - memory - rows
    return {"decoder": decoder, "memory": memory, "rows": rows, "lora": lora, "learning": learning}


def describe(counts: dict[str, int]) -> str:
    """One line for people."""
    total = sum(counts.values()) - counts["learning"]
    frozen = " (frozen)" if counts["learning"] < total else ""
    parts = [
        f"{counts['decoder']:,} weights of the decoder{frozen}",
        f"{counts['memory']:,} in memory modules",
        f"{counts['rows']:,} in rows of new tokens",
    ]
    if counts["lora"]:
        parts.append(f"{counts['lora']:,} in LoRA")
    share = 100 * counts["learning"] / total
    return f"{', '.join(parts)}: {counts['learning']:,} learn ({share:.3g} %)"


def new_rows(config: CometConfig) -> list[int]:
    """Ids of the compression and readout tokens."""
    compression = [config.compression_token_id] if config.compression_stride is not None else []
    return [row for row in (*compression, *config.readout_token_ids) if row is not None]


def is_adapter(name: str) -> bool:
    return not ADAPTERS.isdisjoint(name.split("."))
