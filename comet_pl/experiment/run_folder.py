"""A run's folder, runs/<conf>/<name>/: config.yaml (resolved), TensorBoard events, checkpoints/, eval/, predictions/."""

from __future__ import annotations

import dataclasses
import os
import shutil
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from comet_pl.config.load import to_dict
from comet_pl.config.schema import Config
from comet_pl.errors import UserError

NAME_VARIABLE = (
    "COMET_RUN_NAME"  # how Lightning's other processes learn the name that the first one chose
)
FIXED = ("seed", "model", "backbone", "data", "train")
# of the fixed sections; at most rounding changes
FREE = (
    "data.num_workers",
    "train.recompute",
    "train.offload",
    "train.compile",
    "train.max_skipped",
    "train.peak_tflops",
)


@dataclass(frozen=True)
class Run:
    """Where a run writes, and what it goes on from. step: optimizer steps that the checkpoint has done."""

    path: Path
    config: Config  # with the name filled in
    checkpoint: Path | None = None
    step: int = 0
    fresh: bool = True  # the folder is not there yet

    @property
    def checkpoints(self) -> Path:
        return self.path / "checkpoints"

    def create(self) -> None:
        """Makes the folder and writes config.yaml, atomically; rank 0 only."""
        try:
            self.path.mkdir(parents=True, exist_ok=not self.fresh)
        except OSError as error:
            raise UserError(
                f"run.root: {self.path} cannot be made: {error.strerror or error}"
            ) from None
        file = self.path / "config.yaml"
        beside = file.with_name(".config.yaml.part")
        beside.write_text(
            yaml.safe_dump(to_dict(self.config), sort_keys=False, allow_unicode=True),
            encoding="utf-8",
        )
        os.replace(beside, file)

    def discard(self) -> None:
        """Removes a folder that this run has made and never used, so that the mistake can be put right under the same name."""
        if self.fresh:
            shutil.rmtree(self.path, ignore_errors=True)


def plan_run(config: Config, rank: int = 0) -> Run:
    """The folder to write to and the checkpoint to go on from. Nothing is written.

    Args:
        rank: of this process; others than 0 take what rank 0 has chosen.

    Raises:
        UserError: the folder exists and resume is not true; or what is resumed was made with another configuration.
    """
    chosen = config.run.name or (os.environ.get(NAME_VARIABLE) if rank else None)
    if chosen is None and rank > 0:
        raise UserError(
            "run.name: missing, and several processes were started from outside; give all of them the same run.name"
        )
    folder = Path(config.run.root).expanduser() / (config.conf or "custom")
    name = chosen or _time_stamp(folder)
    os.environ[NAME_VARIABLE] = name
    config = dataclasses.replace(config, run=dataclasses.replace(config.run, name=name))
    path = folder / name
    exists = path.exists()
    if exists and not path.is_dir():
        raise UserError(f"run.name: {path} exists and is no folder")
    if exists and rank == 0 and not config.resume:
        raise UserError(
            f"run.name: {path} exists; give another run.name, or resume=true to go on with it"
        )
    checkpoint = path / "checkpoints" / "last.ckpt"
    step = 0
    if exists and config.resume:
        _check_same(path / "config.yaml", config)
        if checkpoint.exists():
            from comet_pl.experiment.checkpoint import read_checkpoint

            step = read_checkpoint(checkpoint, mmap=True)["global_step"]
    return Run(
        path,
        config,
        checkpoint if config.resume and checkpoint.exists() else None,
        step,
        fresh=not exists,
    )


def _time_stamp(folder: Path) -> str:
    stamp = name = time.strftime("%Y-%m-%d_%H-%M-%S")
    number = 1
    while (folder / name).exists():
        number += 1
        name = f"{stamp}_{number}"
    return name


def _check_same(file: Path, config: Config) -> None:
    """Refuses to go on with other numbers than the run was started with."""
    try:
        old = yaml.safe_load(file.read_text(encoding="utf-8"))
    except FileNotFoundError:  # killed before it was written
        return
    except (OSError, UnicodeDecodeError, yaml.YAMLError):
        raise UserError(
            f"{file}: cannot be read, so that it is unknown how this run was configured"
        ) from None
    if not isinstance(old, dict):
        raise UserError(f"{file}: not the configuration of a run")
    new = to_dict(config)
    for section in FIXED:
        for key, before, now in _differences(section, old.get(section), new[section]):
            if key not in FREE:
                raise UserError(
                    f"{key}: {_shown(now)} given, but {file.parent} was started with {_shown(before)}; a resumed run keeps it"
                )


def _differences(key: str, old: Any, new: Any) -> list[tuple[str, Any, Any]]:
    """(dotted key, old, new) wherever two nested dicts differ; keys that only one of them has are no difference (another version's)."""
    if isinstance(old, dict) and isinstance(new, dict):
        if old.get("kind") != new.get("kind"):
            return [(f"{key}.kind", old.get("kind"), new.get("kind"))]
        return [
            found
            for name in new
            if name in old
            for found in _differences(f"{key}.{name}", old[name], new[name])
        ]
    return [] if old == new else [(key, old, new)]


def _shown(value: Any) -> str:
    return (
        "null" if value is None else str(value).lower() if isinstance(value, bool) else str(value)
    )
