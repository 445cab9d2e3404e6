"""Whether a change costs time: this tree against a former commit, both alive, in turn.

    python -m scripts.compare_speed 13cb231
    python -m scripts.compare_speed PATH/of/a/checkout --rounds 50

Each tree runs in one process with one thread, with the same seed and the same small model. A round
asks both for the same work, one after the other, and swaps who is first. Printed for each kind of
work: processor time of both (the fastest round and the median) and the quotient after / before as
the median over rounds with its quartiles. A machine that others use slows both sides of a round.
"""

import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

from comet_pl.errors import Parser, UserError, run_cli

ROOT = Path(__file__).resolve().parents[1]


def jobs() -> dict[str, Callable[[], object]]:
    """Each kind of work, by the comet_pl that Python finds."""
    import torch
    from transformers import Qwen3Config

    from comet_pl import CometConfig, CometForCausalLM

    torch.set_num_threads(1)
    torch.manual_seed(0)
    backbone = Qwen3Config(
        vocab_size=512,
        hidden_size=256,
        intermediate_size=768,
        num_hidden_layers=2,
        num_attention_heads=8,
        num_key_value_heads=4,
        head_dim=32,
        tie_word_embeddings=True,
        bos_token_id=None,
        eos_token_id=None,
    )
    config = CometConfig(
        backbone_config=backbone,
        chunk_size=256,
        global_size=64,
        compression_stride=8,
        temporary_capacity=256,
        adapter_rank=32,
    )
    model = CometForCausalLM(config)
    texts = torch.randint(0, 512, (2, 2048))
    prompt = texts[:1, :700]

    @torch.no_grad()
    def prefill():
        model.eval()(input_ids=texts, use_cache=True, logits_to_keep=1)

    def decode():
        model.eval().generate(
            prompt,
            attention_mask=torch.ones_like(prompt),
            min_new_tokens=60,
            max_new_tokens=60,
            do_sample=False,
            pad_token_id=0,
        )

    def train():
        model.train().zero_grad()
        model(input_ids=texts[:, :1024], labels=texts[:, :1024]).loss.backward()

    return {"prefill": prefill, "decode": decode, "train": train}


def serve() -> None:
    """Does the work named by each line of stdin and answers its seconds of processor time."""
    known = jobs()
    for line in sys.stdin:
        start = time.process_time()
        known[line.strip()]()
        print(time.process_time() - start, flush=True)


class Side:
    """A process that works with the tree in `folder`."""

    def __init__(self, folder: Path):
        self.folder = folder
        self.process = subprocess.Popen(
            [sys.executable, __file__, "--serve"],
            cwd=folder,
            env={**os.environ, "PYTHONPATH": str(folder), "OMP_NUM_THREADS": "1"},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )

    def __call__(self, work: str) -> float:
        assert self.process.stdin and self.process.stdout
        print(work, file=self.process.stdin, flush=True)
        if not (answer := self.process.stdout.readline()):
            raise UserError(f"{self.folder}: its process ended while it was asked to {work}")
        return float(answer)


def checkout(before: str, folder: Path) -> Path:
    """The tree named `before`: a folder as it is, a commit unpacked into `folder`."""
    if (Path(before) / "comet_pl").is_dir():
        return Path(before).resolve()
    archive = folder / "tree.tar"
    command = ["git", "archive", "--output", str(archive), before]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    if done.returncode:
        raise UserError(
            f"{before}: neither a folder with comet_pl/ nor a commit ({done.stderr.strip()})"
        )
    shutil.unpack_archive(archive, folder, filter="data")
    return folder


def compare(sides: list[Side], work: str, rounds: int) -> str:
    """A line: milliseconds before and after, and their quotient."""
    seconds: tuple[list[float], list[float]] = ([], [])
    for side in sides:
        side(work)  # warm-up
    for k in range(rounds):
        for which in (0, 1) if k % 2 else (1, 0):
            seconds[which].append(sides[which](work))
    quotients = [after / before for before, after in zip(*seconds, strict=True)]
    low, middle, high = statistics.quantiles(quotients, n=4)
    times = "  ".join(f"{min(s) * 1e3:8.1f} {statistics.median(s) * 1e3:8.1f}" for s in seconds)
    return f"{work:8} {times}  {middle:6.3f} ({low:.3f} to {high:.3f})"


def main(argv: list[str]) -> None:
    parser = Parser(prog="python -m scripts.compare_speed", description=__doc__)
    parser.add_argument("before", help="a commit, or the folder of a checkout")
    parser.add_argument("--rounds", type=int, default=30, help="of each work (default: 30)")
    options = parser.parse_args(argv)
    if options.rounds < 2:
        raise UserError(f"--rounds: {options.rounds} given, a whole number >= 2 is needed")
    with tempfile.TemporaryDirectory() as folder:
        sides = [Side(checkout(options.before, Path(folder))), Side(ROOT)]
        try:
            print("ms       before: least, median  after: least, median  after / before")
            for work in ("prefill", "decode", "train"):
                print(compare(sides, work, options.rounds), flush=True)
        finally:
            for side in sides:
                side.process.kill()


if __name__ == "__main__":
    serve() if sys.argv[1:] == ["--serve"] else run_cli(main)
