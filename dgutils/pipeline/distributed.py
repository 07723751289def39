"""Several processes on one study: torchrun's ranks share the work of a store, and sum what they have in common.

A rank is a process with a device of its own: NCCL joins GPUs, Gloo joins CPUs. Without torchrun the same code
runs in a group of one, where there is nothing to share. The ranks of a group make the same calls in the same
order; what they make does not depend on how many they are, nor on who of them made it.

A rank that dies takes its group along: torchrun starts all of them again, and what the store holds is found.
"""

import json
import logging
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

from dgutils.errors import UserError
from dgutils.paths import cores, torchrun_ranks

# Without it, ranks that start again find the addresses of those that died (PyTorch issue 135712).
_OWN_STORE = "TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1"
MAX_RESTARTS = 3  # of the group, before a failure counts
SCORED_AT_ONCE = 8  # scores that ranks work on together: enough for all to have something to do
TIMEOUT = 360.0  # minutes that ranks wait for each other: longer than any shard takes


class LostContact(RuntimeError):
    """Another rank died, or did not come in time; which of them, and why, torchrun knows."""


# --- the group


@dataclass
class Group:
    """The ranks that work together: this one's number, how many they are, and what they do in common.

    main: whether this process talks to people.
    """

    rank: int = 0
    world: int = 1
    main: bool = True
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

    def agree(self, value: bool = False) -> bool:
        """What rank 0 said; the others wait for it."""
        if self.world == 1:
            return value
        import torch

        said = torch.tensor(int(value and self.rank == 0))
        self.sum(said)
        return bool(said)

    def barrier(self) -> None:
        """Wait until all ranks are here."""
        self.agree()

    @contextmanager
    def first(self) -> Iterator[None]:
        """Rank 0 goes through the block, then the others do, and find what it left on the disk."""
        if self.rank > 0:
            self.barrier()
        yield
        if self.rank == 0:
            self.barrier()

    def compute(self, artifact, make: Callable[[Path], dict | None]):
        """artifact.compute(make) for a `make` in which all ranks take part; the files kept are rank 0's."""
        began = []

        def lead(folder):
            began.append(self.agree(True))
            return make(folder)

        if self.rank == 0:
            artifact.compute(lead)
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
    return _as(Group(main=_group.main))


@contextmanager
def join(timeout: float = TIMEOUT) -> Iterator[Group]:
    """Within this block the process is one of torchrun's ranks; without torchrun, a group of one.

    timeout: minutes after which a rank that the others wait for counts as lost.
    Raises UserError if there are more ranks on this machine than GPUs.
    """
    world = torchrun_ranks()
    if world <= 1:
        yield _group
        return
    import torch
    import torch.distributed as dist

    rank, local_rank, device = int(os.environ["RANK"]), int(os.environ["LOCAL_RANK"]), None
    if torch.cuda.is_available():
        if local_rank >= torch.cuda.device_count():
            raise UserError(f"{os.environ['LOCAL_WORLD_SIZE']} ranks, but {torch.cuda.device_count()} GPUs here:"
                            " start as many ranks as GPUs")
        device = torch.device("cuda", local_rank)
        torch.cuda.set_device(device)
    store, _, _ = next(dist.rendezvous("env://", timeout=timedelta(minutes=timeout)))
    dist.init_process_group("cpu:gloo,cuda:nccl" if device else "gloo", store=store, rank=rank, world_size=world,
                            timeout=timedelta(minutes=timeout), device_id=device)
    key = [secrets.token_hex(8)]
    dist.broadcast_object_list(key)
    with _as(Group(rank, world, rank == 0, store, key[0])) as joined:
        yield joined
        joined.barrier()  # rank 0 keeps the key-value store: it leaves last
    dist.destroy_process_group()


# --- starting ranks, and saying why they stopped


