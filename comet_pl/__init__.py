"""CoMeT, the Collaborative Memory Transformer.

Importing it registers CoMeT with Hugging Face's Auto classes.
"""

from typing import TYPE_CHECKING, Any

from comet_pl.errors import importing

with importing():
    from comet_pl.model.cache import CometCache
    from comet_pl.model.configuration_comet import CometConfig, on_first_use

if TYPE_CHECKING:
    from comet_pl.model.modeling_comet import CometForCausalLM

__all__ = ["CometCache", "CometConfig", "CometForCausalLM"]


def __getattr__(name: str) -> Any:
    # Its base class takes as long to import as torch; help and messages about typos need neither.
    if name == "CometForCausalLM":
        from comet_pl.model.modeling_comet import CometForCausalLM

        return CometForCausalLM
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


on_first_use(lambda: __getattr__("CometForCausalLM"))
