"""What tells whether a cache and a model belong together."""

import hashlib
import json
from collections.abc import Iterable
from operator import attrgetter

import torch
from torch import Tensor

from comet_pl.model.configuration_comet import CometConfig

SETTINGS = attrgetter(
    "global_size",
    "compression_stride",
    "temporary_capacity",
    "chunk_size",
    "adapter_rank",
    "shared_adapter",
    "gate",
)
LATER = {"layout": "interleaved", "sink": "none", "slot_scale": None}
"""Settings that came later, and their values before: a memory of then is still known."""
LATER_SETTINGS = attrgetter(*LATER)
RUNTIME = ("_", "transformers", "dtype", "torch", "use_cache", "output_", "return_dict")


class Fingerprint:
    """Of a configuration. It is kept while the configuration stays the same, because to_dict's deep
    copy takes longer than a small layer on one token."""

    def __init__(self) -> None:
        self.words = self.value = ""

    def of(self, config: CometConfig) -> str:
        settings, now = SETTINGS(config), LATER_SETTINGS(config)
        words = repr((vars(config.backbone_config), settings, now))
        if self.words != words:
            pairs = zip(LATER.items(), now, strict=True)
            later = {key: value for (key, before), value in pairs if value != before}
            settings += (later,) if later else ()
            facts = config.backbone_config.to_dict().items()
            backbone = {key: value for key, value in facts if not key.startswith(RUNTIME)}
            content = json.dumps([backbone, settings], sort_keys=True, default=str)
            self.words, self.value = words, hashlib.sha256(content.encode()).hexdigest()[:16]
        return self.value


@torch.no_grad()
def digest(parameters: Iterable[tuple[str, Tensor]]) -> str:
    """Of weights: of their names and a few values of each."""
    content = hashlib.sha256()
    for name, parameter in parameters:
        content.update(name.encode())
        values = parameter.detach().flatten()[:: max(1, parameter.numel() // 16)]
        content.update(values.float().cpu().numpy().tobytes())
    return content.hexdigest()[:16]
