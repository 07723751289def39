"""The runner on throwaway notebooks: only a complete one is done, and mistakes are one line."""

import errno
import json
import sys
import time
from concurrent.futures import ThreadPoolExecutor

import nbformat
import pytest
from nbformat import v4

from dgutils.errors import UserError
from dgutils.pipeline.notebooks import SENTINEL, as_yaml_float, parse_override, run_profile

PARAMETERS = """profile: str = "smoke"
steps: int = 2  # number of steps
rate: float = 1.0e-3
members: list[int] = [0]
limit: float | None = None
guided: bool = True"""


@pytest.fixture
def repo(tmp_path, monkeypatch):
    """An empty repository; repo(cell, ...) writes 01_demo.ipynb: parameters, these cells, sentinel."""
    monkeypatch.setenv("DGUTILS_ROOT", str(tmp_path))
    (tmp_path / "notebooks" / "profiles").mkdir(parents=True)
    (tmp_path / "notebooks" / "profiles" / "smoke.yaml").write_text("steps: 3\n")

    def write(*cells: str, name: str = "01_demo", last: str = "print('{}')", parameters: str = PARAMETERS):
        sources = [parameters, *cells, last.format(SENTINEL + name), ""]
        notebook = v4.new_notebook(cells=[v4.new_markdown_cell(f"# {name}"), *map(v4.new_code_cell, sources)])
        notebook.cells[1].metadata.tags = ["parameters"]
        nbformat.write(notebook, tmp_path / "notebooks" / f"{name}.ipynb")
        return tmp_path

    return write


def files(root):
    paths = [path.relative_to(root / "runs") for path in root.glob("runs/**/*") if path.is_file()]
    return sorted(str(path) for path in paths if path.parts[1:2] != ("locks",))


def test_complete_notebook_is_renamed(repo, capsys):
    root = repo("import json, sys\n"
                "json.dump([profile, steps, rate, members], open('seen.json', 'w'))\n"
                "print('50 %\\r100 %', file=sys.stderr)\nprint(sys.executable)")
    (root / "runs/smoke/notebooks").mkdir(parents=True)
    (root / "runs/smoke/notebooks/01_demo.failed.ipynb").write_text("from an earlier run")
    seconds = run_profile("smoke", overrides={"rate": 0.5, "members": [1, 2]})

    assert files(root) == ["smoke/notebooks/01_demo.ipynb"]
    # It ran in the root, with the YAML's value, the overrides and the profile's name.
    assert json.loads((root / "seen.json").read_text()) == ["smoke", 3, 0.5, [1, 2]]
    shown = capsys.readouterr()
    assert sys.executable in shown.out and "50 %\r100 %\n" == shown.err  # live, from this interpreter
    assert "[1/1] 01_demo" in shown.out and f"{seconds['01_demo']:.1f} s" in shown.out
    executed = nbformat.read(root / "runs/smoke/notebooks/01_demo.ipynb", as_version=4)
    stderr = [out.text for cell in executed.cells for out in cell.get("outputs", []) if out.name == "stderr"]
    assert stderr == ["100 %\n"]  # the bar's last state only


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
    ("stps: 3", {}, "unknown parameter stps in profile smoke; did you mean steps?"),
    ("", {"raet": 1.0}, "unknown parameter raet in --set; did you mean rate?"),
    ("", {"zzz": 1}, "unknown parameter zzz in --set; the notebooks'"),
    ("", {"other": 1}, "unknown parameter other in --set"),  # known, but not to the notebook that is to run
    ("rate: 1e-4", {}, "rate in profile smoke is '1e-4', but must be float; write 1.0e-4"),
    ("steps: 2.5", {}, "steps in profile smoke is 2.5, but must be int"),
    ("steps: true", {}, "steps in profile smoke is True, but must be int"),
    ("guided: 1", {}, "guided in profile smoke is 1, but must be bool"),
    ("members: [0, a]", {}, "members in profile smoke is [0, 'a'], but must be list[int]"),
    ("members: 3", {}, "members in profile smoke is 3, but must be list[int]"),
    ("limit: none", {}, "limit in profile smoke is 'none', but must be float | None"),
    ("profile: paper", {}, "profile is set to another value than smoke"),
    ("steps: [", {}, "smoke.yaml is not YAML"),
    ("steps", {}, "smoke.yaml must hold lines `name: value`"),
])
def test_wrong_parameters_stop_before_anything_runs(repo, yaml, overrides, message):
    repo(name="02_other", parameters="other: int = 1")
    root = repo("1/0")
    (root / "notebooks/profiles/smoke.yaml").write_text(yaml)
    with pytest.raises(UserError) as error:
        run_profile("smoke", only="01", overrides=overrides)
    assert message in str(error.value) and "\n" not in str(error.value)
    assert files(root) == []


def test_each_notebook_gets_what_it_declares(repo):
    repo("assert (limit, rate) == (None, 2)")
    root = repo("assert not {'steps', 'rate'} & set(globals())", "assert other == 7", name="02_other",
                parameters="other = 1")
    (root / "notebooks/profiles/smoke.yaml").write_text("steps: 3\nrate: 2\nlimit: null\nother: 7")
    assert list(run_profile("smoke")) == ["01_demo", "02_other"]


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


def test_overrides_are_read_as_python_or_yaml():
    texts = ("1e-4", "[1, 2]", "true", "None", "median_logit", "b=c")
    values = [1e-4, [1, 2], True, None, "median_logit", "b=c"]
    assert [parse_override(f"name={text}") for text in texts] == [("name", value) for value in values]
    for text in ("a", "=1", "a b=1"):
        with pytest.raises(UserError, match="write name=value"):
            parse_override(text)


@pytest.mark.parametrize("text, better", [("1e-4", "1.0e-4"), ("1.5E5", "1.5e+5"), ("2", "2.0"),
                                          ("soon", None)])
def test_float_that_yaml_reads_as_text(text, better):
    assert as_yaml_float(text) == better
