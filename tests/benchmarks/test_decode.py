"""The benchmark of decoding and the perplexity of short inputs: they measure what they say, and their figures are computed right."""

import json
import math
import sys
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import LlamaForCausalLM

from tests.support.models import backbone, text, tiny

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "benchmarks"))

import decode
import decode_report
import measure_decode
import perplexity
import report
from measure_decode import WARM_UP, open_lane

from comet_pl import CometCache, CometConfig
from comet_pl.analysis.bandwidth import decoding_floor
from comet_pl.errors import UserError, run_cli
from data.tokenizer import train_tokenizer

ROOM = 60


def decoder():
    torch.manual_seed(0)
    return LlamaForCausalLM(backbone("llama")).double().eval()


# ---- what is measured


@settings(max_examples=25)
@given(
    n=st.integers(1, 40),
    chunk=st.integers(1, 9),
    stride=st.integers(1, 5),
    filled=st.booleans(),
    cycles=st.integers(1, 3),
)
def test_a_cycle_closes_one_chunk(n, chunk, stride, filled, cycles):
    """Counted inside the model: the own tokens that its first layer gets tell what a step was."""
    model = tiny("llama", chunk_size=chunk, compression_stride=stride)
    own, kinds = [], []
    model.model.layers[0].register_forward_pre_hook(
        lambda cell, inputs: own.append(inputs[0].shape[1])
    )
    with torch.inference_mode():
        lane = open_lane("comet", model, n, 0 if filled else n, ROOM)
        for _ in range(WARM_UP):
            lane.step()
        for _ in range(cycles * chunk):
            own.clear()
            lane.run(1, "cpu")
            kinds.append(
                {(1,): "text", (2,): "compression", (3, 1): "closing"}[tuple(own)]
            )  # 3: compression and readout tokens
    assert [kind for kind, _, _ in lane.steps] == kinds
    assert kinds.count("closing") == cycles
    assert kinds.count("compression") == cycles * (
        (chunk - 1) // stride
    )  # a chunk's last one comes with its closing


@pytest.mark.parametrize("n", [1, 5, 13, 40])
def test_filled_is_as_read(n):
    """The same clock and bytes, so that the same steps follow; and the same for full attention."""
    model, plain = tiny("llama"), decoder()
    with torch.inference_mode():
        for what, owner in (("comet", model), ("full_attention", plain), ("in_place", plain)):
            read, filled = (open_lane(what, owner, n, limit, ROOM) for limit in (n, 0))
            assert (read.filled, filled.filled) == (False, True)
            assert read.bytes == filled.bytes > 0
            assert read.cache.get_seq_length() == filled.cache.get_seq_length() == n
            if what == "comet":
                assert read.cache.rows == filled.cache.rows
            else:
                assert read.bytes == n * measure_decode.token_bytes(plain)
            read.step()
            filled.step()
            assert read.cache.get_seq_length() == filled.cache.get_seq_length() == n + 1


def test_lanes_decode_greedily():
    """Step by step what generate() answers to the same text, on all sides; in place equals DynamicCache."""
    torch.manual_seed(1)
    ids = text(1, 12)
    for what, model in (
        ("comet", tiny("llama")),
        ("full_attention", decoder()),
        ("in_place", decoder()),
    ):
        with torch.inference_mode():
            lane = open_lane(what, model, 12, 0, ROOM)
            lane.cache = (
                CometCache()
                if what == "comet"
                else measure_decode.empty_cache(model, what == "in_place", ROOM)
            )
            answer = []
            lane.feed(ids)
            for _ in range(14):
                answer.append(lane.next_id.item())
                lane.step()
        mask = torch.ones_like(ids)
        expected = model.generate(
            ids,
            attention_mask=mask,
            max_new_tokens=14,
            do_sample=False,
            eos_token_id=None,
            pad_token_id=0,
        )
        assert answer == expected[0, 12:].tolist()


