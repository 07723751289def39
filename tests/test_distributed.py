"""Ranks under torchrun, joined by Gloo on the CPU: what they make is what one process makes, whatever happens."""

import json
import os
import shutil
import signal
import subprocess
import sys
import textwrap
import time
from datetime import timedelta
from pathlib import Path

import numpy as np
import psutil
import pytest
import test_jobs as tiny
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st

from dgutils.errors import UserError
from dgutils.networks.adm import EncoderUNet
from dgutils.pipeline import jobs, ranks
from dgutils.pipeline.store import Store
from dgutils.training import sum_gradients

IMAGES = 80  # ten shards


# --- what a rank does: torchrun starts this file


def learn(folder):
    """A head is trained on batches in three parts: of four ranks one has none. The last batch is of two images."""
    group, head = ranks.group(), tiny.random_network(EncoderUNet, tiny.HEAD, 0).requires_grad_()
    optimizer = torch.optim.Adam(head.parameters(), 1e-2)
    x = torch.from_numpy(np.random.default_rng(0).normal(size=(50, 16, 4, 4))).float()
    label, time = (x.mean((1, 2, 3)) > 0).float(), torch.full((50,), 0.5)

    def step(rows):
        def backward(part):
            if len(mine := rows.tensor_split(3)[part]):
                logit = head(x[mine], time[mine])[:, 0]
                (F.binary_cross_entropy_with_logits(logit, label[mine], reduction="sum") / len(rows)).backward()

        sum_gradients(head.parameters(), 3, backward, group)
        optimizer.step()

    for rows in torch.arange(50).split(16):
        step(rows)
    np.save(folder / f"weights_{group.rank}.npy", np.concatenate([p.detach().ravel() for p in head.parameters()]))


def small_study(folder):
    """A little of every step that ranks share; the rank that a file names, if any, is killed in its second shard."""
    drawn, calls = jobs.drawn, []

    def deadly(*arguments):
        calls.append(arguments)
        doomed = folder / "die"
        if len(calls) == 2 and doomed.exists() and doomed.read_text() == os.environ.get("RANK"):
            finished = folder.glob("generate/*/shard_?????/manifest.json")  # without those in the making, shard_*.tmp
            done = {str(path): path.stat().st_mtime_ns for path in finished}
            (folder / "died").write_text(json.dumps(done))
            doomed.unlink()
            os.kill(os.getpid(), signal.SIGKILL)
        return drawn(*arguments)

    jobs.drawn, jobs.FEATURE_SHARD = deadly, 16
    store = Store(folder, lambda line: None)
    images = jobs.ImageSet(store, tiny.sampling(), IMAGES).ensure()
    jobs.Trained(store, tiny.training(), jobs.ImageSet(store, tiny.sampling(), 40).ensure()).ensure()
    for of in (images, jobs.RealSet("fashion_mnist", "test", 50)):
        jobs.features(store, of, "tiny")
    learn(folder)
    jobs.drawn = drawn


def complain(folder):
    """Rank 1 meets what the user must mend, while rank 0 waits for it."""
    with open(folder / "starts", "a") as file:
        file.write(f"{os.environ['RANK']}\n")
    if os.environ["RANK"] == "1":
        raise UserError("there is no such thing")
    ranks.group().barrier()


def break_down(folder):
    """Rank 1 fails as programs do."""
    if os.environ["RANK"] == "1":
        raise ZeroDivisionError("of all numbers")
    ranks.group().barrier()


def dawdle(folder):
    """Rank 1 never comes."""
    (folder / f"ready_{os.environ['RANK']}").touch()
    if os.environ["RANK"] == "1":
        time.sleep(600)
    ranks.group().barrier()


def run_out_of_time(folder):
    """The time of rank 0 alone is up in its second shard; all ranks stop."""
    group, drawn, calls = ranks.group(), jobs.drawn, []

    def slow(*arguments):
        calls.append(arguments)
        if len(calls) == 2 and group.rank == 0:
            group.deadline = time.monotonic()
        return drawn(*arguments)

    jobs.drawn = slow
    with pytest.raises(ranks.TimeUp):
        jobs.ImageSet(Store(folder, lambda line: None), tiny.sampling(), IMAGES).ensure()
    (folder / f"stopped_{group.rank}").touch()
    jobs.drawn = drawn


