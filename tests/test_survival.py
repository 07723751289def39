"""What a run has done survives kills, full disks, lost rights and other runs; what is damaged is never used."""

import inspect
import json
import os
import subprocess
import sys
import tempfile
from collections import Counter
from pathlib import Path

import nbformat
import numpy as np
import pytest
import test_jobs as tiny
import torch
from ledgers import blank_ledger
from matplotlib.figure import Figure
from nbformat import v4

from dgutils.errors import UserError
from dgutils.networks import checkpoints
from dgutils.pipeline import jobs
from dgutils.pipeline.notebooks import run_profile
from dgutils.pipeline.store import Store, digest_of_file, save_array
from dgutils.results import plots
from dgutils.results.records import load_results

HERE = Path(__file__).parent
NOBODY = 65534


def test_killed_stages_go_on_to_the_same_bits(tmp_path):
    """Ten kills that hit, two of them in each stage; `python tests/kill_points.py` does fifty."""
    result = subprocess.run([sys.executable, HERE / "kill_points.py", "--points", "10", "--json", tmp_path / "rows"],
                            capture_output=True, text=True, timeout=1200)
    assert result.returncode == 0, result.stdout + result.stderr[-2000:]
    rows = json.loads((tmp_path / "rows").read_text())
    assert all(row["same"] for row in rows)
    assert Counter(row["stage"] for row in rows if row["hit"]) == dict.fromkeys(
        ("sampling", "training", "features", "report", "notebook"), 2)
    assert sum(row["hit"] and row["left"] > 0 for row in rows) >= 5  # and found work to go on with


# --- damaged state of unfinished work


@pytest.mark.parametrize("damage", [lambda data: data[:-1], lambda data: data[:-1] + bytes([data[-1] ^ 1]),
                                    lambda data: b"", lambda data: b"x" * len(data)],
                         ids=["cut", "flipped", "empty", "foreign"])
def test_damaged_training_checkpoint_is_quarantined_and_training_begins_again(tmp_path, monkeypatch, damage):
    tiny.use_tiny_networks(monkeypatch)
    lines = []
    store = Store(tmp_path, lines.append)
    fakes, save = jobs.ImageSet(store, tiny.sampling(), 40).ensure(), Store.save_partial

    def killed(store, name, data):
        save(store, name, data)
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(Store, "save_partial", killed)
        jobs.Trained(store, tiny.training(), fakes).ensure()
    (checkpoint,) = (tmp_path / "partial").iterdir()
    damaged = damage(checkpoint.read_bytes())
    checkpoint.write_bytes(damaged)
    trained = jobs.Trained(store, tiny.training(), fakes).ensure()
    assert sum("QUARANTINED train-" in line and "beginning it again" in line for line in lines) == 1
    assert [path.read_bytes() for path in (tmp_path / "quarantine").iterdir()] == [damaged]
    whole = Store(tmp_path / "whole", lines.append)
    again = jobs.Trained(whole, tiny.training(), jobs.ImageSet(whole, tiny.sampling(), 40).ensure()).ensure()
    assert digest_of_file(trained.artifact.path / "heads.safetensors") == \
        digest_of_file(again.artifact.path / "heads.safetensors")


# --- a full disk


@pytest.fixture
def small_disk(tmp_path, monkeypatch):
    """A disk of 2 MB, which is also the repository's root."""
    disk = tmp_path / "disk"
    disk.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=2m", "tmpfs", disk]
    if os.geteuid() or subprocess.run(mount, capture_output=True).returncode:
        pytest.skip("only root, with the right to mount, can make a small disk")
    monkeypatch.setenv("DGUTILS_ROOT", str(disk))
    yield disk
    subprocess.run(["umount", "-l", disk], check=True)


def fill(folder):
    """Leave no room, not even for a small file."""
    with open(folder / "ballast", "wb", buffering=0) as file:
        for size in (65536, 4096):
            try:
                while file.write(bytes(size)) == size:
                    pass
            except OSError:
                pass


def compute(write):
    return lambda disk: Store(disk / "store").artifact("new", 1, {}).ensure(write)


def record(disk):
    recorder = blank_ledger("smoke", "01_demo")
    recorder.value("a", 1.5, label="a" * 10_000, section="demo")
    recorder.write()


def save_figure(disk):
    plots.save_figure(Figure(), "smoke", "01_demo")


ROWS = np.zeros((10, 1000))
WRITERS = {
    "array": compute(lambda folder: save_array(folder / "x.npy", ROWS)),
    "numpy": compute(lambda folder: np.save(folder / "x.npy", ROWS)),
    "tensors": compute(lambda folder: checkpoints.write_tensors(folder / "x", {"x": torch.zeros(20_000)}, {})),
    "text": compute(lambda folder: (folder / "x").write_text("x" * 80_000)),
    "checkpoint": compute(lambda folder: Store(folder.parents[1]).save_partial("x", bytes(80_000))),
    "shards": lambda disk: Store(disk / "store").artifact("rows", 1, {}).shards(10).ensure(25, lambda _: {"x": ROWS}),
    "results": record,
    "figure": save_figure,
}


@pytest.mark.parametrize("writer", WRITERS.values(), ids=WRITERS)
def test_full_disk_is_one_line_and_what_is_done_stays(small_disk, writer):
    store = Store(small_disk / "store")
    done = store.artifact("done", 1, {}).ensure(lambda folder: save_array(folder / "x.npy", np.arange(99)))
    fill(small_disk)
    with pytest.raises(UserError, match=f"^no space left under {small_disk}.*: free some and run again; what is done"
                                        " is kept$"):
        writer(small_disk)
    (small_disk / "ballast").unlink()
    assert not done.lacks()
    writer(small_disk)
    left = [path.name for path in small_disk.rglob("*") if ".tmp" in path.name or path.name == "quarantine"]
    assert left == []


