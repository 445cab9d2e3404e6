"""`python -m benchmarks.gpu.group JOB` measures a group of the plan; __main__.py starts it.

JOB is JSON: "plan" (a module with PLAN), "group", "device", "tiny", "scratch" (a folder), "lines"
(the file that gets a line a measurement), "deadline" (a time), "done" (what is left out) and "last"
(what failed before).
"""

import json
import sys
from importlib import import_module
from pathlib import Path

from benchmarks.gpu.measure import Place, append_line, line_of


def main(argv):
    job = json.loads(argv[0])
    place = Place(job["device"], job["tiny"], Path(job["scratch"]))
    lines, group = Path(job["lines"]), {"group": job["group"]}
    plan = import_module(job["plan"]).PLAN[job["group"]]
    for planned in sorted(plan, key=lambda planned: planned.what in job["last"]):
        if planned.what in job["done"]:
            continue
        try:
            line = line_of(planned, place, job["deadline"])
        except Exception as error:
            append_line(lines, group | getattr(error, "line", {}))
            raise
        append_line(lines, group | line)


if __name__ == "__main__":
    main(sys.argv[1:])
