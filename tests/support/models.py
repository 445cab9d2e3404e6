"""Tiny random models and texts for the laws."""

from itertools import pairwise

import torch
from hypothesis import settings
from hypothesis import strategies as st
from transformers import LlamaConfig, MistralConfig, Qwen2Config, Qwen3Config, SmolLM3Config

from comet_pl import CometConfig, CometForCausalLM

VOCABULARY = 40
EXACT = {"atol": 1e-10, "rtol": 1e-10}  # float64
MEMORY = {"chunk_size": 5, "global_size": 2, "compression_stride": 3, "temporary_capacity": 4}
NEUTRAL = {"chunk_size": 64, "global_size": 0, "compression_stride": None}
# For properties whose examples are dear: half of the profile's.
FEW = settings(max_examples=settings().max_examples // 2)
FAMILIES = {
    "qwen3": Qwen3Config,
    "qwen2": Qwen2Config,
    "llama": LlamaConfig,
    "mistral": MistralConfig,
    "smollm3": SmolLM3Config,
}


def backbone(family="qwen3", layers=2, **more):
    options = {
        "vocab_size": VOCABULARY,
        "hidden_size": 16,
        "num_hidden_layers": layers,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 4,
        "intermediate_size": 24,
        "initializer_range": 0.2,
        "tie_word_embeddings": False,
        "max_position_embeddings": 512,
        # Nothing ends by itself.
        "bos_token_id": None,
        "eos_token_id": None,
    }
    if family == "mistral":
        options["sliding_window"] = None
    if family == "smollm3":
        options |= {"no_rope_layers": [1, 0, 1, 1][:layers], "pad_token_id": None}
    return FAMILIES[family](**options | more)


def tiny(family="qwen3", layers=2, seed=0, dtype=torch.float64, attention="sdpa", **comet):
    """Double precision: what differs then is wrong, not rounded."""
    torch.manual_seed(seed)
    options = MEMORY | {"adapter_rank": 2} | comet
    model = CometForCausalLM(CometConfig(backbone(family, layers), **options))
    for name, parameter in model.named_parameters():
        # Hugging Face starts them at zero, where a forgotten one would not show.
        if name.endswith("_proj.bias"):
            torch.nn.init.normal_(parameter, std=0.3)
    model.set_attn_implementation(attention)
    return model.to(dtype).eval()


def text(rows, columns, seed=0):
    draw = torch.Generator().manual_seed(seed)
    return torch.randint(0, VOCABULARY, (rows, columns), generator=draw)


def continued(model, ids, count):
    """Texts (B, N + count), greedy by whole forward passes, new ids suppressed."""
    with torch.no_grad():
        for _ in range(count):
            logits = model(ids, use_cache=False).logits[:, -1]
            logits[:, model.config.new_token_ids] = -torch.inf
            ids = torch.cat([ids, logits.argmax(-1, keepdim=True)], 1)
    return ids


@st.composite
def memories(draw):
    """Any backbone with any memory configuration: odd strides, either memory off, all gates, both
    adapters, both layouts, a sink or none, slots scaled or not."""
    memory = {
        "family": draw(st.sampled_from(list(FAMILIES))),
        "chunk_size": draw(st.integers(1, 9)),
        "global_size": draw(st.integers(0, 3)),
        "compression_stride": draw(st.sampled_from([None, 1, 2, 3, 4, 7])),
        "temporary_capacity": draw(st.integers(1, 6)),
        "shared_adapter": draw(st.booleans()),
        "gate": draw(st.sampled_from(["scalar", "elementwise", "none"])),
        "gate_bias": draw(st.sampled_from([None, 1.5])),
    }
    memory["layout"] = draw(st.sampled_from(["interleaved", "trailing"]))
    memory["slot_scale"] = draw(st.sampled_from([None, 0.4]))
    if memory["global_size"] or memory["compression_stride"]:
        memory["sink"] = draw(st.sampled_from(["none", "learned"]))
    return memory


def authors_memories():
    """Those that the authors' code has too."""
    plain = {"layout": "interleaved", "sink": "none", "slot_scale": None}
    return memories().map(lambda comet: comet | plain)


def chunk_plans(tokens):
    """Chunks of any size that sum to `tokens`."""
    cuts = st.lists(st.integers(1, max(1, tokens - 1)), unique=True, max_size=5).map(sorted)
    return cuts.map(
        lambda c: [b - a for a, b in pairwise([0, *(x for x in c if x < tokens), tokens])]
    )


def valid(cache):
    """The valid entries of a cache, row by row: what two equal caches must share."""
    rows = []
    for b, clock in enumerate(cache.rows):
        entries = []
        for memory in cache.memories:
            if clock.global_slots:
                entries.append(memory.state[b])
            if clock.temporary_slots:
                entries.append(memory.temporary[b, : clock.temporary_slots])
            if clock.fill:
                own = clock.own_tokens
                columns = slice(clock.memory + own)
                entries += [memory.keys[b, :, columns], memory.values[b, :, columns]]
                if own > clock.fill:
                    entries.append(memory.pending[b, : own - clock.fill])
        rows.append((clock, entries))
    return rows


def same_cache(one, other, tolerance=1e-10):
    assert (one.num_tokens == other.num_tokens).all()
    for (clock, entries), (clock2, entries2) in zip(valid(one), valid(other), strict=True):
        assert clock == clock2
        torch.testing.assert_close(entries, entries2, atol=tolerance, rtol=tolerance)
