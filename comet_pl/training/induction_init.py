"""A start for decoders from scratch with which they look things up within minutes.

To continue `KEY VALUE ... KEY` by VALUE takes an induction head (Olsson et al. 2022), two steps that are of no use without each other, so
that random weights are slow to find them (docs/lab-notes.md: not in 45,000 examples, where this start needs 6,000):

    first layer    the value's token gathers the key before it, and the end of a question the key that it asks about
    later layers   attend to where the gathered is alike, and say what stands there

`start_lookups` sets weights so that both steps are there from the beginning, in the manner of mimetic initialization (Trockman and Kolter
2023); everything goes on learning. With e the embedding of a token, theta_i the rotary frequencies, D how many tokens back, d the head's
width and o the head's offset:

    first layer    score = NEAR * mean_i cos(theta_i (D - o)) + content     by the biases of queries and keys
                   output = small * sum over heads of V^T V e               by O = small * V^T; the MLP is small too
    later layers   score = content - FAR * mean_i cos(theta_i D),  K = Q    what is alike, but not the token itself or its neighbours
                   output = copy * V^T V e                                  by O = copy * V^T

It wants initializer_range to be about 1 / sqrt(hidden_size).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

NEAR = 35.0  # of a score at the offset; two tokens aside it is about three less
FAR = 12.7
SMALL = 0.1  # what the first layer adds is about as long as the embedding that it is added to
COPY = 0.5
CONTENT = 0.3  # of the first layer's queries and keys
ALIKE = 1.2  # of the later layers' queries


@torch.no_grad()
def start_lookups(model: PreTrainedModel, offsets: Sequence[int]) -> None:
    """Changes the weights of a decoder, drawn anew, in place.

    Args:
        model: with `model.model.layers`, as Hugging Face's decoders are. offsets: how many tokens back each head of the first layer looks.

    Raises:
        ValueError: fewer than two layers, queries and keys without biases or with unequal numbers of heads, or not one offset a head.
    """
    config, layers = model.config.get_text_config(), model.model.layers
    heads, width = config.num_attention_heads, layers[0].self_attn.head_dim
    if len(layers) < 2:
        raise ValueError(f"lookback: needs two layers or more, num_hidden_layers is {len(layers)}")
    if layers[0].self_attn.q_proj.bias is None:
        raise ValueError(
            "lookback: needs a decoder whose queries and keys have biases, model_type: qwen2, or null"
        )
    if config.num_key_value_heads != heads:
        raise ValueError(
            f"lookback: needs as many key/value heads as the {heads} query heads, not {config.num_key_value_heads}, or null"
        )
    if len(offsets) != heads:
        raise ValueError(
            f"lookback: {list(offsets)} given, one offset for each of the {heads} heads is needed"
        )
    theta = config.rope_parameters["rope_theta"] ** (-torch.arange(width // 2) / (width // 2))
    for number, layer in enumerate(layers):
        attention, first = layer.self_attn, number == 0
        shifts = (
            torch.tensor(offsets if first else [0] * heads)[:, None] * theta
        )  # (heads, width / 2)
        _bias(attention, shifts, NEAR if first else -FAR)
        attention.q_proj.weight *= CONTENT if first else ALIKE
        if first:
            attention.k_proj.weight *= CONTENT
            layer.mlp.down_proj.weight *= SMALL
        else:
            attention.k_proj.weight.copy_(attention.q_proj.weight)
        attention.o_proj.weight.copy_((SMALL if first else COPY) * attention.v_proj.weight.T)


def _bias(attention: Any, shifts: Tensor, strength: float) -> None:
    """Biases whose rotated product is strength * mean_i cos(theta_i D - shifts_i) at distance D.

    Args:
        shifts: (heads, width / 2) angles.
    """
    heads, half = shifts.shape
    size = (abs(strength) * (2 * half) ** 0.5 / half) ** 0.5
    query = torch.cat([shifts.cos(), -shifts.sin()], dim=1) * size
    key = torch.cat([torch.ones(heads, half), torch.zeros(heads, half)], dim=1) * size
    attention.q_proj.bias.copy_(query.flatten() * (1 if strength > 0 else -1))
    attention.k_proj.bias.copy_(key.flatten())
