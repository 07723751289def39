"""Runs the numbered notebooks with a profile's parameters, and believes none before it is complete."""

import ast
import difflib
import logging
import os
import re
import sys
import time
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import nbformat
import papermill
import yaml
from ipykernel.kernelspec import get_kernel_dict
from jupyter_client import AsyncKernelManager
from jupyter_client.kernelspec import KernelSpec
from nbclient.exceptions import CellTimeoutError
from traitlets import default

from dgutils.errors import UserError
from dgutils.paths import repo_root, runs_dir
from dgutils.pipeline.store import FULL_DISK, disk_errors, lock, log_line

SENTINEL = "NOTEBOOK COMPLETE: "  # + the notebook's name: what its last code cell prints
CELL_TIMEOUT = 24 * 3600  # seconds; a cell that takes longer is taken to hang

# Pictures of a committed run in the sources' markdown, for a code host: an executed copy has figures of its own.
COMMITTED = re.compile(r"^!\[.*\]\(\.\./figures/.*\)\n+", re.MULTILINE)

logging.getLogger("papermill").setLevel(logging.ERROR)  # it warns of parameters typed `a | b`, checked below


class ThisPython(AsyncKernelManager):
    """The kernel is this very interpreter, whatever kernels the machine or the user has registered."""

    @property
    def kernel_spec(self) -> KernelSpec:
        return KernelSpec(**get_kernel_dict())

    @default("transport_encryption")
    def _encrypt(self) -> str:
        return "auto"  # keeps other users of the machine out, and ipykernel from warning in every notebook


# --- parameters: the profile's YAML and --set against the notebooks' own declarations


def declared_parameters(path: Path) -> dict[str, ast.expr | None]:
    """Name -> annotated type, else the default's, of what the cell tagged `parameters` declares.

    Read by Python's parser: papermill's own reader overlooks annotations such as `int | None`.
    """
    cells = nbformat.read(path, as_version=4).cells
    declared = {}
    for cell in (cell for cell in cells if "parameters" in cell.metadata.get("tags", [])):
        for line in ast.parse(cell.source).body:
            if isinstance(line, ast.AnnAssign):
                declared[line.target.id] = line.annotation
            elif isinstance(line, ast.Assign):
                default = ast.literal_eval(line.value)
                declared[line.targets[0].id] = None if default is None else ast.Name(type(default).__name__)
    return declared


def fits(value: Any, hint: ast.expr | None) -> bool:
    """Whether a YAML value is of a type made of int, float, str, bool, None, list[...], dict[...] and |."""
    match hint:
        case ast.Constant(value=None):
            return value is None
        case ast.BinOp(left=left, right=right):
            return fits(value, left) or fits(value, right)
        case ast.Name(id="float"):
            return isinstance(value, int | float) and not isinstance(value, bool)
        case ast.Name(id=name):
            return type(value).__name__ == name
        case ast.Subscript(value=outer, slice=ast.Tuple(elts=[key, item])):
            return fits(value, outer) and all(fits(k, key) and fits(v, item) for k, v in value.items())
        case ast.Subscript(value=outer, slice=item):
            return fits(value, outer) and all(fits(v, item) for v in value)
    return True


def as_yaml_float(text: Any) -> str | None:
    """How YAML wants the number that `text` means ('1e-4' -> '1.0e-4'), or None where it means none."""
    try:
        float(text)
    except (TypeError, ValueError):
        return None
    mantissa, _, exponent = str(text).lower().partition("e")
    return (mantissa if "." in mantissa else f"{mantissa}.0") + (f"e{int(exponent):+d}" if exponent else "")


def check_parameters(values: Mapping[str, Any], declared: Mapping[str, ast.expr | None], source: str) -> None:
    for name, value in values.items():
        if name not in declared:
            close = difflib.get_close_matches(name, declared, n=1)
            hint = f"did you mean {close[0]}?" if close else "the notebooks' `parameters` cells list them all"
            raise UserError(f"unknown parameter {name} in {source}; {hint}")
        if not fits(value, declared[name]):
            better = as_yaml_float(value) if isinstance(value, str) else None
            raise UserError(f"{name} in {source} is {value!r}, but must be {ast.unparse(declared[name])}"
                            + (f"; write {better}" if better else ""))


