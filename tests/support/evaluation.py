"""Small models to evaluate, and their answers by whole forward passes."""

import json
from functools import cache

import torch

from comet_pl import build
from comet_pl.config.load import load
from tests.support.models import continued
from tests.support.tiny_runs import ROOT, TINY

PASSKEY = [*TINY, f"data.haystack={ROOT / 'LICENSE'}"]
PASSKEY += """
conf=passkey backbone.vocab_size=400 data.train_length=64 data.length_schedule=null
eval.lengths=[200,64] eval.depths=3 eval.examples=2
""".split()


@cache
def built(*argv):
    """(model, tokenizer), shared by tests: none may change them."""
    config = load(list(argv))
    tokenizer = build.build_tokenizer(config)
    torch.manual_seed(0)
    return build.build_model(config, tokenizer), tokenizer


def passkeys(*keys):
    return *built(*PASSKEY), load([*PASSKEY, *keys])


def lines_of(file):
    return [json.loads(line) for line in file.read_text().splitlines()]


def greedy(model, prompts, count, end):
    """Continuations of prompts (B, N) by whole forward passes, each up to its end token."""
    rows = continued(model, prompts, count)[:, prompts.shape[1] :].tolist()
    return [row[: row.index(end) + 1] if end in row else row for row in rows]
