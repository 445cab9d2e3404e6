"""Weights of the memory alone: all that a decoder lacks to be a trained CoMeT.

A folder of these has memory.safetensors (the memory modules, the rows of new tokens, LoRA's
matrices, samples of the decoder's weights) and memory.json (what CometConfig needs, LoRA's factor,
where the decoder was).

Legend: r rank of LoRA, SAMPLES values of each of the decoder's weights.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from safetensors import SafetensorError
from torch import Tensor
from transformers import PreTrainedModel

from comet_pl.model.digests import check_digests, check_finite, write_digests

FACTS, WEIGHTS = "memory.json", "memory.safetensors"
KEYS = {"comet", "lora", "decoder", "model_type", "shape"}  # of FACTS
SAMPLES = 16
NEAR = 2.0**-7  # of a value: a copy of the decoder may have been rounded to bfloat16


@dataclass
class MemoryWeights:
    """What a folder holds.

    Args:
        tensors: by name: parameters; "rows.embed_tokens" and, in an untied head, "rows.lm_head",
            those of new tokens; "lora_A.MODULE" (r, in) and "lora_B.MODULE" (out, r);
            "decoder.WEIGHT" (SAMPLES,).
        facts: comet: CometConfig's keys; lora: {module: factor}; decoder: path or hub id;
            model_type; shape: rows and width of its embedding.
    """

    tensors: dict[str, Tensor]
    facts: dict[str, Any]

    def save_pretrained(self, folder: str | os.PathLike[str]) -> None:
        """Writes both files and their digests."""
        Path(folder).mkdir(parents=True, exist_ok=True)
        safetensors.torch.save_file(self.tensors, Path(folder, WEIGHTS), {"format": "pt"})
        Path(folder, FACTS).write_text(json.dumps(self.facts, indent=1) + "\n")
        write_digests(folder)

    @classmethod
    def from_pretrained(cls, folder: str | os.PathLike[str]) -> MemoryWeights:
        """Raises ValueError: no such folder, or a file that is not what was written."""
        if not Path(folder, FACTS).is_file():
            raise ValueError(
                f"memory: {folder} is no folder that `comet_pl.export --memory-only` has written "
                f"(it has no {FACTS})"
            )
        check_digests(folder)
        try:
            facts = json.loads(Path(folder, FACTS).read_text())
            tensors = safetensors.torch.load_file(Path(folder, WEIGHTS))
        except (OSError, ValueError, SafetensorError) as error:
            raise ValueError(f"memory: {folder} cannot be read: {error}") from None
        try:
            of_lora = {f"lora_{which}.{name}" for name in facts["lora"] for which in "AB"}
            missing = sorted((KEYS - facts.keys()) | (of_lora - tensors.keys()))
        except (AttributeError, KeyError, TypeError):
            missing = [f"an object of {', '.join(sorted(KEYS))} in {FACTS}"]
        if missing:
            raise ValueError(f"memory: {folder} lacks {missing[0]}")
        check_finite(tensors)
        return cls(tensors, facts)

    def plug_in(self, cls: Any, decoder: PreTrainedModel, comet: dict[str, Any]) -> Any:
        """The trained model around a copy of its decoder, which is used up.

        Args:
            cls: CometForCausalLM. comet: CometConfig's keys over those of the training.

        Raises:
            ValueError: another decoder; a key that shapes the weights; weights that are missing.
        """
        self.check(decoder)
        model = cls.from_decoder(decoder, self.facts["comet"])
        with torch.no_grad():
            for name, parameter in self._parameters(model):
                if name not in self.tensors or self.tensors[name].shape != parameter.shape:
                    raise ValueError(f"memory: {name} is missing, or of another shape")
                parameter.copy_(self.tensors[name])
            for name, factor in self.facts["lora"].items():
                a, b = (self.tensors[f"lora_{which}.{name}"] for which in "AB")
                weight = model.get_submodule(name).weight
                weight += ((b @ a) * factor).to(weight)
        model.config.override(comet)
        return model

    def _parameters(self, model: Any) -> Iterator[tuple[str, Tensor]]:
        yield from model.memory_parameters()
        first = model.config.first_new_id
        yield from ((f"rows.{part}", weight[first:]) for part, weight in ends(model))

    def check(self, decoder: PreTrainedModel) -> None:
        """Raises ValueError for a decoder that is not the one of the training."""
        config = decoder.config
        made = f"memory: made for {self.facts['decoder'] or 'a decoder'}"
        kind, shape = self.facts["model_type"], self.facts["shape"]
        given = [config.vocab_size, config.hidden_size]
        if (config.model_type, given) != (kind, shape):
            raise ValueError(
                f"{made} ({kind}, embedding {shape}), but this one is {config.model_type}, "
                f"embedding {given}"
            )
        found = dict(samples(decoder.named_parameters(), config.vocab_size))
        expected = {
            name.removeprefix("decoder."): t
            for name, t in self.tensors.items()
            if name.startswith("decoder.")
        }
        for name in sorted(expected.keys() | found.keys()):
            if name not in found or name not in expected or not near(found[name], expected[name]):
                raise ValueError(f"{made}, but {name} differs from that decoder's")


def samples(weights: Iterable[tuple[str, Tensor]], rows: int) -> Iterator[tuple[str, Tensor]]:
    """(name, (SAMPLES,) values in float32) of each of a decoder's weights.

    Args:
        rows: of text, in the embedding and the head.
    """
    for name, parameter in weights:
        whole = parameter[:rows] if "embed_tokens" in name or "lm_head" in name else parameter
        values = whole.detach().flatten()
        yield name, values[:: max(1, values.numel() // SAMPLES)][:SAMPLES].float().cpu().clone()


def near(one: Tensor, other: Tensor) -> bool:
    return one.shape == other.shape and torch.allclose(one, other, rtol=NEAR, atol=1e-6)


def ends(model: Any) -> Iterator[tuple[str, Tensor]]:
    """The embedding's weight, and the head's where it is its own."""
    embedding, head = model.model.embed_tokens.weight, model.lm_head.weight
    yield "embed_tokens", embedding
    if head is not embedding:
        yield "lm_head", head
