"""What all evaluations share: prompts in, greedy answers out."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from comet_pl.model.comet import CometForCausalLM
from data.base import pad_rows, pad_token, stop_token

Count = Callable[[int], None]
"""Is told how many tokens have been read."""


def answer_prompts(
    model: CometForCausalLM,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[np.ndarray],
    max_new_tokens: int,
    batch_size: int,
    count: Count = lambda n: None,
) -> list[str]:
    """Greedy answers in the order of the prompts, generated in left-padded batches of prompts of similar length."""
    texts = [""] * len(prompts)
    order = sorted(range(len(prompts)), key=lambda number: len(prompts[number]))
    for start in range(0, len(order), batch_size):
        numbers = order[start : start + batch_size]
        batch = pad_rows([(prompts[number], prompts[number]) for number in numbers], pad_token(tokenizer), left=True)
        ids, mask = batch["input_ids"].to(model.device), batch["attention_mask"].to(model.device)
        given = generate(model, tokenizer, ids, mask, max_new_tokens)
        for number, answer in zip(numbers, given, strict=True):
            texts[number] = str(tokenizer.decode(answer, skip_special_tokens=True)).strip()
        count(int(mask.sum()))
    return texts


def generate(
    model: CometForCausalLM, tokenizer: PreTrainedTokenizerBase, ids: Tensor, mask: Tensor, max_new_tokens: int, **more: Any
) -> Tensor:
    """(B, <= max_new_tokens) greedy continuation; whatever the model's folder says of sampling is set aside."""
    greedy: dict[str, Any] = {
        "do_sample": False,
        "num_beams": 1,
        "num_return_sequences": 1,
        "temperature": None,
        "top_p": None,
        "top_k": None,
    }
    ends: dict[str, Any] = {"eos_token_id": stop_token(tokenizer), "pad_token_id": pad_token(tokenizer)}
    more |= {"attention_mask": mask, "max_new_tokens": max_new_tokens}
    all_ids: Any = model.generate(ids, **greedy, **ends, **more)  # type: ignore[misc]
    return all_ids[:, ids.shape[1] :]
