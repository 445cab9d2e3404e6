"""Prefill: all ways do what was counted, the ratio's two sides compute the same, figures add up."""

import json

import pytest
import torch
from transformers import Qwen3Config, Qwen3ForCausalLM

from benchmarks.inference import prefill, ways
from benchmarks.inference.sinks import SinkReader
from benchmarks.shared import rates, report
from benchmarks.shared.shapes import SHAPES, Shape
from comet_pl.analysis import flops
from comet_pl.model.plain_decoder import sink_cache
from tests.support.models import text

EXACT = {"atol": 1e-10, "rtol": 1e-10}  # float64
SMALL = SHAPES["sixteenth"]


def test_both_sides_of_the_ratio_compute_the_same():
    """Full memory, copied to both; also after another chunk. Other readers have another memory."""
    shape = Shape("test", 16, 4, 2, 8, 24, chunk=16, global_size=3, capacity=6, stride=4)
    torch.manual_seed(0)
    both, others = (ways.readers(shape, "cpu", torch.float64) for _ in range(2))
    with torch.no_grad():
        for _ in range(3):
            ids = ways.text(32, "cpu")
            ours, reference = both["comet"](ids), both["slots_in_full"](ids)
            torch.testing.assert_close(ours, reference, **EXACT)
            assert ours.shape == (1, 1, shape.comet().vocab_size)
            assert not torch.allclose(ours, others["comet"](ids), atol=1e-4)


# ---- sliding window with sinks


@pytest.mark.parametrize(
    ("window", "calls"),
    [(5, [4, 4, 4, 4, 3]), (0, [3, 1, 6]), (40, [7, 7, 7]), (3, [1, 1, 1, 1, 1, 1, 5])],
)
def test_attention_without_a_mask(window, calls):
    """It is what Hugging Face's attention makes of the same cache."""
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "num_hidden_layers": 3, "intermediate_size": 24, "head_dim": 8}
    config = Qwen3Config(vocab_size=50, num_attention_heads=4, num_key_value_heads=2, **sizes)
    model, ids, sinks = Qwen3ForCausalLM(config).double().eval(), text(1, sum(calls)), 2
    with torch.no_grad():
        cache = sink_cache(model, window, sinks)
        expected = [model(part, past_key_values=cache).logits for part in ids.split(calls, 1)]
        reader = SinkReader(model, window, sinks)
        logits = [reader(part, logits_to_keep=0) for part in ids.split(calls, 1)]
    torch.testing.assert_close(torch.cat(logits, 1), torch.cat(expected, 1), **EXACT)
    kept = min(sum(calls), sinks + window)
    assert all(layer.keys.shape[2] == kept for layer in reader.cache.layers)


# ---- rates


@pytest.mark.parametrize("what", prefill.NAMES)
def test_linear_layers_do_what_was_counted(what):
    """The hooks see projections and MLPs, neither head nor gates nor adapters, and are removed."""
    reader = ways.make_reader(what, SMALL, "cpu", torch.float32)
    ids = ways.text(SMALL.chunk, "cpu")
    with torch.no_grad():
        linear = rates.linear_layers(reader.model, lambda: reader(ids), "cpu", "wall")
    counted = reader.operations(SMALL.chunk)
    assert linear["operations"] == counted.linear + counted.slots and counted.head == 0
    assert linear["rate"] == linear["operations"] / linear["seconds"] > 0
    hooks = (
        module._forward_hooks or module._forward_pre_hooks for module in reader.model.modules()
    )
    assert not any(hooks)


def test_product_rate_is_that_of_the_best_round(monkeypatch):
    seconds = iter([0.1, 2.0, 4.0, 3.0, 5.0])  # the first one warms up
    monkeypatch.setattr(rates, "timed", lambda work, device: (9.0, next(seconds)))
    monkeypatch.setitem(rates.SIZE, "cpu", 10)
    assert rates.product_rate("cpu", torch.float32, "processor") == 2 * 10**3 / 2.0


def test_two_ways_take_turns(monkeypatch):
    done, clock = [], iter(range(100))
    monkeypatch.setattr(rates, "timed", lambda work, device: (work(), 2.0 ** next(clock)))
    both = {name: lambda name=name: done.append(name) or 1.0 for name in ("comet", "other")}
    result = rates.side_by_side(both, 3)
    assert done == ["comet", "other", "other", "comet", "comet", "other"]
    assert result["seconds"]["comet"]["processor"] == [1, 8, 16]
    assert (result["wall_ratio"], result["processor_ratio"]) == (1, 0.5)


# ---- against full attention


def row(what, length, ms, mib):
    times = {"ms_per_token": 9.9, "processor_ms_per_token": ms}
    return {"what": what, "length": length, **times, "peak_mib": mib + 300.0, "reading_mib": mib}


