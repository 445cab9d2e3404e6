"""Are short inputs unharmed? Perplexity of a decoder, without memory, with it, and fine-tuned."""

import math
import statistics
from functools import partial

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from benchmarks.inference.decoders import USUAL_MODEL, load_decoder, load_tokenizer, plug_in
from benchmarks.shared import report
from benchmarks.shared.options import ROOT, Options
from comet_pl.chat.open_model import memory_keys
from comet_pl.errors import UserError, run_cli
from comet_pl.experiment.new_model import start_token
from comet_pl.model.chunk_layout import fixed_chunks
from comet_pl.progress import Bar

MEMORY = {"chunk_size": 256, "global_size": 64, "compression_stride": 8, "temporary_capacity": 512}
NEUTRAL = 1e-5  # float32 logits relative to the largest


def parse(argv):
    least = {"pieces": 2, "tokens": 2, "chunk_size": 0, "seed": 0}
    options = Options("inference.perplexity", __doc__, **least).settle(argv)
    if options.model is None and not USUAL_MODEL.is_dir():
        usual = USUAL_MODEL.relative_to(ROOT)
        other = "`make smollm2` makes it, or give another folder"
        raise UserError(f"--model: {usual} is not there; {other}")
    return options


def starts(tokens, size, count):
    """Where `count` evenly spaced pieces start, from the first of `tokens` to the last."""
    return [i * (tokens - size) // max(1, count - 1) for i in range(count)]


def cut_pieces(books, tokenizer, count, size) -> list[Tensor]:
    """`count` pieces (1, size), the books' shares as equal as possible. Raises UserError."""
    if count < len(books):
        few = f"{len(books)} books, one for each is needed at least"
        raise UserError(f"--pieces: {count} given for {few}")
    pieces = []
    for k, book in enumerate(books):
        try:
            text = book.read_text("utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise UserError(f"BOOK: {book} cannot be read: {error}") from None
        ids = torch.tensor(tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"])
        if len(ids) < size:
            more = f"a piece takes {size}; a longer book or fewer --tokens are needed"
            raise UserError(f"BOOK: {book} has {len(ids)} tokens, {more}")
        share = count * (k + 1) // len(books) - count * k // len(books)
        pieces += [ids[None, start : start + size] for start in starts(len(ids), size, share)]
    return pieces


def fine_tuned(path, vocabulary):
    from comet_pl.build import load_checkpoint

    model = load_checkpoint(path, [])[0]
    own = model.config.first_new_id
    if own != vocabulary:
        other = f"--model one of {vocabulary}; the same is needed"
        raise UserError(f"--ckpt: {path} reads a vocabulary of {own}, {other}")
    return model


def in_chunks(model, size):
    """The loss of a piece in chunks of `size` tokens, from empty memory."""
    sizes = partial(fixed_chunks, chunk_size=size)
    keep = {"use_cache": False, "loss_only": True}
    return lambda ids: model(ids, labels=ids, chunk_sizes=sizes(ids.shape[1]), **keep).loss.item()


def in_blocks(decoder, size):
    """The loss of a piece of which the decoder sees `size` tokens at a time, without memory; a
    block's first token is predicted by the block before."""

    def loss(ids):
        logits = [decoder(block, use_cache=False).logits for block in ids.split(size, 1)]
        return cross_entropy(torch.cat(logits, 1)[0, :-1], ids[0, 1:]).item()

    return loss


def neutral(decoder, off, ids: Tensor):
    """Law 5: the largest difference of logits without memories, relative to the largest logit."""
    theirs, ours = decoder(ids, use_cache=False).logits, off(ids, use_cache=False).logits
    return ((ours - theirs).abs().max() / theirs.abs().max()).item()


def benchmark(options):
    torch.set_num_threads(options.threads)
    path, tokens = options.model or str(USUAL_MODEL), options.tokens
    tokenizer, decoder = load_tokenizer(path), load_decoder(path)
    pieces = cut_pieces(options.books, tokenizer, options.pieces, tokens)
    tuned = fine_tuned(options.ckpt, decoder.config.vocab_size) if options.ckpt else None
    memory = {key: getattr(tuned.config, key) for key in MEMORY} if tuned else dict(MEMORY)
    memory["chunk_size"] = size = options.chunk_size or memory["chunk_size"]
    memory |= memory_keys(options.set)
    start = None if options.start is None else start_token(options.start, tokenizer)

    torch.manual_seed(options.seed)
    fresh = plug_in(decoder, memory, start)
    none = {"chunk_size": tokens, "global_size": 0, "compression_stride": None}
    off = plug_in(decoder, none)
    losses = {
        "plain": lambda ids: decoder(ids, labels=ids, use_cache=False).loss.item(),
        "memories off": in_chunks(off, tokens),
    }
    if size < tokens:
        losses[f"plain, blocks of {size}"] = in_blocks(decoder, size)
    for name, model in (("plugged in", fresh), ("fine-tuned", tuned)):
        if model is not None:
            losses[f"{name}, one chunk"] = in_chunks(model, tokens)
            if size < tokens:
                losses[f"{name}, chunks of {size}"] = in_chunks(model, size)

    values = {name: [] for name in losses}
    with Bar(len(pieces) * len(losses) * tokens) as bar:
        for ids in pieces:
            for name, loss in losses.items():
                bar.name(name)
                values[name].append(loss(ids))
                bar.add(tokens)
    differ = neutral(decoder, off, pieces[0])
    return {
        "model": options.model or str(USUAL_MODEL.relative_to(ROOT)),
        "ckpt": None if options.ckpt is None else str(options.ckpt),
        "books": [book.name for book in options.books],
        "pieces": len(pieces),
        "tokens": tokens,
        "memory": memory,
        "start": options.start,
        "seed": options.seed,
        "law_5": {"logits_differ": differ, "allowed": NEUTRAL, "met": differ <= NEUTRAL},
        "models": [summary(name, own, values["plain"]) for name, own in values.items()],
    }


def summary(name, losses, plain):
    """Mean loss and paired difference to plain with standard errors over pieces; nats a token."""
    differences = [a - b for a, b in zip(losses, plain, strict=True)]
    result = {"name": name, "perplexity": math.exp(statistics.fmean(losses))}
    for key, values in (("loss", losses), ("difference", differences)):
        result[key] = statistics.fmean(values)
        result[f"{key}_error"] = statistics.stdev(values) / math.sqrt(len(values))
    return {**result, "losses": list(losses)}


def section(result):
    rows = []
    for row in result["models"]:
        loss, difference = (
            f"{row[key]:{sign}.4f} +/- {row[f'{key}_error']:.4f}"
            for key, sign in (("loss", ""), ("difference", "+"))
        )
        rows.append((row["name"], f"{row['perplexity']:.3f}", loss, difference))
    heads = (f"{result['pieces']} pieces of {result['tokens']} tokens", "perplexity")
    yield from report.table((*heads, "loss, nats a token", "minus plain"), rows)
    law = result["law_5"]
    allowed = f"allowed {law['allowed']:.0e} ({report.met(law)})"
    differ = f"logits differ from plain by {law['logits_differ']:.1e} of the largest"
    yield f"memories off: {differ}, {allowed}."


@torch.inference_mode()
def main(argv):
    options = parse(argv)
    report.publish(options, ["perplexity"], benchmark(options), section)


if __name__ == "__main__":
    run_cli(main)
