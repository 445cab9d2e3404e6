"""What tells that a file is still what was written: digests of folders and of caches."""

import hashlib
import json
import os
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor

NAME = "sha256.json"  # in a model's folder: {file: digest}


def write_digests(folder: str | os.PathLike[str]) -> None:
    """Notes the digest of each of the folder's files in it."""
    files = sorted(file for file in Path(folder).iterdir() if file.is_file() and file.name != NAME)
    digests = {file.name: _of_file(file) for file in files}
    Path(folder, NAME).write_text(json.dumps(digests, indent=1) + "\n")


def check_digests(folder: str | os.PathLike[str], weights: bool = True) -> None:
    """Raises ValueError for a folder's file that is not what `write_digests` saw; a folder without
    digests, or no folder at all, is none of its business.

    Args:
        weights: False: files of weights, which take long to read, are left to who loads them.
    """
    noted = Path(folder, NAME)
    if not noted.is_file():
        return
    remedy = f"if it was changed on purpose, delete {noted}"
    digests = json.loads(noted.read_bytes())
    for name, digest in digests.items():
        if not weights and name.endswith((".safetensors", ".bin")):
            continue
        file = Path(folder, Path(name).name)
        if not file.is_file():
            raise ValueError(f"{file}: is missing; {remedy}")
        if _of_file(file) != digest:
            raise ValueError(f"{file}: damaged: it is not the file that was written; {remedy}")


def forget_digests(folder: str | os.PathLike[str]) -> None:
    """Removes a folder's digests, as something else is about to be written there."""
    Path(folder, NAME).unlink(missing_ok=True)


def of_tensors(tensors: Mapping[str, Tensor], *facts: str) -> str:
    """Digest of names, shapes, dtypes and values, and of further facts."""
    content = hashlib.sha256(json.dumps(facts).encode())
    for name, tensor in sorted(tensors.items()):
        content.update(f"{name} {tensor.dtype} {list(tensor.shape)}".encode())
        if tensor.numel():
            content.update(tensor.detach().cpu().reshape(-1).view(torch.uint8).numpy().data)
    return content.hexdigest()


def check_finite(tensors: Mapping[str, Tensor]) -> None:
    """Raises ValueError for a tensor with NaN or infinity in it."""
    for name, tensor in tensors.items():
        if tensor.is_floating_point() and not tensor.is_meta:
            # A sum in a wider precision shows either, in a third of isfinite's time.
            total = tensor.detach().sum(dtype=torch.promote_types(tensor.dtype, torch.float32))
            if not torch.isfinite(total):
                raise ValueError(f"{name} has values that are NaN or infinite")


def _of_file(file: Path) -> str:
    with file.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()
