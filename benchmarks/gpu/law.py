"""Is it right on a GPU: the authors' numbers, the laws in float64, attention, mixed precision."""

import json

import numpy as np
import torch
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoConfig

from benchmarks.gpu.measure import clock, gib, kernels, name_of, relative, within
from benchmarks.gpu.models import as_batch
from benchmarks.shared.options import ROOT
from comet_pl import CometCache, CometConfig, CometForCausalLM
from comet_pl.model.attention import attend
from comet_pl.model.chunk_batch import RaggedChunk, Tokens, UniformChunk
from comet_pl.training.chunk_checkpointing import read_chunks
from comet_pl.training.text_reader import read_windows
from comet_pl.training.windows import count_targets, cut_windows

GOLDEN = ROOT / "tests" / "laws" / "golden"
FAMILIES = ("qwen3", "qwen2", "llama", "mistral", "smollm3")
SCALE = 0.1  # of attention's scores
# Past columns, own tokens, query heads, key heads, head width.
ATTENTION = [(0, 7, 4, 2, 64), (5, 7, 4, 2, 64), (5, 1, 4, 2, 64), (300, 130, 6, 6, 64)]
PAPERS_ATTENTION = [
    (0, 2816, 16, 8, 128),
    (2560, 2816, 16, 8, 128),
    (2560, 2, 32, 8, 128),
    (4000, 1, 32, 8, 128),
]
BOUNDS = {"float32": 1e-4, "bfloat16": 0.05}  # of the golden cases
ATTENTION_BOUNDS = {"float32": 1e-4, "bfloat16": 0.02, "float16": 5e-3}  # GPU: no TF32 in attention


def ceilings(place):
    """What the machine can do at most: matrix products, copies, launches; and what it is."""
    n = 256 if place.tiny else 8192
    facts = {"torch": torch.__version__, "cudnn": torch.backends.cudnn.version()}
    if place.on_gpu:
        facts |= {"gpu": torch.cuda.get_device_name(), "gib": gib(torch.cuda.mem_get_info()[1])}
    for dtype in (torch.bfloat16, torch.float32):
        a, b = (torch.randn(n, n, device=place.device, dtype=dtype) for _ in range(2))
        milliseconds, _ = clock(place, lambda a=a, b=b: a @ b)
        facts[f"tflops_{name_of(dtype)}"] = round(2 * n**3 / milliseconds / 1e9, 2)
    source = torch.empty(1 << (20 if place.tiny else 31), dtype=torch.uint8, device=place.device)
    target = torch.empty_like(source)
    milliseconds, _ = clock(place, lambda: target.copy_(source))
    facts["copy_tb_s"] = round(2 * source.numel() / milliseconds / 1e9, 3)
    one = torch.zeros(1, device=place.device)
    facts["launch_us"], _ = clock(place, lambda: [one.add_(1) for _ in range(1000)])
    return facts


def golden(place, dtype):
    """The authors' logits, relative to the largest; in float32 their greedy continuation too."""
    errors, greedy = {}, None
    for folder in sorted(GOLDEN.iterdir()):
        expected = load_file(folder / "expected.safetensors")
        stride = json.loads((folder / "case.json").read_text())["stride_override"]
        strides = None if stride is None else [stride]
        model = CometForCausalLM.from_pretrained(folder).to(place.device, getattr(torch, dtype))
        for k in (k for k in range(len(expected)) if f"input_ids.{k}" in expected):
            ids = expected[f"input_ids.{k}"][None].to(place.device)
            sizes, reference = expected[f"chunk_sizes.{k}"].tolist(), expected[f"logits.{k}"]
            with torch.no_grad():
                logits = model(ids, chunk_sizes=sizes, strides=strides).logits[0].float().cpu()
            difference = (logits - reference).abs().max() / reference.abs().max()
            errors[f"{folder.name}.{k}"] = float(difference)
        if "generated" in expected and dtype == "float32":
            ids, wanted = expected["input_ids.0"][None], expected["generated"].flatten()
            greedy = same_greedy(model, ids.to(place.device), wanted)
    return {"dtype": dtype, "greedy_equal": greedy, **within(errors, BOUNDS[dtype])}


def same_greedy(model, ids: Tensor, wanted: Tensor) -> bool:
    options = {"max_new_tokens": len(wanted), "do_sample": False, "eos_token_id": None}
    continued = model.generate(ids, **options, pad_token_id=0)[0, ids.shape[1] :]
    return continued.tolist() == wanted.tolist()


# ---- the laws in float64


def laws(place):
    """The device against the CPU: a whole text, ragged rows, one token at a time, generate, a cache
    moved to the CPU, and the gradients of every way to recompute."""
    errors = {}
    for family in FAMILIES:
        reference, model = (tiny_decoder(family).to(device) for device in ("cpu", place.device))
        for what, error in reading_errors(place, reference, model).items():
            errors[f"{family}, {what}"] = error
        for what, error in gradient_errors(place, reference, model).items():
            errors[f"{family}, gradients {what}"] = error
    # A decoder's norms round doubles to float32, on a GPU in an order of additions of its own.
    return within(errors, 1e-5 if place.on_gpu else 1e-9)


