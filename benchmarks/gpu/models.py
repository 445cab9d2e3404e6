"""The models and texts of the measurements."""

import gc

import torch
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM

from benchmarks.inference.decoders import BACKBONES
from benchmarks.inference.ways import noise_cache
from comet_pl import CometConfig, CometForCausalLM
from comet_pl.model.chunk_layout import RowClock

SHAPES = {
    "0.6B": BACKBONES["qwen3_0_6b"],
    "4B": BACKBONES["qwen3_4b"],
    "tiny": {
        "model_type": "qwen3",
        "vocab_size": 300,
        "hidden_size": 64,
        "intermediate_size": 96,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 16,
    },
}
MEMORY = {"chunk_size": 2048, "global_size": 512, "temporary_capacity": 2048}  # the paper's
TINY_MEMORY = {"chunk_size": 32, "global_size": 8, "temporary_capacity": 32}
TEXT_VOCABULARY = 250

_held: dict[tuple, torch.nn.Module] = {}


def new_model(place, shape, dtype, comet=True, layers=None):
    """A decoder with random weights, made on the device; comet: with the paper's memory."""
    sizes = dict(SHAPES["tiny" if place.tiny else shape])
    if layers is not None:
        sizes["num_hidden_layers"] = min(layers, sizes["num_hidden_layers"])
    backbone = AutoConfig.for_model(
        **sizes, tie_word_embeddings=True, max_position_embeddings=1 << 20
    )
    memory = TINY_MEMORY if place.tiny else MEMORY
    torch.manual_seed(0)
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        with torch.device(place.device):
            if comet:
                return CometForCausalLM(CometConfig(backbone, **memory)).eval()
            return AutoModelForCausalLM.from_config(backbone, attn_implementation="sdpa").eval()
    finally:
        torch.set_default_dtype(before)


def held_model(place, shape, dtype=torch.bfloat16, comet=True, layers=None):
    """new_model, kept for the measurements after this one; one model is held at a time, so that a
    peak counts no other."""
    key = (shape, dtype, comet, layers)
    if key not in _held:
        _held.clear()
        gc.collect()
        if place.on_gpu:
            torch.cuda.empty_cache()
        _held[key] = new_model(place, shape, dtype, comet, layers)
    return _held[key]


def full_cache(model):
    """A cache whose memory is full, before a new chunk."""
    config = model.config
    clock = RowClock(0, config.compression_stride, config.global_size, config.temporary_capacity)
    return noise_cache(model, clock)


def text(place, tokens, rows=1) -> Tensor:
    draw = torch.Generator().manual_seed(tokens)
    return torch.randint(0, TEXT_VOCABULARY, (rows, tokens), generator=draw).to(place.device)


def as_batch(ids: Tensor):
    """What cut_windows takes: every token is real, and a target."""
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": ids}
