"""A trained model's results, by kind of data: as files, figures and a table.

Files are written again after each length, task or trace, so that an interrupted evaluation leaves what it has (comet_pl/evaluation/results.py).
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedTokenizerBase

from comet_pl.config.schema import AgentData, Config, PasskeyData, ScrollsData, UserBehaviorData
from comet_pl.evaluation.agent import evaluate_agent
from comet_pl.evaluation.behavior import evaluate_behavior
from comet_pl.evaluation.passkey import evaluate_passkey
from comet_pl.evaluation.results import Results
from comet_pl.evaluation.scrolls import evaluate_scrolls
from comet_pl.model.modeling_comet import CometForCausalLM

EVALUATE = {
    PasskeyData: evaluate_passkey,
    ScrollsData: evaluate_scrolls,
    AgentData: evaluate_agent,
    UserBehaviorData: evaluate_behavior,
}


def evaluate(
    model: CometForCausalLM, tokenizer: PreTrainedTokenizerBase, config: Config, out: Path
) -> dict[str, Any]:
    """Evaluates on what config.data names, as config.eval says; writes the files into `out` and prints a table.

    Returns:
        What <out>/eval/<kind>.json holds.

    Raises:
        UserError: lengths that are too short for a passkey; data that cannot be read.
    """
    training = model.training
    if config.train.compile:
        model.compile_cells()
    try:
        with torch.no_grad():
            return EVALUATE[type(config.data)](
                model.eval(), tokenizer, config, Results(out, config.data.kind)
            )
    finally:
        model.train(training)
