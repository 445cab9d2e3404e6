import pytest

from data.behavior.events import Log
from data.behavior.read_log import read_log
from tests.data.behavior.logs import ITEMS, ROWS, write


@pytest.fixture(scope="session")
def log(tmp_path_factory: pytest.TempPathFactory) -> Log:
    root = tmp_path_factory.mktemp("log")
    write(root / "events.jsonl", ROWS)
    write(root / "items.jsonl", ITEMS)
    return read_log(root)
