"""Passkey accuracy by length and depth, and its picture."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from matplotlib.figure import Figure
from torch import Tensor

from comet_pl.metrics.rows import RowMetric

Cell = dict[str, float]
"""{"length": tokens, "depth": 0 to 1, "accuracy": 0 to 1, "n": examples}"""


class PasskeyAccuracy(RowMetric):
    """Collects (length, depth, correct) of single examples; the caller decides what is correct."""

    def update(self, length: int, depths: Sequence[float], correct: Tensor) -> None:
        """Examples of one length: their depths and whether each was answered right, (B,) bool."""
        columns = [
            torch.full((len(depths),), float(length)),
            torch.as_tensor(depths),
            correct.cpu(),
        ]
        self.rows.append(torch.stack([column.double() for column in columns], 1).to(self.device))

    def compute(self) -> list[Cell]:
        """One cell a (length, depth) that was seen, in ascending order."""
        rows = self.gathered(3).numpy()
        places, inverse, counts = np.unique(
            rows[:, :2], axis=0, return_inverse=True, return_counts=True
        )
        accuracies = np.bincount(inverse.reshape(-1), weights=rows[:, 2]) / counts
        return [
            {
                "length": int(length),
                "depth": round(float(depth), 6),
                "accuracy": float(accuracy),
                "n": int(n),
            }
            for (length, depth), accuracy, n in zip(places, accuracies, counts, strict=True)
        ]


def means(cells: Sequence[Cell]) -> dict[str, float]:
    """{"<length>": accuracy over all its examples}, lengths ascending."""
    result = {}
    for length in sorted({int(cell["length"]) for cell in cells}):
        result[str(length)] = mean([cell for cell in cells if cell["length"] == length])
    return result


def mean(cells: Sequence[Cell]) -> float:
    """Accuracy over the cells' examples."""
    count = sum(cell["n"] for cell in cells)
    return sum(cell["accuracy"] * cell["n"] for cell in cells) / count


def short(length: float) -> str:
    """A length as an axis shows it: 512, 32k, 1.05M.

    A thousand is 1,024 where that is exact, else 1,000.
    """
    for unit, sizes in (("M", (2**20, 10**6)), ("k", (2**10, 10**3))):
        for size in sizes:
            if length >= size and length % size == 0:
                return f"{length // size:.0f}{unit}"
        if length >= sizes[1]:
            return f"{length / sizes[1]:.3g}{unit}"
    return f"{length:.0f}"


def heatmap(cells: Sequence[Cell], train_length: int) -> Figure:
    """Depth (y, begin of the text on top) by length (x); accuracy as colour and number.

    Args:
        cells: at least one.
        train_length: tokens, for the title.
    """
    lengths = sorted({int(cell["length"]) for cell in cells})
    depths = sorted({cell["depth"] for cell in cells})
    grid = np.full((len(depths), len(lengths)), np.nan)
    for cell in cells:
        grid[depths.index(cell["depth"]), lengths.index(int(cell["length"]))] = cell["accuracy"]
    # Figure, not pyplot: nothing is kept open, and no display is asked for
    size = (2.6 + 0.95 * max(3, len(lengths)), 1.9 + 0.36 * max(4, len(depths)))
    figure = Figure(figsize=size, layout="constrained", dpi=120)
    axes = figure.subplots()
    image = axes.imshow(grid, cmap="RdYlGn", vmin=0, vmax=1, aspect="auto")
    averages = means(cells)
    labels = [f"{short(length)}\n{averages[str(length)]:.0%}" for length in lengths]
    axes.set_xticks(range(len(lengths)), labels)
    axes.set_yticks(range(len(depths)), [f"{depth:.0%}" for depth in depths])
    axes.set_xlabel("length in tokens, mean accuracy below")
    axes.set_ylabel("depth of the passkey")
    for (y, x), accuracy in np.ndenumerate(grid):
        if not np.isnan(accuracy):
            colour = "white" if accuracy < 0.15 or accuracy > 0.85 else "black"
            style: dict[str, Any] = {"ha": "center", "va": "center", "color": colour, "fontsize": 9}
            axes.text(x, y, f"{accuracy * 100:.0f}", **style)
    axes.set_xticks(np.arange(len(lengths) + 1) - 0.5, minor=True)
    axes.set_yticks(np.arange(len(depths) + 1) - 0.5, minor=True)
    axes.grid(which="minor", color="white", linewidth=1.5)
    axes.tick_params(which="both", length=0)
    for spine in axes.spines.values():
        spine.set_visible(False)
    title = f"Passkey retrieval, trained at {train_length:,} tokens: {mean(cells):.1%} exact"
    axes.set_title(title, fontsize=11, pad=10)
    bar = figure.colorbar(image, ax=axes, ticks=[0, 0.5, 1], format=lambda value, _: f"{value:.0%}")
    bar.outline.set_visible(False)
    return figure
