"""comet-pl: Collaborative Memory Transformer. Importing it also teaches Hugging Face's Auto classes to load CoMeT folders."""

from typing import TYPE_CHECKING, Any

from comet_pl.model.cache import CometCache
from comet_pl.model.configuration_comet import CometConfig

if TYPE_CHECKING:
    from comet_pl.model.modeling_comet import CometForCausalLM

__all__ = ["CometCache", "CometConfig", "CometForCausalLM"]


def __getattr__(name: str) -> Any:
    # The class that it derives from takes as long to import as torch does; help and the message about a typo need none of it.
    if name == "CometForCausalLM":
        from comet_pl.model.modeling_comet import CometForCausalLM

        return CometForCausalLM
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
