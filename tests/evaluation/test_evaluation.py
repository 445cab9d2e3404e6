"""Evaluation: what the model answers, what is counted, what is written; and eval.py's arguments."""

import copy
import csv
import json
import shutil

import pytest
import torch

import eval as eval_script
from comet_pl import CometConfig, CometForCausalLM
from comet_pl.config.load import load
from comet_pl.config.schema import EvalConfig
from comet_pl.errors import UserError
from comet_pl.evaluation import evaluate, passkey
from comet_pl.evaluation.generation import Engine
from comet_pl.evaluation.scrolls import choose
from comet_pl.experiment.checkpoint import checkpoint_content
from comet_pl.metrics.scrolls import scores
from data.batches import pad_rows
from data.chat_template import encode
from data.passkey import DIGITS
from data.scrolls import Example
from data.scrolls_rows import SCROLLS, options
from data.tokenizer import train_tokenizer
from tests.support.evaluation import PASSKEY, built, greedy, lines_of, passkeys
from tests.support.models import VOCABULARY, backbone, text, tiny
from tests.support.tiny_runs import TINY, scalars


class Ids:
    """A tokenizer of which only the special ids are asked."""

    eos_token_id, pad_token_id = 0, 1


@pytest.mark.parametrize("columns", [1, 4, 5, 6, 14, 15, 16, 33])
def test_digits_equal_whole_forward_passes(columns, monkeypatch):
    """Shorter than a chunk, at its end, over it, and over one call of 3 chunks."""
    monkeypatch.setattr(passkey, "PREFILL", 3)
    model = tiny()
    prompts = text(3, columns, seed=columns)
    counts = []
    with torch.no_grad():
        digits = passkey.answer_digits(Engine(model, Ids()), prompts, counts.append)
        expected = greedy(model, prompts, DIGITS, Ids.eos_token_id)
    padded = [row + [Ids.pad_token_id] * (DIGITS - len(row)) for row in expected]
    assert digits.tolist() == padded
    assert sum(counts) == 3 * (columns + 6)


def test_digits_without_rollover():
    """The document's chunks close all the same; only the chunk of the question grows."""
    closed, grown = tiny(), Engine(tiny(rollover=False), Ids())
    prompts = text(2, 41, seed=1)
    with torch.no_grad():
        cache = closed(prompts[:, :40], chunk_sizes=[5] * 8, use_cache=True).past_key_values
        logits = closed(prompts[:, 40:], past_key_values=cache).logits[:, -1, :VOCABULARY]
        assert torch.equal(passkey.answer_digits(grown, prompts)[:, 0], logits.argmax(-1))


def test_an_early_stop_is_a_wrong_answer(monkeypatch):
    ends = torch.full((2, 2), Ids.eos_token_id)
    monkeypatch.setattr(Engine, "generate", lambda *args, **options: ends)
    with torch.no_grad():
        digits = passkey.answer_digits(Engine(tiny(), Ids()), text(2, 7))
    assert digits.tolist() == [[0, 0, 1, 1, 1]] * 2


def knows(answers):
    """A stand-in that finds the key in those prompts of which `answers` is true."""

    def answer_digits(engine, prompt, count=None):
        rows = []
        for ids in prompt:
            shown = engine.tokenizer.decode(ids)
            key = shown.split("The pass key is ")[1][:DIGITS] if answers(shown) else "00000"
            rows.append(engine.tokenizer.convert_tokens_to_ids(list(key)))
        return torch.tensor(rows)

    return answer_digits