def _first_line(error: object) -> str:
    return str(error).strip().partition("\n")[0]


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

    def leave(status):
        sys.stdout.flush(), sys.stderr.flush()
        os._exit(status)  # at once: taking down a broken group may hang, or end in a message of its own

    def stop(message, kind, status):
        about = {"py_callstack": message, "timestamp": str(int(time.time()))}
        file.write_text(json.dumps({"message": {"message": message, "kind": kind, "extraInfo": about}}))
        leave(status)

    earlier = _failures(file.parents[1].with_name(f"attempt_{attempt - 1}")) if attempt else []
    if earlier and earlier[0]["kind"] == "UserError":
        stop(earlier[0]["message"], "UserError", 2)
    if attempt and os.environ["RANK"] == "0":
        why = earlier[0]["message"] if earlier else "a rank was killed"
        print(f"dgutils: {why}; start {attempt + 1} of {1 + int(os.environ['TORCHELASTIC_MAX_RESTARTS'])} goes on"
              " where it was", file=sys.stderr, flush=True)  # fmt: skip
    try:
        yield
    except UserError as error:
        stop(str(error), "UserError", 2)
    except LostContact as error:
        stop(str(error), "LostContact", 1)
    except Exception as error:
        traceback.print_exc()
        stop(f"rank {os.environ['RANK']}: {type(error).__name__}: {_first_line(error)}", "Exception", 1)
    leave(0)


def run_ranks(nproc: int, command: Sequence[str], max_restarts: int = MAX_RESTARTS) -> None:
    """Run a Python command (`-m dgutils work ...`, or a script) in `nproc` ranks on this machine, by torchrun.

    The cores are divided among the ranks unless OMP_NUM_THREADS says otherwise. Raises UserError with the one
    reason if they fail for good, KeyboardInterrupt on Ctrl-C. Call it in a process that does nothing else.
    """
    if nproc < 1:
        raise UserError(f"NPROC is {nproc}: start at least 1 rank")
    from torch.distributed.elastic.multiprocessing.api import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.run import parse_args, run

    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, cores() // nproc)))
    os.environ.setdefault(*_OWN_STORE.split("="))
    with tempfile.TemporaryDirectory() as logs:
        logging.disable()  # what torchrun would tell in many lines we tell in one
        try:
            # The ranks are on this machine, which need not be able to resolve its own name.
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


def work(profile: str, overrides: dict | None = None, timeout: float = TIMEOUT) -> None:
    """Fill the store of a profile with what its notebooks will ask for, in one process or as one of many ranks.

    In order: the images that discriminators learn from, the trainings, and, a few at a time so that what is drawn is
    soon scored, the arms of the notebooks, their features, their scores. Images and features are dealt in shards, a
    training in parts of its batches if it has any, else, as scores are, as a whole.
    """
    with reporting(), join(timeout) as ranks:
        from dgutils import datasets
        from dgutils.pipeline import jobs, notebooks
        from dgutils.pipeline.store import Artifact, ShardedSet
        from dgutils.pipeline.study import Study

        study = Study.from_parameters(values := notebooks.every_parameter(profile, overrides))
        if not ranks.main:
            study.store.log = lambda line: print(line, file=sys.stderr) if line.startswith("QUARANTINED") else None
        with ranks.first():  # who comes first may have to download
            for split in ("train", "test"):
                datasets.load_dataset(study.dataset, split)
        dry, lacking = Study.from_parameters(values), set()  # first by name alone
        dry.__dict__["store"] = jobs.open_store(profile, dry=True)
        for images, space in dry.scored(values):
            if ranks.agree(dry.lacks(images, space)):
                images.ensure()
                lacking.add((images.digest, space))
        for trained in dry.looked_into():
            trained.ensure()
        trainings = {what.digest: (what, make) for what, make in dry.store.asked if isinstance(what, Artifact)}
        drawn = {what.artifact.digest for what, _ in dry.store.asked if isinstance(what, ShardedSet)}
        for images in study.learnt():
            if ranks.agree(images.rows.artifact.digest in drawn):
                images.ensure()
        if study.training_parts == 1:  # else each is all ranks' work, as the arms ask for it
            for wait in (False, True):  # first what is free, then what another run is computing
                for _, (artifact, make) in ranks.deal(list(trainings.values())):
                    with alone():
                        artifact.obtain(make, wait)
            ranks.barrier()
        scored = [(images, space) for images, space in study.scored(values) if (images.digest, space) in lacking]
        for space in study.feature_spaces if scored else ():
            jobs.statistics(study.store, study.reference, space)
        for some in (scored[i : i + SCORED_AT_ONCE] for i in range(0, len(scored), SCORED_AT_ONCE)):
            for images, _ in some:
                images.ensure()
            for images, space in some:
                jobs.features(study.store, images, space)
            for _, (images, space) in ranks.deal(some):
                with alone():
                    study.scores(images, space)
            ranks.barrier()


