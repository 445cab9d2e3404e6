"""What a pipeline of two processes gains on this machine, where its time goes, and what more ranks would gain.

    python benchmarks/pipeline.py           some minutes, on a machine that nothing else uses
    python benchmarks/pipeline.py --small   seconds: a look, no measurement

The same step (forward and backward pass of one text, all gradients, no optimizer) in every arrangement, in turn, in the same two processes
of one thread each: one process; two processes that do it at the same time and know nothing of each other, which gives the machine's
ceiling; the two as a pipeline, by each schedule. The best of the rounds counts, since other programs can only make a step slower; what
they took is shown. Beside wall time stands the longest chain of processor time through the messages (pipeline_clock.py), to which other
programs matter less; it decides if they took more than 5 % of the machine even in the best rounds. Then: peak memory of a rank against the
number of ranks, and the simulator with the times measured here.
Results: benchmarks/results/pipeline*.json and .png, pipeline*-simulated.png.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Iterator
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent))

import pipeline_report
import report
from pipeline_clock import longest_chain, shares
from pipeline_steps import ALONE, ARRANGEMENTS, BOTH, Job, measure, message_shape, peak_memory
from rich.progress import track
from shapes import SHAPES, Shape

from comet_pl.errors import Parser, UserError, run_cli
from comet_pl.parallel.schedule import SCHEDULES
from comet_pl.parallel.simulate import Timeline, compare, simulate

HERE = Path(__file__).resolve().parent
LEAST = 0.9  # of the simulated speed-up, at this machine's ceiling, that layer_level has to reach
TOLERANCE = 1e-5  # of loss and gradients, relative: float32 sums in another order
QUIET = 0.05  # of the machine's processors that other programs may take

# A temporary memory of two chunks: it is full so soon that all chunks cost nearly the same, as in a long text.
SHAPE = Shape("pipeline", 256, 8, 4, 64, 768, chunk=128, global_size=32, capacity=32, layers=12)
SMALL = replace(SHAPES["sixteenth"], name="pipeline-small", capacity=32, layers=3)

SIMULATED_LAYERS = 36  # of Qwen3-4B
SIMULATED_CHUNKS = {64: "128k tokens", 512: "1M tokens"}  # of C = 2048
SIMULATED_RANKS = (2, 4, 8, 16, 32, 64)
TRANSFERS = (0.1, 0.5, 1.0, 2.0)  # forward cells that a message takes, besides what was measured


def parse(argv: list[str]) -> argparse.Namespace:
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--small", action="store_true", help="a small model, a short text, one round"
    )
    parser.add_argument(
        "--rounds",
        type=int,
        metavar="N",
        help="how often each arrangement runs (default: 5; --small: 1)",
    )
    parser.add_argument("--layers", type=int, metavar="L", help="default: 12; --small: 3")
    parser.add_argument(
        "--chunks", type=int, metavar="T", help="of the text (default: 16; --small: 8)"
    )
    parser.add_argument(
        "--out",
        type=Path,
        default=HERE / "results",
        metavar="DIR",
        help="default: benchmarks/results",
    )
    options = parser.parse_args(argv)
    for name, small, usual, least in (
        ("rounds", 1, 5, 1),
        ("layers", SMALL.layers, SHAPE.layers, 1),
        ("chunks", 8, 16, 2),
    ):
        if getattr(options, name) is None:
            setattr(options, name, small if options.small else usual)
        if getattr(options, name) < least:
            raise UserError(
                f"--{name}: {getattr(options, name)} given, a whole number >= {least} is needed"
            )
    report.make_folder(options.out)
    return options


def benchmark(options: argparse.Namespace) -> dict[str, Any]:
    """All measurements, with what they depend on."""
    job = Job(
        replace(SMALL if options.small else SHAPE, layers=options.layers),
        options.chunks,
        options.rounds,
    )
    machine = report.machine("cpu")
    both_ranks = measure(job)
    transfer = min(ping for entry in both_ranks[0] for ping in entry["pings"])
    steps = [combine(entries, transfer) for entries in zip(*both_ranks, strict=True)]
    times = cell_times(job, steps, transfer)
    found = findings(job, steps, times)
    memory = [
        one
        for ranks in ((1, 2) if options.small else (1, 2, 4, 8))
        for one in memory_of(job, ranks)
    ]
    rows = simulations(
        times,
        (64,) if options.small else tuple(SIMULATED_CHUNKS),
        (2, 4, 8) if options.small else SIMULATED_RANKS,
    )
    return {
        "machine": machine,
        "backend": "gloo",
        "threads": 1,
        "dtype": "float32",
        "shape": asdict(job.shape),
        "chunks": job.chunks,
        "rounds": job.rounds,
        "times": times,
        **found,
        "memory": memory,
        "simulated": {"layers": SIMULATED_LAYERS, "rows": rows},
        "steps": steps,
    }


# ---- what was measured


def combine(entries: tuple[dict[str, Any], ...], transfer: float) -> dict[str, Any]:
    """One step of one arrangement, from what each rank wrote down; seconds from the moment at which all had begun."""
    ran = [entry for entry in entries if "wall" in entry]
    what, start = ran[0]["what"], max(entry["wall"][0] for entry in ran)
    walls = [[wall - start for wall in entry["wall"]] for entry in ran]
    processor = [[time - entry["processor"][0] for time in entry["processor"]] for entry in ran]
    forward, seconds, reduced = (max(wall[k] for wall in walls) for k in (1, 2, 3))
    events = [entry["events"] for entry in ran]
    chain = longest_chain(events, [times[2] for times in processor], transfer)
    chain_forward = longest_chain(
        [e["events"][: e["forward_events"]] for e in ran],
        [times[1] for times in processor],
        transfer,
    )
    capacity = (os.cpu_count() or 1) * (max(entry["wall"][3] for entry in ran) - start)
    others = max(0.0, entries[0]["busy"] - sum(entry["own"] for entry in entries)) / capacity
    step = {
        "round": ran[0]["round"],
        "what": what,
        "wall": {"step": seconds, "forward": forward, "reduced": reduced},
        # Adding up gradients is no message that is waited for: the processor time of the rank that took the most.
        "processor": {
            "step": chain,
            "forward": chain_forward,
            "reduced": chain + max(times[3] - times[2] for times in processor),
        },
        "others": others,
        "pings": [ping for entry in entries for ping in entry["pings"]],
        "raw": {
            "marks": ["start", "forward", "step", "reduced"],
            "wall": walls,
            "processor": processor,
        },  # of each rank
    }
    if what in SCHEDULES:
        idle = [
            {"waited": entry["waited"], "seconds": wall[2], **share}
            for entry, wall, share in zip(ran, walls, shares(events), strict=True)
        ]
        step |= {
            "ranks": idle,
            **{
                key: max(entry[key] for entry in ran)
                for key in ("loss_differs", "gradients_differ")
            },
        }
    return step


def best(steps: list[dict[str, Any]], what: str, clock: str, part: str = "step") -> float:
    """Seconds of an arrangement's best round; part: step, forward, reduced (a step and the sum of all ranks' gradients)."""
    return min(step[clock][part] for step in steps if step["what"] == what)


def cell_times(job: Job, steps: list[dict[str, Any]], transfer: float) -> dict[str, float]:
    """What the simulator needs, by processor time. Embedding and head, next to nothing with so few ids, count as part of the cells."""
    forward, step = (best(steps, ALONE, "processor", part) for part in ("forward", "step"))
    batch, slots, width = message_shape(job)
    return {
        "cell_seconds": forward / (job.chunks * job.shape.layers),
        "backward_cells": (step - forward) / forward,
        "transfer_seconds": transfer,
        "transfer_cells": transfer * job.chunks * job.shape.layers / forward,
        "message_bytes": 4 * batch * slots * width,
    }


def findings(job: Job, steps: list[dict[str, Any]], times: dict[str, float]) -> dict[str, Any]:
    """Speed-ups by both clocks, what they had to be, and where the ranks' time went."""
    shape = 2, job.shape.layers, job.chunks
    model = {"backward": times["backward_cells"], "transfer": times["transfer_cells"]}
    ceiling = {
        clock: 2 * best(steps, ALONE, clock) / best(steps, BOTH, clock)
        for clock in ("wall", "processor")
    }
    found = []
    for what in ARRANGEMENTS:
        chosen = min(
            (step for step in steps if step["what"] == what), key=lambda step: step["wall"]["step"]
        )
        row: dict[str, Any] = {"what": what, "others": chosen["others"]}
        for clock in ("wall", "processor"):
            row[clock] = {
                part: best(steps, what, clock, part) for part in ("step", "forward", "reduced")
            }
            row[clock] |= {
                f"{part}_speedup": best(steps, ALONE, clock, part) / row[clock][part]
                for part in ("step", "forward", "reduced")
            }
        if what in SCHEDULES:
            timeline = simulate(what, *shape, **model)
            row["predicted"] = timeline.speedup
            row["predicted_forward"] = simulate(what, *shape, **model, forward_only=True).speedup
            row["ranks"] = chosen["ranks"]
            row["predicted_wait"] = idle_before_the_end(timeline)
        found.append(row)
    piped = [step for step in steps if step["what"] in SCHEDULES]
    agreement = {
        key: max(step[key] for step in piped) for key in ("loss_differs", "gradients_differ")
    }
    quiet = all(
        row["others"] <= QUIET for row in found if row["what"] in (ALONE, BOTH, "layer_level")
    )
    return {
        "arrangements": found,
        "verdict": verdict(found, ceiling),
        "clock": "wall" if quiet else "processor",  # the one that decides
        "agreement": agreement
        | {"tolerance": TOLERANCE, "met": max(agreement.values()) <= TOLERANCE},
    }


