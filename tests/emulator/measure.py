"""Measures on the emulated GPU: launches and waits of a cell and of a token, peaks of a step.

python -m tests.emulator.measure '{"measure": "step", "shape": "4B", "tokens": 32768, ...}' prints a
JSON line a job; it runs with the environment that `test_emulated.py` makes.
"""

import gc
import json
import sys
import traceback
from collections import Counter

import torch
from transformers import Qwen3Config
from transformers.initialization import no_init_weights

from comet_pl import CometCache, CometConfig, CometForCausalLM
from comet_pl.config.schema import TrainConfig
from comet_pl.model.chunk_layout import RowClock
from comet_pl.training.trainable import add_adapters, halve_frozen
from tests.emulator.device import LIBRARY, Integers, counts, reset, total

GIB = 2**30
SHAPES = {
    "0.6B": {
        "hidden_size": 1024,
        "num_hidden_layers": 28,
        "num_attention_heads": 16,
        "intermediate_size": 3072,
    },
    "4B": {
        "hidden_size": 2560,
        "num_hidden_layers": 36,
        "num_attention_heads": 32,
        "intermediate_size": 9728,
    },
}
COMMON = {"num_key_value_heads": 8, "head_dim": 128, "tie_word_embeddings": True}
MEMORY = {
    "chunk_size": 2048,
    "global_size": 512,
    "compression_stride": 8,
    "temporary_capacity": 2048,
}


def build(shape, layers=None, dtype=torch.bfloat16, vocab=151936):
    """A model of Qwen3's shape with the paper's memory on the device; its weights are nothing."""
    sizes = SHAPES[shape] | COMMON | {"vocab_size": vocab, "max_position_embeddings": 1 << 18}
    backbone = Qwen3Config(**sizes | ({"num_hidden_layers": layers} if layers else {}))
    torch.set_default_dtype(dtype)
    try:
        with torch.device("cuda"), no_init_weights():
            model = CometForCausalLM(CometConfig(backbone_config=backbone, **MEMORY))
    finally:
        torch.set_default_dtype(torch.float32)
    model.tie_weights()
    return model


def full_cache(model):
    config = model.config
    cache = CometCache().begin(config, 1, model.fingerprint)
    cache.rows = [
        RowClock(
            stride=config.compression_stride,
            global_slots=config.global_size,
            temporary_slots=config.temporary_capacity,
        )
    ]
    cache.reserve(config, model.dtype, model.device)
    return cache


def events(found: Counter):
    kinds = {"launches": "K ", "waits": "S ", "copies": "C "}
    return {name: total(found, kind) for name, kind in kinds.items()}


def per_layer(of, layers=(2, 3)):
    """A call's events of one layer: what one layer more adds; and of all else."""
    few, more = (of(n) for n in layers)
    cell = {k: more[k] - few[k] for k in few}
    return {"cell": cell, "rest": {k: few[k] - layers[0] * cell[k] for k in few}}


@torch.no_grad()
def reading(shape, dtype="bfloat16"):
    """A chunk that closes, memory full."""
    names: Counter = Counter()

    def of(layers):
        model = build(shape, layers, getattr(torch, dtype), vocab=1000).eval()
        cache, ids = full_cache(model), torch.zeros(1, 2048, dtype=torch.long)
        with Integers():
            ids = ids.cuda()
            for _ in range(2):
                reset()
                model(ids, chunk_sizes=[2048], past_key_values=cache, logits_to_keep=1)
        found = counts()
        names.update({k: (n if layers == 3 else -n) for k, n in found.items()})
        return events(found)

    return per_layer(of) | {"names": {k: n for k, n in names.items() if n > 0}}


@torch.no_grad()
def decoding(shape, dtype="bfloat16"):
    """One token of text, no compression token, chunk half full."""
    names: Counter = Counter()

    def of(layers):
        model = build(shape, layers, getattr(torch, dtype), vocab=1000).eval()
        cache, ids = full_cache(model), torch.zeros(1, 1201, dtype=torch.long)
        with Integers():
            ids = ids.cuda()
            model(ids, past_key_values=cache, logits_to_keep=1)
            one = ids[:, :1]
            mask = torch.ones(1, cache.columns + 3, dtype=torch.long).cuda()
            for k in range(3):
                reset()
                seen = mask[:, : 1201 + 1 + k]
                model(one, past_key_values=cache, logits_to_keep=1, attention_mask=seen)
                found = counts()
        names.update({k: (n if layers == 3 else -n) for k, n in found.items()})
        if layers == 3:
            names.update({k: 10**6 * n for k, n in found.items() if k.startswith(("S", "C"))})
        return events(found)

    return per_layer(of) | {"names": {k: n for k, n in names.items() if n > 0}}


@torch.no_grad()
def generating(shape, tokens=4):
    """What `generate` adds to a token: all of its events less the forward pass's."""
    model = build(shape, 2, vocab=151936).eval()
    found = []
    with Integers():
        ids = torch.zeros(1, 1201, dtype=torch.long).cuda()
        for new in (tokens, 2 * tokens):
            reset()
            model.generate(ids, max_new_tokens=new, min_new_tokens=new, do_sample=False)
            found.append(counts())
    more = found[1] - found[0]
    return {k: n / tokens for k, n in events(more).items()} | {
        "names": {k: n / tokens for k, n in more.items()}
    }


