"""Which results of former evaluations stay in the files."""

import json

import pytest

from comet_pl.evaluation import evaluate
from tests.support.evaluation import passkeys


def test_cells_of_another_haystack_are_not_kept(undrawn, tmp_path):
    haystack = tmp_path / "book.txt"
    for number, (length, kept) in enumerate([(64, [64]), (100, [64, 100]), (64, [64])]):
        haystack.write_text(("Another text. " if number == 2 else "It rained all day. ") * 200)
        keys = [f"data.haystack={haystack}", f"eval.lengths=[{length}]", "eval.depths=1"]
        cells = evaluate(*passkeys(*keys), tmp_path)["cells"]
        assert [cell["length"] for cell in cells] == kept


DAMAGES = ["[1]", "3", '"x"', "", '{"cells": 3}', '[["a", 1]]', "{}"]


@pytest.mark.parametrize("content", DAMAGES)
@pytest.mark.parametrize("name", ["eval/passkey.json", "predictions/passkey.jsonl"])
def test_damaged_results_of_before_are_made_anew(undrawn, tmp_path, name, content):
    given = passkeys("eval.lengths=[64]", "eval.depths=1")
    evaluate(*given, tmp_path)
    (tmp_path / name).write_text(content)
    cells = evaluate(*passkeys("eval.lengths=[100]", "eval.depths=1"), tmp_path)["cells"]
    assert cells[-1]["length"] == 100


@pytest.mark.parametrize("cells", [3, [3], [{}], [{"length": "x"}]])
def test_damaged_cells_of_the_same_weights_are_left_out(undrawn, tmp_path, cells):
    given = passkeys("eval.lengths=[64]", "eval.depths=1")
    values = evaluate(*given, tmp_path)
    (tmp_path / "eval" / "passkey.json").write_text(json.dumps(values | {"cells": cells}))
    found = evaluate(*passkeys("eval.lengths=[100]", "eval.depths=1"), tmp_path)["cells"]
    assert [cell["length"] for cell in found] == [100]