def be_a_rank(what, folder, minutes):
    with ranks.reporting():
        tiny.use_tiny_networks(pytest.MonkeyPatch())
        ranks.PATIENCE = timedelta(minutes=float(minutes))
        with ranks.join():
            globals()[what](Path(folder))


if __name__ == "__main__":
    be_a_rank(*sys.argv[1:])


# --- the tests


@pytest.fixture(autouse=True)
def surroundings(monkeypatch):
    """What torchrun changes in the process that starts it, put back."""
    tiny.use_tiny_networks(monkeypatch)
    monkeypatch.setattr(jobs, "FEATURE_SHARD", jobs.FEATURE_SHARD)
    handlers, environment = [(s, signal.getsignal(s)) for s in (signal.SIGINT, signal.SIGTERM)], dict(os.environ)
    yield
    for number, handler in handlers:
        signal.signal(number, handler)
    os.environ.clear()
    os.environ.update(environment)


def run(nproc, what, folder, restarts=0, minutes=5.0):
    ranks.run_ranks(nproc, [__file__, what, str(folder), str(minutes)], restarts)


@pytest.fixture(scope="module")
def alone(tmp_path_factory):
    """The store of one process that nobody interrupts."""
    with pytest.MonkeyPatch.context() as patch:
        tiny.use_tiny_networks(patch)
        patch.setattr(jobs, "FEATURE_SHARD", 16)
        small_study(folder := tmp_path_factory.mktemp("alone"))
    return folder


def arrays(folder, step):
    """Every array of a step, by its path."""
    return {str(path.relative_to(folder)): np.load(path) for path in sorted(folder.glob(f"{step}/**/*.npy"))}


@pytest.mark.parametrize("nproc, killed", [(2, 0), (2, 1), (4, None)])
def test_ranks_make_what_one_process_makes(alone, tmp_path, nproc, killed):
    """Same images, features and weights, bit by bit, also if a rank is killed in mid-shard.

    The restarted ranks find every shard that was whole when it died: none is made again.
    """
    if killed is not None:
        (tmp_path / "die").write_text(str(killed))
    run(nproc, "small_study", tmp_path, restarts=1)
    if killed is not None:
        done = json.loads((tmp_path / "died").read_text())
        assert done and {name: Path(name).stat().st_mtime_ns for name in done} == done
    for step in ("generate", "features"):
        one, many = arrays(alone, step), arrays(tmp_path, step)
        assert one.keys() == many.keys() and len(one) > 5
        assert all(np.array_equal(one[name], many[name]) for name in one), step
    weights = [np.load(tmp_path / f"weights_{rank}.npy") for rank in range(nproc)]
    assert all(np.array_equal(np.load(alone / "weights_0.npy"), learnt) for learnt in weights)


@pytest.mark.parametrize("nproc", [1, 2])
def test_when_the_time_is_up_all_ranks_stop_between_shards_and_what_is_done_stays(alone, tmp_path, nproc):
    run(nproc, "run_out_of_time", tmp_path)
    assert len(list(tmp_path.glob("stopped_*"))) == nproc
    done = arrays(tmp_path, "generate")
    assert 2 <= len(done) < IMAGES / 8 and not list(tmp_path.glob("**/*.tmp"))
    lines = []
    assert jobs.ImageSet(Store(tmp_path, lines.append), tiny.sampling(), IMAGES).ensure().n == IMAGES
    assert f"{len(done)} of 10 shards stored" in lines[0]
    whole = arrays(alone, "generate")
    assert all(np.array_equal(whole[name], array) for name, array in arrays(tmp_path, "generate").items())


