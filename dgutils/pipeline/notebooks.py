"""Runs the numbered notebooks with a profile's parameters, and believes none before it is complete."""

import hashlib
import json
import logging
import os
import sys
import time
from collections.abc import Iterable, Mapping
from importlib.metadata import version
from pathlib import Path
from typing import Any

import nbformat
import papermill
from ipykernel.kernelspec import get_kernel_dict
from jupyter_client import AsyncKernelManager
from jupyter_client.kernelspec import KernelSpec
from nbclient.exceptions import CellTimeoutError
from traitlets import default

from dgutils.errors import UserError, require
from dgutils.files import FULL_DISK, digest_of_file, disk_errors, lock
from dgutils.paths import figures_dir, repo_root, results_dir, runs_dir, verbose, weights_dir
from dgutils.pipeline import cells, parameters
from dgutils.sources import places
from dgutils.terminal import OURS, Screen, log_file, note, tally

SENTINEL = "NOTEBOOK COMPLETE: "  # + the notebook's name: what its last code cell prints
CELL_TIMEOUT = 24 * 3600  # seconds; a cell that takes longer is taken to hang

logging.getLogger("papermill").setLevel(logging.ERROR)  # it warns of parameters typed `a | b`, checked below


class ThisPython(AsyncKernelManager):
    """The kernel is this very interpreter, whatever kernels the machine or the user has registered."""

    @property
    def kernel_spec(self) -> KernelSpec:
        # its errors are the cells'; what its log adds is that shutting it down interrupts it, if it is quick enough
        return KernelSpec(**get_kernel_dict(extra_arguments=["--IPKernelApp.log_level=50"]))

    @default("transport_encryption")
    def _encrypt(self) -> str:
        return "auto"  # keeps other users of the machine out, and ipykernel from warning in every notebook


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


# --- what is unchanged


def state_of(source: Path, p: parameters.Parameters) -> tuple[str, str] | None:
    """Digests of all that a notebook follows from, and of what it wrote; None if that cannot be told.

    It follows from its source, its parameters, our code, the libraries, data and weights (by size and date, as they are
    large), and the results of the notebooks before it. It wrote its results and its figures, and the store is there.
    """
    number, package, root = source.name[:2], Path(__file__).resolve().parents[1], repo_root()
    results, folders = sorted(results_dir(p.profile).glob("*.json")), places(p.dataset)
    files = [source, *package.rglob("*.py"), *package.glob("assets/*.yaml"), *root.glob("requirements.txt"),
             *(path for path in results if path.name[:2] < number)]
    written = [*results_dir(p.profile).glob(f"{number}.json"), *figures_dir(p.profile).glob(f"{number}_*")]
    try:
        large = [path for folder in folders for path in (*folder.rglob("*"), *folder.parent.glob("*.*"))]
        large += [*weights_dir().glob("*"), *package.glob("assets/*.safetensors")]
        stats = [(str(path), path.stat().st_size, path.stat().st_mtime_ns) for path in large]
        digests = [sorted((path.name, digest_of_file(path)) for path in paths) for paths in (files, written)]
    except (OSError, UserError):  # a file that vanishes while it is looked at; no home, where weights might be
        return None
    libraries = [sys.version, *(version(name) for name in ("torch", "numpy", "scipy"))]
    follows_from = p.model_dump(), libraries, digests[0], sorted(stats)
    wrote = digests[1], (runs_dir(p.profile) / "store").is_dir()
    before, after = (json.dumps(what, sort_keys=True, default=str).encode() for what in (follows_from, wrote))
    return hashlib.sha256(before).hexdigest(), hashlib.sha256(after).hexdigest()


def unchanged(source: Path, p: parameters.Parameters) -> str | None:
    """When a notebook was executed, if executing it again could not change what it found; in any doubt, None."""
    done = runs_dir(p.profile) / "notebooks" / source.name
    try:
        executed, state = nbformat.read(done, as_version=4), state_of(source, p)
        if not state or executed.metadata.get("state") != list(state) or why_incomplete(executed, source.stem):
            return None
        return time.strftime("%d %b %H:%M", time.localtime(done.stat().st_mtime))
    except (OSError, ValueError, AttributeError, nbformat.ValidationError):  # not there, or damaged
        return None


