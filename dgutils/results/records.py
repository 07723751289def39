"""Result records: every number the report prints, with what is needed to believe it, and how it is printed.

A notebook records its numbers under keys, at full precision, in report/results/<profile>/<NN>.json (`Recorder`).
Published numbers stand in report/published.csv. Reports and notebooks print both by the same rules (`format_value`).
"""

import csv
import json
import math
import re
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from dgutils.errors import UserError
from dgutils.paths import figures_dir, results_dir, runs_dir
from dgutils.pipeline.store import (
    KEPT,
    digest_of_file,
    disk_errors,
    now,
    provenance,
    read_kept,
    read_manifest,
    write_file,
    write_kept,
)
from dgutils.results.provenance import fingerprint, lineage, section_of, sections
from dgutils.results.statements import HIGHER, LOWER, direction, with_words

PUBLISHED = Path(__file__).resolve().parents[2] / "report" / "published.csv"
SUMMARY = ("arms", "arms_second", "rules")  # of notebooks 04 and 06; the first of 05 where 04 does not run
KEY = re.compile(r"[a-z0-9]+([._-][a-z0-9]+)*")


def results_folder(profile: str, root: Path | str | None) -> Path:
    """<root>/<profile>; without a root, report/results/<profile> of the clone."""
    return results_dir(profile) if root is None else Path(root).absolute() / profile


# --- recording

class Recorder:
    """The result records and tables of one notebook in one profile; `write` makes them a file.

    notebook: its name, as in '04_evaluation'; the file is <root>/<profile>/04.json.
    """

    def __init__(self, profile: str, notebook: str, root: Path | str | None = None):
        self.profile, self.notebook = profile, notebook
        self.path = results_folder(profile, root) / f"{notebook.split('_')[0]}.json"
        self.records: dict[str, dict] = {}
        self.tables: dict[str, dict] = {}

    def record(self, key: str, value: float | str, *, label: str, cell: str, unit: str = "",
               interval: tuple[float, float] | None = None, level: float | None = None, n: int | None = None,
               seeds: range | list[int] | None = None, artifacts: list[str] | None = None,
               digits: int | None = None) -> None:
        """Record one number, or one word that the prose takes from the data ('lower').

        label: what it is, in words. cell: the notebook section that made it. interval: [low, high] at
        confidence `level`. n: images behind it. seeds: a range, or their list. artifacts: digests it was made
        from. digits: decimals in print; without it, what the interval justifies, or 3 significant digits.
        """
        if not KEY.fullmatch(key):
            raise UserError(f"result key {key!r}: use lower-case words and digits, joined by . _ or -")
        if (interval is None) != (level is None):
            raise UserError(f"result {key}: an interval needs its level, and a level its interval")
        value = number(value, key)
        if interval is not None:
            interval = [number(bound, key) for bound in interval]
            if not interval[0] <= interval[1]:
                raise UserError(f"result {key}: the interval {interval} is not [low, high]")
        if isinstance(seeds, range):
            seeds = {"first": seeds[0], "count": len(seeds)}
        self.records[key] = {
            "value": value, "label": label, "cell": cell, "unit": unit, "interval": interval, "level": level,
            "n": n, "seeds": seeds, "artifacts": artifacts or [], "digits": digits}

    def settings(self, parameters: Any) -> None:
        """Record the parameters of a run under settings.<name>, lists as their items."""
        for name, value in dict(parameters).items():
            if isinstance(value, int | float | str | list):
                self.record(f"settings.{name}", value if type(value) is int else setting_text(value),
                            label=f"parameter {name}", cell="parameters")

    def table(self, name: str, columns: list[str], rows: list[tuple], caption: str = "") -> None:
        """Record a table: column heads, and rows of a label followed by result keys (None: an empty cell)."""
        if not re.fullmatch(r"[a-z0-9_]+", name):
            raise UserError(f"table name {name!r}: use lower-case letters, digits and _")
        if any(len(row) != len(columns) for row in rows):
            raise UserError(f"table {name}: every row needs {len(columns)} cells, like the columns")
        self.tables[name] = {"columns": columns, "rows": rows, "caption": caption}

    @property
    def results(self) -> "Results":
        """What is recorded so far, and the published numbers, to be printed in the notebook itself."""
        return Results(self.profile, with_words(published() | self.records), self.tables)

    def write(self) -> Path:
        """Write the file, with the code and the artifacts behind its records, and the digests of its figures.

        If it holds these results already it stays: dates change only with results or code.
        """
        cells = sections(self.notebook)
        figures = sorted(figures_dir(self.profile).glob(f"{self.notebook[:2]}_*.pdf"))
        content = {
            "profile": self.profile, "notebook": self.notebook, "records": self.records,
            "tables": {name: table | {"cell": section_of(name, cells)} for name, table in self.tables.items()},
            "figures": {path.stem: {"cell": cell, "sha256": digest_of_file(path)} for path in figures
                        if (cell := section_of(path.stem, cells))},
            "code": fingerprint(self.notebook),
        }  # fmt: skip
        content = json.loads(json.dumps(content, allow_nan=False))
        try:
            old = read_results(self.path)
        except (FileNotFoundError, NotADirectoryError):  # not looked for before: it may be removed in between
            old = {}
        if any(old.get(part) != content[part] for part in content):
            digests = {digest for record in self.records.values() for digest in record["artifacts"]}
            content |= {"provenance": {"date": now()} | provenance(), "lineage": lineage(self.profile, digests)}
            write_if_changed(self.path, to_json(content))
        return self.path


