"""Models and tokenizers from folders and the hub. Whatever is wrong with them is told in one line,
and no code of theirs runs."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from comet_pl.errors import UserError, first_line
from comet_pl.files import check_built

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from comet_pl import CometForCausalLM

LONGEST = 200  # characters of a library's reason


@contextmanager
def loading(what: str, reason: bool = True) -> Iterator[None]:
    """Turns whatever a damaged or foreign file makes libraries raise into the UserError `what`:
    its reason, if that is of use. Memory that does not suffice stays what it is."""
    try:
        yield
    except (UserError, MemoryError):
        raise
    except BaseException as error:
        # Rust's panics, of tokenizers and safetensors, are no Exceptions.
        if not isinstance(error, Exception) and type(error).__name__ != "PanicException":
            raise
        why = f": {first_line(error)[:LONGEST]}" if reason else ""
        raise UserError(what + why) from None


def load_tokenizer(path: str | Path, what: str) -> PreTrainedTokenizerBase:
    """A tokenizer of a folder or of the hub.

    Args:
        what: begins the message of a UserError.

    Raises:
        UserError: it cannot be loaded, or wants code of its own.
    """
    from transformers import AutoTokenizer

    from comet_pl.model.digests import check_digests

    with loading(what):
        check_digests(path, weights=False)
        return AutoTokenizer.from_pretrained(path, trust_remote_code=False)


def load_model(path: str | Path, what: str, **options: Any) -> CometForCausalLM:
    """CometForCausalLM.from_pretrained(path, **options).

    Args:
        what: begins the message of a UserError.

    Raises:
        UserError: it cannot be loaded, has not all weights, or wants code of its own.
    """
    from comet_pl import CometForCausalLM

    with loading(what):
        return CometForCausalLM.from_pretrained(path, trust_remote_code=False, **options)


def with_decoder(
    path: str | Path, what: str, given: str | None = None
) -> tuple[str, dict[str, Any]]:
    """(path, {}), or of a folder of `comet_pl.export --memory-only` its decoder and {memory: path}.

    Args:
        given: the decoder; None: the one that the folder names.

    Raises:
        UserError: the folder is damaged, or names none.
    """
    from comet_pl.model.memory_weights import FACTS, MemoryWeights

    if not Path(path, FACTS).is_file():
        return str(path), {}
    with loading(what):
        decoder = given or MemoryWeights.from_pretrained(path).facts["decoder"]
    if decoder is None:
        raise UserError(f"{what}: a memory alone that does not say where its decoder is")
    check_built(decoder, f"{what}: its decoder")
    return decoder, {"memory": str(path)}


class Digests:
    """The part of a new folder that tells later whether the others are still what was written."""

    def save_pretrained(self, folder: Path) -> None:
        from comet_pl.model.digests import write_digests

        write_digests(folder)
