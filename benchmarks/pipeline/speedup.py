"""What a pipeline of two processes gains here, and what more ranks would gain."""

import os
from dataclasses import replace

from rich.progress import track

from benchmarks.pipeline.clock import longest_chain, shares
from benchmarks.pipeline.report import plot, plot_simulated, section
from benchmarks.pipeline.steps import ALONE, ARRANGEMENTS, BOTH, Job, measure, peak_memory
from benchmarks.shared import report
from benchmarks.shared.options import Options
from benchmarks.shared.ranks import in_ranks
from benchmarks.shared.rates import CLOCKS
from benchmarks.shared.shapes import SHAPES
from comet_pl.errors import run_cli
from comet_pl.parallel.schedule import SCHEDULES
from comet_pl.parallel.simulate import compare, simulate

LEAST = 0.9  # of the simulated speed-up, at this machine's ceiling, that layer_level has to reach
TOLERANCE = 1e-5  # of loss and gradients, relative: float32 sums in another order
QUIET = 0.05  # of the machine's processors that other programs may take

SIMULATED_LAYERS = 36  # of Qwen3-4B
SIMULATED = ((64, 512), (2, 4, 8, 16, 32, 64))  # chunks (of 2,048: 128k and 1M tokens); ranks
TRANSFERS = (0.1, 0.5, 1.0, 2.0)  # forward cells that a message takes, besides what was measured


def benchmark(options):
    small = options.size == "small"
    shape = replace(SHAPES["pipeline-small" if small else "pipeline"], layers=options.layers)
    job, memory = Job(shape, options.chunks, options.rounds), []
    both_ranks = in_ranks(2, measure, job)
    transfer = min(ping for entry in both_ranks[0] for ping in entry["pings"])
    steps = [combine(entries, transfer) for entries in zip(*both_ranks, strict=True)]
    times = cell_times(job, steps, transfer)
    plan = [(n, how) for n in ((1, 2) if small else (1, 2, 4, 8)) for how in (False, True)]
    for n, recompute in track(plan, description="memory", transient=True):
        mib = [peak / 2**20 for peak in in_ranks(n, peak_memory, job, recompute)]
        memory.append({"ranks": n, "recompute": recompute, "mib": mib})
    rows = simulations(times, *(((64,), (2, 4, 8)) if small else SIMULATED))
    return {
        "threads": 1,
        "dtype": "float32",
        "shape": vars(job.shape),
        "chunks": job.chunks,
        "rounds": job.rounds,
        "times": times,
        **findings(job, steps, times),
        "memory": memory,
        "simulated": {"layers": SIMULATED_LAYERS, "rows": rows},
        "steps": steps,
    }


def combine(entries, transfer):
    """One step of one arrangement, from the entry of each rank; seconds since all had begun."""
    ran = [entry for entry in entries if "wall" in entry]
    what, start = ran[0]["what"], max(entry["wall"][0] for entry in ran)
    step = {"round": ran[0]["round"], "what": what, "wall": {}, "processor": {}}
    for stage, k in (("forward", 1), ("step", 2)):
        events = [entry["events"] for entry in ran]
        if stage == "forward":
            events = [entry["events"][: entry["forward_events"]] for entry in ran]
        spent = [entry["processor"][k] - entry["processor"][0] for entry in ran]
        step["wall"][stage] = max(entry["wall"][k] for entry in ran) - start
        step["processor"][stage] = longest_chain(events, spent, transfer)
    others = max(0.0, entries[0]["busy"] - sum(entry["own"] for entry in entries))
    step["others"] = others / ((os.cpu_count() or 1) * step["wall"]["step"])
    if what in SCHEDULES:
        step["ranks"] = [
            {"waited": entry["waited"], "seconds": entry["wall"][2] - start, **share}
            for entry, share in zip(ran, shares(events), strict=True)
        ]
        for key in ("loss_differs", "gradients_differ"):
            step[key] = max(entry[key] for entry in ran)
    return step


def best(steps, what, clock, stage="step"):
    return min(step[clock][stage] for step in steps if step["what"] == what)


def cell_times(job, steps, transfer):
    """What the simulator needs, by processor time; embedding and head are next to nothing."""
    forward, step = (best(steps, ALONE, "processor", stage) for stage in ("forward", "step"))
    cell = forward / (job.chunks * job.shape.layers)
    return {"backward_cells": (step - forward) / forward, "transfer_cells": transfer / cell}


def findings(job, steps, times):
    """Speed-ups by both clocks, the verdict on layer_level, and which clock decides."""
    model = {"backward": times["backward_cells"], "transfer": times["transfer_cells"]}
    rows = {}
    for what in ARRANGEMENTS:
        own = [step for step in steps if step["what"] == what]
        quickest = min(own, key=lambda step: step["wall"]["step"])
        row = rows[what] = {"what": what, "others": quickest["others"]}
        for clock in CLOCKS:
            seconds = best(steps, what, clock)
            speedup = best(steps, ALONE, clock) / seconds
            row[clock] = {"step": seconds, "step_speedup": speedup}
        if what in SCHEDULES:
            speedup = simulate(what, 2, job.shape.layers, job.chunks, **model).speedup
            row |= {"predicted": speedup, "ranks": quickest["ranks"]}
    verdict, layer_level = {}, rows["layer_level"]
    for clock in CLOCKS:
        ceiling, predicted = 2 * rows[BOTH][clock]["step_speedup"], layer_level["predicted"]
        bound, speedup = LEAST * ceiling / 2 * predicted, layer_level[clock]["step_speedup"]
        basis = {"least": LEAST, "ceiling": ceiling, "predicted": predicted}
        met = speedup >= bound
        verdict[clock] = {**basis, "bound": bound, "speedup": speedup, "met": met}
    piped = [step for step in steps if step["what"] in SCHEDULES]
    differ = {k: max(step[k] for step in piped) for k in ("loss_differs", "gradients_differ")}
    agrees = max(differ.values()) <= TOLERANCE
    others = max(rows[what]["others"] for what in (ALONE, BOTH, "layer_level"))
    return {
        "arrangements": list(rows.values()),
        "verdict": verdict,
        "clock": "wall" if others <= QUIET else "processor",
        "agreement": differ | {"tolerance": TOLERANCE, "met": agrees},
    }


def simulations(times, chunks, ranks):
    """Efficiency (speed-up / P) by schedule for every number of chunks, transfer time and P."""
    transfers, rows = (times["transfer_cells"], *TRANSFERS), []
    plan = [(T, transfer, P) for T in chunks for transfer in transfers for P in ranks]
    for T, transfer, P in track(plan, description="simulating", transient=True):
        model = {"backward": times["backward_cells"], "transfer": transfer}
        lines = compare(P, SIMULATED_LAYERS, T, **model)
        efficiency = {line.schedule: line.speedup / P for line in lines}
        winner = max(efficiency, key=lambda name: round(efficiency[name], 6))  # first of equals
        row = {"chunks": T, "transfer_cells": transfer, "ranks": P}
        rows.append({**row, "efficiency": efficiency, "best": winner})
    return rows


def main(argv):
    options = Options("pipeline.speedup", __doc__, chunks=2).settle(argv)
    result, plots = benchmark(options), {"plot": plot, "plot_simulated": plot_simulated}
    report.publish(options, ("pipeline", options.size), result, section, **plots)
    if not result["agreement"]["met"]:
        raise SystemExit(1)


if __name__ == "__main__":
    run_cli(main)
