"""The runner on throwaway notebooks: only a complete one is done, and mistakes are one line."""

import asyncio
import errno
import json
import re
import sys
import time
from concurrent.futures import ThreadPoolExecutor

import nbformat
import pytest
from nbformat import v4

from dgutils.errors import UserError
from dgutils.pipeline import cells
from dgutils.pipeline.notebooks import SENTINEL, ThisPython, run_profile

PARAMETERS = """profile: str = "smoke"
num_steps: int | None = None  # number of steps
rho: float | None = None
sweep_weights: list[float] | None = None"""


@pytest.fixture
def repo(tmp_path, monkeypatch):
    """An empty repository; repo(cell, ...) writes 01_demo.ipynb: parameters, these cells, sentinel."""
    monkeypatch.setenv("DGUTILS_ROOT", str(tmp_path))
    (tmp_path / "notebooks" / "profiles").mkdir(parents=True)
    (tmp_path / "notebooks" / "profiles" / "smoke.yaml").write_text("num_steps: 3\n")

    def write(*cells: str, name: str = "01_demo", last: str = "print('{}')", parameters: str = PARAMETERS):
        sources = [parameters, *cells, last.format(SENTINEL + name), ""]
        notebook = v4.new_notebook(cells=[v4.new_markdown_cell(f"# {name}"), *map(v4.new_code_cell, sources)])
        notebook.cells[1].metadata.tags = ["parameters"]
        nbformat.write(notebook, tmp_path / "notebooks" / f"{name}.ipynb")
        return tmp_path

    return write


def files(root):
    paths = [path.relative_to(root / "runs") for path in root.glob("runs/**/*") if path.is_file()]
    return sorted(str(path) for path in paths if path.parts[1] not in ("locks", "log"))


def test_complete_notebook_is_renamed(repo):
    root = repo("import json, sys\n"
                "json.dump([profile, num_steps, rho, sweep_weights, eval_seed], open('seen.json', 'w'))\n"
                "print('50 %\\r100 %', file=sys.stderr)\nprint(sys.executable)")
    (root / "runs/smoke/notebooks").mkdir(parents=True)
    (root / "runs/smoke/notebooks/01_demo.failed.ipynb").write_text("from an earlier run")
    run_profile("smoke", overrides={"rho": 0.5, "sweep_weights": [1, 2], "eval_seed": 7})

    assert files(root) == ["smoke/notebooks/01_demo.ipynb"]
    # It ran in the root, with the overrides, its own or not, and the profile's name; the profile's values it reads.
    assert json.loads((root / "seen.json").read_text()) == ["smoke", None, 0.5, [1, 2], 7]
    executed = nbformat.read(root / "runs/smoke/notebooks/01_demo.ipynb", as_version=4)
    outputs = [(out.name, out.text) for cell in executed.cells for out in cell.get("outputs", [])]
    assert outputs == [("stdout", f"{sys.executable}\n"), ("stdout", f"{SENTINEL}01_demo\n")]  # of this interpreter


LOUD = """import sys, warnings
from dgutils.pipeline import jobs
from dgutils.terminal import bar
store = jobs.open_store("smoke")
for number in (0, 0, 1):
    artifact = store.artifact("rows", 1, {"number": number}).ensure(lambda folder: None)
print("what a cell prints")
warnings.warn("a library is worried")
with bar(3, "images") as images:
    images.update(2)
    images.refresh()
(artifact.path / "manifest.json").unlink()
store.artifact("rows", 1, {"number": 1}).ensure(lambda folder: None)"""


