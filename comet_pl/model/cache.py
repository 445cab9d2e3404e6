"""CometCache: everything that survives between calls.

Legend: B rows, m global slots, K temporary capacity, d width, H key/value heads, h head width,
P key columns, n pending outputs.

Bytes do not depend on how much was read: a call without gradients allocates every buffer at its
full size and writes in place. A call with gradients never writes in place; it returns a new cache
whose tensors are as long as needed.
"""

from __future__ import annotations

import copy
import os
from collections.abc import Callable, Iterable
from dataclasses import asdict
from typing import Any, NamedTuple

import torch
from torch import Tensor
from transformers import Cache

from comet_pl.model.cache_file import read_cache, write_cache
from comet_pl.model.chunk_layout import NO_STRIDE, RowClock
from comet_pl.model.configuration_comet import CometConfig, buffer_dtype
from comet_pl.model.room import check_room


class LayerMemory(NamedTuple):
    """One layer's share of the cache. The rows' clocks tell which entries are valid."""

    state: Tensor | None = None  # S (B, m, d)
    temporary: Tensor | None = None  # T (B, <= K, d), oldest first, from entry 0
    # Of the open chunk: [G | T | own tokens] (B, H, P, h), after RoPE, column = position.
    keys: Tensor | None = None
    values: Tensor | None = None
    pending: Tensor | None = None  # of the open chunk: outputs X at compression tokens (B, n, d)


LENGTH_AXIS = {"state": 1, "temporary": 1, "keys": 2, "values": 2, "pending": 1}


def wrong_rows(held: int, given: int) -> str:
    """The error message for a cache of another number of rows."""
    repeat = ""
    if held and given % held == 0:
        repeat = f"; CometCache.batch_repeat_interleave({given // held}) repeats each of them"
    return f"past_key_values: the cache holds {held} rows, input_ids has {given}{repeat}"


