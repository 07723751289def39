"""`make trace`: where a number, figure or table of the report comes from, and whether code and inputs are still those.

The margin marks and the last appendix of the report say the same (`origin`).
"""

import difflib
import json
import sys
from dataclasses import dataclass

from dgutils.errors import UserError
from dgutils.files import digest_of_file
from dgutils.paths import figures_dir, repo_root, runs_dir
from dgutils.results.provenance import PACKAGE, fingerprint
from dgutils.results.records import load_results, setting_text

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
    from. made: their lineage (`provenance.lineage`).
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
    """What `make trace` prints of a key, down to the files of the store that this clone has."""
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

    Each notebook's code, the rules of statements, the steps' numerical versions, networks and data
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
        if was.get("statements") != now["statements"]:
            lines.append(f"{notebook}: the rules of dgutils/results/statements.py and ledger.py have changed since")
        lines += [f"{notebook}: the numbers of step '{step}' have changed since, from version "
                  f"{version} to {now['versions'].get(step)}"  # of steps that there were: later ones made none of it
                  for step, version in was["versions"].items() if now["versions"].get(step) != version]
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
    from dgutils.pipeline.parameters import load  # late: it imports what takes seconds

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


def main() -> int:
    from report.build import Parser, script  # late: it imports this module

    parser = Parser("trace", "where a number, figure or table of the report comes from")
    parser.add_argument("key", help="as in \\res{key}; figure:NN_slug; table:name")
    return script(parser, lambda args: print(describe(load_results(args.profile), args.key)))


if __name__ == "__main__":
    sys.exit(main())
