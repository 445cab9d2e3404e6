"""notebooks/evaluate.ipynb: clean in git, thin, and shows what a run of each kind has."""

from __future__ import annotations

import ast
import importlib
import json
import re
from pathlib import Path

import nbformat
import pytest
from nbclient import NotebookClient
from tiny_runs import ROOT, TINY, train

NOTEBOOK = ROOT / "notebooks" / "evaluate.ipynb"
SHORT = [*TINY, "trainer.max_steps=6", "trainer.val_check_interval=3", "trainer.log_every_n_steps=1", "data.batch_size=4"]
PASSKEY = ["conf=passkey", "data.train_length=96", "data.length_schedule=null", "eval.lengths=[96,384]", "eval.depths=3", "eval.examples=1"]
SCROLLS = ["conf=scrolls", "data.max_length=256", "eval.after_fit=false", "eval.examples=3", "eval.max_new_tokens=4"]


def read_notebook() -> nbformat.NotebookNode:
    notebook = nbformat.read(NOTEBOOK, as_version=4)
    nbformat.validate(notebook)
    return notebook


def parse(notebook: nbformat.NotebookNode) -> ast.Module:
    """The code cells as one module, without IPython's % lines."""
    lines = "\n".join(cell.source for cell in notebook.cells if cell.cell_type == "code").splitlines()
    return ast.parse("\n".join(line for line in lines if not line.startswith("%")))


def test_the_committed_notebook_has_no_outputs():
    for cell in read_notebook().cells:
        if cell.cell_type == "code":
            assert cell.outputs == [] and cell.execution_count is None, cell.source


def test_the_notebook_defines_nothing():
    definitions = (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef, ast.Lambda)
    assert [ast.unparse(node) for node in ast.walk(parse(read_notebook())) if isinstance(node, definitions)] == []


def test_what_the_notebook_imports_exists():
    imports = [node for node in ast.walk(parse(read_notebook())) if isinstance(node, ast.ImportFrom)]
    assert {"comet_pl.build", "comet_pl.evaluation", "comet_pl.metrics.passkey"} <= {node.module for node in imports}
    for node in imports:
        for alias in node.names:
            package = importlib.import_module(node.module)
            assert hasattr(package, alias.name) or importlib.import_module(f"{node.module}.{alias.name}")


def outputs_of(run: Path, monkeypatch: pytest.MonkeyPatch) -> tuple[str, int]:
    """Executes the notebook on a run: (all text that it shows, number of pictures). A cell that fails raises."""
    monkeypatch.setenv("COMET_RUN", str(run))
    notebook = read_notebook()
    NotebookClient(notebook, timeout=300, kernel_name="python3", resources={"metadata": {"path": str(NOTEBOOK.parent)}}).execute()
    outputs = [output for cell in notebook.cells if cell.cell_type == "code" for output in cell.outputs]
    assert not [output for output in outputs if output.output_type == "error"]
    data = [output.get("data", {}) for output in outputs]
    texts = [output.get("text", "") for output in outputs] + [one.get("text/plain", "") for one in data]
    return "\n".join(texts), sum("image/png" in one for one in data)


@pytest.mark.slow
def test_the_notebook_shows_a_passkey_run(tmp_path, monkeypatch):
    train(tmp_path, "tiny", *SHORT, *PASSKEY)
    run = tmp_path / "passkey" / "tiny"
    scores = json.loads((run / "eval" / "passkey.json").read_text())
    text, pictures = outputs_of(run, monkeypatch)
    assert pictures == 2  # curves, heat-map
    for length, accuracy in scores["mean"].items():
        assert re.search(rf"{int(length):,} .* {accuracy:.1%}", text), length
    assert re.search(r"answer .*, right is \d{5}\n", text)


@pytest.mark.slow
def test_the_notebook_evaluates_and_shows_a_scrolls_run(tmp_path, monkeypatch):
    answers = {"narrative_qa": ["the red boat", "a lamp"], "contract_nli": ["Entailment", "Not mentioned"]}
    for task, outputs in answers.items():
        (tmp_path / "data" / task).mkdir(parents=True)
        for split in ("train", "validation"):
            rows = [
                {"id": f"{split}{n}", "pid": f"{split}{n}_0", "input": f"What is it?\n\n{n} {'a house by the sea ' * 40}", "output": output}
                for n, output in enumerate(outputs * 3)
            ]
            (tmp_path / "data" / task / f"{split}.jsonl").write_text("".join(f"{json.dumps(row)}\n" for row in rows))
    train(tmp_path, "tiny", *SHORT, *SCROLLS, f"data.root={tmp_path / 'data'}")
    run = tmp_path / "scrolls" / "tiny"
    assert not (run / "eval").exists()  # so that the notebook has to evaluate
    text, pictures = outputs_of(run, monkeypatch)
    assert pictures == 1  # curves
    scores = json.loads((run / "eval" / "scrolls.json").read_text())
    for task in answers:
        assert re.search(rf"{task} .* {scores[task]['scrolls_score']:.2f} .* 3 ", text), task
        assert f"{task}.jsonl: 3 predictions" in text
    assert re.search(rf"average .* {scores['average']:.2f}", text)