def run_notebook(source: Path, p: parameters.Parameters, given: Mapping[str, Any], cell_timeout: int,
                 screen: Screen) -> None:
    """Execute one notebook; runs/<profile>/notebooks/<name>.ipynb appears when it is complete.

    p: all parameters; given: those that are not the profile's. Cells run in the repository's root, in this interpreter,
    each for at most `cell_timeout` seconds (0: for ever). What they write to stderr goes to `screen`, and is no part of
    a complete notebook. A failure is kept as <name>.failed.ipynb and raised as a UserError; what an earlier run
    completed stays. Of two runs of one notebook the second waits for the first.
    """
    name, out_dir = source.stem, runs_dir(p.profile)
    done = out_dir / "notebooks" / f"{name}.ipynb"
    temporary, failed = done.with_name(f".{name[:2]}.tmp.ipynb"), done.with_name(f"{name}.failed.ipynb")
    with disk_errors(out_dir), lock(out_dir / "locks" / f"{name}.lock", True, screen.say):
        temporary.parent.mkdir(parents=True, exist_ok=True)
        temporary.write_bytes(source.read_bytes())
        problem, before = None, state_of(source, p)  # what is changed while it runs is not what it was made from
        try:
            # Paths are templates to papermill, which fills their {braces} in.
            paths = [str(path).replace("{", "{{").replace("}", "}}") for path in (source, temporary)]
            papermill.execute_notebook(
                *paths, {**given, "profile": p.profile}, cwd=repo_root(), kernel_name="python3", language="python",
                kernel_manager_class=ThisPython, stdout_file=sys.stdout if verbose() else None, stderr_file=screen,
                execution_timeout=cell_timeout, progress_bar=False,  # the cells' own say more
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
        for cell in (cell for cell in executed.cells if cell.cell_type == "code"):
            cell.outputs = [output for output in cell.outputs if output.get("name") != "stderr"]
            for output in cell.outputs:
                if "image/png" in output.get("data", {}):  # sliders need a kernel; their picture does not
                    output.data.pop("application/vnd.jupyter.widget-view+json", None)
        executed.metadata.pop("widgets", None)
        if before and (after := state_of(source, p)):
            executed.metadata["state"] = [before[0], after[1]]
        nbformat.write(executed, temporary)
        os.replace(temporary, done)
        failed.unlink(missing_ok=True)


def run_profile(profile: str, only: str | Iterable[str] | None = None, overrides: Mapping[str, Any] | None = None,
                cell_timeout: int = CELL_TIMEOUT, force: bool = False) -> dict[str, float]:  # fmt: skip
    """Run all notebooks, or those whose names begin with `only`, with a profile and overrides: name -> seconds.

    One that is `unchanged` is not executed again, unless `force`. It prints a line for each notebook when it is done,
    and how many artifacts were found and made.
    """
    require(cell_timeout >= 0, f"--cell-timeout {cell_timeout}: give seconds, or 0 for no limit")
    values = parameters.load(profile, overrides)  # what is wrong with them is said before anything runs
    selected = cells.sources(tuple([only] if isinstance(only, str) else only or values.notebooks))
    for source in selected:
        cells.read(source)
    seconds, said = {}, set()

    def line(text):  # of what a notebook writes to stderr, the lines that are meant for people are shown, each once
        ours = text.startswith(OURS)
        if not ours:
            note(profile, text)
        if text not in said and (ours or verbose()):
            screen.say(text)
        said.add(text)

    screen, log = Screen(sys.stderr, line), log_file(profile)
    begun = log.stat().st_size if log.exists() else 0
    for number, source in enumerate(selected, 1):
        place, start = f"[{number}/{len(selected)}]", time.monotonic()
        if not force and (before := unchanged(source, values)):
            print(f"{place} {source.stem:<28} unchanged since {before}", flush=True)
            continue
        screen.head = f"{place} {source.stem}  "
        screen.show("")
        try:
            run_notebook(source, values, overrides or {}, cell_timeout, screen)
            seconds[source.stem] = time.monotonic() - start
        finally:
            screen.head = ""
            screen.show("")
        print(f"{place} {source.stem:<28} {seconds[source.stem]:7.1f} s", flush=True)
    if len(seconds) < len(selected):
        print("What is unchanged would come out the same; FORCE=1 executes it again.", flush=True)
    print(f"{tally(profile, begun)}; each is a line of {log.relative_to(repo_root())}", flush=True)
    return seconds