def test_disk_that_a_notebook_fills_is_one_line(small_disk):
    (small_disk / "notebooks" / "profiles").mkdir(parents=True)
    (small_disk / "notebooks" / "profiles" / "smoke.yaml").write_text("")
    fill_disk = (f"{inspect.getsource(fill)}\nimport pathlib\nif watermark != 'enough':\n"
                 f"    fill(pathlib.Path({str(small_disk)!r}))\n")
    cells = ["watermark: str = 'full'", fill_disk + "print('x' * 100_000)", 'print("NOTEBOOK COMPLETE: 01_demo")']
    notebook = v4.new_notebook(cells=[v4.new_code_cell(cell) for cell in cells])
    notebook.cells[0].metadata.tags = ["parameters"]
    nbformat.write(notebook, small_disk / "notebooks" / "01_demo.ipynb")
    with pytest.raises(UserError, match="no space left"):
        run_profile("smoke")
    (small_disk / "ballast").unlink()
    assert list(run_profile("smoke", overrides={"watermark": "enough"})) == ["01_demo"]


# --- lost rights

LOSE_RIGHTS = f"""
import os, sys
from pathlib import Path
import numpy as np
from dgutils.pipeline.store import Store
root, when = Path(sys.argv[1]), sys.argv[2]
if os.geteuid() == 0:
    os.setgid({NOBODY})
    os.setuid({NOBODY})  # rights do not stop root
def lose():
    for folder in [root / "store", *root.glob("store/generate/*")]:
        folder.chmod(0o555)
def rows(seeds):
    if when == "between" and seeds[0] == 20:
        lose()
    return {{"x": np.array(seeds)}}
if when == "before":
    lose()
if when == "unreadable":
    next(root.rglob("*.npy")).chmod(0)
try:
    fakes = Store(root / "store").artifact("generate", 1, {{}}).shards(10).ensure(40, rows)
    print("done", fakes.load(40, "x").sum())
except ValueError as error:
    print(error)
for path in root.rglob("*"):
    path.chmod(0o755)
"""


@pytest.fixture
def folder_of_nobody():
    with tempfile.TemporaryDirectory() as folder:  # not below pytest's, which is closed to others
        if os.geteuid() == 0:
            os.chown(folder, NOBODY, NOBODY)
        yield folder


def test_lost_rights_are_one_line_and_what_is_done_stays(folder_of_nobody):
    def run(when):
        process = subprocess.run([sys.executable, "-c", LOSE_RIGHTS, folder_of_nobody, when], cwd=HERE.parent,
                                 text=True, capture_output=True)
        assert process.returncode == 0, process.stderr
        return process.stdout, process.stderr

    refused = f"cannot read and write under {folder_of_nobody}/store (permission denied): make it a folder where you" \
              " can, or choose another one\n"
    output, log = run("between")
    assert output == refused and "MISS generate" in log
    output, log = run("never")
    assert output == "done 780\n" and "2 of 4 shards stored" in log  # the two before the loss
    output, log = run("unreadable")
    assert output == refused and "QUARANTINED" not in log  # nothing says that it is damaged
    output, log = run("before")
    assert output == "done 780\n" and "HIT" in log


# --- two runs at once

WHOLE_RUN = f"""
import sys; sys.path.insert(0, {str(HERE)!r})
import pytest, test_jobs as tiny
from dgutils.pipeline import jobs
from ledgers import blank_ledger
from dgutils.pipeline.store import Artifact, Store
tiny.use_tiny_networks(pytest.MonkeyPatch())
def counted(artifact, make, write=Artifact.write):
    with open(sys.argv[2], "a") as file:
        file.write(artifact.name + "\\n")
    write(artifact, make)
Artifact.write = counted
store = Store(sys.argv[1] + "/store")
fakes = jobs.ImageSet(store, tiny.sampling(), 40).ensure()
trained = jobs.Trained(store, tiny.training(), fakes).ensure()
guided = jobs.ImageSet(store, tiny.sampling(), 40, 0, jobs.Guidance(trained, (0, 1))).ensure()
scores = jobs.Score(store, guided, jobs.RealSet("fashion_mnist", "test", 100), "tiny", 5).ensure()
for _ in range(20):
    recorder = blank_ledger("smoke", "01_demo")
    recorder.value("fd", scores.fd.value, label="fd", section="demo")
    recorder.path.unlink(missing_ok=True)
    recorder.write()
print(scores.fd.value)
"""


def test_two_runs_in_one_folder_do_every_step_once(tmp_path, monkeypatch):
    monkeypatch.setenv("DGUTILS_ROOT", str(tmp_path))
    runs = [subprocess.Popen([sys.executable, "-c", WHOLE_RUN, tmp_path, tmp_path / "calls"], text=True,
                             stdout=subprocess.PIPE, stderr=subprocess.PIPE) for _ in range(2)]
    outputs = [run.communicate(timeout=120) for run in runs]
    assert [run.returncode for run in runs] == [0, 0], outputs
    assert outputs[0][0] == outputs[1][0] and "QUARANTINED" not in outputs[0][1] + outputs[1][1]
    computed = (tmp_path / "calls").read_text().split()
    assert len(computed) == len(set(computed)) >= 5 + 1 + 5 + 2 + 1, computed  # images, heads, images, features, scores
    assert load_results("smoke").records["fd"]["value"] == float(outputs[0][0])
    assert not [path for path in tmp_path.rglob("*") if ".tmp" in path.name]