def test_extrapolation_by_hand():
    """Full attention costs 1 + n / 1000 ms a token and 10 + n / 100 MiB; ours 2 ms and 20 MiB."""
    full = [row("full_attention", n, 1 + n / 1000, 10 + n / 100) for n in (500, 2000, 4000)]
    rows = [*full, *(row("comet", n, 2.0, 20.0) for n in (500, 2000, 4000, 100_000))]
    verdict = prefill.against_full_attention(rows, 100_000, "processor")
    assert verdict["cheaper_from"]["tokens"] == 1000
    assert verdict["longest"] == {"length": 4000, "time": 2.5, "memory": 2.5}
    beyond = verdict["extrapolated"]
    assert (beyond["processor_ms_per_token"], beyond["reading_mib"]) == (101.0, 1010.0)
    assert (beyond["length"], beyond["time"], beyond["memory"]) == (100_000, 50.5, 50.5)
    assert "2,000 and 4,000" in beyond["how"]


def test_nothing_is_extrapolated_without_ground():
    ours = [row("comet", n, 2.0, 20.0) for n in (500, 2000)]
    one = [*ours, row("full_attention", 500, 1.0, 10.0)]
    assert prefill.against_full_attention(one, 2000, "processor")["extrapolated"] is None
    assert set(prefill.against_full_attention(ours, 2000, "processor").values()) == {None}


OURS = [(100, 10.0), (200, 10.0), (400, 10.0)]


@pytest.mark.parametrize(
    ("full", "tokens", "how"),
    [
        ([(100, 5.0), (200, 9.0), (400, 13.0)], 250, "interpolated linearly from 200 and 400"),
        ([(100, 11.0), (200, 9.0), (400, 11.0)], 300, "interpolated linearly from 200 and 400"),
        ([(100, 5.0), (200, 6.0), (400, 8.0)], 600, "extrapolated linearly from 200 and 400"),
        ([(200, 11.0), (400, 12.0)], 200, "at most"),
        ([(100, 5.0), (200, 6.0)], 600, "extrapolated linearly from 100 and 200"),
        ([], None, None),
        ([(100, 5.0), (200, 5.0)], None, None),
        ([(200, 8.0), (400, 7.0)], None, None),
    ],
)
def test_crossover(full, tokens, how):
    """From where on ours stays cheaper; the longest context may be missing."""
    rows = [
        {"what": what, "length": n, "ms": ms}
        for what, side in (("comet", OURS), ("full", full))
        for n, ms in side
    ]
    start = report.crossover(rows, "ms", "full")
    if tokens is None:
        assert start is None
    else:
        assert start["tokens"] == tokens and start["how"].startswith(how)


# ---- the program


@pytest.mark.slow
def test_a_small_run(tmp_path, monkeypatch):
    """One way in a process of its own, all others here."""
    own = prefill.measure

    def measure(job):
        if job["what"] == "comet":
            return own(job)
        return (ways.measure_length if "length" in job else ways.measure_ratio)(job)

    monkeypatch.setattr(prefill, "measure", measure)
    argv = ["--small", "--threads", "1", "--rounds", "2", "--lengths", "256"]
    prefill.main([*argv, "--out", str(tmp_path)])
    assert (tmp_path / "prefill-small.png").read_bytes().startswith(b"\x89PNG")
    result = json.loads((tmp_path / "prefill-small.json").read_text())
    rows = {(row["what"], row["length"]): row for row in result["lengths"]}
    assert set(rows) == {(what, 256) for what in prefill.NAMES}
    assert rows["comet", 256]["peak_mib"] > rows["comet", 256]["reading_mib"] > 0
    for rate in (row["achieved"] for row in rows.values()):
        assert rate["product_rate"] > 1e8 and rate["linear"]["share"] > 0 and rate["share"] > 0
    ratio, linear = result["ratio"], result["linear_rate"]
    assert ratio["floor"] == flops.floor(SMALL.comet()) and ratio["logits_differ"] < 1e-5
    assert ratio["met"] == (ratio["processor_ratio"] <= 1.10 * ratio["floor"])
    assert linear["value"] == ratio["achieved"]["comet"]["linear"]["share"]
    assert all(len(times["wall"]) == 2 for times in ratio["seconds"].values())
    assert (result["clock"], result["threads"], result["flatness"]) == ("processor", 1, None)
    assert result["command"].startswith("python -m benchmarks.inference.prefill --small")


@pytest.mark.parametrize(
    ("size", "files"), [([], {"", "-4b"}), (["--full"], {"-full", "-4b"}), (["--only-4b"], {"-4b"})]
)
def test_full_size_measures_the_layer_of_qwen3_4b_too(size, files, tmp_path, monkeypatch):
    names = set()
    monkeypatch.setattr(prefill, "benchmark", lambda options: {})
    monkeypatch.setattr(prefill, "ratio_alone", lambda options, shape: {"of": shape.name})

    def publish(options, parts, *_, **plots):
        names.add("-".join(filter(None, parts)))

    monkeypatch.setattr(report, "publish", publish)
    prefill.main([*size, "--out", str(tmp_path)])
    assert names == {f"prefill{name}" for name in files}


@pytest.mark.gpu
def test_small_run_on_a_gpu(tmp_path):
    argv = ["--small", "--device", "cuda", "--rounds", "2", "--lengths", "256"]
    prefill.main([*argv, "--out", str(tmp_path)])
    result = json.loads((tmp_path / "prefill-small-cuda.json").read_text())
    assert (result["dtype"], result["clock"]) == ("bfloat16", "wall") and result["machine"]["gpu"]
