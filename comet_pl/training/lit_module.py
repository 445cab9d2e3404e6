"""CometModule: one optimizer step a loader batch, read in windows of chunks."""

import math
from collections.abc import Mapping
from functools import partial
from typing import Any, Protocol, runtime_checkable

import lightning
import torch
from lightning.pytorch.plugins.precision import MixedPrecision
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor
from torch.optim import AdamW, Optimizer
from torch.optim.lr_scheduler import LambdaLR
from torchmetrics import SumMetric

from comet_pl.config.schema import TrainConfig
from comet_pl.errors import UserErrorOnAllRanks
from comet_pl.model.configuration_comet import wide
from comet_pl.model.modeling_comet import CometForCausalLM
from comet_pl.training.chunk_checkpointing import read_chunks
from comet_pl.training.distillation import Distillation
from comet_pl.training.gate_penalty import GatePenalty, count_gates
from comet_pl.training.optimization import learning_rate_factor, parameter_groups
from comet_pl.training.text_reader import Read, TextReader, WindowReader, read_windows
from comet_pl.training.windows import Window, count_targets, cut_windows, split_rows

FORWARD = ("input_ids", "attention_mask", "labels", "plans", "logits_to_keep")  # of a batch


@runtime_checkable
class FiniteData(Protocol):
    """Data that may end before max_steps."""

    def resume(self, place: Mapping[str, int]) -> None:
        """Takes the place that the training loader of a checkpoint had."""
        ...

    def batches(self) -> int:
        """Batches of the whole training on each rank, those before the place included."""
        ...


