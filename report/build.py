"""`make report`: a profile's numbers, tables and provenance as LaTeX, and the build of the PDF."""

import argparse
import os
import re
import subprocess
import sys
import textwrap
from collections.abc import Callable, Iterable
from pathlib import Path

from dgutils.errors import UserError
from dgutils.files import write_file
from dgutils.paths import repo_root, results_dir
from dgutils.results.records import (
    Results,
    causes,
    load_results,
    printed,
    write_if_changed,
)
from report import diagram, trace

MODES = {"preprint": "preprint", "final": "final", "submission": ""}  # -> the style file's option


def latex_escape(text: str) -> str:
    """Text in which LaTeX sees no commands."""
    special = {"\\": r"\textbackslash{}", "~": r"\textasciitilde{}", "^": r"\textasciicircum{}"}
    return re.sub(r"[\\~^{}$&#_%]", lambda match: special.get(match[0], "\\" + match[0]), text)


def latex_parts(record: dict) -> list[str]:
    """A record's value, interval and unit in LaTeX: numbers have a minus for a hyphen."""
    value, interval, unit = printed(record)
    number, interval = (re.sub(r"(?<!\d)-(?=\d)", r"\\ensuremath{-}", text) for text in (value, interval))
    return [latex_escape(value) if isinstance(record["value"], str) else number, interval, latex_escape(unit)]


def latex_value(record: dict) -> str:
    """A record in LaTeX: value, interval and unit, which no line ends between."""
    return "~".join(filter(None, latex_parts(record)))


def slug(head: str) -> str:
    """A column's head as a name for \\dgtable[...], without brackets: 'KID x 1000 (a space)' is kid-x-1000."""
    return re.sub(r"[^a-z0-9]+", "-", re.sub(r"\(.*\)", "", head).lower()).strip("-")


# --- what the LaTeX sources read


def numbers(results: Results) -> dict[tuple[str, str], str]:
    """(what, key) -> LaTeX text, for the records, tables and provenance of a profile."""
    found = {("body", "compute"): computing(results), ("body", "parity"): parity(repo_root() / "docs" / "parity.md")}
    for key, record in results.records.items():
        value, interval, _ = latex_parts(record)
        found |= {("result", key): latex_value(record), ("value", key): value, ("interval", key): interval,
                  ("count", key): f"{record['n']:,}" if record.get("n") else ""}  # fmt: skip
    for slot, words in spaces(results).items():
        found |= {("space", slot): words, ("body", f"per_training.{slot}"): per_training(results, slot)}
        found |= {("cause", f"{kind}.{slot}"): text
                  for kind, text in causes(results, slot, latex_value, latex_escape).items()}  # fmt: skip
    for name in results.tables:
        found |= table(results, name)
    names = [*results.records, *(f"figure:{name}" for name in results.figures),
             *(f"table:{name}" for name in results.tables)]
    for key in names:
        about = trace.origin(results, key)
        found |= {("mark", key): mark(about), ("entry", key): entry(about)}
    return {place: text for place, text in found.items() if text}


def dataset(results: Results) -> str:
    """The data set's name as its authors write it."""
    name = str(results.records.get("settings.dataset", {}).get("value", ""))
    return {"cifar10": "CIFAR-10", "fashion_mnist": "Fashion-MNIST"}.get(name) or latex_escape(name)


def watermark(results: Results) -> str:
    """What every page made from these results must say; '' only if the profile itself says so."""
    record = results.records.get("settings.watermark")
    return str(record["value"]) if record else results.profile


def spaces(results: Results) -> dict[str, str]:
    """The feature spaces in words, by the names that records have for them: first, second."""
    settings = [results.records.get(f"settings.{name}", {}).get("value") for name in
                ("feature_extractor", "feature_spaces")]  # fmt: skip
    extractor, names = settings[0], str(settings[1] or "").split(", ")
    words = {extractor: "the discriminators' own features", "inception": "Inception features"}
    return {slot: words.get(name) or ("EfficientNet features" if name.startswith("efficientnet") else
                                      latex_escape(f"{name} features"))
            for slot, name in zip(("first", "second"), names, strict=False) if name}  # fmt: skip


