"""Whether the files that a resumed run reads are those that it was started with, by content.

Folders move between jobs and machines, so paths are free. Rows are not: the run's place in the data
is a number of rows.
"""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from comet_pl.errors import UserError
from comet_pl.experiment.run_folder import PATHS, Run

if TYPE_CHECKING:
    from comet_pl import CometForCausalLM

Content = Mapping[str, list[list[Any]]]
"""{role: [[name, bytes, SHA-256], ...]}; see data/kinds.py."""
UNSHAPING = ("_name_or_path", "transformers_version", "dtype", "torch_dtype", "architectures")
"""Keys of a decoder's configuration that say nothing about its numbers."""


def check_data(run: Run, now: Content) -> list[str]:
    """Lines about what has changed beside the training data.

    Raises:
        UserError: training would go on with other rows.
    """
    assert run.saved is not None
    key = "data.haystack" if run.config.data.kind == "passkey" else "data.root"
    if "data" not in run.saved:
        return [_unknown(name, was, is_) for name, was, is_ in _moved(run)]
    before, notes = run.saved["data"], []
    for role in sorted({*before, *now}):
        change = _change(before.get(role, []), now.get(role, []))
        if not change:
            continue
        if role.startswith("train"):
            raise UserError(
                f"{key}: other {role} data than {run.path} was started with: {change}; a resumed "
                "run keeps them"
            )
        notes.append(f"{role} data have changed: {change}; its losses compare no longer")
    return notes


def check_backbone(run: Run, model: "CometForCausalLM") -> None:
    """Refuses a decoder of another shape in backbone.path; its weights are the checkpoint's.

    Across versions of transformers, which write other things in other ways, sizes are compared.

    Raises:
        UserError
    """
    if run.saved is None or run.config.backbone.path is None:
        return
    texts = run.saved["model"], model.config.to_json_string(use_diff=False)
    before, now = map(json.loads, texts)
    alike = before.get("transformers_version") == now.get("transformers_version")
    before, now = _decoder(before), _decoder(now)
    for name in sorted(before.keys() & now.keys()):
        if before[name] != now[name] and (alike or isinstance(before[name], int)):
            raise UserError(
                f"backbone.path: {run.config.backbone.path} holds another decoder than {run.path} "
                f"was started with: {name} is {now[name]}, it was {before[name]}"
            )


def _decoder(settings: dict[str, Any]) -> dict[str, Any]:
    decoder = settings.get("backbone_config") or settings
    return {name: value for name, value in decoder.items() if name not in UNSHAPING}


def _moved(run: Run) -> list[tuple[str, str, str]]:
    """(key, path then, path now) of paths that are spelt in another way and lead elsewhere."""
    assert run.saved is not None
    pairs = []
    for key in PATHS:
        section, name = key.split(".")
        was = run.saved["config"].get(section, {}).get(name)
        now = getattr(getattr(run.config, section), name, None)
        if was is not None and now is not None and _real(was) != _real(now):
            pairs.append((key, was, now))
    return pairs


def _real(path: str) -> Path:
    return Path(path).expanduser().resolve()


def _unknown(key: str, was: str, now: str) -> str:
    return (
        f"{key}: {now} given, {was} before; the checkpoint is of a version that did not note what "
        "the files hold, so that nothing tells whether they are the same"
    )


def _change(before: list[list[Any]], now: list[list[Any]]) -> str:
    """What differs between two lists of files, or ''; their names are free."""
    if len(before) != len(now):
        return f"{len(now)} file{'s' * (len(now) != 1)}, {len(before)} then"
    for (_, size, digest), (name, new_size, new_digest) in zip(before, now, strict=True):
        if digest != new_digest:
            return (
                f"{name} has {new_size:,} bytes (SHA-256 {new_digest[:8]}), "
                f"{size:,} then ({digest[:8]})"
            )
    return ""
