"""Where things live, and what the environment says: each variable that dgutils reads is read here, and only here.

An empty variable counts as unset. In a folder `~` stands for the home, and a relative one counts from the clone's
folder, since notebooks run in the root (papermill) or in notebooks/ (JupyterLab). Needs nothing but Python's library.
"""

from __future__ import annotations

import os
import re
import sys
from pathlib import Path

from dgutils.errors import UserError, require

# What an account may have set for other programs. Here it would change numbers (arithmetic), figures or pages, or
# break a build: names that begin so are dropped.
ACCOUNT = (
    "PYTHON", "MPLBACKEND", "IPYTHON", "JUPYTER_PATH", "JUPYTER_DATA_DIR", "JUPYTER_RUNTIME_DIR", "PYTEST_",
    "GIT_DIR", "GIT_WORK_TREE", "GIT_INDEX_FILE", "GIT_OBJECT", "GIT_COMMON_DIR", "GIT_NAMESPACE", "GIT_CEILING",
    "TEX", "BIB", "BST", "LATEXMK", "max_print_line", "openin_any", "openout_any", "shell_escape", "SOURCE_DATE_EPOCH",
    "TFMFONTS", "T1FONTS", "VFFONTS", "ENCFONTS", "TQDM_", "TORCH_LOGS", "TORCHDYNAMO_", "TORCHINDUCTOR_",
    "PYTORCH_JIT", "ONEDNN_", "DNNL_", "ATEN_", "NPY_", "MKL_CBWR", "MKL_ENABLE_INSTRUCTIONS", "OPENBLAS_CORETYPE",
    "NVIDIA_TF32_OVERRIDE", "TORCH_ALLOW_TF32",
)  # fmt: skip


def said(name: str) -> str | None:
    """The text of an environment variable without blanks around it; None where it is unset or empty."""
    return os.environ.get(name, "").strip() or None


def verbose() -> bool:
    """Whether the user wants to see on the terminal what otherwise goes to the log alone."""
    return said("VERBOSE") not in (None, "0")


def folder(name: str, default: str | None = None, below: Path | None = None) -> Path | None:
    """The folder that an environment variable names, or the default; relative ones lie below the clone (or `below`)."""
    if (text := said(name) or default) is None:
        return None
    try:
        path = Path(text).expanduser()
    except RuntimeError:
        raise UserError(f"{name}={text}: no such home folder is known here; set {name} to a whole path") from None
    return path if path.is_absolute() else ((below or repo_root()) / path).resolve()


def repo_root() -> Path:
    """The clone: the folder with pyproject.toml above this file, or the one that $DGUTILS_ROOT names."""
    clone = next((above for above in Path(__file__).resolve().parents if (above / "pyproject.toml").is_file()), None)
    root = folder("DGUTILS_ROOT", below=clone or Path.cwd()) or clone
    require(root, "dgutils is installed apart from its repository: set DGUTILS_ROOT to the clone's folder")
    require(root.is_dir(), f"DGUTILS_ROOT names {root}, which is no folder: name the clone's, or unset it")
    return root.resolve()


def _of(profile: str, *parts: str) -> Path:
    """A folder of the clone that belongs to a profile. Raises UserError for what is no profile's name."""
    require(re.fullmatch("[a-z0-9_][a-z0-9_-]*", profile),
            f"profile {profile!r}: a name is one word of a-z, 0-9, - and _, as in notebooks/profiles")
    return repo_root().joinpath(*parts, profile)


def runs_dir(profile: str) -> Path:
    """Artifacts and executed notebooks of a profile; git-ignored."""
    return _of(profile, "runs")


def results_dir(profile: str) -> Path:
    """The result records that the report reads."""
    return _of(profile, "report", "results")


def figures_dir(profile: str) -> Path:
    """Figures, each named for the notebook that made it."""
    return _of(profile, "figures")


def data_dir() -> Path | None:
    """The folder of data sets that the user named ($DGUTILS_DATA), or None."""
    return folder("DGUTILS_DATA")


def cache_dir() -> Path:
    """Downloads, which all clones of a user share: $XDG_CACHE_HOME/dgutils, or ~/.cache/dgutils."""
    return folder("XDG_CACHE_HOME", "~/.cache") / "dgutils"


def weights_dir() -> Path:
    """Published weights: $DGUTILS_WEIGHTS, or a folder of the cache."""
    return folder("DGUTILS_WEIGHTS") or cache_dir() / "weights"


def cores(cpu_max: Path = Path("/sys/fs/cgroup/cpu.max")) -> int:
    """The processor cores that this process may use: those it is bound to, or fewer by its container's quota."""
    count = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1  # macOS: all
    try:
        quota, period = cpu_max.read_text().split()
        return min(count, max(1, int(quota) // int(period)))
    except (OSError, ValueError):  # no such file, or "max"
        return count


def torchrun_ranks() -> int:
    """How many processes torchrun started together; 0 without it, also where some of its variables are left over."""
    return int(os.environ["WORLD_SIZE"]) if said("TORCHELASTIC_RUN_ID") else 0


def inherited() -> dict[str, str]:
    """This process's environment without what the account set for other programs, and without our empty variables."""
    ours = {"HOME", "XDG_CACHE_HOME", "OMP_NUM_THREADS"}  # libraries read them, too
    return {name: text for name, text in os.environ.items()
            if not name.startswith(ACCOUNT) and (text.strip() or name not in ours)}


def environment() -> dict[str, str]:
    """The environment in which we work, and all that we start: `inherited`, and the account's files are hidden.

    These are matplotlib's configuration, IPython's, nbconvert's templates and TeX's. Texts are UTF-8 whatever the
    locale. Unless the user says how, a thread that waits gives its core away after microseconds: OpenMP's milliseconds
    of spinning cost a run beside other work ten times what they save it alone.
    Raises UserError for a number of threads that is none: each process would complain of it.
    """
    threads = said("OMP_NUM_THREADS") or "1"
    require(re.fullmatch("[1-9][0-9]{0,3}(,[1-9][0-9]{0,3})*", threads),
            f"OMP_NUM_THREADS={threads}: give a number of threads, such as {cores()}, or unset it")
    calm = {} if said("OMP_WAIT_POLICY") or said("GOMP_SPINCOUNT") else {"GOMP_SPINCOUNT": "1000"}
    ours = repo_root() / ".account"  # directly below a folder that exists: else IPython takes a temporary one
    return inherited() | calm | dict.fromkeys(("TEXMFHOME", "TEXMFVAR", "TEXMFCONFIG"), str(ours / "texmf")) | {
        "PYTHONUTF8": "1", "PYTHONNOUSERSITE": "1", "MATPLOTLIBRC": os.devnull, "IPYTHONDIR": str(ours),
        "JUPYTER_DATA_DIR": str(ours / "jupyter"), "JUPYTER_PREFER_ENV_PATH": "1"}


def settle(*arguments: str) -> None:
    """Start this program again in `environment`, unless it is there, or Python with the arguments that are given.

    Python reads its variables when it starts. What is written from then on its owner can read, whatever the umask.
    """
    if arguments or environment() != dict(os.environ):
        os.umask(os.umask(0) & 0o077)
        os.execve(sys.executable, [sys.executable, *(arguments or sys.orig_argv[1:])], environment())


if __name__ == "__main__":  # python -m dgutils.paths ARGUMENTS: python ARGUMENTS, settled
    try:
        settle(*sys.argv[1:])
    except UserError as error:
        print(f"dgutils: {error}", file=sys.stderr)
        sys.exit(2)