def table(results: Results, name: str) -> dict[tuple[str, str], str]:
    """The cells of a table, its caption, the names of its columns, and the number of its rows without the heads."""
    heads, *rows = results.cells(name, latex_value, latex_escape)
    columns = []
    for head in map(slug, results.tables[name]["columns"][1:]):  # of two heads alike the second is head-2
        columns.append(f"{head}-{columns.count(head) + 1}" if head in columns else head)
    long = max((len(row[0]) for row in rows), default=0) > 40
    found = {("caption", name): latex_escape(results.tables[name]["caption"]), ("columns", name): ",".join(columns),
             ("rows", name): str(len(rows)), ("labels", name): r"p{\dg@labelwidth}" if long else "l"}
    heads = [r"\shortstack[r]{" + r"\\".join(textwrap.wrap(head, 14, break_long_words=False)) + "}"
             if len(head) > 14 else head for head in heads]  # fmt: skip
    for number, (label, *cells) in enumerate([heads, *rows]):
        found["cell", f"{name}/{number}/label"] = rf"\raggedright {label}" if long and number else label
        found |= {("cell", f"{name}/{number}/{column}"): cell or "{}"
                  for column, cell in zip(columns, cells, strict=True)}  # fmt: skip
    return found


def tabular(heads: list[str], rows: Iterable[tuple[str, ...]]) -> str:
    """A whole table, its first column left-aligned and the others right-aligned."""
    lines = [" & ".join(map(latex_escape, row)) + r"\\" for row in (heads, *rows)]
    return (rf"\begin{{tabular}}{{@{{}}l{'r' * (len(heads) - 1)}@{{}}}}\toprule {lines[0]}\midrule "
            + " ".join(lines[1:]) + r"\bottomrule\end{tabular}")  # fmt: skip


def computing(results: Results) -> str:
    """The artifacts behind all records by the step that made them, and its time."""
    steps: dict[str, list[float]] = {}
    for entry in results.lineage.values():
        if "step" in entry:
            steps.setdefault(entry["step"], []).append(entry["seconds"])
    rows = [(step, f"{len(times):,}", trace.duration(sum(times))) for step, times in sorted(steps.items())]
    return tabular(["Step", "Artifacts", "Time"], rows)


def per_training(results: Results, slot: str) -> str:
    """The key arms' change of KID against unguided in each training, and their mean; '' if they were not recorded."""
    arms = {"paper": "One discriminator", "correct": "Correct ensemble", "as_run": "The study's ensemble"}
    keys = [f"trainings.{arm}.{slot}.kid_change" for arm in arms]
    count = 1
    while all(f"{key}.training{count}" in results.records for key in keys):
        count += 1
    lines = [(str(i), *(printed(results[f"{key}.training{i}"])[0] for key in keys)) for i in range(1, count)]
    means = [("mean", *(results.text(key) for key in keys))] if lines else []
    if not lines:
        return ""
    return re.sub(r"(?<=[ \[])-(?=\d)", r"\\ensuremath{-}", tabular(["Training", *arms.values()], lines + means))


def parity(path: Path) -> str:
    """docs/parity.md in short: of each kind of comparison the cases, the largest error, and where a test fails."""
    kinds: dict[str, list[list[str]]] = {}
    for line in path.read_text(encoding="utf-8").splitlines():
        cells = [cell.strip() for cell in line.strip("|").split("|")]
        if len(cells) == 4 and cells[2][:1].isdigit():
            kinds.setdefault(cells[0], []).append(cells[2:])
    rows = []
    for kind, cases in kinds.items():
        errors, limits = zip(*cases, strict=True)
        rows.append((kind, str(len(cases)), max(errors, key=float), min(limits, key=float)))
    return tabular(["Compared", "Cases", "Largest error", "Test fails at"], rows)


