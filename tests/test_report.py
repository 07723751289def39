"""The report: it builds from any profile's results, and each number in it is one that a notebook records."""

import ast
import itertools
import re
import shutil
from pathlib import Path

import matplotlib
import nbformat
import numpy as np
import pytest
from ledgers import blank_ledger
from matplotlib.figure import Figure
from pypdf import PdfReader

from dgutils.errors import UserError
from dgutils.metrics import Interval
from dgutils.pipeline import parameters
from dgutils.results import plots
from dgutils.results.records import Results, load_results, published
from report import build as report
from report import check as check_report

ROOT = Path(__file__).resolve().parents[1]
TEXT = "\n".join(path.read_text() for path in [ROOT / "report/main.tex", *sorted(ROOT.glob("report/sections/*.tex"))])
TEXT = check_report.without_comments(TEXT)
CODE = [cell.source for path in sorted(ROOT.glob("notebooks/0*.ipynb"))
        for cell in nbformat.read(path, as_version=4).cells if cell.cell_type == "code"]


def used(command: str) -> list[str]:
    """What the text asks for by \\command{...}."""
    return sorted(set(re.findall(rf"\\{command}{{([^}}#]+)}}", TEXT)))


KEYS = used("(?:res|resval|resint|resn)")
FIGURES, TABLES = used("dgfigure"), used(r"dgtable(?:\[[^]]*\])?")

# --- what the text names is what the notebooks make


def strings(sources: list[str]) -> set[str]:
    """The plain strings in programs."""
    nodes = [node for source in sources for node in ast.walk(ast.parse(source))]
    return {node.value for node in nodes if isinstance(node, ast.Constant) and isinstance(node.value, str)}


def test_every_figure_and_table_of_the_text_is_made():
    assert {*FIGURES, *TABLES, *used("rescaption")} <= strings(CODE)


def test_a_guide_that_never_acts_is_a_line_of_the_legend():
    never = np.full((2, 3), np.nan)
    figure, ax = plots.panels()
    plots.bands(ax, np.array([0.1, 1.0]), {"right": np.ones((2, 3)), "fault": never})
    plots.legend_above(ax)
    assert [text.get_text() for text in ax.get_legend().get_texts()] == ["right", "fault"]


def test_what_a_user_sets_for_matplotlib_changes_no_figure(tmp_path, monkeypatch):
    monkeypatch.setenv("DGUTILS_ROOT", str(tmp_path))

    def drawn() -> bytes:
        history = [dict(epoch=i, train_loss=0.7, val_loss=0.6, train_accuracy=0.5, val_accuracy=0.6) for i in (1, 2)]
        fig = plots.training_curves({"a": history}, 0.69)
        return plots.save_figure(fig, "smoke", "02_training_curves").data

    usual = drawn()
    with matplotlib.rc_context({"lines.linewidth": 9, "font.family": "monospace", "axes.facecolor": "red",
                                "axes.grid": True, "savefig.dpi": 50, "figure.constrained_layout.use": False}):
        assert drawn() == usual


def test_equations_that_the_code_refers_to_are_in_the_report():
    text = "".join(path.read_text() for path in (ROOT / "report" / "sections").glob("*.tex"))
    code = "".join(path.read_text() for path in (ROOT / "dgutils").rglob("*.py"))
    named = set(re.findall(r"\beq:[a-z-]+", code))
    assert len(named) >= 7 and all(f"\\label{{{name}}}" in text for name in named)


def test_what_the_text_says_computes_an_equation_is_a_function():
    names = used("dgcode")
    assert len(names) >= 8
    for name in names:
        room, function = name.split(".")
        (path,) = (ROOT / "dgutils").rglob(f"{room}.py")
        tree = ast.parse(path.read_text())
        assert function in {node.name for node in tree.body if isinstance(node, ast.FunctionDef | ast.ClassDef)}, name


def test_feature_spaces_are_named_for_whose_they_are(tmp_path):
    for names, words in {
        "own-adm, efficientnet-lite0@128": ("the discriminators' own features", "EfficientNet features"),
        "efficientnet-lite0@128, own-adm": ("EfficientNet features", "the discriminators' own features"),
        "inception": ("Inception features",),
    }.items():
        results = Results("quick", {"settings.feature_extractor": {"value": "own-adm"},
                                    "settings.feature_spaces": {"value": names}}, {})  # fmt: skip
        assert tuple(report.spaces(results).values()) == words
    assert report.spaces(Results("quick", {}, {})) == {}


