"""On a GPU: golden cases, attention and its kernels, gradients, caches, decoding, compiled cells.

The emulated device (tests/emulator) shows which kernels run; here their numbers are compared.
"""

from pathlib import Path

import pytest
import torch

from benchmarks.gpu import law
from benchmarks.gpu.measure import Place, kernels, relative
from comet_pl import CometCache, CometConfig, CometForCausalLM
from comet_pl.model.attention import attend
from comet_pl.training.chunk_checkpointing import read_chunks
from comet_pl.training.text_reader import read_windows
from comet_pl.training.windows import count_targets, cut_windows
from tests.laws.test_reference import CASES, load, sequences
from tests.support.models import FAMILIES, MEMORY, backbone, text, tiny
from tests.support.training import fit, norm_apart, ragged

pytestmark = pytest.mark.gpu
GPU = "cuda"
HALF = (torch.bfloat16, torch.float16)
PLACE = Place(GPU, tiny=True, scratch=Path())


def largest(found, expected):
    """Greatest difference, relative to the greatest value."""
    found, expected = found.detach().double().cpu(), expected.detach().double().cpu()
    return float((found - expected).abs().max() / expected.abs().max())


# ---- the authors' numbers


@pytest.mark.parametrize(("dtype", "limit"), [(torch.float32, 1e-4), (torch.bfloat16, 0.05)])
@pytest.mark.parametrize("case", CASES)
def test_golden_cases(case, dtype, limit):
    model, expected, stride = load(case)
    model = model.to(GPU, dtype).eval()
    for k in sequences(expected):
        ids, sizes = expected[f"input_ids.{k}"][None].to(GPU), expected[f"chunk_sizes.{k}"].tolist()
        with torch.no_grad():
            logits = model(ids, chunk_sizes=sizes, strides=stride and [stride]).logits
        assert largest(logits[0], expected[f"logits.{k}"]) < limit
    if "generated" in expected and dtype == torch.float32:
        prompt, wanted = expected["input_ids.0"][None].to(GPU), expected["generated"].flatten()
        options = {"max_new_tokens": len(wanted), "do_sample": False, "eos_token_id": None}
        found = model.generate(prompt, pad_token_id=0, **options)[0, prompt.shape[1] :]
        assert torch.equal(found.cpu(), wanted)


# ---- attention


SHAPES = [(0, 7, 4, 2), (5, 7, 4, 2), (5, 1, 4, 2), (300, 130, 6, 6), (300, 130, 8, 1)]


@pytest.mark.parametrize("is_ragged", [False, True], ids=["uniform", "ragged"])
@pytest.mark.parametrize("width", [64, 128])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize(
    ("dtype", "limit"),
    [(torch.float32, 1e-4), (torch.bfloat16, 0.02), (torch.float16, 0.004), (torch.float64, 1e-10)],
    ids=str,
)
def test_attention_is_the_formula(dtype, limit, shape, width, is_ragged):
    """Forward and backward, against float64; the kernel is not the one that writes all scores."""
    past, own, heads, groups = shape
    inputs = law.attention_inputs(PLACE, dtype, past, own, heads, groups, width, is_ragged)
    chunk = law.bare_chunk(GPU, past, own, is_ragged)
    out = attend("sdpa", *inputs, chunk, law.SCALE)
    weights = torch.randn_like(out)
    (out * weights).sum().backward()
    exact = [t.detach().double().requires_grad_() for t in inputs]
    wanted = law.formula(*exact, past)
    (wanted * weights.double()).sum().backward()
    assert largest(out, wanted) < limit
    for mine, theirs in zip(inputs, exact, strict=True):
        assert largest(mine.grad, theirs.grad) < 2 * limit
    if dtype != torch.float64:
        seen = kernels(lambda: attend("sdpa", *inputs, chunk, law.SCALE))
        names = " ".join(name.lower() for name, *_ in seen)
        half = dtype in HALF and not is_ragged
        assert ("flash" if half else "fmha") in names and "softmax" not in names


# ---- laws in float64, where a decoder's norms still round to float32


@pytest.mark.parametrize("family", FAMILIES)
def test_all_ways_to_read_agree(family, tmp_path):
    here, there, ids = tiny(family), tiny(family).to(GPU), text(2, 41)
    mask = torch.ones_like(ids)
    mask[1, :9] = 0
    with torch.no_grad():
        whole, padded = here(ids).logits, here(ids, attention_mask=mask).logits
        assert largest(there(ids.to(GPU)).logits, whole) < 1e-5
        assert largest(there(ids).logits, whole) < 1e-5  # ids on the CPU
        found = there(ids.to(GPU), attention_mask=mask.to(GPU)).logits.cpu()
        assert largest(found[mask.bool()], padded[mask.bool()]) < 1e-5
        cache = CometCache()
        steps = [there(ids[:, k : k + 1].to(GPU), past_key_values=cache) for k in range(41)]
        assert largest(torch.cat([step.logits for step in steps], 1), whole) < 1e-5
        cache.save(tmp_path / "memory")
        moved = CometCache.load(tmp_path / "memory")
        after = here(ids[:, :3], past_key_values=moved).logits
        assert largest(there(ids[:, :3].to(GPU), past_key_values=cache).logits, after) < 1e-5
    options = {"max_new_tokens": 15, "do_sample": False}
    expected = here.generate(ids, **options)
    assert torch.equal(there.generate(ids.to(GPU), **options).cpu(), expected)


