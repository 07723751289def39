"""What people meet in the field, kind by kind, each with several examples: environments, accounts, checkouts, machines."""

import os
import pickle
import pwd
import re
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from dgutils import __main__, machine, paths, sources
from dgutils.cli import main as cli
from dgutils.errors import UserError

ROOT = Path(__file__).resolve().parents[1]


def run(*command, cwd=ROOT, **environment):
    return subprocess.run(command, cwd=cwd, env=os.environ | environment, text=True, capture_output=True)


def settled(code, **environment):
    """What Python code prints in the environment of our commands, when the account's is this one."""
    result = run(sys.executable, "-m", "dgutils.paths", "-c", code, **environment)
    assert result.returncode == 0, result.stderr
    return result.stdout


# --- what the environment says


@pytest.fixture
def clone(tmp_path, monkeypatch):
    """Nothing is set but a home and a clone; the current folder is another."""
    for name in ("DGUTILS_DATA", "DGUTILS_WEIGHTS", "XDG_CACHE_HOME"):
        monkeypatch.delenv(name, raising=False)
    for name in ("home", "clone/notebooks"):
        (tmp_path / name).mkdir(parents=True)
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.setenv("DGUTILS_ROOT", str(tmp_path / "clone"))
    monkeypatch.chdir(tmp_path / "clone/notebooks")
    return tmp_path


def no_home(monkeypatch):
    def getpwuid(uid):
        raise KeyError(uid)

    monkeypatch.delenv("HOME")
    monkeypatch.setattr(pwd, "getpwuid", getpwuid)


@pytest.mark.parametrize(("name", "read"), [("DGUTILS_DATA", paths.data_dir), ("DGUTILS_WEIGHTS", paths.weights_dir),
                                            ("XDG_CACHE_HOME", lambda: paths.cache_dir().parent)])
@pytest.mark.parametrize(("text", "means"), [("~", "home"), ("~/d", "home/d"), ("data", "clone/data"),
                                             ("../shared/data", "shared/data"), ("./d ", "clone/d"), ("{tmp}/x", "x")])
def test_folders_are_expanded_and_anchored_at_the_clone(clone, monkeypatch, name, read, text, means):
    monkeypatch.setenv(name, text.replace("{tmp}", str(clone)))
    assert read() == clone / means


@pytest.mark.parametrize("text", ["", " ", "\t\n"])
def test_empty_is_unset(clone, monkeypatch, text):
    for name in ("DGUTILS_DATA", "DGUTILS_WEIGHTS", "XDG_CACHE_HOME"):
        monkeypatch.setenv(name, text)
    assert paths.data_dir() is None and paths.weights_dir() == clone / "home/.cache/dgutils/weights"
    monkeypatch.setenv("DGUTILS_ROOT", text)
    assert paths.repo_root() == ROOT


def test_no_home_where_none_is_needed(clone, monkeypatch):
    no_home(monkeypatch)
    monkeypatch.setenv("DGUTILS_WEIGHTS", "/tmp/w")
    assert paths.weights_dir() == Path("/tmp/w")
    monkeypatch.setenv("DGUTILS_DATA", "/tmp/d")
    assert {place.parent for place in sources.places("cifar10")} == {Path("/tmp/d")}
    assert paths.environment()["PYTHONUTF8"] == "1"
    monkeypatch.setenv("XDG_CACHE_HOME", "/tmp/c")
    monkeypatch.delenv("DGUTILS_WEIGHTS")
    assert paths.weights_dir() == Path("/tmp/c/dgutils/weights")


@pytest.mark.parametrize(("name", "text", "read"), [
    ("DGUTILS_WEIGHTS", "", paths.weights_dir), ("DGUTILS_DATA", "~/d", paths.data_dir),
    ("XDG_CACHE_HOME", "~", paths.cache_dir)])  # fmt: skip
