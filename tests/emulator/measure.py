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
from transformers import AutoConfig
from transformers.initialization import no_init_weights

from benchmarks.gpu.law import bare_chunk
from benchmarks.gpu.models import MEMORY, SHAPES, full_cache
from comet_pl import CometConfig, CometForCausalLM
from comet_pl.config.schema import TrainConfig
from comet_pl.training.trainable import add_adapters, halve_frozen
from tests.emulator.device import LIBRARY, Integers, counts, reset, total

GIB = 2**30


def build(shape, layers=None, dtype=torch.bfloat16, vocab=151936):
    """A model of Qwen3's shape with the paper's memory on the device; its weights are nothing."""
    sizes = SHAPES[shape] | {"vocab_size": vocab, "max_position_embeddings": 1 << 18}
    sizes |= {"num_hidden_layers": layers} if layers else {}
    backbone = AutoConfig.for_model(**sizes, tie_word_embeddings=True)
    torch.set_default_dtype(dtype)
    try:
        with torch.device("cuda"), no_init_weights():
            model = CometForCausalLM(CometConfig(backbone_config=backbone, **MEMORY))
    finally:
        torch.set_default_dtype(torch.float32)
    model.tie_weights()
    return model


def events(found: Counter):
    kinds = {"launches": "K ", "waits": "S ", "copies": "C "}
    return {name: total(found, kind) for name, kind in kinds.items()}


@torch.no_grad()
def per_layer(shape, dtype, call):
    """A call's events of one layer, which is what one layer more adds, by name too; and of all
    else.

    Args:
        call: of a model with full memory, its cache and 2,048 ids; returns the counts.
    """
    found = {}
    for layers in (2, 3):
        model = build(shape, layers, getattr(torch, dtype), vocab=1000).eval()
        with Integers():
            ids = torch.zeros(1, 2048, dtype=torch.long).cuda()
            found[layers] = call(model, full_cache(model), ids)
    few, more = events(found[2]), events(found[3])
    cell = {kind: more[kind] - few[kind] for kind in few}
    rest = {kind: few[kind] - 2 * cell[kind] for kind in few}
    return {"cell": cell, "rest": rest, "names": dict(found[3] - found[2])}


def reading(shape, dtype="bfloat16"):
    """A chunk that closes, memory full."""

    def call(model, cache, ids):
        for _ in range(2):
            reset()
            model(ids, chunk_sizes=[2048], past_key_values=cache, logits_to_keep=1)
        return counts()

    return per_layer(shape, dtype, call)


def decoding(shape, dtype="bfloat16"):
    """One token of text, no compression token, chunk half full; with a mask."""

    def call(model, cache, ids):
        model(ids[:, :1201], past_key_values=cache, logits_to_keep=1)
        for _ in range(3):
            mask = torch.ones(1, cache.columns + 1, dtype=torch.long).cuda()
            reset()
            options = {"past_key_values": cache, "logits_to_keep": 1}
            model(ids[:, :1], attention_mask=mask, **options)
        return counts()

    return per_layer(shape, dtype, call)


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
        out |= {"ok": True, "steps": trainer.global_step} | events(counts())
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
def attention(dtype, past, own, heads, groups, ragged):
    """The kernels of one call of `attend`."""
    from comet_pl.model.attention import attend

    shapes = [(2, heads, own, 128), *[(2, groups, past + own, 128)] * 2]
    q, k, v = (torch.empty(s, device="cuda", dtype=getattr(torch, dtype)) for s in shapes)
    with Integers():  # the mask
        chunk = bare_chunk("cuda", past, own, ragged)
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
