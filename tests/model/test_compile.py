"""torch.compile of the cell: whole graphs, and in the steady state no new ones; train.compile."""

from functools import partialmethod

import pytest
import torch
from torch._dynamo.backends.debugging import aot_eager
from torch._inductor import config as inductor

from comet_pl import CometCache, CometForCausalLM, build
from comet_pl.analysis.memory import read_memory
from comet_pl.config.load import load
from comet_pl.errors import UserError
from comet_pl.model import attention
from comet_pl.model.observer import Observer
from comet_pl.training.chunk_checkpointing import read_chunks
from comet_pl.training.gate_penalty import GatePenalty
from comet_pl.training.windows import cut_windows
from tests.support.models import FAMILIES, text, tiny
from tests.support.tiny_runs import TINY
from train import main

# 2 compression tokens a chunk: full memory after two chunks.
OPTIONS = {"chunk_size": 6, "temporary_capacity": 4}
slow = pytest.mark.slow


@pytest.fixture
def either_attention(request, monkeypatch):
    if request.param == "kernels":
        monkeypatch.setattr(attention, "FEW_SCORES", 0)


@pytest.fixture
def compiled():
    """Compiles a model's cells with fullgraph=True (a graph break is an error); counts the
    graphs."""
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


QUICK = [("kernels", "qwen3")]


@pytest.mark.parametrize(
    ("either_attention", "family"),
    [
        pytest.param(way, family, marks=[slow] * ((way, family) not in QUICK))
        for way in ("kernels", "formula")
        for family in FAMILIES
    ],
    indirect=["either_attention"],
)
def test_decoding_comes_to_one_set_of_graphs(family, compiled, either_attention):
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
    # Text; with a compression token; the roll-over's two steps.
    assert 3 <= len(graphs) <= torch._dynamo.config.recompile_limit


@pytest.mark.parametrize(
    ("either_attention", "chunks"),
    [("kernels", 3), ("kernels", 6), ("formula", 6)],
    indirect=["either_attention"],
)
@slow
def test_reading_and_training_compile_too(chunks, compiled, either_attention):
    """Whole chunks into full memory, without and with gradients; a real autograd trace."""
    ids = text(2, 6 * chunks)
    results = []
    for compile_it in (False, True):
        model = tiny(layers=1, **OPTIONS)
        if compile_it:
            compiled(model, "aot_eager")
        with torch.no_grad():
            cache = model(ids, chunk_sizes=[6] * chunks, use_cache=True).past_key_values
            logits = model(ids[:, :12], chunk_sizes=[6, 6], past_key_values=cache).logits
        model.train()(ids, labels=ids, chunk_sizes=[6] * chunks).loss.backward()
        results.append((logits, {name: p.grad for name, p in model.named_parameters()}))
    torch.testing.assert_close(*results, atol=1e-10, rtol=1e-10)


@pytest.fixture
def traced(monkeypatch, request):
    """Puts a quick backend in the place of inductor, in slow tests one with real autograd traces;
    the list of the graphs it is given."""
    whole = request.node.get_closest_marker("slow") is not None
    torch._dynamo.reset()
    graphs = []

    def backend(graph, inputs):
        graphs.append(graph)
        return aot_eager(graph, inputs) if whole else graph.forward

    monkeypatch.setattr(
        CometForCausalLM,
        "compile_cells",
        partialmethod(CometForCausalLM.compile_cells, backend=backend, fullgraph=True),
    )
    limit = torch._dynamo.config.recompile_limit  # afterwards as it was
    with torch._dynamo.config.patch(recompile_limit=limit):
        yield graphs
    torch._dynamo.reset()


def show_gates(model):
    """The list that the model's gate values go to: (layer, read, g)."""
    gates = []
    model.observer = Observer(gate=lambda *values: gates.append(values))
    return gates


OTHER_WAYS = ("none", "penalty", "chunk", "layer_major")


@pytest.mark.parametrize("way", ["cell", *(pytest.param(way, marks=slow) for way in OTHER_WAYS)])
def test_training_with_recorded_gates_comes_to_a_steady_state(way, traced):
    """Loss, gradients and gates over 1, 2, 4 and 10 chunks, twice: the second time makes no
    graph."""
    models = [tiny(**OPTIONS).train() for _ in range(2)]
    for model in models:
        model.gradient_checkpointing = way in ("cell", "chunk")
        model.traversal = "layer_major" if way == "layer_major" else "chunk_major"
    shown = [show_gates(model) for model in models]
    penalty = GatePenalty(3.0, 0.8, 0.7)
    for memory in (
        [memory for model in models for memory in model.gates] if way == "penalty" else []
    ):
        memory.penalty = penalty
    models[0].compile_cells()
    for turn in range(2):
        for chunks in (1, 2, 4, 10):
            ids, results = text(2, 6 * chunks, seed=turn), []
            penalty.share = torch.tensor(0.1 * chunks + turn, dtype=torch.float64)
            for model, gates in zip(models, shown, strict=True):
                gates.clear()
                model.zero_grad()
                with torch._dynamo.config.patch(error_on_recompile=turn == 1):
                    if way == "chunk":
                        mask = torch.ones_like(ids)
                        batch = {"input_ids": ids, "labels": ids, "attention_mask": mask}
                        for loss in read_chunks(model, cut_windows(batch, 6, None), ids.numel()):
                            loss.backward()
                    else:
                        loss = model(ids, labels=ids, chunk_sizes=[6] * chunks).loss
                        loss.backward()
                # The first chunk has no gate, and the last one stays open.
                assert way == "chunk" or len(gates) == 2 * max(0, chunks - 2)
                gradients = {name: p.grad for name, p in model.named_parameters()}
                results.append((loss.detach(), list(gates), gradients))
            torch.testing.assert_close(*results, atol=1e-10, rtol=1e-10)
    # Recomputed, T comes from the entries before it alike in every chunk.
    assert (6 if way == "cell" else 7) <= len(traced) <= 16


