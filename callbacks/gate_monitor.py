"""gate/...: the share of the global memory's old state that is kept, by layer and chunk.

A warning says where gates no longer decide anything. Legend: L layers, T chunks of a text, n rows.
"""

import math
from pathlib import Path
from typing import Any

import lightning
import numpy as np
import torch
from lightning.pytorch.utilities import rank_zero_warn
from matplotlib.figure import Figure
from matplotlib.ticker import AutoLocator
from torch import Tensor
from torch.nn.functional import pad

from callbacks.figures import show_figure
from comet_pl.model.observer import Observer
from comet_pl.training.lit_module import CometModule

BINS = 64  # of [0, 1], in a histogram
# Mean g from which the sigmoid's slope g (1 - g) is under 1/250 of its greatest; a gate bias of 5
# starts at 0.993.
SATURATED = 0.999
PATIENCE = 5  # logged steps in a row: one text may need nothing kept, or nothing written
ADVICE = {
    "1": "nothing is written after a text's first chunk; try a smaller model.gate_bias, train.lr "
    "or train.memory_lr_factor, a smaller model.temporary_capacity, which leaves more to the "
    "global memory, train.gate_pull=0.1 or train.gate_entropy=0.01",
    "0": "nothing is kept for longer than a chunk; try model.gate_bias=3, a smaller train.lr or "
    "train.memory_lr_factor, train.gate_pull=0.1 or train.gate_entropy=0.01",
}


class GateMonitor(lightning.Callback):
    """The gates of training steps, over rows and slots; first chunks have no gate.

    Each logged step: gate/mean over all layers; gate/mean/layer_i, gate/variance/layer_i and
    gate/half_life/layer_i in chunks (absent where it is infinite). Every `every` steps: histograms
    gate/layer_i. At validations and at the end of training: the figure gate/by_chunk, mean g of the
    logged steps since the figure before. Chunk t of a text begins at its token t C, so that chunks
    of other sizes than C have a place too.

    If a layer's mean is above 0.999 or below 0.001 in five logged steps in a row, one line says so,
    in the log and as the text gate/collapsed.

    Args:
        folder: of gates.png, the last figure; None: not written.
        every: steps between histograms.
    """

    def __init__(self, folder: Path | None = None, every: int = 100):
        self.folder, self.every = folder, every
        # whether the current step is logged, and whether its histograms are drawn
        self.logs = self.draws = False
        # of the current step: number, sum and sum of squares of g, (3, L, T)
        self.step = torch.zeros(3, 0, 0)
        self.bins = torch.zeros(0, BINS)  # (L, BINS)
        # the same of the logged steps since the last figure
        self.since = torch.zeros(3, 0, 0)
        # of each layer: collapsed to "0", "1" or None; logged steps in a row; is it reported
        self.streaks: list[list[Any]] = []
        # what the current step's forward passes have shown
        self.shown: list[tuple[int, list[int], Tensor, Tensor | None]] = []
        self.watches = False

    # -- what is gathered

    def on_train_batch_start(
        self, trainer: lightning.Trainer, pl_module: Any, batch: Any, batch_idx: int
    ) -> None:
        number = trainer.global_step + 1
        self.logs, self.draws = pl_module.logs_at(number), number % self.every == 0
        layers = len(pl_module.model.gates)
        if layers and (self.logs or self.draws):
            self.step = torch.zeros(3, layers, 0, dtype=torch.float64)
            self.bins = torch.zeros(layers, BINS, dtype=torch.float64)
            self.shown, self.watches = [], True
            pl_module.model.observer = Observer(gate=self._keep)

    def _keep(self, layer: int, read: list[int], gate: Tensor) -> None:
        bins = torch.histc(gate.float(), BINS, 0, 1) if self.draws else None
        self.shown.append((layer, read, moments(gate), bins))

    def _add(self, chunk_size: int) -> None:
        """Adds up what the step's forward passes have shown. It waits for the device."""
        for layer, read, sums, bins in self.shown:
            chunks = torch.tensor(read) // chunk_size
            self.step = widen(self.step, int(chunks.max()) + 1)
            self.step[:, layer].index_add_(1, chunks, sums.cpu().double())
            if bins is not None:
                self.bins[layer] += bins.cpu()
        self.shown = []

    def on_train_batch_end(self, trainer: lightning.Trainer, pl_module: Any, *_: Any) -> None:
        if not self.watches:
            return
        self.watches, pl_module.model.observer = False, None
        self._add(pl_module.model.config.chunk_size)
        self.step, self.bins = over_ranks(self.step, pl_module), over_ranks(self.bins, pl_module)
        if self.logs and self.step[0].any():
            self._log(pl_module)
        if self.draws and trainer.is_global_zero and pl_module.logger is not None:
            for i, counts in enumerate(self.bins):
                self._histogram(pl_module, i, counts)

    # -- what is written

    def _log(self, module: CometModule) -> None:
        count, total, squares = self.step.sum(2)  # (L,) each
        means = total / count
        values = {"gate/mean": float(total.sum() / count.sum())}
        for i, mean in enumerate(means.tolist()):
            values[f"gate/mean/layer_{i}"] = mean
            values[f"gate/variance/layer_{i}"] = max(0.0, float(squares[i] / count[i]) - mean**2)
            if math.isfinite(life := half_life(mean)):
                values[f"gate/half_life/layer_{i}"] = life
            self._watch(module, i, mean)
        module.record(values)
        columns = max(self.step.shape[2], self.since.shape[2])
        before = self.since if self.since.numel() else torch.zeros_like(self.step)
        self.since = widen(before, columns) + widen(self.step, columns)

    def _watch(self, module: CometModule, layer: int, mean: float) -> None:
        while len(self.streaks) <= layer:
            self.streaks.append([None, 0, False])
        side = "1" if mean > SATURATED else "0" if mean < 1 - SATURATED else None
        before, steps, reported = self.streaks[layer]
        steps = steps + 1 if side == before else 1
        late = side is not None and steps >= PATIENCE and not reported
        self.streaks[layer] = [side, steps, reported or late]
        if late:
            step = module.global_step
            line = (
                f"step {step}: the gates of layer {layer} have collapsed to {side} "
                f"(mean {mean:.6f}, in {steps} logged steps in a row): {ADVICE[str(side)]}"
            )
            rank_zero_warn(line)
            if module.trainer.is_global_zero and module.logger is not None:
                writer = module.logger.experiment  # type: ignore[attr-defined]
                writer.add_text("gate/collapsed", line, global_step=step)

    def _histogram(self, module: CometModule, layer: int, counts: Tensor) -> None:
        if not (number := float(counts.sum())):
            return
        _, total, squares = self.step[:, layer].sum(1).tolist()
        edges = (np.arange(1, BINS + 1) / BINS).tolist()
        values = (0.0, 1.0, number, total, squares, edges, counts.tolist(), module.global_step)
        writer = module.logger.experiment  # type: ignore[union-attr]
        writer.add_histogram_raw(f"gate/layer_{layer}", *values)

    def on_validation_epoch_end(self, trainer: lightning.Trainer, pl_module: Any) -> None:
        self._draw(trainer, pl_module)

    def on_train_end(self, trainer: lightning.Trainer, pl_module: Any) -> None:
        self._draw(trainer, pl_module)

    def _draw(self, trainer: lightning.Trainer, module: CometModule) -> None:
        count, total, _ = self.since
        self.since = torch.zeros(3, 0, 0)
        if not count.any() or not trainer.is_global_zero:
            return
        figure = gate_map((total / count).numpy(), module.model.config.chunk_size)
        file = None if self.folder is None else self.folder / "gates.png"
        show_figure(module, "gate/by_chunk", figure, file)

    # -- a resumed run continues counting

    def state_dict(self) -> dict[str, Any]:
        return {"since": self.since, "runs": [list(streak) for streak in self.streaks]}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.since, self.streaks = (
            state_dict["since"],
            [list(streak) for streak in state_dict["runs"]],
        )


