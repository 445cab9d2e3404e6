"""torch.compile of the cell: whole graphs, and in the steady state no new ones."""

import pytest
import torch
from models import FAMILIES, text, tiny

from comet_pl import CometCache
from comet_pl.model import attention

OPTIONS = {"chunk_size": 6, "temporary_capacity": 4}  # 2 compression tokens a chunk: full memory after two chunks


@pytest.fixture(params=["kernels", "formula"])
def either_attention(request, monkeypatch):
    if request.param == "kernels":
        monkeypatch.setattr(attention, "FEW_SCORES", 0)


@pytest.fixture
def compiled():
    """Compiles a model's cells with fullgraph=True (a graph break is an error); counts the graphs."""
    torch._dynamo.reset()
    graphs = []

    def backend(graph, inputs):
        graphs.append(graph)
        return graph

    def compile_cells(model, backend=backend):
        for cell in model.model.layers:
            cell.compile(backend=backend, fullgraph=True)
        return graphs

    yield compile_cells
    torch._dynamo.reset()


@pytest.mark.parametrize("family", FAMILIES)
def test_decoding_is_one_set_of_graphs_for_ever(family, compiled, either_attention):
    model, plain, ids = tiny(family, **OPTIONS), tiny(family, **OPTIONS), text(1, 66)
    cache, other = CometCache(), CometCache()
    with torch.no_grad():
        for one, memory in ((model, cache), (plain, other)):
            one(ids[:, :18], past_key_values=memory)
        graphs = compiled(model)
        for k in range(18, 66):
            steady = k >= 18 + 4 * 6  # some chunks have gone by
            with torch._dynamo.config.patch(error_on_recompile=steady):
                logits = model(ids[:, k : k + 1], past_key_values=cache).logits
            expected = plain(ids[:, k : k + 1], past_key_values=other).logits
            torch.testing.assert_close(logits, expected, atol=1e-10, rtol=1e-10)
    assert 3 <= len(graphs) <= torch._dynamo.config.recompile_limit  # text; with a compression token; the roll-over's two steps


def test_reading_and_training_compile_too(compiled, either_attention):
    """Whole chunks into full memory, without and with gradients; a real autograd trace."""
    ids = text(2, 36)
    results = []
    for compile_it in (False, True):
        model = tiny(layers=1, **OPTIONS)
        if compile_it:
            compiled(model, "aot_eager")
        with torch.no_grad():
            cache = model(ids, chunk_sizes=[6] * 6, use_cache=True).past_key_values
            logits = model(ids[:, :12], chunk_sizes=[6, 6], past_key_values=cache).logits
        model.train()(ids, labels=ids, chunk_sizes=[6] * 6).loss.backward()
        results.append((logits, {name: p.grad for name, p in model.named_parameters()}))
    torch.testing.assert_close(*results, atol=1e-10, rtol=1e-10)


@pytest.mark.slow
def test_compiled_by_inductor_it_decodes_the_same(compiled):
    """Real generated code (needs a C++ compiler on a CPU)."""
    model, plain, ids = tiny(dtype=torch.float32, **OPTIONS), tiny(dtype=torch.float32, **OPTIONS), text(1, 18)
    compiled(model, "inductor")
    options = {"max_new_tokens": 15, "do_sample": False}
    assert torch.equal(model.generate(ids, **options), plain.generate(ids, **options))