def test_a_home_that_is_needed_and_absent_is_one_line(clone, monkeypatch, name, text, read):
    no_home(monkeypatch)
    monkeypatch.setenv(name, text)
    with pytest.raises(UserError, match="no such home folder is known here; set (XDG|DGUTILS)_[A-Z_]+ to a whole path"):
        read()


@pytest.mark.parametrize("name", ["DGUTILS_DATA", "DGUTILS_WEIGHTS", "XDG_CACHE_HOME", "DGUTILS_ROOT"])
def test_a_home_of_nobody_is_one_line(monkeypatch, name):
    monkeypatch.setenv(name, "~no-such-user/d")
    with pytest.raises(UserError, match=f"{name}=~no-such-user/d: no such home folder is known here; set {name} to a whole"):
        paths.folder(name)


@pytest.mark.parametrize("name", ["HOME", "XDG_CACHE_HOME", "OMP_NUM_THREADS"])
@pytest.mark.parametrize("text", ["", " "])
def test_what_is_empty_is_unset_for_libraries_too(name, text):
    assert settled(f"import os; print({name!r} in os.environ)", **{name: text}) == "False\n"


@pytest.mark.parametrize("text", ["0", "-1", "many", "1.5", "2;", "1e3"])
def test_a_number_of_threads_that_is_none_is_one_line(text):
    result = run(sys.executable, "-m", "dgutils", "doctor", OMP_NUM_THREADS=text)
    assert (result.returncode, result.stderr.count("\n"), result.stdout) == (2, 1, "")
    assert f"dgutils: OMP_NUM_THREADS={text}: give a number of threads, such as " in result.stderr


@pytest.mark.parametrize("text", ["1", "16", "4,2"])
def test_a_number_of_threads_is_passed_on(text):
    assert settled("import os; print(os.environ['OMP_NUM_THREADS'])", OMP_NUM_THREADS=text) == f"{text}\n"


@pytest.mark.parametrize("text", ["/no/such/folder", "pyproject.toml", "../no such"])
@pytest.mark.parametrize("module", ["dgutils", "dgutils.paths"])
def test_a_clone_that_is_none_is_one_line_of_a_command(module, text):
    result = run(sys.executable, "-m", module, "doctor", DGUTILS_ROOT=text)
    assert result.returncode == 2 and result.stderr.count("\n") == 1
    assert "is no folder: name the clone's, or unset it" in result.stderr


@pytest.mark.parametrize(("given", "spins"), [({}, "1000"), ({"GOMP_SPINCOUNT": "7"}, "7"), ({"OMP_WAIT_POLICY": "ACTIVE"}, None),
                                              ({"OMP_WAIT_POLICY": ""}, "1000")])
def test_threads_that_wait_give_their_core_away_unless_the_user_says_how(monkeypatch, given, spins):
    for name in ("GOMP_SPINCOUNT", "OMP_WAIT_POLICY"):
        monkeypatch.delenv(name, raising=False)
    for name, text in given.items():
        monkeypatch.setenv(name, text)
    found = paths.environment()
    assert found.get("GOMP_SPINCOUNT") == spins and found.get("OMP_WAIT_POLICY") == given.get("OMP_WAIT_POLICY")


def test_variables_are_read_in_one_place_and_listed_in_the_docs():
    table = set(re.findall(r"^\| `([A-Z_]+)`", (ROOT / "docs/running.md").read_text(encoding="utf-8"), re.MULTILINE))
    for path in (ROOT / "dgutils").rglob("*.py"):
        named = set(re.findall(r"\"(DGUTILS_[A-Z]+|XDG_[A-Z_]+|G?OMP_[A-Z_]+|VERBOSE)\"", path.read_text(encoding="utf-8")))
        assert named <= table, f"{path} reads {named - table}"
        assert path == ROOT / "dgutils/paths.py" or not {n for n in named if "OMP_" not in n}, path
    assert {"DGUTILS_DATA", "DGUTILS_WEIGHTS", "DGUTILS_ROOT", "XDG_CACHE_HOME", "HOME", "OMP_NUM_THREADS"} <= table