def verdict(arrangements: list[dict[str, Any]], ceiling: dict[str, float]) -> dict[str, Any]:
    """Whether layer_level gains as much as it has to: LEAST of the simulated speed-up, at the share of 2 that the machine has to give."""
    row = next(row for row in arrangements if row["what"] == "layer_level")
    found: dict[str, Any] = {}
    for clock, most in ceiling.items():
        bound, speedup = LEAST * most / 2 * row["predicted"], row[clock]["step_speedup"]
        given = {"least": LEAST, "ceiling": most, "predicted": row["predicted"]}
        found[clock] = {**given, "bound": bound, "speedup": speedup, "met": speedup >= bound}
    return found


def idle_before_the_end(timeline: Timeline) -> list[float]:
    """Of each rank of a simulated step: the share of the makespan in which it waits before its last task ends."""
    ends, work = [0.0] * timeline.ranks, [0.0] * timeline.ranks
    for task in timeline.tasks:
        ends[task.rank] = task.end
        work[task.rank] += task.end - task.start
    return [(end - own) / timeline.makespan for end, own in zip(ends, work, strict=True)]


def memory_of(job: Job, ranks: int) -> Iterator[dict[str, Any]]:
    """Peak memory of the ranks of a layer_level pipeline, with and without recomputation."""
    for recompute in track((False, True), description=f"memory of {ranks} rank(s)", transient=True):
        yield {
            "ranks": ranks,
            "recompute": recompute,
            "mib": [count / 2**20 for count in peak_memory(job, ranks, recompute)],
        }


