"""Hugging Face's generate, unchanged, on a model whose chunks roll over and whose internal tokens
never show."""

import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn.functional import pad
from transformers import (
    AutoModelForCausalLM,
    GenerationConfig,
    LogitsProcessor,
    LogitsProcessorList,
)
from transformers.generation.streamers import BaseStreamer

from comet_pl import CometCache, CometConfig, CometForCausalLM
from data.tokenizer import train_tokenizer
from tests.laws.test_reference import load
from tests.support.models import (
    FAMILIES,
    MEMORY,
    NEUTRAL,
    VOCABULARY,
    backbone,
    continued,
    memories,
    text,
    tiny,
)


def greedy(model, ids, count, **options):
    """Hugging Face's generate."""
    return model.generate(ids, max_new_tokens=count, do_sample=False, **options)


def ragged(prompts):
    """Prompts (1, n) as one left-padded batch and its mask."""
    width = max(p.shape[1] for p in prompts)
    return tuple(
        torch.cat([pad(row, (width - row.shape[1], 0)) for row in rows])
        for rows in (prompts, [torch.ones_like(p) for p in prompts])
    )


# ---- greedy


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize(
    "comet",
    [
        {},
        {"global_size": 0},
        {"compression_stride": None},
        {"chunk_size": 3, "compression_stride": 5},
    ],
)
def test_greedy_equals_repeated_passes_through_roll_overs(family, comet):
    model, prompt = tiny(family, **comet), text(1, 13)
    assert torch.equal(greedy(model, prompt, 20), continued(model, prompt, 20))


