"""What a checkpoint carries beside its weights, and a trained model back from it."""

from __future__ import annotations

import warnings
import zipfile
from collections.abc import Mapping
from functools import reduce
from pathlib import Path
from typing import TYPE_CHECKING, Any

from comet_pl.config.load import from_dict, load, to_dict
from comet_pl.config.schema import Config, comet_keys
from comet_pl.errors import UserError, os_errors
from comet_pl.experiment.loading import load_model, load_tokenizer, loading, with_decoder

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from comet_pl import CometForCausalLM

# Every key of a .ckpt -> (who writes it, what it holds). Lightning's trainer writes its own.
KEYS = {
    "state_dict": ("lightning", "the module's weights; those of the model begin with model."),
    "optimizer_states": ("lightning", "AdamW's moments, by parameter"),
    "lr_schedulers": ("lightning", "steps of the learning rate's course"),
    "loops": ("lightning", "counters of the fit loop, and the loader's place in the data"),
    "callbacks": ("lightning", "state of callbacks/checkpoints.py and callbacks/gate_monitor.py"),
    "epoch": ("lightning", "passes over the data so far"),
    "global_step": ("lightning", "optimizer steps so far"),
    "pytorch-lightning_version": ("lightning", "for its own migrations"),
    "MixedPrecision": ("lightning", "the loss scale, with trainer.precision=16-mixed"),
    "comet": ("callbacks/checkpoints.py", "`checkpoint_content`: all but the weights"),
    "random_states": ("callbacks/random_state.py", "Python's, NumPy's and torch's, of each rank"),
    "skipped": ("comet_pl/training/lit_module.py", "steps without a finite norm: all, in a row"),
}
SPECIAL = ("eos_token", "pad_token", "bos_token", "unk_token")


def checkpoint_content(
    config: Config, tokenizer: PreTrainedTokenizerBase, model: CometForCausalLM
) -> dict[str, Any]:
    """The checkpoint's key "comet": plain types from which everything but the weights can be built
    again.

    config: the run's; model: CometConfig's own (also that of a pre-trained decoder, whose folder
    may be gone); generation: how that decoder ends and samples its texts; tokenizer:
    tokenizer.json; special_tokens: their texts by role, and the chat template. A training adds
    data: what its files hold (data/kinds.py).
    """
    special = {
        name: getattr(tokenizer, name)
        for name in SPECIAL
        if getattr(tokenizer, name, None) is not None
    }
    return {
        "config": to_dict(config),
        "model": model.config.to_json_string(use_diff=False),
        "generation": model.generation_config.to_dict(),
        "tokenizer": tokenizer.backend_tokenizer.to_str(),
        "special_tokens": {**special, "chat_template": tokenizer.chat_template},
    }


def restore_tokenizer(content: Mapping[str, Any]) -> PreTrainedTokenizerBase:
    """The tokenizer of a checkpoint's key "comet"."""
    from tokenizers import Tokenizer
    from transformers import PreTrainedTokenizerFast

    return PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer.from_str(content["tokenizer"]), **content["special_tokens"]
    )


RESUMED = {  # keys of a checkpoint that goes on, and their types
    "state_dict": dict,
    "optimizer_states": list,
    "lr_schedulers": list,
    "loops": dict,
    "random_states": list,
    "global_step": int,
    "pytorch-lightning_version": str,
}


