"""Prompts in, greedy answers out: what all evaluations share."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from comet_pl import CometCache, CometForCausalLM
from comet_pl.config.schema import EvalConfig
from comet_pl.model.chunk_layout import fixed_chunks
from data.batches import pad_rows
from data.tokenizer import pad_token, stop_token

Count = Callable[[int], None]
"""Called with the number of tokens that have just been read."""


@dataclass
class Engine:
    """A model with its tokenizer."""

    model: CometForCausalLM
    tokenizer: PreTrainedTokenizerBase

    def tensor(self, ids: np.ndarray) -> Tensor:
        """Ids (n,) of one text as (1, n) on the model's device."""
        return torch.from_numpy(ids.astype(np.int64))[None].to(self.model.device)

    def text(self, ids: Tensor) -> str:
        """The text of an answer (n,), without special tokens and the space around it."""
        return str(self.tokenizer.decode(ids, skip_special_tokens=True)).strip()

    def prefill(self, ids: Tensor, cache: CometCache | None = None, **options: Any) -> CometCache:
        """The cache after more tokens (B, N); the logits of one column alone are computed."""
        options |= {"past_key_values": cache, "use_cache": True, "logits_to_keep": 1}
        return self.model(ids, **options).past_key_values

    def generate(
        self,
        ids: Tensor,
        max_new_tokens: int,
        mask: Tensor | None = None,
        cache: CometCache | None = None,
    ) -> Tensor:
        """(B, <= max_new_tokens) greedy continuation, whatever the model's folder says of sampling.

        Args:
            ids: (B, N), all tokens so far. mask: (B, N); None: no padding.
            cache: holds the first of them, fewer than N.
        """
        sampling: dict[str, Any] = dict.fromkeys(("temperature", "top_p", "top_k"))
        output: Any = self.model.generate(  # type: ignore[misc]
            ids,
            attention_mask=torch.ones_like(ids) if mask is None else mask,
            past_key_values=cache,
            max_new_tokens=max_new_tokens,
            do_sample=False,
            num_beams=1,
            num_return_sequences=1,
            eos_token_id=stop_token(self.tokenizer),
            pad_token_id=pad_token(self.tokenizer),
            **sampling,
        )
        return output[:, ids.shape[1] :]

    def answers(
        self,
        prompts: Sequence[np.ndarray],
        settings: EvalConfig,
        max_new_tokens: int,
        count: Count = lambda n: None,
    ) -> list[str]:
        """Greedy answers in the order of the prompts, from left-padded batches of similar lengths.

        Args:
            settings: batch_size; priming: tokens of a prompt's last chunk, which stays open for the
                answer (None: as the chunk size leaves it).
        """
        texts = [""] * len(prompts)
        order = sorted(range(len(prompts)), key=lambda number: len(prompts[number]))
        device = self.model.device
        for start in range(0, len(order), settings.batch_size):
            numbers = order[start : start + settings.batch_size]
            rows = [(prompts[number], prompts[number]) for number in numbers]
            batch = pad_rows(rows, pad_token(self.tokenizer), left=True)
            ids, mask = batch["input_ids"].to(device), batch["attention_mask"].to(device)
            cache = self._all_but_last(ids, mask, settings.priming) if settings.priming else None
            answers = self.generate(ids, max_new_tokens, mask, cache)
            for number, answer in zip(numbers, answers, strict=True):
                texts[number] = self.text(answer)
            count(int(mask.sum()))
        return texts

    def _all_but_last(self, ids: Tensor, mask: Tensor, priming: int) -> CometCache | None:
        """The memory of left-padded prompts up to their last `priming` tokens, all chunks closed.

        None if no prompt is longer.
        """
        if ids.shape[1] <= priming:
            return None
        lengths, size = mask.sum(1).tolist(), self.model.config.chunk_size
        plans = [fixed_chunks(max(0, n - priming), size) for n in lengths]
        mask = mask[:, :-priming]
        return self.prefill(ids[:, :-priming], attention_mask=mask, chunk_sizes=plans)
