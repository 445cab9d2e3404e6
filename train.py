"""Trains a CoMeT, then evaluates it: python train.py [conf=NAME] [key=value ...]

--help lists the confs and keys.
"""

from __future__ import annotations

from comet_pl.config.help import help_asked
from comet_pl.config.launch import check_variables
from comet_pl.config.load import load
from comet_pl.errors import importing, run_cli
from comet_pl.experiment.run_folder import saved_configuration


def main(argv: list[str]) -> None:
    help_asked(argv)
    config = load(argv)
    # A run that resumes keeps its own configuration; only what is typed can differ.
    if saved := saved_configuration(config):
        config = load(argv, base=saved)

    check_variables()
    with importing():
        from comet_pl.experiment.session import run_session

    run_session(config, argv)


if __name__ == "__main__":
    # Ctrl-C while building or evaluating ends it at once; training stops between two steps.
    run_cli(main)