def tiny_decoder(family):
    """A CoMeT in float64: what differs is wrong, not rounded."""
    sizes = {
        "vocab_size": 40,
        "hidden_size": 16,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 4,
        "intermediate_size": 24,
        "initializer_range": 0.2,
        "tie_word_embeddings": False,
        "max_position_embeddings": 512,
        "bos_token_id": None,
        "eos_token_id": None,
        "pad_token_id": None,
    }
    if family == "mistral":
        sizes["sliding_window"] = None
    if family == "smollm3":
        sizes["no_rope_layers"] = [1, 0]
    torch.manual_seed(0)
    memory = {"chunk_size": 5, "global_size": 2, "compression_stride": 3, "temporary_capacity": 4}
    config = CometConfig(AutoConfig.for_model(family, **sizes), adapter_rank=2, **memory)
    return CometForCausalLM(config).double().eval()


def two_rows():
    ids = torch.randint(0, 40, (2, 41), generator=torch.Generator().manual_seed(0))
    mask = torch.ones_like(ids)
    mask[1, :9] = 0
    return ids, mask


@torch.no_grad()
def reading_errors(place, reference, model):
    ids, mask = two_rows()
    moved, real = ids.to(place.device), mask.bool()
    whole, ragged = reference(ids).logits, reference(ids, attention_mask=mask).logits
    ours = model(moved, attention_mask=mask.to(place.device)).logits.cpu()
    errors = {"whole": relative(model(moved).logits, whole)}
    errors["ragged"] = relative(ours[real], ragged[real])
    cache = CometCache()
    steps = [model(moved[:, i : i + 1], past_key_values=cache).logits for i in range(41)]
    errors["token by token"] = relative(torch.cat(steps, 1), whole)
    file = place.scratch / "cache.mem"
    cache.save(file)
    loaded = CometCache.load(file)
    file.unlink()
    next_logits = model(moved[:, :3], past_key_values=cache).logits
    errors["cache on the CPU"] = relative(
        reference(ids[:, :3], past_key_values=loaded).logits, next_logits
    )
    options = {"max_new_tokens": 15, "do_sample": False}
    same = model.generate(moved, **options).cpu() == reference.generate(ids, **options)
    errors["generated tokens that differ"] = float((~same).sum())
    return errors


def gradient_errors(place, reference, model):
    """Of each way to recompute and to visit the cells, in windows of four chunks."""
    ids, mask = two_rows()
    batch = {"input_ids": ids, "attention_mask": mask.flip(1), "labels": ids}
    moved = {name: tensor.to(place.device) for name, tensor in batch.items()}
    wanted = gradients(reference.train(), batch, "none", 5, 4)
    errors = {}
    for recompute in ("none", "cell", "chunk", "chunk, offloaded"):
        ours = gradients(model.train(), moved, recompute, 5, 4)
        errors[recompute] = relative(ours, wanted)
    model.traversal = "layer_major"
    errors["layer by layer"] = relative(gradients(model, moved, "none", 5, 4), wanted)
    return errors


def gradients(model, batch, recompute, chunk_size, chunks, skip=()) -> Tensor:
    """All gradients of one step as one float64 vector; skip: parts of names to leave out."""
    model.zero_grad()
    model.gradient_checkpointing = recompute != "none"
    windows, targets = cut_windows(batch, chunk_size, chunks), count_targets(batch)
    if recompute.startswith("chunk"):
        losses = read_chunks(model, windows, targets, offload="offloaded" in recompute)
    else:
        losses = read_windows(model, windows, targets)
    for loss in losses:
        if loss is not None:
            loss.backward()
    kept = [
        p.grad.double().flatten()
        for name, p in model.named_parameters()
        if p.grad is not None and not any(part in name for part in skip)
    ]
    return torch.cat(kept)


# ---- attention


def attention(place, dtype):
    """attend against the formula in float64, forward and backward: the worst of each shape."""
    errors = {}
    for shape in attention_shapes(place):
        row = attention_errors(place, getattr(torch, dtype), **shape)
        errors |= {f"{shape_name(**shape)}: {what}": error for what, error in row.items()}
    return {"dtype": dtype, "errors": errors, **within(errors, ATTENTION_BOUNDS[dtype])}


def attention_kernels(place):
    """The dearest kernel of attend's forward pass, by shape and dtype."""
    found = {}
    for shape in attention_shapes(place):
        past, ragged = shape["past"], shape["ragged"]
        chunk = bare_chunk(place.device, past, shape["own"], ragged)
        found[shape_name(**shape)] = names = {}
        for dtype in ATTENTION_BOUNDS:
            inputs = attention_inputs(place, getattr(torch, dtype), **shape)
            seen = kernels(lambda inputs=inputs, chunk=chunk: attend("sdpa", *inputs, chunk, SCALE))
            names[dtype] = seen[0][0][:60]
    return {"kernels": found}


