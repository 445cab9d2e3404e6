"""From a forward pass's outputs to loss and logits; those of a whole long text never exist at once.

Legend: B rows, N columns, d width, V vocabulary rows, k outputs.
"""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from comet_pl.model.configuration_comet import wide
from comet_pl.model.forward_plan import ForwardPlan
from comet_pl.model.observer import Observer
from comet_pl.model.transfer import to_device

BLOCK = 1024  # labelled positions whose logits exist at the same time
CPU_BLOCK = 128  # without a graph on a CPU: larger logits cost the system's calls for their pages
Head = Callable[[Tensor], Tensor]
"""(k, d) -> (k, V)"""


@dataclass
class Teacher:
    """What another decoder with the same head makes of the same texts.

    The loss of a position is (1 - weight) * cross-entropy + weight * KL(teacher || model), over the
    text's vocabulary.

    hidden: (B, N, d) its normed outputs. kl: () grows by the divergence of each labelled position
    that is learnt from, nats.
    """

    hidden: Tensor
    weight: float
    kl: Tensor

    def losses(self, head: Head, first_new_id: int, h: Tensor, t: Tensor, taught: Tensor) -> Tensor:
        """(2,) the summed loss of (k, d) outputs and, without a graph, their summed divergence.

        Args:
            t: (k,) ids. taught: (k, d) the teacher's outputs there.
        """
        logits = head(h)
        logits = logits.to(wide(logits.dtype))
        with torch.no_grad():
            expected = head(taught)[..., :first_new_id].to(logits.dtype).log_softmax(-1)
        found = logits.log_softmax(-1)
        entropy = F.nll_loss(found, t, reduction="sum")
        kl = F.kl_div(found[..., :first_new_id], expected, reduction="sum", log_target=True)
        return torch.stack([torch.lerp(entropy, kl, self.weight), kl.detach()])


def loss_and_logits(
    plan: ForwardPlan,
    outputs: Sequence[tuple[Tensor, np.ndarray]],
    norm: nn.Module,
    head: nn.Module,
    num_items: int | Tensor | None,
    observer: Observer | None,
    parameters: Iterable[nn.Parameter],
    teacher: Teacher | None = None,
) -> tuple[Tensor | None, Tensor | None]:
    """The loss (None without labels) and the logits (B, n, V) of the kept columns (or None).

    Args:
        outputs: (k, d) of the last layer with their flat places (k,) in (B, N), of each chunk.
        num_items: divides the summed loss; None: the targets of this call.
        parameters: those in the graph of the loss of a call without targets.
    """
    rows, columns = plan.wanted.shape
    weight = head.weight
    if outputs:
        hidden = torch.cat([hidden for hidden, _ in outputs])
        places = np.concatenate([places for _, places in outputs])
    else:
        hidden = weight.new_zeros(0, plan.config.backbone_config.hidden_size)
        places = np.zeros(0, dtype=np.int64)
    hidden = norm(hidden)
    loss = logits = None
    logits_of: Head = head
    if plan.config.layout == "trailing":
        head = getattr(head, "base_layer", head)  # peft's is for rows that are no text
        logits_of = partial(text_logits, head, plan.config.first_new_id)
    if plan.labels is not None:
        targets = plan.labels.targets.flatten()[places]
        labelled = np.flatnonzero(targets != -100)
        count = plan.labels.count if num_items is None else num_items
        loss = torch.zeros((), dtype=torch.float32, device=hidden.device)
        found = pick(hidden, labelled), sent(targets[labelled], hidden)
        if observer is not None and observer.losses is not None and not torch.is_grad_enabled():
            losses = cross_entropies(*found, logits_of)
            observer.losses(torch.from_numpy(places[labelled]), losses)
            loss = losses.sum() / count if plan.labels.count else loss
        elif plan.labels.count and teacher is not None:
            taught = teacher.hidden.flatten(0, 1)[sent(places[labelled], hidden)]
            of = partial(teacher.losses, logits_of, plan.config.first_new_id)
            total, kl = sums(head)(of, *found, taught)
            teacher.kl += kl.detach()
            loss = total / count
        elif plan.labels.count:
            loss = sums(head)(partial(cross_entropy, logits_of, "sum"), *found) / count
        elif torch.is_grad_enabled():
            trained = [parameter for parameter in parameters if parameter.requires_grad]
            loss = Idle.apply(loss, *trained) if trained else loss
    if plan.keep is not None:
        first = columns - plan.keep
        kept = np.flatnonzero(places % columns >= first)
        place = places[kept] // columns * plan.keep + places[kept] % columns - first
        dense = pick(hidden, kept)
        if len(place) != rows * plan.keep or (place[1:] <= place[:-1]).any():
            room = hidden.new_zeros(rows * plan.keep, hidden.shape[1])
            dense = room.index_copy(0, sent(place, hidden), dense)
        logits = logits_of(dense.unflatten(0, (rows, plan.keep)))
    return loss, logits


