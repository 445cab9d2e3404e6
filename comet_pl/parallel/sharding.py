"""Parameters, gradients and optimizer states cut into shards by FSDP2, at moments that suit a pipeline.

FSDP2 by itself gathers and reduces at every call of a layer. Here ranks call a layer as often as they have chunks, which differs, and a
rank in the middle of its pipeline must not wait for another. So FSDP2's own moments are switched off, and these take their place:

- zero2: all weights are gathered when a step begins and the whole gradients reduced when it ends. Nobody waits in between, so that the
  shards can lie on all ranks, those of a pipeline too.
- zero3: one layer's weights are there at a time. Gathering in the middle of a pipeline needs ranks that stand at the same place in theirs,
  so the shards lie on the data-parallel ranks (HSDP, replicated along the pipeline), and all of these gather equally often.
"""

from __future__ import annotations

import warnings
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.utils._pytree import tree_leaves

from comet_pl.model.modeling_comet import CometForCausalLM


class Shards:
    """A model whose parameters are DTensors between steps.

    Args:
        model: on its device; the same weights on all ranks. mesh: over all ranks (zero2), or pipeline x data (zero3).
        layerwise: zero3.
    """

    def __init__(self, model: CometForCausalLM, mesh: DeviceMesh, layerwise: bool):
        self.layerwise, self.data, self.device = (
            layerwise,
            mesh.get_group(mesh.ndim - 1),
            model.device,
        )
        modules: list[Any] = [*model.model.layers, model]  # the last one: what is not in a layer
        self.cells, self.root = modules[:-1], modules[-1]
        self.one_by_one = layerwise  # not while all layers are gathered
        self.here: int | None = None  # the layer whose weights are there, one by one
        for module in modules:
            fully_shard(module, mesh=mesh, reshard_after_forward=False)
            module.set_gradient_divide_factor(
                1.0
            )  # gradients are summed: the loss is already divided by all targets
            module.set_force_sum_reduction_for_comms(
                True
            )  # not by a product with 1.0, which gloo does not know
        self.root.set_requires_gradient_sync(False)
        self.root.set_reshard_after_backward(False)
        self.root._get_fsdp_state()._lazy_init()  # not at the first forward: a rank may have none
        warnings.filterwarnings(
            "ignore", message=".*FSDP2-wrapped module .* returned a view tensor"
        )  # nobody writes to it
        if layerwise:
            for layer, cell in enumerate(self.cells):
                cell.register_forward_hook(
                    lambda module, inputs, outputs, layer=layer: self._visited(layer, outputs)
                )
                # The next layer's weights come while this one works. Explicitly: left to itself, FSDP2 goes by the order of calls.
                cell.set_modules_to_forward_prefetch(
                    [self.cells[layer + 1]] if layer + 1 < len(self.cells) else []
                )
                cell.set_modules_to_backward_prefetch(
                    [self.cells[layer - 1] if layer else self.root]
                )

    @classmethod
    def over(cls, model: CometForCausalLM, data: int, pipeline: int, layerwise: bool) -> Shards:
        """On the mesh of data x pipeline ranks (rank d * P + p)."""
        kind, ranks = model.device.type, torch.arange(data * pipeline)
        if layerwise:
            return cls(
                model,
                DeviceMesh(kind, ranks.view(data, pipeline).T, mesh_dim_names=("pipeline", "data")),
                layerwise,
            )
        return cls(model, DeviceMesh(kind, ranks, mesh_dim_names=("all",)), layerwise)

    # ---- weights

    def gather(self, all_layers: bool) -> None:
        """Makes the weights outside the layers, and those of all layers, whole; every rank calls it."""
        self.one_by_one = not all_layers
        self.root.unshard()
        for cell in self.cells if all_layers else []:
            cell.unshard()

    def release(self) -> None:
        """Back to shards."""
        for module in (*self.cells, self.root):
            module.reshard()
        self.here = None

    def _visited(self, layer: int, outputs: Any) -> None:
        """After each forward of a cell: a new layer takes the place of the one before, now and when its backward pass comes."""
        self._enter(layer)
        for tensor in tree_leaves(outputs):
            if isinstance(tensor, Tensor) and tensor.requires_grad:
                tensor.register_hook(lambda gradient: self._enter(layer))

    def _enter(self, layer: int) -> None:
        if self.one_by_one and self.here not in (None, layer):
            self.cells[self.here].reshard()
        self.here = layer

    def visit(self, times: int, backward: bool) -> None:
        """zero3: gathers layer by layer for nothing, beside data-parallel ranks that have a run to read, or to go back through."""
        order = range(len(self.cells))
        for layer in [
            layer for _ in range(times) for layer in (reversed(order) if backward else order)
        ]:
            self.cells[layer].unshard()
            self._enter(layer)

    def spare(self, ahead: list[int], back: list[int]) -> list[tuple[int, int]]:
        """zero3: for each window, how many more runs than this rank some data-parallel rank has to read, and to go back through.

        Args:
            ahead, back: this rank's runs of each window. Others may have more windows.
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
        here = [
            one.unsharded_param.grad is not None or one.unsharded_accumulated_grad is not None
            for one in parameters
        ]
        for parameter, mine, somewhere in zip(
            parameters, here, used_somewhere(here, self.device), strict=True
        ):
            if somewhere and not mine:  # all ranks have to reduce the same parameters
                parameter.unsharded_param.grad = torch.zeros_like(parameter.unsharded_param)
        self.root.set_requires_gradient_sync(True)
        for group in groups:
            group.post_backward()
            group.finalize_backward()
        self.root.set_requires_gradient_sync(False)
        self.release()

    def _ready(self, module: Any) -> list[Any]:
        """FSDP2's parameter groups of a module (one; torch 2.11 has no plural), which have been whole at least once."""
        state = module._get_fsdp_state()
        found = getattr(state, "_fsdp_param_groups", None)
        groups = [state._fsdp_param_group] if found is None else found
        if not all(
            hasattr(parameter, "_unsharded_param")
            for group in groups
            for parameter in group.fsdp_params
        ):
            module.unshard()  # never used so far; the same on all ranks that share its shards
        return groups


