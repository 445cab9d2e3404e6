"""notebooks/evaluate.ipynb: clean in git, thin, and shows what a run of each kind has."""

import ast
import importlib
import json
import re

import nbformat
import pytest
from nbclient import NotebookClient

from comet_pl.evaluation.results import worst_first
from comet_pl.metrics.scrolls import PAPER
from tests.support.tiny_data import write_events, write_texts, write_traces
from tests.support.tiny_runs import ROOT, TINY
from train import main as train

NOTEBOOK = ROOT / "notebooks" / "evaluate.ipynb"
KEYS = {
    "passkey": [
        "data.train_length=96",
        "data.length_schedule=null",
        "eval.lengths=[96,384]",
        "eval.depths=3",
        "eval.examples=1",
    ],
    "scrolls": [
        "data.max_length=256",
        "eval.after_fit=false",
        "eval.examples=3",
        "eval.max_new_tokens=4",
    ],
    "agent": [
        "data.val_share=0.3",
        "data.max_length=512",
        "data.packing=none",
        "eval.max_new_tokens=4",
        "eval.examples=2",
    ],
    "books": ["data.val_share=0.2", "data.max_length=120"],
    "user_behavior": [
        "backbone.num_key_value_heads=2",
        "data.train_length=1600",
        "data.length_schedule=[[0,200],[3,400]]",
        "data.questions=3",
        "data.val_examples=4",
        "eval.examples=8",
        "eval.budget=1024",
        "eval.batch_size=4",
    ],
}
LIVE = 2  # pictures of one text: gates, memories


@pytest.fixture(scope="module")
def notebook():
    content = nbformat.read(NOTEBOOK, as_version=4)
    nbformat.validate(content)
    return content


def code(notebook):
    return [cell for cell in notebook.cells if cell.cell_type == "code"]


def nodes(notebook, *kinds):
    """Syntax of the code cells, without IPython's % lines."""
    lines = "\n".join(cell.source for cell in code(notebook)).splitlines()
    tree = ast.parse("\n".join(line for line in lines if not line.startswith("%")))
    return [node for node in ast.walk(tree) if isinstance(node, kinds)]


def test_the_committed_notebook_has_no_outputs(notebook):
    for cell in code(notebook):
        assert cell.outputs == [] and cell.execution_count is None, cell.source


def test_the_notebook_defines_nothing(notebook):
    assert not nodes(notebook, ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef, ast.Lambda)


def test_what_the_notebook_imports_exists(notebook):
    for node in nodes(notebook, ast.ImportFrom):
        package = importlib.import_module(node.module)
        for alias in node.names:
            name = f"{node.module}.{alias.name}"
            assert hasattr(package, alias.name) or importlib.import_module(name)


def run_of(kind, root, *keys):
    """The folder of a tiny run of this kind of data."""
    steps = ["trainer.max_steps=6", "trainer.val_check_interval=3", "trainer.log_every_n_steps=1"]
    names = [f"conf={kind}", f"run.root={root}", "run.name=tiny"]
    train([*names, *TINY, *steps, "data.batch_size=4", *KEYS[kind], *keys])
    return root / kind / "tiny"


def outputs_of(notebook, run, monkeypatch, **choices):
    """Executes the notebook on a run: (the text that it shows, number of pictures).

    A cell that fails raises.

    Args:
        choices: values for the names that a user may set in a cell; the document is a short one.
    """
    monkeypatch.setenv("COMET_RUN", str(run))
    notebook = nbformat.from_dict(json.loads(json.dumps(notebook)))
    document = run.parent / "document.txt"
    document.write_text("The house by the sea has a red boat and a lamp.\n" * 20)
    for name, value in {"document": str(document), **choices}.items():
        (cell,) = [c for c in code(notebook) if re.search(rf"^{name} = ", c.source, re.MULTILINE)]
        cell.source += f"\n{name} = {value!r}"
    resources = {"metadata": {"path": str(NOTEBOOK.parent)}}
    NotebookClient(notebook, timeout=600, kernel_name="python3", resources=resources).execute()
    outputs = [output for cell in code(notebook) for output in cell.outputs]
    assert not [output for output in outputs if output.output_type == "error"]
    data = [output.get("data", {}) for output in outputs]
    texts = [output.get("text", "") for output in outputs]
    texts += [content.get("text/plain", "") for content in data]
    return "\n".join(texts), sum("image/png" in content for content in data)


def check_document(text, run):
    """The memory file is as large as is said, and answered each question."""
    size = (run / "document.memory").stat().st_size
    assert re.search(rf"{size:,} bytes on disk, for {48 * 20:,} bytes of text", text)
    assert re.search(r"read +\d[\d,]* tokens", text)
    assert text.count("> ") >= 2 and "unchanged after 2 questions" in text


def monitored(run):
    """Pictures of a run's monitors and of its logged gates."""
    names = {file.name for file in run.glob("monitor/*.png")}
    assert {"gates.png", "memory.png"} <= names
    return len(names) + 1


def shown(text):
    """Without the frames and line ends of tables."""
    return "".join(re.sub(r"[\u2500-\u257f]|\x1b\[\d+m", "", text).split())


