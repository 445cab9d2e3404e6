"""Evaluation: what the model answers, what is counted, what is written; and eval.py's arguments."""

from __future__ import annotations

import csv
import importlib.util
import json
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

from comet_pl import CometConfig, CometForCausalLM, build
from comet_pl.chat.conversation import encode
from comet_pl.config.load import Config, load
from comet_pl.config.schema import EvalConfig
from comet_pl.errors import UserError
from comet_pl.evaluation import evaluate, passkey
from comet_pl.evaluation import scrolls as scrolls_evaluation
from comet_pl.evaluation.generation import answer_prompts, generate
from comet_pl.experiment.checkpoint import checkpoint_content
from comet_pl.metrics.scrolls import SCROLLS, scores
from data.batches import pad_rows, train_tokenizer
from data.passkey import DIGITS
from data.scrolls import Example, options
from tests.support.models import VOCABULARY, backbone, text, tiny
from tests.support.tiny_runs import ROOT, TINY

PASSKEY = [
    *TINY,
    "conf=passkey",
    "backbone.vocab_size=400",
    "data.train_length=64",
    "data.length_schedule=null",
]
PASSKEY += ["eval.lengths=[200,64]", "eval.depths=3", "eval.examples=2"]


class Ids:
    """A tokenizer of which only the special ids are asked."""

    eos_token_id, pad_token_id = 0, 1


def made(argv: list[str]) -> tuple[Any, Any, Config]:
    config = load(argv)
    tokenizer = build.build_tokenizer(config)
    torch.manual_seed(0)
    return build.build_model(config, tokenizer), tokenizer, config


def greedy(model, prompt: torch.Tensor, count: int, ends: int) -> list[int]:
    """One row, by a whole forward pass for each token."""
    found: list[int] = []
    ids = prompt[None]
    while len(found) < count and ends not in found:
        logits = model(ids).logits[0, -1].clone()
        logits[model.config.new_token_ids] = -torch.inf
        found.append(int(logits.argmax()))
        ids = torch.cat([ids, torch.tensor([[found[-1]]])], 1)
    return found


@pytest.mark.parametrize("columns", [1, 4, 5, 6, 31, 79, 80, 81, 163])
def test_digits_equal_whole_forward_passes(columns: int):
    """Shorter than a chunk, at its end, over it, and over one call of 16 chunks."""
    model = tiny()
    prompts = text(3, columns, seed=columns)
    read = []
    with torch.no_grad():
        given = passkey.answer_digits(model, Ids(), prompts, read.append)
        for row, prompt in zip(given.tolist(), prompts, strict=True):
            wanted = greedy(model, prompt, DIGITS, Ids.eos_token_id)
            assert row == wanted + [Ids.pad_token_id] * (DIGITS - len(wanted))
    assert sum(read) == 3 * (columns + 6)


def test_digits_without_rollover():
    """The document's chunks close all the same; only the chunk of the question grows."""
    closed, grown = tiny(), tiny(rollover=False)
    prompts = text(2, 41, seed=1)
    with torch.no_grad():
        cache = closed(prompts[:, :40], chunk_sizes=[5] * 8, use_cache=True).past_key_values
        wanted = (
            closed(prompts[:, 40:], past_key_values=cache).logits[:, -1, :VOCABULARY].argmax(-1)
        )
        assert torch.equal(passkey.answer_digits(grown, Ids(), prompts)[:, 0], wanted)


def test_an_early_stop_is_a_wrong_answer(monkeypatch: pytest.MonkeyPatch):
    model = tiny()
    monkeypatch.setattr(
        passkey, "generate", lambda *args, **more: torch.full((2, 2), Ids.eos_token_id)
    )
    with torch.no_grad():
        assert passkey.answer_digits(model, Ids(), text(2, 7)).tolist() == [[0, 0, 1, 1, 1]] * 2


def knows(answers: Callable[[str], bool]) -> Callable[..., torch.Tensor]:
    """A model's stand-in that finds the key in those prompts of which `answers` is true."""

    def answer_digits(model, tokenizer, prompt: torch.Tensor, count=None) -> torch.Tensor:
        rows = []
        for ids in prompt:
            shown = tokenizer.decode(ids)
            key = shown.split("The pass key is ")[1][:DIGITS] if answers(shown) else "00000"
            rows.append(tokenizer.convert_tokens_to_ids(list(key)))
        return torch.tensor(rows)

    return answer_digits