def half_life(mean: float) -> float:
    """Chunks until half of a slot is overwritten, at mean g in every chunk: ln 2 / -ln g."""
    return 0.0 if mean <= 0 else math.inf if mean >= 1 else math.log(2) / -math.log(mean)


def moments(g: Tensor) -> Tensor:
    """(n, m, 1 or d) -> (3, n): number, sum and sum of squares of each row's values."""
    flat = g.flatten(1).to(torch.float32 if g.device.type == "mps" else torch.float64)
    count = torch.full_like(flat[:, 0], flat.shape[1])
    return torch.stack([count, flat.sum(1), flat.square().sum(1)])


def widen(sums: Tensor, columns: int) -> Tensor:
    """(3, L, T) with room for at least `columns` chunks."""
    return pad(sums, (0, max(0, columns - sums.shape[2])))


def over_ranks(sums: Tensor, module: CometModule) -> Tensor:
    """The sum over all ranks, whose texts may differ in length: (..., T) -> (..., longest T)."""
    if module.trainer.world_size == 1:
        return sums
    reduce = module.trainer.strategy.reduce
    columns = int(reduce(torch.tensor(sums.shape[-1], device=module.device), reduce_op="max"))
    padded = pad(sums, (0, columns - sums.shape[-1])).to(module.device)
    return reduce(padded, reduce_op="sum").cpu()


def gate_map(means: np.ndarray, chunk_size: int) -> Figure:
    """Mean g by layer (y) and chunk (x).

    Args:
        means: (L, T), NaN where there was no gate, as in chunk 0.
        chunk_size: C, for the axis.
    """
    height = 1.8 + 0.22 * max(4, min(40, len(means)))
    figure = Figure(figsize=(7.5, height), layout="constrained", dpi=110)
    axes = figure.subplots()
    image = axes.imshow(means, aspect="auto", interpolation="nearest", cmap="viridis")
    axes.set_xlabel(f"chunk (text tokens read before it / {chunk_size})")
    axes.set_ylabel("layer")
    for axis in (axes.xaxis, axes.yaxis):
        locator = AutoLocator()
        locator.set_params(integer=True)
        axis.set_major_locator(locator)
    axes.set_title("Mean gate: share of the old state that a chunk keeps", fontsize=11)
    figure.colorbar(image, ax=axes, label="mean g")
    return figure
