"""kill -9 at random points of every stage: the next run must end with the bits of a run that nobody killed.

    python tests/kill_points.py --points 50 --seed 0

Each point starts a stage in a process of its own, kills it, starts it again, and compares every file. Half of
the kills come at a random moment of the clock, half in front of a random change to the file system (they find the
moments between two renames, which the clock hardly ever hits). The networks are tiny and random, the steps are
the real ones.
"""

import argparse
import hashlib
import json
import os
import random
import re
import shutil
import signal
import sys
import tempfile
import time
import traceback
from pathlib import Path

os.environ["OMP_NUM_THREADS"] = "1"  # before torch: only a process without threads can safely fork
sys.path[:0] = [str(Path(__file__).parent), str(Path(__file__).parent.parent)]

import psutil  # noqa: E402
import pytest  # noqa: E402
import test_jobs as tiny  # noqa: E402
from ledgers import blank_ledger  # noqa: E402
from matplotlib.figure import Figure  # noqa: E402
from tqdm import tqdm  # noqa: E402

from dgutils.discriminator import MemberConfig  # noqa: E402
from dgutils.pipeline import jobs, store  # noqa: E402
from dgutils.pipeline.store import Store  # noqa: E402
from dgutils.results import ledger, plots  # noqa: E402
from report.build import write_latex  # noqa: E402

# Manifests name the code's revision, and somebody may commit meanwhile.
ABOUT = store.provenance() | {"revision": None}
store.provenance = ledger.provenance = lambda: ABOUT

MEMBERS = (MemberConfig("a", 1e-2, 0.0, 8), MemberConfig("b", 1e-3, 1e-7, 5, 0.01))
CHANGES = {"os.rename", "os.mkdir", "os.remove", "os.rmdir", "os.truncate"}  # and files opened to be written
NOTEBOOK = [
    ('profile: str = "smoke"', ["parameters"]),
    (f"import sys; sys.path.insert(0, {str(Path(__file__).parent)!r})\nimport kill_points", []),
    ("kill_points.tiny_networks()\nstore = kill_points.jobs.open_store(profile).root\nkill_points.sampling(store)", []),
    ("kill_points.report(store)", []),
    ('print("NOTEBOOK COMPLETE: 01_kill")', []),
]


def tiny_networks():
    tiny.use_tiny_networks(pytest.MonkeyPatch())


# --- the stages: functions of a folder


def images(folder):
    """What the later stages begin with."""
    return jobs.ImageSet(Store(folder), tiny.sampling(), 40).ensure()


def sampling(folder):
    return jobs.ImageSet(Store(folder), tiny.sampling(), 96).ensure()


def training(folder):
    store = Store(folder)
    return jobs.Trained(store, tiny.training(members=MEMBERS), images(folder)).ensure()


def features(folder):
    store, real = Store(folder), jobs.RealSet("fashion_mnist", "test", 1500)
    return jobs.Score(store, images(folder), real, "tiny", 50).ensure()


def report(folder):
    """Records, tables, the report's LaTeX and a figure, from images that are there."""
    pixels = images(folder).images
    recorder = blank_ledger("smoke", "01_kill")
    for i, image in enumerate(pixels):
        recorder.value(f"mean.{i}", image.mean(), label="mean grey level", section="report", n=1)
    recorder.show("means", ["image", "mean"], [(str(i), f"mean.{i}") for i in range(len(pixels))])
    recorder.write()
    write_latex("smoke")
    figure = Figure()
    figure.add_subplot().hist(pixels.ravel())
    plots.save_figure(figure, "smoke", "01_grey_levels")


def notebook(folder):
    from dgutils.pipeline.notebooks import run_profile

    run_profile("smoke")


STAGES = ("sampling", "training", "features", "report", "notebook")


# --- processes


