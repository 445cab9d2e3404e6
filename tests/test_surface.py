"""The public surface: configuration, loading and saving, generation, the cache on disk, and what is refused."""

import json

import pytest
import torch
from models import VOCABULARY, backbone, same_cache, text, tiny
from transformers import AutoModelForCausalLM, GPT2Config, Qwen3Config

from comet_pl import CometCache, CometConfig, CometForCausalLM


def greedy_reference(model, ids, count):
    """Repeated full forward passes, new ids suppressed."""
    with torch.no_grad():
        for _ in range(count):
            logits = model(ids, use_cache=False).logits[:, -1]
            logits[:, model.config.new_token_ids] = -torch.inf
            ids = torch.cat([ids, logits.argmax(-1, keepdim=True)], 1)
    return ids


# ---- generation


@pytest.mark.parametrize("comet", [{}, {"global_size": 0}, {"compression_stride": None}, {"chunk_size": 3, "compression_stride": 5}])
def test_greedy_generation_equals_repeated_passes_through_roll_overs(comet):
    model, prompt = tiny(**comet), text(1, 13)
    out = model.generate(prompt, max_new_tokens=20, do_sample=False)
    assert torch.equal(out, greedy_reference(model, prompt, 20))


def test_a_left_padded_batch_generates_like_its_rows():
    model = tiny()
    prompts = [text(1, n, seed=n) for n in (4, 11, 7)]
    ids = torch.stack([torch.nn.functional.pad(p[0], (11 - p.shape[1], 0)) for p in prompts])
    mask = torch.stack([torch.nn.functional.pad(torch.ones_like(p[0]), (11 - p.shape[1], 0)) for p in prompts])
    out = model.generate(ids, attention_mask=mask, max_new_tokens=17, do_sample=False)
    for row, prompt in zip(out, prompts, strict=True):
        assert torch.equal(row[11:], greedy_reference(model, prompt, 17)[0, prompt.shape[1] :])


def test_sampling_is_reproducible_and_never_emits_new_ids():
    model, prompt = tiny(), text(3, 5)
    torch.manual_seed(1)
    one = model.generate(prompt, max_new_tokens=30, do_sample=True, temperature=5.0)
    torch.manual_seed(1)
    assert torch.equal(one, model.generate(prompt, max_new_tokens=30, do_sample=True, temperature=5.0))
    assert one.max() < VOCABULARY
    assert len(one.unique()) > 5


def test_generation_goes_on_from_a_cache():
    """A text is read once (its document in listed chunks), then asked."""
    model, document, question = tiny(), text(1, 20), text(1, 4, seed=5)
    with torch.no_grad():
        cache = model(document, chunk_sizes=[7, 7, 6], use_cache=True, logits_to_keep=1).past_key_values
    ids = torch.cat([document, question], 1)
    first = model.generate(ids, past_key_values=cache.clone(), max_new_tokens=6, do_sample=False)
    again = model.generate(question, attention_mask=torch.ones_like(ids), past_key_values=cache.clone(), max_new_tokens=6, do_sample=False)
    assert torch.equal(first[:, 24:], again[:, 4:])


# ---- folders


def test_our_folder_round_trips(tmp_path):
    model = tiny(gate_bias=2.0, shared_adapter=True)
    model.save_pretrained(tmp_path)
    loaded = CometForCausalLM.from_pretrained(tmp_path, dtype=torch.float64)
    auto = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float64)
    ids = text(1, 17)
    with torch.no_grad():
        for other in (loaded, auto):
            assert isinstance(other, CometForCausalLM)
            torch.testing.assert_close(model(ids).logits, other(ids).logits, atol=1e-12, rtol=1e-12)
            assert other.generation_config.suppress_tokens == model.config.new_token_ids


def test_memory_keys_can_be_overridden_at_loading(tmp_path):
    tiny().save_pretrained(tmp_path)
    model = CometForCausalLM.from_pretrained(tmp_path, comet={"chunk_size": 3, "temporary_capacity": 7, "global_size": 1})
    assert (model.config.chunk_size, model.config.temporary_capacity, model.config.readout_token_ids) == (3, 7, [41])
    with pytest.raises(ValueError, match="adapter_rank"):
        CometForCausalLM.from_pretrained(tmp_path, comet={"adapter_rank": 5})
    with pytest.raises(ValueError, match="chunksize"):
        CometForCausalLM.from_pretrained(tmp_path, comet={"chunksize": 5})


