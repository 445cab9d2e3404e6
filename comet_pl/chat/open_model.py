"""What read and ask start from: any decoder or CoMeT with its tokenizer, and a memory file."""

import json
import os
import sys
from argparse import ArgumentParser, Namespace
from pathlib import Path
from typing import Any

import huggingface_hub
import torch
import transformers
import yaml
from transformers import PreTrainedTokenizerBase

from comet_pl import CometCache, CometForCausalLM
from comet_pl.chat.conversation import Conversation
from comet_pl.config.load import filled
from comet_pl.config.schema import ModelConfig, comet_keys
from comet_pl.errors import UserError, nearest
from comet_pl.experiment.checkpoint import find_checkpoint, load_trained
from comet_pl.experiment.loading import load_model, load_tokenizer, loading, with_decoder
from comet_pl.files import check_built
from comet_pl.model.chunk_layout import NO_STRIDE
from comet_pl.model.pretrained import kind

PLAIN_DECODER = {
    "chunk_size": 1024,
    "global_size": 64,
    "compression_stride": 8,
    "temporary_capacity": 512,
}
"""The memory that a decoder without one gets."""
DTYPES = ("float32", "bfloat16", "float16", "float64")
# Seed of that memory's weights. A memory file fits only a model with the same weights.
SEED = 0


def add_options(parser: ArgumentParser) -> None:
    """Adds MODEL and the options that say how it is loaded; `open_conversation` takes them."""
    parser.add_argument(
        "model",
        metavar="MODEL",
        help="a run's folder, a .ckpt file, a CoMeT folder, or a plain decoder (folder or hub id), "
        "which gets a new, untrained memory",
    )
    keys = ", ".join(f"{key} {value}" for key, value in PLAIN_DECODER.items())
    parser.add_argument(
        "--set",
        metavar="KEY=VALUE",
        action="append",
        default=[],
        help="a key of CometConfig, such as chunk_size=2048; may be repeated "
        f"(default: MODEL's own; for a plain decoder {keys})",
    )
    dtype = "of the weights and the memory (default: as MODEL was saved)"
    parser.add_argument("--dtype", choices=DTYPES[:2], help=dtype)
    devices, device = ("auto", "cpu", "cuda"), "default: auto, a GPU where there is one"
    parser.add_argument("--device", choices=devices, default="auto", help=device)


def open_conversation(
    options: Namespace, memory: str | None
) -> tuple[Conversation, dict[str, Any]]:
    """An empty conversation, or one continued from a memory file, and its notes for `save`.

    Raises:
        UserError: MODEL or the memory cannot be loaded; an option that the memory file decides.
    """
    device = _device(options.device)
    asked: dict[str, Any] = {"comet": memory_keys(options.set), "dtype": options.dtype}
    cache, opening, name = CometCache(), None, options.model
    if memory is not None:
        for option, value in (("--set", options.set), ("--dtype", options.dtype)):
            if value:
                reason = f"{memory} continues as it began; leave it out"
                raise UserError(f"{option}: given, but {reason}")
        cache, opening, asked = _load_memory(memory, device)
        name = f"{memory} (made with {asked['model']})"
    gpu = device.type == "cuda"
    model, tokenizer, comet = load(options.model, asked["comet"], asked["dtype"], gpu)
    model.to(device)  # type: ignore[arg-type]
    if memory is not None:
        stride, most = model.config.compression_stride, model.config.cache_bytes(1, model.dtype)
        if cache.rows[0].stride != (stride or NO_STRIDE) or cache.nbytes > most:
            raise UserError(f"{memory}: damaged: it is not as large as this model's memory")
    # without rollover an open chunk would grow without end
    model.config.rollover = True
    dtype = str(model.dtype).removeprefix("torch.")
    notes = {"comet": comet, "dtype": dtype, "model": options.model}
    return Conversation(model, tokenizer, cache, opening, name), notes


def memory_keys(texts: list[str]) -> dict[str, Any]:
    """{"chunk_size": 2048} of ["chunk_size=2048"].

    Raises:
        UserError: no such key, or not one of its values.
    """
    known = list(comet_keys(ModelConfig()))
    values: dict[str, Any] = {}
    for text in texts:
        name, sign, value = text.partition("=")
        if not sign:
            raise UserError(f"--set: {text!r} given, KEY=VALUE is needed")
        if name not in known:
            allowed = ", ".join(known)
            raise UserError(f"--set: no key {name!r}{nearest(name, known)}; there are: {allowed}")
        if name == "rollover":
            reason = "or a conversation would grow without end"
            raise UserError(f"--set: rollover is always true here, {reason}")
        try:
            values[name] = yaml.safe_load(value)
        except yaml.YAMLError:
            values[name] = value
    settings = filled(ModelConfig, values, "--set ")
    return {name: getattr(settings, name) for name in values}


Loaded = tuple[CometForCausalLM, PreTrainedTokenizerBase, dict[str, Any]]