def test_every_source_of_the_list_is_cited():
    cited = {key.strip() for group in re.findall(r"\\cite\w*{([^}]+)}", TEXT) for key in group.split(",")}
    listed = (ROOT / "report/references.bib").read_text() + (ROOT / "report/study.bib").read_text()
    assert cited == set(re.findall(r"^@\w+{([^,]+),", listed, re.MULTILINE))


def test_settings_of_a_run_are_recorded(tmp_path, monkeypatch):
    monkeypatch.setenv("DGUTILS_ROOT", str(tmp_path))
    recorder = blank_ledger("quick", "01_fake_samples")
    recorder.settings(dict(num_steps=18, sigma_max=80.0, min_time=1e-5, boosting="none", epochs=[60, 40], watermark=""))
    recorder.write()
    loaded = load_results("quick")
    assert {key: loaded.text(key) for key in recorder.records} == {
        "settings.num_steps": "18", "settings.sigma_max": "80", "settings.min_time": "1e-05",
        "settings.boosting": "none", "settings.epochs": "60, 40", "settings.watermark": ""}
    assert report.watermark(loaded) == ""


# --- its form


def test_the_text_of_the_report_is_in_order():
    assert check_report.text_problems(ROOT / "report") == []


@pytest.mark.parametrize("text, numbers", [
    ("KID fell by 0.13, to 12 %\nor 1,000", [(1, "0.13"), (1, "12"), (2, "1,000")]),
    (r"CIFAR-10 in 2009, \res{arm.d1.kid}, \given{0.95}, Table~\ref{tab:1}, \dgfigure{01_x}{0.8\linewidth} % 42", []),
    (r"of $2N - 1$ steps, $w_1 = 1$, $x^2$, $\ln 2$, PFGM++ and Lite0", []),
    ("a weight $w = 2$, $n = 50000$ and $p < 0.05$", [(1, "2"), (1, "50000"), (1, "0.05")]),
    ("\\begin{equation}\n x = 3\n\\end{equation}\n4 \\hspace{3pt}", [(4, "4")])])
def test_numbers_typed_by_hand_are_found(text, numbers):
    assert list(check_report.literal_numbers(text)) == numbers


def test_what_is_wrong_with_the_text_is_named(tmp_path):
    (tmp_path / "sections").mkdir()
    (tmp_path / "sections/data.tex").write_text(
        "FID 3\n\\begin{figure}\\label{fig:a}\\end{figure}\\begin{table}x\\end{table}\\ref{fig:b}")
    (tmp_path / "some.bib").write_text("@misc{a,\n  author = {A. B.}, title = {T}, year = {}\n}\n"
                                       "@misc{b,\n  author = {A}, title = {{T}}, year = {2001}, url = {x}\n}\n")
    assert check_report.text_problems(tmp_path) == [
        "data.tex:1: the number 3 is typed by hand: \\res{key}, or \\given{3} if it is no result",
        "data.tex: figure fig:a is not cited in the text", "data.tex: table without a label is not cited in the text",
        "some.bib: a has no year, no venue or url"]


def test_what_is_wrong_with_a_build_is_named(tmp_path):
    log = ("Overfull \\hbox (0.9pt too wide) in paragraph\nOverfull \\vbox (12.5pt too high) has occurred\n"
           "LaTeX Warning: Reference `fig:a' on page 1 undefined on input line 3.\n")
    (tmp_path / "report.log").write_text(log)
    (tmp_path / "report.aux").write_text(r"\newlabel{content:end}{{9}{9}{Title}{section*.4}{}}")
    assert check_report.build_problems(tmp_path) == [
        "report.log: Overfull \\vbox (12.5pt too high) has occurred",
        "report.log: Reference `fig:a' on page 1 undefined on input line 3.",
        "main.tex: the content ends on page 9, and may fill 8"]
    (tmp_path / "report.aux").write_text("")
    assert check_report.build_problems(tmp_path)[-1] == "main.tex: no label content:end after the content"


@pytest.fixture(scope="module")
def bad_pdf(tmp_path_factory):
    """One A4 page with a Type 3 font, with a name in its text and in its metadata."""
    path = tmp_path_factory.mktemp("bad") / "bad.pdf"
    fig = Figure(figsize=(210 / 25.4, 297 / 25.4), layout="none")
    fig.text(0.5, 0.5, "by Kleger")
    with matplotlib.rc_context({"pdf.fonttype": 3}):
        fig.savefig(path, metadata={"Author": "V. Sartor"})
    return path


