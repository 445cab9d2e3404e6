"""Generation from a memory that is kept, in this process and in another."""

import json

import torch

from tests.support.models import FAMILIES, text, tiny
from tests.support.tiny_runs import python


def test_generation_goes_on_from_a_cache():
    """A text is read once (its document in listed chunks), then asked."""
    model, document, question = tiny(), text(1, 20), text(1, 4, seed=5)
    with torch.no_grad():
        cache = model(document, chunk_sizes=[7, 7, 6], use_cache=True, logits_to_keep=1)
        cache = cache.past_key_values
    ids, options = torch.cat([document, question], 1), {"max_new_tokens": 6, "do_sample": False}
    first = model.generate(ids, past_key_values=cache.clone(), **options)
    options["attention_mask"] = torch.ones_like(ids)
    again = model.generate(question, past_key_values=cache.clone(), **options)
    assert torch.equal(first[:, 24:], again[:, 4:])


def test_one_memory_answers_in_beams_and_samples():
    model, document, question = tiny(), text(1, 23), text(1, 4, seed=5)
    with torch.no_grad():
        cache = model(document, use_cache=True, logits_to_keep=1).past_key_values
    ids = torch.cat([document, question], 1)
    wide = cache.clone()
    wide.batch_repeat_interleave(3)
    options = {"max_new_tokens": 12, "num_beams": 3, "do_sample": False}
    assert torch.equal(
        model.generate(ids, past_key_values=wide, **options), model.generate(ids, **options)
    )


CONTINUE = """
import json, pathlib, torch
from transformers import AutoModelForCausalLM
import comet_pl
from comet_pl import CometCache
answers = {{}}
for folder in pathlib.Path({root!r}).iterdir():
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float64)
    cache, answers[folder.name] = CometCache.load(folder / "memory"), []
    for question in {questions!r}:
        fork, columns = cache.clone(), cache.get_seq_length() + len(question[0])
        ids, mask = torch.tensor(question), torch.ones(2, columns, dtype=torch.long)
        settings = dict(past_key_values=fork, max_new_tokens=16, do_sample=False)
        out = model.generate(ids, attention_mask=mask, **settings)
        answers[folder.name].append(out[:, ids.shape[1]:].tolist())
print(json.dumps(answers))
"""


def test_memories_on_disk_continue_in_another_process(tmp_path):
    """Saved, loaded elsewhere, cloned twice and continued differently = never interrupted."""
    models, document = {family: tiny(family) for family in FAMILIES}, text(2, 33)
    for family, model in models.items():
        model.save_pretrained(tmp_path / family)
        with torch.no_grad():
            cache = model(document, use_cache=True, logits_to_keep=1).past_key_values
        cache.save(tmp_path / family / "memory")
    questions = [text(2, n, seed=n).tolist() for n in (3, 8)]
    answers = json.loads(python(CONTINUE.format(root=str(tmp_path), questions=questions)))
    for family, model in models.items():
        for question, answer in zip(questions, answers[family], strict=True):
            ids = torch.cat([document, torch.tensor(question)], 1)
            whole = model.generate(ids, max_new_tokens=16, do_sample=False)
            assert answer == whole[:, ids.shape[1] :].tolist(), family
