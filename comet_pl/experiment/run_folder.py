"""A run's folder, runs/<conf>/<name>/.

It holds config.yaml (resolved), TensorBoard events, checkpoints/, monitor/, eval/, predictions/.
"""

import dataclasses
import os
import shutil
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

import yaml

from comet_pl.config.load import to_dict, upgraded
from comet_pl.config.schema import DATA_KINDS, Config
from comet_pl.errors import UserError
from comet_pl.experiment.checkpoint import check_resumable, read_checkpoint
from comet_pl.experiment.lock import lock_folder, release
from comet_pl.files import replacing

# Lightning's other processes learn from it the name that the first one chose.
NAME_VARIABLE = "COMET_RUN_NAME"
CHECKPOINTS = ("last.ckpt", "best.ckpt")  # the first of them resumes
FIXED = ("seed", "model", "backbone", "data", "train")
# Of the fixed sections; at most rounding changes, or what validation shows.
FREE = (
    "data.num_workers",
    "data.cache",
    "data.on_error",  # where raise reads on, skip reads the same
    "data.val_examples",
    "data.val_depths",
    "data.val_lengths",
    "train.recompute",
    "train.offload",
    "train.compile",
    "train.max_skipped",
    "train.peak_tflops",
)

# Where things are. What is there has to be the same, which comet_pl/experiment/same_run.py sees to.
PATHS = ("data.root", "data.items", "data.haystack", "backbone.path")


@dataclass(frozen=True)
class Run:
    """Where a run writes, and what it resumes from."""

    path: Path
    config: Config  # with the name filled in
    checkpoint: Path | None = None
    step: int = 0  # optimizer steps that the checkpoint has done
    fresh: bool = True  # the folder is not there yet
    saved: dict[str, Any] | None = None  # the checkpoint's key "comet"

    @property
    def checkpoints(self) -> Path:
        """Their folder."""
        return self.path / "checkpoints"

    def create(self) -> None:
        """Makes and locks the folder and writes config.yaml, atomically; rank 0 only."""
        content = yaml.safe_dump(to_dict(self.config), sort_keys=False, allow_unicode=True)
        try:
            self.path.mkdir(parents=True, exist_ok=not self.fresh)
            lock_folder(self.path)
            with replacing(self.path / "config.yaml") as beside:
                beside.write_text(content, encoding="utf-8")
        except OSError as error:
            why = error.strerror or error
            raise UserError(f"run.root: {self.path} cannot be made: {why}") from None

    def discard(self) -> None:
        """Removes a folder that this run has made and never used; its name is free again."""
        release(self.path)
        if self.fresh:
            shutil.rmtree(self.path, ignore_errors=True)


def folder_of(config: Config, name: str) -> Path:
    """The run's folder."""
    return Path(config.run.root).expanduser() / (config.conf or "custom") / name


def saved_configuration(config: Config) -> dict[str, Any] | None:
    """What the run that resumes was started with; None: there is none, or nothing resumes.

    Raises:
        UserError: config.yaml cannot be read.
    """
    if not config.resume or config.run.name is None:
        return None
    file = folder_of(config, config.run.name) / "config.yaml"
    try:
        values = yaml.safe_load(file.read_text(encoding="utf-8"))
    except (FileNotFoundError, NotADirectoryError):
        # Killed before it was written.
        return None
    except (OSError, UnicodeDecodeError, yaml.YAMLError, RecursionError):
        raise UserError(
            f"{file}: cannot be read, so that it is unknown how this run was configured"
        ) from None
    if not isinstance(values, dict):
        raise UserError(f"{file}: not the configuration of a run")
    return values


