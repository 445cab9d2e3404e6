"""The variables in which torchrun, srun and mpirun tell a process its place among others.

Lightning believes them before it has seen a configuration; left over from another program, they
make a training of one device the second of two, which logs and saves nothing.
"""

import os
from collections.abc import Mapping
from typing import Any

from comet_pl.errors import UserError

# The first that is set counts, for Lightning too.
PLACES = ("RANK", "LOCAL_RANK", "SLURM_PROCID", "JSM_NAMESPACE_RANK")
COUNTS = ("WORLD_SIZE", "LOCAL_WORLD_SIZE")
OTHERS = ("NODE_RANK", "GROUP_RANK", "SLURM_LOCALID", "SLURM_NODEID")
PORTS = ("MASTER_PORT", "STANDALONE_PORT")
HOW = "unset it, unless a launcher has set it"
OR = "unset it, or give as many as were started"


def check_variables(variables: Mapping[str, str] = os.environ) -> None:
    """Raises UserError, naming the variable, for what is no number."""
    limits: dict[str, tuple[int, int | None]] = dict.fromkeys((*PLACES, *OTHERS), (0, None))
    limits |= dict.fromkeys(COUNTS, (1, None)) | dict.fromkeys(PORTS, (0, 65535))
    for name, (low, high) in limits.items():
        text = variables.get(name)
        if text is None:
            continue
        number = int(text) if text.isascii() and text.isdigit() else -1
        if number < low or (high is not None and number > high):
            allowed = f"integer >= {low}" if high is None else f"integer from {low} to {high}"
            raise UserError(f"{name}: {text!r} given in the environment, allowed: {allowed}; {HOW}")


def check_place(
    devices: Any, nodes: int, available: int, variables: Mapping[str, str] = os.environ
) -> None:
    """Refuses the variables of a launcher that has started other processes than the configuration
    asks for.

    Args:
        devices: trainer.devices. nodes: trainer.num_nodes.
        available: devices that auto stands for.

    Raises:
        UserError: naming the variable.
    """
    name = next((name for name in PLACES if name in variables), None)
    if name is None:
        return
    local = _count(devices, available)
    world = local * nodes
    asked = f"trainer.devices x trainer.num_nodes is {world}"
    limit = local if name == "LOCAL_RANK" else world
    if int(variables[name]) >= limit:
        allowed = f"0 to {limit - 1}" if limit > 1 else "0"
        raise UserError(
            f"{name}: {variables[name]} given in the environment, but {asked}, allowed: {allowed}; "
            f"{OR}"
        )
    if not name.endswith("RANK") or name.startswith("JSM"):
        return  # a scheduler's; Lightning compares the rest
    size = variables.get("WORLD_SIZE")
    if size is not None and int(size) != world:
        raise UserError(f"WORLD_SIZE: {size} given in the environment, but {asked}; {OR}")
    needed = ("LOCAL_RANK", "MASTER_PORT") if world > 1 else ()
    for missing in needed:
        if missing not in variables:
            raise UserError(
                f"{missing}: missing in the environment beside {name}, by which the {world} "
                f"processes find each other; unset {name}, or start them with torchrun"
            )


def _count(devices: Any, available: int) -> int:
    """Devices on this machine."""
    if isinstance(devices, list):
        return len(devices)
    if isinstance(devices, str) and "," in devices:
        return len([part for part in devices.split(",") if part.strip()])
    text = str(devices)
    return int(text) if text.isdigit() else available