class CometCache(Cache):
    """The memory of a batch of texts; `CometCache()` is empty, and its first call fills it."""

    is_compileable = False

    def __init__(self) -> None:
        super().__init__(layers=[])
        self.memories: list[LayerMemory] = []
        self.rows: list[RowClock] = []
        self.columns = 0  # columns fed so far, padding included
        # Of them, what generate() does not count: its prompt and its mask are what follows.
        self.behind = 0
        self.preallocated = False
        self.fingerprint: str | None = None  # of the configuration it was made with
        # Digest of the weights it was made with; only on a loaded cache, checked at its first use.
        self.weights: str | None = None
        self.model: Any = None  # the model that filled it; knows the digest of its weights
        self.notes: dict[str, Any] = {}  # what `save` keeps beside the memory
        self.graphs: Any = None  # the CUDA graphs that write to its buffers

    @classmethod
    def at(cls, rows: list[RowClock], layers: int, fingerprint: str) -> CometCache:
        """A cache of texts read up to `rows`; their memory arrives by the model's transport."""
        cache = cls()
        cache.rows, cache.fingerprint = list(rows), fingerprint
        cache.memories = [LayerMemory() for _ in range(layers)]
        return cache

    # ---- what the model calls

    def for_call(
        self, model: Any, clocks: list[RowClock], in_place: bool, device: torch.device
    ) -> CometCache:
        """The cache that a call of the model fills: this one, or a copy if not in_place.

        Args:
            clocks: the rows' as the call starts.

        Raises:
            ValueError: the cache belongs to another model, batch, device or precision.
            TooLittleMemory: its buffers do not fit.
        """
        cache = self if in_place else self.functional_copy()
        cache.begin(model.config, len(clocks), model.fingerprint, model.lm_head.weight)
        made_with = cache.weights
        if cache.model is not None and cache.model is not model:
            made_with = cache.model.weight_digest()
        if made_with is not None and made_with != model.weight_digest():
            raise ValueError("past_key_values: this cache was made by a model with other weights")
        if in_place:
            cache.rows = clocks  # their strides decide the buffers' sizes
            cache.reserve(model.config, model.dtype, device, model.memory_dtype)
        cache.weights, cache.model = None, model
        return cache

    def begin(
        self, config: CometConfig, batch: int, fingerprint: str, like: Tensor | None = None
    ) -> CometCache:
        """This cache, after a check that it fits a call on `batch` rows; an empty one is started.

        Args:
            like: one of the model's weights, for their device and dtype.

        Raises:
            ValueError: it does not fit.
        """
        if self.fingerprint is None:
            self.fingerprint = fingerprint
            self.memories = [LayerMemory() for _ in range(config.backbone_config.num_hidden_layers)]
            self.rows = [config.clock()] * batch
        if self.fingerprint != fingerprint:
            raise ValueError(
                "past_key_values: this cache was made by a model of another configuration"
            )
        if len(self.rows) != batch:
            raise ValueError(wrong_rows(len(self.rows), batch))
        if like is not None and self.preallocated and self.memories:
            held = like if self.memories[0].keys is None else self.memories[0].keys
            pairs = ("on", held.device, like.device), ("of", held.dtype, like.dtype)
            for what, own, model in pairs:
                if own != model:
                    raise ValueError(
                        f"past_key_values: a cache {what} {own} given, the model is {what} {model};"
                        " CometCache.to changes it"
                    )
        if self.weights is not None and self.model is None:
            self._check_shapes(config)
        return self

    def _check_shapes(self, config: CometConfig) -> None:
        """Raises ValueError unless a loaded cache has every row's entries in this model's sizes."""
        if len(self.memories) != config.backbone_config.num_hidden_layers:
            raise ValueError(f"past_key_values: damaged: it has {len(self.memories)} layers")
        shapes = config.cache_shapes(len(self.rows), least_stride(self.rows))
        needed = dict.fromkeys(LayerMemory._fields, 0)
        for row in self.rows:
            keys = row.memory + row.own_tokens if row.fill else 0
            entries = {"state": row.global_slots, "temporary": row.temporary_slots}
            entries |= {"pending": row.pending_tokens, "keys": keys, "values": keys}
            needed = {name: max(count, entries[name]) for name, count in needed.items()}
        for i, memory in enumerate(self.memories):
            for name, tensor in memory._asdict().items():
                axis = LENGTH_AXIS[name]
                have = [0] if tensor is None else list(tensor.shape)
                want = list(shapes[name]) if name in shapes else [0]
                length = have.pop(axis) if len(have) > axis else 0
                same = len(have) == len(want) - 1 and have == want[:axis] + want[axis + 1 :]
                if length < needed[name] or not (tensor is None or same):
                    shape = None if tensor is None else [*tensor.shape]
                    found = f"{name} of layer {i} has the shape {shape}"
                    raise ValueError(f"past_key_values: damaged: {found}")

    def functional_copy(self) -> CometCache:
        """A cache for a call with gradients: shares nothing that a later call could write to."""
        new = copy.copy(self)
        new.memories, new.rows, new.model = list(self.memories), list(self.rows), self.model
        if self.preallocated:
            new._map(Tensor.clone)
            new.preallocated = False
        return new

    def reserve(
        self,
        config: CometConfig,
        dtype: torch.dtype,
        device: torch.device,
        temporary: torch.dtype | None = None,
    ) -> None:
        """Allocates every buffer at its full size, copies what is there; raises TooLittleMemory.

        Args:
            dtype: the model's. temporary: of the entries of T, if it is another.
        """
        if self.preallocated:
            # Buffers made under inference_mode cannot be written to outside of it.
            if not torch.is_inference_mode_enabled() and self._has_inference_tensors():
                self._map(Tensor.clone)
            return
        check_room(config, len(self.rows), dtype, device, least_stride(self.rows))
        shapes = config.cache_shapes(len(self.rows), least_stride(self.rows))
        dtypes = {name: buffer_dtype(name, dtype) for name in shapes}
        dtypes["temporary"] = temporary or dtype
        self.memories = [_fill(shapes, memory, dtypes, device) for memory in self.memories]
        self.preallocated = True

    # ---- what users and Hugging Face's generate call

    @property
    def nbytes(self) -> int:
        """Bytes of all tensors."""
        return sum(t.numel() * t.element_size() for t in self._tensors())

    @property
    def num_tokens(self) -> Tensor:
        """(B,) real tokens read."""
        return torch.tensor([row.num_tokens for row in self.rows])

    def get_seq_length(self, layer_idx: int = 0) -> int:
        """Columns fed so far that generate() counts, padding included."""
        return self.columns - self.behind

    def get_max_length(self, layer_idx: int | None = None) -> int:
        return -1  # no limit

    def get_max_cache_shape(self, layer_idx: int | None = None) -> int:
        return -1

    def __len__(self) -> int:
        return len(self.memories)

    def __repr__(self) -> str:
        sizes = f"rows={len(self.rows)}, layers={len(self.memories)}, columns={self.columns}"
        return f"CometCache({sizes}, nbytes={self.nbytes})"

    def clone(self) -> CometCache:
        """An independent copy: what one reads, the other does not."""
        return self._copy(Tensor.clone)

    def detach(self) -> CometCache:
        """The same memory, cut off from the graph that made it."""
        return self._copy((lambda t: t.detach().clone()) if self.preallocated else Tensor.detach)

    def to(
        self, device: str | torch.device | None = None, dtype: torch.dtype | None = None
    ) -> CometCache:
        """A copy on another device or in another precision, for a model that is there or has it.

        In another precision the model's weights differ too: they are no longer compared with those
        that made the memory.
        """
        new = self._copy(lambda t: t.detach().to(device=device, copy=True))
        if dtype is not None:
            for i, memory in enumerate(new.memories):
                held = {name: t for name, t in memory._asdict().items() if t is not None}
                cast = {name: t.to(buffer_dtype(name, dtype)) for name, t in held.items()}
                new.memories[i] = memory._replace(**cast)
        if [t.dtype for t in new._tensors()] != [t.dtype for t in self._tensors()]:
            new.model = new.weights = None
        return new

    def reorder_cache(self, beam_idx: Tensor) -> None:
        self.batch_select_indices(beam_idx)

    def batch_select_indices(self, indices: Tensor) -> None:
        """Row b becomes what row indices[b] was."""
        chosen: list[int] = torch.arange(len(self.rows))[indices.cpu()].tolist()
        self._map(lambda t: t.index_select(0, torch.tensor(chosen, device=t.device)))
        self.rows = [self.rows[b] for b in chosen]

    def batch_repeat_interleave(self, repeats: int) -> None:
        self.batch_select_indices(torch.arange(len(self.rows)).repeat_interleave(repeats))

    def reset(self) -> None:
        """Forgets everything."""
        self.__init__()  # type: ignore[misc]

    def crop(self, *args: Any) -> None:
        raise ValueError(
            "CometCache: what was read cannot be unread; clone() the cache before reading on"
        )

    def save(self, path: str | os.PathLike[str], notes: dict[str, Any] | None = None) -> None:
        """Writes the cache to a safetensors file, atomically.

        Args:
            notes: JSON-able; `load` gives them back as `.notes`.
        """
        tensors = {
            f"{i}.{name}": t.detach().contiguous()
            for i, memory in enumerate(self.memories)
            for name, t in memory._asdict().items()
            if t is not None
        }
        weights = self.weights if self.model is None else self.model.weight_digest()
        facts = {name: getattr(self, name) for name in ("columns", "preallocated", "fingerprint")}
        facts |= {"rows": [asdict(r) for r in self.rows], "layers": len(self.memories)}
        facts |= {"weights": weights, "notes": self.notes if notes is None else notes}
        write_cache(path, tensors, facts)

    @classmethod
    def load(cls, path: str | os.PathLike[str], device: str | torch.device = "cpu") -> CometCache:
        """Reads what `save` wrote.

        Raises:
            ValueError: not a file, or not a whole one, that `save` wrote.
        """
        cache = cls()
        tensors, facts = read_cache(path)
        try:
            cache.rows = [RowClock(**row) for row in facts["rows"]]
            cache.columns, cache.preallocated = facts["columns"], facts["preallocated"]
            cache.fingerprint, cache.weights = facts["fingerprint"], facts["weights"]
        except (KeyError, TypeError) as error:
            raise ValueError(f"{path}: not a readable CometCache file ({error})") from None
        cache.notes = facts.get("notes", {})
        tensors = {name: tensor.to(device) for name, tensor in tensors.items()}
        cache.memories = [
            LayerMemory(*(tensors.get(f"{i}.{name}") for name in LayerMemory._fields))
            for i in range(facts["layers"])
        ]
        return cache

    # ---- helpers

    def __getstate__(self) -> dict[str, Any]:
        # Copies and pickles leave behind the model and what knows the buffers' addresses.
        return self.__dict__ | {"model": None, "graphs": None}

    def _has_inference_tensors(self) -> bool:
        for memory in self.memories:
            for tensor in memory:
                if tensor is not None and tensor.is_inference():
                    return True
        return False

    def _tensors(self) -> Iterable[Tensor]:
        return (t for memory in self.memories for t in memory if t is not None)

    def _map(self, change: Callable[[Tensor], Tensor]) -> None:
        self.memories = [
            LayerMemory(*(None if t is None else change(t) for t in memory))
            for memory in self.memories
        ]

    def _copy(self, change: Callable[[Tensor], Tensor]) -> CometCache:
        new = copy.copy(self)
        new.rows, new.model = list(self.rows), self.model
        new._map(change)
        return new


def least_stride(rows: list[RowClock]) -> int:
    """The least stride of all rows; it bounds the compression tokens of a chunk."""
    return min((row.stride for row in rows), default=NO_STRIDE)


def _fill(
    shapes: dict[str, tuple[int, ...]],
    memory: LayerMemory,
    dtypes: dict[str, torch.dtype],
    device: torch.device,
) -> LayerMemory:
    buffers = {}
    for name, shape in shapes.items():
        axis, old = LENGTH_AXIS[name], getattr(memory, name)
        # An open chunk may have outgrown C (rollover=false).
        if old is not None and old.shape[axis] > shape[axis]:
            shape = tuple(old.shape)
        buffers[name] = torch.zeros(shape, dtype=dtypes[name], device=device)
        if old is not None:
            buffers[name].narrow(axis, 0, old.shape[axis]).copy_(old)
    return LayerMemory(**buffers)