def parse_override(text: str) -> tuple[str, Any]:
    """'name=value' -> (name, value), written as in Python (1e-4, [1, 2], None) or YAML (true, a word)."""
    name, separator, value = text.partition("=")
    if not separator or not name.isidentifier():
        raise UserError(f"--set {text}: write name=value")
    try:
        return name, ast.literal_eval(value)
    except (ValueError, SyntaxError):
        try:
            return name, yaml.safe_load(value)
        except yaml.YAMLError as error:
            raise UserError(f"--set {text}: neither Python nor YAML: {' '.join(str(error).split())}") from error


def load_profile(profile: str) -> dict[str, Any]:
    """The parameters of notebooks/profiles/<profile>.yaml, over those of the profile that its `base` names."""
    folder = repo_root() / "notebooks" / "profiles"
    known = sorted(path.stem for path in folder.glob("*.yaml"))
    if profile not in known:
        raise UserError(f"unknown profile {profile}: there are {', '.join(known) or 'none'} in {folder}")
    try:
        values = yaml.safe_load((folder / f"{profile}.yaml").read_text()) or {}
    except yaml.YAMLError as error:
        raise UserError(f"{folder / profile}.yaml is not YAML: {' '.join(str(error).split())}") from error
    if not isinstance(values, dict):
        raise UserError(f"{folder / profile}.yaml must hold lines `name: value`")
    base = values.pop("base", None)
    return (load_profile(base) if base else {}) | values


def every_parameter(profile: str, overrides: Mapping[str, Any] | None = None) -> dict[str, Any]:
    """All parameters that the notebooks have between them: their defaults, under the profile's, under the overrides."""
    values, overrides, declared, defaults = load_profile(profile), dict(overrides or {}), {}, {}
    for source in sorted((repo_root() / "notebooks").glob("[0-9][0-9]_*.ipynb")):
        declared |= declared_parameters(source)
        for cell in nbformat.read(source, as_version=4).cells:
            if "parameters" in cell.metadata.get("tags", []):
                defaults |= {line.target.id: ast.literal_eval(line.value) for line in ast.parse(cell.source).body}
    check_parameters(values, declared, f"profile {profile}")
    check_parameters(overrides, declared, "--set")
    return defaults | values | overrides | {"profile": profile}


# --- execution


def last_line(text: object) -> str:
    return (str(text).strip().splitlines() or [""])[-1]


def code_cells(notebook: nbformat.NotebookNode) -> list[nbformat.NotebookNode]:
    return [cell for cell in notebook.cells if cell.cell_type == "code" and cell.source.strip()]


def why_incomplete(notebook: nbformat.NotebookNode, name: str) -> str | None:
    """Why an executed notebook does not count as done; None if it does.

    Papermill's own verdict won't do: sys.exit(0) in a cell, which skips the rest, is success to it.
    """
    cells = code_cells(notebook)
    for number, cell in enumerate(cells, 1):
        for output in cell.outputs:
            if output.output_type == "error":
                return f"code cell {number}: {output.ename}: {last_line(output.evalue)}"
        if cell.execution_count is None:
            return f"code cell {number} did not run"
    printed = "".join(out.text for cell in cells[-1:] for out in cell.outputs if out.output_type == "stream")
    if SENTINEL + name not in printed.splitlines():
        return f"its last code cell did not print '{SENTINEL}{name}'"
    return None


