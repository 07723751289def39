"""Result records: every number the report prints, with what is needed to believe it, and how it is printed.

A notebook records its numbers under keys, at full precision, in
report/results/<profile>/<NN>.json (`Recorder`).
Published numbers stand in report/published.csv. From both come the LaTeX commands and tables of the report
(`write_latex`), the tables of the notebooks (`Results.markdown`) and the summary of a run (`print_summary`).
"""

import csv
import json
import math
import re
import textwrap
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from dgutils.errors import UserError
from dgutils.paths import repo_root, results_dir
from dgutils.store import disk_errors, now, provenance, write_file

PUBLISHED = Path(__file__).resolve().parent.parent / "report" / "published.csv"
SUMMARY = ("arms", "arms_second", "rules")  # tables of notebooks 04 and 06
KEY = re.compile(r"[a-z0-9]+([._-][a-z0-9]+)*")

LATEX_COMMANDS = r"""% Written by dgutils.results.write_latex from the results of one profile; edits are lost.
% \res{key}: value, interval and unit; \resval: the value; \resint: the interval; \resn: the sample count;
% \rescaption{table}: a table's caption.
\makeatletter
\newcommand{\dgprofile}{@PROFILE@}
\newcommand{\dg@set}[3]{\expandafter\def\csname dg@#1@#2\endcsname{#3}}
\newcommand{\dg@get}[2]{\ifcsname dg@#1@#2\endcsname\csname dg@#1@#2\endcsname\else
  \PackageError{dgutils}{No #1 of result '#2' in profile \dgprofile}{Record it, or mend the key.}\fi}
\DeclareRobustCommand{\res}[1]{\dg@get{text}{#1}}
\DeclareRobustCommand{\resval}[1]{\dg@get{value}{#1}}
\DeclareRobustCommand{\resint}[1]{\dg@get{interval}{#1}}
\DeclareRobustCommand{\resn}[1]{\dg@get{n}{#1}}
\DeclareRobustCommand{\rescaption}[1]{\dg@get{caption}{#1}}
"""


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

    def settings(self, study: Any) -> None:
        """Record the parameters of a run (the dataclass jobs.Study) under settings.<name>; lists are left out."""
        for name, value in vars(study).items():
            if isinstance(value, int | float | str):
                self.record(f"settings.{name}", f"{value:g}" if isinstance(value, float) else value,
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
        return Results(self.profile, published() | self.records, self.tables)

    def write(self) -> Path:
        """Write the file. If it holds these results already it stays: dates change only with results."""
        content = {"profile": self.profile, "notebook": self.notebook, "records": self.records,
                   "tables": self.tables}
        content = json.loads(json.dumps(content, allow_nan=False))
        old = read_results(self.path) if self.path.exists() else {}
        if any(old.get(part) != content[part] for part in content):
            write_if_changed(self.path, to_json(content | {"provenance": {"date": now()} | provenance()}))
        return self.path


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
        if not path.exists() or path.read_text(encoding="utf-8") != text:
            path.parent.mkdir(parents=True, exist_ok=True)
            write_file(path, text.encode())


# --- reading

@dataclass(frozen=True)
class Results:
    """What a profile's notebooks recorded, and the published numbers. `records[key]` names its notebook."""
    profile: str
    records: dict[str, dict]
    tables: dict[str, dict]

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

    def latex_table(self, name: str) -> str:
        """A table as a booktabs tabular; its caption and float belong to the text."""
        return tabular(self.cells(name, latex=True))

    def latex_provenance(self) -> str:
        """Which run of each notebook these results are, as a tabular. A star: the code had uncommitted changes."""
        rows = [["Notebook", "Date", "Code revision", "torch", "Device"]]
        runs = {r["notebook"]: r["provenance"] for r in self.records.values() if "notebook" in r}
        for name, run in sorted(runs.items()):
            revision, _, dirty = (run["revision"] or "unknown").partition("-")
            rows.append([name, run["date"][:10], revision[:10] + ("*" if dirty else ""), run["versions"]["torch"],
                         run["device"]])
        return tabular([[latex_escape(cell) for cell in row] for row in rows])


def load_results(profile: str, root: Path | str | None = None) -> Results:
    """Every record of a profile. Raises UserError if there are none, or if a file is another profile's."""
    root = results_folder(profile, root)
    paths = sorted(root.glob("*.json"))
    if not paths:
        raise UserError(f"no results of profile {profile} in {root}: run 'make reproduce PROFILE={profile}'")
    records, tables = published(), {}
    for path in paths:
        content = read_results(path)
        if content.get("profile") != profile:
            raise UserError(f"{path} holds results of profile {content.get('profile')!r}: remove it")
        twice = (records.keys() & content["records"].keys()) | (tables.keys() & content["tables"].keys())
        if twice:
            raise UserError(f"{path}: {sorted(twice)[0]!r} is recorded elsewhere too; rename one of them")
        origin = {"notebook": content["notebook"], "provenance": content["provenance"]}
        records |= {key: record | origin for key, record in content["records"].items()}
        tables |= content["tables"]
    return Results(profile, records, tables)


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


def tabular(rows: list[list[str]]) -> str:
    """Rows of LaTeX cells, the heads first, as a booktabs tabular. Long heads and long labels are broken."""
    head, *rows = rows
    head = [r"\shortstack[r]{" + r"\\".join(textwrap.wrap(text, 14, break_long_words=False)) + "}"
            if len(text) > 14 else text for text in head]
    labels = "l"
    if max((len(row[0]) for row in rows), default=0) > 40:
        labels, rows = "p{1.8in}", [[r"\raggedright " + label, *cells] for label, *cells in rows]
    head, *rows = [" & ".join(row) + r" \\" for row in (head, *rows)]
    return "\n".join([rf"\begin{{tabular}}{{@{{}}{labels}{'r' * head.count(' & ')}@{{}}}}", r"\toprule", head,
                      r"\midrule", *rows, r"\bottomrule", r"\end{tabular}"]) + "\n"


def latex_escape(text: str) -> str:
    """Text in which LaTeX sees no commands."""
    special = {"\\": r"\textbackslash{}", "~": r"\textasciitilde{}", "^": r"\textasciicircum{}"}
    return re.sub(r"[\\~^{}$&#_%]", lambda match: special.get(match[0], "\\" + match[0]), text)


def write_latex(profile: str, root: Path | str | None = None,
                out_dir: Path | str | None = None) -> Path:
    """Write numbers.tex and table_<name>.tex for the report; tables of an earlier profile are removed.

    Returns the path of numbers.tex. A key that the text uses and nobody recorded stops the LaTeX build.
    """
    results, out_dir = load_results(profile, root), Path(out_dir or repo_root() / "report" / "generated").absolute()
    lines = [LATEX_COMMANDS.replace("@PROFILE@", latex_escape(profile))]
    for key, record in sorted(results.records.items()):
        fields = {"text": format_value(record, latex=True), "value": format_number(record, latex=True),
                  "interval": format_interval(record, latex=True),
                  "n": "" if record.get("n") is None else f"{record['n']:,}"}
        lines += [rf"\dg@set{{{name}}}{{{key}}}{{{text}}}" for name, text in fields.items() if text]
    lines += [rf"\dg@set{{caption}}{{{name}}}{{{latex_escape(table['caption'])}}}"
              for name, table in sorted(results.tables.items()) if table["caption"]]
    tables = {out_dir / f"table_{name}.tex": results.latex_table(name) for name in results.tables}
    tables[out_dir / "table_provenance.tex"] = results.latex_provenance()
    for path, text in tables.items():
        write_if_changed(path, text)
    write_if_changed(out_dir / "numbers.tex", "\n".join([*lines, r"\makeatother", ""]))
    for path in set(out_dir.glob("table_*.tex")) - tables.keys():
        path.unlink()
    return out_dir / "numbers.tex"


def print_summary(profile: str, root: Path | str | None = None) -> None:
    """Print what `make reproduce` ends with: those of the tables SUMMARY that the profile's notebooks made."""
    results = load_results(profile, root)
    for name in [name for name in SUMMARY if name in results.tables] or SUMMARY[:1]:
        print(f"\nResults, profile {profile}: {results.tables.get(name, {}).get('caption', '')}\n")
        print(results.markdown(name))
