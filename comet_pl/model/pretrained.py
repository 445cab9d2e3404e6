"""Which kind of folder a path is, and the authors' checkpoints in."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoConfig, PretrainedConfig

from comet_pl.errors import UserError
from comet_pl.model.configuration_comet import CometConfig

if TYPE_CHECKING:
    from comet_pl.model.modeling_comet import CometForCausalLM

AUTHORS_KEYS = (
    "chunk_size",
    "temp_beacon_stride",
    "temp_mem_budget",
    "global_beacon_ids",
    "temp_beacon_id",
    "placeholder_id",
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


def check_built(path: str, key: str) -> None:
    """Raises UserError for a folder that is not there, before anyone looks for it on the hub."""
    if path.rstrip("/") == "models/smollm2_135m" and not Path(path).is_dir():
        raise UserError(f"{key}: {path} is not there yet; `make smollm2` builds it")
    if path.startswith((".", "/", "~")) and not Path(path).expanduser().is_dir():
        raise UserError(f"{key}: no such folder: {path}")


def kind(path: str | os.PathLike[str], kwargs: dict[str, Any]) -> str:
    """ "comet" (our folder), "authors" (theirs), or "decoder" (anything else that Hugging Face can load)."""
    if kwargs.get("gguf_file"):
        return "decoder"
    if isinstance(kwargs.get("config"), CometConfig):
        return "comet"
    known = (
        "revision",
        "token",
        "cache_dir",
        "local_files_only",
        "subfolder",
        "force_download",
        "proxies",
    )
    facts, _ = PretrainedConfig.get_config_dict(
        path, **{k: kwargs[k] for k in known if k in kwargs}
    )
    if facts.get("model_type") == CometConfig.model_type:
        return "comet"
    return (
        "authors" if "global_beacon_ids" in facts and "temp_beacon_stride" in facts else "decoder"
    )


def authors_config(folder: Path, comet: dict[str, Any]) -> CometConfig:
    """The authors' flat config.json as a CometConfig."""
    facts = json.loads((folder / "config.json").read_text())
    theirs = {key: facts.pop(key, None) for key in AUTHORS_KEYS}
    stride, readout = theirs["temp_beacon_stride"], theirs["global_beacon_ids"] or []
    new = [
        i
        for i in (theirs["placeholder_id"], theirs["temp_beacon_id"], *readout)
        if i is not None and i >= 0
    ]
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
    cls: type[CometForCausalLM], path: str | os.PathLike[str], comet: dict[str, Any], **kwargs: Any
) -> CometForCausalLM:
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
    fresh = ["gate.proj.bias"] + [
        "lm_head.weight"
    ] * config.tie_word_embeddings  # a bias that `comet` asks for starts at its value
    wrong = [name for name in missing if not name.endswith(tuple(fresh))]
    if wrong:
        raise ValueError(
            f"{folder}: weights are missing for {wrong[0]} (and {len(wrong) - 1} more)"
        )
    switched_off = [name for name in unexpected if "_memory." not in name]
    if switched_off:
        raise ValueError(
            f"{folder}: unknown weights {switched_off[0]} (and {len(switched_off) - 1} more)"
        )
    return model.eval()
