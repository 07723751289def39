"""The report: it builds from any profile's results, and each number in it is one that a notebook records."""

import ast
import os
import re
import shutil
import subprocess
import zlib
from pathlib import Path
from types import SimpleNamespace

import nbformat
import pytest

from dgutils import plots
from dgutils.results import Recorder, load_results, published, write_latex
from dgutils.study import Study

ROOT = Path(__file__).resolve().parents[1]
TEXT = "\n".join(path.read_text() for path in [ROOT / "report/main.tex", *sorted(ROOT.glob("report/sections/*.tex"))])
TEXT = re.sub(r"(?<!\\)%.*", "", TEXT)
CODE = [cell.source for path in sorted(ROOT.glob("notebooks/0*.ipynb"))
        for cell in nbformat.read(path, as_version=4).cells if cell.cell_type == "code"]


def used(command: str) -> list[str]:
    """What the text asks for by \\command{...}."""
    return sorted(set(re.findall(rf"\\{command}{{([^}}#]+)}}", TEXT)))


KEYS = used("(?:res|resval|resint|resn)")
FIGURES, TABLES = used("dgfigure"), used("dgtable")

# --- what the text names is what the notebooks make


def strings(sources: list[str]) -> tuple[set[str], list[list]]:
    """Of programs: their plain strings, and their f-strings as lists of text and None for {...}."""
    nodes = [node for source in sources for node in ast.walk(ast.parse(source))]
    plain = {node.value for node in nodes if isinstance(node, ast.Constant) and isinstance(node.value, str)}
    return plain, [[getattr(part, "value", None) if isinstance(part, ast.Constant) else None for part in node.values]
                   for node in nodes if isinstance(node, ast.JoinedStr)]


def key_test(sources: list[str]):
    """A function that says whether these programs can record a key.

    {...} in an f-string stands for a number or a word that is a string somewhere. A key is made whole, or of a
    whole beginning and an f-string that begins with {...}, as in f"{key}.{score}_change".
    """
    plain, formatted = strings(sources)
    words = {word.lower() for word in plain if re.fullmatch(r"[A-Za-z][A-Za-z0-9_-]*", word)}
    word = "(?:[0-9]+|" + "|".join(sorted(words)) + ")"
    forms = [(parts[0] is None, "".join(word if part is None else re.escape(part) for part in parts))
             for parts in formatted if len(parts) < 8]
    wholes = [re.compile(form) for open_start, form in forms if not open_start]
    endings = [re.compile(form[len(word):]) for open_start, form in forms if open_start]

    def whole(key):
        return key in plain or any(form.fullmatch(key) for form in wholes)

    def recorded(key):
        return whole(key) or any(whole(key[:dot.start()]) and any(end.fullmatch(key[dot.start():]) for end in endings)
                                 for dot in re.finditer(r"\.", key))

    return recorded


def test_every_key_of_the_text_is_recorded_or_published():
    recorded = key_test([*CODE, (ROOT / "dgutils/analysis.py").read_text()])
    for key in ("arm.paper.first.kid_chnage", "arm.papre.first.kid_change", "toy.exact"):
        assert not recorded(key), key  # so that the test can fail
    settings = vars(Study)["__dataclass_fields__"] if any(".settings(study)" in source for source in CODE) else ()
    missing = [key for key in KEYS if key not in published() and key.removeprefix("settings.") not in settings
               and not recorded(key)]
    assert not missing, f"the report uses keys that no notebook records: {missing}"


def test_every_figure_and_table_of_the_text_is_made():
    assert {*FIGURES, *TABLES, *used("rescaption")} <= strings(CODE)[0] | {"provenance"}


def test_every_figure_table_and_source_is_cited():
    floats = set(re.findall(r"\\label{((?:fig|tab):[^}]+)}", TEXT))
    assert floats == {ref for ref in re.findall(r"\\ref{([^}]+)}", TEXT) if ref.startswith(("fig:", "tab:"))}
    cited = {key.strip() for group in re.findall(r"\\cite\w*{([^}]+)}", TEXT) for key in group.split(",")}
    assert cited == set(re.findall(r"^@\w+{([^,]+),", (ROOT / "report/references.bib").read_text(), re.MULTILINE))


def test_settings_and_origin_of_a_run_are_recorded(tmp_path):
    recorder = Recorder("quick", "01_fake_samples", tmp_path)
    recorder.settings(SimpleNamespace(num_steps=18, sigma_max=80.0, min_time=1e-5, boosting="none", epochs=[60, 40]))
    recorder.write()
    loaded = load_results("quick", tmp_path)
    assert {key: loaded.text(key) for key in recorder.records} == {
        "settings.num_steps": "18", "settings.sigma_max": "80", "settings.min_time": "1e-05",
        "settings.boosting": "none"}
    assert r"01\_fake\_samples & 20" in loaded.latex_provenance()


