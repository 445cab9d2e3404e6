"""The emulated GPU, from within: integers are computed, everything else is only counted.

A process runs on it with LD_PRELOAD=cudart.so; see `tests/emulator/test_emulated.py`.
"""

import ctypes
import os
from collections import Counter
from pathlib import Path

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map

FOLDER = Path(os.environ["EMULATED_GPU"])
LIBRARY = ctypes.CDLL(str(FOLDER / "cudart.so"))
LIBRARY.nullgpu_dump.argtypes = [ctypes.c_char_p]
LIBRARY.nullgpu_hit.argtypes = [ctypes.c_char_p]
LIBRARY.nullgpu_total.argtypes = [ctypes.c_size_t]
LIBRARY.nullgpu_pinned.restype = ctypes.c_size_t
WHOLE = (torch.bool, torch.int64, torch.int32, torch.uint8, torch.int16, torch.int8)
# These only look at memory, move it or make it.
VIEWS = frozenset(
    """view _unsafe_view slice select expand unsqueeze squeeze t transpose permute as_strided detach
    alias split unbind _to_copy copy_ _local_scalar_dense reshape unfold narrow empty empty_like
    empty_strided clone lift_fresh record_stream _pin_memory is_pinned set_ resize_ _reshape_alias
    diagonal chunk""".split()
)


def reset() -> None:
    torch.cuda.synchronize()
    LIBRARY.nullgpu_reset()


def counts() -> Counter[str]:
    """What happened since `reset`, by kind and name: K launches, C copies, S waits of the host."""
    path = FOLDER / f"counts-{os.getpid()}"
    LIBRARY.nullgpu_dump(str(path).encode())
    found: Counter[str] = Counter()
    for line in path.read_text().splitlines():
        number, _, name = line.split("\t", 2)
        found[name] = int(number)
    path.unlink()
    return found


def total(found: Counter[str], kind: str) -> int:
    return sum(n for name, n in found.items() if name.startswith(kind))


def hit(name: str) -> None:
    LIBRARY.nullgpu_hit(name.encode())


def on_cpu(x):
    """The memory of a tensor on the emulated device, which is the host's, as a CPU tensor."""
    if not isinstance(x, torch.Tensor) or x.device.type != "cuda":
        return x
    storage = x.untyped_storage()
    n = storage.nbytes()
    if n == 0:
        return torch.empty(x.shape, dtype=x.dtype)
    memory = (ctypes.c_uint8 * n).from_address(storage.data_ptr())
    whole = n // x.element_size() * x.element_size()
    flat = torch.frombuffer(memory, dtype=torch.uint8, count=whole).view(x.dtype)
    return flat.as_strided(x.size(), x.stride(), x.storage_offset())


class paused:
    """What happens within is not counted."""

    def __enter__(self):
        LIBRARY.nullgpu_pause(1)

    def __exit__(self, *args):
        LIBRARY.nullgpu_pause(-1)


class Integers(TorchDispatchMode):
    """Computes integers and booleans, which control flow reads; each operation is a launch."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        name = func.overloadpacket.__name__
        if func.namespace in ("c10d", "_c10d_functional", "fsdp"):
            return func(*args, **kwargs)
        if torch.is_inference_mode_enabled() and "scaled_dot" not in name:
            parts = func.decompose(*args, **kwargs)
            if parts is not NotImplemented:
                return parts
        tensors = [x for x in tree_leaves((args, kwargs)) if isinstance(x, torch.Tensor)]
        cuda = [x for x in tensors if x.device.type == "cuda"]
        if name in ("index", "index_put_", "index_put", "_index_put_impl_"):
            args = (args[0], self.numbered(args[1]), *args[2:])
            tensors = [x for x in tree_leaves((args, kwargs)) if isinstance(x, torch.Tensor)]
        whole = all(x.dtype in WHOLE for x in tensors)
        if name in ("copy_", "_to_copy", "clone") and tensors and whole and cuda:
            done = self.copied(name, args, kwargs, len(cuda))
            if done is not None:
                return done
        if name in VIEWS:
            return func(*args, **kwargs)
        if not self.computes(name, args, kwargs, tensors, cuda, whole):
            return func(*args, **kwargs)
        hit(f"K int {name}")
        if name == "nonzero":
            hit("S nonzero")
        with paused():
            device = {"device": torch.device("cpu")} if "device" in kwargs else {}
            out = func(*tree_map(on_cpu, args), **(tree_map(on_cpu, kwargs) | device))
            if func._schema.is_mutable:
                return args[0]
            return tree_map(
                lambda x: x.contiguous().cuda() if isinstance(x, torch.Tensor) else x, out
            )

    @staticmethod
    def computes(name, args, kwargs, tensors, cuda, whole) -> bool:
        """Whether the operation is one on whole numbers alone, on the device."""
        dtype, device = kwargs.get("dtype"), kwargs.get("device")
        if cuda and (whole or name in ("nonzero", "argmax")):
            return dtype is None or not dtype.is_floating_point
        if tensors or device is None or torch.device(device).type != "cuda":
            return False
        if dtype is not None:
            return dtype in WHOLE
        counted = name == "arange" and all(isinstance(a, int) for a in args)
        filled = name == "full" and isinstance(args[1], int)
        return counted or filled or name == "randint"

    @staticmethod
    def numbered(indices):
        """Boolean indices as numbers: two launches, and the host waits for their number."""
        found = []
        for i in indices:
            if i is not None and i.dtype == torch.bool and i.device.type == "cuda":
                for event in ("S nonzero of a boolean index", "K int nonzero", "K int nonzero"):
                    hit(event)
                with paused():
                    found += [j.contiguous().cuda() for j in on_cpu(i).nonzero(as_tuple=True)]
            else:
                found.append(i)
        return found

    @staticmethod
    def copied(name, args, kwargs, cuda):
        """Copies of whole numbers between or on the devices; None: not one of these."""
        if name == "copy_":
            to, source = args[0], args[1]
            waits = not (len(args) > 2 and args[2]) and not kwargs.get("non_blocking")
            if cuda == 2:
                hit("K int copy_")
            elif to.device.type == "cuda":
                pinned = source.is_pinned()
                hit("C H2D copy_ int")
                if waits or not pinned:
                    hit("S H2D int")
            else:
                hit("C D2H copy_ int")
                hit("S D2H int")
            with paused():
                on_cpu(to).copy_(on_cpu(source))
            return to
        dtype, device = kwargs.get("dtype"), kwargs.get("device")
        if name == "clone" or device is None or torch.device(device).type == "cuda":
            if dtype is not None and dtype not in WHOLE:
                return None
            if args[0].device.type != "cuda":
                return None  # the runtime counts it
            hit("K int copy")
            with paused():
                own = on_cpu(args[0]).clone(memory_format=torch.contiguous_format)
                return own.to(dtype or args[0].dtype).cuda()
        hit("C D2H int")
        hit("S D2H int")
        own = on_cpu(args[0]).clone(memory_format=torch.contiguous_format)
        return own.to(dtype or args[0].dtype)
