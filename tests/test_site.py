"""The static site: complete, and nothing in it is loaded from a network."""

import base64
import re
import shutil
from pathlib import Path

import nbformat
import pytest
from ledgers import blank_ledger
from nbformat.v4 import new_code_cell, new_markdown_cell, new_notebook, new_output

from dgutils.errors import UserError
from dgutils.metrics import Interval
from dgutils.results import plots
from report import site

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture
def clone(tmp_path, monkeypatch):
    """A clone with results, a figure and an executed notebook of the profile smoke."""
    monkeypatch.setenv("DGUTILS_ROOT", str(tmp_path))
    for name in ("notebooks", "report/sections"):
        shutil.copytree(ROOT / name, tmp_path / name)
    shutil.copy(ROOT / "report/main.tex", tmp_path / "report")
    fig, _ = plots.panels()
    picture = plots.save_figure(fig, "smoke", "06_fault")
    plots.save_figure(plots.panels()[0], "smoke", site.FINDING)
    recorder = blank_ledger("smoke", "06_ensemble")
    recorder.value("settings.watermark", "smoke", label="watermark", section="parameters")
    recorder.value("ens.raw_all.first.kid_change", Interval(2.0, 1.0, 3.0, 0.95, 0), section="The arms",
                   label="KID x 1000 of raw logits minus unguided sampling, there")
    recorder.value("ens.fd", Interval(1.5, 1.0, 2.0, 0.95, 0), label="FD", section="The arms")
    recorder.show("ledger", ["Claim", "Our change"], [("a < b & c", "ens.fd")], "The <ledger>")
    recorder.write()
    book = new_notebook(cells=[
        new_markdown_cell("# 06 · The ensemble\n\n*Are six better than one?*\n\n"
                          "With $a < b$ and $\\log r$:\n\n$$\\bar p = \\tfrac1M\\sum_i p_i$$"),
        new_code_cell("cost = '$5 to $6'", execution_count=1, outputs=[
            new_output("display_data", {"text/markdown": "so $x^2$ holds"}),
            new_output("display_data", {"image/png": base64.b64encode(picture.data).decode()})])])
    folder = tmp_path / "runs/smoke/notebooks"
    folder.mkdir(parents=True)
    nbformat.write(book, folder / "06_ensemble.ipynb")
    (folder / "05_reproduction.failed.ipynb").write_text("not a notebook")
    return tmp_path


def test_the_site_holds_notebooks_results_and_figures_and_loads_nothing(clone):
    front = site.build("smoke")
    assert front == clone / "runs/smoke/site/index.html"
    index, book = (front.with_name(name).read_text() for name in ("index.html", "06_ensemble.html"))
    assert '<a href="06_ensemble.html">06 · The ensemble</a>: Are six better than one?' in index
    assert "05_reproduction.failed" not in index
    assert "<td>a &lt; b &amp; c</td><td>1.5 [1.0, 2.0]</td>" in index and "The &lt;ledger&gt;" in index
    assert "Profile smoke: a demonstration." in index
    assert 'src="figures/06_fault.png"' in index and (front.parent / "figures/06_fault.png").is_file()
    finding, picture, question, ledger = map(index.index, (
        "Raw logits: KID x 1000 is higher than that of unguided sampling in there (2.0 [1.0, 3.0]).",
        f"figures/{site.FINDING}.png", "Are six better than one?", "The &lt;ledger&gt;"))
    assert finding < picture < question < ledger  # the front page says first what was found
    caption = re.search(r"06_fault.png[^>]*><figcaption>(.*?)<a", index, re.DOTALL)[1]
    assert "images that get no guidance" in caption and "\\" not in caption and "$" not in caption

    assert book.count("<math") == 4 and "\\tfrac" not in book and "data:image/png" in book
    assert "$5" in re.sub(r"<[^>]+>", "", book) and "<mo>&#x0003C;</mo>" in book
    for text in (index, book):
        assert not re.search(r"<script|<link|@import|url\(|src=\"(?!figures/|data:)", text), "it would load something"

    made = {path: path.stat().st_mtime_ns for path in front.parent.glob("*.html")}
    site.build("smoke")
    assert {path: path.stat().st_mtime_ns for path in made} == made


def test_a_notebook_asks_on_its_page_what_the_readme_says_that_it_asks():
    asked = dict(re.findall(r"\| `(0\d_\w+)` \| (.*?) \|", (ROOT / "README.md").read_text(encoding="utf-8")))
    assert list(asked) == [path.stem for path in sorted((ROOT / "notebooks").glob("0*.ipynb"))]
    for name, question in asked.items():
        assert site.notebook_page(ROOT / f"notebooks/{name}.ipynb", "quick")[1] == question


def test_captions_are_those_of_the_report_in_plain_words():
    found = site.captions(ROOT / "report")
    assert len(found) >= 8 and list(found)[0] == "06_fault"  # the first in the text
    assert "the first feature space" in found["04_arms"]
    found |= {"named": site.captions(ROOT / "report", {"first": "own", "second": "others'"})["04_arms"]}
    assert "own; lower row: others'" in " ".join(found["named"].split())
    assert not [text for text in found.values() if re.search(r"[\\$]|^\s*$", re.sub(r"<math.*?</math>", "", text))]


def test_without_a_run_it_says_what_to_do(clone):
    shutil.rmtree(clone / "runs")
    with pytest.raises(UserError, match="no executed notebooks of profile smoke: run 'make reproduce PROFILE=smoke'"):
        site.build("smoke")
