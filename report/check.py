"""What `make check-report` insists on: the form of a submission, and a text that types no result by hand.

Every problem is one line that says what and where. Source: the formatting instructions of NeurIPS 2018.
"""

import re
import sys
from collections.abc import Iterator
from pathlib import Path

from pypdf import PdfReader

from dgutils.paths import repo_root
from report.build import Parser, build, build_folder, script

LETTER = (612, 792)  # points
CONTENT_PAGES = 8
OVERFULL = 1.0  # points
EMBEDDED = {"/Type1": ("/FontFile", "/FontFile3"), "/MMType1": ("/FontFile",), "/TrueType": ("/FontFile2",),
            "/CIDFontType2": ("/FontFile2",)}  # kind of font -> where its outlines are

# What may hold digits that are no result, in this order: names and lengths, then mathematics' own indices.
NO_PROSE = re.compile(
    r"\\(?:res\w*|given|\w*ref|label|cite\w*|url|texttt|dg\w+|claim|input|begin|end|provenance)\*?(?:\[[^]]*\])?(?:\{[^{}]*\})+"
    r"|[\d.]+(?:\s*(?:pt|in|em|ex|mm)\b|\\\w+width)|\{[^{}]*@\{\}[^{}]*\}")
INDICES = re.compile(r"[_^](?:\{[^{}]*\}|\\?\w)|\\t?frac\s*\d?")
NUMBER = re.compile(r"(?<![\w.])(?<![A-Za-z]-)\d+(?:[.,]\d+)*(?!\w)")
YEAR = re.compile(r"(?:19|20)\d\d")


def without_comments(text: str) -> str:
    """LaTeX source without its comments; lines keep their numbers."""
    return re.sub(r"(?<!\\)%.*", "", text)


# --- the text


def literal_numbers(text: str) -> Iterator[tuple[int, str]]:
    r"""(line, number) of the numbers that a section types instead of taking them by \res or marking them \given.

    Years pass, and in formulas 0, 1, 2, indices and exponents, but not what a formula sets equal to 2.
    """
    def blank(match):
        return "\n" * match[0].count("\n") + " "

    text = re.sub(r"\\begin\{(equation|align)\*?\}.*?\\end\{\1\*?\}", blank, without_comments(text), flags=re.DOTALL)
    text = NO_PROSE.sub(blank, text)
    for number, line in enumerate(text.split("\n"), 1):
        prose, formulas = re.sub(r"\$[^$]*\$", " ", line), re.findall(r"\$([^$]*)\$", line)
        yield from ((number, found) for found in NUMBER.findall(prose) if not YEAR.fullmatch(found))
        for formula in formulas:
            formula = INDICES.sub(" ", formula)
            values = re.findall(r"([=<>]?)\s*(?<![\w.])(\d+(?:\.\d+)?)", formula)
            yield from ((number, found) for equals, found in values if float(found) > 1 + (not equals) or "." in found)


def text_problems(report: Path) -> list[str]:
    """Numbers typed by hand, figures and tables that the text never mentions, and incomplete sources."""
    paths = sorted(report.glob("sections/*.tex"))
    sections = {path: without_comments(path.read_text(encoding="utf-8")) for path in paths}
    lines = [f"{path.name}:{line}: the number {number} is typed by hand: \\res{{key}}, or \\given{{{number}}} if it is "
             "no result" for path, text in sections.items() for line, number in literal_numbers(text)]
    mentioned = {name for text in sections.values() for name in re.findall(r"\\ref\{([^}]+)\}", text)}
    for path, text in sections.items():
        for kind, body in re.findall(r"\\begin\{(figure|table)\}(.*?)\\end\{\1\}", text, re.DOTALL):
            label = re.search(r"\\label\{([^}]+)\}", body)
            if not label or label[1] not in mentioned:
                lines.append(f"{path.name}: {kind} {label[1] if label else 'without a label'} is not cited in the text")
    return lines + [line for path in sorted(report.glob("*.bib")) for line in bibliography_problems(path)]


def bibliography_problems(path: Path) -> list[str]:
    """What entries of a .bib file lack of author, title, year, and a place where it can be found."""
    lines, place = [], ("journal", "booktitle", "howpublished", "institution", "url")
    for key, body in re.findall(r"^@\w+\{([^,\s]+),(.*?)^\}", path.read_text(encoding="utf-8"), re.S | re.M):
        fields = set(re.findall(r"(\w+)\s*=\s*\{+[^}\s]", body))
        missing = [name for name in ("author", "title", "year") if name not in fields]
        missing += [] if fields.intersection(place) else ["venue or url"]
        lines += [f"{path.name}: {key} has no {', no '.join(missing)}"] if missing else []
    return lines


