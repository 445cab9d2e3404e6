"""train.py under trainer.strategy=layer_pipeline: the same run as on one device; how it ends, and
what it refuses."""

import json
import os
import re
import signal
import socket
import time
from functools import cache

import pytest
import torch
import torch.distributed as dist
import yaml
from matplotlib.figure import Figure

from comet_pl import build
from comet_pl.config.load import load
from comet_pl.errors import UserError
from comet_pl.experiment.run_folder import plan_run
from tests.support.pipeline_runs import (
    ENDLESS,
    KEYS,
    LONG,
    ONE,
    STEPS,
    TIMEOUT,
    TWO,
    Training,
    main,
    on_one,
    processes,
    same_run,
    until,
)


@pytest.fixture(autouse=True, scope="module")
def undrawn():
    """Figures are blank in this process: drawing takes most of a tiny run's time."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Figure, "draw", lambda self, renderer: None)
        yield


@pytest.fixture(scope="module")
def alone(tmp_path_factory):
    """Runs of one device that was never stopped, by their keys."""
    return cache(lambda *keys: on_one(tmp_path_factory.mktemp("alone"), "run", *keys))


def evaluated(folder):
    files = {path.name: path.read_text() for path in (folder / "predictions").glob("*.jsonl")}
    return json.loads((folder / "eval" / "passkey.json").read_text())["mean"], files


@pytest.mark.slow  # test_strategy.py has its ranks in quick tests
def test_two_devices_train_and_evaluate_as_one(alone, tmp_path):
    with Training(tmp_path, "two", "eval.after_fit=true") as run:
        folder = run.finished()
    straight = alone("eval.after_fit=true")
    same_run(folder, straight)
    assert evaluated(folder) == evaluated(straight)
    files, expected = (
        sorted(
            re.sub(r"^events.*", "events", str(path.relative_to(root)))
            for path in root.rglob("*")
            if path.is_file()
        )
        for root in (folder, straight)
    )
    assert files == expected  # events: of one writer
    written = yaml.safe_load((folder / "config.yaml").read_text())["strategy"]
    assert (written["timeout"], written["sharding"]) == (TIMEOUT, "none")
    assert run.errors() == []
    assert run.out.read_text().count(f"step {STEPS}/{STEPS}") == 1


ZERO2 = "strategy.sharding=zero2"


@pytest.mark.slow
@pytest.mark.parametrize(
    "keys",
    [
        "strategy.schedule=layer_level",
        "strategy.schedule=chunk_level",
        ZERO2,
        "train.bptt_chunks=2 train.accumulate=2",
        f"train.bptt_chunks=3 {ZERO2} strategy.schedule=layer_level train.recompute=cell",
    ],
)
def test_any_schedule_sharding_and_window_trains_as_one(alone, tmp_path, keys):
    keys = keys.split()
    with Training(tmp_path, "two", "eval.after_fit=true", *keys) as run:
        folder = run.finished()
    of_training = [key for key in keys if key.startswith(("train.b", "train.a"))]
    straight = alone("eval.after_fit=true", *of_training)
    same_run(folder, straight)
    assert evaluated(folder) == evaluated(straight)


# ---- a rank that is lost


def names_it(line, rank, pid, what):
    """Whether the one line says which rank is lost, and where it was."""
    who = f"error: rank {rank} (pid {pid} on {socket.gethostname()}) {what}"
    return line.startswith(who) and line.endswith("from the last checkpoint with resume=true.")


def kill(root, victim, step, *keys):
    """Kills a rank after a step has been shown; the other ends in time and names it. Returns the
    run's folder."""
    with Training(root, "killed", *LONG, *keys) as run:
        ranks = run.at_step(step)
        os.kill(ranks[victim], signal.SIGKILL)
        assert run.ended(TIMEOUT) == (-signal.SIGKILL if victim == 0 else 1)
        (line,) = run.errors()
        assert names_it(line, victim, ranks[victim], "is gone"), line
    return run.path


def killed_and_gone_on(root, victim, *keys):
    """Loses a rank in the middle, then goes on with one device."""
    path = kill(root, victim, 10, *keys)
    last = torch.load(path / "checkpoints" / "last.ckpt", weights_only=True)
    assert 8 <= last["global_step"] < 40
    return on_one(root, "killed", *LONG, "resume=true")


@pytest.mark.slow
def test_rank_1_is_killed_and_one_device_goes_on(alone, tmp_path):
    same_run(killed_and_gone_on(tmp_path, 1), alone(*LONG))


@pytest.mark.slow
def test_rank_0_is_killed_and_one_device_goes_on_without_shards(alone, tmp_path):
    same_run(killed_and_gone_on(tmp_path, 0, "strategy.sharding=zero2"), alone(*LONG))


