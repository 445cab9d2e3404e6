"""Writes docs/performance.md from the results of the benchmarks; its introduction stays."""

import json
from pathlib import Path

from benchmarks.gpu import report as gpu
from benchmarks.inference import decode, prefill, reading
from benchmarks.loading import data, startup
from benchmarks.pipeline import report as pipeline
from benchmarks.shared.options import RESULTS, ROOT, SIZES
from benchmarks.shared.report import ABSENT
from benchmarks.training import step
from comet_pl.errors import Parser, UserError, run_cli
from comet_pl.files import replace_file

PICTURES = ("", "-simulated", *(f"-{name}" for name in gpu.PICTURES))  # ends of their names
PAGE = ROOT / "docs" / "performance.md"
SECTIONS = {
    "prefill": prefill.section,
    "reading": reading.section,
    "decode": decode.section,
    "gpu/gpu": gpu.section,
    "training": step.section,
    "startup": startup.section,
    "pipeline": pipeline.section,
    "data": data.section,
}


def machine(result):
    facts = result["machine"]
    cpu = f"{facts['processor']}, {facts['cores']} cores, {facts['cpu_kernels']}"
    parts = [facts.get("gpu") or cpu]
    parts += [f"{result['threads']} thread(s)"] if "threads" in result else []
    parts += [result["dtype"]] if "dtype" in result else []
    parts += [f"torch {facts['torch']}, transformers {facts['transformers']}"]
    return f"{', '.join(parts)}; load before: {facts['load_before']:.1f}."


def page(results):
    lines = []
    for name, title, command in SIZES["page"]:
        section, command = SECTIONS[name.split("-")[0]], f"python -m benchmarks.{command}"
        lines += [f"## {title}", ""]
        file = results / f"{name}.json"
        if not file.exists():
            lines += [f"{ABSENT.capitalize()}: `{command}`.", ""]
            continue
        try:
            result = json.loads(file.read_text(encoding="utf-8"))
            lines += ["```bash", result["command"], "```", machine(result), "", *section(result)]
        except (ValueError, KeyError, TypeError, StopIteration) as error:
            why = f"{type(error).__name__} {error}"
            raise UserError(f"{file}: not a result of `{command}`: {why}") from None
        lines.append("")
        for picture in (f"{name}{end}.png" for end in PICTURES):
            if (results / picture).exists():
                lines.append(f"![{title}](../benchmarks/results/{picture})\n")
    return "\n".join(lines).rstrip() + "\n"


def main(argv):
    parser = Parser(prog="python -m benchmarks.performance", description=__doc__)
    text = "default: benchmarks/results"
    parser.add_argument("--results", type=Path, default=RESULTS, metavar="DIR", help=text)
    text = "default: docs/performance.md"
    parser.add_argument("--out", type=Path, default=PAGE, metavar="FILE", help=text)
    options = parser.parse_args(argv)
    if not options.results.is_dir():
        raise UserError(f"--results: {options.results} is no folder")
    introduction = PAGE.read_text(encoding="utf-8").split("\n## ")[0]
    replace_file(options.out, f"{introduction}\n{page(options.results)}".encode(), "--out")
    print(f"written: {options.out}")


if __name__ == "__main__":
    run_cli(main)
