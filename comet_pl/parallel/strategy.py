"""LayerPipelineStrategy: a Lightning strategy that reads one text on several devices.

Ranks form a mesh of data x pipeline: rank d * P + p has index p in pipeline d. The ranks of a
pipeline read the same rows, each its own chunks of them; pipelines read different rows.
"""

import atexit
import os
import threading
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from lightning.fabric.utilities.distributed import _destroy_dist_connection
from lightning.fabric.utilities.seed import reset_seed
from lightning.pytorch.strategies import DDPStrategy, StrategyRegistry
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch import Tensor, nn
from torch.distributed.distributed_c10d import _get_default_store
from torch.optim import Optimizer

from comet_pl.config.schema import SHARDING
from comet_pl.errors import OnAllRanks, UserError
from comet_pl.model.modeling_comet import CometForCausalLM
from comet_pl.parallel.p2p import Ring
from comet_pl.parallel.pipeline import Pipeline
from comet_pl.parallel.rendezvous import Meeting, find_store, launched_by, patience
from comet_pl.parallel.schedule import SCHEDULES
from comet_pl.parallel.sharding import Shards, sharded_optimizer_state, whole
from comet_pl.parallel.watchdog import Watch
from comet_pl.training.optimization import sum_gradients
from comet_pl.training.text_reader import TextReader
from comet_pl.training.windows import Window

NAME = "layer_pipeline"
# For a rank that is alive but busy, as when it writes a large checkpoint.
SLOWEST = timedelta(hours=1)
# Their value 1 lets CUDA do one thing at a time.
SERIAL = ("CUDA_LAUNCH_BLOCKING", "CUDA_DEVICE_MAX_CONNECTIONS")