def attention_shapes(place):
    keys = ("past", "own", "heads", "key_heads", "width")
    shapes = ATTENTION + ([] if place.tiny else PAPERS_ATTENTION)
    return [
        dict(zip(keys, shape, strict=True)) | {"ragged": ragged}
        for shape in shapes
        for ragged in (False, True)
    ]


def shape_name(past, own, heads, key_heads, width, ragged):
    name = f"{own:,} own after {past:,}, {heads}/{key_heads} heads of {width}"
    return f"{name}, ragged" if ragged else name


def attention_inputs(place, dtype, past, own, heads, key_heads, width, ragged):
    torch.manual_seed(0)
    sizes = ((heads, own), (key_heads, past + own), (key_heads, past + own))
    options = {"device": place.device, "dtype": dtype, "requires_grad": True}
    return [torch.randn(2, h, n, width, **options) for h, n in sizes]


def attention_errors(place, dtype, **shape):
    """Relative errors of the output and of the inputs' gradients."""
    inputs = attention_inputs(place, dtype, **shape)
    chunk = bare_chunk(place.device, shape["past"], shape["own"], shape["ragged"])
    ours = attend("sdpa", *inputs, chunk, SCALE)
    weights = torch.randn(ours.shape, device=place.device)
    (ours.float() * weights).sum().backward()
    exact = [x.detach().double().requires_grad_() for x in inputs]
    reference = formula(*exact, shape["past"])
    (reference * weights).sum().backward()
    errors = {"out": relative(ours, reference)}
    for name, x, y in zip(("dq", "dk", "dv"), inputs, exact, strict=True):
        errors[name] = relative(x.grad, y.grad)
    return errors


def bare_chunk(device, past, own, ragged):
    """A chunk of two rows with what attention asks of it: columns, positions, mask."""
    positions = torch.arange(past, past + own, device=device)[None]
    common = {
        "slots": None,
        "columns": past + own,
        "in_place": False,
        "capacity": 0,
        "stores": False,
        "closes": False,
        "has_state": False,
        "gated": [],
        "read": [],
        "pending": 0,
        "pending_after": 0,
        "temporary_before": 0,
        "compression": None,
    }
    rope = (positions.float(), positions.float())
    common |= {"positions": positions, "rope": rope}
    if not ragged:
        tokens = Tokens(positions, positions, rope, None, np.empty(0, dtype=np.int64))
        return UniformChunk(tokens, **common, past=past, readout_place=slice(own, own))
    rows = positions.expand(2, -1)
    none = torch.zeros(2, dtype=torch.bool, device=device)
    return RaggedChunk(
        Tokens(rows, rows, rope, None, np.empty(0, dtype=np.int64)),
        **common,
        continues=False,
        first_rows=none,
        closing=none,
        pending_place=None,
        readout_place=None,
        temporary_entries=None,
    )


def formula(q: Tensor, k: Tensor, v: Tensor, past) -> Tensor:
    k, v = (t.repeat_interleave(q.shape[1] // t.shape[1], 1) for t in (k, v))
    seen = torch.ones(q.shape[2], k.shape[2], dtype=torch.bool, device=q.device).tril(past)
    return (q @ k.mT * SCALE).masked_fill(~seen, -torch.inf).softmax(-1) @ v


# ---- mixed precision


def mixed_precision(place):
    """The decoder's gradients of a text of many chunks in bfloat16 autocast against float32, by way
    to recompute, with autocast's cache of weights and without; and the values of a gate."""
    backbone = AutoConfig.for_model(
        "qwen3",
        vocab_size=300,
        hidden_size=256,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=64,
        intermediate_size=512,
    )
    memory = {"chunk_size": 64, "global_size": 8, "temporary_capacity": 64, "gate_bias": 5.0}
    torch.manual_seed(0)
    model = CometForCausalLM(CometConfig(backbone, **memory)).train().to(place.device)
    draw = torch.Generator().manual_seed(0)
    ids = torch.randint(0, 250, (2, 64 * (4 if place.tiny else 48)), generator=draw)
    batch = as_batch(ids.to(place.device))
    skip = ("memory", "embed", "norm", "lm_head")
    exact = gradients(model, batch, "none", 64, None, skip)
    errors = {}
    for recompute in ("none", "cell", "chunk"):
        for cached in (True, False):
            with torch.autocast(place.device, torch.bfloat16, cache_enabled=cached):
                ours = gradients(model, batch, recompute, 64, None, skip)
            errors[f"{recompute}, cache {'on' if cached else 'off'}"] = relative(ours, exact)
    gate = model.model.layers[0].global_memory.last_gate
    facts = {"gate_dtype": name_of(gate.dtype), "gate_values": len(gate.unique())}
    facts["gates_at_1"] = float((gate == 1).float().mean())
    return facts | within(errors, 0.05) | {"errors": errors}