# ---- what is simulated


def simulations(
    times: dict[str, float], chunks: tuple[int, ...], ranks: tuple[int, ...]
) -> list[dict[str, Any]]:
    """Efficiency (speed-up / P) by schedule for every number of chunks, transfer time and P."""
    plan = [
        (T, transfer, P)
        for T in chunks
        for transfer in (times["transfer_cells"], *TRANSFERS)
        for P in ranks
    ]
    rows = []
    for T, transfer, P in track(plan, description="simulating", transient=True):
        timelines = compare(
            P, SIMULATED_LAYERS, T, backward=times["backward_cells"], transfer=transfer
        )
        efficiency = {timeline.schedule: timeline.speedup / P for timeline in timelines}
        winner = max(efficiency, key=lambda name: round(efficiency[name], 6))  # the first of equals
        rows.append(
            {
                "chunks": T,
                "transfer_cells": transfer,
                "ranks": P,
                "efficiency": efficiency,
                "best": winner,
            }
        )
    return rows


def main(argv: list[str]) -> None:
    options = parse(argv)
    result = {"command": " ".join(["python benchmarks/pipeline.py", *argv]), **benchmark(options)}
    name = "pipeline-small" if options.small else "pipeline"
    report.write_json(options.out / f"{name}.json", result)
    pipeline_report.write_plots(options.out, name, result)
    pipeline_report.show(result)
    if not result["agreement"]["met"]:
        raise SystemExit(1)


if __name__ == "__main__":
    run_cli(main)