def test_paper_and_fonts_of_another_kind_are_named(bad_pdf):
    size, font = check_report.page_problems(bad_pdf)
    assert size == "bad.pdf, page 1: 595.276 x 841.89 points, US Letter has 612 x 792"
    assert re.fullmatch(r"bad.pdf, page 1: font \S*DejaVuSans\S* is Type3, neither Type 1 nor TrueType", font)


def test_names_in_an_anonymous_paper_are_found(bad_pdf):
    assert check_report.identity_problems(bad_pdf, ROOT / "report/study.bib") == [
        "bad.pdf, metadata: names Sartor, which an anonymous paper may not",
        "bad.pdf, page 1: names Kleger, which an anonymous paper may not"]


# --- it builds


@pytest.fixture(scope="module")
def invented(tmp_path_factory) -> Path:
    """A clone of what the report needs, with an invented value for each key, table and figure, in profile smoke."""
    folder = tmp_path_factory.mktemp("invented")
    shutil.copytree(ROOT / "report", folder / "report", ignore=shutil.ignore_patterns("results", "generated", "*.pdf"))
    for name in ("notebooks", "docs"):
        shutil.copytree(ROOT / name, folder / name)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("DGUTILS_ROOT", str(folder))
        fig, ax = plots.panels()
        ax.set_title(r"$\sigma$")
        plots.save_figure(fig, "smoke", "00_figure")
        for name in FIGURES:
            shutil.copy(folder / "figures/smoke/00_figure.pdf", folder / f"figures/smoke/{name}.pdf")
        recorders = [blank_ledger("smoke", path.stem) for path in sorted(ROOT.glob("notebooks/0*.ipynb"))]
        first = recorders[0]
        first.settings(parameters.load("smoke"))
        for key in set(KEYS) - published().keys() - first.records.keys():
            first.value(key, Interval(1.25, 1.0, 1.5, 0.95, 0), label="invented & more", section="none", n=1000)
        ladder = []  # of two faults
        for rung, slot in itertools.product(("without_raw_logits", "correct", "only_raw_logits", "only_wrong_file"),
                                            ("first", "second")):
            for key in (f"ladder.{rung}.{slot}.kid_change", f"ladder.{rung}.step.{slot}.kid_change"):
                first.value(key, Interval(-1.25, -1.5, -1.0, 0.95, 0), label="invented", section="none")
            ladder.append((rung.replace("only_", "only: "), f"ladder.{rung}.{slot}.kid_change"))
        columns = {name: {"a-long-head-of-a-column"} for name in [*TABLES, *used("rescaption")]}
        for names, name in re.findall(r"\\dgtable(?:\[([^]]*)\])?{(\w+)}", TEXT):
            columns[name] |= {column for column in names.split(",") if column}
        for name, heads in columns.items():
            rows = [("a row with a label that is longer than most", *["settings.num_steps"] * len(heads))] * 6
            if name == "ladder":
                rows = [(label, key, *[None] * (len(heads) - 1)) for label, key in ladder[::2]]
            heads = ["A row", *(head.replace("-", " ") for head in sorted(heads))]
            first.show(name, heads, rows, "A caption & more")
        for recorder in recorders:
            recorder.write()
    return folder


@pytest.fixture
def clone(invented, tmp_path, monkeypatch):
    """The report folder of a fresh copy of it, which stands in the place of the repository."""
    shutil.copytree(invented, tmp_path, dirs_exist_ok=True)
    monkeypatch.setenv("DGUTILS_ROOT", str(tmp_path))
    return tmp_path / "report"


def pages(pdf: Path) -> list[str]:
    """The text of each page, in one line."""
    return [" ".join(page.extract_text().split()) for page in PdfReader(pdf).pages]


def replace(path: Path, old: str, new: str) -> None:
    """Change a file of the clone, which holds `old`."""
    text = path.read_text()
    assert old in text
    path.write_text(text.replace(old, new))


needs_tex = pytest.mark.skipif(not (shutil.which("latexmk") and shutil.which("pdflatex")),
                               reason="pdflatex or latexmk is not installed: sh dgutils/setup.sh tex")
NOT_THE_STUDY = "a demonstration, not the result that the study stands on"


