"""Law 1: what the authors' implementation computed, we compute."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from comet_pl import CometForCausalLM
from comet_pl.model import attention
from comet_pl.model.pretrained import authors_name

GOLDEN = Path(__file__).parent / "golden"
CASES = sorted(folder.name for folder in GOLDEN.iterdir())


def load(case):
    expected = load_file(GOLDEN / case / "expected.safetensors")
    stride = json.loads((GOLDEN / case / "case.json").read_text())["stride_override"]
    return CometForCausalLM.from_pretrained(GOLDEN / case), expected, stride


def sequences(expected):
    return [k for k in range(len(expected)) if f"input_ids.{k}" in expected]


def close(ours, reference, tolerance=1e-5):  # float32, another order of additions
    assert ours.shape == reference.shape
    worst = (ours - reference).abs().max() / reference.abs().max().clamp_min(1e-30)
    assert worst < tolerance, f"relative difference {worst:.2e}"


@pytest.fixture(params=["sdpa", "kernels", "eager"])
def implementation(request, monkeypatch):
    """sdpa as it comes; with its kernels also for few scores; the plain formula always."""
    if request.param == "kernels":
        monkeypatch.setattr(attention, "FEW_SCORES", 0)
    return "eager" if request.param == "eager" else "sdpa"


@pytest.mark.parametrize("case", CASES)
def test_logits(case, implementation):
    model, expected, stride = load(case)
    model.set_attn_implementation(implementation)
    for k in sequences(expected):
        ids = expected[f"input_ids.{k}"][None]
        sizes = expected[f"chunk_sizes.{k}"].tolist()
        with torch.no_grad():
            out = model(ids, chunk_sizes=sizes, strides=None if stride is None else [stride])
        close(out.logits[0], expected[f"logits.{k}"])


@pytest.mark.parametrize("recompute", [False, True])
@pytest.mark.parametrize("case", [c for c in CASES if c != "decode"])
def test_loss_and_gradients(case, recompute, implementation):
    """All sequences as one right-padded batch, full backpropagation through all chunks."""
    model, expected, stride = load(case)
    model.set_attn_implementation(implementation)
    model.train().gradient_checkpointing = recompute
    if "loss" not in expected:
        pytest.fail(f"{case} has no loss")
    rows = sequences(expected)
    longest = max(len(expected[f"input_ids.{k}"]) for k in rows)
    ids = torch.zeros(len(rows), longest, dtype=torch.long)
    labels, mask = torch.full_like(ids, -100), torch.zeros_like(ids)
    for b, k in enumerate(rows):
        n = len(expected[f"input_ids.{k}"])
        ids[b, :n], labels[b, :n] = expected[f"input_ids.{k}"], expected[f"labels.{k}"]
        mask[b, :n] = 1
    sizes = [expected[f"chunk_sizes.{k}"].tolist() for k in rows]
    strides = None if stride is None else [stride] * len(rows)
    out = model(ids, attention_mask=mask, labels=labels, chunk_sizes=sizes, strides=strides)
    close(out.loss.detach().view(1), expected["loss"].float().view(1))
    out.loss.backward()
    gradients = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    checked = 0
    for key, value in expected.items():
        what, _, name = key.partition(".")
        if what not in ("grad", "grad_norm"):
            continue
        found = gradients[authors_name(name)]
        close(found, value) if what == "grad" else close(found.norm()[None], value.float().view(1))
        checked += 1
    assert checked > 10


def test_greedy_continuation(implementation):
    """Crosses compression tokens and chunk boundaries; through Hugging Face's generate, with a
    cache."""
    model, expected, _ = load("decode")
    model.set_attn_implementation(implementation)
    prompt = expected["input_ids.0"][None]
    wanted = expected["generated"].flatten()
    options = {"max_new_tokens": len(wanted), "do_sample": False, "eos_token_id": None}
    options |= {"return_dict_in_generate": True, "output_logits": True}
    out = model.generate(prompt, **options)
    assert out.sequences[0, prompt.shape[1] :].tolist() == wanted.tolist()
    close(torch.cat(out.logits), expected["gen_logits"].reshape(len(wanted), -1))
