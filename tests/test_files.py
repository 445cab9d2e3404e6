"""What is written appears whole or not at all."""

import pytest

from comet_pl.errors import UserError
from comet_pl.files import replace_file, replacing


def test_a_block_that_fails_leaves_what_was_there(tmp_path):
    file = tmp_path / "deep" / "file"
    replace_file(file, b"old", "out")
    # what a killed process has left
    (file.parent / ".file.part").mkdir()

    def break_off(path):
        path.write_bytes(b"half")
        raise KeyError

    with pytest.raises(KeyError), replacing(file) as beside:
        break_off(beside)
    assert file.read_bytes() == b"old"
    assert list(file.parent.iterdir()) == [file]


def test_a_file_that_cannot_be_written_is_one_line(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match=r"^out: .*/file/x cannot be written: \w"):
        replace_file(tmp_path / "file" / "x", b"", "out")