def test_passkey_results(tmp_path, monkeypatch, capsys):
    model, tokenizer, config = passkeys()
    right = knows(lambda shown: not shown.startswith(" The pass key"))
    monkeypatch.setattr(passkey, "answer_digits", right)
    model.train()
    results = evaluate(model, tokenizer, config, tmp_path, 7)
    assert model.training, "as it was"
    curves, pictures = scalars(tmp_path / "eval")
    assert curves == {f"eval/passkey/{length}": [(7, pytest.approx(2 / 3))] for length in (64, 200)}
    assert pictures == {"eval/passkey": [7]}
    assert results == json.loads((tmp_path / "eval" / "passkey.json").read_text())
    cells = [
        {"length": length, "depth": depth, "accuracy": float(depth > 0), "n": 2}
        for length in (64, 200)
        for depth in (0.0, 0.5, 1.0)
    ]
    mean = {"64": pytest.approx(2 / 3), "200": pytest.approx(2 / 3)}
    facts = {"train_length": 64, "weights": passkey._made_with(model, config)}
    assert results == {"cells": cells, "mean": mean, **facts}
    assert (tmp_path / "eval" / "passkey.png").read_bytes().startswith(b"\x89PNG")
    predictions = json.loads((tmp_path / "predictions" / "passkey.json").read_text())
    lines = lines_of(tmp_path / "predictions" / "passkey.jsonl")
    assert len(lines) == 12 and predictions == {line["id"]: line["prediction"] for line in lines}
    for line in lines:
        (key,) = line["references"]
        assert line["score"] == float(line["prediction"] == key) == float(line["depth"] > 0)
        assert key.isdigit() and len(key) == DIGITS
        assert line["prompt_end"].endswith("The pass key is ")
    shown = capsys.readouterr().out
    assert "200" in shown and "66.7%" in shown and str(tmp_path) in shown.replace("\n", "")
    assert not list(tmp_path.rglob("*.part"))


def test_passkey_in_several_batches_is_the_same(undrawn, tmp_path, monkeypatch):
    model, tokenizer, config = passkeys()
    whole = evaluate(model, tokenizer, config, tmp_path / "one")
    monkeypatch.setattr(passkey, "WIDEST", 4 * config.model.chunk_size)
    monkeypatch.setattr(passkey, "MOST_TOKENS", 400)
    assert evaluate(model, tokenizer, config, tmp_path / "two") == whole
    for name in ("passkey.json", "passkey.jsonl"):
        one, two = (tmp_path / folder / "predictions" / name for folder in ("one", "two"))
        assert one.read_text() == two.read_text()


def test_default_lengths_and_a_haystack_that_starts_over(undrawn, tmp_path, monkeypatch, capsys):
    book = tmp_path / "book.txt"
    book.write_text("It was a long day on the sea.\n" * 60)
    keys = ["eval.lengths=null", "eval.depths=1", "eval.examples=1", f"data.haystack={book}"]
    monkeypatch.setattr(passkey, "answer_digits", knows(lambda shown: True))
    results = evaluate(*built(*PASSKEY, keys[-1]), load([*PASSKEY, *keys]), tmp_path)
    assert results["mean"] == {"64": 1.0, "256": 1.0, "1024": 1.0, "2048": 1.0}
    assert " has 600 tokens: at 1k, 2k it is read more than once" in capsys.readouterr().out


def test_too_short_a_length_is_refused(tmp_path):
    with pytest.raises(UserError, match=r"^eval.lengths: 10 given, allowed: >= \d+ tokens"):
        evaluate(*passkeys("eval.lengths=[64,10]"), tmp_path)
    assert not (tmp_path / "eval").exists()


# -- SCROLLS


@pytest.fixture
def root(tmp_path):
    story = "The dog ran home and slept all day . " * 6
    answers = {
        "narrative_qa": ["the dog", "a cat", "home"],
        "contract_nli": ["Entailment", "Contradiction", "Not mentioned"],
    }
    for task, outputs in answers.items():
        rows = [
            {"id": str(n), "pid": f"{n}_0", "output": output}
            | {"input": f"Who ran {'far ' * n}?\n\n{story * n}"}
            for n, output in enumerate(outputs)
        ]
        rows.append({**rows[0], "pid": "0_1", "output": "dog"})
        folder = tmp_path / "data" / task
        folder.mkdir(parents=True)
        for split in ("train", "validation"):
            lines = "".join(json.dumps(row) + "\n" for row in rows)
            (folder / f"{split}.jsonl").write_text(lines)
    return tmp_path / "data"