# --- what the account configures


@pytest.fixture
def account(tmp_path):
    """Writes files of a home folder; returns the variables that make it the home."""

    def write(files):
        for name, text in files.items():
            path = tmp_path / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(text.replace("{home}", str(tmp_path)))
        return {"HOME": str(tmp_path), "XDG_CONFIG_HOME": str(tmp_path / ".config")}

    return write


def variables(home, **more):
    return home | {name: text.replace("{home}", home["HOME"]) for name, text in more.items()}


RC = ".config/matplotlib/matplotlibrc"


@pytest.mark.parametrize(("files", "more"), [
    ({RC: "savefig.bbox: tight\n"}, {}), ({RC: "text.usetex: True\nfont.size: 30\n"}, {}),
    ({"rc": "figure.dpi: 30\n"}, {"MATPLOTLIBRC": "{home}/rc"}), ({"m/matplotlibrc": "no.such: 1\n"}, {"MATPLOTLIBRC": "{home}/m"}),
    ({}, {"MPLBACKEND": "no-such-backend"})])  # fmt: skip
def test_plotting(account, files, more):
    code = "import matplotlib as m; print({k: v for k, v in m.rcParams.items() if k != 'backend'} == " \
           "{k: v for k, v in m.rcParamsDefault.items() if k != 'backend'})"  # fmt: skip
    cache = {"MPLCONFIGDIR": os.environ.get("MPLCONFIGDIR", "")} if not files else {}
    assert settled(code, **variables(account(files), **more, **cache)) == "True\n"


@pytest.mark.parametrize("more", [
    {"PYTHONOPTIMIZE": "2"}, {"PYTHONPATH": "{home}"}, {"PYTHONWARNINGS": "error"}, {"PYTHONUTF8": "0", "LC_ALL": "C"},
    {"PYTHONINSPECT": "1"}, {"PYTHONUSERBASE": "{home}"}, {"LC_ALL": "no_SUCH.ISO-8859-1"}, {"LC_ALL": "POSIX"},
    {"PYTHONIOENCODING": "latin-1"}, {"LANG": "tr_TR", "LANGUAGE": "tr"}], ids=lambda more: next(iter(more)))  # fmt: skip
def test_python_and_locale(account, more):
    home = account({"json.py": "raise SystemExit('shadowed')", "usercustomize.py": "raise SystemExit('customized')"})
    code = "import json, locale, sys, warnings; warnings.warn('w'); assert_off = not __debug__; " \
           "print(assert_off, sys.flags.inspect, locale.getpreferredencoding(False).lower(), sys.stdout.encoding, 'é')"  # fmt: skip
    assert settled(code, **variables(home, **more)) == "False 0 utf-8 utf-8 é\n"


@pytest.mark.parametrize(("files", "more"), [
    ({".ipython/profile_default/startup/00.py": "injected = 1"}, {}),
    ({".ipython/profile_default/ipython_config.py": "c.InteractiveShellApp.exec_lines = ['injected = 1']"}, {}),
    ({"i/profile_default/startup/00.py": "injected = 1"}, {"IPYTHONDIR": "{home}/i"})])  # fmt: skip
def test_ipython(account, files, more):
    code = "import sys, IPython; sys.argv = ['', '-c', 'print(\"injected\" in globals())']; IPython.start_ipython()"
    result = run(sys.executable, "-m", "dgutils.paths", "-c", code, **variables(account(files), **more))
    assert (result.stdout, result.stderr) == ("False\n", "")


@pytest.mark.parametrize("more", [{}, {"JUPYTER_PATH": "{home}/.local/share/jupyter"},
                                  {"JUPYTER_DATA_DIR": "{home}/.local/share/jupyter"}], ids=["home", "path", "data"])
