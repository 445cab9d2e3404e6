"""Writes a trained model as a Hugging Face folder: python -m comet_pl.export CKPT FOLDER.

--memory-only writes what the decoder lacks, a few MB: the memory modules, the rows of new tokens
and LoRA. CometForCausalLM.from_pretrained(DECODER, memory=FOLDER) puts it on any copy of it.

CKPT is a run's folder (its last.ckpt, else its best.ckpt), a .ckpt file, or a model folder. LoRA
and separately trained rows are merged into plain weights. CometForCausalLM.from_pretrained(FOLDER)
loads the result; after `import comet_pl`, so does AutoModelForCausalLM.
"""

from pathlib import Path

from comet_pl.errors import Parser, UserError, importing, run_cli
from comet_pl.files import check_new, save_folder

DTYPES = ("float32", "bfloat16", "float16")


def export(
    checkpoint: Path, folder: Path, dtype: str | None = None, memory_only: bool = False
) -> None:
    """Writes `folder` (weights, configuration, tokenizer), whole or not at all.

    Args:
        dtype: of the weights, one of DTYPES; None: as the checkpoint's.
        memory_only: what the decoder lacks, and nothing else; dtype is that of the training.

    Raises:
        UserError: the checkpoint is missing or damaged; the folder exists or cannot be written;
            memory_only, but the training changed the decoder itself.
    """
    check_new(folder)
    with importing():
        import torch
        import transformers

        from comet_pl.experiment.checkpoint import find_checkpoint, load_trained
        from comet_pl.experiment.loading import Digests
        from comet_pl.experiment.memory_only import memory_of

    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()

    model, tokenizer, config = load_trained(checkpoint, [], merge=not memory_only)
    if not memory_only:
        if dtype is not None:
            model = model.to(getattr(torch, dtype))
        save_folder(folder, model, tokenizer, Digests())
        return
    run = find_checkpoint(checkpoint)[0].is_file()
    if run and config.train.parameters == "all":
        raise UserError(
            f"--memory-only: {checkpoint} was trained with train.parameters=all, which changed the "
            "decoder too; leave it out"
        )
    try:
        weights = memory_of(model, config.backbone.path if run else None)
    except ValueError as error:
        raise UserError(f"--memory-only: {checkpoint}: {error}; leave it out") from None
    save_folder(folder, weights)


def main(argv: list[str]) -> None:
    parser = Parser(prog="python -m comet_pl.export", description=__doc__)
    checkpoint = "run folder, .ckpt file or model folder"
    parser.add_argument("checkpoint", metavar="CKPT", type=Path, help=checkpoint)
    parser.add_argument(
        "folder", metavar="FOLDER", type=Path, help="folder to write; must not exist"
    )
    dtype = "of the weights (default: as the checkpoint's)"
    parser.add_argument("--dtype", choices=DTYPES, help=dtype)
    only = "what the decoder lacks, for from_pretrained(DECODER, memory=FOLDER)"
    parser.add_argument("--memory-only", action="store_true", help=only)
    options = parser.parse_args(argv)
    checkpoint, folder = options.checkpoint.expanduser(), options.folder.expanduser()
    if options.memory_only and options.dtype is not None:
        raise UserError("--dtype: given with --memory-only, which keeps that of the training")
    export(checkpoint, folder, options.dtype, options.memory_only)
    print(f"wrote {folder}", flush=True)


if __name__ == "__main__":
    run_cli(main)