def test_slices_add_up_and_alternate():
    class Fake:
        def __init__(self, what):
            self.what, self.done = what, []

        def step(self):
            pass

        def run(self, steps, device):
            order.append(self.what)
            self.done.append(steps)

    order: list[str] = []
    lanes = [Fake("comet"), Fake("full_attention")]
    total = sum(measure_decode.measure(lanes, {"comet": 33, "full_attention": 5}, 4, "cpu"))
    assert total == 38 and [sum(lane.done) for lane in lanes] == [33, 5]
    assert max(lanes[0].done) - min(lanes[0].done) <= 1
    assert order == ["comet", "full_attention", "full_attention", "comet"] * 2


def test_what_does_not_fit_is_skipped_with_the_reason():
    wanted = [("full_attention", 10), ("full_attention", 100), ("in_place", 50)]
    kept, skipped = measure_decode.affordable(wanted, 2**30, 100 * 2**30)  # 80 GiB may be taken
    assert kept == [("full_attention", 10), ("in_place", 50)]
    assert [(one["what"], one["length"]) for one in skipped] == [("full_attention", 100)]
    assert "100.00 GiB, 70.00 GiB of memory are left" in skipped[0]["reason"]
    assert measure_decode.affordable(wanted, 1, math.inf) == (wanted, [])


def test_a_decoder_and_its_copy_with_memory_share_weights():
    """All but embedding and head, which get rows; and each goes on computing what it computed."""
    plain, ids = decoder(), text(1, 9)
    with torch.no_grad():
        before, rows = plain(ids).logits, plain.config.vocab_size
        model = measure_decode.plug_in(
            plain, {"chunk_size": 9, "global_size": 0, "compression_stride": None}
        )
        many = measure_decode.plug_in(
            plain,
            {"chunk_size": 4, "global_size": 2, "compression_stride": 2, "temporary_capacity": 4},
        )
        assert torch.equal(plain(ids).logits, before)
        torch.testing.assert_close(model(ids).logits[..., :rows], before)
    ours = {weight.data_ptr() for weight in many.parameters()}
    assert {name for name, weight in plain.named_parameters() if weight.data_ptr() not in ours} == {
        "model.embed_tokens.weight",
        "lm_head.weight",
    }
    assert (
        plain.config.vocab_size
        == len(plain.get_input_embeddings().weight)
        == rows
        < many.config.vocab_size
    )


@pytest.mark.parametrize("name", measure_decode.BACKBONES)
def test_shapes_are_those_of_the_decoders(name):
    """Millions of weights, embedding included; the head is tied."""
    with torch.device("meta"):
        found = measure_decode.random_decoder(measure_decode.BACKBONES[name])
    assert found.num_parameters() / 1e6 == pytest.approx(
        {"smollm2_135m": 134.5, "qwen3_0_6b": 596.0, "qwen3_4b": 4022.5}[name], abs=0.1
    )
    assert found.config.model_type == ("llama" if name.startswith("smol") else "qwen3")


# ---- the verdicts


OURS = [(100, 10.0), (200, 10.0), (400, 10.0)]


@pytest.mark.parametrize(
    ("full", "tokens", "how"),
    [
        ([(100, 5.0), (200, 9.0), (400, 13.0)], 250, "interpolated linearly from 200 and 400"),
        (
            [(100, 11.0), (200, 9.0), (400, 11.0)],
            300,
            "interpolated linearly from 200 and 400",
        ),  # from where on it stays cheaper
        ([(100, 5.0), (200, 6.0), (400, 8.0)], 600, "extrapolated linearly from 200 and 400"),
        ([(200, 11.0), (400, 12.0)], 200, "at most"),
        (
            [(100, 5.0), (200, 6.0)],
            600,
            "extrapolated linearly from 100 and 200",
        ),  # the longest did not fit
    ],
)
def test_crossover(full, tokens, how):
    found = decode.crossover(OURS, full)
    assert found["tokens"] == tokens and found["how"].startswith(how)


@pytest.mark.parametrize(
    "full", [[], [(300, 1.0)], [(100, 5.0)], [(100, 5.0), (200, 5.0)], [(200, 8.0), (400, 7.0)]]
)
def test_no_crossover(full):
    assert decode.crossover(OURS, full) is None