def test_passkey_results(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    model, tokenizer, config = made(PASSKEY)
    monkeypatch.setattr(
        passkey, "answer_digits", knows(lambda shown: not shown.startswith(" The pass key"))
    )
    model.train()
    results = evaluate(model, tokenizer, config, tmp_path)
    assert model.training, "as it was"
    assert results == json.loads((tmp_path / "eval" / "passkey.json").read_text())
    cell = {"accuracy": 1.0, "n": 2}
    expected = [
        {"length": length, "depth": depth, **cell, "accuracy": float(depth > 0)}
        for length in (64, 200)
        for depth in (0.0, 0.5, 1.0)
    ]
    mean = {"64": pytest.approx(2 / 3), "200": pytest.approx(2 / 3)}
    assert results == {
        "train_length": 64,
        "cells": expected,
        "mean": mean,
        "weights": passkey._made_with(model, config),
    }
    assert (tmp_path / "eval" / "passkey.png").read_bytes().startswith(b"\x89PNG")
    predictions = json.loads((tmp_path / "predictions" / "passkey.json").read_text())
    lines = [
        json.loads(line)
        for line in (tmp_path / "predictions" / "passkey.jsonl").read_text().splitlines()
    ]
    assert len(lines) == 12 and predictions == {line["id"]: line["prediction"] for line in lines}
    assert all(
        line["score"]
        == float(line["prediction"] == line["references"][0])
        == float(line["depth"] > 0)
        for line in lines
    )
    assert all(
        line["references"][0].isdigit() and len(line["references"][0]) == DIGITS for line in lines
    )
    assert all(line["prompt_end"].endswith("The pass key is ") for line in lines)
    shown = capsys.readouterr().out
    assert "200" in shown and "66.7%" in shown and str(tmp_path) in shown.replace("\n", "")
    assert not list(tmp_path.rglob("*.part"))


def test_passkey_in_several_batches_is_the_same(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    model, tokenizer, config = made(PASSKEY)
    whole = evaluate(model, tokenizer, config, tmp_path / "one")
    monkeypatch.setattr(passkey, "WIDEST", 4 * config.model.chunk_size)
    monkeypatch.setattr(passkey, "MOST_TOKENS", 400)
    assert evaluate(model, tokenizer, config, tmp_path / "two") == whole
    for name in ("passkey.json", "passkey.jsonl"):
        assert (tmp_path / "one" / "predictions" / name).read_text() == (
            tmp_path / "two" / "predictions" / name
        ).read_text()


def test_default_lengths_and_a_haystack_that_starts_over(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    book = tmp_path / "book.txt"
    book.write_text("It was a long day on the sea.\n" * 60)
    model, tokenizer, config = made(
        [*PASSKEY, f"data.haystack={book}", "eval.lengths=null", "eval.depths=1", "eval.examples=1"]
    )
    monkeypatch.setattr(passkey, "answer_digits", knows(lambda shown: True))
    results = evaluate(model, tokenizer, config, tmp_path)
    assert results["mean"] == {"64": 1.0, "256": 1.0, "1024": 1.0, "2048": 1.0}
    assert " has 600 tokens: at 1k, 2k it is read more than once" in capsys.readouterr().out


def test_too_short_a_length_is_refused(tmp_path: Path):
    model, tokenizer, config = made([*PASSKEY, "eval.lengths=[64,10]"])
    with pytest.raises(UserError, match=r"^eval.lengths: 10 given, allowed: >= \d+ tokens"):
        evaluate(model, tokenizer, config, tmp_path)
    assert not (tmp_path / "eval").exists()


# -- SCROLLS ----------------------------------------------------------------------------------------------------------------------------


def scrolls_root(folder: Path) -> Path:
    story = "The dog ran home and slept all day . " * 6
    answers = {
        "narrative_qa": ["the dog", "a cat", "home"],
        "contract_nli": ["Entailment", "Contradiction", "Not mentioned"],
    }
    for task, outputs in answers.items():
        rows = [
            {
                "id": str(n),
                "pid": f"{n}_0",
                "input": f"Who ran {'far ' * n}?\n\n{story * n}",
                "output": one,
            }
            for n, one in enumerate(outputs)
        ]
        rows.append({**rows[0], "pid": "0_1", "output": "dog"})
        for split in ("train", "validation"):
            path = folder / task / f"{split}.jsonl"
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


def scrolls(root: Path, *more: str) -> list[str]:
    return [
        *TINY,
        "conf=scrolls",
        f"data.root={root}",
        "eval.max_new_tokens=6",
        "eval.examples=null",
        *more,
    ]


def test_scrolls_results_agree_with_the_predictions(tmp_path: Path):
    model, tokenizer, config = made(scrolls(scrolls_root(tmp_path / "data"), "eval.batch_size=2"))
    results = evaluate(model, tokenizer, config, tmp_path)
    assert results == json.loads((tmp_path / "eval" / "scrolls.json").read_text())
    for task in ("narrative_qa", "contract_nli"):
        texts = json.loads((tmp_path / "predictions" / f"{task}.json").read_text())
        lines = [
            json.loads(line)
            for line in (tmp_path / "predictions" / f"{task}.jsonl").read_text().splitlines()
        ]
        assert texts == {line["id"]: line["prediction"] for line in lines}
        assert {line["id"]: len(line["references"]) for line in lines} == {"0": 2, "1": 1, "2": 1}
        assert [line["question"] for line in lines] == [
            "Who ran ?",
            "Who ran far ?",
            "Who ran far far ?",
        ]  # it stands before the document
        assert all(line["prompt_end"].endswith("<|assistant|>") for line in lines)
        assert all(
            line["score"] == scores(task, line["prediction"], line["references"])["scrolls_score"]
            for line in lines
        )
        assert results[task]["scrolls_score"] == pytest.approx(
            sum(line["score"] for line in lines) / 3
        )
        assert results[task]["n"] == 3
    assert results["average"] == pytest.approx(
        (results["narrative_qa"]["scrolls_score"] + results["contract_nli"]["scrolls_score"]) / 2
    )


def test_secret_answers_are_predicted_for_the_submission(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    """Test rows without outputs: one task scores as its answers are known; all seven are submitted."""
    root = scrolls_root(tmp_path / "data")
    for task in SCROLLS:
        rows = [
            {
                "id": f"{task}-{n}",
                "pid": f"{n}",
                "input": f"Who ran?\n\nThe dog ran {n} times.",
                "output": None,
            }
            for n in range(2)
        ]
        if task == "qasper":
            rows = [row | {"output": "the dog"} for row in rows]
        (root / task).mkdir(exist_ok=True)
        (root / task / "test.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    model, tokenizer, config = made(
        scrolls(root, "eval.split=test", "data.tasks=[qasper,narrative_qa]")
    )
    results = evaluate(model, tokenizer, config, tmp_path)
    assert set(results) == {"qasper", "average"}
    assert (
        "no submission written: it needs all seven tasks, and there are no predictions for gov_report"
        in capsys.readouterr().out
    )
    assert not (tmp_path / "predictions" / "submission.csv").exists()
    model, tokenizer, config = made(scrolls(root, "eval.split=test"))
    assert evaluate(model, tokenizer, config, tmp_path)["qasper"]["n"] == 2
    lines = list(
        csv.DictReader(
            (tmp_path / "predictions" / "submission.csv").open(newline="", encoding="utf-8")
        )
    )
    assert [(line["Task"], line["ID"]) for line in lines] == [
        (task, f"{task}-{n}") for task in SCROLLS for n in range(2)
    ]
    given = json.loads((tmp_path / "predictions" / "quality.json").read_text())
    assert [line["Prediction"] for line in lines if line["Task"] == "quality"] == list(
        given.values()
    )


def test_right_answers_score_100(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    model, tokenizer, config = made(scrolls(scrolls_root(tmp_path / "data"), "eval.examples=2"))
    corpus = scrolls_evaluation.Corpus(config.data, tokenizer, "validation")
    right = iter(
        [
            [one.references[-1] for one in corpus.questions(task, 2)]
            for task in scrolls_evaluation.tasks(config.data)
        ]
    )
    monkeypatch.setattr(scrolls_evaluation, "answer_prompts", lambda *args: next(right))
    monkeypatch.setattr(
        scrolls_evaluation,
        "choose",
        lambda model, tokenizer, prompt, asked, *_: (asked.references[-1], "Entailment"),
    )
    results = evaluate(model, tokenizer, config, tmp_path)
    assert (
        results["average"]
        == results["narrative_qa"]["f1"]
        == results["contract_nli"]["exact_match"]
        == 100
    )
    assert results["narrative_qa"]["n"] == 2


@pytest.mark.parametrize("priming", [None, 4, 9, 100])
def test_primed_prompts_leave_their_last_chunk_open(priming):
    """Prompts of unequal lengths, against each alone with its chunks listed."""
    model, rows = tiny(), [text(1, columns, seed=columns)[0].numpy() for columns in (3, 17, 9, 30)]

    class Numbers(Ids):
        @staticmethod
        def decode(ids, skip_special_tokens=True):
            return str([int(i) for i in ids if i != Ids.eos_token_id and i != Ids.pad_token_id])

    settings = EvalConfig(batch_size=3, priming=priming)
    with torch.no_grad():
        given = answer_prompts(model, Numbers(), rows, settings, 8)
        for row, found in zip(rows, given, strict=True):
            ids, cache, first = (
                torch.from_numpy(row)[None],
                None,
                max(0, len(row) - (priming or len(row))),
            )
            if first:
                sizes = [5] * (first // 5) + [first % 5] * (first % 5 > 0)
                cache = model(ids[:, :first], chunk_sizes=sizes, use_cache=True).past_key_values
            more = {"past_key_values": cache} if cache else {}
            alone = generate(model, Numbers(), ids, torch.ones_like(ids), 8, **more)
            assert found == Numbers.decode(alone[0])


def test_the_likeliest_option_is_that_of_whole_readings():
    """One reading and forks, against a forward pass over each whole text; and the greedy answer is generate's."""
    tokenizer = train_tokenizer(
        ["Entailment Contradiction Not mentioned yes or no in the text " * 9], 300
    )
    decoder = backbone()
    decoder.vocab_size = len(tokenizer)
    torch.manual_seed(0)
    model = (
        CometForCausalLM(
            CometConfig(
                decoder, chunk_size=5, global_size=2, compression_stride=3, temporary_capacity=4
            )
        )
        .double()
        .eval()
    )
    for seed in range(4):
        prompt = torch.randint(
            4, len(tokenizer), (17 + seed,), generator=torch.Generator().manual_seed(seed)
        ).numpy()
        asked = Example("contract_nli", "x", 0, prompt, prompt, [], options("contract_nli", ""))
        with torch.no_grad():
            text, option = scrolls_evaluation.choose(
                model, tokenizer, prompt, asked, 9, lambda tokens: None
            )
            losses = []
            for one in asked.options:
                ending = [*encode(tokenizer, one), tokenizer.eos_token_id]
                ids = torch.tensor([[*prompt, *ending]])
                logits = model(ids, use_cache=False).logits[0].log_softmax(-1)
                losses.append(
                    -sum(
                        float(logits[len(prompt) - 1 + k, token]) for k, token in enumerate(ending)
                    )
                )
            ids = torch.from_numpy(prompt)[None]
            said = generate(model, tokenizer, ids, torch.ones_like(ids), 9)
        assert option == asked.options[losses.index(min(losses))]
        assert text == tokenizer.decode(said[0], skip_special_tokens=True).strip()
    question = "Why?\n\n (A) Because (it) is.\n (B) No reason\n (C) He said so\n (D) None"
    assert options("quality", question) == ["Because (it) is.", "No reason", "He said so", "None"]
    assert options("qmsum", question) == []


def test_batches_of_unequal_prompts_answer_as_alone():
    model = tiny()
    rows = [text(1, columns, seed=columns)[0].numpy() for columns in (3, 17, 9)]
    batch = pad_rows([(row, row) for row in rows], Ids.pad_token_id, left=True)
    with torch.no_grad():
        given = generate(model, Ids(), batch["input_ids"], batch["attention_mask"], 8)
        for row, prompt in zip(given.tolist(), rows, strict=True):
            wanted = greedy(model, torch.from_numpy(prompt), 8, Ids.eos_token_id)
            assert row[: len(wanted)] == wanted


def test_nothing_to_evaluate(tmp_path: Path):
    root = scrolls_root(tmp_path / "data")
    model, tokenizer, config = made(scrolls(root))
    for path in root.rglob("validation.jsonl"):
        path.unlink()
    with pytest.raises(
        UserError,
        match=r"^data.root: .* has no validation rows for narrative_qa, contract_nli, so there is nothing",
    ):
        evaluate(model, tokenizer, config, tmp_path)


# -- eval.py ----------------------------------------------------------------------------------------------------------------------------


@pytest.fixture
def script() -> ModuleType:
    spec = importlib.util.spec_from_file_location("eval_script", ROOT / "eval.py")
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """A run's folder with both checkpoints; the weights in them differ."""
    model, tokenizer, config = made(PASSKEY)
    folder = tmp_path / "runs" / "x"
    (folder / "checkpoints").mkdir(parents=True)
    for name in ("best", "last"):
        weights = {f"model.{key}": tensor for key, tensor in model.state_dict().items()}
        torch.save(
            {"comet": checkpoint_content(config, tokenizer, model), "state_dict": weights},
            folder / "checkpoints" / f"{name}.ckpt",
        )
    return folder


def test_which_checkpoint(script: ModuleType, run: Path):
    best, last = run / "checkpoints" / "best.ckpt", run / "checkpoints" / "last.ckpt"
    assert script.find_checkpoint(run) == (last, run)
    assert script.find_checkpoint(run / "checkpoints") == (last, run)
    assert script.find_checkpoint(best) == (best, run)
    last.unlink()
    assert script.find_checkpoint(run) == (best, run)
    best.unlink()
    with pytest.raises(
        UserError,
        match=r"^ckpt: .*/x holds neither checkpoints/last.ckpt, checkpoints/best.ckpt nor",
    ):
        script.find_checkpoint(run)
    (run / "config.json").write_text("{}")
    assert script.find_checkpoint(run) == (run, run)
    with pytest.raises(UserError, match=r"^ckpt: .*/none does not exist$"):
        script.find_checkpoint(run / "none")


def test_eval_writes_into_the_run_or_out(script: ModuleType, run: Path, tmp_path: Path):
    script.main([f"ckpt={run}", "eval.lengths=[64]", "eval.examples=1"])
    assert json.loads((run / "eval" / "passkey.json").read_text())["mean"].keys() == {"64"}
    script.main(
        [
            f"ckpt={run / 'checkpoints' / 'last.ckpt'}",
            f"out={tmp_path / 'else'}",
            "eval.lengths=[80]",
        ]
    )
    assert json.loads((tmp_path / "else" / "eval" / "passkey.json").read_text())["mean"].keys() == {
        "80"
    }
    assert json.loads((run / "eval" / "passkey.json").read_text())["mean"].keys() == {"64"}


def test_another_length_joins_what_the_same_weights_have_shown(script: ModuleType, run: Path):
    for length in (64, 80, 64):
        script.main([f"ckpt={run}", f"eval.lengths=[{length}]", "eval.examples=1"])
    results = json.loads((run / "eval" / "passkey.json").read_text())
    lines = [
        json.loads(line)
        for line in (run / "predictions" / "passkey.jsonl").read_text().splitlines()
    ]
    assert results["mean"].keys() == {"64", "80"} and len(results["cells"]) == len(lines) == 6
    checkpoint = torch.load(run / "checkpoints" / "last.ckpt", weights_only=True)
    checkpoint["state_dict"]["model.model.norm.weight"] += 1
    torch.save(checkpoint, run / "checkpoints" / "last.ckpt")
    script.main([f"ckpt={run}", "eval.lengths=[80]", "eval.examples=1"])
    assert json.loads((run / "eval" / "passkey.json").read_text())["mean"].keys() == {"80"}, (
        "other weights start afresh"
    )


def test_a_conf_of_another_model_is_named(script: ModuleType, run: Path, tmp_path: Path):
    root = scrolls_root(tmp_path / "data")
    message = r"^conf=scrolls: is for another model than this checkpoint's, which was trained with conf=passkey \(.*global_size.*\); "
    with pytest.raises(
        UserError, match=message + r"leave conf out and give data\.kind=scrolls and its keys$"
    ):
        script.main([f"ckpt={run}", "conf=scrolls", f"data.root={root}"])
    script.main(
        [
            f"ckpt={run}",
            "data.kind=scrolls",
            f"data.root={root}",
            "eval.examples=1",
            "eval.max_new_tokens=2",
        ]
    )
    assert json.loads((run / "eval" / "scrolls.json").read_text())["contract_nli"]["n"] == 1, (
        "as it says"
    )


def test_eval_refuses_what_it_cannot_use(script: ModuleType, run: Path, tmp_path: Path):
    checkpoint = run / "checkpoints" / "last.ckpt"
    with pytest.raises(UserError, match=r"^ckpt: missing"):
        script.main([])
    with pytest.raises(UserError, match=r"^eval.length: no such key.*did you mean eval.lengths"):
        script.main([f"ckpt={run}", "eval.length=[64]"])
    checkpoint.write_bytes(checkpoint.read_bytes()[:2000])
    with pytest.raises(UserError, match=r"last.ckpt: not a readable checkpoint"):
        script.main([f"ckpt={run}"])
    torch.save({"state_dict": {}}, checkpoint)
    with pytest.raises(
        UserError, match=r"last.ckpt: a checkpoint, but not one that train.py wrote"
    ):
        script.main([f"ckpt={run}"])
    assert not (run / "eval").exists()