@pytest.mark.parametrize("tied", [True, False])
def test_a_plain_decoder_gets_fresh_memory(tied, tmp_path):
    config = backbone()
    config.tie_word_embeddings = tied
    plain = AutoModelForCausalLM.from_config(config)
    plain.save_pretrained(tmp_path)
    comet = {"chunk_size": 4, "global_size": 3, "compression_stride": 2, "temporary_capacity": 4, "gate_bias": 5.0}
    model = CometForCausalLM.from_pretrained(tmp_path, comet=comet)
    assert model.config.vocab_size == VOCABULARY + 4
    old, new = model.model.embed_tokens.weight[:VOCABULARY], model.model.embed_tokens.weight[VOCABULARY:]
    assert torch.equal(old, plain.model.embed_tokens.weight)
    torch.testing.assert_close(new, old.mean(0).expand(4, -1), atol=1e-2, rtol=0)
    assert (model.lm_head.weight is model.model.embed_tokens.weight) == tied
    gate = model.model.layers[0].global_memory.gate.proj
    assert gate.bias.item() == 5.0
    assert 0 < gate.weight.std() < 1
    assert torch.equal(model.model.layers[1].mlp.up_proj.weight, plain.model.layers[1].mlp.up_proj.weight)
    assert torch.equal(model.model.layers[0].global_memory.norm.weight, torch.ones(16))


def test_an_authors_folder_round_trips_as_ours(tmp_path):
    from test_reference import GOLDEN

    model = CometForCausalLM.from_pretrained(GOLDEN / "fixed", comet={"chunk_size": 8})
    model.save_pretrained(tmp_path)
    again = CometForCausalLM.from_pretrained(tmp_path)
    assert again.config.chunk_size == 8
    ids = text(1, 30)
    with torch.no_grad():
        assert torch.equal(model(ids).logits, again(ids).logits)
    assert 294 in again.generation_config.suppress_tokens  # the authors' placeholder means nothing


def test_memory_parameters_are_the_new_modules():
    model = tiny()
    names = {name for name, _ in model.memory_parameters()}
    plain = {name for name, _ in AutoModelForCausalLM.from_config(backbone()).named_parameters()}
    assert {name for name, _ in model.named_parameters()} == names | plain
    assert not names & plain


def test_count_of_new_parameters():
    """Qwen3-4B's shape: a layer has two norms (2d), a gate (2d) and two adapters (4dr). The paper counts 3.95 M, between ours without and
    with the 513 new rows of the embedding."""
    big = Qwen3Config(hidden_size=2560, num_hidden_layers=36, num_attention_heads=32, num_key_value_heads=8, head_dim=128,
                      intermediate_size=9728, vocab_size=151936, tie_word_embeddings=True)  # fmt: skip
    with torch.device("meta"):
        model = CometForCausalLM(CometConfig(backbone_config=big))
    modules = sum(p.numel() for _, p in model.memory_parameters())
    assert modules == 36 * (2 + 2 + 4 * 8) * 2560
    assert modules < 3.95e6 < modules + 513 * 2560


# ---- the cache


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
            tiny(seed=1)(text(1, 2), past_key_values=CometCache.load(tmp_path / "memory.safetensors"))
        with pytest.raises(ValueError, match="other weights"):
            tiny(seed=1)(text(1, 2), past_key_values=cache)
        with pytest.raises(ValueError, match="another configuration"):
            tiny(chunk_size=6)(text(1, 2), past_key_values=cache)
        with pytest.raises(ValueError, match="1 rows"):
            tiny()(text(2, 2), past_key_values=cache)
    (tmp_path / "broken").write_bytes((tmp_path / "memory.safetensors").read_bytes()[:-100])
    with pytest.raises(ValueError, match="broken"):
        CometCache.load(tmp_path / "broken")


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
        torch.testing.assert_close(model(text(1, 5, seed=4), past_key_values=made).logits, reference, atol=1e-12, rtol=1e-12)
        whole = model(torch.cat([ids, text(1, 5, seed=4)], 1)).logits[:, 9:]
    torch.testing.assert_close(reference, whole, atol=1e-10, rtol=1e-10)


def test_an_empty_cache_stays_empty_in_a_call_with_gradients():
    cache = CometCache()
    tiny()(text(2, 5), past_key_values=cache)
    assert cache.rows == [] and cache.fingerprint is None
    with torch.no_grad():
        assert len(tiny()(text(1, 5), past_key_values=cache).past_key_values.rows) == 1


