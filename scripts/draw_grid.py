"""Draws docs/images/grid_of_cells.png, the picture of the method: python -m scripts.draw_grid"""

from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import FancyArrowPatch, FancyBboxPatch

TARGET = Path(__file__).resolve().parents[1] / "docs" / "images" / "grid_of_cells.png"
INK, HIDDEN, GLOBAL, TEMPORARY, TEXT = "#222222", "#8a8f98", "#c2410c", "#0f766e", "#dbe4f0"
CHUNKS, LAYERS, WIDTH, HEIGHT, GAP_X, GAP_Y = 4, 3, 1.5, 0.72, 0.95, 0.62


def box(axes: Axes, x: float, y: float, w: float, h: float, colour: str, label: str = "") -> None:
    """A rounded box with its label."""
    style = "round,pad=0,rounding_size=0.08"
    axes.add_patch(FancyBboxPatch((x, y), w, h, boxstyle=style, fc=colour, ec=INK, lw=0.9))
    axes.text(x + w / 2, y + h / 2, label, ha="center", va="center", fontsize=9, color=INK)


def arrow(
    axes: Axes, start: tuple[float, float], end: tuple[float, float], **style: object
) -> None:
    """An arrow from start to end."""
    look = {"arrowstyle": "-|>", "mutation_scale": 11, "shrinkA": 0, "shrinkB": 0} | style
    axes.add_patch(FancyArrowPatch(start, end, **look))


def draw_grid(axes: Axes) -> None:
    """Cells (chunk t, layer i), hidden states upwards, memory to the right."""
    for t in range(CHUNKS):
        x = t * (WIDTH + GAP_X)
        names = ["chunk 1", "chunk 2", "chunk 3", "…"]
        box(axes, x, -0.95, WIDTH, 0.46, TEXT, names[t])
        arrow(axes, (x + WIDTH / 2, -0.49), (x + WIDTH / 2, 0), color=HIDDEN, lw=1.4)
        for i in range(LAYERS):
            y = i * (HEIGHT + GAP_Y)
            box(axes, x, y, WIDTH, HEIGHT, "white", f"layer {i + 1}")
            top = (x + WIDTH / 2, y + HEIGHT + (GAP_Y if i < LAYERS - 1 else 0.5))
            arrow(axes, (x + WIDTH / 2, y + HEIGHT), top, color=HIDDEN, lw=1.4)
            if t < CHUNKS - 1:
                for dy, colour in ((0.5, GLOBAL), (0.22, TEMPORARY)):
                    start, end = (x + WIDTH, y + dy), (x + WIDTH + GAP_X, y + dy)
                    arrow(axes, start, end, color=colour, lw=2.6, mutation_scale=13)
        axes.text(x + WIDTH / 2, top[1] + 0.1, "logits", ha="center", fontsize=9, color=INK)
    right = CHUNKS * (WIDTH + GAP_X) - GAP_X
    legend = [
        (GLOBAL, "global memory S"),
        (TEMPORARY, "temporary memory T"),
        (HIDDEN, "hidden states"),
    ]
    for number, (colour, label) in enumerate(legend):
        x = number * right / 2.85
        axes.plot([x, x + 0.4], [-1.5, -1.5], color=colour, lw=2.6, solid_capstyle="butt")
        axes.text(x + 0.5, -1.5, label, va="center", fontsize=9, color=INK)
    axes.set_title("The grid of cells", fontsize=12, color=INK, loc="left", pad=8)
    axes.set_xlim(-0.15, right + 0.15)
    axes.set_ylim(-1.8, LAYERS * (HEIGHT + GAP_Y) + 0.35)


def draw_cell(axes: Axes) -> None:
    """What one cell attends to, and what it writes."""
    parts = [
        (1.5, "#f3c7ae", "G", "m slots"),
        (1.9, "#b6ddd8", "T", "up to K slots"),
        (3.9, TEXT, "text and compression tokens", "C + C/s tokens"),
        (1.5, "#f3e3ae", "readout", "m tokens"),
    ]
    x, edges = 0.0, []
    for width, colour, label, below in parts:
        box(axes, x, 1.15, width, 0.75, colour, label)
        axes.text(x + width / 2, 0.92, below, ha="center", fontsize=8, color=HIDDEN)
        edges.append((x, x + width))
        x += width + 0.12
    own = (edges[2][0] + edges[3][1]) / 2
    axes.text(0, 2.2, "keys and values only", fontsize=9, color=INK)
    axes.text(own, 2.2, "causal attention, MLP", ha="center", fontsize=9, color=INK)
    axes.text(0, 2.65, "read", fontsize=10, color=INK, weight="bold")
    box(axes, edges[2][0], 3.1, 3.9, 0.66, "#b6ddd8", "T' = the last K of [T ; new]")
    box(axes, edges[3][0] - 0.55, 4.35, 2.6, 0.66, "#f3c7ae", "S' = g S + (1 - g) c")
    arrow(axes, (edges[2][0] + 1.95, 2.45), (edges[2][0] + 1.95, 3.1), color=TEMPORARY, lw=2.2)
    arrow(axes, (edges[3][0] + 0.75, 1.9), (edges[3][0] + 0.75, 4.35), color=GLOBAL, lw=2.2)
    axes.text(edges[2][0], 3.95, "compression outputs, adapted", fontsize=8, color=HIDDEN)
    axes.text(edges[3][0] - 0.55, 5.2, "gated: c = RMSNorm(R)", fontsize=8, color=HIDDEN)
    axes.text(0, 4.6, "write", fontsize=10, color=INK, weight="bold")
    axes.text(0, 4.15, "for the next chunk", fontsize=9, color=INK)
    axes.set_title("One cell: a layer on a chunk", fontsize=12, color=INK, loc="left", pad=8)
    axes.set_xlim(-0.15, x + 0.45)
    axes.set_ylim(0.5, 5.6)


def main() -> None:
    """Writes the picture."""
    figure = Figure(figsize=(12.5, 4.4), layout="constrained", dpi=130, facecolor="white")
    left, right = figure.subplots(1, 2, width_ratios=(1.05, 1))
    draw_grid(left)
    draw_cell(right)
    for axes in (left, right):
        axes.set_axis_off()
    figure.savefig(TARGET)


if __name__ == "__main__":
    main()