def with_states(module):
    """AdamW's states as after a first step; a step's norm, which is nothing here, counts as 1."""
    from comet_pl.training import lit_module

    def make():
        optimizer = module.optimizers()
        for group in optimizer.param_groups:
            assert group["fused"]
            for p in group["params"]:
                step = torch.zeros((), dtype=torch.float32, device="cuda")
                moments = {"exp_avg": torch.empty_like(p), "exp_avg_sq": torch.empty_like(p)}
                optimizer.state[p] = {"step": step} | moments

    lit_module.float = lambda value: 1.0
    module.on_train_start = make


def step(shape, tokens, layers=None, gib=78.5, **keys):
    """An optimizer step through the LightningModule: allocator peaks, in GiB."""
    import lightning

    from comet_pl.training.lit_module import CometModule

    LIBRARY.nullgpu_total(int(gib * GIB))
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    precision = keys.pop("precision", "bf16-mixed")
    train = TrainConfig(**keys)
    out: dict = {}
    try:
        dtype = torch.bfloat16 if precision == "bf16-true" else torch.float32
        model = build(shape, layers, dtype).train()
        add_adapters(model, train)
        if precision == "bf16-mixed":
            halve_frozen(model)
        module = CometModule(model.cuda(), train, max_steps=10)
        with_states(module)
        trainer = lightning.Trainer(
            accelerator="cuda", devices=1, precision=precision, max_steps=1, logger=False,
            enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False,
        )  # fmt: skip
        ids = torch.zeros(1, tokens, dtype=torch.long)
        batch = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": ids}
        with Integers():
            reset()
            trainer.fit(module, torch.utils.data.DataLoader([batch], batch_size=None))
        out |= {"ok": True, "steps": trainer.global_step} | events(found := counts())
        out["names"] = {name: n for name, n in found.items() if name[0] in "SCM"}
    except torch.OutOfMemoryError as error:
        frames = traceback.extract_tb(error.__traceback__)
        where = [f"{f.filename.split('/')[-1]}:{f.lineno} {f.name}" for f in frames]
        out |= {"ok": False, "where": [w for w in where if "_call_impl" not in w][-6:]}
    out |= {
        "peak": round(torch.cuda.max_memory_allocated() / GIB, 2),
        "reserved": round(torch.cuda.max_memory_reserved() / GIB, 2),
        "pinned": round(LIBRARY.nullgpu_pinned() / GIB, 2),
    }
    return out


@torch.no_grad()
def attention(dtype, rows, past, own, heads, groups, ragged):
    """The kernels of one call of `attend`."""
    from types import SimpleNamespace

    from comet_pl.model.attention import attend
    from comet_pl.model.chunk_batch import UniformChunk

    shapes = [(rows, heads, own, 128), *[(rows, groups, past + own, 128)] * 2]
    q, k, v = (torch.empty(s, device="cuda", dtype=getattr(torch, dtype)) for s in shapes)
    mask = torch.ones(rows, 1, own, past + own, dtype=torch.bool, device="cuda")
    chunk = SimpleNamespace(mask=mask)
    if not ragged:
        chunk = object.__new__(UniformChunk)
        chunk.past = past
    attend("sdpa", q, k, v, chunk, 0.1)
    torch.cuda.reset_peak_memory_stats()
    held = torch.cuda.memory_allocated()
    reset()
    attend("sdpa", q, k, v, chunk, 0.1)
    peak = torch.cuda.max_memory_allocated() - held
    return {"names": [n for n in counts() if n[0] == "K"], "peak": round(peak / GIB, 3)}


def compiled(tokens=3):
    """Cells as whole graphs (an error otherwise) on the device: reading, decoding, a backward."""
    model = build("0.6B", 2, torch.bfloat16, vocab=1000)
    graphs = []

    def backend(graph, inputs):
        graphs.append(graph)
        return graph.forward

    for cell in model.model.layers:
        cell.compile(backend=backend, fullgraph=True)
    # On the CPU; and outside of Integers, under which nothing is compiled.
    ids, sizes = torch.zeros(1, 3 * 2048, dtype=torch.long), [2048] * 3
    with torch.no_grad():
        cache = model.eval()(ids, chunk_sizes=sizes, use_cache=True).past_key_values
        for _ in range(tokens):
            model(ids[:, :1], past_key_values=cache)
    model.train()(ids, labels=ids, chunk_sizes=sizes).loss.backward()
    return {"graphs": len(graphs)}


def command(argv):
    """train.py or eval.py; its last line."""
    import contextlib
    import importlib
    import io

    script, *keys = argv
    with Integers(), contextlib.redirect_stdout(io.StringIO()) as said:
        importlib.import_module(script).main(keys)
    return {"said": said.getvalue().splitlines()[-1]}


MEASURES = {
    f.__name__: f for f in (reading, decoding, generating, step, attention, compiled, command)
}

if __name__ == "__main__":
    for word in sys.argv[1:]:
        job = json.loads(word)
        print(json.dumps(job | MEASURES[job.pop("measure")](**job)), flush=True)
        gc.collect()
