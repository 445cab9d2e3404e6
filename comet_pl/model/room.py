"""Whether a device has room for a cache."""

import os
from pathlib import Path
from typing import Any

import torch

from comet_pl.model.configuration_comet import CometConfig

LAYER = 70_000
"""Bytes of a layer's Python objects, measured; its weights come on top."""


class TooLittleMemory(ValueError, MemoryError):
    """The device has too little memory; raised before anything is computed."""


def free_bytes(device: torch.device) -> int | None:
    """Bytes that can still be allocated; None: not known here."""
    if device.type == "cuda":
        free, _ = torch.cuda.mem_get_info(device)
        return free + torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    if device.type == "cpu" and os.path.exists("/proc/meminfo"):
        for line in Path("/proc/meminfo").read_text().splitlines():
            if line.startswith("MemAvailable:"):
                return int(line.split()[1]) << 10
    return None


def check_weights(backbone: Any, adapter_rank: int) -> None:
    """Raises TooLittleMemory if a decoder from scratch exceeds the free memory; not exact.

    Args:
        backbone: its sizes, named as in Hugging Face's configurations.
    """
    d, heads = backbone.hidden_size, backbone.num_attention_heads * backbone.head_dim
    keys = backbone.num_key_value_heads * backbone.head_dim
    layer = d * (2 * heads + 2 * keys + 3 * backbone.intermediate_size + 4 * adapter_rank)
    count = backbone.num_hidden_layers * (layer + 10 * d) + backbone.vocab_size * d
    needed = 4 * count + LAYER * backbone.num_hidden_layers
    free = free_bytes(torch.device("cpu"))
    if free is not None and needed > free:
        raise TooLittleMemory(
            f"{backbone.num_hidden_layers:,} layers with about {count:,} weights take "
            f"{needed / 2**30:,.1f} GiB, but "
            f"{free / 2**30:,.1f} GiB are free; smaller sizes of backbone or model are needed"
        )


def check_room(
    config: CometConfig,
    batch: int,
    dtype: torch.dtype,
    device: torch.device,
    stride: int | None = None,
) -> None:
    """Raises TooLittleMemory if a cache for `batch` texts exceeds the device's free memory."""
    needed, free = config.cache_bytes(batch, dtype, stride), free_bytes(device)
    if free is not None and needed > free:
        fit = free // (needed // batch)
        advice = f"read at most {fit} at once, or choose" if fit else "choose"
        raise TooLittleMemory(
            f"the memory of {batch} text(s) takes {needed / 2**20:,.0f} MiB, whatever their "
            f"length, but {free / 2**20:,.0f} MiB are free on {device}: {advice} smaller memories "
            "or chunks"
        )
