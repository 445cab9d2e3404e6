"""Laws 2, 3 (one process), 4, 5, 6 and 8: split, walk, batch, neutral, constant, causal."""

import gc

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from comet_pl import CometCache, CometConfig, CometForCausalLM
from comet_pl.model import attention as kernels
from tests.support.models import (
    EXACT,
    FAMILIES,
    VOCABULARY,
    backbone,
    chunk_plans,
    memories,
    same_cache,
    text,
    tiny,
)
from tests.support.training import close, gradients_of

# The wide profile asks for more.
some = settings(max_examples=max(60, settings().max_examples))


def read(model, *pieces, cache=None, **options):
    """(logits of all pieces, cache after them)."""
    logits = []
    for ids in pieces:
        out = model(ids, past_key_values=cache, use_cache=True, **options)
        cache = out.past_key_values
        logits.append(out.logits)
    return torch.cat(logits, 1), cache


@pytest.fixture(autouse=True, scope="module")
def kernels_also_for_few_scores():
    """These models are tiny: without this the plain formula would answer for sdpa everywhere."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(kernels, "FEW_SCORES", 0)
        yield


# ---- law 2: split


@some
@given(
    comet=memories(),
    n=st.integers(1, 40),
    cuts=st.lists(st.integers(0, 40), max_size=8),
    grad=st.booleans(),
    data=st.data(),
)
def test_pieces_of_any_size(comet, n, cuts, grad, data):
    model, ids = tiny(**comet), text(2, n)
    strides = None
    if comet["compression_stride"] and data.draw(st.booleans()):
        strides = [data.draw(st.integers(1, 5)) for _ in range(2)]
    ends = [*sorted(c for c in cuts if c < n), n]
    with torch.set_grad_enabled(grad):
        whole = model(ids, use_cache=True, strides=strides)
        cache, logits, start = None, [], 0
        for end in ends:
            first = strides if start == 0 else None
            piece, cache = read(model, ids[:, start:end], cache=cache, strides=first)
            logits.append(piece)
            start = end
    torch.testing.assert_close(torch.cat(logits, 1), whole.logits, **EXACT)
    same_cache(cache, whole.past_key_values)


@some
@given(comet=memories(), data=st.data(), n=st.integers(1, 30))
def test_one_token_at_a_time_after_a_prompt(comet, data, n):
    """In place (decoding) and with gradients, mixed."""
    model, ids = tiny(**comet), text(1, n)
    with torch.no_grad():
        whole = model(ids, use_cache=True)
        cache, logits = CometCache(), []
        for k in range(n):
            with torch.set_grad_enabled(data.draw(st.booleans())):
                piece, cache = read(model, ids[:, k : k + 1], cache=cache)
            logits.append(piece)
    torch.testing.assert_close(torch.cat(logits, 1), whole.logits, **EXACT)
    same_cache(cache, whole.past_key_values)


@some
@given(comet=memories(), n=st.integers(2, 40), data=st.data())
def test_cuts_between_listed_chunks(comet, n, data):
    model, ids = tiny(**comet), text(2, n)
    sizes = data.draw(chunk_plans(n))
    resets = data.draw(st.lists(st.booleans(), min_size=len(sizes), max_size=len(sizes)))
    k = data.draw(st.integers(0, len(sizes)))
    middle = sum(sizes[:k])
    with torch.no_grad():
        whole, expected = read(model, ids, chunk_sizes=sizes, resets=resets)
        first, cache = read(model, ids[:, :middle], chunk_sizes=sizes[:k], resets=resets[:k])
        rest = {"chunk_sizes": sizes[k:], "resets": resets[k:]}
        second, cache = read(model, ids[:, middle:], cache=cache, **rest)
    torch.testing.assert_close(torch.cat([first, second], 1), whole, **EXACT)
    same_cache(cache, expected)


def test_a_reset_chunk_starts_afresh():
    model, ids = tiny(), text(1, 12)
    with torch.no_grad():
        both = model(ids, chunk_sizes=[4, 2, 6], resets=[False, False, True]).logits[:, 6:]
        alone = model(ids[:, 6:], chunk_sizes=[6]).logits
        linked = model(ids, chunk_sizes=[4, 2, 6]).logits[:, 6:]
    torch.testing.assert_close(both, alone, **EXACT)
    assert not torch.allclose(linked, alone)


def test_chunk_sizes_close_an_open_chunk_first():
    model, ids = tiny(), text(1, 9)
    with torch.no_grad():
        cache = model(ids[:, :3], use_cache=True).past_key_values
        mixed = model(ids[:, 3:], chunk_sizes=[6], past_key_values=cache).logits
        listed = model(ids, chunk_sizes=[3, 6]).logits[:, 3:]
    torch.testing.assert_close(mixed, listed, **EXACT)


def test_without_rollover_the_last_chunk_grows():
    model, ids = tiny(rollover=False), text(1, 30)
    with torch.no_grad():
        cache = model(ids[:, :7], use_cache=True).past_key_values
        for k in range(7, 30):
            out = model(ids[:, k : k + 1], past_key_values=cache)
        listed = model(ids, chunk_sizes=[5, 25]).logits
    assert cache.rows[0].fill == 25
    torch.testing.assert_close(out.logits[0, 0], listed[0, -1], **EXACT)


# ---- law 3: walk (one process)


@some
@given(
    comet=memories(),
    n=st.integers(1, 30),
    recompute=st.booleans(),
    ragged=st.booleans(),
    data=st.data(),
)
def test_walks_agree_with_gradients(comet, n, recompute, ragged, data):
    ids = text(2, n)
    mask = torch.ones_like(ids)
    if ragged:
        mask[1, data.draw(st.integers(1, n)) :] = 0
    sizes = [data.draw(chunk_plans(int(row.sum()))) for row in mask]
    results = []
    for walk in ("chunk_major", "layer_major"):
        model = tiny(layers=3, **comet).train()
        model.traversal, model.gradient_checkpointing = walk, recompute
        out = model(ids, attention_mask=mask, labels=ids, chunk_sizes=sizes, use_cache=True)
        states = (memory.state for memory in out.past_key_values.memories)
        loss = out.loss + 0.01 * sum(s.square().sum() for s in states if s is not None)
        if loss.requires_grad:
            loss.backward()
        gradients = {k: p.grad for k, p in model.named_parameters() if p.grad is not None}
        results.append(((loss.detach(), gradients), out.past_key_values.detach()))
    (values, cache), (values2, cache2) = results
    torch.testing.assert_close(values, values2, **EXACT)
    same_cache(cache, cache2)


def test_windows_with_a_live_cache_equal_one_call():
    """Gradients flow through a returned cache, and the loss of the pieces adds up to the loss of
    the whole."""
    ids, whole, pieces = text(2, 20), tiny().train(), tiny().train()
    whole(ids, labels=ids, chunk_sizes=[5, 5, 5, 5]).loss.backward()
    shift = torch.cat([ids[:, 1:], torch.full((2, 1), -100)], 1)
    more = {"chunk_sizes": [5, 5], "use_cache": True, "num_items_in_batch": 38}
    first = pieces(ids[:, :10], shift_labels=shift[:, :10], **more)
    more["past_key_values"] = first.past_key_values
    second = pieces(ids[:, 10:], shift_labels=shift[:, 10:], **more)
    (first.loss + second.loss).backward()
    close(gradients_of(whole), gradients_of(pieces))


# ---- law 4: batch


@some
@given(
    comet=memories(),
    lengths=st.lists(st.integers(0, 25), min_size=2, max_size=4),
    left=st.booleans(),
    listed=st.booleans(),
    data=st.data(),
)
def test_a_ragged_batch_equals_its_rows(comet, lengths, left, listed, data):
    model, width = tiny(**comet), max(*lengths, 1)
    ids, mask = text(len(lengths), width), torch.zeros(len(lengths), width, dtype=torch.long)
    spans = [slice(width - n, width) if left else slice(0, n) for n in lengths]
    for b, span in enumerate(spans):
        mask[b, span] = 1
    sizes = [data.draw(chunk_plans(n)) if n else [] for n in lengths] if listed else None
    more = text(len(lengths), 6, seed=1)  # then the rows go on together, in place
    with torch.no_grad():
        batch = model(ids, attention_mask=mask, chunk_sizes=sizes, use_cache=True)
        uncached = model(ids, attention_mask=mask, chunk_sizes=sizes, use_cache=False).logits
        after, _ = read(model, *more.split(2, 1), cache=batch.past_key_values)
        for b, span in enumerate(spans):
            cache = None
            if lengths[b]:
                own = [sizes[b]] if sizes else None
                alone, cache = read(model, ids[b : b + 1, span], chunk_sizes=own)
                torch.testing.assert_close(batch.logits[b, span], alone[0], **EXACT)
                torch.testing.assert_close(uncached[b, span], alone[0], **EXACT)
            follow, _ = read(model, more[b : b + 1], cache=cache)
            torch.testing.assert_close(after[b], follow[0], **EXACT)


@some
@given(comet=memories(), n=st.integers(1, 20), data=st.data())
def test_a_stride_of_its_own_for_each_row(comet, n, data):
    model, ids = tiny(**comet | {"compression_stride": 2}), text(3, n)
    strides = data.draw(st.lists(st.integers(1, 8), min_size=3, max_size=3))
    sizes = data.draw(chunk_plans(n))
    with torch.no_grad():
        batch = model(ids, chunk_sizes=sizes, strides=strides).logits
        for b in range(3):
            alone = model(ids[b : b + 1], chunk_sizes=sizes, strides=strides[b : b + 1]).logits
            torch.testing.assert_close(batch[b], alone[0], **EXACT)


def test_a_ragged_batch_trains_like_its_rows():
    ids, mask = text(2, 14), torch.ones(2, 14, dtype=torch.long)
    mask[1, 9:] = 0
    batch, alone = tiny().train(), tiny().train()
    batch(ids, attention_mask=mask, labels=ids, num_items_in_batch=21).loss.backward()
    for b, n in ((0, 14), (1, 9)):
        alone(ids[b : b + 1, :n], labels=ids[b : b + 1, :n], num_items_in_batch=21).loss.backward()
    close(gradients_of(batch), gradients_of(alone))


# ---- law 6: constant


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("batch", [1, 3])
def test_cache_bytes_do_not_depend_on_what_was_read(family, batch):
    model, sizes = tiny(family), set()
    cache = CometCache()
    with torch.no_grad():
        for piece in (1, 3, 1, 40, 200, 7):
            model(text(batch, piece), past_key_values=cache, logits_to_keep=1)
            sizes.add(cache.nbytes)
        mask = torch.ones(batch, 9, dtype=torch.long)
        mask[0, 4:] = 0
        model(text(batch, 9), attention_mask=mask, past_key_values=cache)
        sizes.add(cache.nbytes)
    assert len(sizes) == 1


@pytest.mark.parametrize("family", FAMILIES)
def test_no_tensor_grows_with_the_text(family):
    """The largest live tensor while reading, and the number of live tensors afterwards, are those
    of a short text."""
    model, seen = tiny(family, dtype=torch.float32), {}
    # What other tests have left with finalizers takes more than one collection.
    while gc.collect():
        pass
    for pieces in (4, 40):
        largest = 0
        cache = CometCache()

        def look(module, inputs, outputs):
            nonlocal largest
            tensors = (outputs[0], *outputs[1])
            largest = max(largest, *(t.numel() for t in tensors if t is not None))

        hooks = [cell.register_forward_hook(look) for cell in model.model.layers]
        with torch.no_grad():
            for k in range(pieces):
                model(text(1, 10, seed=k), past_key_values=cache, logits_to_keep=1)
        for hook in hooks:
            hook.remove()
        gc.collect()
        living = sum(issubclass(type(o), torch.Tensor) for o in gc.get_objects())
        seen[pieces] = largest, cache.nbytes, living
    assert seen[4] == seen[40]


# ---- law 8: causal


@some
@given(
    comet=memories(),
    n=st.integers(2, 25),
    data=st.data(),
    attention=st.sampled_from(["sdpa", "eager"]),
    listed=st.booleans(),
)
def test_no_logit_looks_ahead(comet, n, data, attention, listed):
    model, ids = tiny(attention=attention, **comet), text(1, n)
    k = data.draw(st.integers(1, n - 1))
    changed = ids.clone()
    changed[0, k] = (changed[0, k] + 1) % VOCABULARY
    sizes = data.draw(chunk_plans(n)) if listed else None
    with torch.no_grad():
        one, other = model(ids, chunk_sizes=sizes).logits, model(changed, chunk_sizes=sizes).logits
    torch.testing.assert_close(one[:, :k], other[:, :k], atol=0, rtol=0)
    assert not torch.equal(one[:, k], other[:, k])


def test_shared_configuration_is_copied():
    shared = backbone()
    one, two = (CometForCausalLM(CometConfig(shared)) for _ in range(2))
    one.set_attn_implementation("eager")
    assert two.config.backbone_config._attn_implementation == "sdpa"
    assert shared.vocab_size == VOCABULARY