def run_notebook(source: Path, values: Mapping[str, Any], out_dir: Path, cell_timeout: int = CELL_TIMEOUT) -> Path:
    """Execute one notebook with these parameters; out_dir/notebooks/<name>.ipynb appears when it is complete.

    Cells run in the repository's root, in this interpreter, their output shown as it comes, each for at most
    `cell_timeout` seconds (0: for ever). A failure is kept as <name>.failed.ipynb and raised as a UserError;
    what an earlier run completed stays. Of two runs of one notebook the second waits for the first.
    """
    name = source.stem
    done = out_dir / "notebooks" / f"{name}.ipynb"
    temporary, failed = done.with_name(f".{name[:2]}.tmp.ipynb"), done.with_name(f"{name}.failed.ipynb")
    with disk_errors(out_dir), lock(out_dir / "locks" / f"{name}.lock", True, log_line):
        temporary.parent.mkdir(parents=True, exist_ok=True)
        temporary.write_bytes(source.read_bytes())
        problem = None
        try:
            papermill.execute_notebook(
                source, temporary, dict(values), cwd=repo_root(), kernel_name="python3", language="python",
                kernel_manager_class=ThisPython, stdout_file=sys.stdout, stderr_file=sys.stderr,
                execution_timeout=cell_timeout,
                progress_bar=False,  # the cells' own say more
                coalesce_streams=True,  # and leave their last state in the notebook, not every one
            )
        except papermill.PapermillExecutionError:
            pass  # the notebook shows the cell and its error
        except CellTimeoutError:
            problem = f"not done after {cell_timeout} s; unless it hangs, raise --cell-timeout (what is done is kept)"
        except Exception as error:  # a dead kernel: whatever it is, the notebook is not done
            if getattr(error, "errno", None) in FULL_DISK:
                raise  # the copy of the notebook is cut short, too
            problem = f"{type(error).__name__}: {last_line(error)}"
        executed = nbformat.read(temporary, as_version=4)
        started = sum(bool(cell.metadata.get("papermill", {}).get("start_time")) for cell in code_cells(executed))
        if problem:
            problem = f"code cell {started}: {problem}"
        if problem := problem or why_incomplete(executed, name):
            os.replace(temporary, failed)
            raise UserError(f"notebook {name} failed: {problem} (see {failed})")
        for cell in executed.cells:
            if cell.cell_type == "markdown":
                cell.source = COMMITTED.sub("", cell.source)
            for output in cell.get("outputs", []):
                if "image/png" in output.get("data", {}):  # sliders need a kernel; their picture does not
                    output.data.pop("application/vnd.jupyter.widget-view+json", None)
        executed.metadata.pop("widgets", None)
        nbformat.write(executed, temporary)
        os.replace(temporary, done)
        failed.unlink(missing_ok=True)
    return done


def run_profile(profile: str, only: str | Iterable[str] | None = None,
                overrides: Mapping[str, Any] | None = None, cell_timeout: int = CELL_TIMEOUT) -> dict[str, float]:
    """Run all notebooks, or those whose names begin with `only`, in order. Returns name -> seconds.

    Each notebook gets what it declares of the profile's values and the overrides. The value of `profile` is
    always the YAML file's name, so that results of different profiles never mix. cell_timeout: `run_notebook`.
    """
    if cell_timeout < 0:
        raise UserError(f"--cell-timeout {cell_timeout}: give seconds, or 0 for no limit")
    values, overrides = load_profile(profile), dict(overrides or {})
    folder = repo_root() / "notebooks"
    sources = sorted(folder.glob("[0-9][0-9]_*.ipynb"))
    wanted = ("",) if only is None else (only,) if isinstance(only, str) else tuple(only)
    selected = [source for source in sources if source.stem.startswith(wanted)]
    if not selected:
        raise UserError(f"no notebook begins with {' or '.join(wanted)}: there are "
                        f"{', '.join(source.stem for source in sources) or 'none'} in {folder}")
    declared = {source: declared_parameters(source) for source in sources}
    check_parameters(values, {k: v for source in sources for k, v in declared[source].items()},
                     f"profile {profile}")
    check_parameters(overrides, {k: v for source in selected for k, v in declared[source].items()}, "--set")
    if (values | overrides).get("profile", profile) != profile:
        raise UserError(f"profile is set to another value than {profile}: choose it with --profile only")
    values |= overrides | {"profile": profile}

    seconds = {}
    for number, source in enumerate(selected, 1):
        print(f"[{number}/{len(selected)}] {source.stem}", flush=True)
        start = time.monotonic()
        run_notebook(source, {k: v for k, v in values.items() if k in declared[source]}, runs_dir(profile),
                     cell_timeout)
        seconds[source.stem] = time.monotonic() - start
    print("\n".join(f"{name:<30} {duration:7.1f} s" for name, duration in seconds.items()), flush=True)
    return seconds