def test_the_memory_monitor_makes_no_graphs(traced):
    """Its hooks, which gather things in lists, would become a part of them."""
    model, plain, ids = tiny(**OPTIONS), tiny(**OPTIONS), text(1, 60)
    model.compile_cells()
    assert read_memory(model, ids).layers == read_memory(plain, ids).layers
    assert not traced


@slow
def test_names_files_and_caches_are_those_of_a_plain_model(tmp_path, traced):
    model, plain, ids = tiny(**OPTIONS), tiny(**OPTIONS), text(1, 20)
    model.compile_cells()
    cache = model(ids, use_cache=True).past_key_values
    assert traced
    assert list(model.state_dict()) == list(plain.state_dict())
    assert (model.fingerprint, model.weight_digest()) == (plain.fingerprint, plain.weight_digest())
    for name, one in (("compiled", model), ("plain", plain)):
        one.save_pretrained(tmp_path / name)
    for file in (tmp_path / "plain").iterdir():
        assert (tmp_path / "compiled" / file.name).read_bytes() == file.read_bytes()
    cache.save(tmp_path / "cache")
    found = plain(text(1, 3), past_key_values=CometCache.load(tmp_path / "cache")).logits
    torch.testing.assert_close(
        found, model(text(1, 3), past_key_values=cache).logits, atol=1e-10, rtol=1e-10
    )


# ---- train.compile


RUN = """
data.train_length=48 data.length_schedule=null data.batch_size=2 data.val_depths=1
data.val_examples=1 eval.after_fit=false eval.depths=1 eval.examples=1 eval.lengths=[48]
trainer.log_every_n_steps=1 checkpoint.every_steps=2 train.warmup_steps=0 train.final_lr=1
""".split()


@slow
@pytest.mark.parametrize("first", ["true", "false"])
def test_a_run_goes_on_the_other_way(first, tmp_path, traced):
    keys = [*TINY, *RUN, f"run.root={tmp_path}"]
    main([*keys, "run.name=plain", "trainer.max_steps=4"])
    assert not traced
    main([*keys, "run.name=mixed", "trainer.max_steps=2", f"train.compile={first}"])
    assert bool(traced) == (first == "true")
    second = "false" if first == "true" else "true"
    again = ["trainer.max_steps=4", "resume=true", "eval.after_fit=true"]
    main([*keys, "run.name=mixed", *again, f"train.compile={second}"])
    assert traced
    plain, mixed = (
        torch.load(tmp_path / "passkey" / name / "checkpoints" / "last.ckpt", weights_only=True)
        for name in ("plain", "mixed")
    )
    assert plain["global_step"] == mixed["global_step"] == 4
    torch.testing.assert_close(mixed["state_dict"], plain["state_dict"], atol=1e-5, rtol=1e-4)


def test_mistakes_are_one_line():
    keys = ["train.compile=true", "trainer.accelerator=cpu"]
    with inductor.patch({"cpp.cxx": (None, "no-such-compiler")}):
        build.check_device(load(["trainer.accelerator=cpu"]))
        with pytest.raises(
            UserError,
            match=r"train\.compile: true given, but no C\+\+ compiler is found here; .* or leave "
            r"it false$",
        ):
            build.check_device(load(keys))
    with pytest.raises(
        UserError,
        match=r"train\.compile: true given, but strategy\.sharding is zero2, .* "
        r"strategy\.sharding=none$",
    ):
        load([*keys, "trainer.strategy=layer_pipeline", "strategy.sharding=zero2"])


@slow
def test_compiled_by_inductor_it_decodes_the_same(compiled):
    """Real generated code (needs a C++ compiler on a CPU)."""
    model, plain = (tiny(dtype=torch.float32, **OPTIONS) for _ in range(2))
    ids = text(1, 18)
    compiled(model, "inductor")
    options = {"max_new_tokens": 15, "do_sample": False}
    assert torch.equal(model.generate(ids, **options), plain.generate(ids, **options))


@slow
def test_compiled_by_inductor_it_learns_the_same():
    torch._dynamo.reset()
    models, results = [tiny(dtype=torch.float32, **OPTIONS).train() for _ in range(2)], []
    models[0].compile_cells()
    for model in models:
        for memory in model.gates:
            memory.penalty = GatePenalty(3.0, 0.8, 0.7, share=torch.tensor(0.1))
        gates = show_gates(model)
        loss = model(text(2, 24), labels=text(2, 24), chunk_sizes=[6] * 4).loss
        loss.backward()
        gradients = {name: p.grad for name, p in model.named_parameters()}
        results.append((loss.detach(), gates, gradients))
    torch.testing.assert_close(*results, atol=1e-5, rtol=1e-4)
    torch._dynamo.reset()
