"""Is it right on this device? Ceilings, golden cases, the laws, attention, mixed precision."""

import json
from functools import partial

import torch
from safetensors.torch import load_file

from benchmarks.gpu.measure import SHAPES, Bench, Measurement, apart
from benchmarks.shared.options import ROOT
from comet_pl import CometCache, CometConfig, CometForCausalLM
from comet_pl.model.attention import attend
from comet_pl.model.chunk_batch import RaggedChunk, UniformChunk
from comet_pl.training.chunk_checkpointing import read_chunks
from comet_pl.training.text_reader import read_windows
from comet_pl.training.windows import count_targets, cut_windows

# past, own tokens, heads, key heads, head width; the last four at Qwen3's sizes
ATTENTION = [(0, 7, 4, 2, 64), (5, 7, 4, 2, 64), (5, 1, 4, 2, 64), (300, 130, 6, 6, 64)]
LARGE = [(0, 2816, 16, 8, 128), (2560, 2816, 16, 8, 128), (2560, 2, 32, 8, 128)]
LARGE += [(4000, 1, 32, 8, 128)]
EXACT = (
    1e-5  # of float64: a decoder's norms round to float32, in an order of additions of their own
)


def plan(bench: Bench) -> list[Measurement]:
    half = torch.bfloat16, torch.float32, torch.float16
    return [
        Measurement("ceilings", 8, ceilings),
        *(Measurement("golden cases", 8, golden, (d,)) for d in (torch.float32, torch.bfloat16)),
        Measurement("laws in float64", 25, laws),
        *(Measurement("attention", 8, attention, (dtype,)) for dtype in half),
        Measurement("mixed precision", 15, mixed),
    ]


def ceilings(bench):
    """What the device can do: products, copies, launches."""
    n = 256 if bench.tiny else 8192
    out = {}
    for dtype in (torch.bfloat16, torch.float32):
        a = torch.randn(n, n, device=bench.device, dtype=dtype)
        milliseconds = bench.clock(partial(torch.matmul, a, a))[0]
        out[f"tflops_{str(dtype)[6:]}"] = 2 * n**3 / milliseconds / 1e9
    x = torch.empty(1 << (20 if bench.tiny else 31), dtype=torch.uint8, device=bench.device)
    y, z = torch.empty_like(x), torch.zeros(1, device=bench.device)
    out["copy_tb_s"] = 2 * x.numel() / bench.clock(lambda: y.copy_(x))[0] / 1e9
    out["launch_us"] = bench.clock(lambda: [z.add_(1) for _ in range(1000)])[0]
    return {key: round(value, 2) for key, value in out.items()}


def golden(bench, dtype):
    """The authors' outputs: greatest difference over the greatest value."""
    worst, greedy = {}, {}
    for folder in sorted((ROOT / "tests" / "laws" / "golden").iterdir()):
        expected = load_file(folder / "expected.safetensors")
        stride = json.loads((folder / "case.json").read_text())["stride_override"]
        model = CometForCausalLM.from_pretrained(folder).to(bench.device, dtype).eval()
        errors = []
        for k in (k for k in range(9) if f"input_ids.{k}" in expected):
            ids, sizes = expected[f"input_ids.{k}"][None], expected[f"chunk_sizes.{k}"].tolist()
            with torch.no_grad():
                out = model(ids, chunk_sizes=sizes, strides=stride and [stride]).logits[0]
            want = expected[f"logits.{k}"]
            errors.append(float((out.float().cpu() - want).abs().max() / want.abs().max()))
        worst[folder.name] = max(errors)
        if "generated" in expected and dtype == torch.float32:
            ids, want = expected["input_ids.0"][None].to(bench.device), expected["generated"]
            options = {"do_sample": False, "eos_token_id": None, "pad_token_id": 0}
            found = model.generate(ids, max_new_tokens=want.numel(), **options)
            same = found[0, ids.shape[1] :].cpu() == want.flatten()
            greedy[folder.name] = bool(same.all())
    limit = 1e-4 if dtype == torch.float32 else 0.05
    name, right = str(dtype)[6:], max(worst.values()) < limit and all(greedy.values())
    return {"dtype": name, "right": right, "worst": max(worst.values()), "allowed": limit}


def laws(bench):
    """float64 here against the CPU: all ways to read, generate, a moved cache, gradients."""
    from tests.support.models import FAMILIES, text, tiny

    worst = {}
    for family in FAMILIES:
        here, there, ids = tiny(family), tiny(family).to(bench.device), text(2, 41)
        mask = torch.ones_like(ids)
        mask[1, :9] = 0
        real, own = mask.bool(), ids.to(bench.device)
        with torch.no_grad():
            whole, padded = here(ids).logits, here(ids, attention_mask=mask).logits
            worst[family, "whole"] = apart(there(own).logits, whole)
            found = there(own, attention_mask=mask.to(bench.device)).logits.cpu()
            worst[family, "ragged"] = apart(found[real], padded[real])
            cache = CometCache()
            steps = [there(own[:, k : k + 1], past_key_values=cache).logits for k in range(41)]
            worst[family, "one by one"] = apart(torch.cat(steps, 1), whole)
            cache.save(bench.out / "cache")
            moved = CometCache.load(bench.out / "cache")
            (bench.out / "cache").unlink()
            after = here(ids[:, :3], past_key_values=moved).logits
            found = there(own[:, :3], past_key_values=cache).logits
            worst[family, "moved cache"] = apart(found, after)
            options = {"max_new_tokens": 15, "do_sample": False}
            same = there.generate(own, **options).cpu() == here.generate(ids, **options)
            worst[family, "generate"] = float((~same).sum())
        for way in ("none", "cell", "chunk", "offload", "layer_major"):
            found, wanted = gradients(there, own, mask, way), gradients(here, ids, mask, "none")
            worst[family, f"gradients, {way}"] = apart(found, wanted)
    bad = {" ".join(key): value for key, value in worst.items() if not value < EXACT}
    worst_value = max(worst.values())
    return {"checks": len(worst), "right": not bad, "bad": bad, "worst": worst_value}


