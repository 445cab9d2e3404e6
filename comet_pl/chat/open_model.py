"""What read and ask start from: any decoder or CoMeT with its tokenizer, and the memory file between the two."""

from __future__ import annotations

import json
import os
import sys
from argparse import ArgumentParser, Namespace
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, get_type_hints

import huggingface_hub
import torch
import transformers
import yaml
from safetensors import SafetensorError
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from comet_pl.chat.conversation import Conversation
from comet_pl.config.rules import convert, nearest
from comet_pl.config.schema import ModelConfig
from comet_pl.errors import UserError, first_line
from comet_pl.experiment.checkpoint import find_checkpoint, load_trained
from comet_pl.model.cache import CometCache
from comet_pl.model.modeling_comet import CometForCausalLM
from comet_pl.model.pretrained import check_built, kind

PLAIN_DECODER = {
    "chunk_size": 1024,
    "global_size": 64,
    "compression_stride": 8,
    "temporary_capacity": 512,
}
"""Memory of a decoder that has none."""
DTYPES = ("float32", "bfloat16", "float16", "float64")
SEED = 0  # of its random weights: the same in each process, or no process could use the memory of another


def add_options(parser: ArgumentParser) -> None:
    """MODEL and how it is loaded; read by `open_conversation`."""
    model = "a run's folder, a .ckpt file, a CoMeT folder, or a plain decoder (folder or hub id), which gets a new, untrained memory"
    keys = ", ".join(f"{key} {value}" for key, value in PLAIN_DECODER.items())
    parser.add_argument("model", metavar="MODEL", help=model)
    parser.add_argument(
        "--set",
        metavar="KEY=VALUE",
        action="append",
        default=[],
        help=f"a key of CometConfig, such as chunk_size=2048; may be repeated (default: MODEL's own; for a plain decoder {keys})",
    )
    parser.add_argument(
        "--dtype",
        choices=DTYPES[:2],
        help="of the weights and the memory (default: as MODEL was saved)",
    )
    parser.add_argument(
        "--device",
        choices=("auto", "cpu", "cuda"),
        default="auto",
        help="default: auto, a GPU where there is one",
    )


def open_conversation(
    options: Namespace, memory: str | None
) -> tuple[Conversation, dict[str, Any]]:
    """A conversation that starts empty, or goes on from a memory file, and the notes that its own memory file needs.

    Raises:
        UserError: MODEL or the memory cannot be loaded; options that the memory file itself decides.
    """
    device = _device(options.device)
    asked: dict[str, Any] = {"comet": memory_keys(options.set), "dtype": options.dtype}
    cache, opening = None, None
    if memory is not None:
        for option, given in (("--set", options.set), ("--dtype", options.dtype)):
            if given:
                raise UserError(
                    f"{option}: given, but {memory} goes on as it was begun; leave it out"
                )
        cache, opening, asked = _load_memory(memory, device)
    loaded = load(options.model, asked["comet"], asked["dtype"])
    model = loaded.model.to(device)  # type: ignore[arg-type]
    model.config.rollover = True  # or an open chunk would grow for ever
    notes = {
        "comet": loaded.comet,
        "dtype": str(model.dtype).removeprefix("torch."),
        "model": options.model,
    }
    name = options.model if memory is None else f"{memory} (made with {asked['model']})"
    return Conversation(
        model, loaded.tokenizer, CometCache() if cache is None else cache, opening, name
    ), notes


def memory_keys(texts: list[str]) -> dict[str, Any]:
    """{"chunk_size": 2048} of ["chunk_size=2048"].

    Raises:
        UserError: no such key, or not one of its values.
    """
    known = {one.name: one for one in fields(ModelConfig)}
    hints, keys = get_type_hints(ModelConfig), {}
    for text in texts:
        name, sign, value = text.partition("=")
        if not sign:
            raise UserError(f"--set: {text!r} given, KEY=VALUE is needed")
        if name not in known:
            raise UserError(
                f"--set: no key {name!r}{nearest(name, known)}; there are: {', '.join(known)}"
            )
        try:
            given = yaml.safe_load(value)
        except yaml.YAMLError:
            given = value
        if name == "rollover":
            raise UserError(
                "--set: rollover is always true here, or a conversation would grow for ever"
            )
        keys[name] = convert(given, hints[name], known[name].metadata, f"--set {name}")
    return keys


@dataclass
class Loaded:
    """comet: the memory keys that have to be given again for the same model."""

    model: CometForCausalLM
    tokenizer: PreTrainedTokenizerBase
    comet: dict[str, Any]


