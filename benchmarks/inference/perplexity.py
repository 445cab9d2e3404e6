"""Are short inputs unharmed? Perplexity of a decoder on pieces of a book before plugging memory in, after, and after fine-tuning.

    python benchmarks/perplexity.py BOOK...                 SmolLM2-135M with fresh memory; some ten minutes on one core
    python benchmarks/perplexity.py BOOK... --ckpt RUN      the fine-tuned model too, with the chunks and memories of that run

The same pieces for all, evenly spaced over the books and cut without regard to sentences. Each piece is read alone, from empty memory:

- plain: Hugging Face's decoder as it is;
- memories off: in our model, without memories; it has to be the same (law 5);
- in one chunk: compression tokens stand between the text, and no memory is read;
- in chunks of C: memory is read from the second chunk on. Fresh memory modules are random (seeded), so a loss is to be expected there.

Loss is the mean negative log likelihood a token (nats; softmax over all rows, new ones included) over the tokens of a piece that have a
token before them. Differences to plain are paired by piece, +/- one standard error over pieces.
Results: benchmarks/results/perplexity.json and .png.
"""

from __future__ import annotations

import argparse
import math
import statistics
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent))

import matplotlib
import report
import torch
from matplotlib.figure import Figure
from measure_decode import ROOT, USUAL_MODEL, load_decoder, plug_in
from rich.console import Console
from torch import Tensor

from comet_pl.errors import Parser, UserError, run_cli
from comet_pl.model.chunk_layout import fixed_chunks
from comet_pl.progress import PLAIN, Bar

HERE = Path(__file__).resolve().parent
MEMORY = {"chunk_size": 256, "global_size": 64, "compression_stride": 8, "temporary_capacity": 512}
NEUTRAL = 1e-5  # float32 logits relative to the largest
Loss = Callable[[Tensor], float]
"""ids of a piece (1, N) -> its loss"""


def parse(argv: list[str]) -> argparse.Namespace:
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("books", type=Path, nargs="+", metavar="BOOK", help="text files, UTF-8")
    parser.add_argument(
        "--model", metavar="FOLDER", help="the plain decoder (default: models/smollm2_135m)"
    )
    parser.add_argument(
        "--ckpt",
        type=Path,
        metavar="RUN",
        help="a run, a checkpoint or a saved folder, fine-tuned from that decoder",
    )
    parser.add_argument(
        "--pieces", type=int, default=24, metavar="N", help="of all books together (default: 24)"
    )
    parser.add_argument(
        "--tokens", type=int, default=1024, metavar="N", help="a piece (default: 1024)"
    )
    parser.add_argument(
        "--chunk-size",
        type=int,
        metavar="C",
        help=f"default: that of --ckpt, else {MEMORY['chunk_size']}",
    )
    parser.add_argument(
        "--seed",
        type=int,
        default=0,
        metavar="N",
        help="of the fresh memory's weights (default: 0)",
    )
    parser.add_argument("--threads", type=int, default=1, metavar="N", help="default: 1")
    parser.add_argument(
        "--out",
        type=Path,
        default=HERE / "results",
        metavar="DIR",
        help="default: benchmarks/results",
    )
    options = parser.parse_args(argv)
    for name, least in (("pieces", 2), ("tokens", 2), ("chunk_size", 1), ("threads", 1)):
        value = getattr(options, name)
        if value is not None and value < least:
            raise UserError(
                f"--{name.replace('_', '-')}: {value} given, a whole number >= {least} is needed"
            )
    if options.model is None and not USUAL_MODEL.is_dir():
        raise UserError(
            f"--model: {USUAL_MODEL.relative_to(ROOT)} is not there; `make smollm2` makes it, or give another folder"
        )
    report.make_folder(options.out)
    return options


# ---- pieces