def scrolls(root, *keys):
    keys = (f"data.root={root}", "eval.max_new_tokens=6", "eval.examples=null", *keys)
    config = load([*TINY, "conf=scrolls", *keys])
    return *built(*PASSKEY), config


def test_scrolls_results_agree_with_the_predictions(root, tmp_path):
    results = evaluate(*scrolls(root, "eval.batch_size=2"), tmp_path)
    assert results == json.loads((tmp_path / "eval" / "scrolls.json").read_text())
    for task in ("narrative_qa", "contract_nli"):
        texts = json.loads((tmp_path / "predictions" / f"{task}.json").read_text())
        lines = lines_of(tmp_path / "predictions" / f"{task}.jsonl")
        assert texts == {line["id"]: line["prediction"] for line in lines}
        assert {line["id"]: len(line["references"]) for line in lines} == {"0": 2, "1": 1, "2": 1}
        # the question precedes the document
        questions = ["Who ran ?", "Who ran far ?", "Who ran far far ?"]
        assert [line["question"] for line in lines] == questions
        for line in lines:
            assert line["prompt_end"].endswith("<|assistant|>")
            score = scores(task, line["prediction"], line["references"])["scrolls_score"]
            assert line["score"] == score
        mean = sum(line["score"] for line in lines) / 3
        assert results[task]["scrolls_score"] == pytest.approx(mean)
        assert results[task]["n"] == 3
    both = results["narrative_qa"]["scrolls_score"] + results["contract_nli"]["scrolls_score"]
    assert results["average"] == pytest.approx(both / 2)