@pytest.mark.parametrize("verbose", [False, True])
def test_a_notebook_is_a_line_and_the_rest_goes_to_the_log(repo, capsys, monkeypatch, verbose):
    monkeypatch.setenv("VERBOSE", "1" if verbose else "")
    root = repo(LOUD)
    seconds = run_profile("smoke")
    shown, log = capsys.readouterr(), (root / "runs/smoke/log").read_text()
    assert re.search(rf"^\[1/1\] 01_demo +{seconds['01_demo']:.1f} s$", shown.out, re.MULTILINE)
    assert shown.out.endswith("0 artifacts found, 2 made; each is a line of runs/smoke/log\n")
    loud = {"HIT rows": 1, "MISS rows": 3, "UserWarning: a library is worried": 1}
    assert {what: log.count(what) for what in loud} == loud
    assert {what: shown.err.count(what) for what in loud} == (loud if verbose else dict.fromkeys(loud, 0))
    assert ("what a cell prints" in shown.out) == verbose
    assert shown.err.count("dgutils: QUARANTINED rows-") == log.count(" QUARANTINED rows-") == 1
    if not verbose:
        assert shown.out.count("\n") == 2 and shown.err.count("\n") == 1
    executed = (root / "runs/smoke/notebooks/01_demo.ipynb").read_text()
    assert "what a cell prints" in executed and not re.search("HIT|MISS|QUARANTINED|worried|images", executed.partition(
        "what a cell prints")[2].partition('"source"')[0])


COUNTING = """from pathlib import Path
count = Path("count")
count.write_text(str(int(count.read_text()) + 1) if count.exists() else "1")
for made in ("report/results/smoke/01.json", "figures/smoke/01_seen.pdf"):
    Path(made).parent.mkdir(parents=True, exist_ok=True)
    Path(made).write_text("found")"""


def edit(path, change=lambda text: text + "\n"):
    path.write_text(change(path.read_text()))


@pytest.mark.parametrize("change", [
    None,
    lambda root: edit(root / "notebooks/01_demo.ipynb", lambda text: text.replace("# 01_demo", "# Demonstration")),
    lambda root: edit(root / "notebooks/profiles/smoke.yaml", lambda text: "num_steps: 4"),
    lambda root: edit(root / "report/results/smoke/01.json"),
    lambda root: (root / "report/results/smoke/01.json").unlink(),
    lambda root: (root / "figures/smoke/01_seen.pdf").unlink(),
    lambda root: edit(root / "runs/smoke/notebooks/01_demo.ipynb", lambda text: text[:200]),
    lambda root: edit(root / "runs/smoke/notebooks/01_demo.ipynb", lambda text: text.replace(SENTINEL, "")),
    lambda root: edit(root / "runs/smoke/notebooks/01_demo.ipynb", lambda text: "[]"),
    lambda root: (root / "runs/smoke/notebooks/01_demo.ipynb").unlink(),
    lambda root: (root / "weights/net.pkl").write_text("other weights"),
    lambda root: (root / "data" / "fashion-mnist").mkdir(parents=True) or
    (root / "data" / "fashion-mnist" / "train").write_text("x"),
    lambda root: (root / "data").mkdir() or (root / "data/archive.tar").write_text("x"),
    lambda root: (root / "weights/net2.pkl").symlink_to("nowhere"),
    lambda root: (root / "runs/smoke/store").mkdir()], ids=[
    "nothing", "source", "profile", "results", "results gone", "figure gone", "cut short", "not complete",
    "no notebook", "gone", "weights", "data", "an archive", "a broken link", "store"])
def test_what_is_unchanged_is_not_executed_again(repo, capsys, monkeypatch, change):
    root = repo(COUNTING)
    (root / "weights").mkdir()
    (root / "weights/net.pkl").write_text("weights")
    monkeypatch.setenv("DGUTILS_WEIGHTS", str(root / "weights"))
    monkeypatch.setenv("DGUTILS_DATA", str(root / "data"))
    run_profile("smoke")
    if change:
        change(root)
    capsys.readouterr()
    seconds = run_profile("smoke")
    shown = capsys.readouterr().out
    assert (root / "count").read_text() == ("2" if change else "1") and bool(seconds) == bool(change)
    assert bool(re.search(r"^\[1/1\] 01_demo +unchanged since \d\d ... \d\d:\d\d\n.*FORCE=1", shown)) != bool(change)


def test_another_parameter_another_version_or_force_execute_again(repo, monkeypatch):
    root = repo(COUNTING)
    for expected, call in enumerate([
            lambda: run_profile("smoke"), lambda: run_profile("smoke", overrides={"rho": 5.0}),
            lambda: run_profile("smoke", overrides={"rho": 5.0}, force=True),
            lambda: monkeypatch.setattr("dgutils.pipeline.notebooks.version", lambda name: "9") or
            run_profile("smoke", overrides={"rho": 5.0})], 1):
        call()
        assert (root / "count").read_text() == str(expected)
    run_profile("smoke", overrides={"rho": 5.0})
    assert (root / "count").read_text() == "4"