def test_when_the_time_is_up_training_stops_between_epochs_and_goes_on_to_the_same_bits(tmp_path, monkeypatch):
    store, whole = (Store(tmp_path / name, lambda line: None) for name in ("stopped", "whole"))
    fakes, save = jobs.ImageSet(store, tiny.sampling(), 40).ensure(), Store.save_partial

    def saved_late(*arguments):
        save(*arguments)
        ranks.group().deadline = time.monotonic()

    with monkeypatch.context() as patch, pytest.raises(ranks.TimeUp):
        patch.setattr(Store, "save_partial", saved_late)
        jobs.Trained(store, tiny.training(), fakes).ensure()
    assert len(list((store.root / "partial").iterdir())) == 1 and not list(store.root.glob("train/*"))
    heads = [jobs.Trained(s, tiny.training(), jobs.ImageSet(s, tiny.sampling(), 40))._tensors
             for s in (store, whole)]
    assert all(torch.equal(tensor, heads[1][name]) for name, tensor in heads[0].items())


def test_gradients_in_parts_add_up_to_the_whole():
    x, w = torch.arange(6.0).reshape(3, 2), torch.ones(2, requires_grad=True)
    sum_gradients([w], 3, lambda part: (x[part] @ w).backward(), ranks.group())
    assert torch.equal(w.grad, x.sum(0))


def test_what_the_user_must_mend_is_said_once_and_not_tried_again(tmp_path, capfd):
    with pytest.raises(UserError, match="^there is no such thing$"):
        run(2, "complain", tmp_path, restarts=1)
    assert sorted((tmp_path / "starts").read_text().split()) == ["0", "1"]  # the second start stopped at once
    captured = capfd.readouterr()
    assert captured.out + captured.err == ""  # the one line is the caller's to print


def test_rank_that_does_not_come_in_time_is_said(tmp_path, capfd):
    with pytest.raises(UserError, match=r"^rank 0 lost contact with the others \(Timed out"):
        run(2, "dawdle", tmp_path, minutes=0.02)
    assert capfd.readouterr().err == ""


def test_ctrl_c_stops_all_ranks(tmp_path):
    """As `make` gets it from the terminal: the parent hears it, its ranks live in sessions of their own."""
    code = textwrap.dedent(f"""
        import sys
        from dgutils.pipeline import ranks
        try:
            ranks.run_ranks(2, [{__file__!r}, "dawdle", {str(tmp_path)!r}, "5"])
        except KeyboardInterrupt:
            sys.exit(130)
    """)
    parent = subprocess.Popen([sys.executable, "-c", code], stderr=subprocess.PIPE, text=True)
    while len(list(tmp_path.glob("ready_*"))) < 2 and parent.poll() is None:
        time.sleep(0.05)
    ranks = psutil.Process(parent.pid).children(recursive=True)
    parent.send_signal(signal.SIGINT)
    _, said = parent.communicate(timeout=60)
    assert parent.returncode == 130 and said == "", said
    assert len(ranks) == 2 and not any(rank.is_running() for rank in ranks)


@pytest.fixture
def rank_files(tmp_path, monkeypatch):
    """The error file of rank 0 at a start of the group, as torchrun's agent hands it out."""

    def at_start(attempt):
        file = tmp_path / f"attempt_{attempt}" / "0" / "error.json"
        file.parent.mkdir(parents=True, exist_ok=True)
        monkeypatch.setenv("RANK", "0")
        monkeypatch.setenv("WORLD_SIZE", "1")
        for name, value in (("RUN_ID", 1), ("RESTART_COUNT", attempt), ("MAX_RESTARTS", 3), ("ERROR_FILE", file)):
            monkeypatch.setenv(f"TORCHELASTIC_{name}", str(value))
        monkeypatch.setattr(os, "_exit", sys.exit)
        return file

    return at_start


