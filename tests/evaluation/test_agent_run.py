"""The agent conf: reading turn by turn with a carried memory, and runs from train.py to a table."""

import json
import re

import numpy as np
import pytest
import torch

import train
from comet_pl import build
from comet_pl.config.load import load
from comet_pl.evaluation.agent import act
from comet_pl.evaluation.generation import Engine
from comet_pl.metrics.scrolls import f1
from data.agent_traces import source_of, split_of, validation_samples
from data.text.tokenized import Sample
from data.tokenizer import AGENT_TOKENS, train_tokenizer
from tests.support.models import text, tiny
from tests.support.tiny_data import write_traces
from tests.support.tiny_runs import TINY

TURNS = [
    ["user", 0, 1, 11, None],
    ["assistant", 11, 13, 20, None],
    ["tool", 20, 22, 37, None],
    ["assistant", 37, 38, 45, 1],
    ["user", 45, 46, 50, None],
    ["assistant", 50, 52, 60, 3],
]


class Words:
    eos_token_id = pad_token_id = 3

    @staticmethod
    def decode(ids, skip_special_tokens=True):
        return " ".join(str(int(i)) for i in ids)


def turns_of(model, ids, max_new_tokens):
    """What `act` gives for a trace of three assistant turns."""
    sample = Sample(
        ids[0].numpy().astype(np.int32), np.zeros(60, dtype=bool), {"id": "x", "turns": TURNS}
    )
    with torch.no_grad():
        return list(act(Engine(model, Words()), sample, max_new_tokens))


@pytest.mark.parametrize("comet", [{}, {"chunk_size": 4}, {"global_size": 0}])
def test_turn_by_turn_is_the_whole_text(comet):
    """Each turn's loss is that of one pass over everything; its prediction is generate's."""
    model, ids = tiny(**comet), text(1, 60, seed=3)
    answers = turns_of(model, ids, 9)
    with torch.no_grad():
        logits = model(ids).logits[0].log_softmax(-1)
    assert [answer["turn"] for answer in answers] == [1, 2, 3]
    spoken = [turn for turn in TURNS if turn[0] == "assistant"]
    for answer, (_, _, content, end, distance) in zip(answers, spoken, strict=True):
        loss = -sum(logits[k - 1, ids[0, k]] for k in range(content, end))
        assert answer["loss"] == pytest.approx(float(loss), rel=1e-6)
        assert (answer["tokens"], answer["distance"]) == (end - content, distance)
        options = {"max_new_tokens": 9, "do_sample": False, "eos_token_id": 3, "pad_token_id": 3}
        said = model.generate(ids[:, :content], **options)[0, content:]
        assert answer["prediction"] == Words.decode(said)
        assert answer["references"] == [Words.decode(ids[0, content:end])]
        assert answer["prompt_end"] == Words.decode(ids[0, :content])
        # no turn calls a tool
        assert answer["score"] == f1(answer["prediction"], answer["references"][0])


def test_the_memory_is_carried_from_turn_to_turn():
    """Reading a trace feeds each token once, and the last one before a turn to generate()."""
    model, fed = tiny(), []

    def count(_, args, kwargs):
        fed.append((args[0] if args else kwargs["input_ids"]).shape[1])

    model.register_forward_pre_hook(count, with_kwargs=True)
    turns = turns_of(model, text(1, 60, seed=3), 1)
    assert sum(fed) == 60 + len(turns)


@pytest.fixture(scope="module")
def keys(tmp_path_factory):
    """Of a tiny run on 12 traces, whose root is the last one."""
    root = tmp_path_factory.mktemp("agent")
    return [
        "conf=agent",
        "run.name=x",
        *TINY,
        "model.chunk_size=64",
        f"data.root={write_traces(root / 'traces')}",
        f"data.cache={root / 'cache'}",
        "data.val_share=0.4",
        "data.max_length=512",
        "data.batch_size=2",
        "eval.max_new_tokens=4",
    ]


def test_a_run_trains_validates_and_scores_next_actions(keys, tmp_path, capsys):
    steps = ["trainer.max_steps=3", "trainer.val_check_interval=2", "data.min_reward=0.5"]
    train.main([*keys, *steps, f"run.root={tmp_path}"])
    out = capsys.readouterr().out
    assert "traces left out: reward below 0.5" in out and "turn distance" in out
    packed = r"train: \d+ texts packed into \d+ rows of 512 tokens, \d+\.\d% of them padding"
    assert re.search(packed, out)
    scores = json.loads((tmp_path / "agent" / "x" / "eval" / "agent.json").read_text())
    assert scores["all"]["turns"] == 2 * scores["all"]["calls"] > 0
    # the order's number is in the message before
    assert scores["by_distance"]["0-1"]["calls"] == scores["all"]["calls"]
    assert (tmp_path / "agent" / "x" / "eval" / "agent.png").stat().st_size > 1000


def test_the_assistants_turns_are_learned(keys):
    config = load(keys)
    texts = build._batches(config.data).texts(config.data)
    tokenizer = train_tokenizer(texts, 300, AGENT_TOKENS)
    sample = validation_samples(source_of(config.data, tokenizer, "validation"), None)[0]
    learned = tokenizer.decode(sample.ids[sample.learned])
    assert "look_up" in learned and "is on its way." in learned and "Where is" not in learned
    assert learned.count("<|end|>") == 2


def test_epochs_end_the_training_and_its_cosine(keys, tmp_path, capsys):
    epochs = ["trainer.max_epochs=2", "trainer.max_steps=1000", "trainer.limit_val_batches=0"]
    rest = ["data.packing=none", "eval.after_fit=false", "train.warmup_steps=1"]
    train.main([*keys, *epochs, *rest, "checkpoint.every_steps=1", f"run.root={tmp_path}"])
    steps = int(capsys.readouterr().out.split("trained ")[1].split()[0])
    checkpoint = torch.load(tmp_path / "agent/x/checkpoints/last.ckpt", weights_only=True)
    rows = sum(split_of(f"task{k}", 0.4) == "train" for k in range(12))
    assert steps == checkpoint["global_step"] == 2 * -(-rows // 2)
    assert not any(checkpoint["lr_schedulers"][0]["_last_lr"])