class LayerPipelineStrategy(DDPStrategy, TextReader):
    """Layer-level pipeline parallelism over the chunks of a text, times data parallelism.

    Gradients are summed over all ranks once a step; the module divides its loss by the labelled
    tokens of all data-parallel ranks. Checkpoints hold whole tensors: they do not depend on the
    number of ranks.

    Args:
        pipeline_size: P, ranks that share a text; None: all.
        sharding: none, zero2 or zero3 (see comet_pl/parallel/sharding.py).
        schedule: one of comet_pl.parallel.schedule.SCHEDULES; None: interleaved, but layer_level
            with zero3, where each span of chunks gathers all layers.
        timeout: seconds within which a rank that dies, or never comes, ends all others.
        process_group_backend: gloo or nccl; None: by device.
        lightning: DDPStrategy's own arguments.

    Raises:
        UserError: before any process group exists, for arguments that do not fit the devices.
    """

    strategy_name = NAME

    def __init__(
        self,
        pipeline_size: int | None = None,
        sharding: str = "none",
        schedule: str | None = None,
        timeout: float = 60.0,
        process_group_backend: str | None = None,
        **lightning: Any,
    ):
        super().__init__(process_group_backend=process_group_backend, timeout=SLOWEST, **lightning)
        self.asked_size, self.sharding, self.silence = pipeline_size, sharding, timeout
        self.schedule = schedule or ("layer_level" if sharding == "zero3" else "interleaved")
        self.pipeline: Pipeline | None = None
        self.shards: Shards | None = None
        self.watch: Watch | None = None
        self.failed = False

    # ---- the mesh

    @property
    def pipeline_size(self) -> int:
        return self.asked_size or self.world

    @property
    def data_size(self) -> int:
        return self.world // self.pipeline_size

    @property
    def world(self) -> int:
        return self.num_nodes * self.num_processes

    @property
    def shard(self) -> tuple[int, int]:
        """(data-parallel rank, data-parallel size); the ranks of a pipeline share theirs."""
        return self.global_rank // self.pipeline_size, self.data_size

    @property
    def distributed_sampler_kwargs(self) -> dict[str, Any]:
        return {"rank": self.shard[0], "num_replicas": self.shard[1]}

    def check(self) -> None:
        """Raises UserError for what cannot be run."""
        size, world, zero3 = self.pipeline_size, self.world, self.sharding == "zero3"
        sizes = ", ".join(str(n) for n in range(1, world + 1) if world % n == 0)
        backend, device = self._get_process_group_backend(), self.root_device.type
        only = {"cpu": "gloo", "cuda": "nccl"}.get(device, backend)
        mistakes = {
            f"pipeline_size: {size} given, but trainer.devices x trainer.num_nodes is {world}; "
            f"allowed: {sizes}": world % size,
            f"sharding: {self.sharding!r} given, allowed: {', '.join(SHARDING)}": (
                self.sharding not in SHARDING
            ),
            f"schedule: {self.schedule!r} given, allowed: {', '.join(SCHEDULES)}": (
                self.schedule not in SCHEDULES
            ),
            f"sharding: zero3 shards over data-parallel ranks, and pipeline_size {size} of {world} "
            "devices leaves one; allowed: zero2 (shards over all ranks), none, or a smaller "
            "strategy.pipeline_size": zero3 and self.data_size == 1 and world > 1,
            "schedule: chunk_level given, but zero3 goes layer by layer; allowed: layer_level, "
            "interleaved": zero3 and self.schedule == "chunk_level",
            f"start_method: {self._start_method} given, but shards of weights cannot come back "
            "from it; allowed: popen": self.sharding != "none" and self._start_method != "popen",
            f"backend: {backend} cannot send tensors of a {device} device; allowed: {only}": (
                {backend, only} == {"gloo", "nccl"}
            ),
        }
        for mistake, made in mistakes.items():
            if made:
                raise UserError(f"strategy.{mistake}")
        serial = [name for name in SERIAL if os.environ.get(name) == "1"]
        if backend == "nccl" and size > 1 and serial:
            raise UserError(
                f"{serial[0]}: 1 given in the environment, but a pipeline's messages travel while "
                "layers compute, and the run would hang; unset it"
            )

    def setup_environment(self) -> None:
        """Makes the process groups: all ranks, and the rings of neighbours."""
        self.check()
        # NCCL's, on unbatched messages in communicators that exist: here they are meant.
        os.environ.setdefault("TORCH_NCCL_SHOW_EAGER_INIT_P2P_SERIALIZATION_WARNING", "false")
        super().setup_environment()
        assert self.watch is not None
        if dist.get_backend() == "nccl":
            # Made at its first message, a communicator would block each rank of a ring for its
            # neighbour.
            world: Any = dist.group.WORLD
            assert world.bound_device_id is not None, "NCCL was not initialized with its device"
        size = self.pipeline_size
        rings = [list(range(start, start + size)) for start in range(0, self.world, size)]
        ring = Ring.build(rings, SLOWEST) if size > 1 else None
        self.pipeline = Pipeline(ring, self.global_rank % size, size, self.schedule)

    def setup_distributed(self) -> None:
        """Meets the other ranks, and makes the process group while the watch runs: from then on
        nobody waits for a rank that is lost."""
        reset_seed()
        self.set_world_ranks()
        environment = self.cluster_environment
        assert environment is not None
        place = self.global_rank, self.world
        host, exists = environment.main_address, dist.is_initialized()
        first = self.node_rank * self.num_processes
        launched = launched_by(self._launcher, first)
        try:
            port = environment.main_port
            store = _get_default_store() if exists else find_store(host, port, *place, self.silence)
        except UserError:
            for process in launched.values():
                process.terminate()
            raise
        launches = not environment.creates_processes_externally
        meeting = Meeting(store, *place, host, launched, patience() if launches else 0.0)
        speakers = range(first, first + self.num_processes)
        for thread in threading.enumerate():
            # Lightning's: it would kill this process before the watchdog has said why.
            if thread.name == "child-process-observer":
                thread._child_processes = []  # type: ignore[attr-defined]
        self.watch = Watch(self.silence, meeting, speakers)
        self.watch.start()
        if not exists:
            self._make_group(store)

    def _make_group(self, store: dist.Store) -> None:
        backend = self._process_group_backend = self._get_process_group_backend()
        device = None if self.root_device.type == "cpu" else self.root_device
        store.set_timeout(SLOWEST)
        dist.init_process_group(
            backend,
            store=store,
            rank=self.global_rank,
            world_size=self.world,
            timeout=SLOWEST,
            device_id=device,
        )
        if backend == "nccl":
            # As Lightning does.
            atexit.register(_destroy_dist_connection)

    def configure_ddp(self) -> None:
        """Gives every rank the weights of rank 0, and shards them. There is no DDP wrapper."""
        assert self.model is not None
        with torch.no_grad():
            for tensor in (*self.model.parameters(), *self.model.buffers()):
                dist.broadcast(tensor, 0)
        if self.sharding != "none":
            assert self.pipeline is not None
            module: Any = self.model
            sizes, layerwise = (self.data_size, self.pipeline_size), self.sharding == "zero3"
            self.shards = self.pipeline.shards = Shards.over(module.model, *sizes, layerwise)

    # ---- a step

    def read(
        self, model: CometForCausalLM, windows: Sequence[Window], num_items: int
    ) -> Iterator[Tensor | None]:
        assert self.pipeline is not None
        return self.pipeline.read(model, windows, num_items)

    @contextmanager
    def block_backward_sync(self) -> Iterator[None]:
        """Makes the weights whole that a step keeps whole."""
        if self.shards is not None:
            self.shards.gather(all_layers=not self.shards.layerwise)
        yield

    def sum_gradients(self, parameters: list[nn.Parameter]) -> None:
        if self.shards is not None:
            self.shards.reduce()
        else:
            sum_gradients(parameters, _sum)

    # ---- validation, checkpoints

    def on_validation_start(self) -> None:
        """Makes the model whole: every rank reads rows of its own."""
        super().on_validation_start()
        if self.shards is not None:
            self.shards.gather(all_layers=True)

    def on_validation_end(self) -> None:
        super().on_validation_end()
        if self.shards is not None:
            self.shards.release()

    def lightning_module_state_dict(self) -> dict[str, Any]:
        state: dict[str, Any] = super().lightning_module_state_dict()
        return state if self.shards is None else whole(state)

    def optimizer_state(self, optimizer: Optimizer) -> dict[str, Any]:
        state: dict[str, Any] = super().optimizer_state(optimizer)
        return state if self.shards is None else whole(state)

    def load_optimizer_state_dict(self, checkpoint: Mapping[str, Any]) -> None:
        if self.shards is None:
            super().load_optimizer_state_dict(checkpoint)
            return
        for optimizer, state in zip(self.optimizers, checkpoint["optimizer_states"], strict=True):
            optimizer.load_state_dict(sharded_optimizer_state(optimizer, state))

    # ---- the end

    def on_exception(self, exception: BaseException) -> None:
        """Finds out whether this rank lost a neighbour; tells the others that it fails."""
        if self.watch is None or isinstance(exception, (MisconfigurationException, OnAllRanks)):
            return
        self.failed = True
        lost = isinstance(exception, (dist.DistError, RuntimeError))
        if lost and not isinstance(exception, torch.OutOfMemoryError):
            self.watch.explain()  # ends the process if a rank is gone
        self.watch.fail(f"{type(exception).__name__}: {exception}")

    def teardown(self) -> None:
        super().teardown()
        if self.watch is not None:
            if not self.failed:
                self.barrier()
            self.watch.stop()
            self.watch = None


def _sum(tensor: Tensor) -> Tensor:
    """Over all ranks, in place. Lightning's reduce would add a barrier."""
    dist.all_reduce(tensor)
    return tensor


StrategyRegistry.register(
    NAME,
    LayerPipelineStrategy,
    description="layer-level pipeline parallelism over the chunks of a text",
)
