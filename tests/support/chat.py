"""read and ask on a tiny model: how tests call them, and what they have to answer."""

import io
import subprocess
import sys
from itertools import chain

import torch

from comet_pl import CometConfig, CometForCausalLM
from data.chat_template import encode
from tests.support.models import MEMORY, backbone
from tests.support.tiny_runs import ROOT

TEXT = "It was a dark night; the rain fell in torrents, and the wind swept up the streets.\n"


def save_model(folder, tokenizer, seed=0, layers=2):
    """A CoMeT in double precision, with its tokenizer."""
    config = CometConfig(
        backbone(layers=layers, vocab_size=len(tokenizer)), adapter_rank=2, **MEMORY
    )
    torch.manual_seed(seed)
    CometForCausalLM(config).double().save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def start(module, *arguments):
    return [sys.executable, "-m", f"comet_pl.{module}", *map(str, arguments)]


def run(module, *arguments):
    argv = start(module, *arguments)
    return subprocess.run(argv, cwd=ROOT, capture_output=True, text=True, timeout=120)


def call(program, *arguments):
    program.main([str(argument) for argument in arguments])


def typed(monkeypatch, content):
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(content)))


def one_go(model, ids):
    with torch.no_grad():
        return model(torch.tensor([ids]), use_cache=True, logits_to_keep=1).past_key_values


def greedy(model, tokenizer, ids, count):
    """Generation from the whole text, without a stop token at its end."""
    ids, end = torch.tensor([ids]), tokenizer.eos_token_id
    options = {"max_new_tokens": count, "do_sample": False, "eos_token_id": end}
    out = model.generate(ids, attention_mask=torch.ones_like(ids), **options)
    answer = out[0, ids.shape[1] :].tolist()
    return answer[:-1] if answer[-1] == end else answer


def joined(tokenizer, *parts):
    """Ids of texts and ids, each text tokenised alone."""
    ids = (encode(tokenizer, part) if isinstance(part, str) else part for part in parts)
    return [*chain.from_iterable(ids)]