def test_templates_of_pages(account, more):
    home = account({".local/share/jupyter/nbconvert/templates/lab/index.html.j2": "hijacked"})
    code = "import os; from jupyter_core.paths import jupyter_path; print([path for path in " \
           "jupyter_path('nbconvert', 'templates', 'lab') if os.path.exists(path + '/index.html.j2')])"  # fmt: skip
    found = settled(code, **variables(home, **more))
    assert sys.prefix in found and home["HOME"] not in found


@pytest.mark.skipif(not shutil.which("kpsewhich"), reason="needs TeX")
@pytest.mark.parametrize(("file", "more"), [
    ("texmf/tex/latex/booktabs.sty", {}), ("t/booktabs.sty", {"TEXINPUTS": "{home}/t:"}),
    ("t/plainnat.bst", {"BSTINPUTS": "{home}/t:"}), ("m/tex/latex/booktabs.sty", {"TEXMFHOME": "{home}/m"}),
    ("t/booktabs.sty", {"TEXINPUTS_pdflatex": "{home}/t:"})])  # fmt: skip
def test_latex(account, file, more):
    home = account({file: "% another's"})
    code = f"import subprocess; subprocess.run(['kpsewhich', '-progname=pdflatex', {Path(file).name!r}])"
    found = settled(code, **variables(home, **more)).strip()
    assert found and not found.startswith(home["HOME"])


@pytest.mark.skipif(not shutil.which("latexmk"), reason="needs TeX")
@pytest.mark.parametrize("file", [".latexmkrc", ".config/latexmk/latexmkrc", "work/latexmkrc"])
def test_latexmk(account, file, tmp_path):
    """The option with which report/build.py starts it keeps each of its files out; without, each is read."""
    (tmp_path / "work").mkdir()
    home = account({file: "die 'read';"})
    assert '"latexmk", "-norc"' in (ROOT / "report/build.py").read_text(encoding="utf-8")
    assert run("latexmk", "-norc", "-v", cwd=tmp_path / "work", **home).returncode == 0
    assert run("latexmk", "-n", "x.tex", cwd=tmp_path / "work", **home).returncode != 0


@pytest.fixture(scope="module")
def machine_pip():
    """The options that this machine, whoever uses it, sets for pip."""
    listed = run(sys.executable, "-m", "pip", "--isolated", "config", "list").stdout
    return {line.split("=")[0].rpartition(".")[2] for line in listed.splitlines()}


# Nothing of a home's pip configuration counts but where packages come from.
@pytest.mark.parametrize(("files", "more", "expected"), [
    ({".config/pip/pip.conf": "[install]\nuser = true\ntarget = /tmp/t\n"}, {}, {}),
    ({}, {"PIP_TARGET": "/tmp/t", "PIP_REQUIRE_VIRTUALENV": "1", "PIP_NO_DEPS": "1"}, {}),
    ({".config/pip/pip.conf": "[global]\nindex-url = https://a/simple\nno-binary = :all:\n"}, {}, {"index-url": "https://a/simple"}),
    ({".config/pip/pip.conf": "[global]\nindex-url = https://a/simple\n"}, {"PIP_INDEX_URL": "https://b/simple"}, {"index-url": "https://b/simple"}),
    ({"p": "[global]\nextra-index-url =\n  https://a\n  https://b\n"}, {"PIP_CONFIG_FILE": "{home}/p"}, {"extra-index-url": " https://a https://b"}),
    ({}, {"PIP_CERT": "/etc/my ca.pem", "PIP_PREFIX": "/tmp"}, {"cert": "/etc/my ca.pem"})])  # fmt: skip
