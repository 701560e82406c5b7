"""This process: its device, its precision, its rank among those that torchrun started.

with process_group("auto") as worker:
    model = worker.wrap(model.to(worker.device))     # DistributedDataParallel if there are several
    with worker.autocast():
        logits = model(batch)
    total = worker.sum(loss)                         # over all processes
"""

import ctypes
import gc
import os
import re
import signal
import sys
import time
import traceback
import warnings
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, replace

import torch
import torch.distributed as dist
from torch.distributed.rendezvous import rendezvous
from torch.nn.parallel import DistributedDataParallel

from common import InputError

DTYPES = {"off": None, "bf16": torch.bfloat16, "fp16": torch.float16}  # by --amp


@dataclass
class Worker:
    """One process: device, autocast dtype, rank and world size (without torchrun 0 and 1)."""

    device: torch.device
    amp: torch.dtype | None = None  # None: fp32
    rank: int = 0
    world_size: int = 1

    def with_precision(self, amp: str) -> "Worker":
        """This worker with --amp auto, off, bf16 or fp16.

        "auto" chooses the same dtype on all processes: GradScaler scales fp16 gradients, so they
        cannot be added to bf16 gradients of another GPU.
        """
        if amp not in ("auto", *DTYPES):
            raise InputError(f"--amp: found {amp!r}, expected auto, {', '.join(DTYPES)}")
        cuda = self.device.type == "cuda"
        if amp == "auto":
            if cuda:
                has_bf16 = torch.cuda.get_device_capability(self.device) >= (8, 0)
            else:
                cpu = torch.cpu
                has_bf16 = cpu._is_avx512_bf16_supported() or cpu._is_amx_tile_supported()
            amp = "bf16" if not self.any(not has_bf16) else "fp16" if cuda else "off"
        return replace(self, amp=DTYPES[amp])

    def autocast(self):
        return torch.autocast(self.device.type, dtype=self.amp, enabled=self.amp is not None)

    def current_device(self):
        """A block in which the GPU is the current one of this thread, on which graphs are recorded.

        A graph of another GPU's kernels is empty, and its replay repeats the results it has.
        """
        return torch.cuda.device(self.device) if self.device.type == "cuda" else nullcontext()

    def wrap(self, model: torch.nn.Module) -> torch.nn.Module:
        """Wrap the model in DistributedDataParallel if there are several processes."""
        if self.world_size == 1:
            return model
        with warnings.catch_warnings():  # torch 2.13 renamed it, 2.11 only knows this name
            warnings.filterwarnings("ignore", "`broadcast_buffers`", FutureWarning)
            return DistributedDataParallel(model, broadcast_buffers=False)

    def sum(self, tensor: torch.Tensor) -> torch.Tensor:
        """All-reduce a tensor in place."""
        if self.world_size > 1:
            dist.all_reduce(tensor)
        return tensor

    def broadcast(self, tensor: torch.Tensor):
        """Copy the tensor of rank 0 to all ranks, in place."""
        if self.world_size > 1:
            dist.broadcast(tensor, 0)

    def any(self, condition: bool) -> bool:
        """Whether `condition` is true on any process. Uses gloo: no wait for the GPU."""
        if self.world_size == 1:
            return condition
        flag = torch.tensor(int(condition))
        dist.all_reduce(flag)
        return flag.item() > 0

    def gather(self, value) -> list:
        """The value of each process, a text or None, on all of them. Uses gloo."""
        values = [value] * self.world_size
        if self.world_size > 1:
            dist.all_gather_object(values, value)
        return values

    def barrier(self):
        self.any(False)


def restart_count() -> int:
    """How often torchrun has restarted this process; each node counts its own restarts."""
    return int(os.environ.get("TORCHELASTIC_RESTART_COUNT", "0"))


def local_device(name: str = "auto") -> torch.device:
    """The device of this process for --device: auto, cpu, cuda (that of the local rank), cuda:N."""
    local_rank, number = int(os.environ.get("LOCAL_RANK", "0")), None
    if (named := re.fullmatch(r"cuda(?::(\d{1,3}))?|cpu|auto", name)) is None:
        raise InputError(f"--device: found {name!r}, expected auto, cpu, cuda or cuda:N")
    if named[1]:
        number, n_gpus = int(named[1]), torch.cuda.device_count()
        if int(os.environ.get("LOCAL_WORLD_SIZE", "1")) > 1:
            raise InputError(f"--device {name}: several processes need --device cuda, one GPU each")
        if n_gpus and number >= n_gpus:
            raise InputError(f"--device {name}: expected a number below {n_gpus}, the GPUs here")
    if name.startswith("cuda") and not torch.cuda.is_available():
        raise InputError(f"--device {name}: found no GPU that torch {torch.__version__} can use")
    if name != "cpu" and torch.cuda.is_available():
        found, n_gpus = int(os.environ.get("LOCAL_WORLD_SIZE", "1")), torch.cuda.device_count()
        if found > n_gpus:
            raise InputError(f"--nproc_per_node: found {found}, expected at most {n_gpus} GPUs")
        device = torch.device("cuda", local_rank if number is None else number)
        torch.cuda.set_device(device)
        return device
    if sys.platform == "linux":
        # glibc returns large blocks to the kernel after each use; mapping them again costs 10 %
        mallopt = getattr(ctypes.CDLL(None), "mallopt", lambda *_: None)  # musl has none
        mallopt(-3, 2**30)  # M_MMAP_THRESHOLD
        mallopt(-1, 2**31 - 1)  # M_TRIM_THRESHOLD
    return torch.device("cpu")


@contextmanager
def process_group(amp: str, device: str = "auto"):
    """Join torchrun's process group for the length of the block; yields this process's Worker."""
    worker = Worker(local_device(device))
    cuda = worker.device.type == "cuda"
    if "RANK" not in os.environ:
        yield worker.with_precision(amp)
        return
    local_size = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    if not cuda and os.environ.get("OMP_NUM_THREADS", "1") == "1":  # torchrun's default is 1
        torch.set_num_threads(max(1, (os.cpu_count() or 1) // local_size))
    store, rank, world_size = next(rendezvous("env://"))
    # torchrun's store survives a restart: new processes must not read the old ones' addresses
    # (pytorch issue 135712). The prefix must agree, and nodes count restarts by themselves.
    prefix = f"restart {restart_count() if world_size == local_size else ''}"
    backend = "cpu:gloo,cuda:nccl" if cuda else "gloo"
    store = dist.PrefixStore(prefix, store)
    dist.init_process_group(backend, store=store, rank=rank, world_size=world_size)
    failed = False
    try:
        yield replace(worker, rank=rank, world_size=world_size).with_precision(amp)
    except BaseException as error:
        failed = isinstance(error, Exception)
        traceback.clear_frames(error.__traceback__)
        raise
    finally:
        # A DistributedDataParallel that outlives the group deadlocks: it joins gloo's threads
        # while holding the GIL, for which they may wait. Free it, also from reference cycles.
        gc.unfreeze()
        gc.collect()
        if not (cuda and failed):  # NCCL waits for all processes; only this one may have failed
            dist.destroy_process_group()


class StopSignal:
    """Remembers SIGTERM or SIGINT, so that the loop can finish its step and save.

    A second signal ends the program at once, unless it arrives within a second: a launcher may
    forward a signal that this process has received already.
    """

    def __init__(self):
        self.number, self.time = 0, 0.0
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, self.handle)

    def handle(self, number, frame):
        if self.number and time.monotonic() - self.time > 1:
            signal.signal(number, signal.SIG_DFL)
            signal.raise_signal(number)
        if not self.number:
            self.number, self.time = number, time.monotonic()
