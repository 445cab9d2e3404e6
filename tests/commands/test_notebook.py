"""notebooks/evaluate.ipynb: clean in git, thin, and shows what a run of each kind has."""

from __future__ import annotations

import ast
import importlib
import json
import re
from pathlib import Path
from typing import Any

import nbformat
import pytest
from nbclient import NotebookClient

from comet_pl.evaluation.results import worst_first
from comet_pl.metrics.scrolls import PAPER
from tests.support.tiny_data import write_events, write_traces
from tests.support.tiny_runs import ROOT, TINY, train

NOTEBOOK = ROOT / "notebooks" / "evaluate.ipynb"
SHORT = [
    *TINY,
    "trainer.max_steps=6",
    "trainer.val_check_interval=3",
    "trainer.log_every_n_steps=1",
    "data.batch_size=4",
]
PASSKEY = [
    "conf=passkey",
    "data.train_length=96",
    "data.length_schedule=null",
    "eval.lengths=[96,384]",
    "eval.depths=3",
    "eval.examples=1",
]
SCROLLS = [
    "conf=scrolls",
    "data.max_length=256",
    "eval.after_fit=false",
    "eval.examples=3",
    "eval.max_new_tokens=4",
]
AGENT = [
    "conf=agent",
    "data.val_share=0.3",
    "data.max_length=512",
    "data.packing=none",
    "eval.max_new_tokens=4",
    "eval.examples=2",
]
BEHAVIOR = [
    "conf=user_behavior",
    "data.train_length=1600",
    "data.length_schedule=[[0,200],[3,400]]",
    "data.questions=3",
]
BEHAVIOR += [
    "data.val_examples=4",
    "eval.examples=8",
    "eval.budget=1024",
    "eval.batch_size=4",
    "eval.after_fit=true",
]
BEHAVIOR += ["backbone.num_key_value_heads=2"]  # for lookback
LIVE = 2  # pictures of one text: gates, memories


def read_notebook() -> nbformat.NotebookNode:
    notebook = nbformat.read(NOTEBOOK, as_version=4)
    nbformat.validate(notebook)
    return notebook


def parse(notebook: nbformat.NotebookNode) -> ast.Module:
    """The code cells as one module, without IPython's % lines."""
    lines = "\n".join(
        cell.source for cell in notebook.cells if cell.cell_type == "code"
    ).splitlines()
    return ast.parse("\n".join(line for line in lines if not line.startswith("%")))


def test_the_committed_notebook_has_no_outputs():
    for cell in read_notebook().cells:
        if cell.cell_type == "code":
            assert cell.outputs == [] and cell.execution_count is None, cell.source


def test_the_notebook_defines_nothing():
    definitions = (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef, ast.Lambda)
    assert [
        ast.unparse(node)
        for node in ast.walk(parse(read_notebook()))
        if isinstance(node, definitions)
    ] == []


def test_what_the_notebook_imports_exists():
    imports = [
        node for node in ast.walk(parse(read_notebook())) if isinstance(node, ast.ImportFrom)
    ]
    assert {
        "comet_pl.build",
        "comet_pl.evaluation",
        "comet_pl.analysis.gates",
        "comet_pl.evaluation.results",
    } <= {node.module for node in imports}
    for node in imports:
        for alias in node.names:
            package = importlib.import_module(node.module)
            assert hasattr(package, alias.name) or importlib.import_module(
                f"{node.module}.{alias.name}"
            )


def outputs_of(run: Path, monkeypatch: pytest.MonkeyPatch, **choices: Any) -> tuple[str, int]:
    """Executes the notebook on a run: (all text that it shows, number of pictures). A cell that fails raises.

    choices: what a user would write into the cells that assign these names; the document is a short one.
    """
    monkeypatch.setenv("COMET_RUN", str(run))
    notebook = read_notebook()
    document = run.parent / "document.txt"
    document.write_text("The house by the sea has a red boat and a lamp.\n" * 20)
    for name, value in {"document": str(document), **choices}.items():
        (cell,) = [
            cell
            for cell in notebook.cells
            if cell.cell_type == "code" and re.search(rf"^{name} = ", cell.source, re.MULTILINE)
        ]
        cell.source += f"\n{name} = {value!r}"
    NotebookClient(
        notebook,
        timeout=600,
        kernel_name="python3",
        resources={"metadata": {"path": str(NOTEBOOK.parent)}},
    ).execute()
    outputs = [
        output for cell in notebook.cells if cell.cell_type == "code" for output in cell.outputs
    ]
    assert not [output for output in outputs if output.output_type == "error"]
    data = [output.get("data", {}) for output in outputs]
    texts = [output.get("text", "") for output in outputs] + [
        one.get("text/plain", "") for one in data
    ]
    return "\n".join(texts), sum("image/png" in one for one in data)


def check_document(text: str, run: Path) -> None:
    """The memory file is there, as large as is said, and answered each question."""
    size = (run / "document.memory").stat().st_size
    assert re.search(rf"{size:,} bytes on disk, for {48 * 20:,} bytes of text", text)
    assert (
        re.search(r"read +\d[\d,]* tokens", text)
        and text.count("> ") >= 2
        and "unchanged after 2 questions" in text
    )


def monitored(run: Path) -> int:
    """Pictures of a run's monitors and of its logged gates."""
    found = {file.name for file in run.glob("monitor/*.png")}
    assert {"gates.png", "memory.png"} <= found
    return len(found) + 1


