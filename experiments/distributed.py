"""Several processes that train one network together, as torchrun starts them; each takes its share of every batch.

All do the same from the same random generators. Rank 0 alone writes, prints, and decides what depends on the disk or a
clock. Without torchrun there is one rank, for which every method here does nothing.
"""

import atexit
import gc
import os
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist
import torch.distributed.nn  # before a group exists, or its functions would hold the group as their default
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from .config import ExperimentError

T = TypeVar("T")
CPU = torch.device("cpu")
TIMEOUT = timedelta(days=30)  # rank 0 may wait for a teacher that others train; torchrun notices a rank that dies


@dataclass(frozen=True)
class Ranks:
    """This process among those that train together."""

    rank: int = 0
    count: int = 1

    @property
    def seed_parts(self) -> tuple[int, ...]:
        """Parts of a seed that tell this rank's random numbers from the others'."""
        return () if self.count == 1 else (self.rank,)

    def on_first(self, work: Callable[[], T]) -> T:
        """Run `work` on rank 0 alone; return its result, or raise its ExperimentError, on every rank."""
        outcome = [self.on_all(lambda: work() if self.rank == 0 else None)]
        if self.count > 1:
            dist.broadcast_object_list(outcome, src=0, device=CPU)
        return outcome[0]  # type: ignore[return-value]

    def on_all(self, work: Callable[[], T]) -> T:
        """Run `work` on every rank and return its result; an ExperimentError of any rank is raised by all."""
        if self.count == 1:
            return work()
        value, error = None, None
        try:
            value = work()
        except ExperimentError as own:
            error = own
        if self.maximum(int(error is not None)) == [1]:
            errors: list[Any] = [None] * self.count
            dist.all_gather_object(errors, error)
            error = next(each for each in errors if each is not None)
            error.shared = True
            raise error
        return value  # type: ignore[return-value]

    def first_then_others(self, work: Callable[[], T]) -> T:
        """Run `work` on rank 0 first, then on the other ranks, which find on the disk what it has left there."""
        own: list[T] = []
        self.on_first(lambda: own.append(work()))
        return self.on_all(lambda: own[0] if self.rank == 0 else work())

    def sum(self, *values: float) -> list[float]:
        """Return each number summed over the ranks."""
        return self._reduce(values, torch.float64, dist.ReduceOp.SUM)

    def gather(self, value: float) -> list[float]:
        """Return the number of every rank, in their order."""
        return self.sum(*(value if rank == self.rank else 0.0 for rank in range(self.count)))

    def maximum(self, *values: int) -> list[int]:
        """Return the largest that any rank has of each number."""
        return self._reduce(values, torch.int64, dist.ReduceOp.MAX)

    def _reduce(self, values: tuple[Any, ...], dtype: torch.dtype, operation: Any) -> list[Any]:
        if self.count == 1:
            return list(values)
        tensor = torch.tensor(values, dtype=dtype)
        dist.all_reduce(tensor, operation)
        return tensor.tolist()

    @contextmanager
    def enter_on_first(self, context: Callable[[], AbstractContextManager[object]]) -> Iterator[None]:
        """Enter the context on rank 0 alone; the block begins on every rank when that has happened."""
        with ExitStack() as stack:
            self.on_first(lambda: stack.enter_context(context()))
            yield

    def share(self, images: int) -> slice:
        """Return which images of a batch this rank takes; ExperimentError if the ranks cannot share it evenly."""
        if images % self.count:
            raise ExperimentError(
                f"schedule.batch_size is {images}, which {self.count} processes cannot share: choose a multiple of"
                f" {self.count}."
            )
        each = images // self.count
        return slice(self.rank * each, (self.rank + 1) * each)

    def wrap(self, network: nn.Module, device: torch.device) -> nn.Module:
        """Return the network to train: its gradients are averaged over the ranks, its buffers are those of rank 0."""
        if self.count == 1:
            return network
        return DistributedDataParallel(network, device_ids=[device] if device.type == "cuda" else None)

    def copy_buffers(self, network: nn.Module) -> None:
        """Give every rank the running statistics of rank 0, which are the ones that it saves."""
        if self.count > 1:
            for buffer in network.buffers():
                dist.broadcast(buffer, src=0)


ALONE = Ranks()


def join() -> Ranks:
    """Return this process's place among those that torchrun has started; ALONE without torchrun."""
    if "TORCHELASTIC_RUN_ID" not in os.environ or int(os.environ["WORLD_SIZE"]) == 1:
        return ALONE
    if not dist.is_initialized():
        # Gloo carries numbers of the CPU, NCCL gradients on GPUs.
        dist.init_process_group("cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo", timeout=TIMEOUT)
        atexit.register(_leave)
    return Ranks(dist.get_rank(), dist.get_world_size())


def _leave() -> None:
    """End the process group and its threads: one that frees a tensor after the interpreter has ended would abort."""
    gc.collect()  # wrapped networks hold the group, and may lie in cycles
    dist.destroy_process_group()
