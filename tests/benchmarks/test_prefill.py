"""The benchmark: its reference computes what the model computes, its floor is counted right, its program writes what it says."""

import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from comet_pl.model.naive import SlotsInFull
from tests.support.models import chunk_plans, memories, text, tiny

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "benchmarks"))

import measure
import prefill
import rates
import report
import shapes
from process_memory import resident
from sinks import SinkReader
from transformers import Qwen3Config, Qwen3ForCausalLM

from comet_pl.analysis import flops
from comet_pl.errors import UserError
from comet_pl.model import attention

ROOT = Path(__file__).resolve().parents[2]
EXACT = {"atol": 1e-10, "rtol": 1e-10}  # float64


# ---- the reference


@settings(max_examples=120)
@given(comet=memories(), n=st.integers(1, 40), data=st.data())
def test_slots_in_full_equals_the_model(comet, n, data):
    """From no memory through growing memory to full memory, chunks of any size, gates pushed away from one half; in two calls."""
    model, ids = tiny(layers=3, **comet), text(2, n)
    with torch.no_grad():
        for _, parameter in model.memory_parameters():
            parameter.add_(torch.randn_like(parameter) * 0.3)
    sizes = data.draw(chunk_plans(n))
    k = data.draw(st.integers(0, len(sizes) - 1))
    cut = sum(sizes[:k])
    reference = SlotsInFull(model)
    with torch.no_grad():
        ours = model(ids, chunk_sizes=sizes).logits
        before = [reference.read(ids[:, :cut], sizes[:k])] if k else []
        after = reference.read(ids[:, cut:], sizes[k:])
    torch.testing.assert_close(torch.cat([*before, after], 1), ours, **EXACT)


def test_the_reference_depends_on_its_memory():
    """A reference that forgot its slots would differ: the test above can fail."""
    model, ids = tiny(), text(1, 15)
    with torch.no_grad():
        ours = model(ids, chunk_sizes=[5, 5, 5]).logits[:, 10:]
        reference = SlotsInFull(model)
        reference.read(ids[:, :10], [5, 5])
        torch.testing.assert_close(
            reference.read(ids[:, 10:], [5], logits_to_keep=2), ours[:, -2:], **EXACT
        )
        for name in ("states", "temporary"):
            forgetful = SlotsInFull(model)
            forgetful.read(ids[:, :10], [5, 5])
            setattr(forgetful, name, [None] * 2)
            assert not torch.allclose(forgetful.read(ids[:, 10:], [5]), ours, atol=1e-4)


def test_readers_of_the_benchmark_compute_the_same():
    """Full memory, copied to both; also after another chunk. A second set of readers has other weights and memory."""
    shape = shapes.Shape("test", 16, 4, 2, 8, 24, chunk=16, global_size=3, capacity=6, stride=4)
    torch.manual_seed(0)
    both, others = (measure.readers(shape, "cpu", torch.float64) for _ in range(2))
    with torch.no_grad():
        for _ in range(3):
            ids = measure.text(32, "cpu")
            ours, reference, other = (
                both["comet"](ids),
                both["slots_in_full"](ids),
                others["comet"](ids),
            )
            torch.testing.assert_close(ours, reference, **EXACT)
            assert ours.shape == (1, 1, shape.comet().vocab_size)
            assert not torch.allclose(ours, other, atol=1e-4)


# ---- the floor


def test_floor_by_hand():
    """d=2, H=1, h=2, H'=1, f=3; C=4, s=2, m=1, K=2: W = 4 + 2 + 1 = 7, M = 3.

    k, v of a slot 8; a token 8 + 8 + 18 = 34; a pair 4. Ours: 7 * 34 + 3 * 8 + (7 * 3 + 28) * 4 = 458. In full: 10 * 34 + 55 * 4 = 560.
    """
    shape = shapes.Shape("hand", 2, 1, 1, 2, 3, chunk=4, global_size=1, capacity=2, stride=2)
    assert (shape.own, shape.slots) == (7, 3)
    assert shapes.operations(shape) == (458, 560)
    assert shapes.floor(shape) == pytest.approx(458 / 560)


