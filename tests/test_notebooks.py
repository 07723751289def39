"""The six notebooks: their sources hold together, and all run at the smoke profile through the user's runner."""

import ast
import re
from pathlib import Path

import nbformat
import pytest

from dgutils import __main__
from dgutils.pipeline import cells
from dgutils.pipeline.parameters import Parameters
from dgutils.results.records import load_results
from dgutils.terminal import tally

ROOT = Path(__file__).resolve().parent.parent
SOURCES = sorted((ROOT / "notebooks").glob("0[1-6]_*.ipynb"))


def test_there_are_six():
    assert [p.name[:2] for p in SOURCES] == ["01", "02", "03", "04", "05", "06"]


@pytest.mark.parametrize("path", SOURCES, ids=lambda p: p.stem)
def test_source_is_clean_and_declares_few_parameters_each_with_type_and_meaning(path):
    notebook = cells.read(path)
    nbformat.validate(notebook)
    code = [c for c in notebook.cells if c.cell_type == "code"]
    assert not any(c.outputs or c.execution_count for c in code)
    assert [c.metadata.get("tags") for c in code[:2]] == [["parameters"], ["setup"]]
    assert code[-1].source.rstrip().endswith(f'print("NOTEBOOK COMPLETE: {path.stem}")')
    first, *lines = code[0].source.strip().splitlines()
    assert first.startswith('profile: str = "quick"  # ') and 3 <= len(lines) <= 12
    for line in lines:
        name, kind = re.fullmatch(r"(\w+): (\w+)(?:\[\w+\])? \| None = None  # .+", line).groups()
        assert type(Parameters.model_fields[name].default).__name__ == kind, line


@pytest.mark.parametrize("path", SOURCES, ids=lambda p: p.stem)
def test_no_cell_gives_a_parameter_another_meaning(path):
    """Else its value would stand for the parameter's when somebody runs the second cell again."""
    for cell in (c for c in nbformat.read(path, 4).cells if c.cell_type == "code"):
        if not {"parameters", "setup"} & set(cell.metadata.get("tags", [])):
            tree = ast.parse(cell.source)
            own = ast.FunctionDef, ast.Lambda, ast.comprehension  # these have names of their own
            inner = {name for part in ast.walk(tree) if isinstance(part, own) for name in ast.walk(part)}
            named = {n.id for n in ast.walk(tree) if isinstance(n, ast.Name) and isinstance(n.ctx, ast.Store)
                     and n not in inner}
            assert not named & {"p", "experiment", *Parameters.model_fields}, cell.source


def test_a_notebook_shows_no_picture_but_its_own():
    """A committed picture of another profile would stand beside this one's numbers."""
    for path in SOURCES:
        assert not re.findall(r"!\[|<img", "".join(cell.source for cell in nbformat.read(path, 4).cells)), path


def test_work_finds_in_the_notebooks_what_they_need(tmp_path, monkeypatch, capfd):
    """It ends when its time is up; given time, it leaves nothing to draw, to train or to score."""
    for name in ("notebooks", "pyproject.toml"):
        (tmp_path / name).symlink_to(ROOT / name)
    monkeypatch.setenv("DGUTILS_ROOT", str(tmp_path))
    smallest = ["num_fake=40", "num_eval=32", "num_sweep=32", "num_key=32", "variants=[tasks]",
                "seed_blocks=1", "ladder=[raw_logits]", "repeats=1", "num_steps=2", "epochs=[1, 1, 1, 1, 1, 1]",
                "epoch_scale=1", "sweep_weights=[]", "discriminator_batch_size=16",
                "feature_spaces=[fashion-mnist-adm]", "later_methods=[]"]  # whose arms follow from others' scores
    smallest = [part for text in smallest for part in ("--set", text)]
    work = ["work", "--profile", "smoke"]
    assert __main__.main([*work, "--minutes", "1e-6", *smallest]) == 0
    said = re.search(r"dgutils: the time is up: (\d+) of (\d+) scores are left; the same command goes on\n",
                     capfd.readouterr().err)
    assert said and said[1] == said[2] != "0" and not list(tmp_path.glob("runs/smoke/store/*/*/shard_*"))
    assert __main__.main([*work, *smallest]) == 0 and " 0 made" not in tally("smoke", 0)
    made = (tmp_path / "runs/smoke/log").stat().st_size
    assert __main__.main([*work, *smallest]) == 0 and tally("smoke", made).endswith(" found, 0 made")
    assert __main__.main(["reproduce", "--profile", "smoke", "--only", "05", *smallest]) == 0
    assert re.search(r"^[1-9]\d* artifacts found, 0 made; ", capfd.readouterr().out, re.MULTILINE)