def keep(profile: str) -> Path:
    """Copy the scores in a profile's store, with their lineage, to the file that the repository keeps.

    A study goes on from there on another machine, or in a fresh clone, without drawing what is scored. What was kept
    before stays. Raises UserError for a damaged file.
    """
    path, found = results_dir(profile) / KEPT, {}
    for folder in sorted((runs_dir(profile) / "store" / "evaluate").glob("????????????????")):
        manifest, file = read_manifest(folder), folder / "scores.json"
        if manifest and file.is_file() and digest_of_file(file) == manifest["files"][file.name]["sha256"]:
            found[manifest["digest"]] = json.loads(file.read_text())
    scores = read_kept(path)["scores"] | found
    if not scores:
        raise UserError(f"profile {profile} has no scores to keep: run `make reproduce PROFILE={profile}` first")
    write_kept(path, scores, lineage(profile, scores))
    return path


def setting_text(value: Any) -> str:
    """A parameter in print: '0.0003', 'none', '60, 40, 40'."""
    if isinstance(value, list):
        return ", ".join(map(setting_text, value))
    return f"{value:g}" if isinstance(value, float) else str(value)


def number(value: Any, key: str) -> float | int | str:
    """A plain finite number, or text. Raises UserError for anything else."""
    if isinstance(value, np.generic):
        value = value.item()
    if isinstance(value, bool) or not isinstance(value, int | float | str):
        raise UserError(f"result {key}: {value!r} is neither a number nor text")
    if not isinstance(value, str) and not math.isfinite(value):
        raise UserError(f"result {key} is {value}: a number went wrong where it was computed")
    return value


def to_json(content: dict) -> str:
    """JSON text with sorted keys, one item a line, at full precision."""
    return json.dumps(content, sort_keys=True, indent=1, allow_nan=False, ensure_ascii=False) + "\n"


def write_if_changed(path: Path, text: str) -> None:
    """Write a file whole, unless it says so already (so that nothing built from it is rebuilt)."""
    with disk_errors(path.parent):
        try:
            old = path.read_text(encoding="utf-8")
        except FileNotFoundError:
            old = None
        if old != text:
            path.parent.mkdir(parents=True, exist_ok=True)
            write_file(path, text.encode())


# --- reading


