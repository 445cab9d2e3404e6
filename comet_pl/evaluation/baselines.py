"""eval.baselines: the losses of the decoder without memory, on the rows that CoMeT reads.

The decoder is the model's own, with its weights as they are: LoRA is merged before an evaluation.

Legend: B rows, N columns, d width, C tokens a chunk, k targets.
"""

from collections.abc import Iterator
from functools import partial

import torch
from torch import Tensor

from comet_pl import CometForCausalLM
from comet_pl.errors import UserError
from comet_pl.model.loss import cross_entropies, text_logits
from comet_pl.model.plain_decoder import SINKS, plain_decoder, sink_cache
from data.batches import IGNORED


class Baselines:
    """Losses by name: full, blocks, window.

    `full` reads as many tokens as the decoder has positions. Of longer rows it has the first
    `fitting` chunks, a power of two of them, so that no bucket of LossByPosition has a part of its
    targets only.

    Raises:
        UserError: a chunk is longer than the decoder's positions.
    """

    def __init__(self, model: CometForCausalLM):
        config = model.config
        self.positions = config.backbone_config.max_position_embeddings
        self.size = config.chunk_size
        if self.size > self.positions:
            raise UserError(
                f"eval.baselines: given, but model.chunk_size is {self.size}; a decoder of "
                f"{self.positions} positions cannot read that"
            )
        self.fitting = 1 << (self.positions // self.size).bit_length() - 1
        self.plain = plain_decoder(model)
        self.head = partial(text_logits, model.lm_head, config.first_new_id)
        # As CoMeT's own from the second chunk on.
        self.slots = config.global_size + (config.sink != "none")
        self.slots += config.temporary_capacity if config.compression_stride else 0

    def losses(self, name: str, ids: Tensor, labels: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
        """(places, losses), each (k,), as an Observer gets them.

        Args:
            name: a baseline. ids, labels, mask: (B, N), padding on the right.
        """
        targets = torch.nn.functional.pad(labels[:, 1:], (0, 1), value=IGNORED)
        if name == "full":
            long = mask.sum(1) > self.positions
            targets[long, self.fitting * self.size :] = IGNORED
        places, losses, start = list[Tensor](), list[Tensor](), 0
        for hidden in getattr(self, f"_{name}")(ids):
            stop = start + hidden.shape[1]
            rows, columns = (targets[:, start:stop] != IGNORED).nonzero(as_tuple=True)
            places.append(rows * ids.shape[1] + start + columns)
            wanted = targets[rows, start + columns]
            losses.append(cross_entropies(hidden[rows, columns], wanted, self.head))
            start = stop
        return torch.cat(places), torch.cat(losses)

    # Each yields the normed outputs (B, n, d) of the next columns.

    def _full(self, ids: Tensor) -> Iterator[Tensor]:
        yield self.plain.model(ids[:, : self.positions], use_cache=False).last_hidden_state

    def _blocks(self, ids: Tensor) -> Iterator[Tensor]:
        for block in ids.split(self.size, 1):
            yield self.plain.model(block, use_cache=False).last_hidden_state

    def _window(self, ids: Tensor) -> Iterator[Tensor]:
        sinks = min(SINKS, self.slots)
        cache = sink_cache(self.plain, self.slots - sinks, sinks)
        for chunk in ids.split(self.size, 1):
            yield self.plain.model(chunk, past_key_values=cache).last_hidden_state
