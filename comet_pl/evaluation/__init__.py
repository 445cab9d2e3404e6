"""A trained model's results, by data.kind: files, figures and a table.

Files are replaced after each length, task or trace, so that an interrupted evaluation leaves what
it has (comet_pl/evaluation/results.py).
"""

from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedTokenizerBase

from comet_pl import CometForCausalLM
from comet_pl.config.schema import Config
from comet_pl.evaluation.agent import evaluate_agent
from comet_pl.evaluation.behavior import evaluate_behavior
from comet_pl.evaluation.generation import Engine
from comet_pl.evaluation.passkey import evaluate_passkey
from comet_pl.evaluation.results import Results
from comet_pl.evaluation.scrolls import evaluate_scrolls
from comet_pl.evaluation.text import evaluate_text

AUTOCAST = {"bf16-mixed": torch.bfloat16, "16-mixed": torch.float16}
WEIGHTS = {"bf16-true": torch.bfloat16, "16-true": torch.float16}
EVALUATE = {
    "passkey": evaluate_passkey,
    "scrolls": evaluate_scrolls,
    "agent": evaluate_agent,
    "user_behavior": evaluate_behavior,
    "text": evaluate_text,
}


def evaluate(
    model: CometForCausalLM,
    tokenizer: PreTrainedTokenizerBase,
    config: Config,
    out: Path,
    step: int = 0,
) -> dict[str, Any]:
    """The content of <out>/eval/<kind>.json, after writing all files and printing a table.

    It computes as the training's validation does, in trainer.precision; weights keep their own
    precision unless it is a half one.

    Args:
        config: data says on what, eval how.
        step: optimizer steps of the weights, where TensorBoard shows their scores.

    Raises:
        UserError: lengths too short for a passkey; data that cannot be read.
    """
    training = model.training
    if config.train.compile:
        model.compile_cells()
    kind = config.data.kind
    precision = config.trainer.precision
    half = AUTOCAST.get(precision)
    torch.set_float32_matmul_precision(config.trainer.matmul_precision)
    model.to(WEIGHTS.get(precision, model.dtype))  # type: ignore[arg-type]
    what = f"{model.dtype} weights" + (f", computing in {half}" if half else "")
    print(f"on {model.device}: {what.replace('torch.', '')}", flush=True)
    engine, results = Engine(model.eval(), tokenizer), Results(out, kind)
    try:
        with torch.no_grad(), torch.autocast(model.device.type, half, enabled=half is not None):
            values = EVALUATE[kind](engine, config, results)
        results.log(values, step)
        return values
    finally:
        model.train(training)