@pytest.mark.slow
@pytest.mark.parametrize("victim", [0, 1])
def test_a_rank_that_is_killed_at_its_first_step_is_named(tmp_path, victim):
    """Before the first second is over."""
    kill(tmp_path, victim, 1)


@pytest.mark.slow
@pytest.mark.parametrize("sharding", ["none", "zero2"])
def test_two_devices_go_on(alone, tmp_path, sharding):
    kill(tmp_path, 1, 10)
    with Training(tmp_path, "killed", *LONG, "resume=true", f"strategy.sharding={sharding}") as run:
        same_run(run.finished(), alone(*LONG))


@pytest.mark.slow
def test_two_devices_go_on_where_one_stopped(alone, tmp_path):
    with Training(tmp_path, "stopped", *LONG, on=ONE) as run:
        run.at_step(10)
        os.kill(run.main.pid, signal.SIGTERM)
        assert run.ended(TIMEOUT) == 228 + signal.SIGTERM
    with Training(tmp_path, "stopped", *LONG, "resume=true") as run:
        same_run(run.finished(), alone(*LONG))


@pytest.mark.slow
@pytest.mark.parametrize("victim", [0, 1])
def test_a_rank_that_hangs_is_named_and_ends_when_it_goes_on(tmp_path, victim):
    with Training(tmp_path, "hangs", *ENDLESS) as run:
        ranks = run.at_step(60)  # seconds: they know each other's names
        os.kill(ranks[victim], signal.SIGSTOP)
        assert run.ended(TIMEOUT, but=[ranks[victim]]) in (1, None)
        (line,) = run.errors()
        assert names_it(line, victim, ranks[victim], "has not answered for "), line
        os.kill(ranks[victim], signal.SIGCONT)
        assert run.ended(TIMEOUT) == 2
        # Its own line says that it did not run, or that the other is gone.
        assert len(run.errors()) == 2


FAULTY = """
import os, sys
import train
from comet_pl.errors import UserError, run_cli
from data.passkey import TrainingRows

class FaultyRows(TrainingRows):
    def __getitem__(self, index):
        if index == 60 and os.environ["LOCAL_RANK"] == "{rank}":
            raise UserError("row 60: cannot be read")
        return super().__getitem__(index)

import data.passkey
data.passkey.TrainingRows = FaultyRows
run_cli(train.main)
"""


@pytest.mark.slow
@pytest.mark.parametrize("victim", [0, 1])
def test_a_rank_that_fails_says_why_and_ends_the_other(tmp_path, victim):
    script = tmp_path / "faulty.py"
    script.write_text(FAULTY.format(rank=victim))
    with Training(tmp_path / "runs", "fails", *ENDLESS, script=script) as run:
        ranks = run.at_step(1)
        assert run.ended(TIMEOUT + 10) == (2 if victim == 0 else 1)
        own, named = sorted(run.errors(), key=lambda line: line.startswith(f"error: rank {victim}"))
        assert own == "error: row 60: cannot be read"
        what = "failed: UserError: row 60: cannot be read"
        assert names_it(named, victim, ranks[victim], what), named


@pytest.mark.slow
def test_a_rank_that_fails_before_it_has_met_the_other_ends_it(tmp_path):
    book = tmp_path / "book.txt"
    book.write_text("The rain in the north falls on the town. " * 500)
    with Training(tmp_path, "early", *ENDLESS, f"data.haystack={book}") as run:
        until(lambda: "starts:" in run.out.read_text(), 120, run.err)
        book.unlink()  # rank 0 has read it
        assert run.ended(60) != 0
        assert [line for line in run.errors() if line.startswith("error: ")] == [
            f"error: data.haystack: {book} cannot be read: No such file or directory"
        ]
        assert "Traceback" not in run.err.read_text()


@pytest.mark.slow
@pytest.mark.parametrize(
    ("rank", "line"),
    [
        (0, r"error: rank 1 has not started for 5\.\d s; this run ends\."),
        (
            1,
            r"error: rank 1: MASTER_ADDR and MASTER_PORT: .* cannot be reached for 5 s: Connection",
        ),
    ],
)
def test_a_rank_that_never_comes(tmp_path, monkeypatch, rank, line):
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
    variables = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": 2, "LOCAL_WORLD_SIZE": 2}
    for name, value in {**variables, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}.items():
        monkeypatch.setenv(name, str(value))
    with Training(tmp_path, "waits", *ENDLESS, "strategy.timeout=5") as run:
        if rank == 0:
            until(lambda: "starts:" in run.out.read_text(), 120, run.err)
        assert run.ended(20 if rank == 0 else 120) in (1, 2)
    (shown,) = run.errors()
    assert re.match(line, shown), shown