def starts(tokens: int, size: int, count: int) -> list[int]:
    """Where `count` pieces of `size` tokens start in a text of `tokens`, evenly spaced from its first token to its last."""
    return [i * (tokens - size) // max(1, count - 1) for i in range(count)]


def cut_pieces(books: Sequence[Path], tokenizer: Any, count: int, size: int) -> list[Tensor]:
    """`count` pieces (1, size), the books' shares as equal as can be.

    Raises:
        UserError: a book that cannot be read, or is shorter than a piece; more books than pieces.
    """
    if count < len(books):
        raise UserError(
            f"--pieces: {count} given for {len(books)} books, one for each is needed at least"
        )
    pieces = []
    for k, book in enumerate(books):
        try:
            text = book.read_text("utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise UserError(f"BOOK: {book} cannot be read: {error}") from None
        ids = torch.tensor(tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"])
        if len(ids) < size:
            raise UserError(
                f"BOOK: {book} has {len(ids)} tokens, a piece takes {size}; a longer book or fewer --tokens are needed"
            )
        share = count * (k + 1) // len(books) - count * k // len(books)
        pieces += [ids[None, start : start + size] for start in starts(len(ids), size, share)]
    return pieces


# ---- models


def load_tokenizer(path: str) -> Any:
    """The decoder's. Raises UserError."""
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(path)
    except (OSError, ValueError, KeyError) as error:
        raise UserError(
            f"--model: {path}: no tokenizer can be loaded: {(str(error).splitlines() or ['?'])[0]}"
        ) from None


def fine_tuned(path: Path, vocabulary: int) -> Any:
    """The checkpoint's model.

    Raises:
        UserError: not loadable, or of another vocabulary.
    """
    from comet_pl.build import load_checkpoint

    model = load_checkpoint(path, [])[0]
    if model.config.first_new_id != vocabulary:
        raise UserError(
            f"--ckpt: {path} reads a vocabulary of {model.config.first_new_id}, --model one of {vocabulary}; the same is needed"
        )
    return model


def in_chunks(model: Any, size: int) -> Loss:
    """Reads each piece in chunks of `size` tokens, from empty memory."""
    return lambda ids: model(
        ids, labels=ids, chunk_sizes=fixed_chunks(ids.shape[1], size), use_cache=False
    ).loss.item()


def neutral(decoder: Any, off: Any, ids: Tensor) -> float:
    """Law 5: how far the logits without memories are from the decoder's, relative to their largest."""
    theirs, ours = decoder(ids, use_cache=False).logits, off(ids, use_cache=False).logits
    return ((ours - theirs).abs().max() / theirs.abs().max()).item()


# ---- the benchmark


def benchmark(options: argparse.Namespace) -> dict[str, Any]:
    """All losses on all pieces, and what they depend on."""
    torch.set_num_threads(options.threads)
    path = options.model or str(USUAL_MODEL)
    tokenizer, decoder = load_tokenizer(path), load_decoder(path)
    pieces = cut_pieces(options.books, tokenizer, options.pieces, options.tokens)
    tuned = fine_tuned(options.ckpt, decoder.config.vocab_size) if options.ckpt else None
    memory = (
        {key: getattr(tuned.config, key) for key in MEMORY} if tuned is not None else dict(MEMORY)
    )
    memory["chunk_size"] = size = options.chunk_size or memory["chunk_size"]

    torch.manual_seed(options.seed)
    fresh = plug_in(decoder, memory)
    off = plug_in(
        decoder, {"chunk_size": options.tokens, "global_size": 0, "compression_stride": None}
    )
    losses: dict[str, Loss] = {
        "plain": lambda ids: decoder(ids, labels=ids, use_cache=False).loss.item()
    }
    losses["memories off"] = in_chunks(off, options.tokens)
    for name, model in (("plugged in", fresh), ("fine-tuned", tuned)):
        if model is not None:
            losses[f"{name}, one chunk"] = in_chunks(model, options.tokens)
            if size < options.tokens:
                losses[f"{name}, chunks of {size}"] = in_chunks(model, size)

    found: dict[str, list[float]] = {name: [] for name in losses}
    with Bar(len(pieces) * len(losses) * options.tokens) as bar:
        for ids in pieces:
            for name, loss in losses.items():
                bar.name(name)
                found[name].append(loss(ids))
                bar.add(options.tokens)
    differ = neutral(decoder, off, pieces[0])
    return {
        "model": options.model or str(USUAL_MODEL.relative_to(ROOT)),
        "ckpt": None if options.ckpt is None else str(options.ckpt),
        "books": [book.name for book in options.books],
        "pieces": len(pieces),
        "tokens": options.tokens,
        "memory": memory,
        "seed": options.seed,
        "machine": report.machine("cpu"),
        "law_5": {"logits_differ": differ, "allowed": NEUTRAL, "met": differ <= NEUTRAL},
        "models": [summary(name, values, found["plain"]) for name, values in found.items()],
    }


def summary(name: str, losses: Sequence[float], plain: Sequence[float]) -> dict[str, Any]:
    """Mean loss and paired difference to plain, each with its standard error over pieces; nats a token."""
    differences = [a - b for a, b in zip(losses, plain, strict=True)]
    loss, error = mean_and_error(losses)
    difference, difference_error = mean_and_error(differences)
    return {
        "name": name,
        "perplexity": math.exp(loss),
        "loss": loss,
        "loss_error": error,
        "difference": difference,
        "difference_error": difference_error,
        "losses": list(losses),
    }


def mean_and_error(values: Sequence[float]) -> tuple[float, float]:
    """(mean, its standard error)."""
    return statistics.fmean(values), statistics.stdev(values) / math.sqrt(len(values))


# ---- what it shows


def plot(result: dict[str, Any]) -> Figure:
    """The paired difference of each model to the plain decoder, a dot a piece and the mean with its standard error."""
    with matplotlib.rc_context({"font.size": 10}):
        plain, *others = result["models"]
        figure = Figure(figsize=(8, 1.2 + 0.55 * len(others)), layout="constrained", dpi=100)
        axes = figure.subplots()
        for y, one in enumerate(others):
            differences = [a - b for a, b in zip(one["losses"], plain["losses"], strict=True)]
            axes.plot(
                differences,
                [y] * len(differences),
                "o",
                color="tab:blue",
                alpha=0.25,
                markersize=4,
                markeredgewidth=0,
            )
            axes.errorbar(
                one["difference"],
                y,
                xerr=one["difference_error"],
                fmt="D",
                color="tab:blue",
                capsize=4,
                markersize=5,
            )
        axes.axvline(0, color="tab:red", linewidth=1)
        axes.set_yticks(
            range(len(others)),
            [f"{one['name']}\nperplexity {one['perplexity']:.2f}" for one in others],
        )
        axes.invert_yaxis()
        axes.margins(y=0.2)
        axes.set(xlabel="loss minus the plain decoder's, nats a token; dots: pieces; diamond: mean")
        axes.grid(alpha=0.3, axis="x")
        title = f"{result['model']} (plain: perplexity {plain['perplexity']:.2f}), {result['pieces']} pieces of {result['tokens']} tokens"
        figure.suptitle(title, fontsize=10)
    return figure


def show(result: dict[str, Any]) -> None:
    console = Console()
    table = report.new_table(
        f"{result['pieces']} pieces of {result['tokens']} tokens",
        "",
        "perplexity",
        "loss, nats a token",
        "minus plain",
    )
    for one in result["models"]:
        loss, more = (
            f"{one[key]:{sign}.4f} +/- {one[f'{key}_error']:.4f}"
            for key, sign in (("loss", ""), ("difference", "+"))
        )
        table.add_row(
            one["name"], f"{one['perplexity']:.3f}", loss, more if one["name"] != "plain" else ""
        )
    console.print(table)
    law = result["law_5"]
    allowed = f"allowed {law['allowed']:.0e}: {'met' if law['met'] else 'MISSED'}"
    console.print(
        f"memories off: logits differ from plain by {law['logits_differ']:.1e} of the largest, {allowed}",
        **PLAIN,
    )


@torch.inference_mode()
def main(argv: list[str]) -> None:
    options = parse(argv)
    result = {"command": " ".join(["python benchmarks/perplexity.py", *argv]), **benchmark(options)}
    report.write_json(options.out / "perplexity.json", result)
    report.write(
        options.out / "perplexity.png", lambda file: plot(result).savefig(file, format="png")
    )
    show(result)


if __name__ == "__main__":
    run_cli(main)