def test_what_changes_while_a_notebook_runs_is_not_what_it_was_made_from(repo):
    root = repo(COUNTING, "source = Path('notebooks/01_demo.ipynb')\n"
                "source.write_text(source.read_text().replace('# 01_demo', '# Edited'))")
    for times in ("1", "2", "2"):
        run_profile("smoke")
        assert (root / "count").read_text() == times


def test_without_a_home_a_notebook_still_runs(repo, monkeypatch):
    monkeypatch.setattr("dgutils.pipeline.notebooks.weights_dir", lambda: home_is_unknown())
    root = repo(COUNTING)
    run_profile("smoke")
    assert (root / "count").read_text() == "1"


def home_is_unknown():
    raise UserError("no home folder is known here")


def test_a_notebook_is_executed_again_after_other_results_of_an_earlier_one(repo):
    write = "from pathlib import Path\nPath('report/results/smoke').mkdir(parents=True, exist_ok=True)\n"
    root = repo(write + "Path('report/results/smoke/01.json').write_text(str(rho))")
    repo(write + "Path('count').open('a').write('x')", name="02_demo")
    for overrides, times in (({}, 1), ({}, 1), ({"rho": 5.0}, 2), ({"rho": 5.0}, 2)):
        run_profile("smoke", overrides=overrides)
        assert (root / "count").read_text() == times * "x"
    edit(root / "report/results/smoke/01.json")
    run_profile("smoke", only="02", overrides={"rho": 5.0})
    assert (root / "count").read_text() == "xxx"


@pytest.mark.parametrize("cell, last, reason", [
    ("import sys; sys.exit(0)", "print('{}')", "code cell 3: SystemExit: 0"),
    ("raise ValueError('first\\nsigma must be positive')", "print('{}')",
     "code cell 3: ValueError: sigma must be positive"),
    ("import os; os._exit(0)", "print('{}')", "code cell 3: DeadKernelError: Kernel died"),
    ("import os; os.kill(os.getpid(), 9)", "print('{}')", "code cell 3: DeadKernelError: Kernel died"),
    ("pass", "print('{}', flush=True); import os; os._exit(0)", "code cell 4: DeadKernelError: Kernel died"),
    ("print('" + SENTINEL + "01_demo')", "pass", f"did not print '{SENTINEL}01_demo'"),
    ("pass", "print('{}_other')", f"did not print '{SENTINEL}01_demo'"),
], ids=["sys.exit", "exception", "dead kernel", "killed kernel", "dies after the sentinel",
        "no sentinel", "another's sentinel"])
def test_incomplete_notebook_is_kept_as_failed(repo, cell, last, reason):
    root = repo(cell, last=last)
    (root / "runs/smoke/notebooks").mkdir(parents=True)
    (root / "runs/smoke/notebooks/01_demo.ipynb").write_text("from an earlier run")
    with pytest.raises(UserError) as error:
        run_profile("smoke")
    failed = root / "runs/smoke/notebooks/01_demo.failed.ipynb"
    assert reason in str(error.value) and str(failed) in str(error.value) and "\n" not in str(error.value)
    assert files(root) == ["smoke/notebooks/01_demo.failed.ipynb", "smoke/notebooks/01_demo.ipynb"]
    assert cell in [cell.source for cell in nbformat.read(failed, as_version=4).cells]


def test_hung_cell_is_stopped_and_counts_as_failed(repo):
    root = repo("import time; time.sleep(600)")
    start = time.monotonic()
    with pytest.raises(UserError, match="notebook 01_demo failed: code cell 3: not done after 2 s; unless it hangs,"
                                        r" raise --cell-timeout \(what is done is kept\) \(see .*failed.ipynb"):
        run_profile("smoke", cell_timeout=2)
    assert time.monotonic() - start < 30
    assert files(root) == ["smoke/notebooks/01_demo.failed.ipynb"]
    with pytest.raises(UserError, match="--cell-timeout -1: give seconds, or 0 for no limit"):
        run_profile("smoke", cell_timeout=-1)


