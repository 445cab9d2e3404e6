"""Which rank reads which chunks of a batch, and what goes from rank to rank: known to all of them beforehand.

Run k of a text is on rank k mod P, counted through all windows, so that memory only ever goes to the next rank of a ring.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from comet_pl.model.chunk_layout import NO_STRIDE, RowClock, compression_tokens, plan_row
from comet_pl.model.configuration_comet import CometConfig
from comet_pl.parallel.schedule import runs
from comet_pl.training.windows import Window

Slots = tuple[int, int]
"""Global and temporary slots of a memory; rows that have fewer leave the rest unused."""


@dataclass(frozen=True)
class Run:
    """Consecutive chunks of a window, for one rank to read."""

    number: int  # counted through the windows
    window: int
    part: Window | None  # None: a relay, which hands on the memory as it came
    clocks: list[RowClock]  # the rows' as the run starts
    receives: Slots  # from the run before
    sends: Slots  # to the run after; none after the last run
    live_in: bool = False  # a gradient of what it receives goes back: it or a later run of its window has targets
    live_out: bool = False  # a gradient of what it sends comes back
    last: bool = False  # of the text

    @property
    def learns(self) -> bool:
        """Whether the backward pass comes through its layers."""
        return self.live_out or (self.part is not None and self.part.targets > 0)


def plan_text(
    config: CometConfig, windows: Sequence[Window], schedule: str, ranks: int, aligned: bool = False
) -> list[Run]:
    """All runs of a text, in order.

    Args:
        aligned: each window begins on the first rank, with relays from where the one before ended.
    """
    rows, stride = (
        len(windows[0].chunk_sizes) if windows else 0,
        config.compression_stride or NO_STRIDE,
    )
    strides = (windows[0].strides if windows else None) or [stride] * rows
    clocks = [RowClock(stride=stride) for stride in strides]
    plan: list[Run] = []

    def add(window: int, part: Window | None) -> None:
        nonlocal clocks
        after = clocks
        if part is not None:
            flags: Sequence[list[bool] | None] = part.resets or [None] * rows
            after = [
                _after(config, *row) for row in zip(clocks, part.chunk_sizes, flags, strict=True)
            ]
        plan.append(Run(len(plan), window, part, clocks, _slots(clocks), _slots(after)))
        clocks = after

    for number, window in enumerate(windows):
        for start, end in runs(schedule, chunk_costs(config, window), ranks):
            add(number, window.part(start, end))
        while aligned and number < len(windows) - 1 and len(plan) % ranks:
            add(number, None)
    for after in range(len(plan) - 1, 0, -1):
        one, other = plan[after - 1], plan[after]
        live = one.window == other.window and other.learns and any(one.sends)
        plan[after - 1], plan[after] = replace(one, live_out=live), replace(other, live_in=live)
    if plan:
        plan[-1] = replace(plan[-1], sends=(0, 0), last=True)
    return plan


def chunk_costs(config: CometConfig, window: Window) -> list[int]:
    """Own tokens of each chunk of a window: of its longest row, because the others are padded to it."""
    count = max(map(len, window.chunk_sizes))
    longest = [
        max(sizes[t] for sizes in window.chunk_sizes if t < len(sizes)) for t in range(count)
    ]
    return [
        n + compression_tokens(n, config.compression_stride or NO_STRIDE) + config.global_size
        for n in longest
    ]


def _slots(clocks: list[RowClock]) -> Slots:
    return max(clock.global_slots for clock in clocks), max(
        clock.temporary_slots for clock in clocks
    )


def _after(
    config: CometConfig, clock: RowClock, sizes: list[int], resets: list[bool] | None
) -> RowClock:
    """A row's clock after chunks of these sizes."""
    capacity, m = config.temporary_capacity, config.global_size
    return plan_row(
        clock,
        sum(sizes),
        chunk_size=config.chunk_size,
        global_size=m,
        capacity=capacity,
        chunk_sizes=sizes,
        resets=resets,
    )[1]
