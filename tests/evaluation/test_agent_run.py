"""The agent conf: training samples, turn-by-turn reading with a carried memory, and a run from train.py to its table."""

from __future__ import annotations

import json
import re

import numpy as np
import pytest
import torch

from comet_pl import build
from comet_pl.config.load import load
from comet_pl.evaluation.agent import act
from comet_pl.metrics.scrolls import f1
from data.agent_traces import source_of, split_of, validation_samples
from data.batches import AGENT_TOKENS, train_tokenizer
from data.text.tokenized import Sample
from tests.support.models import tiny
from tests.support.tiny_data import write_traces


def trace(tokens=60):
    """A sample with three assistant turns, tokens at random."""
    ids = (
        torch.randint(4, 40, (tokens,), generator=torch.Generator().manual_seed(3))
        .numpy()
        .astype(np.int32)
    )
    turns = [["user", 0, 1, 11, None], ["assistant", 11, 13, 20, None], ["tool", 20, 22, 37, None], ["assistant", 37, 38, 45, 1],
             ["user", 45, 46, 50, None], ["assistant", 50, 52, 60, 3]]  # fmt: skip
    return Sample(ids, np.zeros(tokens, dtype=bool), {"id": "x", "turns": turns})


class Words:
    eos_token_id = pad_token_id = 3

    @staticmethod
    def decode(ids, skip_special_tokens=True):
        return " ".join(str(int(i)) for i in ids)


@pytest.mark.parametrize("comet", [{}, {"chunk_size": 4}, {"global_size": 0}])
def test_turn_by_turn_is_the_whole_text(comet):
    """The loss of each turn is that of one pass over everything; what would be said there is what generate says after everything so far."""
    model, one = tiny(**comet), trace()
    with torch.no_grad():
        found = list(act(model, Words(), one, max_new_tokens=9))
        ids = torch.from_numpy(one.ids.astype(np.int64))[None]
        logits = model(ids).logits[0].log_softmax(-1)
    assert [answer["turn"] for answer in found] == [1, 2, 3]
    assert [answer["distance"] for answer in found] == [None, 1, 3]
    for answer, (_, _, content, end, _) in zip(
        found, [turn for turn in one.notes["turns"] if turn[0] == "assistant"], strict=True
    ):
        loss = -sum(logits[k - 1, ids[0, k]] for k in range(content, end))
        assert answer["loss"] == pytest.approx(float(loss), rel=1e-6)
        assert answer["tokens"] == end - content
        said = model.generate(
            ids[:, :content], max_new_tokens=9, do_sample=False, eos_token_id=3, pad_token_id=3
        )[0, content:]
        assert answer["prediction"] == Words.decode(said)
        assert answer["references"] == [Words.decode(ids[0, content:end])]
        assert answer["prompt_end"] == Words.decode(ids[0, :content])
        assert answer["score"] == f1(
            answer["prediction"], answer["references"][0]
        )  # no turn calls a tool


def test_a_run_trains_validates_and_scores_next_actions(tmp_path, monkeypatch, capsys):
    import train

    small = [
        "hidden_size=32",
        "head_dim=16",
        "num_attention_heads=2",
        "num_key_value_heads=2",
        "intermediate_size=48",
        "vocab_size=300",
    ]
    keys = [f"backbone.{key}" for key in small] + [
        "model.chunk_size=16",
        "model.global_size=2",
        "model.temporary_capacity=8",
    ]
    keys += [
        f"data.root={write_traces(tmp_path / 'traces')}",
        f"data.cache={tmp_path / 'cache'}",
        "data.val_share=0.4",
        "data.max_length=512",
    ]
    keys += [
        "trainer.max_steps=3",
        "trainer.val_check_interval=2",
        "data.batch_size=2",
        "eval.max_new_tokens=4",
        f"run.root={tmp_path}",
    ]
    train.main(["conf=agent", "run.name=x", "data.min_reward=0.5", *keys])
    out = capsys.readouterr().out
    assert "traces left out: reward below 0.5" in out and "turn distance" in out
    assert re.search(
        r"train: \d+ texts packed into \d+ rows of 512 tokens, \d+\.\d% of them padding", out
    )
    found = json.loads((tmp_path / "agent" / "x" / "eval" / "agent.json").read_text())
    assert found["all"]["turns"] == 2 * found["all"]["calls"] > 0
    assert (
        found["by_distance"]["0-1"]["calls"] == found["all"]["calls"]
    )  # the number stands in the message before
    assert (tmp_path / "agent" / "x" / "eval" / "agent.png").stat().st_size > 1000
    config = load(["conf=agent", *keys])
    tokenizer = train_tokenizer(
        build._data_module(config.data).texts(config.data), 300, AGENT_TOKENS
    )
    samples = validation_samples(source_of(config.data, tokenizer, "validation", 0), None)
    learned = tokenizer.decode(samples[0].ids[samples[0].learned])
    assert (
        "look_up" in learned
        and "is on its way." in learned
        and "Where is" not in learned
        and learned.count("<|end|>") == 2
    )


def test_epochs_end_the_training_and_its_cosine(tmp_path, capsys):
    import train

    keys = [
        f"data.root={write_traces(tmp_path / 'traces')}",
        f"data.cache={tmp_path / 'cache'}",
        "data.val_share=0.4",
        "data.max_length=512",
    ]
    keys += [
        "backbone.hidden_size=32",
        "backbone.head_dim=16",
        "backbone.num_attention_heads=2",
        "backbone.num_key_value_heads=2",
    ]
    keys += [
        "backbone.intermediate_size=48",
        "backbone.vocab_size=300",
        "data.packing=none",
        "data.batch_size=2",
        "eval.after_fit=false",
    ]
    keys += [
        "trainer.max_epochs=2",
        "trainer.max_steps=1000",
        "trainer.limit_val_batches=0",
        "train.warmup_steps=1",
        f"run.root={tmp_path}",
    ]
    train.main(["conf=agent", "run.name=x", "checkpoint.every_steps=1", *keys])
    steps = int(capsys.readouterr().out.split("trained ")[1].split()[0])
    checkpoint = torch.load(
        tmp_path / "agent" / "x" / "checkpoints" / "last.ckpt", weights_only=True
    )
    rows = sum(1 for k in range(12) if split_of(f"task{k}", 0.4) == "train")
    assert steps == checkpoint["global_step"] == 2 * -(-rows // 2)
    assert checkpoint["lr_schedulers"][0]["_last_lr"] == [0.0] * len(
        checkpoint["lr_schedulers"][0]["_last_lr"]
    )


def test_the_memory_is_carried_from_turn_to_turn():
    """Reading a trace feeds each token once."""
    model, one = tiny(), trace()
    fed = []
    model.register_forward_pre_hook(
        lambda _, args, kwargs: fed.append(
            args[0].shape[1] if args else kwargs["input_ids"].shape[1]
        ),
        with_kwargs=True,
    )
    with torch.no_grad():
        turns = list(act(model, Words(), one, max_new_tokens=1))
    generated = sum(1 for _ in turns)  # a prompt of one token each: the last before the turn
    assert sum(fed) == len(one.ids) + generated