def test_two_runs_of_one_notebook_take_turns(repo):
    """The cell fails if another one is in it; the second run begins while the first is there."""
    root = repo("import os, time\nos.mkdir('inside'); time.sleep(1); os.rmdir('inside')")
    with ThreadPoolExecutor(2) as pool:
        done = [future.result() for future in [pool.submit(run_profile, "smoke") for _ in range(2)]]
    assert [list(seconds) for seconds in done] == [["01_demo"]] * 2
    assert files(root) == ["smoke/notebooks/01_demo.ipynb"]


def test_full_disk_is_one_line(repo, monkeypatch):
    def full(*arguments, **options):
        raise OSError(errno.ENOSPC, "No space left on device")

    root = repo()
    monkeypatch.setattr("papermill.execute_notebook", full)
    with pytest.raises(UserError, match=f"no space left under {root / 'runs' / 'smoke'}: free some and run again"):
        run_profile("smoke")


@pytest.mark.parametrize("yaml, overrides, message", [
    ("num_stps: 3", {}, "unknown parameter num_stps in profile smoke; did you mean num_steps?"),
    ("", {"rhoo": 1.0}, "unknown parameter rhoo in --set; did you mean rho?"),
    ("num_steps: 2.5", {}, "num_steps is 2.5: input should be a valid integer"),
    ("profile: paper", {}, "profile is 'paper', but the file is named smoke"),
    ("num_steps: [", {}, "smoke.yaml is not YAML"),
])
def test_wrong_parameters_stop_before_anything_runs(repo, yaml, overrides, message):
    root = repo("1/0")
    (root / "notebooks/profiles/smoke.yaml").write_text(yaml)
    with pytest.raises(UserError) as error:
        run_profile("smoke", only="01", overrides=overrides)
    assert message in str(error.value) and "\n" not in str(error.value)
    assert files(root) == []


# --- sources that somebody broke


def damaged(path, damage):
    """Change a notebook: its text by a pair of strings, or itself by a function."""
    if isinstance(damage, tuple):
        assert damage[0] in path.read_text()
        path.write_text(path.read_text().replace(*damage, 1))
        return
    notebook = nbformat.read(path, 4)
    damage(notebook)
    nbformat.write(notebook, path)


def in_parameters(line):
    def add(notebook):
        notebook.cells[1].source += f"\n{line}"

    return add


@pytest.mark.parametrize("damage, message", [
    ((' "cells"', '<<<<<<< HEAD\n "cells"'), ": finish git's merge, or restore it with git"),
    (('"cells"', "cells"), "notebooks/01_demo.ipynb is no notebook"),
    (lambda n: n.cells[1].metadata.pop("tags"), "01_demo.ipynb has 0 cells with the tag `parameters`"),
    (lambda n: n.cells[2].metadata.update(tags=["parameters"]), "01_demo.ipynb has 2 cells with the tag `parameters`"),
    (in_parameters("%matplotlib inline"), "01_demo.ipynb, cell 2: '%matplotlib inline' is not Python"),
    (in_parameters("!ls"), "cell 2: '!ls' is not Python"),
    (in_parameters("num_eval = 3 + int(5)"), "cell 2: 'num_eval = 3 + int(5)': write `name: type = value` only"),
    (in_parameters("import os"), "cell 2: 'import os': write"),
    (in_parameters("print(1)"), "cell 2: 'print(1)': write"),
    (in_parameters("num_evil: int = 3"), "cell 2: 'num_evil: int = 3': write `name: type = value` only, a known"),
    (in_parameters("num_eval: int = 3\nnum_eval = 4"), "cell 2: 'num_eval = 4': write"),
    (in_parameters("rho: float = 5.0"), "'rho: float = 5.0': write `name: type = value` only, a known parameter, once"),
    (in_parameters("num_eval: int = 010"), "cell 2: 'num_eval: int = 010' is not Python"),
    (in_parameters("num_eval: int"), "cell 2: 'num_eval: int': write"),
    (in_parameters("num_eval, rho = 3, 4"), "cell 2: 'num_eval, rho = (3, 4)': write"),
])
def test_a_broken_notebook_is_one_line_that_names_its_place(repo, damage, message):
    root = repo("1/0")
    damaged(root / "notebooks" / "01_demo.ipynb", damage)
    for call in (lambda: run_profile("smoke"), lambda: cells.experiment_of(cells.sources()[0], {})):
        with pytest.raises(UserError) as error:
            call()
        assert message in str(error.value) and "\n" not in str(error.value)
    assert files(root) == []


