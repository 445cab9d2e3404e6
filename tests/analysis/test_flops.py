"""Operation counts against torch's own counter and by hand; floors; train/tflops."""

import lightning
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.checkpoint import set_checkpoint_early_stop
from torch.utils.flop_counter import FlopCounterMode
from transformers import AutoModelForCausalLM, LlamaConfig, Qwen3Config

from callbacks.throughput import Throughput, step_operations
from comet_pl import CometConfig
from comet_pl.analysis import bandwidth as traffic
from comet_pl.analysis import flops
from comet_pl.config.schema import TrainConfig
from comet_pl.model.chunk_layout import (
    ChunkPlan,
    RowClock,
    Segment,
    apart,
    fixed_chunks,
    own_layout,
    plan_row,
)
from comet_pl.model.naive import SlotsInFull
from comet_pl.training.lit_module import CometModule
from comet_pl.training.trainable import add_adapters
from comet_pl.training.windows import cut_windows, split_rows
from tests.support.models import (
    FAMILIES,
    FEW,
    authors_memories,
    backbone,
    chunk_plans,
    memories,
    text,
    tiny,
)
from tests.support.training import fit, ragged

QWEN3 = {
    "num_key_value_heads": 8,
    "head_dim": 128,
    "vocab_size": 151936,
    "tie_word_embeddings": True,
}
BACKBONES = {
    "qwen3_0_6b": Qwen3Config(
        hidden_size=1024,
        num_hidden_layers=28,
        num_attention_heads=16,
        intermediate_size=3072,
        **QWEN3,
    ),
    "qwen3_4b": Qwen3Config(
        hidden_size=2560,
        num_hidden_layers=36,
        num_attention_heads=32,
        intermediate_size=9728,
        **QWEN3,
    ),
    "smollm2_135m": LlamaConfig(
        hidden_size=576,
        num_hidden_layers=30,
        num_attention_heads=9,
        num_key_value_heads=3,
        intermediate_size=1536,
        vocab_size=49152,
        tie_word_embeddings=True,
    ),
}


def papers(name):
    """The paper's memory, which is the default, in a real decoder's shape."""
    return CometConfig(backbone_config=BACKBONES[name])


def counted(run):
    with FlopCounterMode(display=False) as counter:
        run()
    return counter.get_total_flops()


# ---- against torch's counter


@FEW
@given(
    comet=memories(),
    rows=st.integers(1, 2),
    n=st.integers(1, 30),
    rank=st.integers(0, 2),
    data=st.data(),
)
def test_a_forward_pass_takes_what_torch_counts(comet, rows, n, rank, data):
    """Chunks of C or of any sizes, resets, LoRA, a cache or none, and what continues it."""
    model = tiny(attention="eager", **comet)
    if rank:
        add_adapters(model, TrainConfig(parameters="memory+lora", lora_rank=rank))
    keep = data.draw(st.booleans(), "keep")
    sizes = data.draw(st.none() | chunk_plans(n), "chunk_sizes")
    resets = sizes and data.draw(st.none() | st.just([True] * len(sizes)), "resets")
    logits = data.draw(st.integers(1, n), "logits")
    counting = {"dense": True, "lora_rank": rank}
    out = []
    calls = {"chunk_sizes": sizes, "resets": resets and [resets] * rows, "use_cache": keep}
    with torch.no_grad():
        found = counted(lambda: out.append(model(text(rows, n), **calls, logits_to_keep=logits)))
        own = {"chunk_sizes": sizes, "resets": resets, "keep": keep, "logits": logits}
        assert found == rows * flops.reading(model.config, n, **own, **counting).total
        if keep:
            clock, cache = out[0].past_key_values.rows[0], out[0].past_key_values
            ids = text(rows, data.draw(st.integers(1, 20), "more"))
            found = counted(lambda: model(ids, past_key_values=cache, logits_to_keep=1))
            expected = flops.reading(model.config, ids.shape[1], clock=clock, **counting)
            assert found == rows * expected.total


@pytest.mark.parametrize("gate", ["scalar", "elementwise"])
def test_a_training_step_takes_what_torch_counts(gate):
    """Three forward passes where all weights learn and every chunk has targets."""
    model = tiny(attention="eager", gate=gate).train()
    ids = text(2, 23)
    with set_checkpoint_early_stop(False):
        found = counted(lambda: model(ids, labels=ids, chunk_sizes=[5, 5, 5, 5, 3]).loss.backward())
    plans = [ChunkPlan((5, 5, 5, 5, 3))] * 2
    assert found == flops.training_step(model.config, plans, 2 * 22, dense=True).total


