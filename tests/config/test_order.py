"""Keys and sections in any order, and values that no run can have."""

import pytest

from comet_pl.config.load import load
from comet_pl.errors import UserError


@pytest.mark.parametrize("first", [0, 1])
def test_a_key_and_its_section_are_both_kept(first):
    both = ["model.chunk_size=32", "model={global_size: 4}"]
    model = load([both[first], both[1 - first]]).model
    assert (model.chunk_size, model.global_size) == (32, 4)


def test_the_later_of_two_values_counts():
    assert load(["model={chunk_size: 16}", "model.chunk_size=32"]).model.chunk_size == 32
    assert load(["model.chunk_size=32", "model={chunk_size: 16}"]).model.chunk_size == 16


@pytest.mark.parametrize(
    ("arguments", "line"),
    [
        (
            ["conf=backbone/small"],
            "conf=backbone/small: holds keys of one section; write backbone=",
        ),
        (["data.length_schedule=[]"], "data.length_schedule: "),
        (["data.length_schedule=[[]]"], "data.length_schedule: "),
        (["run.name=''"], "run.name: "),
        (["run.name=" + 300 * "x"], "run.name: "),
        (["train.lr=1e300"], "train.lr: "),
        (["eval.lengths=" + 3000 * "[" + 3000 * "]"], "eval.lengths: nested too deep"),
    ],
)
def test_what_used_to_be_a_traceback_or_silent(arguments, line):
    with pytest.raises(UserError) as caught:
        load(arguments)
    assert str(caught.value).startswith(line)
