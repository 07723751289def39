"""What a result was made with: the device, its precision, the versions of packages, the code's revision."""

import platform
import re
import subprocess
import sys
from datetime import UTC, datetime
from functools import cache
from importlib import metadata
from pathlib import Path

from tqdm import tqdm

from dgutils.paths import cores, inherited


def log_line(line: str) -> None:
    """Say a line to people, on stderr, without breaking a progress bar."""
    tqdm.write(f"dgutils: {line}", file=sys.stderr)


def device():
    """The accelerator if there is one, else the CPU, as torch.device."""
    import torch

    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def resolve_precision(precision: str, pixels: bool = True) -> str:
    """'auto' is bfloat16 where the hardware multiplies it natively, else float32; of pixels float32 on a GPU.

    There torch computes float32's convolutions in TF32, which keeps 99.9 % of an image's pixels within one grey level
    of float32 proper where bfloat16 keeps 94.5 % (docs/gpu.md). pixels: whether images come of it, not weights.
    """
    import torch

    if precision != "auto":
        return precision
    if device().type == "cuda":
        return "bfloat16" if not pixels and torch.cuda.is_bf16_supported() else "float32"
    return "bfloat16" if torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported() else "float32"


@cache
def revision_of(root: Path) -> str | None:
    """The git revision of a clone, with -dirty if its code is changed; None of a folder that is none, or unreadable."""

    def git(*arguments):
        # Another user's clone is safe: it is its code that runs here.
        command = ["git", "--no-optional-locks", "-C", root, "-c", f"safe.directory={root}", *arguments]
        return subprocess.run(command, capture_output=True, text=True, check=True,
                              env=inherited() | {"LC_ALL": "C"}).stdout.strip()  # fmt: skip

    try:
        if not root.samefile(git("rev-parse", "--show-toplevel")):
            return None  # a copy inside another repository
        # What notebooks write beside the code, results and figures, makes no other code.
        code = (":/", ":(top,exclude)report/results", ":(top,exclude)figures")
        changed = git("status", "--porcelain", "--untracked-files=no", "--", *code)
        return git("rev-parse", "HEAD") + "-dirty" * bool(changed)
    except (OSError, subprocess.CalledProcessError):
        return None


@cache
def provenance() -> dict:
    """What makes the results of this process: device, package versions, code revision (None outside git)."""
    torch = sys.modules.get("torch")
    if torch is not None and torch.cuda.is_available():
        device = torch.cuda.get_device_name()
    else:
        cpuinfo = Path("/proc/cpuinfo")
        model = re.search(r"model name\s*:\s*(.+)", cpuinfo.read_text() if cpuinfo.exists() else "")
        device = f"{model[1].strip() if model else platform.machine()}, {cores()} cores"
    versions = {name: metadata.version(name) for name in ("torch", "numpy")}
    versions["python"] = platform.python_version()
    return {"device": device, "revision": revision_of(Path(__file__).resolve().parents[1]), "versions": versions}


def now() -> str:
    """The present moment, UTC, to the second."""
    return datetime.now(UTC).isoformat(timespec="seconds")