def read_checkpoint(path: Path, mmap: bool = False, whole: bool = True) -> dict[str, Any]:
    """A checkpoint's content, tensors on the CPU.

    Args:
        mmap: tensors are read from the file at their first use.
        whole: every byte is compared with the checksums in the file, every weight with infinity.

    Raises:
        UserError: no file, or not a whole checkpoint of this project.
    """
    import torch

    from comet_pl.model.digests import check_finite

    best = path.with_name("best.ckpt")
    other = f"; {best} may be whole" if path.name == "last.ckpt" and best.is_file() else ""
    with os_errors(f"{path}: cannot be read"):
        path.open("rb").close()
    with loading(f"{path}: not a readable checkpoint: truncated, or something else{other}", False):
        if whole and zipfile.is_zipfile(path):
            with zipfile.ZipFile(path) as records:
                if damaged := records.testzip():
                    raise UserError(f"{path}: damaged: {damaged} is not what was written{other}")
        with warnings.catch_warnings(action="ignore"):  # about files that are no checkpoints
            checkpoint = torch.load(path, map_location="cpu", weights_only=True, mmap=mmap)
    if not isinstance(checkpoint, dict) or not isinstance(checkpoint.get("comet"), dict):
        raise UserError(f"{path}: a checkpoint, but not one that train.py wrote")
    if not isinstance(checkpoint.get("state_dict"), dict):
        raise UserError(f"{path}: a damaged checkpoint: no state_dict in it{other}")
    if whole:
        with loading(f"{path}: damaged{other}"):
            check_finite(checkpoint["state_dict"])
    return checkpoint


def check_resumable(checkpoint: Mapping[str, Any], path: Path) -> None:
    """Raises UserError unless the checkpoint has all that a training goes on from."""
    from comet_pl.model.digests import check_finite

    for key, kind in RESUMED.items():
        value = checkpoint.get(key)
        if not isinstance(value, kind) or (key != "global_step" and not value):
            raise UserError(f"{path}: cannot be resumed: no {key} in it")
    try:
        for optimizer in checkpoint["optimizer_states"]:
            for number, moments in optimizer["state"].items():
                check_finite({f"{name} of parameter {number}": t for name, t in moments.items()})
    except Exception as error:  # of what a damaged one holds: anything
        raise UserError(f"{path}: cannot be resumed: optimizer_states: {error}") from None


def find_checkpoint(path: Path) -> tuple[Path, Path]:
    """(what to load, the folder for its results) of what ckpt= names.

    Raises:
        UserError: there is no such path, or no checkpoint in it.
    """
    if not path.exists():
        raise UserError(f"ckpt: {path} does not exist")
    if path.is_file():
        return path, path.parent.parent if path.parent.name == "checkpoints" else path.parent
    for folder in (path / "checkpoints", path):
        for name in ("last.ckpt", "best.ckpt"):
            if (folder / name).is_file():
                return (
                    folder / name,
                    path.parent if folder == path and path.name == "checkpoints" else path,
                )
    if any((path / name).is_file() for name in ("config.json", "memory.json")):
        return path, path
    raise UserError(
        f"ckpt: {path} holds neither checkpoints/last.ckpt, checkpoints/best.ckpt nor a model's "
        "config.json or memory.json"
    )


def steps_of(path: Path) -> int:
    """Optimizer steps of find_checkpoint's; 0: a model's folder does not say."""
    if path.is_dir():
        return 0
    step = read_checkpoint(path, mmap=True, whole=False).get("global_step", 0)
    return step if isinstance(step, int) else 0


def load_trained(
    path: Path, argv: list[str], merge: bool = True
) -> tuple[CometForCausalLM, PreTrainedTokenizerBase, Config]:
    """A trained model in eval mode on the CPU, its tokenizer, and its configuration with the
    command line's keys over it.

    LoRA and separately trained rows are merged: the weights are plain.

    Args:
        path: a .ckpt file; a run's folder (then its last.ckpt, else its best.ckpt); or a folder
            that save_pretrained wrote.
        argv: arguments of eval.py; model.* keys that don't shape the weights take effect.
        merge: False: LoRA and separately trained rows stay peft's modules.

    Raises:
        UserError: no such path; a truncated or foreign checkpoint; keys that the weights were not
            made with.
    """
    path, _ = find_checkpoint(Path(path).expanduser())
    if path.is_dir():
        return _from_folder(path, argv)
    return _from_checkpoint(path, argv, merge)


def _from_checkpoint(
    path: Path, argv: list[str], merge: bool
) -> tuple[CometForCausalLM, PreTrainedTokenizerBase, Config]:
    checkpoint = read_checkpoint(path, mmap=True)
    with loading(f"ckpt: {path}: its content cannot be used"):
        return _restored(checkpoint, path, argv, merge)