def mark(about: trace.Origin) -> str:
    """The margin mark of a result, figure or table: notebook and section, then the artifact or the source."""
    if not about.run:
        return latex_escape(f"published: {about.published}")
    artifact = "made in the notebook"
    if about.direct:
        step = about.made.get(about.direct[0], {}).get("step", "artifact")
        artifact = f"{step} {about.direct[0][:8]}" + (f" +{len(about.direct) - 1}" if about.direct[1:] else "")
    return latex_escape(f"{about.notebook[:2]} {about.cell}") + r"\\" + artifact


def entry(about: trace.Origin, most: int = 4) -> str:
    """The appendix entry of a result, figure or table, with at most so many artifacts of a step."""
    if not about.run:
        return latex_escape(f"{about.name}: {about.label}. Published by {about.published}.")
    run, facts = about.run, [rf"\texttt{{{latex_escape(about.name)}}}" + (f" (n = {about.n})" if about.n else "")]
    facts.append(f"notebook {latex_escape(about.notebook)}, ``{latex_escape(about.cell)}''")
    if about.seeds:
        facts.append(f"seeds {about.seeds}")
    facts.append(latex_escape(f"recorded {run['date'][:10]} on {run['device']} by code {trace.revision(run)}"))
    if about.published:
        facts.append(latex_escape(f"published values: {about.published}"))
    if about.made:
        facts.append(f"{trace.duration(about.seconds)} of computing")
    for step, digests in sorted(about.artifacts.items()):
        more = f" and {len(digests) - most} more" if digests[most:] else ""
        facts.append(f"{step} " + ", ".join(digest[:8] for digest in digests[:most]) + more)
    if about.inputs:
        inputs = (f"{name} {digest[:8]}" for name, digest in sorted(about.inputs.items()))
        facts.append(latex_escape("inputs: " + ", ".join(inputs)))
    return "; ".join(facts) + "."


def write_latex(profile: str) -> list[str]:
    """Write generated/numbers.tex and method.pdf for report/main.tex; what did not change stays as it is.

    Returns why the results are stale, a line each. A key that the text uses and nobody recorded stops LaTeX.
    """
    results, out_dir = load_results(profile), repo_root() / "report" / "generated"
    stale = trace.stale(results)
    lines = ["% Written by report/build.py from the results of one profile; edits are lost.",
             rf"\def\dgprofile{{{latex_escape(profile)}}}",
             rf"\def\dgdataset{{{dataset(results)}}}",
             rf"\def\dgwatermark{{{latex_escape(watermark(results))}}}",
             r"\def\dgstale{" + "".join(rf"\item {latex_escape(line)}" for line in stale) + "}",
             *(rf"\dg@set{{{what}}}{{{key}}}{{{text}}}" for (what, key), text in sorted(numbers(results).items())), ""]
    write_if_changed(out_dir / "numbers.tex", "\n".join(lines))
    diagram.save(diagram.method(), out_dir / "method.pdf")
    return stale


# --- the PDF


def build_folder(mode: str, marks: bool = True) -> Path:
    """Where LaTeX works on a mode, from the report's folder on: one folder for each thing it would not notice."""
    official = "-official" if (repo_root() / "report" / "neurips_2018.sty").is_file() else ""
    return Path("generated", f"{mode}{official}{'' if marks else '-unmarked'}")


