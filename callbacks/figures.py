"""Where a callback's figure goes."""

from pathlib import Path

from matplotlib.figure import Figure

from comet_pl.files import as_png, show_png, try_file
from comet_pl.training.lit_module import CometModule


def show_figure(module: CometModule, tag: str, figure: Figure, file: Path | None = None) -> None:
    """Writes a figure to TensorBoard under its tag, and to `file`; for rank 0."""
    picture = as_png(figure)
    if file is not None:
        try_file(file, picture)
    if module.logger is not None:
        writer = module.logger.experiment  # type: ignore[attr-defined]
        show_png(writer, tag, picture, module.global_step)