def test_secret_answers_are_predicted_for_the_submission(root, tmp_path, capsys):
    """Test rows without outputs: one task is scored as its answers are known; all are submitted."""
    for task in SCROLLS:
        output = "the dog" if task == "qasper" else None
        rows = [
            {"id": f"{task}-{n}", "pid": f"{n}", "output": output}
            | {"input": f"Who ran?\n\nThe dog ran {n} times."}
            for n in range(2)
        ]
        (root / task).mkdir(exist_ok=True)
        (root / task / "test.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    submission = tmp_path / "predictions" / "submission.csv"
    keys = ["eval.split=test", "data.tasks=[qasper,narrative_qa]"]
    assert set(evaluate(*scrolls(root, *keys), tmp_path)) == {"qasper", "average"}
    missing = "it needs all seven tasks, and there are no predictions for gov_report"
    assert f"no submission written: {missing}" in capsys.readouterr().out
    assert not submission.exists()
    assert evaluate(*scrolls(root, "eval.split=test"), tmp_path)["qasper"]["n"] == 2
    lines = list(csv.DictReader(submission.open(newline="", encoding="utf-8")))
    expected = [(task, f"{task}-{n}") for task in SCROLLS for n in range(2)]
    assert [(line["Task"], line["ID"]) for line in lines] == expected
    texts = json.loads((tmp_path / "predictions" / "quality.json").read_text())
    shown = [line["Prediction"] for line in lines if line["Task"] == "quality"]
    assert shown == list(texts.values())


@pytest.mark.parametrize("priming", [None, 4, 9, 100])
def test_primed_prompts_leave_their_last_chunk_open(priming):
    """Prompts of unequal lengths, against each alone with its chunks listed."""
    model, rows = tiny(), [text(1, columns, seed=columns)[0].numpy() for columns in (3, 17, 9, 30)]

    class Numbers(Ids):
        @staticmethod
        def decode(ids, skip_special_tokens=True):
            return str([int(i) for i in ids if i not in (Ids.eos_token_id, Ids.pad_token_id)])

    engine, settings = Engine(model, Numbers()), EvalConfig(batch_size=3, priming=priming)
    with torch.no_grad():
        answers = engine.answers(rows, settings, 8)
        for row, answer in zip(rows, answers, strict=True):
            ids, cache = torch.from_numpy(row)[None], None
            if closed := max(0, len(row) - (priming or len(row))):
                sizes = [5] * (closed // 5) + [closed % 5] * (closed % 5 > 0)
                cache = model(ids[:, :closed], chunk_sizes=sizes, use_cache=True).past_key_values
            alone = engine.generate(ids, 8, cache=cache)
            assert answer == Numbers.decode(alone[0])


def test_the_likeliest_option_is_that_of_whole_readings():
    """One reading and copies, against a forward pass over each whole text and generate."""
    words = "Entailment Contradiction Not mentioned yes or no in the text "
    tokenizer = train_tokenizer([words * 9], 300)
    memory = {"global_size": 2, "compression_stride": 3, "temporary_capacity": 4}
    decoder = backbone()
    decoder.vocab_size = len(tokenizer)
    torch.manual_seed(0)
    model = CometForCausalLM(CometConfig(decoder, chunk_size=5, **memory)).double().eval()
    engine = Engine(model, tokenizer)
    for seed in range(3):
        draw = torch.Generator().manual_seed(seed)
        ids = torch.randint(4, len(tokenizer), (1, 17 + seed), generator=draw)
        prompt = ids[0].numpy()
        asked = Example("contract_nli", "x", 0, prompt, prompt, [], options("contract_nli", ""))
        with torch.no_grad():
            answer, option = choose(engine, prompt, asked, 9, lambda tokens: None)
            losses = []
            for choice in asked.options:
                ending = [*encode(tokenizer, choice), tokenizer.eos_token_id]
                whole = torch.tensor([[*prompt, *ending]])
                logits = model(whole, use_cache=False).logits[0, ids.shape[1] - 1 : -1]
                losses.append(
                    torch.nn.functional.cross_entropy(logits, torch.tensor(ending), reduction="sum")
                )
            said = engine.generate(ids, 9)
        assert option == asked.options[losses.index(min(losses))]
        assert answer == tokenizer.decode(said[0], skip_special_tokens=True).strip()
    question = "Why?\n\n (A) Because (it) is.\n (B) No reason\n (C) He said so\n (D) None"
    assert options("quality", question) == ["Because (it) is.", "No reason", "He said so", "None"]
    assert options("qmsum", question) == []


def test_batches_of_unequal_prompts_answer_as_alone():
    model = tiny()
    rows = [text(1, columns, seed=columns)[0].numpy() for columns in (3, 17, 9)]
    batch = pad_rows([(row, row) for row in rows], Ids.pad_token_id, left=True)
    with torch.no_grad():
        answers = Engine(model, Ids()).generate(batch["input_ids"], 8, batch["attention_mask"])
        for answer, prompt in zip(answers.tolist(), rows, strict=True):
            (alone,) = greedy(model, torch.from_numpy(prompt)[None], 8, Ids.eos_token_id)
            assert answer[: len(alone)] == alone


def test_nothing_to_evaluate(root, tmp_path):
    parts = scrolls(root)
    for path in root.rglob("validation.jsonl"):
        path.unlink()
    reason = "no validation rows for narrative_qa, contract_nli, so there is nothing"
    with pytest.raises(UserError, match=rf"^data.root: .* has {reason}"):
        evaluate(*parts, tmp_path)


# -- eval.py


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """A run's folder with both checkpoints."""
    model, tokenizer, config = passkeys()
    folder = tmp_path_factory.mktemp("runs") / "x"
    (folder / "checkpoints").mkdir(parents=True)
    weights = {f"model.{key}": tensor for key, tensor in model.state_dict().items()}
    content = {"comet": checkpoint_content(config, tokenizer, model), "state_dict": weights}
    for name in ("best", "last"):
        torch.save(content, folder / "checkpoints" / f"{name}.ckpt")
    return folder


@pytest.fixture
def run(saved, tmp_path):
    return shutil.copytree(saved, tmp_path / "runs" / "x")


def test_eval_writes_into_the_run_or_out(undrawn, run, tmp_path):
    """Another length joins what the same weights have shown; other weights start afresh."""
    last, scores = run / "checkpoints" / "last.ckpt", run / "eval" / "passkey.json"

    def lengths(file):
        return set(json.loads(file.read_text())["mean"])

    def evaluate_at(length, ckpt=run, *keys):
        small = ["eval.examples=1", "eval.depths=2"]
        eval_script.main([f"ckpt={ckpt}", f"eval.lengths=[{length}]", *small, *keys])

    evaluate_at(64)
    assert lengths(scores) == {"64"}
    evaluate_at(80, last, f"out={tmp_path / 'else'}")
    assert lengths(tmp_path / "else" / "eval" / "passkey.json") == {"80"}
    assert lengths(scores) == {"64"}
    for length in (80, 64):
        evaluate_at(length)
        assert lengths(scores) == {"64", "80"}
        assert len(json.loads(scores.read_text())["cells"]) == 4
        assert len(lines_of(run / "predictions" / "passkey.jsonl")) == 4
    checkpoint = torch.load(last, weights_only=True)
    checkpoint["state_dict"]["model.model.norm.weight"] += 1
    torch.save(checkpoint, last)
    evaluate_at(80)
    assert lengths(scores) == {"80"}


def test_a_conf_of_another_model_is_named(run, root):
    message = (
        r"^conf=scrolls: is for another model than this checkpoint's, which was trained with conf="
        r"passkey \(.*global_size.*\); leave conf out and give data\.kind=scrolls and its keys$"
    )
    keys = [f"ckpt={run}", f"data.root={root}"]
    with pytest.raises(UserError, match=message):
        eval_script.main([*keys, "conf=scrolls"])
    keys += ["data.kind=scrolls", "eval.examples=1", "eval.max_new_tokens=2"]
    eval_script.main(keys)
    assert json.loads((run / "eval" / "scrolls.json").read_text())["contract_nli"]["n"] == 1


def test_eval_refuses_what_it_cannot_use(run):
    checkpoint = run / "checkpoints" / "last.ckpt"

    def refuses(message, *argv):
        with pytest.raises(UserError, match=message):
            eval_script.main(list(argv))

    refuses(r"^ckpt: missing")
    typo = r"^eval.length: no such key.*did you mean eval.lengths"
    refuses(typo, f"ckpt={run}", "eval.length=[64]")
    checkpoint.write_bytes(checkpoint.read_bytes()[:2000])
    refuses(r"last.ckpt: not a readable checkpoint", f"ckpt={run}")
    torch.save({"state_dict": {}}, checkpoint)
    refuses(r"last.ckpt: a checkpoint, but not one that train.py wrote", f"ckpt={run}")
    assert not (run / "eval").exists()


# ---- precision


@pytest.mark.parametrize(
    ("precision", "head", "weights", "computes"),
    [
        ("32-true", torch.float32, "float32", ""),
        ("bf16-mixed", torch.bfloat16, "float32", ", computing in bfloat16"),
        ("bf16-true", torch.bfloat16, "bfloat16", ""),
    ],
)
def test_it_computes_in_the_trainings_precision(
    precision, head, weights, computes, undrawn, tmp_path, capsys
):
    """Each chunk of the evaluation, as in the steps of the training."""
    model, tokenizer, config = passkeys(f"trainer.precision={precision}", "eval.lengths=[64]")
    model, seen = copy.deepcopy(model), set()
    model.lm_head.register_forward_hook(lambda module, inputs, output: seen.add(output.dtype))
    evaluate(model, tokenizer, config, tmp_path)
    assert seen == {head}
    assert f"on cpu: {weights} weights{computes}\n" in capsys.readouterr().out
