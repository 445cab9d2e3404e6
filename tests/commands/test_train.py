"""train.py and its run folder: what it writes, what it refuses, and a trained model back from a
checkpoint."""

import importlib
import json
import os
import signal
import subprocess
import sys
import threading

import pytest
import torch
import yaml
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from callbacks.checkpoints import AtomicCheckpointIO, RunCheckpoints
from comet_pl.config.load import load
from comet_pl.errors import UserError, first_line
from comet_pl.experiment.run_folder import plan_run
from tests.support.tiny_runs import ROOT, command
from tests.support.trained import SMALL, main, run


def tree(folder):
    return {
        path.relative_to(folder): path.read_bytes() for path in folder.rglob("*") if path.is_file()
    }


# ---- what a run writes


def test_a_run_folder_holds_everything(trained):
    assert {path.name for path in (trained / "checkpoints").iterdir()} == {"last.ckpt", "best.ckpt"}
    results = json.loads((trained / "eval" / "passkey.json").read_text())
    assert set(results["mean"]) == {"64", "128"}
    written = yaml.safe_load((trained / "config.yaml").read_text())
    assert written["run"]["name"] == "trained"
    assert written["model"]["chunk_size"] == 16
    assert written["train"]["memory_lr_factor"] == 3.0
    assert written["train"]["final_lr"] == 0.0  # resolved: defaults too
    assert not list(trained.rglob("hparams.yaml"))
    assert not list(trained.rglob("*.part"))


def test_tensorboard_holds_the_pinned_tags(trained):
    events = EventAccumulator(
        str(trained), size_guidance={"scalars": 0, "images": 0, "tensors": 0}
    ).Reload()
    steps = {tag: [event.step for event in events.Scalars(tag)] for tag in events.Tags()["scalars"]}
    layers = yaml.safe_load((trained / "config.yaml").read_text())["backbone"]["num_hidden_layers"]
    values = ("loss", "lr", "grad_norm", "tokens_per_s", "padding", "tflops", "skipped")
    gates = (
        f"gate/{value}/layer_{layer}"
        for value in ("mean", "variance", "half_life")
        for layer in range(layers)
    )
    train = (*(f"train/{value}" for value in values), "memory/peak_gb", "gate/mean", *gates)
    memory = ("norm_state", "norm_global", "norm_temporary", "rank_state", "rank_temporary")
    memory += ("attention_global", "attention_temporary", "attention_own")
    looked = (f"memory/{tag}/layer_{layer}" for tag in memory for layer in range(layers))
    validated = ("val/loss", "val/accuracy", "val/loss_by_chunk/2-3", *looked)
    assert steps == {**{tag: [1, 2, 4] for tag in train}, **{tag: [2, 4] for tag in validated}}
    for figure in ("val/heatmap", "val/loss_by_chunk", "memory/report", "gate/by_chunk"):
        assert [event.step for event in events.Images(figure)] == [2, 4]
    assert [event.step for event in events.Tensors("val/predictions/text_summary")] == [2, 4]
    assert (trained / "monitor" / "gates.png").is_file()
    values = {tag: events.Scalars(tag)[-1].value for tag in steps}
    assert 0 < values["gate/mean"] < 1
    assert values["train/tokens_per_s"] > 10
    assert 0.05 < values["memory/peak_gb"] < 50
    (config,) = events.Tensors("config/text_summary")
    assert "chunk_size: 16" in config.tensor_proto.string_val[0].decode()
    hparams = events.SummaryMetadata("_hparams_/session_start_info").plugin_data.content
    assert b"model.chunk_size" in hparams


def test_monitors_write_files_beside(trained):
    names = {
        "gates.png",
        "memory.png",
        "length_report.png",
        "length_report.json",
        "predictions-2.jsonl",
        "predictions-4.jsonl",
    }
    assert {path.name for path in (trained / "monitor").iterdir()} == names
    answers = [
        json.loads(line)
        for line in (trained / "monitor" / "predictions-4.jsonl").read_text().splitlines()
    ]
    assert [(one["depth"], one["length"], one["score"]) for one in answers] == [
        (0, 64, 0),
        (1, 64, 0),
    ]
    assert all(
        len(one["references"][0]) == 5 and one["prompt_end"].endswith("The pass key is ")
        for one in answers
    )
    report = json.loads((trained / "monitor" / "length_report.json").read_text())
    assert (report["step"], sum(one["labels"] for one in report["buckets"])) == (
        4,
        12,
    )  # five digits and the stop token, two rows


