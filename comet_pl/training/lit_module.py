"""CometModule: one optimizer step a loader batch, each micro-batch walked in windows of chunks with the memory detached between them."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import nullcontext
from functools import partial
from typing import Any

import lightning
import torch
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor
from torch.optim import AdamW, Optimizer
from torch.optim.lr_scheduler import LambdaLR
from torchmetrics import SumMetric

from comet_pl.config.schema import TrainConfig
from comet_pl.errors import UserErrorOnAllRanks
from comet_pl.model.modeling_comet import CometForCausalLM
from comet_pl.training.chunk_checkpointing import read_chunks
from comet_pl.training.gate_penalty import GatePenalty
from comet_pl.training.optimization import learning_rate_factor, parameter_groups, sum_gradients
from comet_pl.training.windows import Window, count_gates, count_targets, cut_windows, split_rows


class CometModule(lightning.LightningModule):
    """Trains a CometForCausalLM.

    Optimization is Lightning's manual one: a step is a loader batch of any number of micro-batches and windows, whose gradients add up. A
    step whose gradient norm is not finite changes nothing but counts: for max_steps, for the learning rate and on the x-axis.

    Args:
        train: see its keys. max_steps: optimizer steps; the learning rate's cosine ends there.

    Raises:
        UserError: while training, after train.max_skipped skipped steps in a row.
    """

    def __init__(self, model: CometForCausalLM, train: TrainConfig, max_steps: int):
        super().__init__()
        self.automatic_optimization = False
        self.model, self.settings, self.max_steps = model, train, max_steps
        # Not a MeanMetric: one that lets NaN show (a NaN loss must) takes no notice of weights.
        self.val_sum, self.val_targets = (
            SumMetric(nan_strategy="disable"),
            SumMetric(nan_strategy="disable"),
        )
        self.skipped = self.skipped_in_a_row = 0
        self.grad_norm = 0.0  # of the last step, before clipping
        self.gate_penalty = GatePenalty.of(train)
        for memory in model.gates:
            memory.penalty = self.gate_penalty
        if train.recompute != "none":  # chunk: one at a time, and in it one cell
            model.gradient_checkpointing = True
        if train.compile:
            model.compile_cells()

    def setup(self, stage: str) -> None:
        """Tells the data which rows are this rank's, before loaders are made."""
        data = self.trainer.datamodule  # type: ignore[attr-defined]
        if hasattr(data, "world"):
            data.rank, data.world = self.data_parallel
            data.val_rank, data.val_world = (
                self.trainer.global_rank,
                self.trainer.world_size,
            )  # each rank reads whole texts
        if hasattr(data, "batches"):
            self.max_steps = min(
                self.max_steps, data.batches()
            )  # with trainer.max_epochs the data may end first

    @property
    def data_parallel(self) -> tuple[int, int]:
        """(rank, size) among those that train on different rows; the ranks of a pipeline share theirs."""
        layout = getattr(
            self.trainer.strategy, "distributed_sampler_kwargs", {"rank": 0, "num_replicas": 1}
        )
        return layout["rank"], layout["num_replicas"]

    # ---- training

    def training_step(self, batch: dict[str, Any], batch_idx: int) -> None:
        """One optimizer step.

        Args:
            batch: input_ids, attention_mask, labels (unshifted), each (B, N); chunk_sizes, resets and strides, where the data prescribe
                them (see cut_windows). B = rows a micro-batch * train.accumulate.
        """
        optimizer = self.optimizers()
        assert not isinstance(optimizer, list)
        copies = self.trainer.world_size // self.data_parallel[1]  # ranks that have the same rows
        targets = (
            int(self.sum_over_ranks(count_targets(batch))) // copies
        )  # all micro-batches and windows
        loss = torch.zeros((), device=self.device)
        micros = split_rows(batch, self.settings.accumulate)
        if self.gate_penalty is not None:
            count = sum(count_gates(self._windows(micro)) for micro in micros)
            gates = int(self.sum_over_ranks(count)) // copies * len(self.model.gates)
            dtype = torch.promote_types(self.model.dtype, torch.float32)
            self.gate_penalty.share = torch.tensor(
                self._loss_scale / max(1, gates), dtype=dtype, device=self.device
            )
        with self._no_sync():
            for micro in micros:
                loss += self._walk(micro, max(1, targets))
        self._sum_gradients(targets)
        learning_rate = optimizer.param_groups[0]["lr"]
        optimizer.step()  # clips, or clears the gradients, in on_before_optimizer_step
        optimizer.zero_grad(set_to_none=True)
        self.lr_schedulers().step()  # type: ignore[union-attr, call-arg]
        loss_value = self.sum_over_ranks(float(loss))
        self.log("train/loss", loss_value, prog_bar=True, logger=False, batch_size=1)
        if self.logs_at(self.global_step):
            values = {
                "loss": loss_value,
                "lr": learning_rate,
                "grad_norm": self.grad_norm,
                "skipped": self.skipped,
            }
            self.record({f"train/{name}": value for name, value in values.items()})
        if self.skipped_in_a_row >= self.settings.max_skipped:
            raise UserErrorOnAllRanks(
                f"train.max_skipped: the gradient norm was not finite in {self.skipped_in_a_row} steps in a row, up to step "
                f"{self.global_step}; try a smaller train.lr, more train.warmup_steps or another trainer.precision"
            )

    def _walk(self, batch: dict[str, Any], targets: int) -> Tensor:
        """Adds up a micro-batch's gradients window by window; returns its part of the loss."""
        windows = self._windows(batch)
        loss = torch.zeros((), device=self.device)
        read = getattr(self.trainer.strategy, "read", read_windows)
        if self.settings.recompute == "chunk":
            assert read is read_windows, "a pipeline's ranks keep their own chunks"
            read = partial(read_chunks, offload=self.settings.offload)
        for part in read(self.model, windows, targets):
            if part is not None:
                self.manual_backward(part)
                loss += part.detach()
        return loss

    def _windows(self, batch: dict[str, Any]) -> list[Window]:
        return cut_windows(batch, self.model.config.chunk_size, self.settings.bptt_chunks)

    @property
    def _loss_scale(self) -> float:
        """What the precision plugin multiplies losses by (16-mixed)."""
        scaler = getattr(self.trainer.precision_plugin, "scaler", None)
        return 1.0 if scaler is None else float(scaler.get_scale())

    def on_before_optimizer_step(self, optimizer: Optimizer) -> None:
        """Clips the gradients; clears them if their norm is not finite. Lightning calls this after unscaling, just before the step."""
        parameters = [
            p for group in optimizer.param_groups for p in group["params"] if p.grad is not None
        ]
        norms = [
            torch.linalg.vector_norm(p.grad, dtype=torch.promote_types(p.dtype, torch.float32))
            for p in parameters
        ]
        norm = torch.linalg.vector_norm(torch.stack(norms)) if norms else torch.zeros(())
        norm = norm.full_tensor() if hasattr(norm, "full_tensor") else norm  # of shards
        self.grad_norm = float(norm)
        finite = math.isfinite(self.grad_norm)
        self.skipped_in_a_row = 0 if finite else self.skipped_in_a_row + 1
        if not finite:
            self.skipped += 1
            rank_zero_warn(
                f"step {self.global_step + 1}: the gradient norm is {self.grad_norm}; step skipped ({self.skipped} so far)"
            )
        if (
            not finite or self.grad_norm == 0
        ):  # all gradients zero, or a batch without targets: no step by momentum alone
            for parameter in parameters:
                parameter.grad = None
        elif self.settings.clip is not None:
            torch.nn.utils.clip_grads_with_norm_(parameters, self.settings.clip, norm)

    def _sum_gradients(self, targets: int) -> None:
        """Sums the gradients over all ranks: the loss is already divided by the targets of them all."""
        parameters = [p for p in self.parameters() if p.requires_grad]
        strategy: Any = self.trainer.strategy
        if hasattr(strategy, "sum_gradients"):
            strategy.sum_gradients(parameters)
        elif self.trainer.world_size > 1 and targets:
            sum_gradients(parameters, lambda tensor: strategy.reduce(tensor, reduce_op="sum"))
        scaler = getattr(self.trainer.precision_plugin, "scaler", None)
        if scaler is not None and all(p.grad is None for p in parameters):
            scaler.scale(
                torch.zeros((), device=self.device)
            )  # it wants to have scaled a loss, and to see a gradient
            parameters[0].grad = torch.zeros_like(parameters[0])

    def _no_sync(self) -> Any:
        """Keeps DDP from averaging in each window's backward: ranks may have different numbers of windows."""
        return getattr(self.trainer.strategy, "block_backward_sync", nullcontext)()

    def sum_over_ranks(self, value: float) -> float:
        """A number summed over all ranks."""
        if self.trainer.world_size == 1:
            return value
        return float(
            self.trainer.strategy.reduce(
                torch.tensor(value, device=self.device, dtype=torch.float64), reduce_op="sum"
            )
        )

    def configure_optimizers(self) -> Any:
        """AdamW and its learning rate's course; training_step steps both once a batch."""
        train = self.settings
        groups = parameter_groups(self.model, self.model.memory_parameters(), train)
        optimizer = AdamW(groups, lr=train.lr, betas=(train.betas[0], train.betas[1]))

        def factor(
            step: int,
        ) -> float:  # a function, not an object: its numbers do not come back from a checkpoint, so max_steps may grow
            return learning_rate_factor(step, train.warmup_steps, self.max_steps, train.final_lr)

        return {"optimizer": optimizer, "lr_scheduler": LambdaLR(optimizer, factor)}

    # ---- validation

    def validation_step(
        self, batch: dict[str, Any], batch_idx: int, dataloader_idx: int = 0
    ) -> dict[str, Tensor | None]:
        """Teacher-forced loss of a batch (a sum over its targets) and, if it has "logits_to_keep", the logits of so many last columns."""
        names = (
            "input_ids",
            "attention_mask",
            "labels",
            "logits_to_keep",
            "chunk_sizes",
            "resets",
            "strides",
        )
        given = {name: batch[name] for name in names if name in batch}
        output = self.model(**given, use_cache=False, num_items_in_batch=1)
        self.val_sum.update(output.loss)
        self.val_targets.update(count_targets(batch))
        return {"loss": output.loss, "logits": output.logits}

    def on_validation_epoch_end(self) -> None:
        loss = float(self.val_sum.compute() / self.val_targets.compute())
        self.val_sum.reset()
        self.val_targets.reset()
        self.log("val/loss", loss, prog_bar=True, logger=False)
        self.record({"val/loss": loss})

    # ---- what is logged, and what a checkpoint holds

    def logs_at(self, step: int) -> bool:
        """Whether the values of a step, counted from 1, are logged."""
        return step == 1 or step % self.trainer.log_every_n_steps == 0  # type: ignore[attr-defined]

    def record(self, values: dict[str, float]) -> None:
        """Writes values to the logger at the number of steps done, skipped ones included.

        Lightning's own logging would write them only after the callbacks' hooks, too late for a checkpoint that is saved there.
        """
        if self.logger is not None:
            self.logger.log_metrics(values, step=self.global_step)

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        checkpoint["skipped"] = [self.skipped, self.skipped_in_a_row]

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        self.skipped, self.skipped_in_a_row = checkpoint["skipped"]


def read_windows(
    model: CometForCausalLM, windows: Sequence[Window], num_items: int
) -> Iterator[Tensor | None]:
    """Reads one window after the other; yields each one's loss, to be backpropagated before the next is asked for, or None."""
    cache = None
    for number, window in enumerate(windows, start=1):
        more = number < len(windows)
        with torch.set_grad_enabled(
            window.targets > 0
        ):  # a window without targets only writes the memory
            output = model(
                **window.inputs(),
                past_key_values=cache,
                use_cache=more,
                num_items_in_batch=num_items,
            )
        yield output.loss if window.targets else None
        cache = output.past_key_values.detach() if more else None
