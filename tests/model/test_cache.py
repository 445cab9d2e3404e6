"""The cache: its bytes, its file, its copies, and which model it belongs to."""

import json

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import save_file

from comet_pl import CometCache
from comet_pl.config.load import load
from comet_pl.model import room
from tests.support.models import memories, same_cache, text, tiny
from tests.support.tiny_runs import TINY

# ---- the cache


@settings(max_examples=60)
@given(
    comet=memories(),
    batch=st.integers(1, 4),
    stride=st.sampled_from([None, 1, 2, 5]),
    tokens=st.integers(1, 30),
    data=st.data(),
)
def test_cache_bytes_are_known_beforehand(comet, batch, stride, tokens, data, tmp_path_factory):
    dtype = data.draw(st.sampled_from([torch.float64, torch.float32, torch.bfloat16]))
    stride = stride if comet["compression_stride"] else None
    model = tiny(dtype=dtype, **comet)
    with torch.no_grad():
        cache = model(
            text(batch, tokens), use_cache=True, strides=stride and [stride] * batch
        ).past_key_values
    assert cache.nbytes == model.config.cache_bytes(batch, dtype, stride)
    file = tmp_path_factory.mktemp("cache") / "memory.safetensors"
    cache.save(file, notes={"of": "a text"})
    header = int.from_bytes(file.read_bytes()[:8], "little")
    assert file.stat().st_size == cache.nbytes + 8 + header
    assert CometCache.load(file).notes == {"of": "a text"}


def test_a_cache_that_does_not_fit_is_refused_before_anything_is_computed(monkeypatch):
    model = tiny()
    monkeypatch.setattr(
        room, "free_bytes", lambda device: model.config.cache_bytes(3, torch.float64)
    )
    with torch.no_grad():
        assert model(text(3, 4), use_cache=True).past_key_values.nbytes
        model.model.embed_tokens.register_forward_hook(lambda *_: pytest.fail("computed"))
        for kind in (ValueError, MemoryError):
            with pytest.raises(
                kind,
                match=r"memory of 4 text.s. takes .* MiB are free on cpu: read at most 3 at once",
            ):
                model(text(4, 4), use_cache=True)
    monkeypatch.undo()
    assert (room.free_bytes(torch.device("cpu")) or 1 << 30) > 1 << 20


@pytest.mark.parametrize(
    "key", ["backbone.hidden_size=10000000", "backbone.num_hidden_layers=10000000"]
)
def test_a_decoder_that_does_not_fit_is_refused_before_it_is_built(key, monkeypatch):
    """Many layers of few weights take memory too."""
    monkeypatch.setattr(room, "free_bytes", lambda device: 16 << 30)
    config = load([*TINY, "data.kind=passkey", key])
    room.check_weights(load([*TINY, "data.kind=passkey"]).backbone, 4)
    with pytest.raises(MemoryError, match=r"layers with about .* GiB, but 16.0 GiB are free"):
        room.check_weights(config.backbone, 4)


def test_a_cache_of_another_precision_is_refused_and_to_changes_it():
    ids = text(2, 9)
    with torch.no_grad():
        cache = tiny()(ids, use_cache=True).past_key_values
        other = tiny().float()
        with pytest.raises(
            ValueError,
            match=r"a cache of torch.float64 given, the model is of torch.float32; CometCache.to",
        ):
            other(ids, past_key_values=cache)
        moved = cache.to(dtype=torch.float32)
        assert moved.nbytes == cache.nbytes // 2
        torch.testing.assert_close(
            other(ids, past_key_values=moved).logits.double(),
            tiny()(ids, past_key_values=cache).logits,
            atol=1e-4,
            rtol=0,
        )


def rewrite(path, change):
    """A cache file with other facts or tensors, still a whole safetensors file."""
    with safe_open(path, framework="pt") as file:
        facts, tensors = (
            json.loads(file.metadata()["comet_cache"]),
            {name: file.get_tensor(name) for name in file.keys()},  # noqa: SIM118
        )
    metadata = change(facts, tensors)
    save_file(
        tensors, path, metadata={"comet_cache": json.dumps(facts)} if metadata is None else metadata
    )


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda facts, tensors: {}, "not a readable CometCache file .no 'comet_cache' in it"),
        (
            lambda facts, tensors: facts.pop("rows") and None,
            "not a readable CometCache file .no 'rows' in it",
        ),
        (
            lambda facts, tensors: facts["rows"][0].update(colour=1),
            "not a readable CometCache file",
        ),
        (
            lambda facts, tensors: facts["rows"][1].update(fill=-3),
            "not a readable CometCache file .impossible numbers",
        ),
        (
            lambda facts, tensors: facts["rows"][1].update(fill="a"),
            "not a readable CometCache file .impossible numbers",
        ),
        (lambda facts, tensors: facts.update(layers=1), "1.keys does not fit the other layers"),
        (lambda facts, tensors: facts.update(layers="two"), "not a readable CometCache file"),
        (
            lambda facts, tensors: tensors.update({"2.state": tensors.pop("1.state")}),
            "2.state does not fit the other layers",
        ),
        (
            lambda facts, tensors: tensors.update({"0.keys": tensors["0.keys"][:, :1].clone()}),
            "damaged: keys of layer 0",
        ),
        (
            lambda facts, tensors: tensors.update(
                {"0.temporary": tensors["0.temporary"][:, :1].clone()}
            ),
            "damaged: temporary of layer 0",
        ),
        (
            lambda facts, tensors: tensors.update({"1.values": tensors["1.values"].flatten()}),
            "damaged: values of layer 1",
        ),
    ],
)
def test_damaged_memory_files_are_refused(change, message, tmp_path):
    model, file = tiny(), tmp_path / "memory.safetensors"
    with torch.no_grad():
        model(text(2, 13), use_cache=True).past_key_values.save(file)
        rewrite(file, change)
        with pytest.raises(ValueError, match=message):
            model(text(2, 2), past_key_values=CometCache.load(file))


