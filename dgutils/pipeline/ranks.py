"""Several processes on one study: torchrun's ranks share the work of a store, and sum what they have in common.

A rank is a process with a GPU of its own, joined by NCCL, or with a share of the GPUs or cores, joined by Gloo; without
torchrun there is a group of one. Ranks make the same calls in the same order; what they make depends neither on their
number nor on who made it.
"""

import math
import os
import re
import secrets
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import timedelta
from pathlib import Path
from typing import Any

from dgutils.paths import torchrun_ranks

TIMEOUT = 360.0  # minutes that ranks wait for each other: longer than any shard takes


class LostContact(RuntimeError):
    """Another rank died, or did not come in time; which of them, and why, torchrun knows."""


class TimeUp(Exception):
    """The minutes that were given are over; raised between shards, epochs and scores, on all ranks of a group."""


@dataclass
class Group:
    """The ranks that work together: this one's number, how many they are, and what they do in common."""

    rank: int = 0
    world: int = 1
    main: bool = True  # whether this process talks to people
    deadline: float = math.inf  # of time.monotonic(), after which nothing new is begun
    store: Any = None  # torchrun's key-value store
    key: str = ""  # tells this start of the group from earlier ones in the key-value store
    deals: int = field(default=0, init=False)

    def deal(self, items: Sequence) -> Iterator[tuple[int, Any]]:
        """(position, item) in order, each to the rank that asks first, so that fast ranks take more.

        A counter in torchrun's store says whose turn it is: no file lock is needed across machines.
        """
        self.deals += 1
        if self.world == 1:
            yield from enumerate(items)
            return
        while (position := self._talk(self.store.add, f"{self.key}/{self.deals}", 1) - 1) < len(items):
            yield position, items[position]

    def slice(self, n: int) -> slice:
        """This rank's part of n rows; the ranks' parts follow each other, of almost equal length."""
        return slice(n * self.rank // self.world, n * (self.rank + 1) // self.world)

    def sum(self, *tensors) -> None:
        """Replace each tensor by its sum over all ranks, the same bits on all; one message for each dtype."""
        if self.world == 1:
            return
        import torch

        for dtype in dict.fromkeys(tensor.dtype for tensor in tensors):
            alike = [tensor for tensor in tensors if tensor.dtype == dtype]
            flat = torch.cat([tensor.reshape(-1) for tensor in alike])
            self._talk(torch.distributed.all_reduce, flat)
            for tensor, total in zip(alike, flat.split([tensor.numel() for tensor in alike]), strict=True):
                tensor.copy_(total.view_as(tensor))

    def any(self, value: bool) -> bool:
        """Whether one of the ranks says so; all wait for each other."""
        if self.world == 1:
            return value
        import torch

        said = torch.tensor(int(value))
        self.sum(said)
        return bool(said)

    def agree(self, value: bool = False) -> bool:
        """What rank 0 said; the others wait for it."""
        return self.any(value and self.rank == 0)

    def barrier(self) -> None:
        """Wait until all ranks are here."""
        self.any(False)

    @property
    def late(self) -> bool:
        """Whether this rank's time is up."""
        return time.monotonic() > self.deadline

    def stop_if_late(self) -> None:
        """Wait until all ranks are here; if the time is up for one of them, raise TimeUp on all."""
        if self.any(self.late):
            raise TimeUp

    @contextmanager
    def first(self) -> Iterator[None]:
        """Rank 0 goes through the block, then the others do, and find what it left on the disk."""
        if self.rank > 0:
            self.barrier()
        yield
        if self.rank == 0:
            self.barrier()

    def ensure(self, artifact, make: Callable[[Path], dict | None]):
        """artifact.ensure(make) for a `make` in which all ranks take part; the files that stay are rank 0's."""
        began = []

        def lead(folder):
            began.append(self.agree(True))
            return make(folder)

        if self.rank == 0:
            artifact.ensure(lead)
            if not began:
                self.agree(False)
        elif self.agree():
            with tempfile.TemporaryDirectory() as folder:
                make(Path(folder))
        self.barrier()
        return artifact

    def _talk(self, call, *args):
        """A call to other ranks; when they do not answer, LostContact."""
        try:
            return call(*args)
        except RuntimeError as error:
            reason = re.sub(r"^\[[^]]*\] *", "", first_line(error))  # without the place in torch's sources
            raise LostContact(f"rank {self.rank} lost contact with the others ({reason})") from error


def first_line(error: object) -> str:
    """The first line of an error's text."""
    return str(error).strip().partition("\n")[0]


_group = Group()


def group() -> Group:
    """The group that this process belongs to: of one, unless it joined torchrun's."""
    return _group


@contextmanager
def _as(new: Group) -> Iterator[Group]:
    global _group
    old, _group = _group, new
    try:
        yield new
    finally:
        _group = old


def alone():
    """Within this block the process waits for no other: for work that is one rank's from beginning to end."""
    return _as(Group(main=_group.main, deadline=_group.deadline))


@contextmanager
def join(timeout: float = TIMEOUT, minutes: float | None = None) -> Iterator[Group]:
    """Within this block the process is one of torchrun's ranks; without torchrun, a group of one.

    timeout: minutes after which a rank that the others wait for counts as lost. minutes: after which nothing new is
    begun (None: no limit). More ranks than GPUs share them: what a small network leaves idle, another rank uses.
    """
    deadline = math.inf if minutes is None else time.monotonic() + 60 * minutes
    world = torchrun_ranks()
    if world <= 1:
        with _as(Group(deadline=deadline)) as alone:
            yield alone
        return
    import torch
    import torch.distributed as dist

    rank, local_rank, device = int(os.environ["RANK"]), int(os.environ["LOCAL_RANK"]), None
    backend = "gloo"
    if gpus := torch.cuda.device_count():
        torch.cuda.set_device(local_rank % gpus)
        if int(os.environ["LOCAL_WORLD_SIZE"]) <= gpus:  # NCCL refuses ranks that share one
            backend, device = "cpu:gloo,cuda:nccl", torch.device("cuda", local_rank)
    store, _, _ = next(dist.rendezvous("env://", timeout=timedelta(minutes=timeout)))
    dist.init_process_group(backend, store=store, rank=rank, world_size=world, timeout=timedelta(minutes=timeout),
                            device_id=device)
    key = [secrets.token_hex(8)]
    dist.broadcast_object_list(key)
    with _as(Group(rank, world, rank == 0, deadline, store, key[0])) as joined:
        yield joined
        joined.barrier()  # rank 0 keeps the key-value store: it leaves last
    dist.destroy_process_group()