def test_verdict():
    def one(what, length, ms, size):
        return {"what": what, "length": length, "ms_per_token": ms, "cache_bytes": size}

    far = report.FLAT_FROM
    found = [
        one("comet", 1024, 30.0, 7),
        one("comet", far, 50.0, 10),
        one("comet", 2 * far, 54.0, 10),
    ]
    found += [one("full_attention", 1024, 20.0, 1), one("full_attention", far, 60.0, 99)]
    result = decode.verdict(found, "ms_per_token")
    assert (
        result["flatness"] == {"ms_per_token": pytest.approx(0.08), "cache_bytes": 0}
        and result["flat"]
    )
    assert result["cheaper_from"]["full_attention"]["tokens"] == 1024 + (far - 1024) // 2
    assert result["cheaper_from"]["in_place"] is None
    found[1]["cache_bytes"] = 8
    assert not decode.verdict(found, "ms_per_token")["flat"]
    assert decode.verdict(found[:2], "ms_per_token")["flat"] is None


def test_the_bound_by_bytes_by_hand():
    """Floor 2, so that 2.3 is allowed: 2.2 meets it, 2.4 does not. Memory is full after 4 chunks, as 3 compression tokens fill 10 slots."""
    times = {
        ("comet", 16): 50.0,
        ("comet", 32): 24.0,
        ("full_attention", 8): 24 / 2.2,
        ("in_place", 8): 10.0,
        ("full_attention", 9): 1.0,
    }
    lengths = [
        {"what": what, "length": n, "ms_per_token": 1.0, "processor_ms_per_token": ms}
        for (what, n), ms in times.items()
    ]
    comet = {"chunk_size": 5, "compression_stride": 2, "temporary_capacity": 10}
    result = {
        "comet": comet,
        "clock": "processor",
        "floor": {"context": 8, "ratio": 2.0},
        "lengths": lengths,
    }
    found = decode_report.against_floor(result)
    assert (found["after"], found["context"], found["floor"], found["bound"]) == (
        32,
        8,
        2.0,
        pytest.approx(2.3),
    )
    assert found["ratios"]["full_attention"] == {"value": pytest.approx(2.2), "met": True}
    assert found["ratios"]["in_place"] == {"value": 2.4, "met": False}
    alone = decode_report.against_floor(result | {"lengths": lengths[1:3]})
    assert (
        alone["ratios"]["in_place"] == {"value": None, "met": None}
        and alone["ratios"]["full_attention"]["met"]
    )
    assert (
        decode_report.against_floor(result | {"lengths": [lengths[0] | {"length": 20}]}) is not None
    )
    assert decode_report.against_floor(result | {"lengths": [lengths[0] | {"length": 19}]}) is None
    assert decode_report.against_floor(result | {"lengths": lengths[2:]}) is None


def test_full_memory_is_full():
    """What the bound takes for full is full at the latest after the step that closes a chunk, and not a chunk earlier."""
    memory = {"chunk_size": 5, "compression_stride": 2, "temporary_capacity": 10}
    model = tiny("llama", global_size=2, **memory)
    slots = [measure_decode.clock_after(model, n + 1).temporary_slots for n in (15, 20, 40)]
    assert slots == [9, 10, 10]


def test_summary_of_a_lane():
    with torch.inference_mode():
        lane = open_lane("comet", tiny("llama", chunk_size=50, compression_stride=5), 4, 4, ROOM)
    lane.steps = [("text", 9.0, k / 1e3) for k in range(1, 99)] + [
        ("compression", 9.0, 0.2),
        ("closing", 9.0, 0.5),
    ]
    result = decode.summary(lane, "processor")
    assert result["processor_ms_per_token"] == pytest.approx((98 * 99 / 2 + 700) / 100)
    assert result["ms_per_token"] == pytest.approx(9000)
    assert (result["median_ms"], result["p99_ms"], result["closing_ms"]) == pytest.approx(
        (50.5, 200, 500)
    )
    assert sum(kind["share"] for kind in result["kinds"].values()) == pytest.approx(1)
    assert {name: kind["steps"] for name, kind in result["kinds"].items()} == {
        "text": 98,
        "compression": 1,
        "closing": 1,
    }