# ---- labels


def test_targets_only_between_real_tokens_and_across_chunks():
    model, ids = tiny().train(), text(2, 11)
    mask = torch.ones_like(ids)
    mask[1, 6:] = 0
    labels = ids.clone()
    labels[0, 4] = -100
    out = model(ids, attention_mask=mask, labels=labels, chunk_sizes=[[5, 6], [6]], logits_to_keep=0)
    logits = out.logits.log_softmax(-1)
    terms = [-logits[b, k, labels[b, k + 1]] for b, k in [(0, k) for k in range(10) if k != 3] + [(1, k) for k in range(5)]]
    torch.testing.assert_close(out.loss, torch.stack(terms).mean(), atol=1e-10, rtol=1e-10)


def test_no_targets_give_a_loss_of_zero_without_a_graph():
    out = tiny().train()(text(1, 6), labels=torch.full((1, 6), -100))
    assert out.loss.item() == 0
    assert not out.loss.requires_grad
    assert out.logits is None


def test_logits_to_keep():
    model, ids = tiny(), text(2, 12)
    with torch.no_grad():
        everything = model(ids).logits
        torch.testing.assert_close(model(ids, logits_to_keep=3).logits, everything[:, -3:], atol=1e-12, rtol=1e-12)
        assert torch.equal(model(ids, logits_to_keep=0).logits, everything)
        assert torch.equal(model(ids, logits_to_keep=99).logits, everything)


# ---- what is refused


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"chunk_sizes": [3, 3]}, "sums to 6, but it has 8 real tokens"),
        ({"chunk_sizes": [[8]]}, "lists for 1 rows"),
        ({"chunk_sizes": [9, -1]}, "negative"),
        ({"resets": [True]}, "without chunk_sizes"),
        ({"chunk_sizes": [4, 4], "resets": [True]}, "one bool for each"),
        ({"labels": torch.zeros(2, 8, dtype=torch.long), "shift_labels": torch.zeros(2, 8, dtype=torch.long)}, "give one of the two"),
        ({"labels": torch.zeros(2, 7, dtype=torch.long)}, "labels: shape"),
        ({"attention_mask": torch.tensor([[1] * 8, [1, 1, 0, 1, 1, 1, 1, 1]])}, "row 1 has padding between"),
        ({"attention_mask": torch.ones(2, 9)}, "attention_mask: shape"),
        ({"strides": [2]}, "strides"),
        ({"strides": 2}, "strides"),
        ({"strides": [2.7, 2]}, "strides"),
        ({"chunk_sizes": 8}, "chunk_sizes: 8 given"),
        ({"chunk_sizes": [4.0, 4.0]}, "no whole number"),
        ({"logits_to_keep": -1}, "logits_to_keep"),
        ({"strides": [2, 0]}, "strides"),
        ({"past_key_values": ()}, "CometCache is needed"),
    ],
)
def test_contradictions_are_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        tiny()(text(2, 8), **arguments)


@pytest.mark.parametrize(
    ("key", "value"),
    [("chunk_size", 0), ("global_size", -1), ("compression_stride", 0), ("temporary_capacity", 0), ("gate", "soft"), ("gate_bias", "high")],
)
def test_impossible_configurations_name_their_key(key, value):
    with pytest.raises(ValueError, match=key):
        CometConfig(backbone_config=backbone(), **{key: value})


def test_foreign_decoders_and_sliding_windows_are_refused():
    with pytest.raises(ValueError, match=r"gpt2.*supported: llama, qwen3"):
        CometForCausalLM(CometConfig(backbone_config=GPT2Config(vocab_size=30, n_embd=8, n_head=2, n_layer=1)))
    config = backbone(use_sliding_window=True, sliding_window=8, max_window_layers=0)
    with pytest.raises(ValueError, match="sliding window"):
        CometForCausalLM(CometConfig(backbone_config=config))


def test_the_configuration_survives_json(tmp_path):
    config = tiny().config
    config.save_pretrained(tmp_path)
    assert json.loads((tmp_path / "config.json").read_text())["model_type"] == "comet"
    again = CometConfig.from_pretrained(tmp_path)
    assert again.to_dict() == config.to_dict()
    assert again.get_text_config().model_type == "qwen3"
