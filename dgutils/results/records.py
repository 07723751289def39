"""Result records as they are kept and printed: every number of the report, with what is needed to believe it.

Notebooks record them at full precision in report/results/<profile>/<NN>.json (`ledger.Ledger`); published numbers
stand in report/published.csv. Reports and notebooks print both by the same rules (`printed`).
"""

import csv
import json
import math
import re
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path

from dgutils.errors import UserError, require
from dgutils.paths import results_dir, runs_dir
from dgutils.pipeline.store import KEPT, digest_of_file, disk_errors, read_kept, read_manifest, write_file, write_sealed
from dgutils.results.provenance import lineage
from dgutils.results.statements import HIGHER, LOWER, direction, with_words

PUBLISHED = Path(__file__).resolve().parents[2] / "report" / "published.csv"
KEY = re.compile(r"[a-z0-9]+([._-][a-z0-9]+)*")


# --- files


def keep(profile: str) -> Path:
    """Add the scores in a profile's store, with their lineage, to the file that the repository keeps.

    A study goes on from there in a fresh clone, without drawing what is scored.
    """
    path, found = results_dir(profile) / KEPT, {}
    for folder in sorted((runs_dir(profile) / "store" / "evaluate").glob("????????????????")):
        manifest, file = read_manifest(folder), folder / "scores.json"
        if manifest and file.is_file() and digest_of_file(file) == manifest["files"][file.name]["sha256"]:
            found[manifest["digest"]] = json.loads(file.read_text())
    scores = read_kept(path)["scores"] | found
    require(scores, f"profile {profile} has no scores to keep: run `make reproduce PROFILE={profile}` first")
    write_sealed(path, {"scores": scores, "lineage": lineage(profile, scores)}, 0)
    return path


def write_if_changed(path: Path, text: str) -> None:
    """Write a file whole, unless it says so already (so that nothing built from it is rebuilt)."""
    with disk_errors(path.parent):
        path.parent.mkdir(parents=True, exist_ok=True)
        if not path.is_file() or path.read_text(encoding="utf-8") != text:
            write_file(path, text.encode())


# --- printing


def decimals(record: dict) -> int:
    """Decimals in print: as recorded; else what the interval's half width justifies, or three digits of the value.

    The half width keeps one significant digit, or two if it begins with 1 or 2 (Particle Data Group, section 5.3).
    """
    if record.get("digits") is not None:
        return record["digits"]
    low, high = record.get("interval") or (0, 0)
    scale = (high - low) / 2 or abs(record["value"])
    exponent = math.floor(math.log10(scale)) if scale else 0
    significant = 3 if high == low else 2 if scale < 3 * 10**exponent else 1
    return max(0, significant - 1 - exponent) if scale else 0


def printed(record: dict) -> tuple[str, str, str]:
    """A record's value, interval and unit, rounded: '13.8', '[13.1, 14.6]', 's'. Counts are '50,000'; words stay."""
    def text(value: float | str) -> str:
        if isinstance(value, str):
            return value
        count = isinstance(value, int) and not record.get("interval")
        return f"{value:,}" if count else f"{float(value):z.{decimals(record)}f}"  # z: no "-0.0"

    bounds = ", ".join(map(text, record.get("interval") or []))
    return text(record["value"]), bounds and f"[{bounds}]", record["unit"]


def format_value(record: dict) -> str:
    """A record in print: value, interval and unit, as in '13.8 [13.1, 14.6] s'."""
    return " ".join(filter(None, printed(record)))


# --- reading


@dataclass(frozen=True)
class Results:
    """What a profile's notebooks recorded, and the published numbers.

    records, tables, figures: by key or name; each names its notebook. runs: notebook -> its provenance, code, lineage.
    """

    profile: str
    records: dict[str, dict]
    tables: dict[str, dict]
    figures: dict[str, dict] = field(default_factory=dict)
    runs: dict[str, dict] = field(default_factory=dict)

    @cached_property
    def lineage(self) -> dict[str, dict]:
        return {digest: entry for run in self.runs.values() for digest, entry in run["lineage"].items()}

    def __getitem__(self, key: str) -> dict:
        """The record of a key. Raises UserError if there is none."""
        require(key in self.records, f"no result {key!r} in profile {self.profile}: record it, or mend the key")
        return self.records[key]

    def text(self, key: str) -> str:
        """A record in print: '13.8 [13.1, 14.6]', or its word."""
        return format_value(self[key])

    def cells(self, name: str, show=format_value, words=str) -> list[list[str]]:
        """A table's rows, its heads first, as text; `show` prints records and `words` labels."""
        require(name in self.tables, f"no table {name!r} in profile {self.profile}; there are {sorted(self.tables)}")
        rows = [[words(label), *("" if key is None else show(self[key]) for key in keys)]
                for label, *keys in self.tables[name]["rows"]]
        return [[words(head) for head in self.tables[name]["columns"]], *rows]

    def markdown(self, name: str) -> str:
        """A table in Markdown, padded so that it also reads well in a terminal."""
        cells = self.cells(name)
        widths = [max(len(row[i]) for row in cells) for i in range(len(cells[0]))]
        lines = ["| " + " | ".join(text.ljust(width) for text, width in zip(row, widths, strict=True)) + " |"
                 for row in cells]
        return "\n".join([lines[0], "|" + "|".join("-" * (width + 2) for width in widths) + "|", *lines[1:]])