def load(name: str, comet: dict[str, Any], dtype: str | None = None) -> Loaded:
    """A model in eval mode on the CPU.

    Args:
        name: what MODEL may be. comet: CometConfig keys over the model's own. dtype: None: as it was saved.

    Raises:
        UserError: no such file, folder or hub id; it cannot be loaded; keys that its weights were not made with.
    """
    path = Path(name).expanduser()
    here = path.exists()
    if not here:
        check_built(name, "MODEL")
    if not here and (name.endswith(".ckpt") or name.count("/") > 1):
        raise UserError(f"MODEL: no such file or folder: {name}")
    transformers.logging.set_verbosity_error()
    huggingface_hub.logging.set_verbosity_error()  # six warnings of a hub that cannot be reached: the line below says it
    if here:
        transformers.logging.disable_progress_bar()
    try:
        if not here:
            print(f"no {name} here: asks the Hugging Face hub for it", file=sys.stderr, flush=True)
            return _from_hugging_face(name, comet, dtype)
        path, _ = find_checkpoint(path)
        return (
            _from_checkpoint(path, comet, dtype)
            if path.is_file()
            else _from_hugging_face(str(path), comet, dtype)
        )
    except UserError as error:
        raise UserError(str(error).replace("ckpt: ", "MODEL: ", 1)) from None
    except (OSError, ValueError, KeyError, RuntimeError, ImportError, SafetensorError) as error:
        place = "" if here else "no file or folder here, and from the hub "
        raise UserError(f"MODEL: {name}: {place}cannot be loaded: {first_line(error)}") from None


def _from_checkpoint(path: Path, comet: dict[str, Any], dtype: str | None) -> Loaded:
    model, tokenizer, _ = load_trained(
        path, [f"model.{key}={json.dumps(value)}" for key, value in comet.items()]
    )
    return Loaded(model.to(getattr(torch, dtype)) if dtype else model, tokenizer, comet)


def _from_hugging_face(name: str, comet: dict[str, Any], dtype: str | None) -> Loaded:
    if plain := kind(name, {}) == "decoder":
        comet = PLAIN_DECODER | comet
    tokenizer = AutoTokenizer.from_pretrained(name)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(SEED)
        model = CometForCausalLM.from_pretrained(name, comet=comet, dtype=dtype or "auto").eval()
    if plain:
        print(
            f"note: {name} has no memory of its own; it gets a random, untrained one, so expect poor answers, and none about what lies "
            f"further back than {model.config.chunk_size:,} tokens; to train it: "
            f"python train.py conf=scrolls data.root=PATH backbone.path={name}",
            file=sys.stderr,
            flush=True,
        )
    return Loaded(model, tokenizer, comet)


def check_target(path: str, force: bool | None = None) -> None:
    """Raises UserError if --save cannot write there, or must not: now, not after an hour of reading. force: None: no such option."""
    target = Path(path)
    if target.is_dir():
        raise UserError(f"--save: {path} is a folder; a file is needed")
    if target.exists() and not force:
        raise UserError(
            f"--save: {path} is there already; give another file{'' if force is None else ', or --force to replace it'}"
        )
    if not target.parent.is_dir():
        raise UserError(f"--save: there is no folder {target.parent}")
    if not os.access(target.parent, os.W_OK):
        raise UserError(f"--save: the folder {target.parent} cannot be written to")


def _load_memory(path: str, device: torch.device) -> tuple[CometCache, list[int], dict[str, Any]]:
    """(cache, ids before the next text, how to load the model) of a memory file."""
    if not Path(path).is_file():
        raise UserError(
            f"{path}: {'is a folder, a memory file is needed' if Path(path).is_dir() else 'no such memory file'}"
        )
    try:
        cache = CometCache.load(path, device=device)
    except ValueError as error:
        raise UserError(str(error)) from None
    try:
        made = {key: cache.notes[key] for key in ("comet", "dtype", "model")}
        if made["dtype"] not in DTYPES:
            raise ValueError
        return cache, cache.notes["opening"], made
    except (KeyError, TypeError, ValueError):
        raise UserError(
            f"{path}: a cache, but not one that python -m comet_pl.read wrote"
        ) from None


def _device(asked: str) -> torch.device:
    here = torch.cuda.is_available()
    if asked == "cuda" and not here:
        raise UserError(
            "--device: cuda given, but there is no GPU that torch can use; allowed: auto, cpu"
        )
    return torch.device("cuda" if here and asked != "cpu" else "cpu")