# --- it builds


def invented(folder: Path) -> None:
    """The sources of the report in `folder`, with one invented value for every key, table and figure they use."""
    shutil.copytree(ROOT / "report", folder / "report",
                    ignore=shutil.ignore_patterns("results", "generated", "main.[!t]*"))
    recorder = Recorder("rehearsal", "09_invented", folder / "results")
    for key in set(KEYS) - published().keys():
        about = {} if key.startswith("settings.") else dict(interval=(1.0, 1.5), level=0.95, n=1000)
        recorder.record(key, 1.25, label="invented", cell="none", **about)
    row = ("a long label " * 4, *list(recorder.records)[:2])
    for name in set(TABLES) - {"provenance"}:
        recorder.table(name, ["A row", "A long head of a column", "FD"], [row], "A caption & more.")
    recorder.write()
    write_latex("rehearsal", folder / "results", folder / "report/generated")
    fig, ax = plots.panels()
    ax.set_title(r"$\sigma$")
    plots.save_figure(fig, "rehearsal", "09_invented")
    for name in FIGURES:
        shutil.copy(folder / "figures/rehearsal/09_invented.pdf", folder / f"figures/rehearsal/{name}.pdf")


@pytest.fixture
def clone(tmp_path, monkeypatch):
    monkeypatch.setenv("DGUTILS_ROOT", str(tmp_path))
    invented(tmp_path)
    return tmp_path / "report"


def latex(folder: Path) -> tuple[int, str]:
    """latexmk's exit status and the last log, as `make report` runs it."""
    done = subprocess.run(["latexmk", "-pdf", "-interaction=nonstopmode", "-halt-on-error", "-Werror", "main.tex"],
                          cwd=folder, capture_output=True, env=os.environ | {"max_print_line": "500"})
    return done.returncode, (folder / "main.log").read_text(errors="replace")


def objects(pdf: bytes) -> bytes:
    """A PDF with its compressed parts unpacked, so that its fonts and page sizes can be read."""
    unpacked = [pdf]
    for match in re.finditer(rb"stream\r?\n(.*?)endstream", pdf, re.DOTALL):
        try:
            unpacked.append(zlib.decompressobj().decompress(match[1]))
        except zlib.error:
            pass  # not compressed
    return b"\n".join(unpacked)


needs_tex = pytest.mark.skipif(not (shutil.which("latexmk") and shutil.which("pdflatex")),
                               reason="pdflatex or latexmk is not installed: sh dgutils/setup.sh tex")


def check_pdf(folder: Path, log: str) -> None:
    """US Letter, no Type 3 font, nothing undefined, no line more than 2 pt too wide."""
    assert "undefined" not in log and not re.search(r"Overfull \\hbox \(([2-9]|\d\d+)\.", log)
    pdf = objects((folder / "main.pdf").read_bytes())
    assert set(re.findall(rb"/MediaBox ?\[([^]]+)\]", pdf)) == {b"0 0 612 792"}
    assert b"/Subtype/Type1" in pdf.replace(b" ", b"") and b"/Type3" not in pdf


@needs_tex
def test_the_report_builds_to_the_same_bytes_again(clone):
    status, log = latex(clone)
    assert status == 0, log[-2000:]
    check_pdf(clone, log)
    first = (clone / "main.pdf").read_bytes()
    for path in clone.glob("main.[!t]*"):
        path.unlink()
    assert latex(clone)[0] == 0 and (clone / "main.pdf").read_bytes() == first


@needs_tex
def test_the_report_builds_anonymously(clone):
    main = clone / "main.tex"
    main.write_text(main.read_text().replace("[preprint]", ""))
    status, log = latex(clone)
    assert status == 0, log[-2000:]
    check_pdf(clone, log)


@needs_tex
@pytest.mark.parametrize("text, message", [
    (r"\res{no.such.key}", "No text of result 'no.such.key' in profile rehearsal"),
    (r"\dgfigure{09_missing}{1in}", "No figure '09_missing' in figures/rehearsal"),
    (r"\dgtable{missing}", "No table 'missing' in profile rehearsal"),
    (r"\ref{tab:missing}", "Reference `tab:missing' on page")])
def test_what_is_missing_stops_the_build(clone, text, message):
    section = clone / "sections/introduction.tex"
    section.write_text(section.read_text() + text)
    status, log = latex(clone)
    assert status != 0 and message in log
