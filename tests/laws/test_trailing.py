"""The trailing layout and the sink: the text is the plain decoder's, and a chunk is what
chunk_layout.py says, written out token by token here."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers import AutoModelForCausalLM

from comet_pl import CometForCausalLM
from comet_pl.model import attention as kernels
from tests.support.models import (
    EXACT,
    FAMILIES,
    FEW,
    VOCABULARY,
    backbone,
    memories,
    text,
    tiny,
)

TRAILING = {"layout": "trailing", "sink": "learned"}


@pytest.fixture(autouse=True, scope="module")
def kernels_also_for_few_scores():
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(kernels, "FEW_SCORES", 0)
        yield


# ---- law: the first chunk is the plain decoder


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("family", FAMILIES)
def test_the_first_chunk_is_the_plain_decoder(family, tied):
    """To 1e-5 in float32, memory on, whether the chunk closes or not; losses too."""
    torch.manual_seed(0)
    decoder = AutoModelForCausalLM.from_config(backbone(family, tie_word_embeddings=tied)).eval()
    ids = text(2, 24)
    with torch.no_grad():
        plain = decoder(ids, labels=ids)
        options = {"chunk_size": 24, "global_size": 3, "compression_stride": 5, "gate_bias": 1.0}
        model = CometForCausalLM.from_decoder(decoder, options | TRAILING).eval()
        ours = model(ids, labels=ids)
        closing = model(torch.cat([ids, ids[:, :1]], 1), use_cache=True).logits[:, :-1]
    for logits in (ours.logits, closing):
        assert (logits[..., VOCABULARY:] == -torch.inf).all()
        torch.testing.assert_close(logits[..., :VOCABULARY], plain.logits, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(ours.loss, plain.loss, rtol=1e-5, atol=1e-5)


def test_text_does_not_depend_on_the_stride():
    """Within a chunk; the interleaved layout's does."""
    differ = []
    for layout in ("trailing", "interleaved"):
        one, other = (
            tiny(layout=layout, chunk_size=9, compression_stride=s, temporary_capacity=9)
            for s in (2, 4)
        )
        ids = text(1, 9)
        with torch.no_grad():
            differ.append((one(ids).logits - other(ids).logits)[..., :VOCABULARY].abs().max())
    assert differ[0] == 0 < differ[1]


# ---- the layout, token by token


class Written:
    """Reads chunks with Hugging Face's own layers over [slots | text | compression | readout]."""

    def __init__(self, model):
        self.model, self.config = model, model.config
        self.states = [None] * len(model.model.layers)
        self.temporary = [None] * len(model.model.layers)

    def read(self, ids, sizes):
        decoder = self.model.model
        return torch.cat(
            [self.model.lm_head(decoder.norm(self.chunk(part))) for part in ids.split(sizes, 1)], 1
        )[..., : self.config.first_new_id]

    def chunk(self, part):
        config, decoder = self.config, self.model.model
        n, s, m = part.shape[1], config.compression_stride, config.global_size
        ends = [min(start + s, n) for start in range(0, n, s)] if s else []
        new = [config.compression_token_id] * len(ends) + config.readout_token_ids
        own = decoder.embed_tokens(torch.cat([part, part.new_tensor([new] * len(part))], 1))
        for i, cell in enumerate(decoder.layers):
            slots = self.slots(i, cell, len(part))
            memory, count = slots.shape[1], own.shape[1]
            places = [*range(n), *ends, *range(n, n + m)]
            positions = torch.tensor([*range(memory), *(memory + p for p in places)])
            seen = torch.ones(memory + count, memory + count, dtype=torch.bool).tril()
            for j, end in enumerate(ends):
                seen[memory + n + j, memory + end : memory + n + j] = False
            mask = torch.zeros(seen.shape, dtype=own.dtype).masked_fill(~seen, -torch.inf)
            x = torch.cat([slots, own], 1)
            rope = decoder.rotary_emb(x, positions[None])
            normed = cell.input_layernorm(x) * self.factors(cell, memory, x.shape[1])[:, None]
            x = x + cell.self_attn(normed, rope, attention_mask=mask[None, None])[0]
            own = (x + cell.mlp(cell.post_attention_layernorm(x)))[:, memory:]
            self.remember(i, cell, own[:, n : n + len(ends)], own[:, n + len(ends) :])
        return own[:, :n]

    def slots(self, i, cell, rows):
        parts = []
        if self.states[i] is not None:
            parts.append(cell.adapt(cell.global_memory, self.states[i]))
        if self.temporary[i] is not None:
            parts.append(self.temporary[i])
        if parts and cell.sink is not None:
            parts.insert(0, cell.sink.expand(rows, 1, -1))
        width = self.config.backbone_config.hidden_size
        return torch.cat(parts, 1) if parts else torch.zeros(rows, 0, width, dtype=torch.float64)

    def factors(self, cell, memory, columns):
        """(W,) what a column's normalised input is multiplied by."""
        factors = torch.ones(columns, dtype=torch.float64)
        if memory and cell.scales:
            first = int(cell.sink is not None)
            m = self.config.global_size if cell.global_memory is not None else 0
            if m:
                factors[first : first + m] = cell.global_memory.factor
            if cell.temporary_memory is not None:
                factors[first + m : memory] = cell.temporary_memory.factor
        return factors

    def remember(self, i, cell, compressed, readout):
        if cell.global_memory is not None:
            self.states[i] = cell.global_memory.write(readout, self.states[i])
        if cell.temporary_memory is not None:
            new = cell.adapt(cell.temporary_memory, cell.temporary_memory.norm(compressed))
            old = [] if self.temporary[i] is None else [self.temporary[i]]
            self.temporary[i] = torch.cat([*old, new], 1)[:, -self.config.temporary_capacity :]


@FEW
@given(comet=memories(), sizes=st.lists(st.integers(1, 7), min_size=1, max_size=5))
def test_chunks_are_as_written(comet, sizes):
    model = tiny(**comet | {"layout": "trailing"})
    ids = text(2, sum(sizes))
    with torch.no_grad():
        expected = Written(model).read(ids, sizes)
        for attention in ("sdpa", "eager"):
            model.set_attn_implementation(attention)
            out = model(ids, chunk_sizes=sizes, use_cache=True)
            torch.testing.assert_close(out.logits[..., :VOCABULARY], expected, **EXACT)


def test_a_decoded_token_is_one_query(monkeypatch):
    """Also where the interleaved layout has a compression token beside it."""
    widths = []
    model = tiny(layout="trailing", chunk_size=8, compression_stride=2)
    for cell in model.model.layers:
        cell.register_forward_pre_hook(lambda cell, inputs: widths.append(inputs[0].shape[1]))
    with torch.no_grad():
        cache = model(text(1, 1), use_cache=True).past_key_values
        widths.clear()
        for number in range(15):
            model(text(1, 1, seed=number), past_key_values=cache)
    # 7 tokens fill the chunk; its 4 + 2 internal tokens come at once, and 8 more fill the next
    assert widths == [1, 1] * 7 + [6, 6] + [1, 1] * 8


def test_there_is_no_sink_before_there_is_memory():
    with_sink, without = tiny(**TRAILING), tiny(layout="trailing")
    without.load_state_dict(
        {name: t for name, t in with_sink.state_dict().items() if not name.endswith("sink")}
    )
    ids = text(1, 10)
    with torch.no_grad():
        a, b = (model(ids, chunk_sizes=[5, 5]).logits for model in (with_sink, without))
    assert torch.equal(a[:, :5], b[:, :5]) and not torch.allclose(a[:, 5:], b[:, 5:])
