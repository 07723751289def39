"""The notebooks' sources: their cells, checked, and what their tagged cells declare, run without a kernel."""

import ast
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import nbformat

from dgutils.errors import UserError
from dgutils.paths import repo_root
from dgutils.pipeline.parameters import Parameters

DECLARING = ("setup", "arms")  # tags of the cells that `experiment_of` runs


def sources(begin: str | tuple[str, ...] = "") -> list[Path]:
    """The numbered notebooks whose names begin so. Raises UserError if there are none."""
    folder = repo_root() / "notebooks"
    every = sorted(folder.glob("[0-9][0-9]_*.ipynb"))
    if not (found := [path for path in every if path.stem.startswith(begin)]):
        wanted = " or ".join([begin] if isinstance(begin, str) else begin)
        raise UserError(f"no notebook begins with {wanted}: there are "
                        f"{', '.join(path.stem for path in every) or 'none'} in {folder}")
    return found


def _place(path: Path, number: int) -> str:
    return f"notebooks/{path.name}, cell {number}"


def read(path: Path) -> nbformat.NotebookNode:
    """A notebook, whose cell of parameters declares names of `Parameters`, by literals. Raises UserError if not."""
    try:
        text = path.read_bytes().decode()
        if marked := re.search(r"^(<{7} |={7}$|>{7} )", text, re.M):
            line = text.count("\n", 0, marked.start()) + 1
            raise UserError(f"notebooks/{path.name}, line {line}: a conflict marker of git: finish the merge first")
        notebook = nbformat.reads(text, as_version=4)
    except UserError:
        raise
    except Exception as error:  # nbformat has many of its own
        raise UserError(f"notebooks/{path.name} is no notebook: {str(error).strip().splitlines()[0]}: restore it with "
                        "git") from error
    tagged = [(n, cell) for n, cell in enumerate(notebook.cells, 1) if "parameters" in cell.metadata.get("tags", [])]
    if len(tagged) != 1:
        raise UserError(f"notebooks/{path.name} has {len(tagged)} cells with the tag `parameters`: give it to one, in "
                        "JupyterLab's property inspector")
    number, cell = tagged[0]
    for line in _parsed(path, number, cell.source).body:
        name = getattr(getattr(line, "target", None) or getattr(line, "targets", [None])[0], "id", None)
        try:
            ast.literal_eval(line.value)
        except (AttributeError, ValueError, TypeError):
            name = None
        if name not in Parameters.model_fields:
            raise UserError(f"{_place(path, number)}: {ast.unparse(line)[:60]!r}: write `name: type = value` only, a "
                            "known parameter and a plain value")
    return notebook


def _parsed(path: Path, number: int, source: str) -> ast.Module:
    try:
        return ast.parse(source, f"{path.name}, cell {number}")
    except SyntaxError as error:
        line = (source.splitlines() or [""])[(error.lineno or 1) - 1].strip()
        raise UserError(f"{_place(path, number)}: {line[:60]!r} is not Python (no magics here): {error.msg}") from error


def experiment_of(path: Path, values: Mapping[str, Any]):
    """The `experiment` of a notebook after its cells with the tags `parameters`, `setup` and `arms`, run here.

    values: parameters that are set instead of the profile's. Raises UserError naming the cell that fails.
    """
    namespace: dict[str, Any] = {"__name__": "__main__"}
    for number, cell in enumerate(read(path).cells, 1):
        tags = cell.metadata.get("tags", [])
        if cell.cell_type != "code" or not {"parameters", *DECLARING} & set(tags):
            continue
        code = compile(_parsed(path, number, cell.source), f"{path.name}, cell {number}", "exec")
        try:
            exec(code, namespace)
        except UserError:
            raise
        except Exception as error:
            raise UserError(f"{_place(path, number)}: {type(error).__name__}: {error} (cells with the tag "
                            f"{' or '.join(DECLARING)} may use each other only)") from error
        if "parameters" in tags:
            namespace |= values
    if "experiment" not in namespace:
        raise UserError(f"notebooks/{path.name} makes no `experiment` in a cell with the tag `setup`")
    return namespace["experiment"]