def text_logits(head: Head, first_new_id: int, hidden: Tensor) -> Tensor:
    """(k, V), -inf for what is no text: a plain decoder has no such rows."""
    logits = head(hidden)
    logits[..., first_new_id:] = -torch.inf
    return logits


class Idle(torch.autograd.Function):
    """A constant loss with a graph: its backward reaches every parameter and changes no gradient.

    All of them, because data parallelism waits for each. The first gets a gradient of zero, because
    a loss scale wants to see one.
    """

    @staticmethod
    def forward(ctx: Any, loss: Tensor, *parameters: nn.Parameter) -> Tensor:
        ctx.parameters = parameters
        return loss.clone()

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        first, *others = ctx.parameters
        return None, torch.zeros_like(first), *(None for _ in others)


def pick(hidden: Tensor, places: np.ndarray) -> Tensor:
    """Rows (k, d) of (n, d) at these places, each at most once and in order."""
    return hidden if len(places) == len(hidden) else hidden[sent(places, hidden)]


def sent(numbers: np.ndarray, like: Tensor) -> Tensor:
    """Numbers on the device of a tensor."""
    (tensor,) = to_device(like.device, numbers)
    assert tensor is not None
    return tensor


def sums(head: nn.Module) -> Callable[..., Tensor]:
    """How a sum over positions is made: with its gradient, where that is the outputs' alone."""
    learns = hasattr(head, "base_layer") or any(p.requires_grad for p in head.parameters())
    return summed if learns or not torch.is_grad_enabled() else SummedWithGradient.apply


def at_once(hidden: Tensor) -> int:
    """Positions whose logits are made together on the device of these outputs."""
    return BLOCK if hidden.is_cuda else CPU_BLOCK


class SummedWithGradient(torch.autograd.Function):
    """`summed` of a frozen head: a block's gradient is made with it, so that its logits are made
    once. Of several results the first alone has a graph."""

    @staticmethod
    def forward(ctx: Any, of: Callable[..., Tensor], hidden: Tensor, *others: Tensor) -> Tensor:
        total, gradients = [], []
        block = at_once(hidden)
        for h, *rest in zip(*(t.split(block) for t in (hidden, *others)), strict=True):
            with torch.enable_grad():
                h = h.detach().requires_grad_()
                found = of(h, *rest)
                gradients += torch.autograd.grad(found.flatten()[0], h)
            total.append(found.detach())
        ctx.save_for_backward(torch.cat(gradients))
        ctx.others = len(others)
        return torch.stack(total).sum(0)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        (of_hidden,) = ctx.saved_tensors
        return None, of_hidden * gradient.flatten()[0], *[None] * ctx.others


def summed(of: Callable[..., Tensor], *tensors: Tensor, block: int = BLOCK) -> Tensor:
    """of(*tensors) where it is a sum over their n positions: block by block, each made again in
    the backward pass."""
    if len(tensors[0]) <= block:
        return of(*tensors)
    blocks = zip(*(tensor.split(block) for tensor in tensors), strict=True)
    again = partial(checkpoint, of, use_reentrant=False, preserve_rng_state=False)
    return torch.stack([again(*parts) for parts in blocks]).sum(0)


@torch.no_grad()
def cross_entropies(
    hidden: Tensor, targets: Tensor, head: Head, block: int | None = None
) -> Tensor:
    """(n,) each position's cross-entropy, without gradients.

    Args:
        hidden: (n, d) outputs at labelled positions. targets: (n,) ids.
        block: positions at once; None: as many as the device likes.
    """
    block = block or at_once(hidden)
    blocks = zip(hidden.split(block), targets.split(block), strict=True)
    return torch.cat([cross_entropy(head, "none", h, t) for h, t in blocks])


def cross_entropy(head: Head, reduction: str, hidden: Tensor, targets: Tensor) -> Tensor:
    """In float32 or wider."""
    logits = head(hidden)
    return F.cross_entropy(logits.to(wide(logits.dtype)), targets, reduction=reduction)
