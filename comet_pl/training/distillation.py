"""train.distill: the model learns what the decoder makes of the same text without memory.

The teacher is the decoder itself: the modules of the cells in Hugging Face's own layers, LoRA
switched off. It has all of the text in one context, or the last teacher_length tokens at most and
half of them at least.

Legend: n tokens of a text, d width, L tokens that the teacher sees at once.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from itertools import accumulate
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence

from comet_pl.config.schema import TrainConfig
from comet_pl.errors import UserError
from comet_pl.model.chunk_layout import ChunkPlan
from comet_pl.model.configuration_comet import wide
from comet_pl.model.loss import Teacher
from comet_pl.model.modeling_comet import CometForCausalLM
from comet_pl.model.plain_decoder import plain_decoder
from comet_pl.training.windows import Window


class Distillation:
    """Makes windows with a teacher, and counts the divergence.

    Args:
        length: L; None: the decoder's positions.

    Raises:
        UserError: the decoder has fewer positions.
    """

    def __init__(self, model: CometForCausalLM, weight: float, length: int | None):
        most = model.config.backbone_config.max_position_embeddings
        if length is not None and length > most:
            raise UserError(
                f"train.teacher_length: {length} given, but the decoder has {most} positions"
            )
        self.model, self.plain = model, plain_decoder(model)
        self.weight, self.length = weight, length or most
        self.kl = torch.zeros(())

    @classmethod
    def of(cls, model: CometForCausalLM, train: TrainConfig) -> Distillation | None:
        """The one that the configuration asks for."""
        return cls(model, train.distill, train.teacher_length) if train.distill else None

    def begin_step(self, device: torch.device) -> None:
        """Counts the divergence from zero."""
        self.kl = torch.zeros((), dtype=wide(self.model.dtype), device=device)

    def teach(self, windows: Sequence[Window]) -> list[Window]:
        """The windows of a micro-batch, from the texts' beginnings, with what the teacher says."""
        if not windows:
            return []
        rows = range(len(windows[0].plans))
        tokens = [[window.plans[b].tokens for window in windows] for b in rows]
        texts = [
            torch.cat([w.input_ids[b, :n] for w, n in zip(windows, tokens[b], strict=True)])
            for b in rows
        ]
        documents = [
            part
            for b in rows
            for part in texts[b].split(between_resets([w.plans[b] for w in windows]))
        ]
        found = self.read(documents)
        ends = list(accumulate(map(sum, tokens)))
        hidden = [found[end - sum(n) : end].split(n) for n, end in zip(tokens, ends, strict=True)]
        return [
            replace(window, teacher=Teacher(pad_sequence(parts, True), self.weight, self.kl))
            for window, *parts in zip(windows, *hidden, strict=True)
        ]

    @torch.no_grad()
    def read(self, texts: Sequence[Tensor]) -> Tensor:
        """Texts (n,) -> (sum of n, d) the teacher's normed outputs, one text behind the other."""
        ids = pad_sequence(list(texts), True).to(self.model.lm_head.weight.device)
        half = max(1, self.length // 2)
        parts: list[Tensor] = []
        with without_lora(self.model):
            for start in range(0, max(1, ids.shape[1] - self.length + half), half):
                piece = ids[:, start : start + self.length]
                hidden = self.plain.model(piece, use_cache=False).last_hidden_state
                parts.append(hidden[:, self.length - half :] if start else hidden)
        hidden = torch.cat(parts, 1)
        return torch.cat([row[: len(text)] for row, text in zip(hidden, texts, strict=True)])


def between_resets(plans: Sequence[ChunkPlan]) -> list[int]:
    """Tokens of each text of a row, whose plans follow one another: a reset begins another one."""
    lengths = [0]
    for plan in plans:
        for size, reset in zip(plan.sizes, plan.resets or [False] * len(plan.sizes), strict=True):
            if reset and lengths[-1]:
                lengths.append(0)
            lengths[-1] += size
    return lengths


@contextmanager
def without_lora(model: nn.Module) -> Iterator[None]:
    """Within the block the model's modules are those of before peft."""
    from peft.tuners.tuners_utils import BaseTunerLayer

    layers: list[Any] = [m for m in model.modules() if isinstance(m, BaseTunerLayer)]
    learning = [p for layer in layers for p in layer.parameters() if p.requires_grad]
    for layer in layers:
        layer.enable_adapters(False)
    try:
        yield
    finally:
        for layer in layers:
            layer.enable_adapters(True)
        for parameter in learning:
            parameter.requires_grad_(True)