def build(profile: str, mode: str = "preprint", marks: bool = True, strict: bool = False) -> Path:
    """Build report/report.pdf, or <mode>.pdf for another mode, from a profile's results; nothing changed, nothing done.

    Raises UserError for results that are missing, stale (if `strict`; else they are named, and the PDF says so), and
    for what LaTeX stumbles over.
    """
    if mode not in MODES:
        raise UserError(f"unknown mode {mode}: there are {', '.join(MODES)}")
    stale = write_latex(profile)
    if stale and strict:
        raise UserError("stale results, run 'make reproduce' again:\n" + "\n".join(stale))
    for line in stale:
        print(f"stale: {line}", file=sys.stderr)
    report = repo_root() / "report"
    pretex = rf"\def\dgmode{{{MODES[mode]}}}" + ("" if marks else r"\def\dgoptions{nomarks}")
    out = build_folder(mode, marks)
    command = ["latexmk", "-norc", "-pdf", f"-outdir={out}", "-jobname=report", "-interaction=nonstopmode",
               "-halt-on-error", "-Werror", f"-usepretex={pretex}", "main.tex"]  # fmt: skip
    try:
        done = subprocess.run(command, cwd=report, capture_output=True, text=True, errors="replace",
                              env=os.environ | {"max_print_line": "500"})  # fmt: skip
    except FileNotFoundError as error:
        raise UserError("latexmk is not installed: sh dgutils/setup.sh tex") from error
    if done.returncode:
        raise UserError("LaTeX failed: " + complaint(report / out / "report.log", done.stdout + done.stderr))
    target = report / ("report.pdf" if mode == "preprint" else f"{mode}.pdf")
    pdf = (report / out / "report.pdf").read_bytes()
    if not target.is_file() or target.read_bytes() != pdf:
        write_file(target, pdf)
    return target


def complaint(log: Path, output: str) -> str:
    """The error that stopped LaTeX and its line; without one, undefined references; else the end of the output."""
    text = log.read_text(errors="replace") if log.is_file() else ""
    errors = re.findall(r"^! .*|^l\.\d.*", text, re.MULTILINE)
    undefined = re.findall(r".*Warning: (?:Citation|Reference) .* undefined.*", text)
    return "\n".join(errors[:2] or undefined[:4] or output.strip().splitlines()[-3:])


# --- the command lines of report/*.py


class Parser(argparse.ArgumentParser):
    """The arguments of a script, with the profile among them; what is wrong with them is one line."""

    def __init__(self, module: str, text: str):
        super().__init__(prog=f"python -m report.{module}", description=text)
        self.add_argument("--profile", help="whose results [cifar10 if there are any, else quick]")

    def error(self, message):
        self.exit(2, f"dgutils: {message} ({self.prog} --help)\n")


def profile_to_report(profile: str | None) -> str:
    """The profile asked for; else the committed study's; a clone that has not got it yet reports what it ran itself."""
    complete = [name for name in ("cifar10", "quick") if (results_dir(name) / "06.json").is_file()]
    return profile or (complete or ["quick"])[0]


def script(parser: Parser, run: Callable[[argparse.Namespace], int | None]) -> int:
    """Run a script; a problem that the user can mend is one line on stderr and exit status 2."""
    args = parser.parse_args()
    try:
        args.profile = profile_to_report(args.profile)
        status = run(args) or 0
        sys.stdout.flush()
        return status
    except UserError as error:
        print(f"dgutils: {error}", file=sys.stderr)
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # nobody reads: nothing more is printed
        return 1
    except OSError as error:
        if error.filename is None:
            raise
        print(f"dgutils: {error.filename}: {error.strerror}", file=sys.stderr)
    except KeyboardInterrupt:
        print("dgutils: stopped", file=sys.stderr)
        return 130
    return 2


def main() -> int:
    parser = Parser("build", "build report/report.pdf from the results of a profile")
    parser.add_argument("--mode", default="preprint", help="preprint, final or submission [preprint]")
    parser.add_argument("--unmarked", action="store_true", help="without the margin marks")
    parser.add_argument("--strict", action="store_true", help="refuse results older than the code that made them")

    def run(args):
        path = build(args.profile, args.mode, not args.unmarked, args.strict)
        print(path.relative_to(repo_root()))

    return script(parser, run)


if __name__ == "__main__":
    sys.exit(main())
