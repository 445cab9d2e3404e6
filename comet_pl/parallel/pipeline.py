"""A batch read by several ranks: its chunks cut into runs, the runs dealt to the ranks in turn, a layer's memory handed on as soon as it
is there.

Every rank has the whole batch and reads only its own runs of it. Run k of a text is on rank k mod P, counted through all windows, so that
memory only ever goes to the next rank of a ring.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from comet_pl.model.cache import CometCache, LayerMemory
from comet_pl.model.chunking import NO_STRIDE, RowClock, plan_row
from comet_pl.model.comet import CometForCausalLM
from comet_pl.model.config import CometConfig
from comet_pl.parallel import p2p
from comet_pl.parallel.schedule import runs
from comet_pl.parallel.sharding import Shards
from comet_pl.windows import Window

WALK = {"layer_level": "layer_major", "interleaved": "layer_major", "chunk_level": "chunk_major"}


@dataclass(frozen=True)
class Run:
    """Consecutive chunks of a window, and where their memory comes from and goes to."""

    number: int  # counted through the windows
    window: int
    part: Window | None  # None: a relay, which hands the memory on as it came
    before: list[RowClock]  # each row's clock as the run starts
    after: list[RowClock]
    last: bool = False  # of the whole text: its memory is needed by nobody

    @property
    def labelled(self) -> bool:
        return self.part is not None and self.part.targets > 0

    def slots(self, config: CometConfig, after: bool) -> tuple[int, int]:
        """Global and temporary slots of a row in the memory before, or after, the run."""
        clocks = self.after if after else self.before
        return max(c.global_slots for c in clocks), max(c.temporary_slots for c in clocks)


def plan(config: CometConfig, windows: Sequence[Window], schedule: str, ranks: int, aligned: bool = False) -> list[Run]:
    """All runs of a text. Pure: every rank makes the same plan.

    Args:
        aligned: each window begins on the first rank, with relays from where the one before ended.
    """
    rows = len(windows[0].chunk_sizes) if windows else 0
    clocks = [RowClock(stride=config.compression_stride or NO_STRIDE)] * rows
    found: list[Run] = []
    for number, window in enumerate(windows):
        for start, end in runs(schedule, chunk_costs(config, window), ranks):
            part = window.part(start, end)
            after = [_after(config, clock, sizes) for clock, sizes in zip(clocks, part.chunk_sizes, strict=True)]
            found.append(Run(len(found), number, part, clocks, after))
            clocks = after
        while aligned and number < len(windows) - 1 and len(found) % ranks:
            found.append(Run(len(found), number, None, clocks, clocks))
    return [*found[:-1], replace(found[-1], last=True)] if found else []


def chunk_costs(config: CometConfig, window: Window) -> list[int]:
    """Own tokens of each chunk of a window: of its longest row, since the others are padded to it."""
    stride = config.compression_stride or NO_STRIDE
    longest = [max(sizes) for sizes in zip(*_padded(window.chunk_sizes), strict=True)]
    return [n + -(-n // stride) + config.global_size for n in longest]


def _padded(rows: list[list[int]]) -> list[list[int]]:
    width = max(map(len, rows))
    return [row + [0] * (width - len(row)) for row in rows]


def _after(config: CometConfig, clock: RowClock, sizes: list[int]) -> RowClock:
    capacity, m = config.temporary_capacity, config.global_size
    return plan_row(clock, sum(sizes), chunk_size=config.chunk_size, global_size=m, capacity=capacity, chunk_sizes=sizes)[1]


class Pipeline:
    """This rank's place in a pipeline.

    Args:
        ring: to the neighbours; None: a pipeline of one. index: of this rank in it. schedule: one of
            comet_pl.parallel.schedule.SCHEDULES.
    """

    def __init__(self, ring: p2p.Ring | None, index: int, ranks: int, schedule: str = "layer_level"):
        self.ring, self.index, self.ranks = ring, index, ranks
        self.schedule = schedule if ranks > 1 else "layer_level"
        self.shards: Shards | None = None
        self.cache: CometCache | None = None  # what the last run that this rank has read left behind
        self.holds_last = False  # whether that was the text's last run

    def read(self, model: CometForCausalLM, windows: Sequence[Window], num_items: int, keep_cache: bool = False) -> Iterator[Tensor | None]:
        """Reads its runs window by window; yields for each window this rank's part of the loss, or None if it has nothing to backpropagate.

        The caller runs the loss's backward pass before it asks for the next window: gradients of the memory travel in it.

        Args:
            num_items: divides the summed loss. keep_cache: the memory after the text is wanted too (in `cache`, on the last run's rank).
        """
        self.cache, self.holds_last = None, False
        layerwise = self.shards is not None and self.shards.layerwise
        all_runs = plan(model.config, windows, self.schedule, self.ranks, aligned=layerwise)
        mine = [[run for run in all_runs if run.window == w and run.number % self.ranks == self.index] for w in range(len(windows))]
        live = [[run for run in own if self._goes_on(model, run, all_runs, windows)] for own in mine]
        # zero3: data-parallel ranks gather each layer together, also those that have less to read. They stand at the same place of their
        # pipelines and windows, and a shorter text lacks the last runs of a window, the first to be gone back through: so none waits for ever.
        ahead = [sum(run.part is not None for run in own) for own in mine]
        back = [sum(run in out or run.labelled for run in own) for own, out in zip(mine, live, strict=True)]
        numbers = [number for pair in zip(ahead, back, strict=True) for number in pair]
        most = self.shards.most(numbers) if self.shards is not None and layerwise else numbers
        for w in range(len(most) // 2):
            own, out = (mine[w], live[w]) if w < len(windows) else ([], [])
            loss = self._window(model, own, out, all_runs, windows[w].targets > 0, num_items, keep_cache) if own else None
            if w < len(windows):
                most[2 * w] -= ahead[w]
                most[2 * w + 1] -= back[w]
            self._visit(most[2 * w], backward=False)
            self._visit(most[2 * w + 1], backward=True)
            yield loss
        if self.ring is not None:
            self.ring.flush()

    def _goes_on(self, model: CometForCausalLM, run: Run, all_runs: list[Run], windows: Sequence[Window]) -> bool:
        """Whether gradients come back for the memory that a run leaves behind."""
        if run.last or run.part is None:
            return False
        after = all_runs[run.number + 1]
        goes_on = after.window == run.window and after.part is not None
        return goes_on and windows[run.window].targets > 0 and sum(run.slots(model.config, after=True)) > 0

    def _visit(self, times: int, backward: bool) -> None:
        for _ in range(times):
            assert self.shards is not None
            self.shards.visit(backward)

    def _window(
        self,
        model: CometForCausalLM,
        mine: list[Run],
        live: list[Run],
        all_runs: list[Run],
        learns: bool,
        num_items: int,
        keep_cache: bool,
    ) -> Tensor | None:
        """Reads this rank's runs of a window. live: those for whose memory gradients come back."""
        layers, like = len(model.model.layers), model.model.embed_tokens.weight
        together = layers if self.schedule == "chunk_level" else 1

        def messages(wanted: list[Run], after: bool) -> list[tuple[int, int, int]]:
            """Shapes, a layer's after the other."""
            slots = [sum(run.slots(model.config, after)) for run in wanted]
            return [(len(wanted[0].before), n, model.config.backbone_config.hidden_size) for n in slots if n for _ in range(layers)]

        inbox = gradients = None
        if self.ring is not None:
            inbox = p2p.Inbox(self.ring.from_previous, like, messages([run for run in mine if run.number], after=False), together)
            gradients = p2p.Inbox(self.ring.gradient_from_next, like, messages(live[::-1], after=True), together)
            inbox.open()
        losses, ties = [], list[Tensor]()
        kept, walk = model.seam, model.walk
        try:
            model.walk = WALK[self.schedule]
            for run in mine:
                if run.part is None:
                    assert inbox is not None and self.ring is not None
                    for _ in range(layers if sum(run.slots(model.config, after=True)) else 0):
                        self.ring.to_next.send(inbox.take())
                    continue
                past = CometCache.at(run.before, layers, model.fingerprint)
                if self.ring is None or inbox is None:  # a pipeline of one: what comes in is what it left behind itself
                    past = self.cache.detach() if self.cache is not None else past
                else:
                    live_in = learns and run.number > 0 and all_runs[run.number - 1].window == run.window
                    seam = RunSeam(self.ring, run, model.config, inbox, gradients if run in live else None, live_in, ties)
                    model.seam = seam.over  # type: ignore[assignment]
                with torch.set_grad_enabled(learns):
                    output = model(
                        **run.part.inputs(), past_key_values=past, use_cache=keep_cache or not run.last, num_items_in_batch=num_items
                    )
                self.cache, self.holds_last = output.past_key_values, run.last
                losses.append(output.loss)
        finally:
            model.seam, model.walk = kept, walk
        if not losses:
            return None
        loss = torch.stack(losses).sum()
        if ties:
            return p2p.tie(loss, ties, gradients if live else None)
        return loss if loss.requires_grad else None


class RunSeam:
    """Where a run's memory enters and leaves (see comet_pl.model.walk.Seam).

    Args:
        gradients: where those of what is sent come from; None: what is sent is detached. live_in: gradients of what is received go back.
        ties: takes what the loss has to be tied to.
    """

    def __init__(
        self,
        ring: p2p.Ring,
        run: Run,
        config: CometConfig,
        inbox: p2p.Inbox,
        gradients: p2p.Inbox | None,
        live_in: bool,
        ties: list[Tensor],
    ):
        self.ring, self.run, self.config, self.inbox = ring, run, config, inbox
        self.gradients, self.live_in, self.ties = gradients, live_in, ties
        self.memories: list[LayerMemory] = []

    def over(self, memories: list[LayerMemory]) -> RunSeam:
        """The seam over a call's cache."""
        self.memories = memories
        return self

    def receive(self, layer: int) -> LayerMemory:
        held = self.memories[layer]
        m, t = self.run.slots(self.config, after=False)
        if not self.run.number or not m + t:
            return held
        if self.live_in:
            message = p2p.receive(self.inbox, self.ring.gradient_to_previous)
            self.ties.append(message)
        else:
            message = self.inbox.take()
        state, temporary = message[:, :m] if m else None, message[:, m:] if t else None
        if held.state is None and held.temporary is None:
            return LayerMemory(state, temporary)
        for buffer, new in ((held.state, state), (held.temporary, temporary)):  # a call without gradients writes to its buffers
            if buffer is not None and new is not None:
                buffer[:, : new.shape[1]] = new
        return held

    def send(self, layer: int, memory: LayerMemory) -> None:
        self.memories[layer] = memory
        m, t = self.run.slots(self.config, after=True)
        if self.run.last or not m + t:
            return
        parts = [part[:, :n] for part, n in ((memory.state, m), (memory.temporary, t)) if n and part is not None]
        message = torch.cat(parts, 1).to(self.inbox.like.dtype)  # a copy: what is under way must not change
        if self.gradients is None:
            self.ring.to_next.send(message.detach())
        else:
            self.ties.append(p2p.send(message, self.ring.to_next, self.gradients))