@pytest.mark.parametrize("family", list(FAMILIES))
def test_full_attention_takes_what_torch_counts(family):
    config = backbone(family)
    config._attn_implementation = "eager"
    model, ids = AutoModelForCausalLM.from_config(config).eval(), text(2, 30)
    with torch.no_grad():
        out = []
        assert (
            counted(lambda: out.append(model(ids, logits_to_keep=1)))
            == 2 * flops.full_attention(config, 30, dense=True).total
        )
        cache = out[0].past_key_values
        found = counted(lambda: model(ids[:, :4], past_key_values=cache))
    assert found == 2 * flops.full_attention(config, 4, past=30, logits=4, dense=True).total


@FEW
@given(comet=authors_memories(), n=st.integers(1, 40))
def test_slots_in_full_take_what_torch_counts(comet, n):
    comet["global_size"] = max(1, comet["global_size"])
    model = tiny(**comet)
    sizes = fixed_chunks(n, model.config.chunk_size)
    with torch.no_grad(), sdpa_kernel(SDPBackend.MATH):  # whose products the counter sees
        found = counted(lambda: SlotsInFull(model).read(text(2, n), sizes))
    assert (
        found
        == 2 * flops.reading(model.config, n, sizes, logits=n, slots="in_full", dense=True).total
    )


@given(comet=memories(), n=st.integers(1, 40), slots=st.sampled_from(flops.SLOTS))
def test_causal_attention_counts_the_pairs_that_a_token_sees(comet, n, slots):
    """Written out token by token; nothing else than attention depends on `dense`."""
    comet.pop("family")
    config = CometConfig(backbone_config=backbone(), **comet)
    for segment in plan_row(flops.start(config), n, **flops.plan_sizes(config))[0]:
        first, last = segment.span(config.global_size)
        memory, (kind, index) = segment.before.memory, own_layout(segment, config.global_size)
        # of each position the last column that it sees, beside its own
        sees = [*(range(memory) if slots == "in_full" else ()), *range(memory, memory + last)]
        behind = 0
        if segment.closes and segment.before.trailing:
            sees[-len(kind) :] = memory + apart(segment, kind, index)[1]
            behind = last - first - segment.count
        own = range(memory + last - len(sees), memory + last)
        seen = sum(
            column <= limit or column == position
            for position, limit in zip(own, sees, strict=True)
            for column in range(own.stop)
        )
        causal, dense = (flops.cell(config, segment, slots, dense=dense) for dense in (False, True))
        assert causal.attention == seen * 2 * 2 * 16
        scores = len(own) * own.stop - (len(own) - behind) * behind
        assert dense.attention == scores * 2 * 2 * 16
        assert causal.total - causal.attention == dense.total - dense.attention


# ---- rows


def operations(model, *micros):
    """Of a step on micro-batches."""
    module = CometModule(model, TrainConfig(), max_steps=1)
    module.windows = [cut_windows(micro, model.config.chunk_size, None) for micro in micros]
    return step_operations(module)


def test_ragged_rows_count_as_rows_alone():
    model = tiny()
    together = ragged([23, 5, 14], labelled=1.0)
    alone = [
        {key: value[b : b + 1, :n] for key, value in together.items()}
        for b, n in enumerate([23, 5, 14])
    ]
    expected = operations(model, *alone)
    assert operations(model, together) == sum(operations(model, one) for one in alone) == expected
    assert operations(model, *split_rows(together, 3)) == expected


# ---- the floors that the project is measured by


@pytest.mark.parametrize(
    ("name", "floor"), [("qwen3_0_6b", 0.6639), ("qwen3_4b", 0.5888), ("smollm2_135m", 0.6561)]
)
def test_floors_of_reading(name, floor):
    """Against slots in full, head left out, memory full."""
    assert flops.floor(papers(name)) == pytest.approx(floor, abs=5e-5)


def test_floor_of_a_training_step():
    """16 chunks, against slots in full."""
    config = papers("qwen3_0_6b")
    plan = ChunkPlan(tuple(fixed_chunks(32768, 2048)))
    ours, full = (flops.training_step(config, [plan], 32767, slots=slots) for slots in flops.SLOTS)
    assert ours.total / full.total == pytest.approx(0.7319, abs=5e-5)


