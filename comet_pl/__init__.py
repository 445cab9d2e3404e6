"""comet-pl: Collaborative Memory Transformer. Importing it also teaches Hugging Face's Auto classes to load CoMeT folders."""

from comet_pl.model.cache import CometCache
from comet_pl.model.comet import CometForCausalLM
from comet_pl.model.config import CometConfig

__all__ = ["CometCache", "CometConfig", "CometForCausalLM"]