# --- many machines

_SLURM = """\
#!/bin/bash
# Written by `python -m dgutils launch`; for sbatch, in the clone's folder, which all nodes must see, with its
# environment, data and weights in place. A job that is preempted, or whose time is up, is queued again and goes
# on where it was: runs/{profile} holds what is done.
{options}
set -euo pipefail

export OMP_NUM_THREADS={threads} {own_store}
again() {{
    echo "dgutils: the time is up; queueing job $SLURM_JOB_ID again"
    scontrol requeue "$SLURM_JOB_ID"
}}
trap again USR1

# In the background, since bash runs no trap while it waits for a command in front.
step() {{
    srun --kill-on-bad-exit=1 --cpus-per-task="$SLURM_CPUS_PER_TASK" "$@" &
    wait $!
}}

# Slurm starts one torchrun a node, torchrun one rank a GPU; then the notebooks find everything, in one process.
step .venv/bin/python -m torch.distributed.run --nnodes={nodes} --nproc-per-node={gpus} --max-restarts={restarts} \\
    --rdzv-backend=c10d --rdzv-endpoint="$(hostname):$((20000 + SLURM_JOB_ID % 10000))" \\
    --rdzv-id="$SLURM_JOB_ID.${{SLURM_RESTART_COUNT:-0}}" -m dgutils work --profile {profile}
step --nodes=1 --ntasks=1 .venv/bin/python -m dgutils reproduce --profile {profile}
"""


def launch(profile: str, nodes: int, gpus_per_node: int, cpus_per_gpu: int = 8, limit: str = "24:00:00",
           sbatch: Sequence[str] = ()) -> str:  # fmt: skip
    """A Slurm script that runs a profile on many nodes: torchrun under srun, queued again when it is preempted.

    limit: of time, as Slurm writes it. sbatch: more of its options, such as "account=abc", without the dashes.
    Raises UserError for an unknown profile and for what Slurm would not read.
    """
    from dgutils.pipeline.notebooks import load_profile

    load_profile(profile)
    for name, value in (("nodes", nodes), ("GPUs per node", gpus_per_node), ("CPUs per GPU", cpus_per_gpu)):
        if value < 1:
            raise UserError(f"{value} {name}: give at least 1")
    if not re.fullmatch(r"(\d+-)?\d+(:\d+){0,2}", limit):
        raise UserError(f"time {limit!r}: write hours:minutes:seconds, or days-hours, as Slurm does")
    for option in sbatch:
        if not re.fullmatch(r"[a-z][a-z-]*(=\S+)?", option):
            raise UserError(f"sbatch option {option!r}: write name=value, without dashes in front or spaces")
    options = [f"job-name=dgutils-{profile}", f"nodes={nodes}", "ntasks-per-node=1", f"gpus-per-node={gpus_per_node}",
               f"cpus-per-task={gpus_per_node * cpus_per_gpu}", f"time={limit}", "requeue", "signal=B:USR1@300",
               "open-mode=append", f"output=dgutils-{profile}-%j.log", *sbatch]  # fmt: skip
    return _SLURM.format(
        profile=profile, nodes=nodes, gpus=gpus_per_node, threads=cpus_per_gpu, restarts=MAX_RESTARTS,
        own_store=_OWN_STORE, options="\n".join(f"#SBATCH --{option}" for option in options),
    )  # fmt: skip
