"""Passkey cells, their means, and the picture."""

import pytest
import torch

from comet_pl.metrics.passkey import PasskeyAccuracy, heatmap, means, short


def metric() -> PasskeyAccuracy:
    found = PasskeyAccuracy()
    found.update(2048, [0.0, 1.0, 0.0], torch.tensor([True, False, False]))
    found.update(1024, [0.1 + 0.2, 1.0], torch.tensor([True, True]))
    found.update(1024, [1.0], torch.tensor([False]))
    return found


CELLS = [
    {"length": 1024, "depth": 0.3, "accuracy": 1.0, "n": 1},
    {"length": 1024, "depth": 1.0, "accuracy": 0.5, "n": 2},
    {"length": 2048, "depth": 0.0, "accuracy": 0.5, "n": 2},
    {"length": 2048, "depth": 1.0, "accuracy": 0.0, "n": 1},
]


@pytest.mark.filterwarnings("ignore:The ``compute`` method")
def test_cells():
    assert metric().compute() == CELLS
    assert PasskeyAccuracy().compute() == []
    found = metric()
    found.reset()
    assert found.compute() == []


def test_means_weigh_cells_by_their_examples():
    assert means(CELLS) == {"1024": pytest.approx(2 / 3), "2048": pytest.approx(1 / 3)}


def test_the_picture_has_depth_down_and_length_across():
    figure = heatmap(CELLS, 1024)
    axes = figure.axes[0]
    assert "1,024" in axes.get_title()
    assert "50.0%" in axes.get_title()
    assert [label.get_text().split("\n")[0] for label in axes.get_xticklabels()] == ["1k", "2k"]
    assert [label.get_text() for label in axes.get_yticklabels()] == ["0%", "30%", "100%"]
    shown = {
        (int(text.get_position()[0]), int(text.get_position()[1])): text.get_text()
        for text in axes.texts
    }
    assert shown == {(0, 1): "100", (0, 2): "50", (1, 0): "50", (1, 2): "0"}


def test_short_lengths():
    assert [short(length) for length in (64, 1024, 1000, 32768, 131072, 1_000_000, 1500)] == [
        "64",
        "1k",
        "1k",
        "32k",
        "128k",
        "1M",
        "1.5k",
    ]
