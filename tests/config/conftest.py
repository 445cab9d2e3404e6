"""Conf files that a test writes."""

from pathlib import Path

import pytest


@pytest.fixture
def conf(tmp_path: Path):
    """Writes conf files: conf(passkey='...', backbone__tiny='...') and returns their folder."""

    def write(**texts: str) -> Path:
        folder = tmp_path / "conf"
        for name, text in {"base": "", "passkey": "", **texts}.items():
            path = folder / f"{name.replace('__', '/')}.yaml"
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(text, encoding="utf-8")
        return folder

    return write