def test_pip(account, machine_pip, tmp_path, files, more, expected):
    home = account(files)
    python = tmp_path / "clone/.venv/bin/python"
    python.parent.mkdir(parents=True)
    python.write_text('#!/bin/sh\ncase "$*" in *install*) echo "$@" >argv ;; *config*) exec '
                      f'{sys.executable} "$@" ;; esac\n')
    python.chmod(0o755)
    clean = {name: text for name, text in os.environ.items() if not name.startswith("PIP_")}
    result = subprocess.run(["sh", ROOT / "dgutils/setup.sh", "venv"], cwd=tmp_path / "clone", capture_output=True,
                            text=True, env=clean | variables(home, **more) | {"PYTHON": sys.executable})  # fmt: skip
    assert result.returncode == 0, result.stderr
    written = dict(line.split(" = ", 1) for line in (tmp_path / "clone/.venv/pip.conf").read_text().splitlines()[1:])
    assert {name: text for name, text in written.items() if name in expected or name not in machine_pip} == expected
    assert "--isolated" in (tmp_path / "clone/argv").read_text()


@pytest.mark.parametrize("mask", [0o777, 0o277, 0o077, 0o000])
def test_umask(tmp_path, mask):
    code = f"open({str(tmp_path / 'x')!r}, 'w').write('1'); import os; os.mkdir({str(tmp_path / 'd')!r})"
    subprocess.run([sys.executable, "-m", "dgutils.paths", "-c", code], cwd=ROOT, check=True, umask=mask)
    assert (tmp_path / "x").stat().st_mode & 0o600 == 0o600 and (tmp_path / "d").stat().st_mode & 0o700 == 0o700


@pytest.mark.parametrize("name", ["ONEDNN_DEFAULT_FPMATH_MODE", "NVIDIA_TF32_OVERRIDE", "ATEN_CPU_CAPABILITY",
                                  "TORCH_ALLOW_TF32_CUBLAS_OVERRIDE", "MKL_CBWR", "PYTEST_ADDOPTS", "GIT_DIR", "SOURCE_DATE_EPOCH",
                                  "TQDM_MININTERVAL", "TORCH_LOGS", "TORCHDYNAMO_DISABLE", "shell_escape", "TFMFONTS"])
def test_what_would_change_numbers_or_builds_is_dropped(monkeypatch, name):
    monkeypatch.setenv(name, "1")
    monkeypatch.setenv("https_proxy", "http://proxy")
    assert name not in paths.environment() and paths.environment()["https_proxy"] == "http://proxy"


def test_a_settled_process_stays_as_it_is(monkeypatch):
    settled = paths.environment()
    for name in os.environ.keys() - settled.keys():  # of pytest, of a worker of it, of other tests
        monkeypatch.delenv(name)
    for name, text in settled.items():
        monkeypatch.setenv(name, text)
    monkeypatch.setattr(os, "execve", lambda *arguments: pytest.fail("would start for ever"))
    paths.settle()
    monkeypatch.setenv("PYTHONOPTIMIZE", "1")
    with pytest.raises(pytest.fail.Exception):
        paths.settle()


# --- git


@pytest.fixture
def repository(tmp_path):
    """A function that makes a repository with one commit below tmp_path."""

    def make(name, **files):
        folder = tmp_path / name
        folder.mkdir(parents=True, exist_ok=True)
        for file, text in ({"code.py": "1\n"} | files).items():
            (folder / file).write_text(text)
        for command in (["init", "-q"], ["add", "."], ["commit", "-qm", "x"]):
            subprocess.run(["git", "-c", "user.name=n", "-c", "user.email=e@x.org", *command], cwd=folder, check=True)
        return folder

    yield make
    machine.revision_of.cache_clear()


def head(folder):
    return run("git", "rev-parse", "HEAD", cwd=folder).stdout.strip()


@pytest.mark.parametrize(("config", "more"), [
    ("[color]\nui = always\n[core]\nquotepath = false\n", {}), ("[status]\nshort = true\nbranch = true\nshowUntrackedFiles = all\n", {}),
    ("[core]\nautocrlf = true\nfileMode = false\n[diff]\nexternal = false\n", {}), ("", {"GIT_DIR": "{home}/other/.git"}),
    ("", {"GIT_WORK_TREE": "/"}), ("", {"GIT_INDEX_FILE": "/no/such"}), ("", {"LANGUAGE": "de", "GIT_TRACE": "1"})])  # fmt: skip