def test_a_failed_save_leaves_nothing_and_keeps_what_was_there(tmp_path):
    with torch.no_grad():
        cache = tiny()(text(1, 9), use_cache=True).past_key_values
    file = tmp_path / "memory.safetensors"
    cache.save(file)
    before = file.read_bytes()
    with pytest.raises(TypeError):
        cache.save(file, notes={"not": object()})
    with pytest.raises(Exception, match="No such file"):
        cache.save(tmp_path / "nowhere" / "memory.safetensors")
    assert [path.name for path in tmp_path.iterdir()] == [file.name]
    assert file.read_bytes() == before


def test_cache_on_disk_goes_on_exactly(tmp_path):
    model, ids = tiny(), text(2, 23)
    with torch.no_grad():
        whole = model(ids, use_cache=True)
        cache = model(ids[:, :13], use_cache=True).past_key_values
        cache.save(tmp_path / "memory.safetensors")
        loaded = CometCache.load(tmp_path / "memory.safetensors")
        assert loaded.nbytes == cache.nbytes
        rest = model(ids[:, 13:], past_key_values=loaded)
    torch.testing.assert_close(rest.logits, whole.logits[:, 13:], atol=1e-10, rtol=1e-10)
    same_cache(rest.past_key_values, whole.past_key_values)


def test_a_cache_of_another_model_is_refused(tmp_path):
    with torch.no_grad():
        cache = tiny(seed=0)(text(1, 9), use_cache=True).past_key_values
        cache.save(tmp_path / "memory.safetensors")
        with pytest.raises(ValueError, match="other weights"):
            tiny(seed=1)(
                text(1, 2), past_key_values=CometCache.load(tmp_path / "memory.safetensors")
            )
        with pytest.raises(ValueError, match="other weights"):
            tiny(seed=1)(text(1, 2), past_key_values=cache)
        with pytest.raises(ValueError, match="another configuration"):
            tiny(chunk_size=6)(text(1, 2), past_key_values=cache)
        with pytest.raises(ValueError, match="1 rows"):
            tiny()(text(2, 2), past_key_values=cache)
    (tmp_path / "broken").write_bytes((tmp_path / "memory.safetensors").read_bytes()[:-100])
    with pytest.raises(ValueError, match="broken"):
        CometCache.load(tmp_path / "broken")


def test_a_fingerprint_is_looked_up_only_while_the_configuration_is_the_same():
    """Also where something inside the configuration is changed in place."""
    model = tiny()
    first = model.fingerprint
    assert model.fingerprint == first == tiny(seed=1).fingerprint
    for holder, key, other in (
        (vars(model.config), "chunk_size", 6),
        (vars(model.config.backbone_config), "rms_norm_eps", 1e-3),
        (model.config.backbone_config.rope_parameters, "rope_theta", 1e5),
    ):
        before, holder[key] = holder[key], other
        changed, fresh = model.fingerprint, tiny()
        fresh.config = model.config
        assert changed == fresh.fingerprint != first, key
        holder[key] = before
        assert model.fingerprint == first, key


def test_clones_and_reordered_rows_go_their_own_ways():
    model, ids = tiny(), text(2, 12)
    more = text(2, 4, seed=3)
    with torch.no_grad():
        cache = model(ids, use_cache=True).past_key_values
        fork = cache.clone()
        one = model(more, past_key_values=cache).logits
        two = model(more, past_key_values=fork).logits
        assert torch.equal(one, two)
        fork.reorder_cache(torch.tensor([1, 0]))
        swapped = model(more.flip(0), past_key_values=fork).logits
        straight = model(more, past_key_values=cache).logits
    torch.testing.assert_close(swapped.flip(0), straight, atol=1e-10, rtol=1e-10)


def test_a_call_with_gradients_leaves_the_cache_untouched():
    model, ids = tiny(), text(1, 9)
    with torch.no_grad():
        cache = model(ids, use_cache=True).past_key_values
    before = cache.clone()
    after = model(ids, past_key_values=cache).past_key_values
    assert after is not cache
    same_cache(cache, before, 0)
    with torch.no_grad():  # writing into the old cache does not reach the new one
        snapshot = after.clone()
        model(text(1, 30, seed=9), past_key_values=cache)
    same_cache(after.detach(), snapshot.detach(), 0)


def test_detached_and_inference_caches_are_their_own():
    model, ids = tiny(), text(1, 9)
    with torch.inference_mode():
        made = model(ids, use_cache=True).past_key_values
    with torch.no_grad():
        cache = model(ids, use_cache=True).past_key_values
        fork = cache.detach()
        model(text(1, 40, seed=3), past_key_values=fork)
        reference = model(text(1, 5, seed=4), past_key_values=cache).logits
        torch.testing.assert_close(
            model(text(1, 5, seed=4), past_key_values=made).logits,
            reference,
            atol=1e-12,
            rtol=1e-12,
        )
        whole = model(torch.cat([ids, text(1, 5, seed=4)], 1)).logits[:, 9:]
    torch.testing.assert_close(reference, whole, atol=1e-10, rtol=1e-10)


def test_an_empty_cache_stays_empty_in_a_call_with_gradients():
    cache = CometCache()
    tiny()(text(2, 5), past_key_values=cache)
    assert cache.rows == [] and cache.fingerprint is None
    with torch.no_grad():
        assert len(tiny()(text(1, 5), past_key_values=cache).past_key_values.rows) == 1
