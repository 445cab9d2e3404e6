"""What it costs to get data to the model: `python benchmarks/data.py --help`; feeding.py is the program.

Where benchmarks/ stands first in sys.path, Python finds this file when the package data/ is asked for; then it stands in for the package.
"""

from pathlib import Path

__path__ = [str(Path(__file__).resolve().parents[1] / "data")]

if __name__ == "__main__":
    import feeding

    from comet_pl.errors import run_cli

    run_cli(feeding.main)