class CometModule(lightning.LightningModule):
    """Trains a CometForCausalLM.

    Optimization is manual in Lightning's sense: a step is a loader batch of any number of
    micro-batches and windows, whose gradients add up. A step whose gradient norm is not finite
    changes no weight, but it counts for max_steps, for the learning rate and on the x-axis.

    Args:
        max_steps: optimizer steps; the learning rate's cosine ends there.

    Raises:
        UserError: while training, after train.max_skipped skipped steps in a row.
    """

    def __init__(self, model: CometForCausalLM, train: TrainConfig, max_steps: int):
        super().__init__()
        self.automatic_optimization = False
        self.model, self.settings, self.max_steps = model, train, max_steps
        # Not a MeanMetric: one that lets NaN through, as a NaN loss needs, ignores weights.
        self.val_sum = SumMetric(nan_strategy="disable")
        self.val_targets = SumMetric(nan_strategy="disable")
        self.skipped = self.skipped_in_a_row = 0
        self.grad_norm = 0.0  # of the last step, before clipping
        self.windows: list[list[Window]] = []  # of the last step: of each micro-batch
        self.gate_penalty = GatePenalty.of(train)
        for memory in model.gates:
            memory.penalty = self.gate_penalty
        self.distillation = Distillation.of(model, train)
        if train.recompute != "none":  # within a chunk that is read again, cell by cell
            model.gradient_checkpointing = True
        if train.compile:
            model.compile_cells()

    def setup(self, stage: str) -> None:
        strategy = self.trainer.strategy
        data = self.trainer.datamodule  # type: ignore[attr-defined]
        read: Read = read_windows
        if self.settings.recompute == "chunk":
            gpu = strategy.root_device.type == "cuda"
            offload = gpu if self.settings.offload is None else self.settings.offload
            read = partial(read_chunks, offload=offload)
        self.reader: TextReader = (
            strategy if isinstance(strategy, TextReader) else WindowReader(strategy, read)
        )
        if isinstance(data, FiniteData):
            self.limits = self.max_steps, self.trainer.max_steps
            self._end_with(data)

    def _end_with(self, data: FiniteData) -> None:
        """Ends training and cosine where the data end, if that is before max_steps.

        A pass of a loader is the whole training, and Lightning counts it as one epoch. By steps, a
        run that has ended can grow; by epochs it could not.
        """
        batches = data.batches()
        own, trainers = (min(batches, limit) if limit >= 0 else batches for limit in self.limits)
        self.max_steps, self.trainer.fit_loop.epoch_loop.max_steps = own, trainers

    # ---- training

    def training_step(self, batch: dict[str, Any], batch_idx: int) -> None:
        """One optimizer step on a batch as cut_windows takes it."""
        optimizer = self.optimizers()
        assert not isinstance(optimizer, list)
        train, chunk_size = self.settings, self.model.config.chunk_size
        self.windows = [
            cut_windows(micro, chunk_size, train.bptt_chunks)
            for micro in split_rows(batch, train.accumulate)
        ]
        targets = self._over_texts(sum(w.targets for windows in self.windows for w in windows))
        targets = max(1, targets)
        if self.gate_penalty is not None:
            self.gate_penalty.share = self._gate_share()
        # Not in Lightning's default dtype, which is bfloat16 under bf16-true.
        loss = torch.zeros((), dtype=wide(self.model.dtype), device=self.device)
        if self.distillation is not None:
            self.distillation.begin_step(self.device)
        with self.reader.block_backward_sync():
            for windows in self.windows:
                if self.distillation is not None:
                    windows = self.distillation.teach(windows)
                part = torch.zeros_like(loss)
                for window_loss in self.reader.read(self.model, windows, targets):
                    if window_loss is not None:
                        self.manual_backward(window_loss)
                        part += window_loss.detach()
                loss += part
        self._sum_gradients()
        learning_rate = optimizer.param_groups[0]["lr"]
        optimizer.step()  # clips or clears the gradients, in on_before_optimizer_step
        optimizer.zero_grad(set_to_none=True)
        self.lr_schedulers().step()  # type: ignore[union-attr]
        self._log_step(self.sum_over_ranks(float(loss)), learning_rate, targets)
        if self.skipped_in_a_row >= train.max_skipped:
            raise UserErrorOnAllRanks(
                f"train.max_skipped: the gradient norm was not finite in {self.skipped_in_a_row} "
                f"steps in a row, up to step {self.global_step}; try a smaller train.lr, more "
                "train.warmup_steps or another trainer.precision"
            )

    def _gate_share(self) -> Tensor:
        """Of one gate in the penalty's mean over the step, times the loss's scale."""
        gates = self._over_texts(sum(map(count_gates, self.windows))) * len(self.model.gates)
        scale = 1.0 if self._scaler is None else float(self._scaler.get_scale())
        dtype = wide(self.model.dtype)
        return torch.tensor(scale / max(1, gates), dtype=dtype, device=self.device)

    def _sum_gradients(self) -> None:
        """Sums the gradients over all ranks: the loss is already divided by all their targets."""
        parameters = [p for p in self.parameters() if p.requires_grad]
        self.reader.sum_gradients(parameters)
        if self._scaler is not None and all(p.grad is None for p in parameters):
            # The scaler needs a scaled loss and a gradient even from a step without targets.
            self._scaler.scale(torch.zeros((), device=self.device))
            parameters[0].grad = torch.zeros_like(parameters[0])

    def on_before_optimizer_step(self, optimizer: Optimizer) -> None:
        """Clips the gradients, unscaled by now; clears them if their norm is not finite."""
        groups = optimizer.param_groups
        parameters = [p for group in groups for p in group["params"] if p.grad is not None]
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
                f"step {self.global_step + 1}: the gradient norm is {self.grad_norm}; "
                f"step skipped ({self.skipped} so far)"
            )
        # Gradients of zero mean a batch without targets: momentum alone makes no step.
        if not finite or self.grad_norm == 0:
            for parameter in parameters:
                parameter.grad = None
        elif self.settings.clip is not None:
            torch.nn.utils.clip_grads_with_norm_(parameters, self.settings.clip, norm)

    @property
    def _scaler(self) -> torch.amp.GradScaler | None:
        """Scales losses under 16-mixed."""
        plugin = self.trainer.precision_plugin
        return plugin.scaler if isinstance(plugin, MixedPrecision) else None

    @property
    def _fused(self) -> bool | None:
        """Whether AdamW runs as one kernel: on a GPU, where others need a copy of all weights; but
        Lightning's scaler would leave a fused one's gradients to be unscaled after clipping."""
        cuda = self.trainer.strategy.root_device.type == "cuda"
        return True if cuda and self._scaler is None else None

    def sum_over_ranks(self, value: float) -> float:
        if self.trainer.world_size == 1:
            return value
        tensor = torch.tensor(value, device=self.device, dtype=torch.float64)
        return float(self.trainer.strategy.reduce(tensor, reduce_op="sum"))

    def _over_texts(self, count: int) -> int:
        """A count summed over data-parallel ranks; the ranks of a pipeline have the same one."""
        copies = self.trainer.world_size // self.reader.shard[1]
        return int(self.sum_over_ranks(count)) // copies

    def configure_optimizers(self) -> Any:
        """AdamW and its learning rate's schedule; training_step steps both once a batch."""
        train = self.settings
        groups = parameter_groups(self.model, self.model.memory_parameters(), train)
        betas = train.betas[0], train.betas[1]
        optimizer = AdamW(groups, lr=train.lr, betas=betas, fused=self._fused)

        # A checkpoint does not restore a function's numbers: max_steps may grow.
        def factor(step: int) -> float:
            return learning_rate_factor(step, train.warmup_steps, self.max_steps, train.final_lr)

        return {"optimizer": optimizer, "lr_scheduler": LambdaLR(optimizer, factor)}

    # ---- validation

    def validation_step(
        self, batch: dict[str, Any], batch_idx: int, dataloader_idx: int = 0
    ) -> dict[str, Tensor | None]:
        """The loss summed over a batch's targets, and the logits of its last
        batch["logits_to_keep"] columns if it has that key."""
        inputs = {name: batch[name] for name in FORWARD if name in batch}
        inputs["loss_only"] = "logits_to_keep" not in batch
        output = self.model(**inputs, use_cache=False, num_items_in_batch=1)
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

    def _log_step(self, loss: float, learning_rate: float, targets: int) -> None:
        self.log("train/loss", loss, prog_bar=True, logger=False, batch_size=1)
        if self.logs_at(self.global_step):
            values = {"train/loss": loss, "train/lr": learning_rate}
            if self.distillation is not None:
                values["train/kl"] = self.sum_over_ranks(float(self.distillation.kl)) / targets
            self.record(values | {"train/grad_norm": self.grad_norm, "train/skipped": self.skipped})

    def logs_at(self, step: int) -> bool:
        """Whether the values of a step, counted from 1, are logged."""
        return step == 1 or step % self.trainer.log_every_n_steps == 0  # type: ignore[attr-defined]

    def record(self, values: dict[str, float]) -> None:
        """Writes values to the logger at the number of steps done, skipped ones included.

        Lightning's own logging writes them only after the callbacks' hooks, too late for a
        checkpoint that is saved there.
        """
        if self.logger is not None:
            self.logger.log_metrics(values, step=self.global_step)

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        checkpoint["skipped"] = [self.skipped, self.skipped_in_a_row]

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        self.skipped, self.skipped_in_a_row = checkpoint["skipped"]
        if self._trainer is None:
            return  # load_from_checkpoint
        self._resume_data(checkpoint)
        for state in checkpoint.get("optimizer_states", []):
            for group in state["param_groups"]:
                group["fused"] = self._fused  # this device's, not that of the run so far

    def _resume_data(self, checkpoint: Mapping[str, Any]) -> None:
        """Tells the data where their loader was."""
        data = self.trainer.datamodule  # type: ignore[attr-defined]
        loop = checkpoint.get("loops", {}).get("fit_loop", {}).get("state_dict", {})
        for place in loop.get("combined_loader", []):
            # A batch is a step; loaders of before this key counted rows alone.
            place.setdefault("given", checkpoint["global_step"])
            if isinstance(data, FiniteData):
                data.resume(place)
                self._end_with(data)
