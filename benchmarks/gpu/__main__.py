from benchmarks.gpu import main
from comet_pl.errors import run_cli

run_cli(main)
