import pytest

from comet_pl.errors import UserError
from scripts import compare_speed


@pytest.mark.slow
def test_two_trees_do_the_same_work(capsys):
    compare_speed.main([str(compare_speed.ROOT), "--rounds", "2"])
    heading, *lines = capsys.readouterr().out.splitlines()
    assert "before" in heading and [line.split()[0] for line in lines] == [*compare_speed.jobs()]
    for line in lines:
        least, median, *_ = (float(figure) for figure in line.split()[1:5])
        assert 0 < least <= median


@pytest.mark.parametrize("before", ["nowhere", "tests"])
def test_no_tree(before):
    with pytest.raises(UserError, match=f"^{before}: neither a folder with comet_pl/ nor a commit"):
        compare_speed.main([before])


def test_no_rounds():
    with pytest.raises(UserError, match=r"^--rounds: 1 given"):
        compare_speed.main(["HEAD", "--rounds", "1"])