@pytest.mark.slow
def test_a_launched_rank_that_is_killed_before_they_meet(tmp_path):
    with Training(tmp_path, "early", *ENDLESS) as run:
        until(lambda: len(processes(run.main.pid)) == 2, 120, run.err)
        (victim,) = set(processes(run.main.pid)) - {run.main.pid}
        time.sleep(1)  # it imports
        os.kill(victim, signal.SIGKILL)
        assert run.ended(TIMEOUT) == 2
        (line,) = run.errors()
        assert line.startswith(f"error: rank 1 (pid {victim}) has ended by signal 9 before"), line


@pytest.mark.slow
def test_a_port_that_is_taken_leaves_no_process(tmp_path, monkeypatch):
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
        monkeypatch.setenv("MASTER_PORT", str(port))
        with Training(tmp_path, "taken", *ENDLESS) as run:
            assert run.ended(120) == 2
            taken = f"error: MASTER_PORT: {port}: another program has this port here; give another"
            assert run.errors() == [taken]
            assert not run.path.exists()


@pytest.mark.slow
def test_ctrl_c_stops_both_after_the_step_with_a_checkpoint(tmp_path):
    with Training(tmp_path, "x", *ENDLESS) as run:
        run.at_step(4)
        os.killpg(run.main.pid, signal.SIGINT)
        assert run.ended(TIMEOUT) == 228 + signal.SIGINT
    assert run.errors() == []
    lines = run.out.read_text().splitlines()
    assert sum("stopping after this step" in line for line in lines) == 1
    (last,) = [line for line in lines if line.startswith("stopped after step ")]
    step = torch.load(run.path / "checkpoints" / "last.ckpt", weights_only=True)["global_step"]
    saved = run.path / "checkpoints" / "last.ckpt"
    assert last.startswith(f"stopped after step {step}, saved in {saved}; go on with: ")
    assert last.endswith("run.name=x resume=true")


# ---- what is refused

MISTAKES = {
    "trainer.devices=2 strategy.pipeline_size=3": "pipeline_size: 3 given, .* is 2; allowed: 1, 2",
    "trainer.devices=4 strategy.pipeline_size=3": "pipeline_size: 3 given, .* is 4; allowed: 1, 2",
    "strategy.pipeline_size=0": "pipeline_size: 0 given, allowed: integer >= 1 or null",
    "strategy.pipeline_size=2 trainer.strategy=auto": "pipeline_size: .* is auto; it needs .*",
    "strategy.sharding=zero3": "sharding: zero3 .*data-parallel ranks.* allowed: zero2 .*, none",
    "strategy.sharding=zero22": r"sharding: 'zero22' given, .* \(did you mean zero2\?\)",
    "strategy.schedule=layer_leve": r"schedule: 'layer_leve' .* \(did you mean layer_level\?\)",
    "strategy.timeout=0": "timeout: 0 given, allowed: number > 0",
    "strategy.backend=nccl": "backend: nccl cannot send tensors of a cpu device; allowed: gloo",
}


@pytest.mark.parametrize("keys", MISTAKES)
def test_mistakes_are_one_line_before_any_group_exists(tmp_path, keys):
    with pytest.raises(UserError, match=rf"^strategy\.{MISTAKES[keys]}") as error:
        main([f"run.root={tmp_path}", "run.name=x", *KEYS, *TWO, *keys.split()])
    assert "\n" not in str(error.value)
    assert not dist.is_initialized()
    assert not list(tmp_path.iterdir())


@pytest.mark.slow
@pytest.mark.parametrize("keys", MISTAKES)
def test_mistakes_end_with_code_2_before_another_process_is_started(tmp_path, keys):
    seen = set()
    with Training(tmp_path, "x", *keys.split()) as run:
        until(lambda: seen.update(processes(run.main.pid)) or run.main.poll() is not None, 60)
        assert run.main.returncode == 2
        assert seen == {run.main.pid}
    (line,) = run.err.read_text().splitlines()
    assert line.startswith("error: strategy.")
    assert run.out.read_text() == ""
    assert not run.path.exists()


WARNING = "warning: strategy.pipeline_size: 2 ranks share a text, of which 1 chunk(s) at most "
SHORT = ["model.chunk_size=128"]  # one chunk


@pytest.mark.parametrize("keys", [SHORT, ["train.bptt_chunks=1"]])
def test_idle_ranks_are_warned_of(tmp_path, capsys, keys):
    config = load([f"run.root={tmp_path}", *KEYS, *TWO, *keys])
    build.build_trainer(config, plan_run(config), {})
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(WARNING)


@pytest.mark.slow
def test_a_rank_without_chunks_does_no_harm(alone, tmp_path):
    with Training(tmp_path, "two", *SHORT) as run:
        same_run(run.finished(), alone(*SHORT))
    (line,) = run.errors()
    assert line.startswith(WARNING)
