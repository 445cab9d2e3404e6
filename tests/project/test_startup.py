"""A start loads what it needs; benchmarks/loading/startup.py counts the seconds."""

import json
from pathlib import Path

import pytest

from benchmarks.loading import startup
from comet_pl.errors import UserError
from tests.support.models import tiny
from tests.support.tiny_runs import python

HEAVY = """
lightning torchmetrics matplotlib datasets nltk peft sympy torch._dynamo torch.distributed.fsdp
transformers.modeling_utils transformers.generation.utils comet_pl.model.modeling_comet
lightning.pytorch.trainer
""".split()


def test_the_import_help_and_mistakes_load_nothing_heavy():
    code = (
        "import runpy, sys, comet_pl\n"
        "assert set(comet_pl.__all__) >= {'CometCache', 'CometConfig', 'CometForCausalLM'}\n"
        "commands = 'train.py --help', 'train.py train.lrr=1', 'eval.py', 'eval.py ckpt=no/such'\n"
        "for arguments in map(str.split, commands):\n"
        "    sys.argv = arguments\n"
        "    try:\n"
        "        runpy.run_path(arguments[0], run_name='__main__')\n"
        "    except SystemExit as ended:\n"
        "        assert ended.code in (0, 2), ended.code\n"
        "    else:\n"
        "        raise AssertionError(arguments)\n"
        f"print(sorted(set({HEAVY!r}) & set(sys.modules)))"
    )
    assert python(code) == "[]"


def test_after_the_import_alone_the_auto_classes_load_a_folder(tmp_path: Path):
    """The model's class is imported with the first configuration; what it needs is heavy, or the
    test above could not fail."""
    tiny().save_pretrained(tmp_path)
    code = (
        "import sys, comet_pl; assert 'comet_pl.model.modeling_comet' not in sys.modules\n"
        "from transformers import AutoModelForCausalLM\n"
        "model = AutoModelForCausalLM.from_pretrained(sys.argv[1])\n"
        f"print(type(model).__name__, *sorted(set({HEAVY!r}) & set(sys.modules)))"
    )
    name, *loaded = python(code, str(tmp_path)).split()
    assert name == "CometForCausalLM"
    assert {"sympy", "torch._dynamo", "transformers.modeling_utils"} <= set(loaded)


def test_an_unknown_name_is_an_attribute_error():
    import comet_pl

    with pytest.raises(AttributeError, match=r"comet_pl.*Comet2"):
        comet_pl.Comet2  # noqa: B018


def test_the_benchmark_writes_seconds_and_verdicts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    quick = {case: (["-c", "pass"], 0) for case in startup.CASES}
    quick["comet_pl"] = ["-c", "sum(range(10**7))"], 0
    monkeypatch.setattr(startup, "CASES", quick)
    startup.main(["--rounds", "1", "--out", str(tmp_path)])
    result = json.loads((tmp_path / "startup.json").read_text())
    assert set(result["seconds"]) == {*quick, "beyond"}
    assert result["seconds"]["beyond"]["processor"] > 0
    bounds = {case: verdict["bound"] for case, verdict in result["verdicts"].items()}
    assert bounds == {"beyond": 1.5, "first step": 15.0}


@pytest.mark.slow
def test_the_first_step_is_reached_and_leaves_nothing(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
):
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    monkeypatch.setattr(startup.tempfile, "tempdir", None)
    wall, processor = startup.start("first step")
    assert processor > 1 and wall > 1 and not list(tmp_path.iterdir())


def test_the_benchmark_tells_what_failed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(startup, "CASES", {"comet_pl": (["-c", "import no_such_module"], 0)})
    with pytest.raises(UserError, match=r"comet_pl: ended with status 1: .*no_such_module"):
        startup.start("comet_pl")
