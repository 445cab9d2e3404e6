"""From the host's arrays to the device."""

import numpy as np
import torch
from torch import Tensor


def moved(tensor: Tensor, device: torch.device) -> Tensor:
    """On the device; from the CPU to a GPU without waiting for it."""
    if tensor.device.type == "cpu" and device.type == "cuda":
        tensor = tensor.pin_memory()
    return tensor.to(device, non_blocking=True)


def to_device(device: torch.device, *arrays: np.ndarray | None) -> list[Tensor | None]:
    """Arrays of whole numbers as int64 tensors; on a GPU in one copy that the host does not wait
    for."""
    if device.type == "cpu":
        return [None if array is None else torch.from_numpy(array) for array in arrays]
    given = [array for array in arrays if array is not None]
    packed = torch.from_numpy(np.concatenate([array.ravel() for array in given]))
    parts = iter(moved(packed, device).split([array.size for array in given]))
    return [None if array is None else next(parts).view(array.shape) for array in arrays]
