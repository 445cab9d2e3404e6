"""Set up for every test: one thread a process, reproducible hypothesis runs, GPU tests only where
there is a GPU."""

import os
import signal
from pathlib import Path

# Also in the processes that tests start; must precede torch's import.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("MPLBACKEND", "Agg")

import pytest
import torch
from hypothesis import settings

torch.set_num_threads(1)

# `make test` draws the same examples every time; `make test-full` (HYPOTHESIS_PROFILE=wide) draws
# new and more ones. A test that sets max_examples itself keeps its number in both.
settings.register_profile("project", deadline=None, derandomize=True, max_examples=25)
settings.register_profile("wide", deadline=None, max_examples=200, print_blob=True)
settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "project"))

ROOT = Path(__file__).resolve().parents[1]

# What tests start listens to these, also where nohup or & has started the tests.
signal.signal(signal.SIGHUP, signal.SIG_DFL)
if signal.getsignal(signal.SIGINT) == signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if not torch.cuda.is_available():
        for item in items:
            if item.get_closest_marker("gpu"):
                item.add_marker(pytest.mark.skip(reason="needs a CUDA device"))


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """../shared/data beside the project; tests that need real data skip where it is absent."""
    folder = ROOT.parent / "shared" / "data"
    if not folder.is_dir():
        pytest.skip(f"no real data: {folder} is absent")
    return folder


@pytest.fixture(scope="session")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a finished training of four steps, evaluated."""
    from tests.support.trained import run

    return run(tmp_path_factory.mktemp("runs"), "trained")