def test_percentile():
    assert [decode.percentile(range(1, 101), share) for share in (0.005, 0.5, 0.99, 1)] == [
        1,
        50,
        99,
        100,
    ]
    assert decode.percentile([3.0], 0.99) == 3


# ---- the programs


def test_small_run_of_decode(tmp_path, capsys):
    decode.main(["--small", "--contexts", "16", "64", "16384", "20000", "--out", str(tmp_path)])
    assert "CoMeT from 16,384 tokens on differs by" in capsys.readouterr().out
    assert sorted(file.name for file in tmp_path.iterdir()) == [
        "decode-small.json",
        "decode-small.png",
    ]
    assert (tmp_path / "decode-small.png").read_bytes().startswith(b"\x89PNG")
    result = json.loads((tmp_path / "decode-small.json").read_text())
    found = {(one["what"], one["length"]): one for one in result["lengths"]}
    assert set(found) == {
        (what, n)
        for what in ("comet", "full_attention", "in_place")
        for n in (16, 64, 16384, 20000)
    }
    for (what, n), one in found.items():
        assert one["filled"] == (n > result["read"])
        assert 0 < one["median_ms"] <= one["p99_ms"] and one["processor_ms_per_token"] > 0
        assert (one["closing_ms"] is not None) == (what == "comet")
    assert found["comet", 64]["kinds"]["closing"]["steps"] == result["cycles"]
    assert (
        result["floor"]["context"] == 1024 and 0 < result["floor"]["ratio"] < 1
    )  # so small a memory moves less
    assert (
        result["verdict"]["flatness"]["cache_bytes"] == 0
        and result["clock"] == "processor"
        and not result["skipped"]
    )
    growth = (
        found["full_attention", 20000]["cache_bytes"]
        / found["full_attention", 16384]["cache_bytes"]
    )
    assert growth == pytest.approx(20000 / 16384)


def test_the_pair_at_a_shape_alone(tmp_path, monkeypatch, capsys):
    """Ours with full memory, full attention after a short context; the floor is that of as many layers as were taken."""
    shape = measure_decode.TINY | {"model_type": "qwen3", "head_dim": 8, "num_hidden_layers": 3}
    monkeypatch.setitem(measure_decode.BACKBONES, "qwen3_0_6b", shape)
    sizes = [
        "--chunk-size",
        "8",
        "--global-size",
        "4",
        "--stride",
        "4",
        "--capacity",
        "16",
        "--cycles",
        "1",
        "--tokens",
        "8",
    ]
    decode.main(
        ["--backbone", "qwen3_0_6b", "--layers", "1", "--pair", *sizes, "--out", str(tmp_path)]
    )
    assert [file.name for file in tmp_path.iterdir()] == ["decode-qwen3_0_6b-pair.json"]
    result = json.loads((tmp_path / "decode-qwen3_0_6b-pair.json").read_text())
    times = {
        (one["what"], one["length"]): one["processor_ms_per_token"] for one in result["lengths"]
    }
    ours, *theirs = ("comet", 131072), ("full_attention", 1024), ("in_place", 1024)
    assert set(times) == {ours, *theirs} and "1 of 3 layers" in result["model"]
    floors = [
        decoding_floor(
            comet_config(shape | {"num_hidden_layers": n}, result["comet"]), 1024, with_head=True
        )
        for n in (1, 3)
    ]
    found = result["against_floor"]
    assert found["floor"] == pytest.approx(floors[0], rel=1e-3) and floors[0] != pytest.approx(
        floors[1], rel=1e-3
    )
    assert {what: one["value"] for what, one in found["ratios"].items()} == {
        what: times[ours] / times[what, n] for what, n in theirs
    }
    assert result["verdict"]["cheaper_from"] == {} and "cheaper" not in capsys.readouterr().out