SETUP = "from dgutils.pipeline.experiment import Experiment, fake_set\nexperiment = Experiment(globals(), '01_demo')"


@pytest.fixture
def declaring(repo):
    """declaring(cell) writes a notebook with parameters, a setup cell, and this one with the tag `arms`."""

    def write(arms, setup=SETUP):
        path = repo("1/0", setup, arms) / "notebooks" / "01_demo.ipynb"
        notebook = nbformat.read(path, 4)
        for cell, tag in zip(notebook.cells[3:5], ("setup", "arms"), strict=True):
            cell.metadata.tags = [tag]
        nbformat.write(notebook, path)
        return path

    return write


def test_only_the_tagged_cells_are_run_and_see_the_overrides(declaring):
    path = declaring("experiment.declare({'x': experiment.images('x')})\n"
                     "experiment.declare({'f': fake_set(experiment)}, [])")
    experiment = cells.experiment_of(path, {"profile": "smoke", "num_eval": 8, "rho": 5.0})
    assert experiment.parameters.num_steps == 3 and experiment.parameters.rho == 5.0
    assert {score.images.n for score in experiment.scored} == {8} and len(experiment.scored) == 2
    assert [images.label for images in experiment.made] == ["fake set"] and not experiment.store.root.exists()


@pytest.mark.parametrize("arms, setup, message", [
    ("later", SETUP, "notebooks/01_demo.ipynb, cell 5: NameError: name 'later' is not defined (cells with the tag"),
    ("%time", SETUP, "notebooks/01_demo.ipynb, cell 5: '%time' is not Python"),
    ("pass", "pass", "notebooks/01_demo.ipynb makes no `experiment` in a cell with the tag `setup`"),
    ("experiment.images('x', num_steps=1)", SETUP, "num_steps >= 2"),
])
def test_a_cell_that_declares_no_arms_is_one_line(declaring, arms, setup, message):
    with pytest.raises(UserError) as error:
        cells.experiment_of(declaring(arms, setup), {})
    assert message in str(error.value) and "\n" not in str(error.value)


def test_braces_in_the_clones_path_are_no_templates(repo, monkeypatch, tmp_path):
    root = repo().rename(tmp_path.with_name("a {profile} {clone"))
    monkeypatch.setenv("DGUTILS_ROOT", str(root))
    assert list(run_profile("smoke")) == ["01_demo"] and files(root) == ["smoke/notebooks/01_demo.ipynb"]


def test_unknown_names_list_those_there_are(repo):
    repo()
    with pytest.raises(UserError, match="unknown profile qick: there are smoke in "):
        run_profile("qick")
    with pytest.raises(UserError, match="no notebook begins with 07: there are 01_demo in "):
        run_profile("smoke", only="07")


def test_unwritable_folder_is_one_line(repo):
    root = repo()
    (root / "runs").write_text("a file where the folder should be")
    with pytest.raises(UserError, match="cannot .*write under .*runs"):
        run_profile("smoke")


def test_what_a_kernel_logs_of_being_shut_down_is_not_shown(capfd):
    """The runner interrupts a kernel before it ends it; one that is quick enough logs that as an error of its own."""
    manager, said = ThisPython(), []

    async def log():
        await manager.start_kernel()
        client = manager.client()
        client.start_channels()
        await client.wait_for_ready(timeout=60)
        await client.execute_interactive("from ipykernel.kernelapp import IPKernelApp\n"
                                         "IPKernelApp.instance().log.error('KeyboardInterrupt caught in kernel.')\n"
                                         "print('done')", timeout=60, output_hook=said.append)  # fmt: skip
        client.stop_channels()
        await manager.shutdown_kernel()

    asyncio.run(log())
    shown = [message["content"].get("text") for message in said if message["msg_type"] == "stream"]
    assert shown == ["done\n"] and capfd.readouterr().err == ""