@needs_tex
def test_the_report_builds_to_the_same_bytes_and_only_once(clone):
    pdf = report.build("smoke", strict=True)
    made = {path: path.stat().st_mtime_ns for path in [pdf, *clone.glob("generated/**/*")] if path.is_file()}
    assert report.build("smoke", strict=True) == pdf == clone / "report.pdf"
    assert {path: path.stat().st_mtime_ns for path in made} == made, "a second build did something"
    first = pdf.read_bytes()
    shutil.rmtree(clone / "generated")
    assert report.build("smoke").read_bytes() == first

    assert check_report.check("smoke") == []
    texts = pages(pdf)
    assert all(NOT_THE_STUDY in text for text in texts) and not any("Stale:" in text for text in texts)
    assert "Kleger" in texts[0] and "Preprint. Work in progress." in texts[0]
    assert check_report.identity_problems(pdf, clone / "study.bib")
    marks = {f"dg.{key}" for key in [*used("claim"), *(f"figure:{name}" for name in FIGURES)]}
    notes = [note.get_object() for page in PdfReader(pdf).pages for note in page.get("/Annots", [])]
    links = {note.get("/A", {}).get("/D") for note in notes}
    assert marks <= links & set(PdfReader(pdf).named_destinations), "a mark leads nowhere"


@needs_tex
def test_stale_results_are_refused_or_named_and_an_anonymous_copy_names_nobody(clone):
    replace(clone.parent / "notebooks/profiles/smoke.yaml", "watermark: smoke", 'watermark: ""')
    replace(clone / "results/smoke/01.json", '"value": "smoke"', '"value": ""')
    replace(clone.parent / "notebooks/04_evaluation.ipynb", "default_rng(0)", "default_rng(1)")
    line = "04_evaluation: the notebook's code has changed since"
    with pytest.raises(UserError, match=line):
        report.build("smoke", "submission", strict=True)
    assert not (clone / "submission.pdf").exists()

    pdf = report.build("smoke", "submission", marks=False)
    texts = pages(pdf)
    assert all("Stale: the code or the inputs have changed" in text for text in texts)
    assert line in re.sub(r"\u2019", "'", " ".join(texts))
    assert not any(NOT_THE_STUDY in text for text in texts), "a watermark although the profile has none"
    assert "Anonymous Author(s)" in texts[0] and "cknowledgments" not in " ".join(texts)
    assert check_report.identity_problems(pdf, clone / "study.bib") == []


@needs_tex
@pytest.mark.parametrize("text, message", [
    (r"\res{no.such.key}", "No result 'no.such.key' in profile smoke"),
    (r"\resn{settings.num_steps}", "No count 'settings.num_steps' in profile smoke"),
    (r"\dgfigure{09_missing}{1in}", "No figure '09_missing' in figures/smoke"),
    (r"\dgtable{missing}", "No table 'missing' in profile smoke"),
    (r"\ref{tab:missing}", "Reference `tab:missing' on page")])
def test_what_is_missing_stops_the_build(clone, text, message):
    for path in clone.glob("sections/*.tex"):
        path.write_text("")
    (clone / "sections/introduction.tex").write_text(text)
    with pytest.raises(UserError, match=re.escape(message)):
        report.build("smoke")
    assert not (clone / "report.pdf").exists()


def test_other_modes_are_refused():
    with pytest.raises(UserError, match="unknown mode thesis: there are preprint, final, submission"):
        report.build("smoke", "thesis")


# What the official style file gives that the sources may build on, and no more: its options, Times, a page, natbib.
OFFICIAL = r"""\ProvidesPackage{neurips_2018}[2018/11/19 a stand-in for the official style]
\newif\if@natbib \@natbibtrue
\DeclareOption{final}{}\DeclareOption{preprint}{}\DeclareOption{nonatbib}{\@natbibfalse}\ProcessOptions
\if@natbib\RequirePackage{natbib}\fi
\RequirePackage[letterpaper, textwidth=5.5in, textheight=9in]{geometry}
\renewcommand{\rmdefault}{ptm}\renewcommand{\sfdefault}{phv}
"""


@needs_tex
@pytest.mark.parametrize("official, mode", [
    (False, "preprint,nonatbib"), (False, "nonatbib"), (True, "preprint"), (True, ""), (True, "final,nonatbib")])
def test_the_same_sources_build_with_the_official_style_and_without_natbib(clone, monkeypatch, official, mode):
    monkeypatch.setitem(report.MODES, "preprint", mode)
    if official:
        report.build("smoke")  # with our style: dropping the other in must be noticed
        (clone / "neurips_2018.sty").write_text(OFFICIAL)
    pdf = report.build("smoke")
    log = (clone / report.build_folder("preprint") / "report.log").read_text()
    assert ("neurips_2018.sty" in log) == official and ("neurips_repro.sty" in log) != official
    assert ("natbib.sty" in log) == ("nonatbib" not in mode)
    assert check_report.page_problems(pdf) == []
    named = bool(check_report.identity_problems(pdf, clone / "study.bib"))
    assert named == ("final" in mode or "preprint" in mode)