def load_results(profile: str) -> Results:
    """Every record of a profile. Raises UserError if there are none, or if a file is another profile's."""
    folder = results_dir(profile)
    paths = sorted(folder.glob("*.json"))
    require(paths, f"no results of profile {profile} in {folder}: run 'make reproduce PROFILE={profile}'")
    results = Results(profile, published(), {})
    for path in paths:
        content = read_results(path)
        its = content.get("profile")
        require(its == profile, f"{path} holds results of profile {its!r}: remove it")
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
        items = [item for part in ("records", "tables", "figures") for item in content.get(part, {}).values()]
        require({"notebook", "provenance"} <= content.keys() and all(isinstance(item, dict) for item in items), "parts")
        return content
    except (ValueError, AttributeError) as error:
        raise UserError(f"{path} is not a results file: remove it and run its notebook again") from error


def published() -> dict[str, dict]:
    """The published numbers, as records: printed with the decimals they were published with."""
    with open(PUBLISHED, newline="", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    records = {row["key"]: {
        "value": float(row["value"]) if "." in row["value"] else int(row["value"]), "unit": row["unit"],
        "digits": len(row["value"].partition(".")[2]), "label": row["note"], "source": row["source"],
        "where": row["where"]} for row in rows}
    require(len(records) == len(rows) and all(KEY.fullmatch(key) for key in records),
            f"{PUBLISHED}: a key stands there twice, or has other characters than a-z 0-9 . _ -")
    return records


def causes(results: Results, slot: str, show=format_value, words=str) -> dict[str, str]:
    """What the ladder of faults says in a feature space, by the rules that notebook 05 sets; {} without a ladder.

    "alone": each fault, added alone to the correct ensemble, with its change of KID. "sufficient": those that make
    KID worse than unguided. "carries": the fault whose mending, in the company of those below it, lowers KID most,
    with the step. show, words: as in `Results.cells`.
    """
    names = {key.split(".")[1].removeprefix("only_"): words(label.removeprefix("only: "))
             for label, key, *_ in results.tables.get("ladder", {}).get("rows", []) if ".only_" in (key or "")}

    def change(rung: str) -> dict | None:
        return results.records.get(f"ladder.{rung}.{slot}.kid_change")

    def told(fault: str, record: dict | None) -> str:
        return f"{names[fault]} ({show(record)})" if record else names[fault]

    rungs = [*(f"without_{fault}" for fault in list(names)[:-1]), "correct"]
    mended = {fault: change(f"{rung}.step") for fault, rung in zip(names, rungs, strict=False)}
    if not names or not all(mended.values()):
        return {}
    sufficient = [name for fault, name in names.items() if direction(*change(f"only_{fault}")["interval"]) == HIGHER]
    most = min(names, key=lambda fault: mended[fault]["value"])
    lowers = direction(*mended[most]["interval"]) == LOWER
    return {"alone": "; ".join(told(fault, change(f"only_{fault}.step")) for fault in names),
            "sufficient": "; ".join(sufficient) or "none", "carries": told(most, mended[most]) if lowers else "none"}


def why(results: Results, spaces: dict[str, str]) -> list[str]:
    """Why the study's ensemble failed, a paragraph for each feature space, slot -> its name; [] without a ladder."""
    return [f"By KID x 1000 in {space}, the study's ensemble as it ran changes unguided sampling by "
            f"{results.text(f'ladder.as_run.{slot}.kid_change')}, the correct ensemble by "
            f"{results.text(f'ladder.correct.{slot}.kid_change')}. Added alone to that one, the faults change it by: "
            f"{found['alone']}. Sufficient by themselves to make guidance worse than none: {found['sufficient']}. In "
            f"the company of the others, the one whose mending lowers KID most: {found['carries']}."
            for slot, space in spaces.items() if (found := causes(results, slot))]


def setting_text(value) -> str:
    """A parameter in print: '0.0003', 'none', '60, 40, 40'."""
    if isinstance(value, list):
        return ", ".join(map(setting_text, value))
    return f"{value:g}" if isinstance(value, float) else str(value)
