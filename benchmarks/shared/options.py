"""The command line that the benchmarks share."""

import os
from pathlib import Path

import torch
import yaml

from benchmarks.shared.rates import clock_of
from comet_pl.errors import Parser, UserError, os_errors

ROOT = Path(__file__).resolve().parents[2]
RESULTS = ROOT / "benchmarks" / "results"
SIZES = yaml.safe_load((ROOT / "benchmarks" / "sizes.yaml").read_text())


class Options(Parser):
    """A parser with --out and the flags, numbers and arguments of sizes.yaml.

    module: name below `benchmarks`. out: the usual folder. least: of a whole number, if not 1.
    """

    def __init__(self, module, description, out=RESULTS, **least):
        text = f"{description} benchmarks/README.md says more."
        super().__init__(prog=f"python -m benchmarks.{module}", description=text)
        self.numbers, self.least = SIZES["options"][module], least
        sizes = [size for size in self.numbers if size not in ("usual", "arguments")]
        for name, options in self.numbers.get("arguments", {}).items():
            kind = (
                {"type": {"int": int, "Path": Path}[options["type"]]} if "type" in options else {}
            )
            self.add_argument(name, **options | kind)
        self.set_defaults(size=None)
        flags = self.add_mutually_exclusive_group() if sizes else self
        for size in sizes:
            text = "a trial, at the least sizes" if size == "tiny" else f"{size} sizes"
            flags.add_argument(
                f"--{size}", dest="size", action="store_const", const=size, help=text
            )
        for key, value in self.numbers["usual"].items():
            several = isinstance(value, list)
            value_type = int if value == "all" else type(value[0] if several else value)
            kind = {"type": value_type, "nargs": "+" if several else None}
            self.add_argument(flag(key), **kind, metavar="N", help=f"default: {value}")
        text = f"default: {out.relative_to(ROOT)}"
        self.add_argument("--out", type=Path, default=out, metavar="DIR", help=text)

    def settle(self, argv):
        """The options with every default, `command` (without --out) and `given`: the numbers in
        argv. Makes the folder of the results. Raises UserError."""
        options = self.parse_intermixed_args(argv)
        told = [a for i, a in enumerate(argv) if "--out" not in (a, argv[i - 1] if i else "")]
        options.command, options.given = " ".join([self.prog, *told]), set()
        options.load = os.getloadavg()[0]
        for key, usual in {**self.numbers["usual"], **self.numbers.get(options.size, {})}.items():
            value = getattr(options, key)
            if value is None:
                setattr(options, key, torch.get_num_threads() if usual == "all" else usual)
                continue
            options.given.add(key)
            value, least = min(value) if isinstance(value, list) else value, self.least.get(key, 1)
            if isinstance(value, float) and not 0 < value < float("inf"):
                raise UserError(f"{flag(key)}: {value} given, a number > 0 is needed")
            if isinstance(value, int) and value < least:
                raise UserError(f"{flag(key)}: {value} given, a whole number >= {least} is needed")
        with os_errors(f"--out: {options.out} cannot be made"):
            options.out.mkdir(parents=True, exist_ok=True)
        return options


def flag(key):
    return f"--{key.replace('_', '-')}"


def settle_device(options):
    """Puts the device and dtype in place of auto and None. Raises UserError without a GPU."""
    present = torch.cuda.is_available()
    if options.device == "cuda" and not present:
        raise UserError("--device: cuda given, but torch sees no GPU here; use --device cpu")
    if options.device == "auto":
        options.device = "cuda" if present else "cpu"
    options.dtype = options.dtype or ("float32" if options.device == "cpu" else "bfloat16")


def conditions(options):
    clock = clock_of(options.device, options.threads)
    return {key: getattr(options, key) for key in ("threads", "device", "dtype")} | {"clock": clock}
