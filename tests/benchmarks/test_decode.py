"""Decoding: a step is what it is counted as, caches of noise cost what filled ones do, and the
figures are computed right."""

import json
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import LlamaForCausalLM

from benchmarks.inference import decode, decoders, lanes
from benchmarks.shared import report
from comet_pl import CometCache, CometConfig
from comet_pl.analysis.bandwidth import decoding_floor
from comet_pl.errors import UserError
from tests.support.models import backbone, text, tiny

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
    layout=st.sampled_from(["interleaved", "trailing"]),
)
def test_a_cycle_closes_one_chunk(n, chunk, stride, filled, cycles, layout):
    """The own tokens of the first layer tell what a step was."""
    model = tiny("llama", chunk_size=chunk, compression_stride=stride, layout=layout)
    own, kinds, trailing = [], [], layout == "trailing"
    internal = 2 + (-(-chunk // stride) if trailing else 1)  # with readout tokens
    names = {(1,): "text", (2,): "compression"} | {(internal, 1): "closing"}
    count = lambda cell, inputs: own.append(inputs[0].shape[1])  # noqa: E731
    model.model.layers[0].register_forward_pre_hook(count)
    with torch.inference_mode():
        lane = lanes.open_lane("comet", model, n, 0 if filled else n, ROOM)
        for _ in range(lanes.WARM_UP):
            lane.step()
        for _ in range(cycles * chunk):
            own.clear()
            lane.run(1, "cpu")
            kinds.append(names[tuple(own)])
    assert [kind for kind, _, _ in lane.steps] == kinds
    assert kinds.count("closing") == cycles
    # A chunk's last compression token comes with its closing.
    assert kinds.count("compression") == (0 if trailing else cycles * ((chunk - 1) // stride))


@pytest.mark.parametrize("n", [1, 5, 13, 40])
def test_noise_is_as_a_prefill(n):
    """The same clock and bytes, so that the same steps follow; for full attention too."""
    model, plain = tiny("llama"), decoder()
    with torch.inference_mode():
        for what, owner in (("comet", model), ("full_attention", plain), ("in_place", plain)):
            read, filled = (lanes.open_lane(what, owner, n, limit, ROOM) for limit in (n, 0))
            assert (read.filled, filled.filled) == (False, True)
            assert read.bytes == filled.bytes > 0
            if what == "comet":
                assert read.cache.rows == filled.cache.rows
            else:
                assert read.bytes == n * lanes.token_bytes(plain)
            for lane in (read, filled):
                assert lane.cache.get_seq_length() == n
                lane.step()
                assert lane.cache.get_seq_length() == n + 1


@pytest.mark.parametrize("what", ["comet", "full_attention", "in_place"])
def test_lanes_decode_greedily(what):
    """Step by step what generate() answers to the same text."""
    torch.manual_seed(1)
    ids, answer, model = text(1, 12), [], tiny("llama") if what == "comet" else decoder()
    with torch.inference_mode():
        lane = lanes.open_lane(what, model, 12, 0, ROOM)
        lane.cache = CometCache()
        if what != "comet":
            lane.cache = lanes.empty_cache(model, what == "in_place", ROOM)
        lane.feed(ids)
        for _ in range(14):
            answer.append(lane.next_id.item())
            lane.step()
    greedy = {"do_sample": False, "eos_token_id": None, "pad_token_id": 0}
    mask = torch.ones_like(ids)
    expected = model.generate(ids, attention_mask=mask, max_new_tokens=14, **greedy)
    assert answer == expected[0, 12:].tolist()


def test_what_does_not_fit_is_skipped_with_the_reason():
    wanted = [("full_attention", 10), ("full_attention", 100), ("in_place", 50)]
    kept, [skipped] = lanes.affordable(wanted, 2**30, 100 * 2**30)  # 80 GiB may be taken
    assert kept == [("full_attention", 10), ("in_place", 50)]
    assert (skipped["what"], skipped["length"]) == ("full_attention", 100)
    assert "100.00 GiB, 70.00 GiB of memory are left" in skipped["reason"]
    assert lanes.affordable(wanted, 1, math.inf) == (wanted, [])


# ---- decoders


def test_a_decoder_and_its_copy_with_memory_share_weights():
    """All but embedding and head, which get rows; the decoder computes what it did before."""
    plain, ids = decoder(), text(1, 9)
    some = {"chunk_size": 4, "global_size": 2, "compression_stride": 2, "temporary_capacity": 4}
    with torch.no_grad():
        before, rows = plain(ids).logits, plain.config.vocab_size
        model = decoders.plug_in(plain, some)
        assert torch.equal(plain(ids).logits, before)
    ours = {weight.data_ptr() for weight in model.parameters()}
    own = {name for name, weight in plain.named_parameters() if weight.data_ptr() not in ours}
    assert own == {"model.embed_tokens.weight", "lm_head.weight"}
    assert plain.config.vocab_size == rows < model.config.vocab_size


@pytest.mark.parametrize(("name", "millions"), [("smollm2_135m", 134.5), ("qwen3_4b", 4022.5)])
def test_shapes_are_those_of_the_decoders(name, millions):
    """Weights with the embedding; the head is tied."""
    with torch.device("meta"):
        model = decoders.random_decoder(decoders.BACKBONES[name])
    assert model.num_parameters() / 1e6 == pytest.approx(millions, abs=0.1)


def test_a_comet_folder_is_no_plain_decoder(tmp_path):
    tiny("llama").save_pretrained(tmp_path)
    with pytest.raises(UserError, match="is a CoMeT folder; a plain decoder is needed"):
        decoders.load_decoder(tmp_path)


# ---- the verdicts


def test_verdict():
    keys, far = ("what", "length", "ms_per_token", "cache_bytes"), report.FLAT_FROM
    cells = [("comet", 1024, 30.0, 7), ("comet", far, 50.0, 10), ("comet", 2 * far, 54.0, 10)]
    cells += [("full_attention", 1024, 20.0, 1), ("full_attention", far, 60.0, 99)]
    rows = [dict(zip(keys, cell, strict=True)) for cell in cells]
    result = decode.verdict(rows, "ms_per_token")
    assert [*result["flatness"].values()] == pytest.approx([0.08, 0])
    assert result["cheaper_from"]["full_attention"]["tokens"] == 1024 + (far - 1024) // 2
    assert result["cheaper_from"]["in_place"] is None
    assert decode.verdict(rows[:2], "ms_per_token")["flatness"] is None


def test_the_bound_by_bytes_by_hand():
    """Floor 2, so that 2.3 is allowed. Memory is full after 4 chunks, as 3 compression tokens fill
    10 slots; the step that closes the fourth one fills it."""
    cells = [("comet", 16, 50.0), ("comet", 32, 24.0), ("full_attention", 8, 24 / 2.2)]
    keys = ("what", "length", "processor_ms_per_token")
    rows = [dict(zip(keys, cell, strict=True)) for cell in [*cells, ("in_place", 8, 10.0)]]
    comet = {"chunk_size": 5, "compression_stride": 2, "temporary_capacity": 10}
    result = {"comet": comet, "clock": "processor", "floor": {"context": 8, "ratio": 2.0}}
    bound = decode.against_floor(result | {"lengths": rows})
    assert (bound["after"], bound["bound"]) == (32, pytest.approx(2.3))
    assert bound["ratios"]["full_attention"] == {"value": pytest.approx(2.2), "met": True}
    assert bound["ratios"]["in_place"] == {"value": 2.4, "met": False}
    bound = decode.against_floor(result | {"lengths": rows[1:3]})
    assert bound["ratios"]["in_place"] == {"value": None, "met": None}
    trailing = [rows[1] | {"what": "trailing", "processor_ms_per_token": 21.0}, *rows]
    bound = decode.against_floor(result | {"lengths": trailing}, "trailing")
    assert bound["ratios"]["in_place"] == {"value": 2.1, "met": True}
    assert bound["bound"] == pytest.approx(1.07 * 2)
    for n, full in ((19, False), (20, True)):
        lengths = [rows[0] | {"length": n}]
        assert (decode.against_floor(result | {"lengths": lengths}) is not None) == full
    model = tiny("llama", global_size=2, **comet)
    slots = [lanes.clock_after(model, n + 1).temporary_slots for n in (15, 20, 40)]
    assert slots == [9, 10, 10]


def test_summary_of_a_lane():
    lane = lanes.Lane("comet", 4, None, None, False, None)
    lane.steps = [("text", 9.0, 0.1), ("compression", 9.0, 0.2), ("closing", 9.0, 0.6)]
    summary = decode.summary(lane, "processor")
    times = [summary[k] for k in ("ms_per_token", "processor_ms_per_token", "closing_ms")]
    assert times == pytest.approx([9000, 300, 600])


# ---- the program


def test_small_run(tmp_path):
    contexts = [16, 64, 16384, 20000]
    decode.main(["--small", "--contexts", *map(str, contexts), "--out", str(tmp_path)])
    assert (tmp_path / "decode-small.png").read_bytes().startswith(b"\x89PNG")
    result = json.loads((tmp_path / "decode-small.json").read_text())
    rows = {(row["what"], row["length"]): row for row in result["lengths"]}
    sides = (*decode.LAYOUTS, *decode.FULL_ATTENTION)
    assert set(rows) == {(what, n) for what in sides for n in contexts}
    for (what, n), row in rows.items():
        assert row["filled"] == (n > result["read"]) and row["processor_ms_per_token"] > 0
        assert (row["closing_ms"] is not None) == (what in decode.LAYOUTS)
    # So small a memory moves less than full attention.
    assert 0 < result["floor"]["ratio"] < 1 and result["clock"] == "processor"
    assert result["verdict"]["flatness"]["cache_bytes"] == 0 and not result["skipped"]
    sizes = [rows["full_attention", n]["cache_bytes"] for n in (20000, 16384)]
    assert sizes[0] / sizes[1] == pytest.approx(20000 / 16384)


def test_the_pair_at_a_shape_alone(tmp_path, monkeypatch):
    """CoMeT with full memory, full attention after a short context; the floor of these layers."""
    shape = decoders.BACKBONES["tiny"] | {"num_hidden_layers": 3}
    monkeypatch.setitem(decoders.BACKBONES, "qwen3_0_6b", shape)
    argv = ["--backbone", "qwen3_0_6b", "--layers", "1", "--pair", "--out", str(tmp_path)]
    decode.main([*argv, "--small"])
    assert [file.name for file in tmp_path.iterdir()] == ["decode-qwen3_0_6b-pair.json"]
    result = json.loads((tmp_path / "decode-qwen3_0_6b-pair.json").read_text())
    rows = {(row["what"], row["length"]) for row in result["lengths"]}
    far = {(layout, 131072) for layout in decode.LAYOUTS}
    assert rows == far | {("full_attention", 1024), ("in_place", 1024)}
    config = decoders.random_decoder(shape | {"num_hidden_layers": 1}).config
    floor = decoding_floor(CometConfig(config, **result["comet"]), 1024, with_head=True)
    assert decode.against_floor(result)["floor"] == pytest.approx(floor, rel=1e-3)
    assert "1 of 3 layers" in result["model"] and result["verdict"]["cheaper_from"] == {}


@pytest.mark.gpu
def test_small_run_on_a_gpu(tmp_path):
    decode.main(["--small", "--device", "cuda", "--out", str(tmp_path)])
    result = json.loads((tmp_path / "decode-small-cuda.json").read_text())
    assert (result["dtype"], result["clock"]) == ("bfloat16", "wall") and result["machine"]["gpu"]