def test_floor_of_the_papers_shape():
    """W = 2048 + 256 + 512 = 2816, M = 2560; a slot 2,097,152, a token 15,728,640, a pair 4,096 multiply-adds."""
    ours = 2816 * 15_728_640 + 2560 * 2_097_152 + (2816 * 2560 + 2816 * 2817 // 2) * 4096
    in_full = 5376 * 15_728_640 + 5376 * 5377 // 2 * 4096
    assert shapes.operations(shapes.SHAPES["paper"]) == (ours, in_full)
    assert round(ours / in_full, 2) == 0.66
    for name in ("quarter", "sixteenth"):  # the same proportions
        assert shapes.floor(shapes.SHAPES[name]) == pytest.approx(ours / in_full, rel=1e-3)


def test_floor_of_the_layer_of_qwen3_4b():
    """A slot 5,242,880, a token 20,971,520 + 5,242,880 + 74,711,040, a pair 8,192 multiply-adds; the same for any number of layers."""
    shape = shapes.SHAPES["paper-4b"]
    ours = 2816 * 100_925_440 + 2560 * 5_242_880 + (2816 * 2560 + 2816 * 2817 // 2) * 8192
    in_full = 5376 * 100_925_440 + 5376 * 5377 // 2 * 8192
    assert shapes.operations(shape) == (ours, in_full)
    assert round(ours / in_full, 2) == 0.59
    assert shapes.floor(replace(shape, layers=7)) == shapes.floor(shape)


def test_operations_count_what_the_kernels_get(monkeypatch):
    """torch's own counter of matrix products agrees on the projections and the MLP, which it sees whole."""
    from torch.utils.flop_counter import FlopCounterMode

    monkeypatch.setattr(
        attention, "FEW_SCORES", 0
    )  # the plain formula for few scores would be counted too
    shape = shapes.SHAPES["sixteenth"]
    both = measure.readers(shape, "cpu", torch.float32)
    ids = measure.text(shape.chunk, "cpu")
    queries, keys = shape.heads * shape.head_dim, shape.kv_heads * shape.head_dim
    slot = 2 * shape.hidden * keys
    token = 2 * shape.hidden * queries + slot + 3 * shape.hidden * shape.intermediate
    for name, expected in (
        ("comet", shape.own * token + shape.slots * slot),
        ("slots_in_full", (shape.own + shape.slots) * token),
    ):
        with FlopCounterMode(display=False) as counter, torch.no_grad():
            both[name](ids)
        products = (
            sum(
                flops
                for op, flops in counter.get_flop_counts()["Global"].items()
                if "mm" in str(op)
            )
            / 2
            / shape.layers
        )
        assert products == pytest.approx(
            expected, rel=0.03
        )  # the counter also sees gates and adapters
        assert products >= expected


def test_floor_is_that_of_the_counts():
    """Gates and adapters, which the floor here leaves out, change it by less than a thousandth."""
    for shape in shapes.SHAPES.values():
        assert shapes.floor(shape) == pytest.approx(
            flops.floor(shape.comet()), rel=3e-3 if shape.hidden < 1024 else 2e-4
        )


# ---- sliding window with sinks


@pytest.mark.parametrize("few", [attention.FEW_SCORES, 0])
@pytest.mark.parametrize(
    ("window", "calls"),
    [(5, [4, 4, 4, 4, 3]), (0, [3, 1, 6]), (40, [7, 7, 7]), (3, [1, 1, 1, 1, 1, 1, 5])],
)
def test_sinks_equal_a_mask(few, window, calls, monkeypatch):
    """All calls together are one call in which a token sees the sinks, the window before its call, and its call up to itself."""
    monkeypatch.setattr(attention, "FEW_SCORES", few)
    torch.manual_seed(0)
    config = Qwen3Config(
        vocab_size=50,
        hidden_size=16,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=8,
        intermediate_size=24,
    )
    model, ids, sinks = Qwen3ForCausalLM(config).double().eval(), text(1, sum(calls)), 2
    seen, start = torch.zeros(sum(calls), sum(calls), dtype=torch.bool), 0
    for n in calls:
        for i in range(start, start + n):
            seen[i, [j for j in range(i + 1) if j < sinks or j >= start - window]] = True
        start += n
    with torch.no_grad():
        expected = model(ids, attention_mask=seen[None, None]).logits
        reader = SinkReader(model, window, sinks)
        torch.testing.assert_close(
            torch.cat([reader(part, logits_to_keep=0) for part in ids.split(calls, 1)], 1),
            expected,
            **EXACT,
        )
    assert all(
        layer.keys.shape[2] == min(sum(calls), sinks + window) for layer in reader.cache.layers
    )


def test_the_window_is_as_wide_as_a_cell_of_comet():
    shape = shapes.SHAPES["sixteenth"]
    reader = measure.sliding_window(shape, "cpu", torch.float32)
    past = shape.own + shape.slots - shape.chunk
    pairs = shape.chunk * past + shape.chunk * (shape.chunk + 1) // 2
    assert (
        reader.operations(2 * shape.chunk).attention
        == 2 * shape.layers * 4 * pairs * shape.heads * shape.head_dim
    )


# ---- rates


@pytest.mark.parametrize("what", prefill.WAYS)
def test_linear_layers_do_what_was_counted(what):
    """The hooks see the projections and the MLPs, neither head nor gates nor adapters, and are gone afterwards."""
    shape = shapes.SHAPES["sixteenth"]
    reader = measure.make_reader(what, shape, "cpu", torch.float32)
    ids = measure.text(shape.chunk, "cpu")
    with torch.no_grad():
        found = rates.linear_layers(reader.model, lambda: reader(ids), "cpu", "wall")
    counted = reader.operations(shape.chunk)
    assert found["operations"] == counted.linear + counted.slots and counted.head == 0
    assert found["rate"] == found["operations"] / found["seconds"] > 0
    assert not any(
        module._forward_hooks or module._forward_pre_hooks for module in reader.model.modules()
    )


def test_product_rate_is_that_of_the_best_round(monkeypatch):
    times = iter(
        [(0.1, 0.1), (9.0, 2.0), (8.0, 4.0), (9.0, 3.0), (9.0, 5.0)]
    )  # the first one only warms up
    monkeypatch.setattr(rates, "timed", lambda run, device: run() is not None and next(times))
    monkeypatch.setitem(rates.SIZE, "cpu", 10)
    assert rates.product_rate("cpu", torch.float32, "processor") == 2 * 10**3 / 2.0


def test_rates_are_shares_of_the_product(monkeypatch):
    shape = shapes.SHAPES["sixteenth"]
    reader = measure.make_reader("full_attention", shape, "cpu", torch.float32)
    monkeypatch.setattr(measure, "product_rate", lambda *_: 1e9)
    with torch.no_grad():
        found = measure.achieved(reader, 1000, 2.0, shape.chunk, "cpu", torch.float32, "processor")
    total = flops.full_attention(shape.backbone(), 1000, logits=0).total
    assert found["operations"]["total"] == total and found["share"] == pytest.approx(total / 2e9)
    assert found["linear"]["share"] == found["linear"]["rate"] / 1e9


# ---- against full attention


def reading(what, length, ms, mib):
    return {
        "what": what,
        "length": length,
        "ms_per_token": 9.9,
        "processor_ms_per_token": ms,
        "peak_mib": mib + 300.0,
        "reading_mib": mib,
    }


def test_extrapolation_by_hand():
    """Full attention costs 1 + n / 1000 ms a token and 10 + n / 100 MiB; ours 2 ms and 20 MiB."""
    full = [reading("full_attention", n, 1 + n / 1000, 10 + n / 100) for n in (500, 2000, 4000)]
    found = [*full, *(reading("comet", n, 2.0, 20.0) for n in (500, 2000, 4000, 100_000))]
    verdict = prefill.against_full_attention(found, 100_000, "processor")
    assert verdict["cheaper_from"]["tokens"] == 1000
    assert verdict["longest"] == {"length": 4000, "time": 2.5, "memory": 2.5}
    beyond = verdict["extrapolated"]
    assert (beyond["length"], beyond["processor_ms_per_token"], beyond["reading_mib"]) == (
        100_000,
        101.0,
        1010.0,
    )
    assert (beyond["time"], beyond["memory"]) == (50.5, 50.5) and "2,000 and 4,000" in beyond["how"]
    assert "extrapolated" in report.against_full_attention({"against_full_attention": verdict})[-1]
    assert [
        one["length"]
        for one in report.beyond({"against_full_attention": verdict, "lengths": found})
    ] == [4000, 100_000]


def test_nothing_is_extrapolated_without_need_or_ground():
    ours = [reading("comet", n, 2.0, 20.0) for n in (500, 2000)]
    full = [reading("full_attention", n, 1.0, 10.0) for n in (500, 2000)]
    assert prefill.against_full_attention([*ours, *full], 2000, "processor")["extrapolated"] is None
    assert (
        prefill.against_full_attention([*ours, full[0]], 2000, "processor")["extrapolated"] is None
    )
    assert set(prefill.against_full_attention(ours, 2000, "processor").values()) == {None}


# ---- the program


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    """One run of the program as a user starts it."""
    out = tmp_path_factory.mktemp("results")
    command = [
        sys.executable,
        "benchmarks/prefill.py",
        "--small",
        "--threads",
        "1",
        "--rounds",
        "2",
        "--lengths",
        "256",
    ]
    subprocess.run(
        [*command, "--out", str(out)], cwd=ROOT, check=True, capture_output=True, timeout=300
    )
    return out


def test_small_run_writes_valid_json(small):
    assert sorted(file.name for file in small.iterdir()) == [
        "prefill-small.json",
        "prefill-small.png",
    ]
    assert (small / "prefill-small.png").read_bytes().startswith(b"\x89PNG")
    result = json.loads((small / "prefill-small.json").read_text())
    found = {(one["what"], one["length"]): one for one in result["lengths"]}
    assert set(found) == {(what, 256) for what in report.NAMES}
    for one in found.values():
        assert one["ms_per_token"] > 0 and one["peak_mib"] > one["reading_mib"] > 0
        assert (
            one["achieved"]["product_rate"] > 1e8
            and one["achieved"]["linear"]["share"] > 0
            and one["achieved"]["share"] > 0
        )
    assert result["linear_rate"]["value"] == result["ratio"]["achieved"]["comet"]["linear"]["share"]
    assert result["linear_rate"]["met"] == (result["linear_rate"]["value"] >= 0.6)
    assert (
        result["against_full_attention"]["extrapolated"] is None
    )  # full attention read the longest text itself
    ratio = result["ratio"]
    assert ratio["floor"] == shapes.floor(shapes.SHAPES["sixteenth"])
    assert ratio["met"] == (ratio["processor_ratio"] <= 1.10 * ratio["floor"])
    assert ratio["logits_differ"] < 1e-5
    assert all(len(times["wall"]) == 2 for times in ratio["seconds"].values())
    assert result["clock"] == "processor"  # one thread on CPU
    assert result["threads"] == 1 and result["machine"]["torch"] == torch.__version__
    assert result["flatness"] is None  # the length lies below what it is judged on


def test_the_layer_of_qwen3_4b_alone(tmp_path, monkeypatch, capsys):
    """At full size but for the shape: a file of its own, and no lengths."""
    jobs = []
    monkeypatch.setitem(shapes.SHAPES, "paper-4b", shapes.SHAPES["sixteenth"])
    measured = {
        "rounds": 2,
        "processor_ratio": 0.5,
        "wall_ratio": 0.9,
        "achieved": {"comet": {"linear": {"share": 0.59}}},
    }
    monkeypatch.setattr(prefill, "measure", lambda job: jobs.append(job) or measured)
    prefill.main(["--only-4b", "--threads", "1", "--rounds", "2", "--out", str(tmp_path)])
    assert [file.name for file in tmp_path.iterdir()] == ["prefill-4b.json"]
    result = json.loads((tmp_path / "prefill-4b.json").read_text())
    assert [(job["what"], job["shape"], job["rounds"]) for job in jobs] == [
        ("ratio", "sixteenth", 2)
    ]
    assert (result["ratio"]["value"], result["ratio"]["met"]) == (0.5, True)
    assert (result["linear_rate"]["value"], result["linear_rate"]["met"]) == (0.59, False)
    assert result["clock"] == "processor" and "lengths" not in result
    assert "CoMeT / slots in full, sixteenth shape: 0.500" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("size", "files"),
    [([], ["", "-4b"]), (["--full"], ["-full", "-4b"]), (["--small"], ["-small"])],
)
def test_full_size_measures_the_layer_of_qwen3_4b_too(size, files, tmp_path, monkeypatch):
    monkeypatch.setattr(prefill, "benchmark", lambda options: {"of": options.size})
    monkeypatch.setattr(prefill, "ratio_alone", lambda options, shape: {"of": shape.name})
    for name in ("write_plot", "show", "show_ratio"):
        monkeypatch.setattr(report, name, lambda *_: None)
    prefill.main([*size, "--out", str(tmp_path)])
    assert {file.name for file in tmp_path.iterdir()} == {f"prefill{name}.json" for name in files}


def test_peak_is_of_the_process_itself():
    """Not of the parent that it was started by: 600 MiB of ours do not count."""
    held = torch.ones(150_000_000)
    code = "import sys; sys.path.insert(0, 'benchmarks'); import process_memory; print(process_memory.resident('VmHWM'))"
    child = float(
        subprocess.run(
            [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True
        ).stdout
    )
    if child != child:
        pytest.skip("no /proc on this system")
    assert child < 572 < resident("VmHWM")
    assert held[-1] == 1


def test_flatness_compares_long_comet_readings_only():
    peaks = [
        ("comet", 1024, 10.0),
        ("comet", 16384, 100.0),
        ("comet", 65536, 104.0),
        ("full_attention", 32768, 900.0),
    ]
    lengths = [
        {"what": what, "length": n, "peak_mib": peak, "reading_mib": peak / 10}
        for what, n, peak in peaks
    ]
    assert report.flatness(lengths)["peak_mib"] == pytest.approx(0.04)
    assert report.flatness(lengths[:2]) is None


def test_a_failed_write_leaves_the_old_file(tmp_path):
    target = tmp_path / "x.json"
    report.write_json(target, {"a": 1})

    def fail(file):
        file.write_text("half")
        raise OSError("disk full")

    with pytest.raises(OSError, match="disk full"):
        report.write(target, fail)
    assert json.loads(target.read_text()) == {"a": 1}
    assert os.listdir(tmp_path) == ["x.json"]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--lengths", "0"], "--lengths: 0 given, a whole number >= 1"),
        (["--rounds", "-1"], "--rounds: -1 given"),
        (["--full-attention-to", "0"], "--full-attention-to: 0 given"),
        (["--threads", "x"], "--threads: invalid int value: 'x'"),
        (["--device", "tpu"], "--device: invalid choice: 'tpu' (choose from"),
        (["--small", "--full"], "not allowed with"),
        (["--small", "--only-4b"], "not allowed with"),
        (["--only-4b", "--lengths", "5"], "--only-4b: given with --lengths or --full-attention-to"),
        (["--lenghts", "5"], "unrecognized arguments: --lenghts"),
    ],
)
def test_mistakes_are_one_line(options, message):
    with pytest.raises(UserError) as caught:
        prefill.parse(options)
    assert message in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_a_gpu_where_there_is_none():
    with pytest.raises(UserError, match="--device: cuda given"):
        prefill.parse(["--device", "cuda"])


def test_auto_takes_the_gpu_where_there_is_one(monkeypatch):
    for found, device, dtype in ((False, "cpu", "float32"), (True, "cuda", "bfloat16")):
        monkeypatch.setattr(torch.cuda, "is_available", lambda found=found: found)
        options = prefill.parse(["--device", "auto"])
        assert (options.device, options.dtype, options.full_attention_to) == (
            device,
            dtype,
            prefill.FULL_ATTENTION_TO[device],
        )


@pytest.mark.gpu
def test_small_run_on_a_gpu(tmp_path):
    prefill.main(
        ["--small", "--device", "cuda", "--rounds", "2", "--lengths", "256", "--out", str(tmp_path)]
    )
    result = json.loads((tmp_path / "prefill-small-cuda.json").read_text())
    assert result["dtype"] == "bfloat16" and result["clock"] == "wall" and result["machine"]["gpu"]