# --- what LaTeX made of it


def build_problems(folder: Path) -> list[str]:
    """What the log and the labels of a build say: wide boxes, what is undefined, and how long the content is."""
    log = (folder / "report.log").read_text(errors="replace")
    aux = (folder / "report.aux").read_text(errors="replace")
    lines = [f"report.log: {text}" for text, points in
             re.findall(r"(Overfull \\[hv]box \(([\d.]+)pt too \w+\).*)", log) if float(points) > OVERFULL]
    lines += [f"report.log: {text}" for text in
              dict.fromkeys(re.findall(r"(?:Reference|Citation) .* undefined.*", log))]
    if not (end := re.search(r"\\newlabel\{content:end\}\{\{[^}]*\}\{(\d+)\}", aux)):
        lines.append("main.tex: no label content:end after the content")
    elif int(end[1]) > CONTENT_PAGES:
        lines.append(f"main.tex: the content ends on page {end[1]}, and may fill {CONTENT_PAGES}")
    return lines


def page_problems(pdf: Path) -> list[str]:
    """Pages that are not US Letter, and fonts that are neither Type 1 nor embedded TrueType, the figures' included."""
    lines = {}
    for number, page in enumerate(PdfReader(pdf).pages, 1):
        if (size := tuple(float(side) for side in page.mediabox[2:])) != LETTER:
            lines[size] = f"{pdf.name}, page {number}: {size[0]:g} x {size[1]:g} points, US Letter has 612 x 792"
        for font in _fonts(_part(page, "/Resources")):
            name, kind = str(font.get("/BaseFont", font.get("/Name", "unnamed")))[1:], str(font["/Subtype"])
            files = _part(font, "/FontDescriptor")
            if not any(place in files for place in EMBEDDED.get(kind, ())):
                lines.setdefault(name, f"{pdf.name}, page {number}: font {name} is {kind[1:]}, "
                                 + ("not embedded" if kind in EMBEDDED else "neither Type 1 nor TrueType"))
    return list(lines.values())


def _part(dictionary, name: str) -> dict:
    """An entry of a PDF dictionary, followed to where it is; {} if there is none."""
    return dictionary[name] if name in dictionary else {}  # get() would not follow


def _fonts(resources) -> Iterator:
    """The fonts that resources name, and those of the drawings in them; of a composite font its parts."""
    for font in (font.get_object() for font in _part(resources, "/Font").values()):
        yield from (part.get_object() for part in font["/DescendantFonts"]) if "/DescendantFonts" in font else [font]
    for drawing in _part(resources, "/XObject").values():
        yield from _fonts(_part(drawing.get_object(), "/Resources"))


def identity_problems(pdf: Path, study: Path) -> list[str]:
    """Where a PDF names the people or the repository of study.bib: its text, links or metadata."""
    entry, reader = study.read_text(encoding="utf-8"), PdfReader(pdf)
    people = re.search(r"author = \{(.+)\}", entry)[1].split(" and ")
    names = [name.split()[-1] for name in people] + re.search(r"\\url\{https://[^/]+/([^}]+)\}", entry)[1].split("/")
    places = {"metadata": " ".join(map(str, (reader.metadata or {}).values()))}
    for number, page in enumerate(reader.pages, 1):
        links = [str(_part(_part(link.get_object(), "/A"), "/URI")) for link in _part(page, "/Annots")]
        places[f"page {number}"] = re.sub(r"-?\s+", "", page.extract_text()) + " ".join(links)
    return [f"{pdf.name}, {place}: names {name}, which an anonymous paper may not" for place, text in places.items()
            for name in names if name.lower() in text.lower()]


def check(profile: str) -> list[str]:
    """Build the report and its anonymous copy from a profile's results; what is wrong with them, a line each."""
    report = repo_root() / "report"
    lines = text_problems(report)
    for mode in ("preprint", "submission"):
        pdf = build(profile, mode)
        lines += [f"{mode}: {line}" for line in build_problems(report / build_folder(mode))] + page_problems(pdf)
    return lines + identity_problems(pdf, report / "study.bib")


def main() -> int:
    def run(args):
        problems = check(args.profile)
        print("\n".join(problems) or "the report is in order")
        return 1 if problems else 0

    return script(Parser("check", "build the report and its anonymous copy; is their form in order?"), run)


if __name__ == "__main__":
    sys.exit(main())