def _restored(
    checkpoint: Mapping[str, Any], path: Path, argv: list[str], merge: bool
) -> tuple[CometForCausalLM, PreTrainedTokenizerBase, Config]:
    import json

    import torch
    from transformers import GenerationConfig

    from comet_pl import CometConfig, CometForCausalLM
    from comet_pl.training.trainable import add_adapters, merge_adapters, new_rows

    content = checkpoint["comet"]
    config = load(argv, "eval", base=content["config"])
    for key in (argument.partition("=")[0] for argument in argv):
        if key.startswith("backbone.") and key != "backbone.attn_implementation":
            raise UserError(f"{key}: given, but the checkpoint in {path} decides it")
    settings = CometConfig.from_dict(json.loads(content["model"]))
    rows = new_rows(settings)  # before keys leave some of them out
    trained, asked = content["config"]["model"], comet_keys(config.model)
    try:
        settings.override(
            {key: value for key, value in asked.items() if value != trained.get(key, value)}
        )
    except ValueError as error:
        raise UserError(_misfit(config, content["config"], error)) from None
    settings._attn_implementation = config.backbone.attn_implementation
    weights = {
        name.removeprefix("model."): tensor
        for name, tensor in checkpoint["state_dict"].items()
        if name.startswith("model.")
    }
    if any(not weight.is_floating_point() for weight in weights.values()):
        raise UserError(f"ckpt: {path}: a damaged checkpoint: weights that are no numbers")
    model = CometForCausalLM(settings)
    add_adapters(model, from_dict(content["config"]).train, rows)
    # Frozen weights may have less precision than those that learned.
    model = model.to(reduce(torch.promote_types, (weight.dtype for weight in weights.values())))
    try:
        model.load_state_dict(weights)
    except RuntimeError as error:
        raise UserError(
            f"ckpt: the weights in {path} do not fit its own configuration: "
            f"{' '.join(str(error).split())[:200]}"
        ) from None
    if merge:
        merge_adapters(model)
    if "generation" in content:
        model.generation_config = GenerationConfig.from_dict(content["generation"])
    return model.eval(), restore_tokenizer(content), config


def _misfit(config: Config, trained: Mapping[str, Any], error: ValueError) -> str:
    """Why the model section that was asked for is not this checkpoint's; a whole conf of another
    model is the likeliest mistake."""
    if config.conf == trained["conf"]:
        return f"model: {error}"
    keys = (
        f"data.kind={config.data.kind} and its keys"
        if config.data.kind != trained["data"]["kind"]
        else "the keys to change"
    )
    return (
        f"conf={config.conf}: is for another model than this checkpoint's, which was trained with "
        f"conf={trained['conf']} ({error}); leave conf out and give {keys}"
    )


def _from_folder(
    path: Path, argv: list[str]
) -> tuple[CometForCausalLM, PreTrainedTokenizerBase, Config]:
    """A Hugging Face folder: the configuration is the conf's and the command line's."""
    from comet_pl.model.pretrained import kind

    config, what = load(argv, "eval"), f"ckpt: {path} cannot be loaded"
    off = config.model.global_size == 0 and config.model.compression_stride is None
    name, memory = with_decoder(path, what, config.backbone.path)
    with loading(what):
        plain = not memory and kind(path, {}) == "decoder"
    if plain and not off:
        raise UserError(
            f"ckpt: {path} is a plain decoder, and a memory plugged in now would be random; train "
            "it first "
            f"(python train.py backbone.path={path} ...), or switch both memories off"
        )
    given = {
        argument.partition("=")[0].removeprefix("model.")
        for argument in argv
        if argument.startswith("model.")
    }
    comet = {key: value for key, value in comet_keys(config.model).items() if key in given}
    attention = {"attn_implementation": config.backbone.attn_implementation}
    model = load_model(name, what, comet=comet, **attention, **memory)
    return model.eval(), load_tokenizer(name, what), config
