"""Several processes on one study: torchrun's ranks share the work of a store, and sum what they have in common.

A rank is a process with a GPU of its own, joined by NCCL, or with a share of the GPUs or cores, joined by Gloo; without
torchrun there is a group of one. Ranks make the same calls in the same order; what they make depends neither on their
number nor on who made it.
A rank that dies takes its group along: torchrun starts all of them again, and what the store holds is found.
"""

import json
import logging
import math
import os
import re
import secrets
import signal
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import timedelta
from pathlib import Path
from typing import Any

from dgutils.errors import UserError, require
from dgutils.paths import cores, torchrun_ranks

MAX_RESTARTS = 3  # of the group, before a failure counts
PATIENCE = timedelta(hours=6)  # after which a rank that others wait for counts as lost: longer than any shard takes


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
        if self.world > 1:
            import torch

            self.sum(value := torch.tensor(int(value)))
        return bool(value)

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
            reason = re.sub(r"^\[[^]]*\] *", "", _first_line(error))  # without the place in torch's sources
            raise LostContact(f"rank {self.rank} lost contact with the others ({reason})") from error


def _first_line(error: object) -> str:
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
def join(minutes: float | None = None) -> Iterator[Group]:
    """Within this block the process is one of torchrun's ranks; without torchrun, a group of one.

    minutes: after which nothing new is begun (None: no limit). More ranks than GPUs share them: what a small network
    leaves idle, another rank uses.
    """
    deadline = math.inf if minutes is None else time.monotonic() + 60 * minutes
    if (world := torchrun_ranks()) <= 1:
        with _as(Group(deadline=deadline)) as one:
            yield one
        return
    import torch
    import torch.distributed as dist

    rank, local_rank, backend, device = int(os.environ["RANK"]), int(os.environ["LOCAL_RANK"]), "gloo", None
    if gpus := torch.cuda.device_count():
        torch.cuda.set_device(local_rank % gpus)
        if int(os.environ["LOCAL_WORLD_SIZE"]) <= gpus:  # NCCL refuses ranks that share one
            backend, device = "cpu:gloo,cuda:nccl", torch.device("cuda", local_rank)
    store, _, _ = next(dist.rendezvous("env://", timeout=PATIENCE))
    dist.init_process_group(backend, store=store, rank=rank, world_size=world, timeout=PATIENCE, device_id=device)
    key = [secrets.token_hex(8)]
    dist.broadcast_object_list(key)
    with _as(Group(rank, world, rank == 0, deadline, store, key[0])) as joined:
        yield joined
        joined.barrier()  # rank 0 keeps the key-value store: it leaves last
    dist.destroy_process_group()


# --- starting ranks, and saying in one line why they stopped


def _failures(folder: Path) -> list[dict]:
    """What the ranks of one start left in torchrun's error files: {"message", "kind"}, the cause before its effects."""
    found = [json.loads(path.read_text())["message"] for path in sorted(folder.glob("*/error.json"))]
    return sorted(found, key=lambda failure: failure["kind"] == "LostContact")


@contextmanager
def reporting() -> Iterator[None]:
    """Under torchrun, leave why this rank stopped where its agent shows it, and exit with a status.

    A UserError would come again: the ranks that torchrun starts after one repeat it and stop at once. The process ends
    with the block: where Gloo was used, Python's own way out aborts now and then ("terminate called without an active
    exception"), and a rank that had done its work would count as failed.
    """
    if not (torchrun_ranks() and os.environ.get("TORCHELASTIC_ERROR_FILE")):
        yield
        return
    file, attempt = Path(os.environ["TORCHELASTIC_ERROR_FILE"]), int(os.environ["TORCHELASTIC_RESTART_COUNT"])
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # who sent it to torchrun hears from torchrun
    status = 0
    try:
        earlier = _failures(file.parents[1].with_name(f"attempt_{attempt - 1}")) if attempt else []
        if earlier and earlier[0]["kind"] == "UserError":
            raise UserError(earlier[0]["message"])
        if attempt and os.environ["RANK"] == "0":
            why = earlier[0]["message"] if earlier else "a rank was killed"
            print(f"dgutils: {why}; start {attempt + 1} of {1 + int(os.environ['TORCHELASTIC_MAX_RESTARTS'])} goes on"
                  " where it was", file=sys.stderr, flush=True)  # fmt: skip
        yield
    except Exception as error:
        kind, message, status = type(error).__name__, str(error), 2 if isinstance(error, UserError) else 1
        if not isinstance(error, UserError | LostContact):
            traceback.print_exc()
            message = f"rank {os.environ['RANK']}: {kind}: {_first_line(error)}"
        about = {"py_callstack": message, "timestamp": str(int(time.time()))}
        file.write_text(json.dumps({"message": {"message": message, "kind": kind, "extraInfo": about}}))
    sys.stdout.flush(), sys.stderr.flush()
    os._exit(status)  # at once: taking down a broken group may hang, or end in a message of its own


def run_ranks(nproc: int, command: Sequence[str], max_restarts: int = MAX_RESTARTS) -> None:
    """Run a Python command (`-m dgutils work ...`, or a script) in `nproc` ranks on this machine, by torchrun.

    The cores are divided among the ranks unless OMP_NUM_THREADS says otherwise. Raises UserError with the one
    reason if they fail for good, KeyboardInterrupt on Ctrl-C. Call it in a process that does nothing else.
    """
    require(nproc > 0, f"NPROC is {nproc}: start at least 1 rank")
    from torch.distributed.elastic.multiprocessing.api import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.run import parse_args, run

    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, cores() // nproc)))
    os.environ.setdefault("TORCH_DISABLE_SHARE_RDZV_TCP_STORE", "1")  # else they find dead ranks (PyTorch issue 135712)
    # The ranks meet on the loopback device: a machine need not be able to resolve its own name.
    os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo0" if sys.platform == "darwin" else "lo")
    with tempfile.TemporaryDirectory() as logs:
        logging.disable()  # what torchrun would tell in many lines we tell in one
        try:
            run(parse_args(["--standalone", "--local-addr=127.0.0.1", f"--nproc-per-node={nproc}",
                            f"--max-restarts={max_restarts}", f"--log-dir={logs}", *command]))  # fmt: skip
        except ChildFailedError as error:
            if told := _failures(max(Path(logs).glob("*/attempt_*"), key=lambda path: int(path.name[8:]))):
                raise UserError(told[0]["message"]) from None
            rank, failure = error.get_first_failure()
            raise UserError(f"rank {rank}: {_first_line(failure.message)}, {max_restarts} restarts were of no use;"
                            " the same command goes on where it was") from None
        except SignalException as error:
            if error.sigval == signal.SIGINT:
                raise KeyboardInterrupt from None
            sys.exit(128 + error.sigval)
        finally:
            logging.disable(logging.NOTSET)
