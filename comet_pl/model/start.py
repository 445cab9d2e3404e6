"""Plugging memory into a decoder that has learnt without it, and what the new parts begin as.

Legend: d width.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from comet_pl.model.cell import check_backbone
from comet_pl.model.configuration_comet import CometConfig, check_keys


def plug_in(cls: Any, decoder: PreTrainedModel, comet: dict[str, Any], start: int | None) -> Any:
    """CometForCausalLM.from_decoder, whose arguments these are."""
    check_keys(comet)
    check_backbone(decoder.config)
    text = decoder.config.vocab_size
    if start is not None and not 0 <= start < text:
        raise ValueError(f"start: {start} given, allowed: ids of text, 0 to {text - 1}, or None")
    config = CometConfig(backbone_config=decoder.config, **comet)
    if config.vocab_size > text:
        decoder.resize_token_embeddings(config.vocab_size, mean_resizing=True)
    implementation = decoder.config._attn_implementation
    model = cls(config, decoder)
    model.config._attn_implementation = implementation
    if decoder.generation_config is not None:
        model.generation_config = decoder.generation_config
    if start is not None:
        start_rows(model, start)
    start_sinks(model)
    return model.train(decoder.training)


@torch.no_grad()
def start_rows(model: Any, token: int) -> None:
    """The rows of all new tokens become that of a text token."""
    for module in (model.get_input_embeddings(), model.get_output_embeddings()):
        module.weight[model.config.first_new_id :] = module.weight[token]


@torch.no_grad()
def start_sinks(model: Any) -> None:
    """Each layer's sink becomes what the layer finds at a text's first token: the one that the
    decoder begins texts with, or ends them with, or its first."""
    backbone = model.config.backbone_config
    known = (backbone.bos_token_id, backbone.eos_token_id)
    first: Any = next((token for token in known if token is not None), 0)
    first = first[0] if isinstance(first, list) else first

    def keep(cell: nn.Module, inputs: tuple[Tensor, ...], sink: Tensor) -> None:
        sink.copy_(inputs[0][0, 0])

    hooks = [
        cell.register_forward_pre_hook(partial(keep, sink=cell.sink))
        for cell in model.model.layers
        if cell.sink is not None
    ]
    if hooks:
        device = model.lm_head.weight.device
        model(torch.tensor([[first]], device=device), use_cache=False, logits_to_keep=1)
    for hook in hooks:
        hook.remove()