def used_somewhere(here: list[bool], device: torch.device) -> list[bool]:
    """Which parameters have a gradient on some rank. On none, they keep none: zeros would move an optimizer's averages."""
    flags = torch.tensor(here, dtype=torch.uint8, device=device)
    dist.all_reduce(flags, dist.ReduceOp.MAX)
    return [bool(flag) for flag in flags.tolist()]


# ---- what a checkpoint holds: whole tensors, as without shards


def whole(value: Any) -> Any:
    """A state dict with every DTensor made whole, on the CPU; every rank calls it."""
    if isinstance(value, dict):
        return {key: whole(one) for key, one in value.items()}
    if isinstance(value, DTensor):
        return value.full_tensor().cpu()
    return value


def sharded_optimizer_state(
    optimizer: torch.optim.Optimizer, state: dict[str, Any]
) -> dict[str, Any]:
    """An optimizer's state dict of whole tensors, cut like its parameters."""
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    ids = [number for group in state["param_groups"] for number in group["params"]]
    cut = {
        number: {name: _like(parameter, one) for name, one in state["state"][number].items()}
        for number, parameter in zip(ids, parameters, strict=True)
        if number in state["state"]
    }
    return {**state, "state": cut}


def _like(parameter: nn.Parameter, value: Any) -> Any:
    """A tensor of a parameter's shape, cut like the parameter."""
    if (
        not isinstance(parameter, DTensor)
        or not isinstance(value, Tensor)
        or value.shape != parameter.shape
    ):
        return value
    return distribute_tensor(
        value.to(parameter.device), parameter.device_mesh, parameter.placements, src_data_rank=None
    )
