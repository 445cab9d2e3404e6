"""Recorded chunks compute what the cells compute. Here a recording is the same work done again, on
the CPU; tests/model/test_cuda.py records on a GPU."""

import copy
import gc
import weakref

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from peft import LoraConfig, get_peft_model

from comet_pl import CometCache
from comet_pl.model import cuda_graphs
from comet_pl.model.cuda_graphs import MOST, ChunkGraphs
from comet_pl.model.observer import Observer
from tests.support.models import EXACT, FEW, memories, text, tiny


class Recorder:
    """Stands in for ChunkGraphs.capture: like a GPU's it does nothing yet, its result lies where
    the next run overwrites it, and it keeps nothing alive that the run reads."""

    def __init__(self):
        self.recorded = self.runs = 0

    def __call__(self, graphs, body):
        self.recorded += 1
        before = copy.deepcopy(graphs.memories)
        hidden = body()
        for memory, old in zip(graphs.memories, before, strict=True):
            for tensor, value in zip(memory, old, strict=True):
                if tensor is not None:
                    tensor.copy_(value)

        held, place = weakref.ref(body), weakref.ref(hidden.fill_(torch.nan))

        def run():
            self.runs += 1
            place().copy_(held()())

        return run, hidden


@pytest.fixture
def recorder(monkeypatch):
    with pytest.MonkeyPatch.context() as patch:
        yield install(patch)


def install(patch):
    recorder = Recorder()
    patch.setattr(ChunkGraphs, "capture", lambda graphs, body: recorder(graphs, body))
    patch.setattr(cuda_graphs, "DEVICES", ["cpu"])
    return recorder


def read_in(model, ids, sizes):
    """Logits of a text that is read in calls of these sizes, and the cache."""
    cache, parts = CometCache(), []
    for part in ids.split(sizes, 1):
        parts.append(model(part, past_key_values=cache).logits)
    return torch.cat(parts, 1), cache


def same_caches(a, b):
    for ours, theirs in zip(a.memories, b.memories, strict=True):
        for x, y in zip(ours, theirs, strict=True):
            assert (x is None) == (y is None)
            if x is not None:
                torch.testing.assert_close(x, y, **EXACT)


@FEW
@given(
    memory=memories(),
    rows=st.integers(1, 3),
    sizes=st.lists(st.integers(1, 30), min_size=1, max_size=3),
    tokens=st.integers(0, 30),
)
@torch.no_grad()
def test_any_calls_of_any_memory(memory, rows, sizes, tokens):
    model = tiny(**memory)
    sizes = sizes + tokens * [1]
    ids = text(rows, sum(sizes))
    expected, before = read_in(model, ids, sizes)
    with pytest.MonkeyPatch.context() as patch:
        install(patch)
        model.cuda_graphs = True
        found, after = read_in(model, ids, sizes)
    torch.testing.assert_close(found, expected, **EXACT)
    same_caches(after, before)


@torch.no_grad()
@pytest.mark.parametrize("family", ["qwen3", "smollm3"])
def test_what_is_recorded(family, recorder):
    """Both kinds of steps and a whole chunk on full memory; a few chunks are read as usual."""
    model, ids = tiny(family), text(2, 200)
    expected = model(ids).logits
    model.cuda_graphs = True
    cache = CometCache()
    found = [model(ids[:, :100], past_key_values=cache).logits]
    # 19 chunks of 5 close: two find less memory than the others, one is the first of its kind.
    assert (recorder.recorded, recorder.runs) == (1, 19 - 3)
    for i in range(100, 200):
        found.append(model(ids[:, i : i + 1], past_key_values=cache).logits)
    torch.testing.assert_close(torch.cat(found, 1), expected, **EXACT)
    # Tokens alone and behind a compression token; chunks that close while a first token enters, and
    # that first token. The first of each kind is read as usual: 5 runs of the 100 and 20 chunks.
    assert recorder.recorded == 5 and recorder.runs == 16 + 100 + 20 - 4


@torch.no_grad()
def test_generate(recorder):
    model, ids = tiny(), text(2, 23)
    options = {"max_new_tokens": 40, "do_sample": False}
    expected = model.generate(ids, **options)
    model.cuda_graphs = True
    assert torch.equal(model.generate(ids, **options), expected)
    assert recorder.runs > 30
    with torch.inference_mode():
        assert torch.equal(model.generate(ids, **options), expected)


@torch.no_grad()
def test_copies_and_moved_weights_are_recorded_anew(recorder):
    model, ids = tiny(), text(1, 120)
    expected = model(ids).logits
    model.cuda_graphs = True
    cache = model(ids[:, :60]).past_key_values
    assert cache.graphs.recordings
    for other in (cache.clone(), copy.deepcopy(cache), cache.to("cpu")):
        assert other.graphs is None
        logits = model(ids[:, 60:], past_key_values=other).logits
        torch.testing.assert_close(logits, expected[:, 60:], **EXACT)
    for i in range(60, 80):
        if i == 70:
            model.lm_head.weight.data = model.lm_head.weight.data.clone()
            before = cache.graphs
        if i == 75:
            cache.batch_select_indices(torch.tensor([0]))
        logits = model(ids[:, i : i + 1], past_key_values=cache).logits
        torch.testing.assert_close(logits, expected[:, i : i + 1], **EXACT)
    assert cache.graphs is not before