def load(name: str, comet: dict[str, Any], dtype: str | None = None, gpu: bool = False) -> Loaded:
    """(model in eval mode on the CPU, its tokenizer, memory keys that load the same model again).

    Args:
        name: what MODEL may be.
        comet: CometConfig keys over the model's own.
        dtype: of the weights; None: as they were saved.
        gpu: it will run on one; a checkpoint that learned in bf16-mixed is then read in bfloat16.

    Raises:
        UserError: no such file, folder or hub id; it cannot be loaded; keys that its weights were
            not made with.
    """
    path = Path(name).expanduser()
    local = path.exists()
    if not local:
        check_built(name, "MODEL")
        if name.endswith(".ckpt") or name.count("/") > 1:
            raise UserError(f"MODEL: no such file or folder: {name}")
        print(f"no {name} here: asks the Hugging Face hub for it", file=sys.stderr, flush=True)
    else:
        transformers.logging.disable_progress_bar()
    transformers.logging.set_verbosity_error()
    # six warnings of a hub that cannot be reached: the error below says it in one line
    huggingface_hub.logging.set_verbosity_error()
    try:
        if local:
            path, _ = find_checkpoint(path)
            name = str(path)
        source = "" if local else "no file or folder here, and from the hub "
        if not path.is_file():
            return _from_hugging_face(
                name, comet, dtype, f"MODEL: {name}: {source}cannot be loaded"
            )
        keys = [f"model.{key}={json.dumps(value)}" for key, value in comet.items()]
        model, tokenizer, config = load_trained(path, keys)
        if dtype is None and gpu and config.trainer.precision == "bf16-mixed":
            dtype = "bfloat16"
        return model.to(getattr(torch, dtype)) if dtype else model, tokenizer, comet
    except UserError as error:
        raise UserError(str(error).replace("ckpt: ", "MODEL: ", 1)) from None


def _from_hugging_face(name: str, comet: dict[str, Any], dtype: str | None, what: str) -> Loaded:
    name, memory = with_decoder(name, what)
    with loading(what):
        plain = not memory and kind(name, {}) == "decoder"
    if plain:
        comet = PLAIN_DECODER | comet
    tokenizer = load_tokenizer(name, what)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(SEED)
        model = load_model(name, what, comet=comet, dtype=dtype or "auto", **memory).eval()
    if plain:
        line = (
            f"note: {name} has no memory of its own; it gets a random, untrained one, so expect "
            "poor answers, and none about what lies further back than "
            f"{model.config.chunk_size:,} tokens; to train it: "
            f"python train.py conf=scrolls data.root=PATH backbone.path={name}"
        )
        print(line, file=sys.stderr, flush=True)
    return model, tokenizer, comet


def check_target(path: str, force: bool | None = None) -> None:
    """Refuses, before an hour of reading, a file that --save cannot or must not write.

    Args:
        force: replace an existing file; None: the command has no such option.

    Raises:
        UserError
    """
    target = Path(path)
    folder = target.parent
    if target.is_dir():
        raise UserError(f"--save: {path} is a folder; a file is needed")
    if target.exists() and not force:
        remedy = "" if force is None else ", or --force to replace it"
        raise UserError(f"--save: {path} is there already; give another file{remedy}")
    if not folder.is_dir():
        raise UserError(f"--save: there is no folder {folder}")
    if not os.access(folder, os.W_OK):
        raise UserError(f"--save: the folder {folder} cannot be written to")


def _load_memory(path: str, device: torch.device) -> tuple[CometCache, list[int], dict[str, Any]]:
    """(cache, ids before the next text, how to load the model) of a memory file."""
    if Path(path).is_dir():
        raise UserError(f"{path}: is a folder, a memory file is needed")
    if not Path(path).is_file():
        raise UserError(f"{path}: no such memory file")
    try:
        cache = CometCache.load(path, device=device)
    except ValueError as error:
        raise UserError(str(error)) from None
    try:
        made = {key: cache.notes[key] for key in ("comet", "dtype", "model")}
        opening, plain = cache.notes["opening"], (str, int, float, type(None))
        ids = [] if opening is None else opening
        if not (isinstance(ids, list) and all(type(i) is int and 0 <= i < 2**31 for i in ids)):
            raise ValueError
        if not (isinstance(made["comet"], dict) and isinstance(made["model"], str)):
            raise ValueError
        if made["dtype"] not in DTYPES or any(type(v) not in plain for v in made["comet"].values()):
            raise ValueError
        # It reads one text, without padding.
        if len(cache.rows) != 1 or cache.columns != cache.rows[0].num_tokens or not cache.weights:
            raise ValueError
        return cache, opening, made
    except (KeyError, TypeError, ValueError):
        reason = "a cache, but not one that python -m comet_pl.read wrote"
        raise UserError(f"{path}: {reason}") from None


def _device(asked: str) -> torch.device:
    present = torch.cuda.is_available()
    if asked == "cuda" and not present:
        reason = "cuda given, but there is no GPU that torch can use; allowed: auto, cpu"
        raise UserError(f"--device: {reason}")
    return torch.device("cuda" if present and asked != "cpu" else "cpu")
