"""The file of a cache: its tensors in safetensors, beside them what it says of itself as JSON."""

import json
import os
from pathlib import Path
from typing import Any

from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from comet_pl.model.chunk_layout import NO_STRIDE
from comet_pl.model.configuration_comet import wide
from comet_pl.model.digests import check_finite, of_tensors

MOST_LAYERS = 10_000  # of a memory without tensors
Content = tuple[dict[str, Tensor], dict[str, Any]]
"""(tensors by "<layer>.<name>", facts)"""


def write_cache(path: str | os.PathLike[str], tensors: dict[str, Tensor], facts: Any) -> None:
    """Writes the file atomically, with a digest of its content."""
    words, beside = json.dumps(facts), Path(f"{path}.{os.getpid()}.part")
    metadata = {"comet_cache": words, "digest": of_tensors(tensors, words)}
    try:
        save_file(tensors, beside, metadata=metadata)
        os.umask(mask := os.umask(0))
        os.chmod(beside, 0o666 & ~mask)  # safetensors writes for its owner alone
        os.replace(beside, path)
    finally:
        beside.unlink(missing_ok=True)


def read_cache(path: str | os.PathLike[str]) -> Content:
    """What write_cache wrote, and what former versions wrote without a digest.

    Raises:
        ValueError: it is not whole, or says what cannot be.
    """
    try:
        return _checked(path)
    except Exception as error:  # of what damage or another program made of it: anything
        why = f"no {error} in it" if isinstance(error, KeyError) else str(error)
        raise ValueError(f"{path}: not a readable CometCache file ({why})") from None


def _checked(path: str | os.PathLike[str]) -> Content:
    with safe_open(path, framework="pt", device="cpu") as file:
        metadata = file.metadata() or {}
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    words, digest = metadata["comet_cache"], metadata.get("digest")
    if digest is not None and digest != of_tensors(tensors, words):
        raise ValueError("damaged: its content is not what was saved")
    facts = json.loads(words)
    check_finite(tensors)
    dtypes: dict[str, Any] = {}
    for key, tensor in tensors.items():
        layer, _, name = key.partition(".")
        if int(layer) >= facts["layers"] or dtypes.setdefault(name, tensor.dtype) != tensor.dtype:
            raise ValueError(f"{key} does not fit the other layers")
        if name == "state":  # former versions kept S in the model's precision
            tensors[key] = tensor.to(wide(tensor.dtype))
    present, layers = {int(key.partition(".")[0]) for key in tensors}, facts["layers"]
    whole = len(present) == layers and min(present) >= 0 if tensors else 0 <= layers <= MOST_LAYERS
    if type(layers) is not int or not whole:
        raise ValueError(f"{layers} layers, but tensors of {len(present)}")
    flags = ("trailing", "sink")  # which former versions lacked
    numbers = [row[key] for row in facts["rows"] for key in row if key not in flags]
    if any(type(row.get(key, False)) is not bool for row in facts["rows"] for key in flags):
        raise ValueError("an impossible layout")
    if any(type(n) is not int or n < 0 for n in [*numbers, facts["columns"]]):
        raise ValueError("impossible numbers of tokens")
    if any(not 1 <= row["stride"] <= NO_STRIDE for row in facts["rows"]):
        raise ValueError("an impossible stride")
    if not isinstance(facts["fingerprint"], str):
        raise ValueError("it does not say whose memory it is")
    return tensors, facts