def gradients(model, ids, mask, way):
    """All weights' gradients of windows of four chunks, as one vector."""
    model.train().zero_grad()
    model.gradient_checkpointing = way in ("cell", "chunk", "offload")
    model.traversal = "layer_major" if way == "layer_major" else "chunk_major"
    batch = {"input_ids": ids, "attention_mask": mask.flip(1), "labels": ids}
    windows, count = cut_windows(batch, 5, 4), count_targets(batch)
    if way in ("chunk", "offload"):
        losses = read_chunks(model, windows, count, way == "offload")
    else:
        losses = read_windows(model, windows, count)
    for loss in losses:
        if loss is not None:
            loss.backward()
    model.traversal, model.gradient_checkpointing = "chunk_major", False
    return torch.cat(
        [p.grad.flatten().cpu() for p in model.eval().parameters() if p.grad is not None]
    )


def attention(bench, dtype):
    """`attend` against the formula in float64, forward and backward; the kernel that ran."""
    rows = []
    for past, own, heads, groups, width in ATTENTION + ([] if bench.tiny else LARGE):
        for ragged in (False, True):
            torch.manual_seed(0)
            shapes = [(2, heads, own, width), *[(2, groups, past + own, width)] * 2]
            options = {"device": bench.device, "dtype": dtype, "requires_grad": True}
            q, k, v = (torch.randn(shape, **options) for shape in shapes)
            chunk = chunk_of(past, own, ragged, bench.device)
            call = partial(attend, "sdpa", q, k, v, chunk, 0.1)
            kernel, out = kernel_of(call) if bench.cuda else "", call()
            weights = torch.randn(out.shape, device=bench.device)
            (out.float() * weights).sum().backward()
            exact = [t.detach().double().requires_grad_() for t in (q, k, v)]
            keys, values = (t.repeat_interleave(heads // groups, 1) for t in exact[1:])
            seen = torch.ones(own, past + own, dtype=torch.bool, device=bench.device).tril(past)
            scores = (exact[0] @ keys.mT * 0.1).masked_fill(~seen, -torch.inf)
            wanted = scores.softmax(-1) @ values
            (wanted * weights).sum().backward()
            errors = [apart(a.grad, b.grad) for a, b in zip((q, k, v), exact, strict=True)]
            rows.append(
                {
                    "past": past, "own": own, "heads": heads, "groups": groups, "ragged": ragged,
                    "kernel": kernel, "out": apart(out, wanted), "gradients": max(errors),
                }
            )  # fmt: skip
    limit = {torch.float32: 1e-4, torch.bfloat16: 0.02, torch.float16: 0.005}[dtype]
    worst = max(max(row["out"], row["gradients"]) for row in rows)
    return {"dtype": str(dtype)[6:], "right": worst < limit, "worst": worst, "rows": rows}


def chunk_of(past, own, ragged, device):
    """A chunk of which attention asks only where its tokens stand."""
    chunk = object.__new__(RaggedChunk if ragged else UniformChunk)
    chunk.columns, chunk.past = past + own, past
    positions = torch.arange(past, past + own, device=device).expand(2 if ragged else 1, -1)
    chunk.tokens = type("Positions", (), {"positions": positions})
    return chunk


def kernel_of(work):
    """The kernel of a call that takes most of its time."""
    from torch.profiler import ProfilerActivity, profile

    with profile(activities=[ProfilerActivity.CUDA]) as seen:
        work()
        torch.cuda.synchronize()
    events = sorted(seen.key_averages(), key=lambda event: -event.self_device_time_total)
    return events[0].key[:70] if events else ""


def mixed(bench):
    """Weights' gradients of many chunks under autocast against float32, and the gate's values."""
    from transformers import Qwen3Config

    sizes = SHAPES["tiny"] | {"hidden_size": 256, "head_dim": 64, "num_hidden_layers": 3}
    memory = {"chunk_size": 64, "global_size": 8, "compression_stride": 8}
    torch.manual_seed(0)
    config = CometConfig(
        backbone_config=Qwen3Config(**sizes), temporary_capacity=64, gate_bias=5.0, **memory
    )
    model = CometForCausalLM(config).to(bench.device).train()
    ids = bench.ids(64 * (6 if bench.tiny else 48), 2)
    batch = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": ids}
    windows, count = cut_windows(batch, 64, None), count_targets(batch)

    def of(way, half):
        model.zero_grad()
        model.gradient_checkpointing = way != "none"
        with torch.autocast(bench.device, torch.bfloat16, enabled=half, cache_enabled=False):
            for loss in (read_chunks if way == "chunk" else read_windows)(model, windows, count):
                loss.backward()
        named = model.named_parameters()
        parts = [p.grad.flatten() for name, p in named if "proj" in name and "memory" not in name]
        return torch.cat(parts)

    exact = of("none", False)
    out = {way: apart(of(way, True), exact) for way in ("none", "cell", "chunk")}
    gate = model.model.layers[0].global_memory.last_gate
    values = {"gate_dtype": str(gate.dtype)[6:], "gate_values": len(gate.unique())}
    return out | values | {"right": max(out.values()) < 0.05 and gate.dtype == torch.float32}
