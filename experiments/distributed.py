"""Several processes that train one network together, as torchrun starts them: each takes its share of every batch.

All of them do the same, from the same generators; rank 0 alone decides what the disk or a clock says, writes and
speaks. Without torchrun there is one rank, for which nothing of this does anything.
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
import torch.distributed.nn  # before a group exists, which its functions would hold for ever as a default
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from .config import ExperimentError

T = TypeVar("T")
CPU = torch.device("cpu")
PATIENCE = timedelta(days=30)  # rank 0 may wait for a teacher that others train; of a rank that dies, torchrun tells


@dataclass(frozen=True)
class Ranks:
    """One process among those that train together."""

    rank: int = 0
    count: int = 1

    @property
    def own_stream(self) -> tuple[int, ...]:
        """What tells this rank's random numbers from the others', where each draws for its share alone."""
        return () if self.count == 1 else (self.rank,)

    def first(self, work: Callable[[], T]) -> T:
        """What the work gives on rank 0, to all of them; an ExperimentError of it is raised by all."""
        if self.count == 1:
            return work()
        outcome: list[Any] = [None]
        if self.rank == 0:
            try:
                outcome = [(work(), None)]
            except ExperimentError as error:
                outcome = [(None, error)]
        dist.broadcast_object_list(outcome, src=0, device=CPU)
        value, error = outcome[0]
        if error is not None:
            error.shared = True
            raise error
        return value

    def together(self, work: Callable[[], T]) -> T:
        """What the work gives on this rank; an ExperimentError of any of them is raised by all."""
        if self.count == 1:
            return work()
        value, error = None, None
        try:
            value = work()
        except ExperimentError as own:
            error = own
        if self.most(int(error is not None)) == [1]:
            errors: list[Any] = [None] * self.count
            dist.all_gather_object(errors, error)
            error = next(each for each in errors if each is not None)
            error.shared = True
            raise error
        return value  # type: ignore[return-value]

    def in_turn(self, work: Callable[[], T]) -> T:
        """What the work gives on this rank; the others begin when rank 0 has left on the disk what it leaves there."""
        own: list[T] = []
        self.first(lambda: own.append(work()))
        return self.together(lambda: own[0] if self.rank == 0 else work())

    def sum(self, *values: float) -> list[float]:
        """Each number, summed over the ranks."""
        return self._reduced(values, torch.float64, dist.ReduceOp.SUM)

    def each(self, value: float) -> list[float]:
        """The number of every rank, in their order."""
        return self.sum(*(value if rank == self.rank else 0.0 for rank in range(self.count)))

    def most(self, *values: int) -> list[int]:
        """The largest that any rank has of each number."""
        return self._reduced(values, torch.int64, dist.ReduceOp.MAX)

    def _reduced(self, values: tuple[Any, ...], dtype: torch.dtype, how: Any) -> list[Any]:
        if self.count == 1:
            return list(values)
        tensor = torch.tensor(values, dtype=dtype)
        dist.all_reduce(tensor, how)
        return tensor.tolist()

    @contextmanager
    def entered_by_first(self, context: Callable[[], AbstractContextManager[object]]) -> Iterator[None]:
        """Rank 0 alone is in the context, and all wait until it is."""
        with ExitStack() as stack:

            def enter() -> None:
                stack.enter_context(context())

            self.first(enter)
            yield

    def share(self, images: int) -> slice:
        """Which of so many images this rank takes: as many as every other. ExperimentError if that cannot be."""
        if images % self.count:
            raise ExperimentError(
                f"schedule.batch_size is {images}, which {self.count} processes cannot share: choose a multiple of"
                f" {self.count}."
            )
        each = images // self.count
        return slice(self.rank * each, (self.rank + 1) * each)

    def wrapped(self, network: nn.Module, device: torch.device) -> nn.Module:
        """The network as it is trained: its gradients are the means over the ranks, its buffers those of rank 0."""
        if self.count == 1:
            return network
        return DistributedDataParallel(network, device_ids=[device] if device.type == "cuda" else None)

    def copy_buffers(self, network: nn.Module) -> None:
        """All ranks have the running statistics of rank 0, which is what it saves."""
        if self.count > 1:
            for buffer in network.buffers():
                dist.broadcast(buffer, src=0)


ALONE = Ranks()


def join() -> Ranks:
    """This process's place among those that torchrun has started; there is one without it."""
    if "TORCHELASTIC_RUN_ID" not in os.environ or int(os.environ["WORLD_SIZE"]) == 1:
        return ALONE
    if not dist.is_initialized():
        # Numbers of the CPU go by gloo, gradients on GPUs by NCCL.
        dist.init_process_group("cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo", timeout=PATIENCE)
        atexit.register(_leave)
    return Ranks(dist.get_rank(), dist.get_world_size())


def _leave() -> None:
    """Destroy the process group and with it its threads: one that lets go of a tensor after the interpreter aborts."""
    gc.collect()  # wrapped networks hold the group, and may lie in cycles
    dist.destroy_process_group()