def start(stage, folder, kill_at=None, count_to=None):
    """Fork a process that runs the stage; it kills itself before its `kill_at`-th change to the file system."""
    pid = os.fork()
    if pid:
        return pid
    code, changes = 1, 0
    try:
        log = os.open(folder.with_suffix(".log"), os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        os.dup2(log, 1)
        os.dup2(log, 2)
        os.environ["DGUTILS_ROOT"] = str(folder)

        def hook(event, arguments):
            nonlocal changes
            if event in CHANGES or event == "open" and (arguments[2] or 0) & (os.O_WRONLY | os.O_RDWR):
                changes += 1
                if changes == kill_at:
                    os.kill(os.getpid(), signal.SIGKILL)

        sys.addaudithook(hook)
        globals()[stage](folder)
        if count_to:
            count_to.write_text(str(changes))
        code = 0
    except BaseException:
        traceback.print_exc()
    finally:
        os._exit(code)


def finish(pid) -> int:
    """The exit status of a child process; negative: the signal that ended it."""
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


def kill_by_clock(stage, pid, seconds, rng) -> bool:
    """Kill the process, or the kernel of its notebook, after a while. Whether it was still at work then."""
    time.sleep(seconds)
    victims = psutil.Process(pid).children() if stage == "notebook" and rng.random() < 0.5 else []
    for victim in victims or [psutil.Process(pid)]:
        victim.send_signal(signal.SIGKILL)
    return finish(pid) != 0


# --- what must be equal


def names(folder) -> list[str]:
    """Every file under a folder that has its final name, without locks."""
    names = sorted(str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file())
    return [name for name in names if "locks/" not in name and ".tmp" not in name]


def snapshot(folder) -> dict[str, str]:
    """Each of these with its checksum, without dates and durations; of the executed notebook, that it is complete."""
    files = {}
    for name in names(folder):
        path = folder / name
        content = path.read_bytes()
        if path.suffix == ".json" and isinstance(record := json.loads(content), dict):
            record = {key: value for key, value in record.items() if key not in ("created", "seconds", "sha256")}
            record.get("provenance", {}).pop("date", None)
            content = json.dumps(record).encode()
        elif path.suffix == ".ipynb":
            content = b"complete" if b"NOTEBOOK COMPLETE: 01_kill" in content else b"not complete"
        elif name.endswith("numbers.tex"):
            content = re.sub(rb"\d{4}-\d\d-\d\d|[\d.,]+ \w+ of computing", b"", content)
        files[name] = hashlib.sha256(content).hexdigest()
    return files


def prepare(stage, folder, inputs):
    """A folder as the stage finds it: its inputs are there, it has not begun."""
    (folder / "notebooks" / "profiles").mkdir(parents=True)
    shutil.copytree(Path(__file__).parents[1] / "docs", folder / "docs")  # the report quotes it
    (folder / "notebooks" / "profiles" / "smoke.yaml").write_text("watermark: smoke\n")
    if stage == "notebook":
        import nbformat
        from nbformat import v4

        cells = [v4.new_code_cell(source, metadata={"tags": tags}) for source, tags in NOTEBOOK]
        nbformat.write(v4.new_notebook(cells=cells), folder / "notebooks" / "01_kill.ipynb")
    elif stage != "sampling":
        shutil.copytree(inputs, folder, dirs_exist_ok=True)


def kill_everywhere(points: int, seed: int, root: Path) -> list[dict]:
    """Kill the stages in turn until `points` kills found one at work; a row for each kill that was tried.

    left: files that the killed process had finished. same: the next run succeeded and left what `whole` has.
    """
    tiny_networks()
    for split in ("train", "test"):
        jobs.datasets.load_dataset("fashion_mnist", split)  # once, for all the processes to come
    rng, rows, inputs = random.Random(seed), [], root / "inputs"
    inputs.mkdir()
    assert finish(start("images", inputs)) == 0
    whole, changes, seconds = {}, {}, {}
    for stage in STAGES:
        prepare(stage, folder := root / stage / "whole", inputs)
        begin = time.monotonic()
        code = finish(start(stage, folder, count_to=root / stage / "changes"))
        assert code == 0, folder.with_suffix(".log").read_text()
        seconds[stage] = time.monotonic() - begin
        whole[stage], changes[stage] = snapshot(folder), int((root / stage / "changes").read_text())
    bar = tqdm(total=points, desc="kills")
    while sum(row["hit"] for row in rows) < points:
        stage = STAGES[sum(row["hit"] for row in rows) % len(STAGES)]
        prepare(stage, folder := root / stage / str(len(rows)), inputs)
        before = names(folder)
        by_clock = stage == "notebook" or stage != "report" and rng.random() < 0.5
        if by_clock:
            when = rng.uniform(0, seconds[stage])
            hit = kill_by_clock(stage, start(stage, folder), when, rng)
            seconds[stage] *= 1 if hit else 0.8  # the first run of a stage takes longer than the others
        else:
            when = rng.randint(1, changes[stage])
            hit = finish(start(stage, folder, kill_at=when)) == -signal.SIGKILL
        left = len(set(names(folder)) - set(before))
        code = finish(start(stage, folder))
        same = code == 0 and snapshot(folder) == whole[stage]
        rows.append({"stage": stage, "kind": "clock" if by_clock else "change", "when": round(when, 3), "hit": hit,
                     "left": left, "same": same})
        if not same:
            rows[-1]["log"] = folder.with_suffix(".log").read_text()[-2000:]
            rows[-1]["differ"] = sorted(dict(snapshot(folder).items() ^ whole[stage].items()))
        shutil.rmtree(folder)
        bar.update(hit)
    bar.close()
    return rows


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--points", type=int, default=50)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", type=Path, help="write the rows here")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as root:
        rows = kill_everywhere(arguments.points, arguments.seed, Path(root))
    if arguments.json:
        arguments.json.write_text(json.dumps(rows, indent=1))
    print(f"{'stage':<10} {'tried':>5} {'hit':>5} {'by clock':>8} {'kept work':>9} {'same bits':>9}")
    for stage in STAGES:
        mine = [row for row in rows if row["stage"] == stage]
        hits = [row for row in mine if row["hit"]]
        print(f"{stage:<10} {len(mine):>5} {len(hits):>5} {sum(row['kind'] == 'clock' for row in hits):>8}"
              f" {sum(row['left'] > 0 for row in hits):>9} {sum(row['same'] for row in hits):>9}")
    return int(not all(row["same"] for row in rows))


if __name__ == "__main__":
    sys.exit(main())