def plan_run(config: Config, rank: int = 0) -> Run:
    """The folder to write to and the checkpoint to resume from; a folder that is there is locked.

    Args:
        rank: of this process; others than 0 take what rank 0 has chosen.

    Raises:
        UserError: the folder exists and resume is not true, or another process trains there; what
            is resumed was made with another configuration.
    """
    chosen = config.run.name or (os.environ.get(NAME_VARIABLE) if rank else None)
    if chosen is None and rank > 0:
        raise UserError(
            "run.name: missing, and several processes were started from outside; give all of them "
            "the same run.name"
        )
    name = chosen or _time_stamp(folder_of(config, ""))
    os.environ[NAME_VARIABLE] = name
    config = dataclasses.replace(config, run=dataclasses.replace(config.run, name=name))
    path = folder_of(config, name)
    exists = path.exists()
    if exists and not path.is_dir():
        raise UserError(f"run.name: {path} exists and is no folder")
    if exists and rank == 0 and not config.resume:
        raise UserError(
            f"run.name: {path} exists; give another run.name, or resume=true to go on with it"
        )
    if not (exists and config.resume):
        return Run(path, config, fresh=not exists)
    if rank > 0:
        return _resumed(path, config)
    lock_folder(path)  # before anything is read that its holder may still change
    try:
        return _resumed(path, config)
    except BaseException:
        release(path)
        raise


def _resumed(path: Path, config: Config) -> Run:
    """The run in a folder that is there. Raises UserError."""
    if saved := saved_configuration(config):
        _check_same(saved, path, config)
    folder = path / "checkpoints"
    if folder.exists() and not folder.is_dir():
        raise UserError(f"run.name: {folder} is no folder")
    found = [folder / name for name in CHECKPOINTS if (folder / name).exists()]
    if not found:
        return Run(path, config, fresh=False)
    # A training from the start would replace a best.ckpt whose last.ckpt is gone.
    checkpoint = found[0]
    content = read_checkpoint(checkpoint, mmap=True, whole=False)
    check_resumable(content, checkpoint)
    comet = content["comet"]
    # Also where config.yaml is gone, or the checkpoint came from elsewhere.
    _check_same(comet["config"], path, config)
    return Run(path, config, checkpoint, content["global_step"], fresh=False, saved=comet)


def _time_stamp(folder: Path) -> str:
    stamp = name = time.strftime("%Y-%m-%d_%H-%M-%S")
    number = 1
    while (folder / name).exists():
        number += 1
        name = f"{stamp}_{number}"
    return name


def _check_same(saved: dict[str, Any], path: Path, config: Config) -> None:
    """Raises UserError unless the run continues with the numbers that it was started with."""
    new, old = to_dict(config), upgraded(saved)
    defaults = to_dict(Config(data=DATA_KINDS[config.data.kind]()))
    for section in FIXED:
        before = old.get(section, defaults[section])
        same_kind = section != "data" or before.get("kind") == config.data.kind
        if isinstance(before, dict) and same_kind:
            before = {**defaults[section], **before}
        for key, was, now in _differences(section, before, new[section]):
            moved = key in PATHS and None not in (was, now)
            if key not in FREE and not moved:
                _refuse(key, was, now, path)
    before = {**defaults["trainer"], **(old.get("trainer") or {})}
    if before["precision"] != new["trainer"]["precision"]:
        _refuse("trainer.precision", before["precision"], new["trainer"]["precision"], path)


def _refuse(key: str, was: Any, now: Any, path: Path) -> NoReturn:
    raise UserError(
        f"{key}: {_shown(now)} given, but {path} was started with {_shown(was)}; a resumed run "
        "keeps it"
    )


def _differences(key: str, old: Any, new: Any) -> Iterator[tuple[str, Any, Any]]:
    """(dotted key, old, new) wherever two sections differ."""
    if not (isinstance(old, dict) and isinstance(new, dict)):
        if old != new:
            yield key, old, new
    elif old.get("kind") != new.get("kind"):
        yield f"{key}.kind", old.get("kind"), new.get("kind")
    else:
        for name in new:
            yield from _differences(f"{key}.{name}", old.get(name), new[name])


def _shown(value: Any) -> str:
    if value is None:
        return "null"
    return str(value).lower() if isinstance(value, bool) else str(value)
