"""Plain decoders, from a folder or of a shape with random weights, and memory plugged into them."""

import copy

import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer
from transformers.utils import logging

from benchmarks.shared.options import ROOT, SIZES
from comet_pl import CometForCausalLM
from comet_pl.errors import UserError, first_line

USUAL_MODEL = ROOT / "models" / "smollm2_135m"


BACKBONES = SIZES["decoders"]


def random_decoder(shape):
    """A decoder with random weights: the cost of decoding does not depend on them."""
    rest = {"tie_word_embeddings": True, "max_position_embeddings": 1 << 18}
    config = AutoConfig.for_model(**shape, **rest)
    return AutoModelForCausalLM.from_config(config, attn_implementation="sdpa")


def load_decoder(path):
    """A plain decoder from a folder or the hub, float32, with sdpa. Raises UserError."""
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    options = {"dtype": torch.float32, "attn_implementation": "sdpa"}
    try:
        decoder = AutoModelForCausalLM.from_pretrained(path, **options)
    except (OSError, ValueError, KeyError) as error:
        raise UserError(f"--model: {path} cannot be loaded: {first_line(error)}") from None
    if isinstance(decoder, CometForCausalLM):
        plain = "a plain decoder is needed, memory is plugged in here"
        raise UserError(f"--model: {path} is a CoMeT folder; {plain}")
    return decoder.eval()


def load_tokenizer(path):
    try:
        return AutoTokenizer.from_pretrained(path)
    except (OSError, ValueError, KeyError) as error:
        why = f"no tokenizer can be loaded: {first_line(error)}"
        raise UserError(f"--model: {path}: {why}") from None


def plug_in(decoder, comet, start=None):
    """A copy of the decoder with fresh memory, which shares all weights but embedding and head, as
    these get rows. Raises UserError."""
    logging.set_verbosity_error()  # resizing the embedding warns
    ends = (decoder.get_input_embeddings(), decoder.get_output_embeddings())
    own = {id(part.weight) for part in ends}
    shared = {id(weight): weight for weight in decoder.parameters() if id(weight) not in own}
    try:
        return CometForCausalLM.from_decoder(copy.deepcopy(decoder, shared), comet, start).eval()
    except ValueError as error:
        raise UserError(str(error)) from None