def test_revision_whatever_git_is_told(repository, tmp_path, monkeypatch, config, more):
    ours, other = repository("ours"), repository("other", other="2")
    (tmp_path / "config").write_text(config)
    monkeypatch.setenv("GIT_CONFIG_GLOBAL", str(tmp_path / "config"))
    for name, text in more.items():
        monkeypatch.setenv(name, text.replace("{home}", str(tmp_path)))
    (ours / "untracked").touch()
    clean = machine.revision_of(ours)
    machine.revision_of.cache_clear()
    (ours / "code.py").write_text("2\n")
    changed = machine.revision_of(ours)
    for name in more:
        monkeypatch.delenv(name)
    assert (clean, changed) == (head(ours), head(ours) + "-dirty") and head(ours) != head(other)


@pytest.mark.parametrize("place", ["copy", "deep/below/copy", "copy with spaces"])
def test_a_copy_inside_another_repository_has_no_revision(repository, tmp_path, place):
    above = repository("above")
    (above / place).mkdir(parents=True)
    (above / place / "pyproject.toml").touch()
    assert machine.revision_of(above / place) is None and machine.revision_of(above) == head(above)
    assert machine.revision_of(tmp_path) is None  # no repository at all


@pytest.mark.skipif(os.getuid() != 0, reason="only root can give a folder away")
def test_a_clone_of_another_user_has_its_revision(repository):
    folder = repository("theirs")
    revision = head(folder)
    for path in (folder, folder / ".git"):
        os.chown(path, 65534, 65534)
    assert head_is_refused(folder) and machine.revision_of(folder) == revision


def head_is_refused(folder):
    return "dubious ownership" in run("git", "rev-parse", "HEAD", cwd=folder, LANGUAGE="C").stderr


# --- checkouts


@pytest.mark.parametrize("config", [["core.autocrlf=true"], ["core.eol=crlf"], ["core.autocrlf=false", "core.eol=crlf"]])
def test_a_checkout_has_lf_and_binaries_as_they_are(repository, tmp_path, config):
    binary, text = bytes(range(256)) + b"\r\n\n\r", "a\nb\n"
    source = repository("source", **{".gitattributes": (ROOT / ".gitattributes").read_text(), "setup.sh": text,
                                     "x.csv": text, "x.ipynb": text, "Makefile": text})  # fmt: skip
    names = ("x.npz", "x.png", "x.pkl", "x.safetensors", "x.pdf")
    for name in names:
        (source / name).write_bytes(binary)
    options = [part for pair in config for part in ("-c", pair)]
    me = ["-c", "user.name=n", "-c", "user.email=e@x.org"]
    for command in (["add", "."], ["commit", "-qm", "y"], ["clone", "-q", ".", str(tmp_path / "clone")]):
        subprocess.run(["git", *options, *me, *command], cwd=source, check=True, capture_output=True)
    assert {(tmp_path / "clone" / name).read_bytes() for name in names} == {binary}
    assert {(tmp_path / "clone" / name).read_bytes() for name in ("setup.sh", "x.csv", "x.ipynb", "Makefile")} == {text.encode()}


@pytest.mark.skipif(not shutil.which("make"), reason="needs make")
@pytest.mark.parametrize("text", ["it's", "a;touch pwned", "$(shell touch pwned)", "`touch pwned`", "$(touch pwned)", '"', "a&b|c>pwned",
                                  "\\", "*", "#x", "--help", "$HOME"])  # fmt: skip
@pytest.mark.parametrize(("target", "variable", "before"), [("trace", "KEY", "--"), ("plan", "PROFILE", "--profile"),
                                                            ("reproduce", "ONLY", "--only"), ("reproduce", "NPROC", "--nproc"),
                                                            ("reproduce", "SET", "--set")])  # fmt: skip
