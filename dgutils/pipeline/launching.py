"""Starting ranks by torchrun, and saying in one line why they stopped.

A rank that dies takes its group along: torchrun starts all of them again, and what the store holds is found.
"""

import json
import logging
import os
import signal
import sys
import tempfile
import time
import traceback
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from dgutils.errors import UserError
from dgutils.paths import cores, torchrun_ranks
from dgutils.pipeline.ranks import LostContact, first_line

MAX_RESTARTS = 3  # of the group, before a failure counts


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
            message = f"rank {os.environ['RANK']}: {kind}: {first_line(error)}"
        about = {"py_callstack": message, "timestamp": str(int(time.time()))}
        file.write_text(json.dumps({"message": {"message": message, "kind": kind, "extraInfo": about}}))
    sys.stdout.flush(), sys.stderr.flush()
    os._exit(status)  # at once: taking down a broken group may hang, or end in a message of its own


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
            raise UserError(f"rank {rank}: {first_line(failure.message)}, {max_restarts} restarts were of no use;"
                            " the same command goes on where it was") from None
        except SignalException as error:
            if error.sigval == signal.SIGINT:
                raise KeyboardInterrupt from None
            sys.exit(128 + error.sigval)
        finally:
            logging.disable(logging.NOTSET)
