"""A launcher's variables that fit no configuration are a line, not half a training."""

import os
import subprocess
import sys

import pytest

from comet_pl.config.launch import check_place, check_variables
from comet_pl.errors import UserError
from tests.support.tiny_runs import ROOT, TINY


@pytest.mark.parametrize(
    ("variables", "line"),
    [
        ({"RANK": "x"}, "^RANK: 'x' given in the environment, allowed: integer >= 0; unset it"),
        ({"RANK": ""}, "^RANK: '' given"),
        ({"RANK": "-1"}, "^RANK: '-1' given"),
        ({"LOCAL_RANK": "\u0661"}, "^LOCAL_RANK: '\u0661' given"),
        ({"WORLD_SIZE": "0"}, "^WORLD_SIZE: '0' given in the environment, allowed: integer >= 1"),
        ({"WORLD_SIZE": "1.0"}, r"^WORLD_SIZE: '1\.0' given"),
        ({"NODE_RANK": "node3"}, "^NODE_RANK: 'node3' given"),
        ({"SLURM_PROCID": "a"}, "^SLURM_PROCID: 'a' given"),
        ({"MASTER_PORT": "65536"}, "^MASTER_PORT: '65536' .* allowed: integer from 0 to 65535"),
        ({"MASTER_PORT": "http"}, "^MASTER_PORT: 'http' given"),
    ],
)
def test_what_is_no_number(variables, line):
    with pytest.raises(UserError, match=line):
        check_variables(variables)


@pytest.mark.parametrize("variables", [{}, {"RANK": "0", "MASTER_PORT": "29500"}, {"HOME": "x"}])
def test_numbers_pass(variables):
    check_variables(variables)


TORCHRUN = {"RANK": "1", "LOCAL_RANK": "1", "WORLD_SIZE": "2", "MASTER_PORT": "29500"}
FOREIGN = r"given in the environment, but trainer\.devices x trainer\.num_nodes is"


@pytest.mark.parametrize(
    ("variables", "devices", "nodes", "line"),
    [
        ({"RANK": "1", "WORLD_SIZE": "2"}, 1, 1, rf"^RANK: 1 {FOREIGN} 1, allowed: 0; unset"),
        ({"RANK": "0", "WORLD_SIZE": "2"}, 1, 1, rf"^WORLD_SIZE: 2 {FOREIGN} 1; unset it"),
        (TORCHRUN, 1, 1, "^RANK: 1 given"),
        (TORCHRUN, "auto", 1, "^RANK: 1 given"),
        (TORCHRUN, [0], 1, "^RANK: 1 given"),
        (TORCHRUN, 4, 1, "^WORLD_SIZE: 2 given .* is 4"),
        (TORCHRUN, 2, 2, "^WORLD_SIZE: 2 given .* is 4"),
        ({**TORCHRUN, "RANK": "2"}, 2, 1, "^RANK: 2 .* is 2, allowed: 0 to 1"),
        ({"LOCAL_RANK": "2"}, 2, 2, "^LOCAL_RANK: 2 given .* is 4, allowed: 0 to 1"),
        ({"SLURM_PROCID": "1"}, 1, 1, "^SLURM_PROCID: 1 given .* is 1, allowed: 0"),
        ({"RANK": "0"}, 2, 1, "^LOCAL_RANK: missing in the environment beside RANK"),
        ({"RANK": "0", "LOCAL_RANK": "0"}, 2, 1, "^MASTER_PORT: missing in the environment"),
    ],
)
def test_a_foreign_launcher(variables, devices, nodes, line):
    with pytest.raises(UserError, match=line):
        check_place(devices, nodes, 1, variables)


@pytest.mark.parametrize(
    ("variables", "devices", "nodes", "available"),
    [
        ({}, 8, 2, 1),
        ({"WORLD_SIZE": "4"}, 1, 1, 1),  # without a place nobody reads it
        ({"RANK": "0", "WORLD_SIZE": "1"}, 1, 1, 1),
        (TORCHRUN, 2, 1, 1),
        (TORCHRUN, "auto", 1, 2),
        (TORCHRUN, -1, 1, 2),
        (TORCHRUN, [3, 5], 1, 8),
        (TORCHRUN, "3,5", 1, 8),
        (TORCHRUN, 1, 2, 1),
        ({"LOCAL_RANK": "0", "MASTER_PORT": "1"}, 2, 1, 1),  # Lightning's launcher leaves it
        ({"SLURM_PROCID": "0"}, 2, 1, 1),
    ],
)
def test_the_launcher_that_is_meant(variables, devices, nodes, available):
    if variables is TORCHRUN and (devices, nodes) == (1, 2):
        variables = {**TORCHRUN, "LOCAL_RANK": "0"}
    check_place(devices, nodes, available, variables)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("variables", "script", "line"),
    [
        ({"RANK": "x"}, "train.py", "error: RANK: 'x' given"),
        ({"RANK": "x"}, "eval.py", "error: RANK: 'x' given"),
        ({"RANK": "1", "WORLD_SIZE": "2"}, "train.py", "error: RANK: 1 given"),
    ],
)
def test_the_commands_say_it_in_a_line(tmp_path, variables, script, line):
    (tmp_path / "config.json").write_text("{}")
    keys = [f"ckpt={tmp_path}"] if script == "eval.py" else [f"run.root={tmp_path / 'r'}", *TINY]
    ended = subprocess.run(
        [sys.executable, script, *keys, *["trainer.devices=1"] * (script == "train.py")],
        cwd=ROOT,
        env=os.environ | variables,
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert ended.returncode == 2 and ended.stderr.count("\n") == 1
    assert ended.stderr.startswith(line) and not (tmp_path / "r").exists()
