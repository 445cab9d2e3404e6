"""Which kind of folder a path is, and the authors' checkpoints in."""

import json
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoConfig, PretrainedConfig, PreTrainedModel

from comet_pl.model.configuration_comet import CometConfig
from comet_pl.model.digests import check_digests, check_finite
from comet_pl.model.memory_weights import FACTS, MemoryWeights

AUTHORS_KEYS = (
    "chunk_size",
    "temp_beacon_stride",
    "temp_mem_budget",
    "global_beacon_ids",
    "temp_beacon_id",
    "placeholder_id",
)
HUB_OPTIONS = (
    "revision",
    "token",
    "cache_dir",
    "local_files_only",
    "subfolder",
    "force_download",
    "proxies",
)
# Their names within a layer -> ours. Decoder weights lose "inner_layer.".
AUTHORS_NAMES = {
    "inner_layer.": "",
    "global_memory_net.norm.": "global_memory.norm.",
    "global_memory_net.g_proj.": "global_memory.gate.proj.",
    "global_memory_net.o_proj.": "global_memory.adapter.",
    "temp_memory_net.0.": "temporary_memory.norm.",
    "temp_memory_net.1.": "temporary_memory.adapter.",
}


Folder = str | os.PathLike[str]


def kind(path: Folder, kwargs: dict[str, Any], memory: Folder | None = None) -> str:
    """ "comet" (our folder), "authors" (theirs) or "decoder" (all else that Hugging Face loads).

    Raises:
        ValueError: `memory` is given with a model that has its own; a folder of one alone.
    """
    if Path(path, FACTS).is_file():
        raise ValueError(
            f"{path}: the weights of a memory alone; give its decoder, and memory={str(path)!r}"
        )
    found = _kind(path, kwargs)
    if memory is not None and found != "decoder":
        raise ValueError(f"memory: given, but {path} is a CoMeT with a memory of its own")
    return found


def around(
    cls: Any,
    decoder: PreTrainedModel,
    comet: dict[str, Any],
    start: int | None,
    memory: Folder | None,
) -> Any:
    """A new memory around a decoder, or the trained one in the folder `memory`."""
    if memory is None:
        return cls.from_decoder(decoder, comet, start)
    if start is not None:
        raise ValueError(f"start: {start} given, but memory={str(memory)!r} has its rows")
    return MemoryWeights.from_pretrained(memory).plug_in(cls, decoder, comet)


def _kind(path: Folder, kwargs: dict[str, Any]) -> str:
    if kwargs.get("gguf_file"):
        return "decoder"
    if isinstance(kwargs.get("config"), CometConfig):
        return "comet"
    options = {key: kwargs[key] for key in HUB_OPTIONS if key in kwargs}
    facts, _ = PretrainedConfig.get_config_dict(path, **options)
    if facts.get("model_type") == CometConfig.model_type:
        return "comet"
    theirs = "global_beacon_ids" in facts and "temp_beacon_stride" in facts
    return "authors" if theirs else "decoder"


def load_whole(
    load: Callable[..., Any],
    path: str | os.PathLike[str],
    options: dict[str, Any],
    comet: dict[str, Any] | None = None,
) -> Any:
    """What `load(**options)` loads, after a look at its files and its weights: Hugging Face draws
    random values for those that are missing.

    Args:
        options: of from_pretrained.
        comet: memory keys that were given over the folder's own; None: a plain decoder.

    Raises:
        ValueError
    """
    check_digests(path)
    wants_info = options.pop("output_loading_info", False)
    model, info = load(**options, output_loading_info=True)
    # A bias that `comet` asks for starts at its value.
    missing = [name for name in info["missing_keys"] if not name.endswith("gate.proj.bias")]
    # A memory, or a bias, that `comet` switches off is left out.
    parts = ("inv_freq", *(() if comet is None else ("_memory.", ".sink")))
    unknown = [key for key in info["unexpected_keys"] if not any(part in key for part in parts)]
    check_names(path, missing, unknown)
    check_finite(model.state_dict())
    return (model, info) if wants_info else model


def check_names(
    path: str | os.PathLike[str], missing: Sequence[str], unknown: Sequence[str]
) -> None:
    """Raises ValueError if weights are missing or unknown."""
    for what, names in (("weights are missing for", missing), ("unknown weights", unknown)):
        if names:
            others = f" (and {len(names) - 1} more)" if len(names) > 1 else ""
            raise ValueError(f"{path}: {what} {sorted(names)[0]}{others}")


def authors_config(folder: Path, comet: dict[str, Any]) -> CometConfig:
    """The authors' flat config.json as a CometConfig."""
    facts = json.loads((folder / "config.json").read_text())
    theirs = {key: facts.pop(key, None) for key in AUTHORS_KEYS}
    stride, readout = theirs["temp_beacon_stride"], theirs["global_beacon_ids"] or []
    new = [theirs["placeholder_id"], theirs["temp_beacon_id"], *readout]
    new = [i for i in new if i is not None and i >= 0]
    config = CometConfig(
        backbone_config=AutoConfig.for_model(**facts),
        chunk_size=theirs["chunk_size"],
        global_size=len(readout),
        compression_stride=stride if stride and stride > 0 else None,
        temporary_capacity=max(1, theirs["temp_mem_budget"] or 1),
        compression_token_id=theirs["temp_beacon_id"],
        readout_token_ids=readout,
        first_new_id=min(new, default=facts["vocab_size"]),
    )
    config.override(comet)
    return config


def authors_name(name: str) -> str:
    """A parameter's name in the authors' checkpoint -> ours."""
    for theirs, ours in AUTHORS_NAMES.items():
        name = name.replace(theirs, ours)
    return name


def load_authors(
    cls: type[PreTrainedModel], path: str | os.PathLike[str], comet: dict[str, Any], **kwargs: Any
) -> Any:
    """Loads a checkpoint as the authors' code saves it (config.json, *.safetensors)."""
    folder = Path(path)
    config = authors_config(folder, comet)
    weights: dict[str, Tensor] = {}
    for file in sorted(folder.glob("*.safetensors")):
        if file.name.startswith("model"):
            weights |= {authors_name(name): tensor for name, tensor in load_file(file).items()}
    dtype = kwargs.pop("dtype", kwargs.pop("torch_dtype", None)) or "auto"
    if dtype == "auto":
        dtype = next(iter(weights.values())).dtype
    implementation = kwargs.pop("attn_implementation", None)
    if implementation:
        config._attn_implementation = implementation
    model = cls(config).to(getattr(torch, dtype) if isinstance(dtype, str) else dtype)
    missing, unexpected = model.load_state_dict(weights, strict=False)
    # A bias that `comet` asks for starts at its value.
    fresh = ["gate.proj.bias"] + ["lm_head.weight"] * config.tie_word_embeddings
    absent = [name for name in missing if not name.endswith(tuple(fresh))]
    # Weights of a memory that is switched off are left out.
    check_names(folder, absent, [name for name in unexpected if "_memory." not in name])
    check_finite(model.state_dict())
    return model.eval()
