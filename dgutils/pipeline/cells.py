"""The notebooks' sources: their cells, checked, and what their tagged cells declare, run without a kernel."""

import ast
import linecache
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import nbformat

from dgutils.errors import UserError, require
from dgutils.paths import repo_root
from dgutils.pipeline.parameters import Parameters

DECLARING = ("setup", "arms")  # tags of the cells that `experiment_of` runs


def sources(begin: str | tuple[str, ...] = "") -> list[Path]:
    """The numbered notebooks whose names begin so. Raises UserError if there are none."""
    folder = repo_root() / "notebooks"
    every = sorted(folder.glob("[0-9][0-9]_*.ipynb"))
    found = [path for path in every if path.stem.startswith(begin)]
    require(found, f"no notebook begins with {begin if isinstance(begin, str) else ' or '.join(begin)}: there are "
            f"{', '.join(path.stem for path in every) or 'none'} in {folder}")
    return found


def read(path: Path) -> nbformat.NotebookNode:
    """A notebook, whose cell of parameters declares names of `Parameters`, by literals. Raises UserError if not."""
    name = f"notebooks/{path.name}"
    try:
        notebook = nbformat.reads(path.read_text(encoding="utf-8"), as_version=4)
    except Exception as error:  # nbformat has many of its own
        first = str(error).strip().splitlines()[0]
        raise UserError(f"{name} is no notebook: {first}: finish git's merge, or restore it with git") from error
    tagged = _tagged(path, notebook, {"parameters"})
    require(len(tagged) == 1, f"{name} has {len(tagged)} cells with the tag `parameters`: give it to one, in "
            "JupyterLab's property inspector")
    seen = set()
    for line in tagged[0][1].body:
        declared = getattr(getattr(line, "target", None) or getattr(line, "targets", [None])[0], "id", None)
        try:
            ast.literal_eval(line.value)
        except (AttributeError, ValueError, TypeError):
            declared = None
        require(declared in Parameters.model_fields and declared not in seen, f"{tagged[0][0]}: "
                f"{ast.unparse(line)[:60]!r}: write `name: type = value` only, a known parameter, once, a plain value")
        seen.add(declared)
    return notebook


def _tagged(path: Path, notebook: nbformat.NotebookNode, tags: set[str]) -> list[tuple[str, ast.Module, set[str]]]:
    """(place, code, tags) of the code cells that have one of these tags."""
    found = []
    for number, cell in enumerate(notebook.cells, 1):
        place, own = f"notebooks/{path.name}, cell {number}", tags & set(cell.metadata.get("tags", []))
        if cell.cell_type != "code" or not own:
            continue
        try:
            found.append((place, ast.parse(cell.source, place), own))
            lines = cell.source.splitlines(keepends=True)
            linecache.cache[place] = len(cell.source), None, lines, place  # so that a rule written here has a source
        except SyntaxError as error:
            line = (cell.source.splitlines() or [""])[(error.lineno or 1) - 1].strip()
            raise UserError(f"{place}: {line[:60]!r} is not Python (no magics here): {error.msg}") from error
    return found


def experiment_of(path: Path, values: Mapping[str, Any]):
    """The `experiment` of a notebook after its cells with the tags `parameters`, `setup` and `arms`, run here.

    values: parameters that are set instead of the profile's. Raises UserError naming the cell that fails.
    """
    namespace: dict[str, Any] = {"__name__": "__main__"}
    for place, code, tags in _tagged(path, read(path), {"parameters", *DECLARING}):
        try:
            exec(compile(code, place, "exec"), namespace)
        except UserError:
            raise
        except Exception as error:
            raise UserError(f"{place}: {type(error).__name__}: {error} (cells with the tag {' or '.join(DECLARING)} "
                            "may use each other only)") from error
        if "parameters" in tags:
            namespace |= values
    require("experiment" in namespace, f"notebooks/{path.name} makes no `experiment` in a cell with the tag `setup`")
    return namespace["experiment"]