def test_a_cell_by_hand():
    """Qwen3-0.6B: W = 2048 + 256 + 512, M = 2560. Multiply-adds: a slot 2,097,152, a token
    15,728,640, a pair 4,096."""
    config = papers("qwen3_0_6b")
    one = flops.cell(config, flops.whole_chunk(config))
    assert one.linear == 2 * 2816 * 15_728_640
    assert one.slots == 2 * 2560 * 2_097_152
    assert one.attention == 2 * (2816 * 2560 + 2816 * 2817 // 2) * 4096
    assert one.memory == 2 * (512 * 2048 + (512 + 256) * 2 * 8 * 1024)  # the gate; both adapters
    in_full = flops.cell(config, flops.whole_chunk(config), "in_full")
    assert (in_full.linear, in_full.slots, in_full.attention) == (
        2 * 5376 * 15_728_640,
        0,
        2 * (5376 * 5377 // 2) * 4096,
    )


@pytest.mark.parametrize(
    ("name", "times", "with_head"),
    [("qwen3_0_6b", 1.31, 1.24), ("smollm2_135m", 1.26, 1.21), ("qwen3_4b", 1.05, 1.05)],
)
def test_floors_of_decoding(name, times, with_head):
    """Against full attention after 1,024 tokens."""
    assert round(traffic.decoding_floor(papers(name)), 2) == times
    assert round(traffic.decoding_floor(papers(name), with_head=True), 2) == with_head


def test_bytes_of_decoding_by_hand():
    """A cycle of two tokens and a closing step: d = 16, queries 16, keys 8, f = 24.

    Columns seen: 2 slots + 1, 2 slots + 2, then 2 slots + 2 text, compression and readout tokens.
    """
    comet = {"chunk_size": 2, "global_size": 1, "compression_stride": 2, "temporary_capacity": 1}
    config = CometConfig(backbone_config=backbone(layers=1), **comet)
    weights = 2 * 16 * 16 + 2 * 16 * 8 + 3 * 16 * 24
    read, written, slots = (3 + 4 + 6) * 16, (1 + 1 + 2) * 16, 2 * (16 + 16)
    assert (
        traffic.decoding_bytes(config, 4, with_head=False)
        == (3 * weights + read + written + slots) * 4 / 2
    )
    assert (
        traffic.decoding_bytes(config, 4) - traffic.decoding_bytes(config, 4, with_head=False)
        == 16 * 42 * 4
    )
    assert (
        traffic.full_attention_bytes(config.backbone_config, 9, 2)
        == (weights + 16 * 42 + 16 * 10) * 2
    )


def test_a_clock_may_stand_anywhere():
    """A text in several calls takes what it takes in one, but for logits."""
    config = CometConfig(
        backbone_config=backbone(),
        chunk_size=5,
        global_size=2,
        compression_stride=3,
        temporary_capacity=4,
    )
    clock, parts = flops.start(config), flops.Operations()
    for n in (1, 7, 1, 1, 13):
        parts += flops.reading(config, n, clock=clock, logits=0)
        clock = plan_row(clock, n, **flops.plan_sizes(config))[1]
    assert parts == flops.reading(config, 23, logits=0)
    assert flops.cell(config, Segment(RowClock(), 0, 0, closes=False)) == flops.Operations()


# ---- TensorBoard


class Recorder(lightning.Callback):
    def __init__(self):
        self.values = []

    def setup(self, trainer, module, stage):
        module.record = self.values.append


@pytest.mark.parametrize("peak", [None, 1e-3])
def test_throughput_logs_operations_and_their_share(peak):
    model, recorder, throughput = tiny(), Recorder(), Throughput()
    batches = [ragged([23, 17]), ragged([11, 9], seed=1)]
    expected = [operations(model, batch) for batch in batches]
    fit(model, batches, [recorder, throughput], {"log_every_n_steps": 1}, peak_tflops=peak)
    logged = [values for values in recorder.values if "train/tflops" in values]
    assert len(logged) == 2
    for values, count, tokens in zip(logged, expected, (40, 20), strict=True):
        seconds = tokens / values["train/tokens_per_s"]
        assert values["train/tflops"] == pytest.approx(count / seconds / 1e12)
        assert values.get("train/mfu") == (
            None if peak is None else pytest.approx(values["train/tflops"] / peak)
        )
