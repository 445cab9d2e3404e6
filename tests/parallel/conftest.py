"""Processes that watch each other."""

import pytest

from tests.support.watched_ranks import ONE_NODE, TIMEOUT, Ranks


@pytest.fixture
def launch(tmp_path_factory):
    """launch(act, ...): Ranks. At the test's end none is left."""
    launched = []

    def make(act, timeout=TIMEOUT, nodes=ONE_NODE):
        launched.append(Ranks(tmp_path_factory.mktemp("ranks"), act, timeout, nodes))
        return launched[-1]

    yield make
    for process in (process for ranks in launched for process in ranks.processes):
        process.kill()  # ends a stopped one, too
        process.join(10)
