"""A new run's model: from scratch, or memory plugged into a decoder."""

from __future__ import annotations

from typing import TYPE_CHECKING

from comet_pl.config.schema import Config, comet_keys
from comet_pl.errors import UserError, first_line

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from comet_pl import CometForCausalLM

FROM_SCRATCH = (
    "hidden_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "head_dim",
    "intermediate_size",
    "initializer_range",
    "tie_word_embeddings",
)


def new_model(config: Config, tokenizer: PreTrainedTokenizerBase) -> CometForCausalLM:
    """The model of a new run, without adapters: from scratch, or memory plugged into
    backbone.path.

    Raises:
        UserError: sizes that do not fit together; a folder that cannot be loaded; model.start is no
            token.
        MemoryError: it does not fit.
    """
    from transformers import AutoConfig

    from comet_pl import CometConfig, CometForCausalLM
    from comet_pl.experiment.loading import load_model
    from comet_pl.model.room import check_weights
    from comet_pl.model.start import start_rows, start_sinks
    from comet_pl.training.induction_init import start_lookups

    backbone, comet = config.backbone, comet_keys(config.model)
    start = start_token(config.model.start, tokenizer)
    if backbone.path is not None:
        # Not as the folder has them: where bf16 only computes, an optimizer's small steps must not
        # be lost in bf16 weights.
        dtype = "bfloat16" if config.trainer.precision == "bf16-true" else "float32"
        attention = {"attn_implementation": backbone.attn_implementation}
        what = f"backbone.path: {backbone.path}"
        options = {"comet": comet, "start": start, "dtype": dtype, **attention}
        return load_model(backbone.path, what, **options)
    check_weights(backbone, config.model.adapter_rank)
    try:
        decoder = AutoConfig.for_model(
            backbone.model_type,
            **{key: getattr(backbone, key) for key in FROM_SCRATCH},
            vocab_size=len(tokenizer),
            sliding_window=None,  # Mistral's default is one
            rope_parameters={"rope_type": "default", "rope_theta": backbone.rope_theta},
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
            bos_token_id=tokenizer.bos_token_id,
        )
        settings = CometConfig(backbone_config=decoder, **comet)
        settings.backbone_config.max_position_embeddings = settings.positions()
        settings._attn_implementation = backbone.attn_implementation
        model = CometForCausalLM(settings)
        if start is not None:
            start_rows(model, start)
        if backbone.lookback is not None:
            start_lookups(model, backbone.lookback)
        start_sinks(model)
        return model
    except ValueError as error:
        if isinstance(error, MemoryError):
            raise
        raise UserError(f"model or backbone: {first_line(error)}") from None


def start_token(start: str, tokenizer: PreTrainedTokenizerBase) -> int | None:
    """The token whose row new tokens begin as; None: the mean of all.

    Raises:
        UserError: model.start is no single token.
    """
    if start == "mean":
        return None
    ids, last = tokenizer.encode(start, add_special_tokens=False), len(tokenizer) - 1
    if start.isdecimal():
        ids = [int(start)]
    if len(ids) != 1 or ids[0] > last:
        what = f"a text of {len(ids)} tokens" if len(ids) != 1 else "no token"
        raise UserError(
            f"model.start: {start!r} given, {what} to this tokenizer; allowed: mean, a text that "
            f"is one token, or a token's number from 0 to {last}"
        )
    return ids[0]
