"""Every measurement in its order, the most valuable first: what, about how many seconds, function,
arguments.

A group is a process of its own, so that what breaks CUDA in one leaves the others whole. What a
machine's profiler may not bear comes last in its group.
"""

from benchmarks.gpu.commands import evaluation, gpu_tests, resume, train, two_ranks
from benchmarks.gpu.law import attention, attention_kernels, ceilings, golden, laws, mixed_precision
from benchmarks.gpu.measure import Planned, planned
from benchmarks.gpu.speed import chunk, chunk_attention, chunk_kernels, decode, prefill
from benchmarks.gpu.training import train_step

# Of the time; what a group leaves over goes to the next.
SHARES = {"law": 0.27, "speed": 0.43, "training": 0.20, "commands": 0.10}
MIXED = "mixed"  # name of the run in bf16-mixed
COMPILED = ["train.compile=true", "eval.after_fit=false"]

LAW = [
    planned("ceilings of the machine", 8, ceilings),
    planned("authors' numbers, float32", 8, golden, dtype="float32"),
    planned("authors' numbers, bfloat16", 8, golden, dtype="bfloat16"),
    planned("laws in float64 against the CPU", 25, laws, tiny_seconds=6),
    planned("attention, bfloat16", 8, attention, dtype="bfloat16"),
    planned("attention, float32", 8, attention, dtype="float32"),
    planned("attention, float16", 8, attention, dtype="float16"),
    planned("mixed precision: gradients, gates", 15, mixed_precision),
    planned("train.py, bf16-mixed", 34, train, name=MIXED, tiny_seconds=8),
    planned("tests marked gpu", 75, gpu_tests, gpu_only=True),
    planned("attention's kernels", 5, attention_kernels, gpu_only=True),
]


def both_sides(m, chunk_s, decode_s, ours, full, longest, full_to) -> list[Planned]:
    """CoMeT and full attention with the decoder m.

    Args:
        chunk_s, decode_s, ours, full, longest: estimates; ours and full of three lengths each.
        full_to: thousands of tokens of full attention's longest text.
    """
    theirs = f"{m}, full attention"
    return [
        planned(f"{m}, a closing chunk", chunk_s, chunk, model=m),
        *(
            planned(f"{m}, decoding{how}", decode_s, decode, model=m, tokens=64, graphs=graphs)
            for how, graphs in WAYS.items()
        ),
        *(
            planned(f"{m}, prefill of {k}k", seconds, prefill, model=m, thousands=k)
            for k, seconds in zip((4, 64, 256), ours, strict=True)
        ),
        planned(
            f"{m}, prefill of 64k, graphs", ours[1], prefill, model=m, thousands=64, graphs=True
        ),
        *(
            planned(f"{theirs}, {k}k", seconds, prefill, model=m, thousands=k, full=True)
            for k, seconds in zip((4, 64, full_to), full, strict=True)
        ),
        *(
            planned(
                f"{theirs}, decoding{how}",
                decode_s,
                decode,
                model=m,
                tokens=40,
                graphs=graphs,
                full_after=4,
            )
            for how, graphs in WAYS.items()
        ),
        planned(
            f"{m}, prefill of 1024k, graphs", longest, prefill, model=m, thousands=1024, graphs=True
        ),
    ]


WAYS = {"": False, ", graphs": True}
TWO_LAYERS = {"dtype": "float32", "layers": 2}
SPEED = [
    *both_sides("0.6B", 4, 4, ours=(2, 4, 8), full=(3, 4, 18), longest=20, full_to=256),
    *both_sides("4B", 4, 4, ours=(2, 4, 11), full=(2, 5, 14), longest=42, full_to=128),
    planned("0.6B, two layers in float32", 4, chunk, model="0.6B", **TWO_LAYERS),
    planned("4B, two layers in float32", 4, chunk, model="4B", **TWO_LAYERS),
    planned("4B, attention of a chunk by two kernels", 4, chunk_attention, gpu_only=True),
    planned("4B, kernels of a chunk", 3, chunk_kernels, gpu_only=True, model="4B"),
    planned("0.6B, kernels of a chunk", 3, chunk_kernels, gpu_only=True, model="0.6B"),
]


def step(seconds, model, thousands, recompute, **more) -> Planned:
    """A training step's measurement, named by its arguments."""
    words = [model, f"{thousands}k", recompute, more.get("learns", "all")]
    words += ["boundaries on the GPU"] if more.get("offload") is False else []
    arguments = {"model": model, "thousands": thousands, "recompute": recompute, **more}
    return planned(f"step: {', '.join(words)}", seconds, train_step, **arguments)


TRAINING = [
    step(11, "0.6B", 32, "cell"),
    step(15, "0.6B", 32, "chunk"),
    step(15, "4B", 32, "cell", learns="memory"),
    step(24, "4B", 32, "chunk"),
    step(50, "4B", 128, "chunk", steps=1),
    step(32, "4B", 128, "cell", learns="memory", steps=1),
    step(32, "0.6B", 128, "chunk", steps=1),
    step(24, "0.6B", 128, "cell", steps=1),
    step(24, "4B", 32, "chunk", offload=False),
]

COMMANDS = [
    planned(
        "eval.py of the bf16-mixed run",
        24,
        evaluation,
        tiny_seconds=8,
        name=MIXED,
        lengths=[1024, 32768],
        examples=2,
    ),
    planned("two processes on one device", 90, two_ranks, tiny_seconds=20),
    planned("train.py, resumed", 40, resume, tiny_seconds=14),
    planned("train.py, 32-true", 25, train, tiny_seconds=8, name="full", precision="32-true"),
    planned(
        "train.py, compiled", 90, train, gpu_only=True, name="compiled", steps=10, more=COMPILED
    ),
]

PLAN = {"law": LAW, "speed": SPEED, "training": TRAINING, "commands": COMMANDS}