def test_monitors_that_are_off_write_nothing(tmp_path):
    keys = [f"monitor.{name}=false" for name in ("gates", "memory", "length_report", "predictions")]
    folder = run(tmp_path, "off", *keys, "trainer.max_steps=2", "eval.after_fit=false")
    assert not (folder / "monitor").exists()
    events = EventAccumulator(
        str(folder), size_guidance={"scalars": 0, "images": 0, "tensors": 0}
    ).Reload()
    assert not [
        tag
        for tag in events.Tags()["scalars"]
        if tag.startswith(("gate/", "memory/norm", "memory/rank", "memory/att", "val/loss_by"))
    ]
    assert events.Tags()["images"] == ["val/heatmap"]
    assert "val/predictions/text_summary" not in events.Tags()["tensors"]


def test_without_a_name_a_run_has_a_time_stamp(tmp_path):
    config = load([f"run.root={tmp_path}"])
    first = plan_run(config)
    first.create()
    second = plan_run(config)
    second.create()
    assert first.path != second.path
    assert (
        yaml.safe_load((second.path / "config.yaml").read_text())["run"]["name"] == second.path.name
    )
    assert plan_run(config, rank=1).path == second.path  # another process of the same run


def test_processes_started_from_outside_need_a_name(tmp_path, monkeypatch):
    monkeypatch.delenv("COMET_RUN_NAME", raising=False)
    with pytest.raises(UserError, match=r"run\.name: missing"):
        plan_run(load([f"run.root={tmp_path}"]), rank=1)


# ---- what is refused, with nothing changed


def refused(match, *argv):
    with pytest.raises(UserError, match=match) as error:
        main([*argv])
    assert "\n" not in str(error.value)


def test_an_existing_folder_is_not_overwritten(trained):
    before = tree(trained)
    refused(
        r"^run\.name: .*trained exists; give another run\.name, or resume=true",
        f"run.root={trained.parents[1]}",
        "run.name=trained",
        *SMALL,
    )
    assert tree(trained) == before


@pytest.mark.parametrize(
    ("key", "match"),
    [
        ("model.chunk_size=32", r"^model\.chunk_size: 32 given, but .*trained was started with 16"),
        ("backbone.hidden_size=32", r"^backbone\.hidden_size: 32 given"),
        ("data.batch_size=3", r"^data\.batch_size: 3 given"),
        ("data.kind=scrolls", r"^data\.kind: scrolls given, but .* was started with passkey"),
        ("train.lr=0.5", r"^train\.lr: 0\.5 given, but .* was started with 0\.001"),
        ("seed=1", r"^seed: 1 given, but .* was started with 0"),
    ],
)
def test_a_resumed_run_keeps_its_configuration(trained, key, match):
    before = tree(trained)
    keys = [one for one in SMALL if not (one.startswith("data.") and "scrolls" in key)]
    refused(match, f"run.root={trained.parents[1]}", "run.name=trained", "resume=true", *keys, key)
    assert tree(trained) == before


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_a_gpu_that_is_not_here(tmp_path):
    match = (
        r"^trainer\.accelerator: cuda given, but there is no such device here, allowed: cpu, auto$"
    )
    refused(match, f"run.root={tmp_path}", *SMALL, "trainer.accelerator=cuda")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("keys", "match"),
    [
        (["data.haystack=/nowhere.txt"], r"^data\.haystack: .*nowhere\.txt cannot be read"),
        (["backbone.path=/nowhere"], r"^backbone\.path: no such folder: /nowhere"),
        (["trainer.strategy=nonsense"], r"^trainer: .*nonsense"),
        (
            ["trainer.limit_val_batches=0.1"],
            r"^trainer: .*0\.1 of the `val_dataloader`.*limit_val_batches",
        ),
        (
            ["checkpoint.monitor=val/los"],
            r"^checkpoint\.monitor: 'val/los' given, allowed: a logged value, .*val/loss",
        ),
    ],
)
def test_mistakes_are_one_line(tmp_path, keys, match):
    refused(match, f"run.root={tmp_path}", "run.name=x", *SMALL, *keys)
    left = (
        list((tmp_path / "passkey" / "x").rglob("*"))
        if (tmp_path / "passkey" / "x").exists()
        else []
    )
    assert not [path for path in left if "ckpt" in path.name]
    assert bool(left) == (
        "checkpoint.monitor=val/los" in keys
    )  # steps were taken: their curves stay; otherwise there is no folder