@pytest.mark.parametrize("way", ["none", "cell", "chunk", "chunk, offloaded", "layer_major"])
@pytest.mark.parametrize("family", ["qwen3", "llama"])
def test_gradients_agree_whatever_is_recomputed(family, way):
    batch, here, there = ragged([41, 33, 41], 1.0), tiny(family).train(), tiny(family).to(GPU)
    there.train().traversal = "layer_major" if way == "layer_major" else "chunk_major"
    recompute = "none" if way == "layer_major" else way
    expected = law.gradients(here, batch, "none", 5, 4)
    assert relative(law.gradients(there, batch, recompute, 5, 4), expected) < 1e-5


@pytest.mark.parametrize("recompute", ["none", "cell", "chunk"])
def test_autocasts_gradients_are_summed_in_float32(recompute):
    """48 chunks: bfloat16's own error does not grow with their number."""
    errors = {}
    for chunks in (4, 48):
        batch, results = ragged([5 * chunks] * 2, 1.0), []
        for precision in ("32-true", "bf16-mixed"):
            model = tiny(dtype=torch.float32)
            options = {"accelerator": "gpu", "precision": precision}
            _, watch = fit(model, [batch], trainer=options, recompute=recompute)
            found = watch.gradients[0].items()
            results.append({k: None if g is None else g.cpu() for k, g in found})
        errors[chunks] = norm_apart(results[1], results[0])
    assert errors[48] < max(0.03, 1.5 * errors[4])


def test_adamw_is_fused_and_needs_no_copy_of_the_weights():
    model = tiny(dtype=torch.float32).train()
    _, watch = fit(model, [ragged([20], 1.0)] * 2, trainer={"accelerator": "gpu"})
    assert all(group["fused"] for group in watch.optimizer.param_groups)


@pytest.mark.parametrize("recompute", ["none", "cell", "chunk"])
def test_peaks_of_recomputation(recompute):
    """Beyond weights, gradients and a window's ids, one chunk's activations and what is kept."""
    sizes = {"chunk_size": 64, "global_size": 8, "compression_stride": 8, "temporary_capacity": 64}
    peaks = {}
    for chunks in (16, 32):
        model = tiny(dtype=torch.float32, **sizes).to(GPU).train()
        model.gradient_checkpointing = recompute != "none"
        batch = ragged([64 * chunks], 1.0)
        windows, count = cut_windows(batch, 64, None), count_targets(batch)
        torch.cuda.reset_peak_memory_stats()
        read = read_windows if recompute != "chunk" else read_chunks
        for loss in read(model, windows, count):
            loss.backward()
        peaks[chunks] = torch.cuda.max_memory_allocated() / 2**20
    growth = {"none": 40.0, "cell": 4.0, "chunk": 1.0}  # MiB for 16 chunks of 64 x 16
    assert peaks[32] - peaks[16] < growth[recompute]


def test_compiled_cells_are_whole_graphs_with_the_same_numbers():
    options = {"chunk_size": 6, "temporary_capacity": 4, "dtype": torch.float32}
    model, plain, ids = tiny(**options).to(GPU), tiny(**options).to(GPU), text(1, 30).to(GPU)
    torch._dynamo.reset()
    model.compile_cells(fullgraph=True)
    with torch.no_grad():
        found = model(ids, chunk_sizes=[6] * 5).logits
        expected = plain(ids, chunk_sizes=[6] * 5).logits
    assert largest(found, expected) < 1e-4
    torch._dynamo.reset()


# ---- CUDA graphs


@pytest.mark.parametrize("compiled", [False, True], ids=["", "compiled"])
@pytest.mark.parametrize(
    ("dtype", "limit"),
    [(torch.float64, 1e-5), (torch.float32, 1e-4), (torch.bfloat16, 0.05)],
    ids=str,
)
def test_recorded_chunks(dtype, limit, compiled):
    """A long text in one call, then tokens one by one, in half precision by the flash kernel."""
    if compiled and dtype == torch.float64:
        pytest.skip("compiled once in float32")
    sizes = backbone(hidden_size=128, head_dim=64)
    torch.manual_seed(0)
    model = CometForCausalLM(CometConfig(sizes, adapter_rank=2, **MEMORY)).to(GPU, dtype).eval()
    ids = text(3, 200).to(GPU)
    results = []
    for model.cuda_graphs in (False, True):
        if compiled and model.cuda_graphs:
            torch._dynamo.reset()
            model.compile_cells()
        with torch.inference_mode():
            cache = CometCache()
            logits = [model(ids[:, :100], past_key_values=cache).logits]
            for k in range(100, 200):
                logits.append(model(ids[:, k : k + 1], past_key_values=cache).logits)
        results.append(torch.cat(logits, 1))
    # Two kinds of steps, whole chunks, chunks that close at a token, and that token.
    assert len(cache.graphs.recordings) == 5
    assert largest(results[1], results[0]) < limit
    if dtype == torch.bfloat16:
        with torch.inference_mode():
            seen = kernels(lambda: model(ids[:, :1], past_key_values=cache))
        assert any("flash" in name for name, *_ in seen)


def test_generated_by_graphs():
    model, ids = tiny(dtype=torch.float32).to(GPU), text(2, 23).to(GPU)
    options = {"max_new_tokens": 60, "do_sample": False}
    expected = model.generate(ids, **options)
    model.cuda_graphs = True
    found = model.generate(ids, **options, return_dict_in_generate=True)
    assert torch.equal(found.sequences, expected)
    assert len(found.past_key_values.graphs.recordings) >= 3
    torch.manual_seed(0)
    sampled = [model.generate(ids, max_new_tokens=30, do_sample=True) for _ in range(2)]
    assert not torch.equal(*sampled)