def test_what_make_is_given_reaches_the_command_as_it_is(tmp_path, target, variable, before, text):
    text = text if variable in ("KEY", "PROFILE", "NPROC") else text.replace(" ", "_")  # words of a list
    shown = "printf '<%s>\\n'"  # instead of Python
    (tmp_path / "dgutils").mkdir()
    shutil.copy(ROOT / "Makefile", tmp_path)
    (tmp_path / "dgutils/setup.sh").touch()
    result = run("make", "-o", ".venv/.complete", target, f"{variable}={text}", f"PY={shown}", cwd=tmp_path)
    assert result.returncode == 0, result.stderr
    assert f"<{before}>\n<{text}>\n" in result.stdout and "'" not in result.stdout.replace(text, "")
    assert not (tmp_path / "pwned").exists()


# --- machines


@pytest.mark.parametrize(("quota", "expected"), [
    ("150000 100000", 1), ("20000 100000", 1), ("300000 100000", 3), ("1600000 100000", 8), ("max 100000", 8),
    ("nonsense", 8), (None, 8)])  # fmt: skip
@pytest.mark.parametrize("affinity", [True, False], ids=["Linux", "macOS"])
def test_cores_that_one_may_use(tmp_path, monkeypatch, quota, expected, affinity):
    if affinity:
        monkeypatch.setattr(os, "sched_getaffinity", lambda pid: set(range(8)), raising=False)
    else:
        monkeypatch.delattr(os, "sched_getaffinity", raising=False)
        monkeypatch.setattr(os, "cpu_count", lambda: 8)
    if quota:
        (tmp_path / "cpu.max").write_text(quota + "\n")
    assert paths.cores(tmp_path / "cpu.max") == expected


@pytest.mark.parametrize("left", [{"WORLD_SIZE": "4"}, {"WORLD_SIZE": ""}, {"WORLD_SIZE": "many", "RANK": "0"},
                                  {"RANK": "1", "LOCAL_RANK": "1", "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1"},
                                  {"WORLD_SIZE": "2", "TORCHELASTIC_RUN_ID": ""}, {"TORCHELASTIC_ERROR_FILE": "/tmp/e"}])
def test_leftovers_of_torchrun_mean_one_process(monkeypatch, left):
    from dgutils.pipeline.ranks import join, reporting

    for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "TORCHELASTIC_RUN_ID", "TORCHELASTIC_ERROR_FILE"):
        monkeypatch.delenv(name, raising=False)
    for name, text in left.items():
        monkeypatch.setenv(name, text)
    with reporting(), join() as group:
        assert (group.world, paths.torchrun_ranks()) == (1, 0)
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "none")
    assert paths.torchrun_ranks() == 2


RANKS = """
import sys
from dgutils.pipeline.ranks import join, reporting, run_ranks
if sys.argv[1:]:
    with reporting(), join() as group:
        group.barrier()
        sys.stdout.write(f"rank {group.rank}\\n")
else:
    run_ranks(2, [__file__, "rank"])
"""


@pytest.mark.skipif(os.getuid() != 0 or not shutil.which("unshare"), reason="only root can rename a machine")
def test_ranks_meet_on_a_machine_that_cannot_resolve_its_own_name(tmp_path):
    (tmp_path / "ranks.py").write_text(RANKS)
    result = run("unshare", "--uts", "sh", "-c", f"hostname no-such.invalid && exec {sys.executable} {tmp_path}/ranks.py",
                 PYTHONPATH=str(ROOT))  # fmt: skip
    if "unshare failed" in result.stderr:
        pytest.skip(result.stderr)
    assert (result.returncode, result.stderr) == (0, "") and sorted(result.stdout.split()) == ["0", "1", "rank", "rank"]


# --- commands


class Evil:
    def __reduce__(self):
        return os.system, ("touch pwned",)


