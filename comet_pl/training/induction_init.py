"""Initial weights with which a decoder from scratch learns lookups within minutes.

To continue `KEY VALUE ... KEY` by VALUE takes an induction head (Olsson et al. 2022): two steps of
which neither helps without the other, so that random weights are slow to find them
(docs/lab-notes.md: not in 45,000 examples, where this start needs 6,000):

    first layer    the value's token gathers the key before it, a question's end the key asked for
    later layers   attend to tokens that gathered the same, and output what stands there

`start_lookups` sets weights so that both steps exist from the beginning, in the manner of mimetic
initialization (Trockman and Kolter 2023); everything stays trainable. With e the embedding of a
token, theta_i the rotary frequencies, D how many tokens back, d the head's width and o its offset:

    first layer    score = NEAR * mean_i cos(theta_i (D - o)) + content
                   by the biases of queries and keys
                   output = small * sum over heads of V^T V e
                   by O = small * V^T; the MLP is small too
    later layers   score = content - FAR * mean_i cos(theta_i D), K = Q
                   what is alike, but not the token itself or its neighbours
                   output = copy * V^T V e, by O = copy * V^T

It needs an initializer_range of about 1 / sqrt(hidden_size).
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

NEAR = 35.0  # of a score at the offset; two tokens aside it is about three less
FAR = 12.7
SMALL = 0.1  # the first layer's output is about as long as the embedding that it is added to
COPY = 0.5
CONTENT = 0.3  # of the first layer's queries and keys
ALIKE = 1.2  # of the later layers' queries


@torch.no_grad()
def start_lookups(model: PreTrainedModel, offsets: Sequence[int]) -> None:
    """Changes the weights of a newly initialized decoder in place.

    Args:
        model: with `model.model.layers`, as Hugging Face's decoders are.
        offsets: how many tokens back each head of the first layer looks.

    Raises:
        ValueError: fewer than two layers, queries and keys without biases or with unequal numbers
            of heads, or not one offset a head.
    """
    config, layers = model.config.get_text_config(), model.model.layers
    heads, width = config.num_attention_heads, layers[0].self_attn.head_dim
    mistakes = {
        f"needs two layers or more, num_hidden_layers is {len(layers)}": len(layers) < 2,
        "needs a decoder whose queries and keys have biases, model_type: qwen2, or null": (
            layers[0].self_attn.q_proj.bias is None
        ),
        f"needs as many key/value heads as the {heads} query heads, "
        f"not {config.num_key_value_heads}, or null": config.num_key_value_heads != heads,
        f"{list(offsets)} given, one offset for each of the {heads} heads is needed": (
            len(offsets) != heads
        ),
    }
    for mistake, made in mistakes.items():
        if made:
            raise ValueError(f"lookback: {mistake}")
    theta = config.rope_parameters["rope_theta"] ** (-torch.arange(width // 2) / (width // 2))
    for number, layer in enumerate(layers):
        attention, first = layer.self_attn, number == 0
        # (heads, width / 2)
        shifts = torch.tensor(offsets if first else [0] * heads)[:, None] * theta
        _bias(attention, shifts, NEAR if first else -FAR)
        attention.q_proj.weight *= CONTENT if first else ALIKE
        if first:
            attention.k_proj.weight *= CONTENT
            layer.mlp.down_proj.weight *= SMALL
        else:
            attention.k_proj.weight.copy_(attention.q_proj.weight)
        attention.o_proj.weight.copy_((SMALL if first else COPY) * attention.v_proj.weight.T)


def _bias(attention: Any, shifts: Tensor, strength: float) -> None:
    """Sets biases whose rotated product at distance D is
    strength * mean_i cos(theta_i D - shifts_i).

    Args:
        shifts: (heads, width / 2) angles.
    """
    heads, half = shifts.shape
    size = (abs(strength) * (2 * half) ** 0.5 / half) ** 0.5
    query = torch.cat([shifts.cos(), -shifts.sin()], dim=1) * size
    key = torch.cat([torch.ones(heads, half), torch.zeros(heads, half)], dim=1) * size
    attention.q_proj.bias.copy_(query.flatten() * (1 if strength > 0 else -1))
    attention.k_proj.bias.copy_(key.flatten())
