"""Prompts in, greedy answers out: what all evaluations share."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from comet_pl import CometCache, CometForCausalLM
from comet_pl.config.schema import EvalConfig
from comet_pl.model.chunk_layout import fixed_chunks
from data.batches import pad_rows, pad_token, stop_token

Count = Callable[[int], None]
"""Called with the number of tokens that have just been read."""


def answer_prompts(
    model: CometForCausalLM,
    tokenizer: PreTrainedTokenizerBase,
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
    for start in range(0, len(order), settings.batch_size):
        numbers = order[start : start + settings.batch_size]
        rows = [(prompts[number], prompts[number]) for number in numbers]
        batch = pad_rows(rows, pad_token(tokenizer), left=True)
        ids, mask = batch["input_ids"].to(model.device), batch["attention_mask"].to(model.device)
        cache = _all_but_last(model, ids, mask, settings.priming) if settings.priming else None
        answers = generate(model, tokenizer, ids, max_new_tokens, mask, cache)
        for number, answer in zip(numbers, answers, strict=True):
            texts[number] = plain_text(tokenizer, answer)
        count(int(mask.sum()))
    return texts


def _all_but_last(
    model: CometForCausalLM, ids: Tensor, mask: Tensor, priming: int
) -> CometCache | None:
    """The memory of left-padded prompts up to their last `priming` tokens, all chunks closed.

    None if no prompt is longer.
    """
    if ids.shape[1] <= priming:
        return None
    lengths = [max(0, n - priming) for n in mask.sum(1).tolist()]
    return model(
        ids[:, :-priming],
        attention_mask=mask[:, :-priming],
        chunk_sizes=[fixed_chunks(n, model.config.chunk_size) for n in lengths],
        use_cache=True,
        logits_to_keep=1,
    ).past_key_values


def prefill(
    model: CometForCausalLM, ids: Tensor, cache: CometCache | None, sizes: list[int] | None = None
) -> CometCache:
    """The cache after more tokens (B, N); the logits of one column alone are computed."""
    return model(
        ids, past_key_values=cache, use_cache=True, logits_to_keep=1, chunk_sizes=sizes
    ).past_key_values


def generate(
    model: CometForCausalLM,
    tokenizer: PreTrainedTokenizerBase,
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
    output: Any = model.generate(  # type: ignore[misc]
        ids,
        attention_mask=torch.ones_like(ids) if mask is None else mask,
        past_key_values=cache,
        max_new_tokens=max_new_tokens,
        do_sample=False,
        num_beams=1,
        num_return_sequences=1,
        eos_token_id=stop_token(tokenizer),
        pad_token_id=pad_token(tokenizer),
        **sampling,
    )
    return output[:, ids.shape[1] :]


def plain_text(tokenizer: PreTrainedTokenizerBase, ids: Tensor) -> str:
    """The text of an answer (n,), without special tokens and the space around it."""
    return str(tokenizer.decode(ids, skip_special_tokens=True)).strip()
