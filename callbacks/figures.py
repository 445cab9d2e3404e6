"""Where a callback's figure goes."""

from __future__ import annotations

from pathlib import Path

from matplotlib.figure import Figure

from comet_pl.files import as_png, replace_file
from comet_pl.training.lit_module import CometModule


def show_figure(module: CometModule, tag: str, figure: Figure, file: Path | None = None) -> None:
    """Writes a figure to TensorBoard under its tag, and to `file`; for rank 0."""
    if file is not None:
        replace_file(file, as_png(figure), "run.root")
    if module.logger is not None:
        writer = module.logger.experiment  # type: ignore[attr-defined]
        writer.add_figure(tag, figure, global_step=module.global_step)
