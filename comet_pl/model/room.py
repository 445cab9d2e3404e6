"""Whether a device has room for a cache."""

import os
from pathlib import Path

import torch

from comet_pl.model.configuration_comet import CometConfig


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
