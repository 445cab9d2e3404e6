"""A run that resumes keeps the configuration that it was started with."""

from pathlib import Path

import pytest
import yaml

from comet_pl.config.load import load, to_dict
from comet_pl.errors import UserError
from comet_pl.experiment.run_folder import plan_run, saved_configuration

KEYS = ["conf=user_behavior", "run.name=old", "resume=true"]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """The folder of a run from before data.layout, whose conf file had other values."""
    config = load([*KEYS, f"run.root={tmp_path}"])
    values = to_dict(config)
    values["backbone"] |= {"model_type": "llama", "lookback": None, "hidden_size": 64}
    values["data"] |= {"day_header": True, "root": "log"}
    del values["data"]["layout"], values["data"]["new_days"]
    path = tmp_path / "user_behavior" / "old"
    path.mkdir(parents=True)
    (path / "config.yaml").write_text(yaml.safe_dump(values))
    return path


def resumed(folder: Path, *keys: str):
    """The plan of a training that resumes the run, as train.py makes it."""
    argv = [*KEYS, f"run.root={folder.parents[1]}", *keys]
    saved = saved_configuration(load(argv))
    assert saved is not None
    return plan_run(load(argv, base=saved))


def test_conf_files_that_changed_since_have_no_effect(folder):
    config = resumed(folder, "trainer.max_steps=7").config
    assert (config.backbone.model_type, config.backbone.hidden_size) == ("llama", 64)
    assert (config.data.layout, config.data.new_days, config.data.root) == ("days", None, "log")
    assert config.trainer.max_steps == 7


@pytest.mark.parametrize(
    ("key", "was"),
    [
        ("data.layout=items", "days"),
        ("backbone.model_type=qwen2", "llama"),
        ("data.new_days=[1,9]", "null"),
        ("backbone=small", "llama"),
        ("trainer.precision=bf16-true", "32-true"),
        ("backbone.path=decoder", "null"),
        ("data.root=null", "log"),
    ],
)
def test_other_numbers_are_refused_by_their_key(folder, key, was):
    name = "backbone.model_type" if key == "backbone=small" else key.split("=")[0]
    with pytest.raises(UserError, match=rf"^{name}: .* was started with {was}; a resumed run"):
        resumed(folder, key)


def test_places_and_what_validation_shows_are_free(folder):
    """What the files hold is compared with the checkpoint (tests/laws/test_resumed_rows.py)."""
    data = resumed(folder, "data.root=elsewhere", "data.val_examples=3", "data.on_error=skip")
    assert (data.config.data.root, data.config.data.val_examples) == ("elsewhere", 3)


@pytest.mark.parametrize("content", [b"- 1", b"a: [", b"\xff\xfe"])
def test_a_damaged_configuration_is_one_line(folder, content):
    (folder / "config.yaml").write_bytes(content)
    with pytest.raises(UserError, match=r"config\.yaml: (cannot be read|not the configuration)"):
        resumed(folder)
