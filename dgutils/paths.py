"""Where things live in the clone. A notebook runs in notebooks/ (JupyterLab) or in the root (papermill)."""

import os
from pathlib import Path

from dgutils.errors import UserError


def repo_root() -> Path:
    """The folder with pyproject.toml above this file; tests put another in its place with DGUTILS_ROOT."""
    if override := os.environ.get("DGUTILS_ROOT"):
        return Path(override).resolve()
    for folder in Path(__file__).resolve().parents:
        if (folder / "pyproject.toml").is_file():
            return folder
    raise UserError("dgutils is installed apart from its repository: set DGUTILS_ROOT to the clone's folder")


def runs_dir(profile: str) -> Path:
    """Artifacts and executed notebooks of a profile; git-ignored."""
    return repo_root() / "runs" / profile


def results_dir(profile: str) -> Path:
    """The result records that the report reads."""
    return repo_root() / "report" / "results" / profile


def figures_dir(profile: str) -> Path:
    """Figures, each named for the notebook that made it."""
    return repo_root() / "figures" / profile


def weights_dir() -> Path:
    """Published weights: $DGUTILS_WEIGHTS, or a folder of the user's cache, which all clones share."""
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    return Path(os.environ.get("DGUTILS_WEIGHTS") or cache / "dgutils" / "weights").expanduser().absolute()