def code_cells(path, tag: str | None = None) -> list:
    """The code cells of a notebook: all of them, or those with a tag."""
    cells = [cell for cell in nbformat.read(path, 4).cells if cell.cell_type == "code"]
    return [cell for cell in cells if tag is None or tag in cell.metadata.get("tags", [])]


@pytest.mark.parametrize("path", SOURCES, ids=lambda p: p.stem)
def test_code_cells_have_at_most_15_lines(path):
    """Parameters and the setup cell after them excepted, which list what the notebook needs."""
    long = {cell.id: n for cell in code_cells(path)[2:] if (n := len(cell.source.splitlines())) > 15}
    assert not long


def statements(body: list[ast.stmt]):
    """All statements, those inside others too; a function is one."""
    for node in body:
        yield node
        if not isinstance(node, ast.FunctionDef):
            yield from statements([inner for inner in ast.iter_child_nodes(node) if isinstance(inner, ast.stmt)])


def own(node: ast.stmt) -> list[ast.AST]:
    """The parts of a statement, without those of the statements inside it, unless it is a function."""
    outer = [part for part in ast.iter_child_nodes(node)
             if not isinstance(part, ast.stmt) or isinstance(node, ast.FunctionDef)]  # fmt: skip
    return [part for top in outer for part in ast.walk(top)]


def keeping_books(nodes: list[ast.stmt]) -> set[ast.stmt]:
    """The statements that call the ledger, those that only make what such statements read, and what holds only them."""
    books = {node for node in nodes if any(isinstance(part, ast.Call) and re.match(r"ledger\.|results\.|Ledger$",
                                                                                   ast.unparse(part.func))
                                           for part in own(node))}  # fmt: skip
    names = {node: [(part.id, type(part.ctx)) for part in own(node) if isinstance(part, ast.Name)] for node in nodes}
    while True:
        more = set()
        for node in set(nodes) - books:
            inside = list(statements([part for part in ast.iter_child_nodes(node) if isinstance(part, ast.stmt)]))
            made = {name for name, context in names[node] if context is ast.Store}
            readers = {other for other in nodes if other is not node and made & {
                name for name, context in names[other] if context is ast.Load}}  # fmt: skip
            only_for_books = isinstance(node, ast.Assign | ast.AugAssign) and readers and readers <= books
            if only_for_books or (inside and not isinstance(node, ast.FunctionDef) and books.issuperset(inside)):
                more.add(node)
        if not more:
            return books
        books |= more


def lines_of(node: ast.stmt) -> int:
    """The lines of a statement, without those of the statements inside it, unless it is a function."""
    inside = [part for part in ast.iter_child_nodes(node) if isinstance(part, ast.stmt)]
    return (inside[0].lineno if inside and not isinstance(node, ast.FunctionDef) else node.end_lineno + 1) - node.lineno


@pytest.mark.parametrize("path", SOURCES, ids=lambda p: p.stem)
def test_less_than_a_third_of_the_code_keeps_books(path):
    """Parameters and setup are left out."""
    nodes = [node for cell in code_cells(path)[2:] for node in statements(ast.parse(cell.source).body)]
    books = keeping_books(nodes)
    assert books, "no notebook is without a ledger"
    assert 3 * sum(map(lines_of, books)) < sum(map(lines_of, nodes))


def test_what_only_a_ledger_reads_is_books():
    source = "a = 1\nb = 2\nlabel = str(a)\nfor i in range(a):\n    ledger.value('x', i, label)\nprint(a + b)"
    nodes = list(statements(ast.parse(source).body))
    assert sorted(node.lineno for node in keeping_books(nodes)) == [3, 4, 5]


@pytest.mark.parametrize("path", SOURCES, ids=lambda p: p.stem)
def test_notebooks_use_what_they_import(path):
    tree = ast.parse("\n".join(cell.source for cell in code_cells(path)))
    imported = {(alias.asname or alias.name).split(".")[0] for node in ast.walk(tree)
                if isinstance(node, ast.Import | ast.ImportFrom) for alias in node.names}
    assert not imported - {node.id for node in ast.walk(tree) if isinstance(node, ast.Name)}