@pytest.mark.parametrize("write", [
    lambda path: path.write_bytes(pickle.dumps({"ema": Evil()})), lambda path: torch.save({"w": Evil()}, path),
    lambda path: np.savez(path, a=np.array([Evil()]))], ids=["pickle", "torch", "numpy"])  # fmt: skip
def test_a_refused_file_is_exit_status_2(tmp_path, monkeypatch, capsys, write):
    monkeypatch.chdir(tmp_path)
    write(tmp_path / "x.npz")
    assert cli.main(["inspect", "x.npz"]) == 2
    out, error = capsys.readouterr()
    assert "REFUSED" in out and error == "dgutils: refused, for the reasons above: x.npz\n"
    assert not (tmp_path / "pwned").exists()


@pytest.mark.parametrize("path", [paths.runs_dir, paths.results_dir, paths.figures_dir])
@pytest.mark.parametrize("profile", ["/", "..", "../results/cifar10", "", "a b", "a/b", "-x", "Quick", "a\n", "{exp}", "~"])
def test_no_path_is_made_of_what_is_no_profile(path, profile):
    with pytest.raises(UserError, match="a name is one word of a-z, 0-9, - and _"):
        path(profile)


@pytest.mark.parametrize(("error", "status", "line"), [
    (KeyboardInterrupt(), 130, "stopped; the same command goes on where it was"), (UserError("a\n b"), 2, "a b"),
    (PermissionError(13, "Permission denied", "/x"), 2, "/x: Permission denied"), (OSError(28, "No space left"), 2, "No space left")])
def test_what_stops_a_command_is_one_line(monkeypatch, capsys, error, status, line):
    def stop(profile):
        raise error

    monkeypatch.setattr(cli.commands.commands["plan"], "callback", stop)
    assert __main__.main(["plan"]) == status
    assert capsys.readouterr().err.strip("\n") == f"dgutils: {line}"


@pytest.mark.parametrize("command", list(cli.commands.commands))
def test_every_command_explains_itself(command, capsys):
    assert cli.main([command, "--help"]) == 0
    out, error = capsys.readouterr()
    assert out.startswith(f"Usage: dgutils {command}") and error == ""


@pytest.mark.parametrize("given", [["--set", "a=1", "--set", "b=2"], ["--set=a=1", "--set", "b=2"]])
def test_options_may_be_repeated(monkeypatch, given):
    seen = {}
    monkeypatch.setattr(cli.commands.commands["reproduce"], "callback", lambda **values: seen.update(values))
    assert cli.main(["reproduce", *given, "--only", "03", "--only", "04", "--profile", "smoke"]) == 0
    assert seen == {"profile": "smoke", "only": ("03", "04"), "set": ("a=1", "b=2"), "cell_timeout": 24 * 3600,
                    "force": False}


@pytest.mark.parametrize(("arguments", "status", "said"), [(["doctor"], 1, "MISSING  packages"), (["plan"], 2, "package click is missing"),
                                                           ([], 2, "package click is missing")])  # fmt: skip
def test_commands_before_the_packages_are_there(arguments, status, said):
    code = f"import sys; sys.path.insert(0, {str(ROOT)!r})\nfrom dgutils.__main__ import main\nsys.exit(main({arguments!r}))"
    result = subprocess.run([sys.executable, "-S", "-c", code], capture_output=True, text=True)
    assert result.returncode == status and said in result.stdout + result.stderr and "Traceback" not in result.stderr


@pytest.mark.parametrize("command", ["-m dgutils plan --profile smoke", "-m report.trace --profile cifar10 arm.paper.first.kid_change",
                                     "-m dgutils --help"])  # fmt: skip
def test_nobody_reads_on(command):
    """As with `| head`: the reader has gone before the first line."""
    process = subprocess.Popen([sys.executable, *command.split()], cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    process.stdout.close()
    assert process.stderr.read() == b"" and process.wait() == 1