def comet_config(shape, comet):
    return CometConfig(backbone_config=measure_decode.random_decoder(shape).config, **comet)


@pytest.fixture(scope="module")
def plain_folder(tmp_path_factory):
    """A tiny decoder with a tokenizer, and a book."""
    folder = tmp_path_factory.mktemp("plain")
    words = ("whale", "sea", "ship", "old", "small", "and", "the")
    book = " ".join(words[k * k % 7] for k in range(3000))
    tokenizer = train_tokenizer([book], 300)
    tokenizer.save_pretrained(folder)
    torch.manual_seed(0)
    config = backbone("llama")
    config.vocab_size = len(tokenizer)
    LlamaForCausalLM(config).save_pretrained(folder)
    (folder / "book.txt").write_text(book)
    return folder


def test_perplexity_of_a_tiny_decoder(plain_folder, tmp_path, capsys):
    """End to end, with a fine-tuned model that is none: the fresh one saved gives the fresh one's losses again."""
    book, saved = str(plain_folder / "book.txt"), tmp_path / "saved"
    perplexity.load_tokenizer(str(plain_folder)).save_pretrained(saved)
    torch.manual_seed(0)
    perplexity.plug_in(
        perplexity.load_decoder(plain_folder), perplexity.MEMORY | {"chunk_size": 16}
    ).save_pretrained(saved)
    common = [book, book, "--model", str(plain_folder), "--pieces", "5", "--tokens", "48"]
    perplexity.main([*common, "--ckpt", str(saved), "--out", str(tmp_path)])
    assert (tmp_path / "perplexity.png").read_bytes().startswith(b"\x89PNG")
    result = json.loads((tmp_path / "perplexity.json").read_text())
    models = {one["name"]: one for one in result["models"]}
    kinds = [
        f"{name}, {how}"
        for name in ("plugged in", "fine-tuned")
        for how in ("one chunk", "chunks of 16")
    ]
    assert list(models) == ["plain", "memories off", *kinds]
    assert result["law_5"]["met"] and models["memories off"]["losses"] == pytest.approx(
        models["plain"]["losses"], abs=1e-5
    )
    assert all(len(one["losses"]) == 5 for one in models.values())
    for how in ("one chunk", "chunks of 16"):
        assert models[f"fine-tuned, {how}"]["losses"] == pytest.approx(
            models[f"plugged in, {how}"]["losses"], abs=1e-5
        )
    assert models["plugged in, one chunk"]["difference"] != pytest.approx(0, abs=1e-6)
    assert models["plugged in, one chunk"]["losses"] != pytest.approx(
        models["plugged in, chunks of 16"]["losses"], abs=1e-6
    )
    assert "memories off: logits differ from plain by" in capsys.readouterr().out


def test_plain_loss_is_that_of_next_tokens(plain_folder):
    """The program's mean loss by hand, from logits."""
    model = perplexity.load_decoder(plain_folder)
    ids = text(1, 20)
    off = perplexity.plug_in(
        model, {"chunk_size": 20, "global_size": 0, "compression_stride": None}
    )
    with torch.inference_mode():
        logs = model(ids).logits[0].log_softmax(-1)
        expected = -sum(logs[k, ids[0, k + 1]].item() for k in range(19)) / 19
        assert perplexity.in_chunks(off, 20)(ids) == pytest.approx(expected, rel=1e-5)
        assert perplexity.neutral(model, off, ids) < perplexity.NEUTRAL


@given(st.integers(2, 500), st.integers(1, 9), st.data())
def test_pieces_are_evenly_spaced(tokens, count, data):
    size = data.draw(st.integers(1, tokens))
    found = perplexity.starts(tokens, size, count)
    assert len(found) == count and found[0] == 0
    assert count == 1 or found[-1] + size == tokens
    gaps = [b - a for a, b in pairwise(found)]
    assert not gaps or max(gaps) - min(gaps) <= 1