def shown(text: str) -> str:
    """Without the frames and line ends of tables."""
    return "".join(re.sub(r"[\u2500-\u257f]|\x1b\[\d+m", "", text).split())


@pytest.mark.slow
def test_the_notebook_shows_a_passkey_run(tmp_path, monkeypatch):
    train(tmp_path, "tiny", *SHORT, *PASSKEY)
    run = tmp_path / "passkey" / "tiny"
    scores = json.loads((run / "eval" / "passkey.json").read_text())
    text, pictures = outputs_of(run, monkeypatch, example=5)
    assert pictures == 2 + monitored(run) + LIVE  # curves, heat-map
    for length, accuracy in scores["mean"].items():
        assert re.search(rf"{int(length):,} .* {accuracy:.1%}", text), length
    assert "96 tokens in chunks of 16" in text
    best = worst_first(run / "predictions" / "passkey.jsonl")[5]
    assert "predictions/passkey.jsonl, example 5 of 6" in text and shown(
        best["prompt_end"]
    ) in shown(text)
    assert re.search(r"answer .*, right is \d{5}\n", text)
    check_document(text, run)


@pytest.mark.slow
def test_the_notebook_evaluates_and_shows_a_scrolls_run(tmp_path, monkeypatch):
    answers = {
        "narrative_qa": ["the red boat", "a lamp"],
        "contract_nli": ["Entailment", "Not mentioned"],
    }
    metric, comet, full = PAPER["narrative_qa"]
    for task, outputs in answers.items():
        (tmp_path / "data" / task).mkdir(parents=True)
        for split in ("train", "validation"):
            rows = [
                {
                    "id": f"{split}{n}",
                    "pid": f"{split}{n}_0",
                    "input": f"What is it?\n\n{n} {'a house by the sea ' * 40}",
                    "output": output,
                }
                for n, output in enumerate(outputs * 3)
            ]
            (tmp_path / "data" / task / f"{split}.jsonl").write_text(
                "".join(f"{json.dumps(row)}\n" for row in rows)
            )
    train(tmp_path, "tiny", *SHORT, *SCROLLS, f"data.root={tmp_path / 'data'}")
    run = tmp_path / "scrolls" / "tiny"
    assert not (run / "eval").exists()  # so that the notebook has to evaluate
    text, pictures = outputs_of(run, monkeypatch, chosen_file=1, example=2)
    assert pictures == 1 + monitored(run) + LIVE  # curves
    scores = json.loads((run / "eval" / "scrolls.json").read_text())
    for task in answers:
        assert re.search(rf"{task} .* {scores[task]['scrolls_score']:.2f} .* 3 ", text), task
        assert f"{task}.jsonl: 3 predictions" in text
    assert re.search(rf"average .* {scores['average']:.2f} .* 40.10 .* 42.23", text)
    assert re.search(rf"narrative_qa .* {metric} {comet} .* {metric} {full}", text)
    last = worst_first(run / "predictions" / "narrative_qa.jsonl")[2]
    assert "predictions/narrative_qa.jsonl, example 2 of 3" in text and shown(
        last["prompt_end"]
    ) in shown(text)
    assert last["question"] == "What is it?" and last["question"] in text
    check_document(text, run)


@pytest.mark.slow
def test_the_notebook_shows_an_agent_run(tmp_path, monkeypatch):
    keys = [f"data.root={write_traces(tmp_path / 'traces')}", f"data.cache={tmp_path / 'cache'}"]
    train(tmp_path, "tiny", *SHORT, *AGENT, *keys)
    run = tmp_path / "agent" / "tiny"
    text, pictures = outputs_of(run, monkeypatch)
    assert pictures == 2 + monitored(run) + LIVE  # curves, scores by distance
    found = json.loads((run / "eval" / "agent.json").read_text())["all"]
    assert re.search(
        rf"all .* {found['turns']} .* {found['perplexity']:.2f} .* {found['f1']:.1%}", text
    )
    assert "predictions/agent.jsonl: 4 predictions" in text and "example 0 of 4" in text
    check_document(text, run)


@pytest.mark.slow
def test_the_notebook_shows_a_user_behaviour_run(tmp_path, monkeypatch):
    """And its data may be gone by then: the live pictures are left out, and one line says why."""
    train(tmp_path, "tiny", *SHORT, *BEHAVIOR, f"data.root={write_events(tmp_path / 'log')}")
    run = tmp_path / "user_behavior" / "tiny"
    (tmp_path / "log").rename(tmp_path / "moved")
    text, pictures = outputs_of(run, monkeypatch)
    assert pictures == 2 + monitored(run)  # curves, accuracy by age
    assert re.search(r"data.root: .*log", text)
    scores = json.loads((run / "eval" / "user_behavior.json").read_text())
    ceilings = scores.pop("ceilings")
    for methods in (scores, ceilings):
        shares = " .* ".join(f"{values['accuracy']:.1%}" for values in methods.values())
        assert re.search(rf"all .* {shares} .* 8 ", text)
    for method in ("CoMeT", "last_1k", "BM25_1k"):
        assert f"predictions/{method}.jsonl: 8 predictions" in text
    check_document(text, run)
    _, pictures = outputs_of(run, monkeypatch, keys=[f"data.root={tmp_path / 'moved'}"])
    assert pictures == 2 + monitored(run) + LIVE