@pytest.mark.parametrize(
    ("error", "status", "message", "printed", "again"),
    [
        (UserError("mend this"), 2, "mend this", "", False),
        (ranks.LostContact("nobody there"), 1, "nobody there", "", True),
        (ZeroDivisionError("of all"), 1, "rank 0: ZeroDivisionError: of all", "Traceback", True),
    ],
)
def test_why_a_rank_stopped_is_left_for_torchrun(rank_files, capsys, error, status, message, printed, again):
    file, began = rank_files(0), []
    with pytest.raises(SystemExit) as stopped, ranks.reporting():
        raise error
    assert stopped.value.code == status and json.loads(file.read_text())["message"]["message"] == message
    assert capsys.readouterr().err.startswith(printed)
    rank_files(1)
    with pytest.raises(SystemExit) as stopped, ranks.reporting():
        began.append(True)
    assert bool(began) == again and stopped.value.code == (0 if again else 2)  # it never leaves the block
    assert capsys.readouterr().err == (f"dgutils: {message}; start 2 of 4 goes on where it was\n" if again else "")


def test_group_of_one_has_nothing_to_share():
    one, x = ranks.group(), torch.ones(3)
    one.sum(x)
    one.barrier()
    assert list(one.deal("ab")) == [(0, "a"), (1, "b")] and (x == 1).all() and one.agree(True) and not one.agree()
    assert one.slice(7) == slice(0, 7)


@given(n=st.integers(0, 500), world=st.integers(1, 40))
def test_slices_of_all_ranks_are_the_rows_in_order(n, world):
    parts = [list(range(n))[ranks.Group(rank, world).slice(n)] for rank in range(world)]
    assert sum(parts, []) == list(range(n)) and max(map(len, parts)) - min(map(len, parts)) <= 1


# --- many machines


SCRIPT = Path(__file__).parents[1] / "docs" / "slurm.sbatch"


def test_slurm_script_is_bash():
    subprocess.run(["bash", "-n", SCRIPT], check=True)
    if shellcheck := shutil.which("shellcheck"):
        subprocess.run([shellcheck, SCRIPT], check=True)
    text = SCRIPT.read_text()
    assert text.startswith("#!/bin/bash\n") and text.rindex("#SBATCH") < text.index("set -euo")


@pytest.mark.parametrize("fails", [False, True])
def test_slurm_script_runs_the_ranks_then_the_notebooks(tmp_path, fails):
    """With stand-ins for Slurm's commands; what fails ends the job."""
    done = slurm(tmp_path, f"echo \"$@\" >>{tmp_path}/log; exit {int(fails)}").wait(timeout=20)
    steps = (tmp_path / "log").read_text().splitlines()
    assert done == int(fails) and len(steps) == 2 - fails
    assert "torch.distributed.run --nnodes=2 --nproc-per-node=4" in steps[0] and "--rdzv-id=77.0 " in steps[0]
    assert steps[0].endswith("-m dgutils work --profile paper")
    assert fails or steps[1].endswith("-m dgutils reproduce --profile paper")


def test_slurm_script_queues_itself_again_when_its_time_is_up(tmp_path):
    job = slurm(tmp_path, f"touch {tmp_path}/begun; exec sleep 1")
    while not (tmp_path / "begun").exists():
        time.sleep(0.01)
    job.send_signal(signal.SIGUSR1)
    assert job.wait(timeout=20) != 0 and (tmp_path / "scontrol").read_text() == "requeue 77\n"


def slurm(folder, srun):
    """Start a job script with an `srun` that does this, and an `scontrol` that notes what it was told."""
    for name, body in (("srun", srun), ("scontrol", f"echo \"$@\" >{folder}/scontrol")):
        (folder / "bin").mkdir(exist_ok=True)
        (folder / "bin" / name).write_text(f"#!/bin/bash\n{body}\n")
        (folder / "bin" / name).chmod(0o755)
    environment = {"PATH": f"{folder}/bin:{os.environ['PATH']}", "SLURM_JOB_ID": "77", "SLURM_CPUS_PER_TASK": "32",
                   "SLURM_JOB_NUM_NODES": "2", "SLURM_GPUS_ON_NODE": "4"}
    return subprocess.Popen(["bash", SCRIPT], env=environment)


def test_no_ranks_at_all_is_a_mistake():
    with pytest.raises(UserError, match="NPROC is 0"):
        ranks.run_ranks(0, [])
