"""Which results of former evaluations stay in the files."""

from comet_pl.evaluation import evaluate
from tests.support.evaluation import passkeys


def test_cells_of_another_haystack_are_not_kept(undrawn, tmp_path):
    haystack = tmp_path / "book.txt"
    for number, (length, kept) in enumerate([(64, [64]), (100, [64, 100]), (64, [64])]):
        haystack.write_text(("Another text. " if number == 2 else "It rained all day. ") * 200)
        keys = [f"data.haystack={haystack}", f"eval.lengths=[{length}]", "eval.depths=1"]
        cells = evaluate(*passkeys(*keys), tmp_path)["cells"]
        assert [cell["length"] for cell in cells] == kept