@pytest.mark.slow
def test_the_notebook_shows_a_passkey_run(notebook, tmp_path, monkeypatch):
    run = run_of("passkey", tmp_path)
    scores = json.loads((run / "eval" / "passkey.json").read_text())
    text, pictures = outputs_of(notebook, run, monkeypatch, example=5)
    # curves, heat-map
    assert pictures == 2 + monitored(run) + LIVE
    for length, accuracy in scores["mean"].items():
        assert re.search(rf"{int(length):,} .* {accuracy:.1%}", text), length
    assert "96 tokens in chunks of 16" in text
    best = worst_first(run / "predictions" / "passkey.jsonl")[5]
    assert "predictions/passkey.jsonl, example 5 of 6" in text
    assert shown(best["prompt_end"]) in shown(text)
    assert re.search(r"answer .*, right is \d{5}\n", text)
    check_document(text, run)


@pytest.mark.slow
def test_the_notebook_evaluates_and_shows_a_scrolls_run(notebook, tmp_path, monkeypatch):
    answers = {
        "narrative_qa": ["the red boat", "a lamp"],
        "contract_nli": ["Entailment", "Not mentioned"],
    }
    metric, comet, full = PAPER["narrative_qa"]
    for task, outputs in answers.items():
        (tmp_path / "data" / task).mkdir(parents=True)
        for split in ("train", "validation"):
            rows = [
                {"id": f"{split}{n}", "pid": f"{split}{n}_0", "output": output}
                | {"input": f"What is it?\n\n{n} {'a house by the sea ' * 40}"}
                for n, output in enumerate(outputs * 3)
            ]
            lines = "".join(f"{json.dumps(row)}\n" for row in rows)
            (tmp_path / "data" / task / f"{split}.jsonl").write_text(lines)
    run = run_of("scrolls", tmp_path, f"data.root={tmp_path / 'data'}")
    # the notebook has to evaluate
    assert not (run / "eval").exists()
    text, pictures = outputs_of(notebook, run, monkeypatch, chosen_file=1, example=2)
    # curves
    assert pictures == 1 + monitored(run) + LIVE
    scores = json.loads((run / "eval" / "scrolls.json").read_text())
    for task in answers:
        assert re.search(rf"{task} .* {scores[task]['scrolls_score']:.2f} .* 3 ", text), task
        assert f"{task}.jsonl: 3 predictions" in text
    assert re.search(rf"average .* {scores['average']:.2f} .* 40.10 .* 42.23", text)
    assert re.search(rf"narrative_qa .* {metric} {comet} .* {metric} {full}", text)
    last = worst_first(run / "predictions" / "narrative_qa.jsonl")[2]
    assert "predictions/narrative_qa.jsonl, example 2 of 3" in text
    assert shown(last["prompt_end"]) in shown(text)
    assert last["question"] == "What is it?" and last["question"] in text
    check_document(text, run)


@pytest.mark.slow
def test_the_notebook_shows_an_agent_run(notebook, tmp_path, monkeypatch):
    """Its data have moved: a key says where they are now."""
    keys = [f"data.root={write_traces(tmp_path / 'traces')}", f"data.cache={tmp_path / 'cache'}"]
    run = run_of("agent", tmp_path, *keys)
    moved = (tmp_path / "traces").rename(tmp_path / "moved")
    text, pictures = outputs_of(notebook, run, monkeypatch, keys=[f"data.root={moved}"])
    # curves, scores by distance
    assert pictures == 2 + monitored(run) + LIVE
    scores = json.loads((run / "eval" / "agent.json").read_text())["all"]
    perplexity = f"{scores['perplexity']:.2f}"
    assert re.search(rf"all .* {scores['turns']} .* {perplexity} .* {scores['f1']:.1%}", text)
    assert "predictions/agent.jsonl: 4 predictions" in text and "example 0 of 4" in text
    check_document(text, run)


@pytest.mark.slow
def test_the_notebook_shows_a_run_on_texts(notebook, tmp_path, monkeypatch):
    keys = [f"data.root={write_texts(tmp_path / 'texts')}", f"data.cache={tmp_path / 'cache'}"]
    run = run_of("books", tmp_path, *keys)
    text, pictures = outputs_of(notebook, run, monkeypatch)
    # curves, loss by chunk
    assert pictures == 2 + monitored(run) + LIVE
    scores = json.loads((run / "eval" / "text.json").read_text())["all"]
    assert re.search(rf"all .* {scores['labels']:,} .* {scores['loss']:.4f}", text)
    check_document(text, run)


@pytest.mark.slow
def test_the_notebook_shows_a_user_behaviour_run(notebook, tmp_path, monkeypatch):
    """If its data are gone, one line says why the live pictures are left out."""
    run = run_of("user_behavior", tmp_path, f"data.root={write_events(tmp_path / 'log')}")
    (tmp_path / "log").rename(tmp_path / "moved")
    text, pictures = outputs_of(notebook, run, monkeypatch)
    # curves, accuracy by age
    assert pictures == 2 + monitored(run)
    assert re.search(r"data.root: .*log", text)
    scores = json.loads((run / "eval" / "user_behavior.json").read_text())
    ceilings = scores.pop("ceilings")
    for methods in (scores, ceilings):
        shares = " .* ".join(f"{values['accuracy']:.1%}" for values in methods.values())
        assert re.search(rf"all .* {shares} .* 8 ", text)
    for method in ("CoMeT", "last_1k", "BM25_1k"):
        assert f"predictions/{method}.jsonl: 8 predictions" in text
    check_document(text, run)
