"""Which rank reads which chunks of a batch, and what it receives and sends; all ranks know it.

A span is consecutive chunks of a window. Span k of a text is on rank k mod P, counted through all
windows, so that memory only ever goes to the next rank of a ring.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

from comet_pl.model.chunk_layout import NO_STRIDE, RowClock, compression_tokens, plan_row
from comet_pl.model.configuration_comet import CometConfig
from comet_pl.parallel.schedule import spans
from comet_pl.training.windows import Window

Slots = tuple[int, int]
"""Global and temporary slots of a memory; rows that have fewer leave the rest unused."""


@dataclass
class Span:
    """Consecutive chunks of a window, for one rank to read."""

    window: int  # its number
    part: Window | None  # None: a relay, which sends the memory as it was received
    clocks: list[RowClock]  # of each row at its start
    receives: Slots  # from the span before
    sends: Slots  # to the span after; none after the last span
    # It sends back a gradient of what it receives: it or a later span of its window has targets.
    live_in: bool = False
    live_out: bool = False  # it gets a gradient of what it sends
    last: bool = False  # of the text

    @property
    def learns(self) -> bool:
        """Whether the backward pass comes through its layers."""
        return self.live_out or (self.part is not None and self.part.targets > 0)


def plan_text(
    config: CometConfig, windows: Sequence[Window], schedule: str, ranks: int, aligned: bool = False
) -> list[Span]:
    """All spans of a text, in order.

    Args:
        aligned: each window begins on the first rank; relays fill the ranks in between.
    """
    rows = windows[0].plans if windows else []
    clocks = [config.clock(row.stride) for row in rows]
    plan: list[Span] = []
    for number, window in enumerate(windows):
        ends = spans(schedule, chunk_costs(config, window), ranks)
        parts: list[Window | None] = [window.part(*pair) for pair in ends]
        if aligned and number < len(windows) - 1:
            parts += [None] * (-(len(plan) + len(parts)) % ranks)
        for part in parts:
            after = clocks if part is None else _after(config, clocks, part)
            plan.append(Span(number, part, clocks, _slots(clocks), _slots(after)))
            clocks = after
    for later, span in pairwise(reversed(plan)):
        live = span.window == later.window and later.learns and any(span.sends)
        span.live_out = later.live_in = live
    if plan:
        plan[-1].sends, plan[-1].last = (0, 0), True
    return plan


def chunk_costs(config: CometConfig, window: Window) -> list[int]:
    """Own tokens of each chunk of a window in its longest row, to which the others are padded."""
    stride, costs = config.compression_stride or NO_STRIDE, []
    for t in range(window.chunks):
        n = max(plan.sizes[t] for plan in window.plans if t < len(plan.sizes))
        costs.append(n + compression_tokens(n, stride) + config.global_size)
    return costs


def _slots(clocks: list[RowClock]) -> Slots:
    temporary = max(clock.temporary_slots for clock in clocks)
    return max(clock.global_slots for clock in clocks), temporary


def _after(config: CometConfig, clocks: list[RowClock], part: Window) -> list[RowClock]:
    """The rows' clocks after the chunks of a part."""
    return [
        plan_row(
            clock,
            plan.tokens,
            chunk_size=config.chunk_size,
            global_size=config.global_size,
            capacity=config.temporary_capacity,
            chunk_sizes=plan.sizes,
            resets=plan.resets,
        )[1]
        for clock, plan in zip(clocks, part.plans, strict=True)
    ]
