"""`python -m benchmarks.shared.child MODULE FUNCTION JOB` prints FUNCTION(JOB) as a line of JSON.

benchmarks/shared/processes.py starts it.
"""

import json
from importlib import import_module

from comet_pl.errors import run_cli


def main(argv):
    job, measure = json.loads(argv[2]), getattr(import_module(argv[0]), argv[1])
    if "threads" in job:
        import torch

        torch.manual_seed(0)
        torch.set_num_threads(job["threads"])
    print(json.dumps(measure(job)))


if __name__ == "__main__":
    run_cli(main)