@dataclass(frozen=True)
class Results:
    """What a profile's notebooks recorded, and the published numbers.

    records, tables, figures: by key or name; each names its notebook. runs: notebook -> its provenance, code and
    lineage. lineage: that of all notebooks (`lineage`).
    """
    profile: str
    records: dict[str, dict]
    tables: dict[str, dict]
    figures: dict[str, dict] = field(default_factory=dict)
    runs: dict[str, dict] = field(default_factory=dict)

    @cached_property
    def lineage(self) -> dict[str, dict]:
        return {digest: entry for run in self.runs.values() for digest, entry in run["lineage"].items()}

    @property
    def watermark(self) -> str:
        """What every page of a report made from these results must say; '' only if the profile itself says so."""
        record = self.records.get("settings.watermark")
        return str(record["value"]) if record else self.profile

    def __getitem__(self, key: str) -> dict:
        """The record of a key. Raises UserError if there is none."""
        if key not in self.records:
            raise UserError(f"no result {key!r} in profile {self.profile}: record it, or mend the key")
        return self.records[key]

    def text(self, key: str) -> str:
        """A record in print: '13.8 [13.1, 14.6]', or its word."""
        return format_value(self[key])

    def cells(self, name: str, latex: bool = False) -> list[list[str]]:
        """A table's rows, its heads first, as text."""
        if name not in self.tables:
            raise UserError(f"no table {name!r} in profile {self.profile}; there are {sorted(self.tables)}")
        table, words = self.tables[name], latex_escape if latex else str
        return [[words(head) for head in table["columns"]]] + [
            [words(label)] + ["" if key is None else format_value(self[key], latex) for key in keys]
            for label, *keys in table["rows"]]

    def markdown(self, name: str) -> str:
        """A table in Markdown, padded so that it also reads well in a terminal."""
        cells = self.cells(name)
        widths = [max(len(row[i]) for row in cells) for i in range(len(cells[0]))]
        lines = ["| " + " | ".join(text.ljust(width) for text, width in zip(row, widths, strict=True)) + " |"
                 for row in cells]
        return "\n".join([lines[0], "|" + "|".join("-" * (width + 2) for width in widths) + "|", *lines[1:]])


def load_results(profile: str, root: Path | str | None = None) -> Results:
    """Every record of a profile. Raises UserError if there are none, or if a file is another profile's."""
    root = results_folder(profile, root)
    paths = sorted(root.glob("*.json"))
    if not paths:
        raise UserError(f"no results of profile {profile} in {root}: run 'make reproduce PROFILE={profile}'")
    results = Results(profile, published(), {})
    for path in paths:
        content = read_results(path)
        if content.get("profile") != profile:
            raise UserError(f"{path} holds results of profile {content.get('profile')!r}: remove it")
        for part in ("records", "tables", "figures"):
            known, new = getattr(results, part), content.get(part, {})
            if twice := known.keys() & new.keys():
                raise UserError(f"{path}: {sorted(twice)[0]!r} is recorded elsewhere too; rename one of them")
            known |= {name: item | {"notebook": content["notebook"]} for name, item in new.items()}
        results.runs[content["notebook"]] = content["provenance"] | {
            "code": content.get("code"), "lineage": content.get("lineage", {})}
    results.records.update(with_words(results.records))
    return results


def read_results(path: Path) -> dict:
    """The content of one results file. Raises UserError if it is damaged."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        return {**content}
    except (ValueError, TypeError) as error:
        raise UserError(f"{path} is not a results file: remove it and run its notebook again") from error


def published(path: Path | str = PUBLISHED) -> dict[str, dict]:
    """The published numbers, as records: printed with the decimals they were published with."""
    with open(path, newline="", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    records = {row["key"]: {
        "value": float(row["value"]) if "." in row["value"] else int(row["value"]), "unit": row["unit"],
        "digits": len(row["value"].partition(".")[2]), "label": row["note"], "source": row["source"],
        "where": row["where"]} for row in rows}
    if len(records) < len(rows) or not all(KEY.fullmatch(key) for key in records):
        raise UserError(f"{path}: a key stands there twice, or has other characters than a-z 0-9 . _ -")
    return records


def causes(results: Results, slot: str, latex: bool = False) -> dict[str, str]:
    """What the ladder of faults says in a feature space, by the rules that notebook 05 sets; {} without a ladder.

    "alone": each fault, added alone to the correct ensemble, with its change of KID. "sufficient": those that make
    KID worse than unguided. "carries": the fault whose mending, in the company of those below it, lowers KID most,
    with the step.
    """
    rows = [row for row in results.tables.get("ladder", {}).get("rows", []) if ".only_" in (row[1] or "")]
    names = {row[1].split(".")[1].removeprefix("only_"): row[0].removeprefix("only: ") for row in rows}
    rungs = dict(zip(names, [*(f"without_{fault}" for fault in list(names)[:-1]), "correct"], strict=False))

    def told(fault: str, record: dict | None = None) -> str:
        name = latex_escape(names[fault]) if latex else names[fault]
        return f"{name} ({format_value(record, latex)})" if record else name

    def found(rung: str, of: str = "step.") -> dict | None:
        return results.records.get(f"ladder.{rung}.{of}{slot}.kid_change")

    if not names or not all(found(rung) for rung in rungs.values()):
        return {}
    sufficient = [told(fault) for fault in names if direction(*found(f"only_{fault}", "")["interval"]) == HIGHER]
    most = min(rungs, key=lambda fault: found(rungs[fault])["value"])
    lowers = direction(*found(rungs[most])["interval"]) == LOWER
    return {"alone": "; ".join(told(fault, found(f"only_{fault}")) for fault in names),
            "sufficient": "; ".join(sufficient) or "none",
            "carries": told(most, found(rungs[most])) if lowers else "none"}  # fmt: skip


def why(results: Results, spaces: dict[str, str]) -> list[str]:
    """Why the study's ensemble failed, a paragraph for each feature space, slot -> its name; [] without a ladder."""
    return [f"By KID x 1000 in {space}, the study's ensemble as it ran changes unguided sampling by "
            f"{results.text(f'ladder.as_run.{slot}.kid_change')}, the correct ensemble by "
            f"{results.text(f'ladder.correct.{slot}.kid_change')}. Added alone to that one, the faults change it by: "
            f"{found['alone']}. Sufficient by themselves to make guidance worse than none: {found['sufficient']}. In "
            f"the company of the others, the one whose mending lowers KID most: {found['carries']}."
            for slot, space in spaces.items() if (found := causes(results, slot))]  # fmt: skip


