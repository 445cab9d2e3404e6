"""What the groups share: time limits, a JSON line a measurement, clocks, models."""

import gc
import json
import time
import traceback
from collections.abc import Callable
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor
from transformers import Qwen3Config, Qwen3ForCausalLM

from comet_pl import CometConfig, CometForCausalLM

SHAPES: dict[str, dict[str, int]] = {
    "0.6B": {
        "vocab_size": 151936, "hidden_size": 1024, "num_hidden_layers": 28,
        "num_attention_heads": 16, "num_key_value_heads": 8, "head_dim": 128,
        "intermediate_size": 3072,
    },
    "4B": {
        "vocab_size": 151936, "hidden_size": 2560, "num_hidden_layers": 36,
        "num_attention_heads": 32, "num_key_value_heads": 8, "head_dim": 128,
        "intermediate_size": 9728,
    },
    "tiny": {
        "vocab_size": 300, "hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4,
        "num_key_value_heads": 2, "head_dim": 16, "intermediate_size": 96,
    },
}  # fmt: skip
PAPER = {
    "chunk_size": 2048, "global_size": 512, "compression_stride": 8, "temporary_capacity": 2048
}  # fmt: skip
SMALL = {"chunk_size": 32, "global_size": 8, "compression_stride": 8, "temporary_capacity": 32}
GIB = 2**30


class Measurement(NamedTuple):
    """One line of a group's plan."""

    name: str
    seconds: float  # estimate; it is left out if less time is left
    work: Callable[..., dict[str, Any]]
    arguments: tuple[Any, ...] = ()
    needs_gpu: bool = False


@dataclass
class Bench:
    """A group at work.

    Args:
        deadline: time.time() by which it must have ended.
        tiny: everything at a size that runs anywhere.
    """

    group: str
    out: Path
    device: str
    deadline: float
    tiny: bool
    models: dict[Any, Any] = field(default_factory=dict)  # of the measurement before, perhaps

    @property
    def cuda(self) -> bool:
        return self.device == "cuda"

    @property
    def chunk(self) -> int:
        return (SMALL if self.tiny else PAPER)["chunk_size"]

    def run(self, plan: list[Measurement]) -> None:
        """Takes the measurements for which there is time; each is a line of GROUP.jsonl at once."""
        for what in plan:
            left = self.deadline - time.time()
            if what.needs_gpu and not self.cuda:
                self.say(what.name, skipped="needs a GPU")
            elif left < what.seconds:
                self.say(what.name, skipped=f"{left:.0f} s left, {what.seconds:.0f} s needed")
            else:
                self.measure(what)

    def measure(self, what: Measurement) -> None:
        begun = time.perf_counter()
        if self.cuda:
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()
        try:
            found = what.work(self, *what.arguments)
            self.synchronize()
            peak = {"peak_gib": torch.cuda.max_memory_allocated() / GIB} if self.cuda else {}
            found |= {"took": round(time.perf_counter() - begun, 1)}
            self.say(what.name, **found, **{k: round(v, 2) for k, v in peak.items()})
        except Exception as error:
            last = traceback.extract_tb(error.__traceback__)[-1]
            where = f"{Path(last.filename).name}:{last.lineno} {last.name}"
            self.say(what.name, error=f"{type(error).__name__}: {error}"[:300], where=where)
            self.models.clear()
            if "CUDA error" in str(error):
                raise  # nothing that this process measures from here on would be right
        finally:
            gc.collect()

    def say(self, name: str, **values: Any) -> None:
        with open(self.out / f"{self.group}.jsonl", "a") as file:
            file.write(json.dumps({"what": name} | values) + "\n")

    def synchronize(self) -> None:
        if self.cuda:
            torch.cuda.synchronize()

    def clock(self, work: Callable[[], Any], times: int = 5, warm: int = 2) -> tuple[float, float]:
        """Median milliseconds of work, and those after which the host is back."""
        for _ in range(warm):
            work()
        walls, hosts = [], []
        for _ in range(times):
            self.synchronize()
            start = time.perf_counter()
            work()
            hosts.append((time.perf_counter() - start) * 1e3)
            self.synchronize()
            walls.append((time.perf_counter() - start) * 1e3)
        return round(sorted(walls)[times // 2], 3), round(sorted(hosts)[times // 2], 3)

    def ids(self, tokens: int, rows: int = 1) -> Tensor:
        generator = torch.Generator().manual_seed(tokens)
        return torch.randint(0, 250, (rows, tokens), generator=generator).to(self.device)

    def model(self, shape: str, dtype: torch.dtype, comet: bool = True, layers: int | None = None):
        """A CoMeT with the paper's memory, or the plain decoder; kept for the next measurement."""
        key = shape, dtype, comet, layers
        if key not in self.models:
            self.models.clear()
            gc.collect()
            self.models[key] = self.make(shape, dtype, comet, layers)
        return self.models[key]

    def make(self, shape: str, dtype: torch.dtype, comet: bool, layers: int | None = None) -> Any:
        sizes = dict(SHAPES["tiny" if self.tiny else shape])
        sizes["num_hidden_layers"] = min(layers or 99, sizes["num_hidden_layers"])
        more: dict[str, Any] = {"tie_word_embeddings": True, "max_position_embeddings": 1 << 20}
        backbone = Qwen3Config(**sizes, **more)
        torch.manual_seed(0)
        with default_dtype(dtype), torch.device(self.device):
            if comet:
                memory = SMALL if self.tiny else PAPER
                return CometForCausalLM(CometConfig(backbone_config=backbone, **memory))
            model = Qwen3ForCausalLM(backbone)
        model.set_attn_implementation("sdpa")
        return model


@contextmanager
def default_dtype(dtype: torch.dtype):
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(torch.float32)


def apart(found: Tensor, wanted: Tensor) -> float:
    """Relative distance, NaN if anything is not finite."""
    found, wanted = (t.detach().double().cpu() for t in (found, wanted))
    if not torch.isfinite(found).all():
        return float("nan")
    return float((found - wanted).norm() / wanted.norm().clamp_min(1e-300))