def test_equations_are_on_the_page_and_asserted():
    """Cells tagged `equation` hold every equation of the report as code, and assert it before the next other cell.

    That they hold is seen when the notebooks run.
    """
    named = set()
    for path in (path for path in SOURCES if path.name[:2] != "05"):
        cells = code_cells(path)
        equations = [cell in code_cells(path, "equation") for cell in cells]
        assert any(equations), path.stem
        for cell, is_equation, goes_on in zip(cells, equations, [*equations[1:], False], strict=True):
            assert not is_equation or goes_on or re.search(r"^ *assert ", cell.source, re.MULTILINE), cell.id
        named |= {name for cell in code_cells(path, "equation") for name in re.findall(r"\beq:[a-z-]+", cell.source)}
    text = "".join(path.read_text() for path in (ROOT / "report" / "sections").glob("*.tex"))
    labels = set(re.findall(r"\\label\{(eq:[a-z-]+)\}", text))
    assert len(labels) > 5 and not labels - named


def test_all_run_at_smoke_scale_twice(tmp_path, monkeypatch, capfd):
    """From nothing to results; then again, finding everything and changing no result."""
    for name in ("notebooks", "pyproject.toml"):
        (tmp_path / name).symlink_to(ROOT / name)
    monkeypatch.setenv("DGUTILS_ROOT", str(tmp_path))
    assert __main__.main(["reproduce", "--profile", "smoke"]) == 0
    printed = capfd.readouterr()
    lines = printed.out.splitlines()
    assert len(lines) <= 50 and printed.err == ""
    assert [line.split()[1] for line in lines[:6]] == [source.stem for source in SOURCES]
    assert re.match(r"\d+ artifacts found, [1-9]\d+ made; each is a line of runs/smoke/log$", lines[6])
    assert "| Unguided " in printed.out and sum("KID x 1000 is " in line for line in lines) == 3
    assert not re.search("HIT|MISS|Warning", printed.out)
    written = sorted((tmp_path / "report" / "results" / "smoke").glob("*.json"))
    assert len(written) == 6
    for source in SOURCES:
        executed = tmp_path / "runs" / "smoke" / "notebooks" / source.name
        figures = list((tmp_path / "figures" / "smoke").glob(f"{source.stem[:2]}_*.pdf"))
        assert figures and all(f.with_suffix(".png").is_file() for f in figures)
        outputs = [output for cell in code_cells(executed) for output in cell.outputs]
        assert outputs and not [output for output in outputs if output.get("name") == "stderr"]
        assert not re.search("HIT|MISS", "".join(output.get("text", "") for output in outputs))
    before = {path: path.read_bytes() for path in written}
    figures = {path: path.read_bytes() for path in (tmp_path / "figures").rglob("*.p*")}
    assert __main__.main(["reproduce", "--profile", "smoke"]) == 0
    assert capfd.readouterr().out.count("unchanged since ") == 6
    assert __main__.main(["reproduce", "--profile", "smoke", "--force"]) == 0
    again = capfd.readouterr()
    assert re.search(r"^\d+ artifacts found, 0 made; ", again.out, re.MULTILINE) and again.err == ""
    assert {path: path.read_bytes() for path in written} == before
    assert {path: path.read_bytes() for path in figures} == figures
    recorded = load_results("smoke")
    arms = recorded.cells("arms")
    assert len(arms) > 3 and all(cell for row in arms for cell in row[:2])
    text = "".join(path.read_text() for path in (ROOT / "report" / "sections").glob("*.tex"))
    keys = set(re.findall(r"\\res(?:val|int|n)?\{([^}#]+)\}", text))
    assert len(keys) > 50 and not keys - set(recorded.records)  # every number that the report prints


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--profile", "quik"], "unknown profile quik: there are"),
        (["--set", "num_stepz=3"], "did you mean num_steps"),
        (["--set", "num_steps=many"], "--set: num_steps is 'many': input should be a valid integer"),
        (["--only", "09"], "no notebook begins with 09"),
    ],
)
def test_mistakes_are_one_line_and_exit_2(arguments, message, capsys):
    assert __main__.main(["reproduce", *arguments]) == 2
    error = capsys.readouterr().err
    assert message in error and error.count("\n") == 1
