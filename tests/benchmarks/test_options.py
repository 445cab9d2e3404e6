"""What the command lines refuse, in one line."""

import pytest
import torch

from benchmarks.inference import decode, perplexity, prefill, reading
from benchmarks.loading import data
from benchmarks.pipeline import speedup
from benchmarks.shared.options import ROOT, SIZES, Options
from benchmarks.training import step
from comet_pl.errors import UserError

README = str(ROOT / "README.md")
WHOLE = "given, a whole number >="
READ = ["conf=passkey", README, "--name", "a"]
FOUR_B = ["--backbone", "qwen3_4b"]
REFUSED = [
    (prefill, ["--lengths", "4", "0"], f"--lengths: 0 {WHOLE} 1"),
    (prefill, ["--threads", "x"], "--threads: invalid int value: 'x'"),
    (prefill, ["--device", "tpu"], "--device: invalid choice: 'tpu' (choose from"),
    (prefill, ["--only-4b", "--lengths", "5"], "--only-4b: given with --lengths or"),
    (decode, ["--global-size", "-1"], f"--global-size: -1 {WHOLE} 0"),
    (decode, ["--pair", "--contexts", "5"], "--pair: given with --contexts"),
    (decode, [*FOUR_B, "--model", "x"], "--backbone: given with --model"),
    (decode, [*FOUR_B, "--layers", "37"], "--layers: 37 given, 1 to 36 are allowed"),
    (decode, ["--layers", "3"], "--layers: 3 given, --backbone NAME is needed with it"),
    (decode, ["--out", f"{__file__}/x"], "cannot be made: Not a directory"),
    (perplexity, [README, "--tokens", "1"], f"--tokens: 1 {WHOLE} 2"),
    (step, ["--pair", "5"], "unrecognized arguments: --pair"),
    (speedup, ["--chunks", "1"], f"--chunks: 1 {WHOLE} 2"),
    (reading, [*READ[:3], "a/b"], "--name: 'a/b' given, letters, digits, _ and - are allowed"),
    (reading, [*READ, "--minutes", "0"], "--minutes: 0.0 given, a number > 0"),
    (reading, ["conf=passkey", "-", *READ[2:]], "-: a file on disk is needed"),
    (reading, ["conf=passkey", "nowhere", *READ[2:]], "nowhere: cannot be read: No such file"),
    (data, ["--max-length", "3"], f"--max-length: 3 {WHOLE} 16"),
    (data, ["--gigabytes", "nan"], "--gigabytes: nan given"),
    (data, ["--root", "/nowhere"], "--root: /nowhere is no folder"),
]


@pytest.mark.parametrize(("module", "options", "message"), REFUSED)
def test_refused_in_one_line(module, options, message, tmp_path):
    options = options if "--out" in options else [*options, "--out", str(tmp_path)]
    with pytest.raises(UserError) as caught:
        getattr(module, "parse", module.main)(options)
    assert message in str(caught.value) and "\n" not in str(caught.value)
    assert not list(tmp_path.iterdir())


def test_defaults_depend_on_the_size(tmp_path, monkeypatch):
    usual = {"usual": {"lengths": [1, 2], "rounds": 3}, "small": {"lengths": [1]}}
    monkeypatch.setitem(SIZES["options"], "x", usual)
    for argv, lengths, given in (
        ([], [1, 2], set()),
        (["--small"], [1], set()),
        (["--small", "--lengths", "4", "5"], [4, 5], {"lengths"}),
    ):
        options = Options("x", None).settle([*argv, "--out", str(tmp_path)])
        assert (options.lengths, options.rounds, options.given) == (lengths, 3, given)
        assert options.command.startswith(" ".join(["python -m benchmarks.x", *argv]))


def test_the_gpu_where_there_is_one(monkeypatch, tmp_path):
    auto, cuda = (["--device", device, "--out", str(tmp_path)] for device in ("auto", "cuda"))
    for present, usual in (
        (False, ("cpu", "float32", 65536)),
        (True, ("cuda", "bfloat16", 262144)),
    ):
        monkeypatch.setattr(torch.cuda, "is_available", lambda present=present: present)
        options = prefill.parse(auto)
        assert (options.device, options.dtype, options.full_attention_to) == usual
        if not present:
            with pytest.raises(UserError, match="--device: cuda given"):
                prefill.parse(cuda)


def test_without_the_usual_model(tmp_path, monkeypatch):
    monkeypatch.setattr(perplexity, "USUAL_MODEL", ROOT / "nowhere")
    with pytest.raises(UserError, match="--model: nowhere is not there; `make smollm2` makes it"):
        perplexity.parse(["book.txt", "--out", str(tmp_path)])


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ('{"id": "1", "input": "x"}\n', "train.jsonl:1: input and output are needed"),
        ("{broken\n", "train.jsonl:1: malformed row: not JSON"),
        (None, "has no <task>/train.jsonl"),
    ],
)
def test_malformed_rows_are_named(content, message, tmp_path):
    rows = tmp_path / "qmsum" / ("train.jsonl" if content else "validation.jsonl")
    rows.parent.mkdir()
    rows.write_text(content or "{}\n")
    argv = ["--small", "--gigabytes", "0.0001", "--root", str(tmp_path)]
    with pytest.raises(UserError, match=message):
        data.main([*argv, "--out", str(tmp_path / "out")])
    assert not list((tmp_path / "out").iterdir())
