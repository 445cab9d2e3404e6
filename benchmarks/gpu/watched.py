"""`python -m benchmarks.gpu.watched SCRIPT ARGUMENTS` runs a script, then prints its seconds and
the peak of its GPU memory as a line of JSON."""

import json
import runpy
import sys
import time


def main(argv):
    sys.argv = argv
    start = time.perf_counter()
    runpy.run_path(argv[0], run_name="__main__")
    facts = {"seconds": round(time.perf_counter() - start, 2)}
    import torch

    if torch.cuda.is_available():
        facts["peak_gib"] = round(torch.cuda.max_memory_allocated() / 2**30, 2)
    print(json.dumps(facts))


if __name__ == "__main__":
    main(sys.argv[1:])
