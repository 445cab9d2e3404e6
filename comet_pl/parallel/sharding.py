"""Parameters, gradients and optimizer states in FSDP2's shards, at moments that suit a pipeline.

FSDP2 gathers and reduces at every call of a layer. Here each rank calls a layer as often as it has
chunks, and a rank in the middle of its pipeline must not wait for another. So:

- zero2: all weights are gathered when a step begins and the whole gradients reduced when it ends.
  No rank waits in between, so the shards lie on all ranks, those of a pipeline too.
- zero3: one layer's weights are whole at a time. Only ranks of the same index in their pipelines
  can gather in the middle of it, so the shards lie on the data-parallel ranks (HSDP, replicated
  along the pipeline), and all of these gather equally often.
"""

from __future__ import annotations

import warnings
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.utils._pytree import tree_leaves, tree_map_only

from comet_pl.model.modeling_comet import CometForCausalLM


class Shards:
    """A model whose parameters are DTensors between steps.

    Args:
        model: on its device; the same weights on all ranks.
        mesh: over all ranks (zero2), or pipeline x data (zero3).
        layerwise: zero3.
    """

    def __init__(self, model: CometForCausalLM, mesh: DeviceMesh, layerwise: bool):
        self.layerwise, self.device = layerwise, model.device
        self.data = mesh.get_group(mesh.ndim - 1)
        modules: list[Any] = [*model.model.layers, model]  # the last one: what is not in a layer
        self.cells, self.root = modules[:-1], modules[-1]
        self.one_by_one = layerwise  # not while all layers are gathered
        self.whole: int | None = None  # the layer whose weights are whole, one by one
        for module in modules:
            fully_shard(module, mesh=mesh, reshard_after_forward=False)
            # A plain sum: the loss is divided by all targets, and gloo knows no factors.
            module.set_gradient_divide_factor(1.0)
            module.set_force_sum_reduction_for_comms(True)
        self.root.set_requires_gradient_sync(False)
        self.root.set_reshard_after_backward(False)
        self.root._get_fsdp_state()._lazy_init()  # not at the first forward: a rank may have none
        # No code writes to them.
        views = ".*FSDP2-wrapped module .* returned a view tensor"
        warnings.filterwarnings("ignore", message=views)
        if layerwise:
            for layer, cell in enumerate(self.cells):
                cell.register_forward_hook(partial(self._visited, layer))
                # Prefetches the next layer during this one. By itself, FSDP2 follows past calls.
                cell.set_modules_to_forward_prefetch(self.cells[layer + 1 : layer + 2])
                before = self.cells[layer - 1] if layer else self.root
                cell.set_modules_to_backward_prefetch([before])

    @classmethod
    def over(cls, model: CometForCausalLM, data: int, pipeline: int, layerwise: bool) -> Shards:
        """On the mesh of data x pipeline ranks (rank d * P + p)."""
        ranks, names = torch.arange(data * pipeline), ["all"]
        if layerwise:
            ranks, names = ranks.view(data, pipeline).T, ["pipeline", "data"]
        mesh = DeviceMesh(model.device.type, ranks, mesh_dim_names=tuple(names))
        return cls(model, mesh, layerwise)

    # ---- weights

    def gather(self, all_layers: bool) -> None:
        """Makes the weights outside the layers whole, or all; every rank calls it."""
        self.one_by_one = not all_layers
        self.root.unshard()
        for cell in self.cells if all_layers else []:
            cell.unshard()

    def release(self) -> None:
        """Back to shards."""
        for module in (*self.cells, self.root):
            module.reshard()
        self.whole = None

    def _visited(self, layer: int, cell: Any, inputs: Any, outputs: Any) -> None:
        """After each forward of a cell, and before its backward: a new layer replaces the whole
        one."""
        self._enter(layer)
        for tensor in tree_leaves(outputs):
            if isinstance(tensor, Tensor) and tensor.requires_grad:
                tensor.register_hook(lambda gradient: self._enter(layer))

    def _enter(self, layer: int) -> None:
        if self.one_by_one and self.whole not in (None, layer):
            self.cells[self.whole].reshard()
        self.whole = layer

    def visit(self, times: int, backward: bool) -> None:
        """zero3: gathers all layers so many times without using them, while other data-parallel
        ranks read a span or do its backward pass."""
        order = range(len(self.cells))
        for layer in [*(reversed(order) if backward else order)] * times:
            self.cells[layer].unshard()
            self._enter(layer)

    def spare(self, ahead: list[int], back: list[int]) -> list[tuple[int, int]]:
        """zero3: for each window, how many spans more than this rank some data-parallel rank reads,
        and has a backward pass of.

        Args:
            ahead, back: this rank's spans of each window. Others may have more windows.
        """
        count = torch.tensor(len(ahead), device=self.device)
        dist.all_reduce(count, dist.ReduceOp.MAX, self.data)
        mine = torch.zeros(int(count), 2, dtype=torch.int64, device=self.device)
        mine[: len(ahead)] = torch.tensor([ahead, back]).T
        most = mine.clone()
        dist.all_reduce(most, dist.ReduceOp.MAX, self.data)
        return [(a, b) for a, b in (most - mine).tolist()]

    # ---- gradients

    def reduce(self) -> None:
        """Sums the gradients of all ranks into shards, and releases the weights."""
        groups = [
            group for module in (*reversed(self.cells), self.root) for group in self._ready(module)
        ]
        parameters = [parameter for group in groups for parameter in group.fsdp_params]
        mine = [
            p.unsharded_param.grad is not None or p.unsharded_accumulated_grad is not None
            for p in parameters
        ]
        # All ranks reduce the same parameters. One without a gradient on any rank keeps None: zeros
        # would move the optimizer's averages.
        somewhere = torch.tensor(mine, dtype=torch.uint8, device=self.device)
        dist.all_reduce(somewhere, dist.ReduceOp.MAX)
        for parameter, used, needed in zip(parameters, mine, somewhere.tolist(), strict=True):
            if needed and not used:
                parameter.unsharded_param.grad = torch.zeros_like(parameter.unsharded_param)
        self.root.set_requires_gradient_sync(True)
        for group in groups:
            group.post_backward()
            group.finalize_backward()
        self.root.set_requires_gradient_sync(False)
        self.release()

    def _ready(self, module: Any) -> list[Any]:
        """FSDP2's parameter groups of a module, which have been whole at least once."""
        state = module._get_fsdp_state()
        groups = getattr(state, "_fsdp_param_groups", None)
        groups = [state._fsdp_param_group] if groups is None else groups  # torch 2.11 has one
        parameters = [parameter for group in groups for parameter in group.fsdp_params]
        if not all(hasattr(parameter, "_unsharded_param") for parameter in parameters):
            module.unshard()  # never used so far; the same on all ranks that share its shards
        return groups


# ---- what a checkpoint holds: whole tensors, as without shards


def whole(value: Any) -> Any:
    """A state dict with every DTensor made whole, on the CPU; every rank calls it."""
    return tree_map_only(DTensor, lambda tensor: tensor.full_tensor().cpu(), value)


def sharded_optimizer_state(
    optimizer: torch.optim.Optimizer, state: dict[str, Any]
) -> dict[str, Any]:
    """An optimizer's state dict of whole tensors, cut like its parameters."""
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    ids = [number for group in state["param_groups"] for number in group["params"]]
    cut = {
        number: {name: _like(parameter, value) for name, value in state["state"][number].items()}
        for number, parameter in zip(ids, parameters, strict=True)
        if number in state["state"]
    }
    return {**state, "state": cut}


def _like(parameter: nn.Parameter, value: Any) -> Any:
    """A tensor of a parameter's shape, cut like the parameter."""
    if not isinstance(parameter, DTensor) or getattr(value, "shape", None) != parameter.shape:
        return value
    mesh, placements = parameter.device_mesh, parameter.placements
    return distribute_tensor(value.to(parameter.device), mesh, placements, src_data_rank=None)
