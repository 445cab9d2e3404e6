"""What all evaluations share: prompts in, greedy answers out."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from comet_pl.config.schema import EvalConfig
from comet_pl.model.cache import CometCache
from comet_pl.model.chunk_layout import fixed_chunks
from comet_pl.model.modeling_comet import CometForCausalLM
from data.batches import pad_rows, pad_token, stop_token

Count = Callable[[int], None]
"""Is told how many tokens have been read."""


def answer_prompts(
    model: CometForCausalLM,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[np.ndarray],
    settings: EvalConfig,
    max_new_tokens: int,
    count: Count = lambda n: None,
) -> list[str]:
    """Greedy answers in the order of the prompts, generated in left-padded batches of prompts of similar length.

    Args:
        settings: batch_size; priming, the tokens of a prompt's last chunk, which stays open for the answer (None: as C leaves it).
    """
    texts = [""] * len(prompts)
    order = sorted(range(len(prompts)), key=lambda number: len(prompts[number]))
    for start in range(0, len(order), settings.batch_size):
        numbers = order[start : start + settings.batch_size]
        batch = pad_rows(
            [(prompts[number], prompts[number]) for number in numbers],
            pad_token(tokenizer),
            left=True,
        )
        ids, mask = batch["input_ids"].to(model.device), batch["attention_mask"].to(model.device)
        cache = settings.priming and _all_but_last(model, ids, mask, settings.priming)
        given = generate(
            model,
            tokenizer,
            ids,
            mask,
            max_new_tokens,
            **({"past_key_values": cache} if cache else {}),
        )
        for number, answer in zip(numbers, given, strict=True):
            texts[number] = str(tokenizer.decode(answer, skip_special_tokens=True)).strip()
        count(int(mask.sum()))
    return texts


def _all_but_last(
    model: CometForCausalLM, ids: Tensor, mask: Tensor, priming: int
) -> CometCache | None:
    """The memory of left-padded prompts up to their last `priming` tokens, all chunks closed; None if no prompt is longer."""
    if ids.shape[1] <= priming:
        return None
    lengths = mask.sum(1).tolist()
    plans = [fixed_chunks(max(0, n - priming), model.config.chunk_size) for n in lengths]
    cut = slice(None, -priming)
    return model(
        ids[:, cut],
        attention_mask=mask[:, cut],
        chunk_sizes=plans,
        use_cache=True,
        logits_to_keep=1,
    ).past_key_values


def generate(
    model: CometForCausalLM,
    tokenizer: PreTrainedTokenizerBase,
    ids: Tensor,
    mask: Tensor,
    max_new_tokens: int,
    **more: Any,
) -> Tensor:
    """(B, <= max_new_tokens) greedy continuation; whatever the model's folder says of sampling is set aside."""
    greedy: dict[str, Any] = {"do_sample": False, "num_beams": 1, "num_return_sequences": 1}
    greedy |= dict.fromkeys(("temperature", "top_p", "top_k"))
    ends: dict[str, Any] = {
        "eos_token_id": stop_token(tokenizer),
        "pad_token_id": pad_token(tokenizer),
    }
    more |= {"attention_mask": mask, "max_new_tokens": max_new_tokens}
    all_ids: Any = model.generate(ids, **greedy, **ends, **more)  # type: ignore[misc]
    return all_ids[:, ids.shape[1] :]
