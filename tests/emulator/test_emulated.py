"""What a GPU would be asked to do, without one: torch's CUDA build over a runtime whose kernels do
nothing. Launches, waits and bytes are real; numbers and times are not.

Needs gcc, g++, the CUDA toolkit's headers and a Python with a CUDA build of torch and this
project's other packages: the variable COMET_CUDA_PYTHON names it, if this one has none.
"""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parents[2]
pytestmark = pytest.mark.slow


@pytest.fixture(scope="session")
def python():
    found = os.environ.get("COMET_CUDA_PYTHON") or (sys.executable if torch.version.cuda else None)
    if found is None:
        pytest.skip("no CUDA build of torch: COMET_CUDA_PYTHON names no Python that has one")
    return found


@pytest.fixture(scope="session")
def folder(python, tmp_path_factory):
    """The emulator, built."""
    out = tmp_path_factory.mktemp("gpu")
    if not (shutil.which("gcc") and shutil.which("g++")):
        pytest.skip("no gcc and g++")
    build = ["bash", str(Path(__file__).parent / "build.sh"), python, str(out)]
    done = subprocess.run(build, capture_output=True, text=True)
    if done.returncode == 2:
        pytest.skip(done.stderr.strip())
    assert done.returncode == 0, done.stderr
    return out


@pytest.fixture(scope="session")
def measure(python, folder):
    """Runs one of measure.py's functions in a process on the emulated GPU."""

    def run(name, **job):
        more = {
            "EMULATED_GPU": str(folder),
            "LD_PRELOAD": str(folder / "cudart.so"),
            "LD_LIBRARY_PATH": f"{folder}:{os.environ.get('LD_LIBRARY_PATH', '')}",
            "PYTHONPATH": str(ROOT),
            "HF_HUB_OFFLINE": "1",
        }
        word = json.dumps({"measure": name} | job)
        argv = [python, "-m", "tests.emulator.measure", word]
        env = os.environ | more
        done = subprocess.run(argv, cwd=ROOT, env=env, capture_output=True, text=True, timeout=900)
        assert done.returncode == 0, done.stderr[-3000:]
        return json.loads(done.stdout.splitlines()[-1])

    return run


FLASH, SPLIT, EFFICIENT = "flash_fwd_kernel", "flash_fwd_splitkv_kernel", "fmha_cutlass"


def test_a_closing_cell(measure):
    """97 launches before norms were fused and slots were projected with the chunk; of a chunk's
    waits one is left, for the check of its ids."""
    found = measure("reading", shape="4B")
    assert found["cell"]["launches"] <= 50 and found["cell"]["waits"] == 0
    assert found["rest"]["waits"] <= 1
    assert any(FLASH in name for name in found["names"])


def test_a_decoded_token(measure):
    """Nine waits before, and 57 launches a cell."""
    found = measure("decoding", shape="4B")
    assert found["cell"]["launches"] <= 30 and found["cell"]["waits"] == 0
    assert any(SPLIT in name for name in found["names"])
    # The mask that a caller gives is looked at; generate gives none after the prompt.
    assert found["rest"]["waits"] <= 1
    found = measure("generating", shape="4B")
    assert found["waits"] <= 1  # the sampler's
    assert not any("isin" in name or "nonzero" in name for name in found["names"])


@pytest.mark.parametrize(
    ("dtype", "ragged", "own", "kernel"),
    [
        ("bfloat16", False, 2816, FLASH),
        ("bfloat16", False, 1, SPLIT),
        ("float16", False, 2816, FLASH),
        ("float32", False, 2816, EFFICIENT),
        ("float32", False, 1, EFFICIENT),
        ("bfloat16", True, 2816, EFFICIENT),
        ("bfloat16", True, 1, EFFICIENT),
        ("float32", True, 2816, EFFICIENT),
    ],
)
@pytest.mark.parametrize("past", [0, 2560])
def test_attention_never_writes_all_scores(dtype, ragged, own, kernel, past, measure):
    shape = {"past": past, "own": own, "heads": 32, "groups": 8}
    found = measure("attention", dtype=dtype, ragged=ragged, **shape)
    kernel = FLASH if kernel == SPLIT and not past else kernel  # one key is not split
    assert any(kernel in name for name in found["names"]), found["names"]
    assert not any("softmax" in name.lower() for name in found["names"])
    scores = 2 * 32 * own * (past + own) * (4 if dtype == "float32" else 2) / 2**30
    # Keys and values of all heads, the output, and a mask as numbers.
    assert own == 1 or found["peak"] < 0.5 * scores


def test_cells_compile_whole(measure):
    """No graph break on CUDA: reading, decoding and a backward pass."""
    assert measure("compiled")["graphs"] >= 4


LIMIT = 75  # GiB, of a card that has 80


@pytest.mark.parametrize("tokens", [32768, 131072])
def test_all_weights_of_4b_train_on_one_card(tokens, measure):
    found = measure("step", shape="4B", tokens=tokens, recompute="chunk")
    assert found["ok"] and found["peak"] < LIMIT, found
    # What the boundaries need, little more: states, and entries once.
    needed = 36 * (tokens // 2048) * (512 + 256) * 2560 * 4 / 2**30
    assert found["pinned"] < 1.15 * needed + 0.3


def test_the_memory_of_4b_trains_on_128k_tokens_cell_by_cell(measure):
    job = {"recompute": "cell", "parameters": "memory"}
    found = measure("step", shape="4B", tokens=131072, **job)
    assert found["ok"] and found["peak"] < LIMIT, found


def test_the_emulator_runs_out_of_memory_where_a_card_would(measure):
    found = measure("step", shape="4B", tokens=32768, recompute="none", layers=8)
    assert not found["ok"]


KEYS = """
trainer.accelerator=gpu trainer.max_steps=3 data.train_length=512 data.length_schedule=null
data.batch_size=2 data.val_examples=1 eval.lengths=[512] eval.examples=1 eval.depths=2
checkpoint.every_steps=2
""".split()


@pytest.mark.parametrize(
    "more",
    [
        ["trainer.precision=32-true"],
        ["trainer.precision=bf16-mixed", "train.recompute=chunk"],
        ["trainer.precision=bf16-true", "train.recompute=cell"],
        ["trainer.precision=bf16-mixed", "train.parameters=memory"],
        ["trainer.precision=bf16-mixed", "trainer.strategy=layer_pipeline"],
    ],
    ids=" ".join,
)
def test_train_runs_to_its_end(more, measure, tmp_path):
    """No tensor on another device than its operation's; all callbacks, checkpoints, evaluation."""
    argv = ["train", "conf=passkey", *KEYS, *more, f"run.root={tmp_path}", "run.name=a"]
    measure("command", argv=argv)
    assert (tmp_path / "passkey" / "a" / "eval" / "passkey.json").exists()
    argv = ["eval", f"ckpt={tmp_path / 'passkey' / 'a'}", f"out={tmp_path / 'out'}"]
    measure("command", argv=argv)
    assert (tmp_path / "out" / "eval" / "passkey.json").exists()
