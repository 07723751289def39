"""`make html`: the executed notebooks and the figures of the report, as a site that opens from disk.

Formulas are MathML, which browsers draw themselves; pictures lie inside the pages or beside them; nothing is a script.
"""

import html
import re
import shutil
import sys
from pathlib import Path

from latex2mathml.converter import convert
from nbconvert import HTMLExporter
from pygments.formatters import HtmlFormatter

from dgutils.cli.summary import sentences
from dgutils.errors import UserError
from dgutils.paths import figures_dir, repo_root, runs_dir
from dgutils.results.records import Results, load_results, why, write_if_changed
from report.build import Parser, script, spaces, watermark
from report.trace import revision, stale

STYLE = """
body { max-width: 60rem; margin: 2rem auto; padding: 0 1rem; font: 16px/1.5 Georgia, serif; color: #222; }
nav, footer, figcaption { color: #555; font-size: 90%; } nav a { margin-right: 1em; } a { color: #0072B2; }
table { border-collapse: collapse; font-size: 85%; margin: 1em 0; display: block; overflow-x: auto; }
th { border-bottom: 1px solid; border-top: 2px solid; } td, th { padding: .15em .8em .15em 0; text-align: left; }
img { max-width: 100%; } figure { margin: 2em 0; } math { font-size: 110%; } math[display=block] { margin: .8em 0; }
pre { font-size: 80%; line-height: 1.35; overflow-x: auto; overflow-y: hidden; }
.input_area { background: #f6f6f6; padding: .1em .8em; }
.input_area pre { margin: .4em 0; } .output_stderr pre { max-height: 8em; overflow: auto; color: #777; }
.anchor-link, .prompt { display: none; } .note { color: #A33; }
"""


FINDING = "06_samples"  # the picture of the front page: the same seeds unguided, guided, and under the study's fault


def page(title: str, body: str, profile: str, style: str = "") -> str:
    """A whole page: the body below links to the front page."""
    return f"""<!DOCTYPE html>
<html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width">
<title>{html.escape(title)}</title><style>{STYLE}{style}</style></head>
<body><nav><a href="index.html">Discriminator guidance, reproduced</a> profile {html.escape(profile)}</nav>
{body}
</body></html>
"""


def with_math(body: str) -> str:
    """HTML with its $formulas$ as MathML; code stays as it is."""
    def mathml(match):
        made = convert(html.unescape(match[2]).strip(), display="block" if match[1] == "$$" else "inline")
        return re.sub(r"<mi>(log|ln)</mi>", r'\g<0><mspace width="0.17em"/>', made)  # browsers set "logr" without

    parts = re.split(r"(<(pre|code)\b.*?</\2>)", body, flags=re.DOTALL)
    texts, codes = parts[::3], [*parts[1::3], ""]
    return "".join(re.sub(r"(\$\$?)(.+?)\1", mathml, text, flags=re.DOTALL) + code
                   for text, code in zip(texts, codes, strict=True))


def notebook_page(path: Path, profile: str) -> tuple[str, str, str]:
    """(title, the question that it asks, page) of an executed notebook."""
    exporter = HTMLExporter(template_name="basic", embed_images=True)
    body, _ = exporter.from_filename(str(path))
    heading = re.search(r"<h1[^>]*>(.*?)(?:<a |</h1>)", body, re.DOTALL)
    title = html.unescape(re.sub(r"<[^>]+>", "", heading[1])).strip() if heading else path.stem
    question = re.search(r"</h1>\s*<p><em>(.*?)</em></p>", body, re.DOTALL)
    style = HtmlFormatter().get_style_defs(".highlight")
    return title, html.unescape(question[1]) if question else "", page(title, with_math(body), profile, style)


def captions(report: Path, words: dict[str, str] | None = None) -> dict[str, str]:
    r"""The figures of the report, in its order: \dgfigure's name -> caption as HTML. words: build.spaces."""
    main = (report / "main.tex").read_text(encoding="utf-8")
    names = re.findall(r"\\input\{(sections/\w+)\}", main)
    texts = [(report / f"{name}.tex").read_text(encoding="utf-8") for name in names]
    found = re.findall(r"\\dgfigure\{(\w+)\}.*?\\caption\{(.*?)\}\s*\\label", "\n".join(texts), re.DOTALL)
    return {name: with_math(prose(caption, words or {})) for name, caption in found}


