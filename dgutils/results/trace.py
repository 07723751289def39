"""Where a number comes from: its notebook, the artifacts behind it, and whether code and inputs are still those.

A results file holds the lineage of its records and a fingerprint of the code, so that provenance can be printed,
and stale results noticed, in a fresh clone that has none of the artifacts. `python -m dgutils trace KEY` prints it
(`describe`); the margin marks and the last appendix of the report say the same.
"""

import ast
import difflib
import hashlib
import json
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dgutils.errors import UserError
from dgutils.paths import figures_dir, repo_root, results_dir, runs_dir
from dgutils.pipeline.store import KEPT, digest_of_file, read_kept, read_manifest

PACKAGE = Path(__file__).resolve().parents[1]


# --- the code


def sections(notebook: str) -> list[tuple[str, str]]:
    """(section, source) of each code cell of notebooks/<notebook>.ipynb, without the parameters; [] if it is gone."""
    path, heading, found = repo_root() / "notebooks" / f"{notebook}.ipynb", notebook, []
    for cell in json.loads(path.read_text(encoding="utf-8"))["cells"] if path.is_file() else []:
        source = "".join(cell["source"])
        if cell["cell_type"] == "markdown":
            heading = next((line[3:] for line in reversed(source.splitlines()) if line.startswith("## ")), heading)
        elif "parameters" not in cell["metadata"].get("tags", []):
            found.append((heading, source))
    return found


def section_of(name: str, cells: list[tuple[str, str]]) -> str:
    """The section of the first cell that holds this name as a string, where a figure or a table is made; or ''."""
    return next((heading for heading, source in cells if f'"{name}"' in source), "")


def digest_of_code(sources: Iterable[str]) -> str:
    """A digest of program text that empty lines and comments on lines of their own do not change."""
    lines = [line.rstrip() for source in sources for line in source.splitlines()]
    text = "\n".join(line for line in lines if line and not line.lstrip().startswith("#"))
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def constants(module: str) -> dict[str, Any]:
    """The constants of dgutils/<module>.py that are written as literals, without importing it (torch takes seconds)."""
    found = {}
    for node in ast.parse((PACKAGE / f"{module}.py").read_text(encoding="utf-8")).body:
        if isinstance(node, ast.Assign) and isinstance(node.targets[0], ast.Name):
            try:
                found[node.targets[0].id] = ast.literal_eval(node.value)
            except ValueError:
                pass  # computed
    return found


def fingerprint(notebook: str) -> dict:
    """The code that a notebook's results follow from: its cells, the rules of its statements, the steps' versions."""
    gradients = constants("results/analysis")["GRADIENTS_VERSION"]
    versions = constants("pipeline/jobs")["VERSIONS"] | {"gradients": gradients}
    return {"notebook": digest_of_code(source for _, source in sections(notebook)),
            "analysis": digest_of_code([(PACKAGE / "results" / "analysis.py").read_text(encoding="utf-8")]),
            "versions": versions}  # fmt: skip


# --- the artifacts


def lineage(profile: str, digests: Iterable[str]) -> dict[str, dict]:
    """All that these artifacts of a profile's store were made from, themselves included: digest -> entry.

    An entry has step, version, label, seconds, created, device, revision, folder (below the store) and inputs
    {name: digest}; that of a set of images also rows and first_seed. What no step made, a network or real images,
    has a label and no step. What is not stored has the entry that is kept with its scores (`store.read_kept`), or none.
    """
    known = read_kept(results_dir(profile) / KEPT)["lineage"]
    stored: dict[str, list[dict]] = {}  # an artifact's digest -> its manifest, or those of its shards in order
    root = runs_dir(profile) / "store"
    for path in sorted(root.glob("*/*/manifest.json")) + sorted(root.glob("*/*/shard_?????/manifest.json")):
        if manifest := read_manifest(path.parent):
            stored.setdefault(manifest["digest"], []).append(manifest)
    found: dict[str, dict] = {}
    wanted = dict.fromkeys(digests, "")  # digest -> what it is if no step made it
    while wanted:
        rows, inputs = _rows_of(wanted.keys() - stored.keys(), stored), {}
        for digest, label in wanted.items():
            whole, n = rows.get(digest, (digest, None))
            if whole in stored:
                found[digest] = _entry(stored[whole], n)
                config = stored[whole][0]["identity"]["config"]
                inputs |= {source: _source(role, source, config, stored)
                           for role, source in found[digest]["inputs"].items()}
            elif digest in known:
                found[digest] = known[digest]
                inputs |= dict.fromkeys(known[digest]["inputs"].values(), label)
            elif label:
                found[digest] = {"label": label, "inputs": {}}
        wanted = {digest: label for digest, label in inputs.items() if digest not in found}
    return found