def test_differences_are_paired():
    """A constant difference has no error, however much the pieces differ."""
    one = perplexity.summary("x", [2.0, 4.0, 6.0], [1.5, 3.5, 5.5])
    assert (one["loss"], one["loss_error"]) == pytest.approx((4, 2 / math.sqrt(3)))
    assert (one["difference"], one["difference_error"]) == (0.5, 0) and one[
        "perplexity"
    ] == pytest.approx(math.exp(4))


# ---- mistakes


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--contexts", "0"], "--contexts: 0 given, a whole number >= 1"),
        (["--chunk-size", "-1"], "--chunk-size: -1 given"),
        (["--global-size", "-1"], "--global-size: -1 given, a whole number >= 0"),
        (["--cycles", "x"], "--cycles: invalid int value: 'x'"),
        (["--small", "--full"], "not allowed with"),
        (["--pair", "--contexts", "5"], "not allowed with"),
        (["--backbone", "smollm2_135m", "--model", "x"], "not allowed with"),
        (["--backbone", "x"], "--backbone: invalid choice: 'x' (choose from"),
        (["--backbone", "qwen3_4b", "--small"], "--backbone: qwen3_4b given with --small"),
        (
            ["--backbone", "qwen3_4b", "--layers", "37"],
            "--layers: 37 given, 1 to 36 are allowed for qwen3_4b",
        ),
        (["--backbone", "qwen3_4b", "--layers", "0"], "--layers: 0 given, 1 to 36"),
        (["--layers", "3"], "--layers: 3 given, --backbone NAME is needed with it"),
        (["--context", "5"], "unrecognized arguments: --context"),
        (["--out", f"{__file__}/x"], "cannot be made"),
    ],
)
def test_mistakes_in_options_of_decode(options, message):
    with pytest.raises(UserError) as caught:
        decode.parse(options)
    assert message in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["{}/none.txt"], "BOOK: {}/none.txt cannot be read"),
        (["{}/book.txt", "--tokens", "100000"], "a longer book or fewer --tokens"),
        (["{}/book.txt", "--tokens", "1"], "--tokens: 1 given, a whole number >= 2"),
        (["{}/book.txt", "--pieces", "1"], "--pieces: 1 given"),
        (["{}/book.txt"] * 3 + ["--pieces", "2"], "--pieces: 2 given for 3 books"),
        (["{}/book.txt", "--model", "{}/nowhere"], "--model: {}/nowhere"),
        (["{}/book.txt", "--ckpt", "{}/nowhere"], "ckpt: {}/nowhere does not exist"),
        (["{}/model.safetensors"], "cannot be read"),
    ],
)
def test_mistakes_in_options_of_perplexity(
    options, message, plain_folder, tmp_path, monkeypatch, capsys
):
    folder = str(plain_folder)
    given = [option.replace("{}", folder) for option in options]
    monkeypatch.setattr(
        sys, "argv", ["perplexity.py", "--model", folder, "--out", str(tmp_path), *given]
    )
    with pytest.raises(SystemExit) as caught:
        run_cli(perplexity.main)
    told = capsys.readouterr().err
    assert (
        caught.value.code == 2 and message.replace("{}", folder) in told and told.count("\n") == 1
    )
    assert not list(tmp_path.iterdir())


def test_without_the_usual_model(tmp_path, monkeypatch):
    monkeypatch.setattr(perplexity, "USUAL_MODEL", perplexity.ROOT / "nowhere")
    with pytest.raises(UserError, match="--model: nowhere is not there; `make smollm2` makes it"):
        perplexity.parse(["book.txt", "--out", str(tmp_path)])


@pytest.mark.gpu
def test_small_run_of_decode_on_a_gpu(tmp_path):
    decode.main(["--small", "--device", "cuda", "--out", str(tmp_path)])
    result = json.loads((tmp_path / "decode-small-cuda.json").read_text())
    assert result["dtype"] == "bfloat16" and result["clock"] == "wall" and result["machine"]["gpu"]


def test_a_comet_folder_is_no_plain_decoder(tmp_path):
    tiny("llama").save_pretrained(tmp_path)
    with pytest.raises(UserError, match="is a CoMeT folder; a plain decoder is needed"):
        measure_decode.load_decoder(tmp_path)