@settings(max_examples=max(30, settings().max_examples // 2))
@given(
    comet=memories(),
    lengths=st.lists(st.integers(1, 14), min_size=2, max_size=3),
    extra=st.integers(0, 3),
)
def test_a_ragged_batch_generates_like_its_rows(comet, lengths, extra):
    """Token for token, through two roll-overs at least, whatever the prompts' lengths. Left-padded:
    generate looks at the last column."""
    model = tiny(**comet)
    prompts = [text(1, n, seed=n) for n in lengths]
    ids, mask = ragged(prompts)
    count = 2 * comet["chunk_size"] + extra + 1
    out = greedy(model, ids, count, attention_mask=mask)
    for row, prompt in zip(out, prompts, strict=True):
        alone = greedy(model, prompt, count)
        assert torch.equal(row[ids.shape[1] :], alone[0, prompt.shape[1] :])
        assert torch.equal(alone, continued(model, prompt, count))


def test_our_folder_of_the_authors_weights_generates_what_theirs_did(tmp_path):
    """Authors' checkpoint -> our folder in shards -> Auto class -> the golden continuation."""
    theirs, expected, _ = load("decode")
    theirs.save_pretrained(tmp_path, max_shard_size="40KB")
    assert len(list(tmp_path.glob("model-*.safetensors"))) > 1
    wanted = expected["generated"].flatten()
    model = AutoModelForCausalLM.from_pretrained(tmp_path)
    out = greedy(model, expected["input_ids.0"][None], len(wanted), eos_token_id=None)
    assert out[0, -len(wanted) :].tolist() == wanted.tolist()


# ---- beams, samples, and what goes with them


SCORES = {"return_dict_in_generate": True, "output_scores": True}


@pytest.mark.parametrize("family", FAMILIES)
def test_beams_are_hugging_faces_on_a_model_with_both_memories_off(family, tmp_path):
    torch.manual_seed(0)
    plain = AutoModelForCausalLM.from_config(backbone(family)).double().eval()
    plain.save_pretrained(tmp_path)
    model = CometForCausalLM.from_pretrained(tmp_path, comet=NEUTRAL, dtype=torch.float64).eval()
    ids, mask = ragged([text(1, n, seed=n) for n in (4, 9, 6)])
    options = {"num_beams": 4, "num_return_sequences": 3, "length_penalty": 0.5}
    options |= {"attention_mask": mask, "pad_token_id": 0, "eos_token_id": 7}
    ours, theirs = (greedy(one, ids, 15, **options, **SCORES) for one in (model, plain))
    assert torch.equal(ours.sequences, theirs.sequences)
    torch.testing.assert_close(ours.sequences_scores, theirs.sequences_scores)


@pytest.mark.parametrize("family", FAMILIES)
def test_beams_carry_their_own_memories(family):
    """Each returned sequence's score is that of reading it in one go: a cache that was not
    reordered would give another one."""
    model = tiny(family)
    ids, mask = ragged([text(1, n, seed=n) for n in (4, 9)])
    options = {"num_beams": 4, "num_return_sequences": 4, "length_penalty": 0.0}
    out = greedy(model, ids, 14, attention_mask=mask, eos_token_id=None, **options, **SCORES)
    assert len({tuple(row.tolist()) for row in out.sequences}) == 8
    masks = torch.cat([mask.repeat_interleave(4, 0), torch.ones(8, 14, dtype=torch.long)], 1)
    with torch.no_grad():
        logits = model(out.sequences, attention_mask=masks, use_cache=False).logits[:, -15:-1]
    scores = logits.log_softmax(-1).gather(2, out.sequences[:, -14:, None]).sum((1, 2))
    torch.testing.assert_close(out.sequences_scores, scores.float(), atol=1e-4, rtol=1e-4)


def test_samples_are_reproducible_and_several_a_prompt():
    model, prompt = tiny(), text(3, 5)
    options = {"max_new_tokens": 30, "do_sample": True}
    options |= {"temperature": 5.0, "num_return_sequences": 2}
    torch.manual_seed(1)
    one = model.generate(prompt, **options)
    torch.manual_seed(1)
    assert torch.equal(one, model.generate(prompt, **options))
    assert one.shape == (6, 35)
    assert not torch.equal(one[0], one[1])
    assert one.max() < VOCABULARY
    assert len(one.unique()) > 5


def test_internal_tokens_never_show_whatever_is_configured():
    """The head likes nothing better than them."""
    model, prompt = tiny(), text(1, 5)
    with torch.no_grad():
        model.lm_head.weight[VOCABULARY:] = 3 * model.lm_head.weight[:VOCABULARY].abs().max()
    model.generation_config = GenerationConfig(max_new_tokens=40, do_sample=True, temperature=5.0)
    for more in (
        {},
        {"suppress_tokens": [4]},
        {"suppress_tokens": None},
        {"generation_config": GenerationConfig(max_new_tokens=30)},
    ):
        out = model.generate(prompt, **more)
        assert out.max() < VOCABULARY
        assert more != {"suppress_tokens": [4]} or 4 not in out[0, 5:]


class Recorder(LogitsProcessor):
    """Forbids a token; remembers how many tokens it was shown at each step."""

    def __init__(self, forbidden):
        self.forbidden, self.lengths = forbidden, []

    def __call__(self, input_ids, scores):
        self.lengths.append(input_ids.shape[1])
        return scores.index_fill(1, torch.tensor([self.forbidden]), -torch.inf)


class Collector(BaseStreamer):
    def __init__(self):
        self.seen, self.ended = [], False

    def put(self, value):
        self.seen.append(value)

    def end(self):
        self.ended = True


def test_processors_and_streamers_see_text_tokens_only():
    model, prompt = tiny(), text(1, 6)
    first = greedy(model, prompt, 1)[0, -1].item()
    recorder, streamer = Recorder(first), Collector()
    processors = LogitsProcessorList([recorder])
    out = greedy(model, prompt, 17, logits_processor=processors, streamer=streamer)
    assert out.shape == (1, 23)
    assert first not in out[0, 6:]
    assert recorder.lengths == list(range(6, 23))
    assert streamer.ended
    assert torch.equal(torch.cat([piece.flatten() for piece in streamer.seen]), out[0])


def test_stop_strings_and_stop_tokens_end_each_row_alone():
    tokenizer = train_tokenizer(["the cat sat on a mat and ran to the old red barn " * 5], 300)
    torch.manual_seed(0)
    model = CometForCausalLM(CometConfig(backbone(vocab_size=len(tokenizer)), **MEMORY))
    prompt = torch.randint(4, len(tokenizer), (2, 7))
    broken = [
        k
        for k in range(len(tokenizer))
        if k < 4 or not (tokenizer.decode(k).isascii() and tokenizer.decode(k).isprintable())
    ]
    options = {"suppress_tokens": [*broken, *model.config.new_token_ids]}
    free = greedy(model, prompt, 25, **options)
    # What the first row says in its tenth to twelfth step, after a roll-over.
    stop = tokenizer.decode(free[0, 16:19])
    options |= {"tokenizer": tokenizer, "pad_token_id": 0, "eos_token_id": 1}
    out = greedy(model, prompt, 25, stop_strings=[stop], **options)
    for row, whole in zip(out, free, strict=True):
        kept = row[: len(row) - int((row.flip(0) != 0).long().argmax())]  # pad tokens behind
        assert torch.equal(kept, whole[: len(kept)])
        if len(kept) < 32:
            assert stop in tokenizer.decode(kept)
    assert 10 <= (out[0] != 0).sum() <= 19


# ---- what is refused


def test_prompts_that_leave_nothing_to_go_on_from():
    model = tiny()
    with torch.no_grad():
        cache = model(text(1, 9), use_cache=True).past_key_values

    def refused(message, ids, read=None, mask=None, **options):
        if read is not None:
            options["past_key_values"] = read.clone()
        if mask is not None:
            options["attention_mask"] = torch.tensor(mask)
        with pytest.raises(ValueError, match=message):
            model.generate(ids, **{"max_new_tokens": 2} | options)

    refused("an empty prompt given", torch.zeros(1, 0, dtype=torch.long))
    refused("row 1 of the prompt has no new token", text(2, 3), mask=[[0, 1, 1], [0, 0, 0]])
    # All of it read already; new ids only, without the mask that would say so.
    for ids in (text(1, 9), text(1, 2)):
        refused("has read 9 already", ids, cache)
    three = r"holds 1 rows, input_ids has 3; CometCache.batch_repeat_interleave\(3\)"
    refused(three, text(1, 12), cache, num_return_sequences=3, do_sample=True)
    padded = r"row 1 of the prompt ends with padding.*pad on the left"
    refused(padded, text(2, 3), mask=[[0, 1, 1], [1, 1, 0]])
    refused("max_new_tokens", text(1, 3), max_new_tokens=0)
    refused("row 0 has padding between", text(1, 3), mask=[[1, 0, 1]])
    assert cache.columns == 9


def test_rows_that_end_early_wait_for_the_others():
    """Their padding is fed as text, as Hugging Face does; the other rows must not notice."""
    model, prompts = tiny(), [text(1, 6, seed=k) for k in range(3)]
    alone = [greedy(model, prompt, 18)[0, 6:] for prompt in prompts]

    def kept(stop):
        return [list(itertools.takewhile(lambda t: t != stop, whole.tolist())) for whole in alone]

    stop = next(t for t in range(VOCABULARY) if len({len(row) for row in kept(t)}) == 3)
    ids = torch.cat(prompts)
    options = {"attention_mask": torch.ones_like(ids), "eos_token_id": stop, "pad_token_id": 0}
    out = greedy(model, ids, 18, **options)
    for row, expected in zip(out, kept(stop), strict=True):
        assert row[6 : 6 + len(expected)].tolist() == expected


def test_a_cache_in_a_streaming_loop_stays_as_large():
    """As a user's own decoding loop does it; thirty roll-overs."""
    model, cache = tiny(), CometCache()
    token = text(1, 1)
    with torch.no_grad():
        sizes = set()
        for _ in range(150):
            token = model(token, past_key_values=cache).logits[:, -1:, :VOCABULARY].argmax(-1)
            sizes.add(cache.nbytes)
    assert len(sizes) == 1
    assert sizes == {model.config.cache_bytes(1, torch.float64)}
