"""A finished training that the tests of commands share."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.support.trained import run


@pytest.fixture(scope="session")
def trained(tmp_path_factory) -> Path:
    """The folder of a run of four steps, evaluated."""
    return run(tmp_path_factory.mktemp("runs"), "trained")