def prose(latex: str, words: dict[str, str]) -> str:
    """A caption's LaTeX as HTML: its commands go, and leave their argument if it is text; formulas stay."""
    latex = re.sub(r"\\dgspace\{(\w+)\}", lambda match: words.get(match[1], f"the {match[1]} feature space"), latex)
    latex = re.sub(r"\s*\([^()]*\\ref\{[^}]*\}[^()]*\)", "", latex).replace(r"\%", "%").replace(r"\,", " ")
    return html.escape(re.sub(r"\\(?:emph|given|texttt)\{([^{}]*)\}", r"\1", latex), quote=False)


def table(results: Results, name: str) -> str:
    """A table of the results, with its caption."""
    heads, *rows = ([html.escape(cell) for cell in row] for row in results.cells(name))
    lines = ["<tr>" + "".join(f"<td>{cell}</td>" for cell in row) + "</tr>" for row in rows]
    return (f"<p>{html.escape(results.tables[name]['caption'])}</p>\n<table><tr>"
            + "".join(f"<th>{head}</th>" for head in heads) + "</tr>\n" + "\n".join(lines) + "</table>")  # fmt: skip


def build(profile: str) -> Path:
    """Write runs/<profile>/site and return its front page. Raises UserError for a profile that has not been run."""
    results, site = load_results(profile), runs_dir(profile) / "site"
    executed = sorted(set((runs_dir(profile) / "notebooks").glob("[0-9]*.ipynb"))
                      - set((runs_dir(profile) / "notebooks").glob("*.failed.ipynb")))  # fmt: skip
    if not executed:
        raise UserError(f"no executed notebooks of profile {profile}: run 'make reproduce PROFILE={profile}'")
    (site / "figures").mkdir(parents=True, exist_ok=True)
    links = []
    for path in executed:
        title, question, text = notebook_page(path, profile)
        write_if_changed(site / f"{path.stem}.html", text)
        links.append(f'<li><a href="{path.stem}.html">{html.escape(title)}</a>: {html.escape(question)}</li>')
    figures = []
    for name, caption in captions(repo_root() / "report", spaces(results)).items():
        if (picture := figures_dir(profile) / f"{name}.png").is_file():
            shutil.copy(picture, site / "figures")
            figures.append(f'<figure><img src="figures/{name}.png" alt="{name}"><figcaption>{caption} '
                           f'<a href="{results.figures[name]["notebook"]}.html">{name}</a></figcaption></figure>')
    notes = [f"Profile {mark}: a demonstration."] if (mark := watermark(results)) else []
    order = ("arms", "arms_second", "rules", "ladder", "trainings", "ledger")
    tables = [name for name in order if name in results.tables]
    found, answer = sentences(results), why(results, spaces(results))
    run = next(iter(results.runs.values()))
    body = "\n".join([
        "<h1>Discriminator guidance, reproduced</h1>",
        *(f'<p class="note">{html.escape(note)}</p>' for note in notes + [f"Stale: {line}" for line in stale(results)]),
        "<h2>What was found</h2>", *(f"<p>{html.escape(text)}</p>" for text in found),
        *(figure for figure in figures if f"figures/{FINDING}.png" in figure),
        "<h2>What each notebook asks</h2>", "<ol>", *links, "</ol>",
        *(["<h2>Why the study's ensemble failed</h2>"] if answer else []),
        *(f"<p>{html.escape(text)}</p>" for text in answer),
        "<h2>Results</h2>", *(table(results, name) for name in tables), "<h2>Figures of the report</h2>", *figures,
        f"<footer>{run['date'][:10]}, code {revision(run)}, {html.escape(run['device'])}</footer>"])  # fmt: skip
    write_if_changed(site / "index.html", page("Discriminator guidance, reproduced", body, profile))
    return site / "index.html"


def main() -> int:
    parser = Parser("site", "the executed notebooks and the report's figures as a static site")
    return script(parser, lambda args: print(f"{'page':<13} {build(args.profile).relative_to(repo_root())}"))


if __name__ == "__main__":
    sys.exit(main())
