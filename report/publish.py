"""`make publish`: what can be read without running anything, in docs/, and a note of what it was made from.

docs/report.pdf is the report of the committed results; docs/pages/ has the executed notebooks of the default profile.
"""

import json
import shutil
import sys
from pathlib import Path

from dgutils.files import digest_of_file, write_file
from dgutils.paths import repo_root
from report import build, site
from report.build import Parser, script

SHOWN = "cifar10"  # whose results the report has
RUN = "quick"  # whose notebooks are shown
MADE_FROM = {  # what is published -> the files that it shows
    "report.pdf": ("report/main.tex", "report/sections/*.tex", "report/*.csv", "report/*.sty", "report/*.bib",
                   f"report/results/{SHOWN}/*.json", f"figures/{SHOWN}/*.pdf"),
    "pages": ("notebooks/*.ipynb", f"notebooks/profiles/{RUN}.yaml"),
}  # fmt: skip


def sources(name: str) -> dict[str, str]:
    """The files that something published shows, and their digests as they are now."""
    root = repo_root()
    paths = sorted(path for pattern in MADE_FROM[name] for path in root.glob(pattern))
    return {str(path.relative_to(root)): digest_of_file(path) for path in paths}


def _note() -> Path:
    return repo_root() / "docs" / "published.json"


def older() -> list[str]:
    """What is published and older than what it shows, a line each: what changed since, and how to mend it."""
    noted = json.loads(_note().read_text(encoding="utf-8")) if _note().is_file() else {}
    lines = []
    for name in MADE_FROM:
        before, now = noted.get(name, {}), sources(name)
        changed = sorted(path for path in before.keys() | now.keys() if before.get(path) != now.get(path))
        if changed or not (repo_root() / "docs" / name).exists():
            what = ", ".join(changed[:3]) + (f" and {len(changed) - 3} more" if len(changed) > 3 else "")
            lines.append(f"docs/{name} is older than {what or 'nothing, and is not there'}: run 'make publish'")
    return lines


def publish() -> list[Path]:
    """Build and copy both, and note what they were made from. Raises UserError if the notebooks have not been run."""
    docs, noted = repo_root() / "docs", {name: sources(name) for name in MADE_FROM}
    front = site.build(RUN)
    shutil.rmtree(docs / "pages", ignore_errors=True)
    shutil.copytree(front.parent, docs / "pages")
    shutil.copy(build.build(SHOWN), docs / "report.pdf")
    write_file(_note(), (json.dumps(noted, indent=1, sort_keys=True) + "\n").encode())
    return [docs / "report.pdf", docs / "pages" / "index.html"]


def main() -> int:
    parser = Parser("publish", f"the report of {SHOWN} and the notebooks of {RUN}, to read without running, in docs/")
    return script(parser, lambda args: print("\n".join(str(path.relative_to(repo_root())) for path in publish())))


if __name__ == "__main__":
    sys.exit(main())
