"""What is published in docs/ is not older than what it shows, and a change of any of it is named."""

import json
import shutil
from pathlib import Path

import pytest

from report import build, publish, site

ROOT = Path(__file__).resolve().parents[1]


def test_what_is_published_is_not_older_than_what_it_shows():
    assert publish.older() == []
    assert (ROOT / "docs/pages/index.html").is_file() and (ROOT / "docs/report.pdf").read_bytes()[:4] == b"%PDF"


@pytest.fixture
def clone(tmp_path, monkeypatch):
    """A clone with everything that is shown, whose report and pages are stand-ins."""
    monkeypatch.setenv("DGUTILS_ROOT", str(tmp_path))
    for pattern in (pattern for patterns in publish.MADE_FROM.values() for pattern in patterns):
        for path in ROOT.glob(pattern):
            target = tmp_path / path.relative_to(ROOT)
            target.parent.mkdir(parents=True, exist_ok=True)
            target.write_bytes(b"" if target.suffix == ".pdf" else path.read_bytes())
    (tmp_path / "pages").mkdir()
    (tmp_path / "pages/index.html").write_text("front")
    (tmp_path / "report.pdf").write_bytes(b"%PDF")
    monkeypatch.setattr(site, "build", lambda profile: tmp_path / "pages/index.html")
    monkeypatch.setattr(build, "build", lambda profile: tmp_path / "report.pdf")
    return tmp_path


def test_nothing_published_is_named(clone):
    assert len(publish.older()) == 2 and all(line.endswith(": run 'make publish'") for line in publish.older())
    publish.publish()
    assert publish.older() == []


@pytest.mark.parametrize(("path", "published"), [
    ("notebooks/03_guided_sampling.ipynb", "pages"), ("notebooks/profiles/quick.yaml", "pages"),
    ("report/sections/abstract.tex", "report.pdf"), ("report/published.csv", "report.pdf"),
    ("figures/cifar10/06_ladder.pdf", "report.pdf"), ("report/results/cifar10/06.json", "report.pdf")])  # fmt: skip
@pytest.mark.parametrize("change", [lambda path: path.write_bytes(path.read_bytes() + b" "), Path.unlink])
def test_what_changed_since_is_named(clone, path, published, change):
    publish.publish()
    change(clone / path)
    assert publish.older() == [f"docs/{published} is older than {path}: run 'make publish'"]


@pytest.mark.parametrize("lost", ["report.pdf", "pages"])
def test_what_is_gone_is_named(clone, lost):
    publish.publish()
    gone = clone / "docs" / lost
    shutil.rmtree(gone) if gone.is_dir() else gone.unlink()
    assert len(publish.older()) == 1 and f"docs/{lost}" in publish.older()[0]


def test_the_note_says_what_it_was_made_from(clone):
    publish.publish()
    noted = json.loads((clone / "docs/published.json").read_text())
    assert noted == {name: publish.sources(name) for name in publish.MADE_FROM} and all(noted.values())