# --- printing


def decimals(record: dict) -> int:
    """Decimals in print: as recorded; else what the interval's half width justifies, or three digits of the value.

    The half width keeps one significant digit, or two if it begins with 1 or 2 (Particle Data Group, section 5.3).
    """
    if record.get("digits") is not None:
        return record["digits"]
    low, high = record.get("interval") or (0, 0)
    scale, significant = ((high - low) / 2, 1) if high > low else (abs(record["value"]), 3)
    if not scale:
        return 0
    exponent = math.floor(math.log10(scale))
    if high > low and scale < 3 * 10**exponent:
        significant = 2
    return max(0, significant - 1 - exponent)


def format_number(record: dict, latex: bool = False, bound: float | None = None) -> str:
    """A record's value, or a bound of its interval, rounded: '13.8', '50,000' for a count; words stay."""
    value = record["value"] if bound is None else bound
    if isinstance(value, str):
        return latex_escape(value) if latex else value
    exact = isinstance(value, int) and not record.get("interval")
    text = f"{value:,}" if exact else f"{float(value):z.{decimals(record)}f}"  # z: no "-0.0"
    return re.sub(r"^-", r"\\ensuremath{-}", text) if latex else text


def format_interval(record: dict, latex: bool = False) -> str:
    """'[13.1, 14.6]', or ''."""
    bounds = [format_number(record, latex, bound) for bound in record.get("interval") or []]
    return f"[{', '.join(bounds)}]" if bounds else ""


def format_value(record: dict, latex: bool = False) -> str:
    """A record in print: value, interval and unit, as in '13.8 [13.1, 14.6] s'."""
    unit = latex_escape(record["unit"]) if latex else record["unit"]
    parts = [format_number(record, latex), format_interval(record, latex), unit]
    return ("~" if latex else " ").join(part for part in parts if part)


def latex_escape(text: str) -> str:
    """Text in which LaTeX sees no commands."""
    special = {"\\": r"\textbackslash{}", "~": r"\textasciitilde{}", "^": r"\textasciicircum{}"}
    return re.sub(r"[\\~^{}$&#_%]", lambda match: special.get(match[0], "\\" + match[0]), text)


def print_summary(profile: str, root: Path | str | None = None) -> None:
    """Print what `make reproduce` ends with: those of the tables SUMMARY that the profile's notebooks made."""
    results = load_results(profile, root)
    for name in [name for name in SUMMARY if name in results.tables] or SUMMARY[:1]:
        print(f"\nResults, profile {profile}: {results.tables.get(name, {}).get('caption', '')}\n")
        print(results.markdown(name))