def _entry(manifests: list[dict], n: int | None = None) -> dict:
    """The entry of one artifact, from its manifest; of a set's first n rows, from those of the shards they lie in."""
    identity = manifests[0]["identity"]
    used = manifests[: -(-n // identity["shards"]["size"])] if n else manifests
    last = max(used, key=lambda manifest: manifest["created"])
    rows = {"rows": n, "first_seed": identity["shards"]["first_seed"]} if n else {}
    return rows | {name: last[name] for name in ("label", "created", "device", "revision")} | {
        "step": identity["step"], "version": identity["version"], "inputs": identity["inputs"],
        "folder": f"{identity['step']}/{last['digest'][:16]}",
        "seconds": round(sum(manifest["seconds"] for manifest in used), 3)}  # fmt: skip


def _rows_of(digests: set[str], stored: dict[str, list[dict]]) -> dict[str, tuple[str, int]]:
    """Which of these digests stand for the first n rows of a set (ShardedSet.digest): digest -> (the set's, n)."""
    found = {}
    for whole, shards in stored.items():
        size = shards[0]["identity"].get("shards", {}).get("size", 0)
        for n in range(1, size * len(shards) + 1) if len(found) < len(digests) else ():
            digest = hashlib.sha256(f'{{"n":{n},"set":"{whole}"}}'.encode()).hexdigest()
            if digest in digests:
                found[digest] = whole, n
    return found


def _source(role: str, digest: str, config: dict, stored: dict[str, list[dict]]) -> str:
    """What an input is that no step made: the network or the images that the config names, else its role."""
    if isinstance(config.get(role), str):
        return config[role]
    if role == "real":
        return f"{config['dataset']}, training images"
    labels = [manifests[0]["label"] for manifests in stored.values()
              if manifests[0]["identity"]["inputs"].get("images") == digest]  # the features of them say so
    return labels[0].rpartition(", ")[0] if labels else role


# --- one key


def records_of(results, key: str) -> tuple[str, str, list[dict]]:
    """A key's kind ("result", "figure", "table"), its name, and its records.

    A figure's records are those of the notebook section that draws it, a table's those of its cells. `key` is a
    result's key, or the name of a figure or a table, alone or as in figure:06_rules, table:arms.
    """
    kind, _, name = key.rpartition(":")
    if kind in ("", "result") and name in results.records:
        return "result", name, [results.records[name]]
    if kind in ("", "figure") and name in results.figures:
        place = results.figures[name]["notebook"], results.figures[name]["cell"]
        return "figure", name, [record for record in results.records.values()
                                if (record.get("notebook"), record.get("cell")) == place]
    if kind in ("", "table") and name in results.tables:
        return "table", name, [results[cell] for _, *row in results.tables[name]["rows"] for cell in row if cell]
    close = difflib.get_close_matches(name, [*results.records, *results.figures, *results.tables], n=3)
    raise UserError(f"no result, figure or table {key!r} in profile {results.profile}"
                    + (f"; did you mean {' or '.join(close)}?" if close else ""))


@dataclass(frozen=True)
class Origin:
    """What is known of how a result, a figure or a table was made; texts for people, '' where there is nothing.

    run: its notebook's provenance, None for a published number. direct: digests of the artifacts it was computed
    from. made: their lineage (`lineage`).
    """

    kind: str
    name: str
    notebook: str
    cell: str
    label: str
    run: dict | None
    direct: list[str]
    made: dict[str, dict]
    n: str
    seeds: str
    published: str

    @property
    def seconds(self) -> float:
        """Time of all computing behind it, as far as it is stored."""
        return sum(entry.get("seconds", 0) for entry in self.made.values())

    @property
    def artifacts(self) -> dict[str, list[str]]:
        """Step -> digests of what the steps made."""
        steps: dict[str, list[str]] = {}
        for digest, entry in self.made.items():
            if "step" in entry:
                steps.setdefault(entry["step"], []).append(digest)
        return steps

    @property
    def inputs(self) -> dict[str, str]:
        """What no step made: label -> digest."""
        return {entry["label"]: digest for digest, entry in self.made.items() if "step" not in entry}


def origin(results, key: str) -> Origin:
    """How a key's number, figure or table was made. Raises UserError for an unknown key."""
    kind, name, records = records_of(results, key)
    about = {"figure": results.figures, "table": results.tables}.get(kind, results.records)[name]
    direct = list(dict.fromkeys(digest for record in records for digest in record.get("artifacts", [])))
    made, todo = {}, list(direct)
    while todo:
        digest = todo.pop()
        if digest in results.lineage and digest not in made:
            made[digest] = results.lineage[digest]
            todo += made[digest]["inputs"].values()
    return Origin(
        kind, name, about.get("notebook", ""), about.get("cell", ""), about.get("label") or about.get("caption", ""),
        results.runs.get(about.get("notebook")), direct, made,
        n=", ".join(f"{n:,}" for n in sorted({record["n"] for record in records if record.get("n")})),
        seeds="; ".join(dict.fromkeys(_seeds(record["seeds"]) for record in records if record.get("seeds"))),
        published="; ".join(dict.fromkeys(record["source"] for record in records if "source" in record)),
    )  # fmt: skip


def _seeds(seeds: dict | list) -> str:
    """Seeds in words: '1000000 to 1000499', or their list."""
    if isinstance(seeds, list):
        return ", ".join(map(str, seeds))
    return f"{seeds['first']} to {seeds['first'] + seeds['count'] - 1}"


def duration(seconds: float) -> str:
    """Seconds in words: '0.8 s', '43 s', '12 min', '3.4 h'."""
    if seconds < 100:
        return f"{seconds:.1f} s" if seconds < 10 else f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 6000 else f"{seconds / 3600:.1f} h"


def revision(run: dict) -> str:
    """The code revision of a run, in ten digits; a star says that the code had uncommitted changes."""
    commit, _, dirty = (run["revision"] or "unknown").partition("-")
    return commit[:10] + ("*" if dirty else "")


def describe(results, key: str) -> str:
    """What `python -m dgutils trace` prints of a key, down to the files of the store that this clone has."""
    about = origin(results, key)
    head = f"{about.name} = {results.text(about.name)}" if about.kind == "result" else f"{about.kind} {about.name}"
    run = about.run or {}
    facts = {
        "what": about.label, "published": about.published,
        "notebook": about.notebook and f"notebooks/{about.notebook}.ipynb, section \"{about.cell}\"",
        "n": about.n, "seeds": about.seeds,
        "run": run and f"{run['date'][:10]}, code {revision(run)}, torch {run['versions']['torch']}, {run['device']}",
        "file": f"figures/{results.profile}/{about.name}.pdf" if about.kind == "figure" else
                f"report/results/{results.profile}/{about.notebook[:2]}.json" if run else "report/published.csv",
        "stale": "\n            ".join(line for line in stale(results) if line.startswith(about.notebook or " ")),
    }  # fmt: skip
    lines = [head, *(f"  {name:<9} {text}" for name, text in facts.items() if text)]
    if about.direct:
        lines += [f"  made from, in {duration(about.seconds)} of computing:"]
        lines += _tree(results, about.direct)
    elif run:
        lines += ["  made in the notebook itself, from nothing stored"]
    return "\n".join(lines)


def _tree(results, digests: list[str]) -> list[str]:
    """The lineage of artifacts as indented lines, each with its manifest; what stands above is not repeated."""
    store, seen, lines = runs_dir(results.profile) / "store", set(), []

    def grow(digest: str, role: str, indent: str) -> None:
        entry = results.lineage.get(digest, {"label": "not recorded", "inputs": {}})
        line = f"{indent}{role}{entry['step'] + ' ' if 'step' in entry else ''}{digest[:16]}, {entry['label']}"
        if "step" not in entry or digest in seen:
            lines.append(line + (", see above" if digest in seen else ""))
            return
        seen.add(digest)
        rows = f", {entry['rows']:,} rows from seed {entry['first_seed']}" if "rows" in entry else ""
        files = sorted((store / entry["folder"]).glob("**/manifest.json"))
        lines.append(f"{line}{rows}: version {entry['version']}, {duration(entry['seconds'])}, {entry['created'][:10]}")
        lines.append(indent + "  " + (str(files[0].relative_to(repo_root())) if files else
                                      f"runs/{results.profile}/store/{entry['folder']}, not in this clone")
                     + (f" and {len(files) - 1} more" if files[1:] else ""))
        for role, source in entry["inputs"].items():
            grow(source, f"{role}: ", indent + "  ")

    for digest in digests:
        grow(digest, "", "    ")
    return lines


# --- stale?


def stale(results) -> list[str]:
    """Why results are older than the code or the inputs that make them, a line each; [] if none is.

    Each notebook's code, the rules of statements (analysis.py), the steps' numerical versions, networks and data
    sets; then notebooks against each other, recorded parameters against the profile's, and figures against those drawn.
    """
    lines, makers = [], {}
    cards = {path.stem: json.loads(path.read_text())["sha256"] for path in (PACKAGE / "assets").glob("*.json")}
    for notebook, run in sorted(results.runs.items()):
        was, now = run.get("code"), fingerprint(notebook)
        if was is None:
            lines.append(f"{notebook}: its results do not say which code made them")
            continue
        if was["notebook"] != now["notebook"]:
            lines.append(f"{notebook}: the notebook's code has changed since")
        if was["analysis"] != now["analysis"]:
            lines.append(f"{notebook}: dgutils/results/analysis.py has changed since")
        lines += [f"{notebook}: the numbers of step '{step}' have changed since, from version "
                  f"{was['versions'].get(step)} to {version}"
                  for step, version in now["versions"].items() if was["versions"].get(step) != version]
        for digest, entry in run["lineage"].items():
            if "step" not in entry and cards.get(entry["label"], digest) != digest:
                lines.append(f"{notebook}: {entry['label']} is another file now")
            if entry.get("step") in ("generate", "train"):
                made = makers.setdefault(f"{entry['step']} '{entry['label']}'", {})
                made.setdefault(notebook, set()).add(entry["folder"])
    for what, folders in makers.items():
        if len(set().union(*folders.values())) > max(map(len, folders.values())):
            lines.append(f"{', '.join(folders)}: each is made from another {what}")
    return lines + _changed_parameters(results) + _changed_figures(results)


def _changed_parameters(results) -> list[str]:
    """Recorded parameters that are not the profile's."""
    from dgutils.pipeline.parameters import load  # late: it imports torch, which takes seconds
    from dgutils.results.records import setting_text

    lines = []
    for name, value in load(results.profile):
        record = results.records.get(f"settings.{name}")
        if record and str(record["value"]) != setting_text(value):
            lines.append(f"{record['notebook']}: {name} was {record['value']}, and is {setting_text(value)} in profile "
                         f"{results.profile}")
    return lines


def _changed_figures(results) -> list[str]:
    """Figures that are gone, or not those that were drawn with these results."""
    lines = []
    for name, figure in sorted(results.figures.items()):
        path = figures_dir(results.profile) / f"{name}.pdf"
        if not path.is_file() or digest_of_file(path) != figure["sha256"]:
            lines.append(f"{figure['notebook']}: figures/{results.profile}/{name}.pdf is "
                         + ("not the one drawn with its results" if path.is_file() else "gone"))
    return lines