@torch.no_grad()
def test_read_as_usual(recorder):
    """Rows that differ, watched gates, autocast, another order of the cells, open chunks that
    outgrow their buffer, RoPE that looks at the positions' values."""
    model = tiny()
    ids, mask = text(2, 60), torch.ones(2, 60, dtype=torch.long)
    mask[1, :7] = 0
    model.cuda_graphs = True
    model(ids, attention_mask=mask)
    assert not recorder.runs
    model.observer = Observer(gate=lambda *seen: None)
    model(ids)
    model.observer, model.traversal = None, "layer_major"
    model(ids)
    model.traversal = "chunk_major"
    with torch.autocast("cpu", torch.bfloat16):
        model(ids)
    assert not recorder.runs
    model(ids)
    assert recorder.runs


@torch.no_grad()
def test_an_open_chunk_that_grows(recorder):
    model, ids = tiny(rollover=False), text(1, 60)
    expected, _ = read_in(model, ids, [1] * 60)
    model.cuda_graphs = True
    found, _ = read_in(model, ids, [1] * 60)
    torch.testing.assert_close(found, expected, **EXACT)
    assert recorder.runs and recorder.recorded <= MOST


@torch.no_grad()
def test_only_so_many_are_kept(recorder):
    model, cache = tiny(chunk_size=40), CometCache()
    model.cuda_graphs = True
    sizes = [size for size in range(1, MOST + 5) for _ in range(8)]
    for size in sizes:
        model(text(1, size), chunk_sizes=[size], past_key_values=cache)
    assert len(cache.graphs.recordings) == MOST


@torch.no_grad()
def test_a_cache_frees_its_buffers_when_it_goes(recorder):
    """No circle that waits for the garbage collector."""
    model, ids = tiny(), text(1, 80)
    model.cuda_graphs = True
    cache = model(ids).past_key_values
    model(ids[:, :9], past_key_values=cache)
    assert cache.graphs.recordings
    keys = weakref.ref(cache.memories[0].keys)
    gc.disable()
    try:
        del cache
        assert keys() is None
    finally:
        gc.enable()


GROWING = [
    ({"chunk_size": 4, "compression_stride": 2, "temporary_capacity": 12, "rollover": False}, None),
    ({"chunk_size": 12, "compression_stride": 7}, [1]),
]


@torch.no_grad()
@pytest.mark.parametrize(("sizes", "strides"), GROWING)
def test_compression_tokens_beyond_their_buffer(sizes, strides, recorder):
    """An open chunk that grows, and strides that become less than the buffer was made for."""
    model, ids = tiny(**sizes), text(1, 60)
    results = []
    for model.cuda_graphs in (False, True):
        cache = CometCache()
        calls = [model(ids[:, :24], past_key_values=cache).logits]
        if strides:
            model(ids[:, :12], past_key_values=cache, chunk_sizes=[12])
        options = {"strides": strides} if strides else {}
        for k in range(24, 54):
            calls.append(model(ids[:, k : k + 1], past_key_values=cache, **options).logits)
            options = {}
        results.append(torch.cat(calls, 1))
    torch.testing.assert_close(results[1], results[0], **EXACT)
    assert recorder.runs


def replaced(model):
    weights = {name: 1.5 * value.clone() for name, value in model.state_dict().items()}
    model.load_state_dict(weights, assign=True)


def renewed(model):
    norm = model.model.layers[1].input_layernorm
    norm.weight = torch.nn.Parameter(2 * norm.weight.detach())


def hooked(model):
    model.model.layers[0].mlp.register_forward_hook(lambda module, args, out: 2 * out)


def swapped(model):
    model.model.layers[0].mlp = tiny(seed=1).model.layers[0].mlp


@torch.no_grad()
@pytest.mark.parametrize("change", [replaced, renewed, hooked, swapped])
def test_a_model_that_changes_after_the_recording(change, recorder):
    results = []
    for graphs in (False, True):
        model, ids, cache = tiny(), text(1, 60), CometCache()
        model.cuda_graphs = graphs
        logits = [model(ids[:, :30], past_key_values=cache).logits]
        for k in range(30, 60):
            if k == 45:
                change(model)
            logits.append(model(ids[:, k : k + 1], past_key_values=cache).logits)
        results.append(torch.cat(logits, 1))
    torch.testing.assert_close(results[1], results[0], **EXACT)


@torch.no_grad()
def test_adapters_that_are_added_switched_off_and_merged(recorder):
    results = []
    for graphs in (False, True):
        model, ids, cache = tiny(), text(1, 90), CometCache()
        model.cuda_graphs = graphs
        tuned, logits = model, []
        for k in range(90):
            if k == 30:
                torch.manual_seed(0)
                options = {"r": 2, "target_modules": ["q_proj", "down_proj"]}
                tuned = get_peft_model(model, LoraConfig(init_lora_weights=False, **options))
                tuned.double().eval()
            if k == 50:
                tuned.base_model.disable_adapter_layers()
            if k == 60:
                tuned.base_model.enable_adapter_layers()
            if k == 70:
                tuned.merge_adapter()
            logits.append(tuned(input_ids=ids[:, k : k + 1], past_key_values=cache).logits)
        results.append(torch.cat(logits, 1))
    torch.testing.assert_close(results[1], results[0], **EXACT)
    assert recorder.runs


def test_every_mode_without_gradients(recorder):
    model, ids = tiny(), text(1, 90)
    with torch.no_grad():
        expected = model(ids).logits
        model.cuda_graphs, cache = True, CometCache()
        found = [model(ids[:, :30], past_key_values=cache).logits]
    for k in range(30, 90):
        mode = torch.inference_mode if k % 20 < 10 else torch.no_grad
        with mode():
            found.append(model(ids[:, k : k + 1], past_key_values=cache).logits.clone())
    torch.testing.assert_close(torch.cat(found, 1), expected, **EXACT)