def test_one_line_on_stderr_and_exit_code_2(tmp_path):
    argv = [sys.executable, "train.py", f"run.root={tmp_path}", *SMALL, "model.gate=scalr"]
    done = subprocess.run(argv, cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert done.returncode == 2
    assert done.stderr.splitlines() == [done.stderr.rstrip("\n")]
    assert done.stderr.startswith("error: model.gate: 'scalr' given")
    assert not list(tmp_path.iterdir())


# ---- going on


def test_resume_without_a_checkpoint_starts(tmp_path):
    path = run(tmp_path, "new", "resume=true", "eval.after_fit=false")
    assert torch.load(path / "checkpoints" / "last.ckpt", weights_only=True)["global_step"] == 4


def test_max_steps_may_grow(tmp_path):
    run(tmp_path, "grows", "eval.after_fit=false")
    path = run(
        tmp_path,
        "grows",
        "eval.after_fit=false",
        "resume=true",
        "trainer.max_steps=6",
        "data.num_workers=1",
    )
    assert torch.load(path / "checkpoints" / "last.ckpt", weights_only=True)["global_step"] == 6
    assert yaml.safe_load((path / "config.yaml").read_text())["trainer"]["max_steps"] == 6


def test_a_damaged_checkpoint_is_named(tmp_path):
    path = run(tmp_path, "damaged", "eval.after_fit=false")
    last = path / "checkpoints" / "last.ckpt"
    last.write_bytes(last.read_bytes()[:-2000])
    refused(
        r"last\.ckpt: not a readable checkpoint: truncated",
        f"run.root={tmp_path}",
        "run.name=damaged",
        "resume=true",
        *SMALL,
    )


def test_a_run_shorter_than_its_intervals_is_validated_at_its_end(tmp_path, capsys):
    long = [
        "trainer.val_check_interval=200",
        "trainer.log_every_n_steps=50",
        "checkpoint.every_steps=200",
        "eval.after_fit=false",
    ]
    checkpoints = run(tmp_path, "x", *long) / "checkpoints"
    assert "logging interval" not in "".join(capsys.readouterr())
    assert [
        torch.load(checkpoints / f"{name}.ckpt", weights_only=True)["global_step"]
        for name in ("last", "best")
    ] == [4, 4]


def test_by_minutes_only(tmp_path, monkeypatch):
    """So few minutes that every step is due."""
    saved, save = [], RunCheckpoints._save

    def spy(self, trainer, name, must):
        saved.append((name, trainer.global_step))
        return save(self, trainer, name, must)

    monkeypatch.setattr(RunCheckpoints, "_save", spy)
    keys = ["checkpoint.every_steps=null", "checkpoint.every_minutes=0.00001"]
    run(tmp_path, "x", *keys, "eval.after_fit=false")
    assert [step for name, step in saved if name == "last.ckpt"] == [1, 2, 3, 4]


def test_ctrl_c_ends_with_a_checkpoint_and_says_how_to_go_on(tmp_path):
    """A terminal sends it to the worker processes too."""
    keys = [*SMALL, "trainer.max_steps=100000", "checkpoint.every_steps=null", "data.num_workers=2"]
    streams = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    process = subprocess.Popen(
        command(tmp_path, "x", *keys), cwd=ROOT, start_new_session=True, **streams
    )
    watchdog = threading.Timer(60, process.kill)
    watchdog.start()
    for line in process.stdout:
        if line.startswith("step 4/"):
            os.killpg(process.pid, signal.SIGINT)
            break
    out, errors = process.communicate()
    watchdog.cancel()
    assert process.returncode == 130, errors
    assert "Traceback" not in errors
    assert out.count("stopping after this step") == 1
    last = out.splitlines()[-1]
    step = torch.load(tmp_path / "passkey" / "x" / "checkpoints" / "last.ckpt", weights_only=True)[
        "global_step"
    ]
    assert last.startswith(f"stopped after step {step}, saved in ")
    assert last.endswith("run.name=x resume=true")


def test_ctrl_c_before_the_first_step_is_no_error(tmp_path, monkeypatch):
    """Lightning would end with status 1."""

    def interrupted(self, stage):
        raise KeyboardInterrupt

    monkeypatch.setattr("comet_pl.training.lit_module.CometModule.setup", interrupted)
    with pytest.raises(KeyboardInterrupt):
        importlib.import_module("train").main(command(tmp_path, "x", *SMALL)[2:])


def test_a_checkpoint_is_written_whole_or_not_at_all(tmp_path, monkeypatch):
    path = tmp_path / "last.ckpt"
    io = AtomicCheckpointIO()
    io.save_checkpoint({"comet": 1}, path)
    assert io.failure is None

    def half(checkpoint, file):
        file.write(b"half")
        raise error

    monkeypatch.setattr(torch, "save", half)
    # The callback asks for `failure` when all ranks are through.
    for error in (OSError(28, "disk full"), RuntimeError("enforce fail at inline_container.cc")):
        io.save_checkpoint({"comet": 2}, path)
        assert io.failure.endswith(first_line(error).removeprefix("[Errno 28] "))
    error = ValueError("the program's own")
    with pytest.raises(ValueError, match="own"):
        io.save_checkpoint({"comet": 2}, path)
    assert [one.name for one in tmp_path.iterdir()] == ["last.ckpt"]
    assert torch.load(path, weights_only=True) == {"comet": 1}


@pytest.mark.slow
@pytest.mark.parametrize("depths", [4, 1])
def test_two_processes_are_one_with_all_rows(tmp_path, depths):
    """Validation: two batches for each, or a single one for both."""
    keys = [
        f"run.root={tmp_path}",
        *SMALL,
        "eval.after_fit=false",
        f"data.val_depths={depths}",
        "data.val_examples=2",
    ]
    argv = [
        sys.executable,
        "train.py",
        *keys,
        "run.name=two",
        "data.batch_size=2",
        "trainer.strategy=ddp",
        "trainer.devices=2",
    ]
    done = subprocess.run(argv, cwd=ROOT, capture_output=True, text=True, timeout=200)
    assert done.returncode == 0, done.stderr
    main([*keys, "run.name=one", "data.batch_size=4"])
    two, one = (
        torch.load(tmp_path / "passkey" / name / "checkpoints" / "last.ckpt", weights_only=True)
        for name in ("two", "one")
    )
    assert len(two["random_states"]) == 2
    best = [
        next(state["best"] for state in one["callbacks"].values() if "best" in state)
        for one in (two, one)
    ]
    assert best[0] == pytest.approx(best[1], rel=1e-4), "val/loss"
    for name, weight in one["state_dict"].items():
        torch.testing.assert_close(two["state_dict"][name], weight, rtol=1e-4, atol=1e-6, msg=name)


@pytest.mark.parametrize("asked", ["highest", "high"])
def test_float32_products_are_as_precise_as_asked(asked, tmp_path):
    before = torch.get_float32_matmul_precision()
    try:
        keys = ["trainer.max_steps=1", "eval.after_fit=false", f"run.root={tmp_path}"]
        main([*SMALL, *keys, f"trainer.matmul_precision={asked}"])
        assert torch.get_float32_matmul_precision() == asked
    finally:
        torch.set_float32_matmul_precision(before)
