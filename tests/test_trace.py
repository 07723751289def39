"""Where numbers come from, and when they are older than what made them."""

import json
import re
import shutil
from pathlib import Path

import numpy as np
import pytest
from ledgers import blank_ledger

from dgutils.errors import UserError
from dgutils.metrics import Interval
from dgutils.paths import figures_dir
from dgutils.pipeline.store import Store
from dgutils.results.records import load_results
from report import trace

ROOT = Path(__file__).resolve().parents[1]
NOTEBOOK = "04_evaluation"


@pytest.fixture
def clone(tmp_path, monkeypatch):
    """The notebooks, with the results of one: 40 of 60 images from a network, scored, and a figure."""
    monkeypatch.setenv("DGUTILS_ROOT", str(tmp_path))
    shutil.copytree(ROOT / "notebooks", tmp_path / "notebooks")
    store = Store(tmp_path / "runs/smoke/store")
    images = store.artifact("generate", 3, {"score_network": "net"}, {"score_network": "cd" * 32}, "unguided sampling")
    images = images.shards(20, 7)  # 40 rows lie in two of the three
    images.ensure(60, lambda seeds: {"images": np.zeros((len(seeds), 2))})
    scores = store.artifact("evaluate", 2, {}, {"arm": images.digest(40)}, "scores")
    scores.ensure(lambda folder: (folder / "scores.txt").write_text("1") and None)
    figures_dir("smoke").mkdir(parents=True)
    (figures_dir("smoke") / "04_arms.pdf").write_bytes(b"a figure")
    recorder = blank_ledger("smoke", NOTEBOOK)
    about = dict(section="The arms", n=40, seeds=range(7, 47), artifacts=[scores.digest])
    recorder.value("arm.paper.first.fd", Interval(1.5, 1.0, 2.0, 0.95, 0), label="FD of guidance", **about)
    recorder.value("settings.num_steps", 6, label="steps", section="parameters")
    recorder.show("arms", ["Arm", "FD", "EDM"], [("Paper", "arm.paper.first.fd", "dg.edm.fid")], "Arms")
    recorder.write()
    return tmp_path


def found() -> list[str]:
    return trace.stale(load_results("smoke"))


def test_a_number_is_followed_to_the_files_and_inputs_that_made_it(clone):
    results = load_results("smoke")
    about = trace.origin(results, "arm.paper.first.fd")
    (images,), (scores,) = about.artifacts["generate"], about.artifacts["evaluate"]
    assert about.direct == [scores] and about.made[scores]["inputs"] == {"arm": images}
    assert about.made[images] | {"version": 3, "rows": 40, "first_seed": 7, "label": "unguided sampling"} == (
        about.made[images])
    shards = sorted((clone / "runs/smoke/store/generate").glob("*/shard_*/manifest.json"))
    seconds = [json.loads(path.read_text())["seconds"] for path in shards]
    assert len(shards) == 3 and about.made[images]["seconds"] == round(sum(seconds[:2]), 3)
    assert about.inputs == {"net": "cd" * 32}
    assert (about.n, about.seeds, about.cell) == ("40", "7 to 46", "The arms")

    lines = trace.describe(results, "arm.paper.first.fd").splitlines()
    assert lines[0] == "arm.paper.first.fd = 1.5 [1.0, 2.0]"
    for line in ("  n         40", "  seeds     7 to 46", "  file      report/results/smoke/04.json",
                 f"      runs/smoke/store/evaluate/{scores[:16]}/manifest.json",
                 "        score_network: cdcdcdcdcdcdcdcd, net"):  # fmt: skip
        assert line in lines, "\n".join(lines)
    made = f"      arm: generate {images[:16]}, unguided sampling, 40 rows from seed 7: version 3, "
    assert any(line.startswith(made) for line in lines)
    assert not any(line.startswith("  stale") for line in lines)
    shutil.rmtree(clone / "runs")  # a fresh clone
    assert f"      runs/smoke/store/evaluate/{scores[:16]}, not in this clone" in (
        trace.describe(load_results("smoke"), "arm.paper.first.fd").splitlines())


def test_figures_tables_and_published_numbers_are_followed(clone):
    results = load_results("smoke")
    figure, table = (trace.origin(results, key) for key in ("figure:04_arms", "table:arms"))
    assert figure.artifacts == table.artifacts == trace.origin(results, "arm.paper.first.fd").artifacts
    assert table.published == "Kim et al. 2023" and figure.published == ""
    assert "file      figures/smoke/04_arms.pdf" in trace.describe(results, "04_arms")
    assert "published Kim et al. 2023" in trace.describe(results, "dg.edm.fid")
    with pytest.raises(UserError, match="no result, figure or table 'arm.papre.first.fd' .*did you mean arm.paper"):
        trace.describe(results, "arm.papre.first.fd")


def test_fresh_results_and_new_comments_are_not_stale(clone):
    assert found() == []
    path = clone / f"notebooks/{NOTEBOOK}.ipynb"
    path.write_text(path.read_text().replace('"arms = {', '"# a remark\\n\\n",\n    "arms = {'))
    assert json.loads(path.read_text()) and found() == []


def edit(path: str, old: str, new: str):
    """A change of a file below the clone, which holds `old`."""
    def change(clone):
        file = clone / path
        text = file.read_text()
        assert old in text
        file.write_text(text.replace(old, new))

    return change


FIGURE, RESULTS = "figures/smoke/04_arms.pdf", "report/results/smoke/04.json"


@pytest.mark.parametrize("change, line", [
    (edit(f"notebooks/{NOTEBOOK}.ipynb", "default_rng(0)", "default_rng(1)"), "the notebook's code has changed since"),
    (edit("notebooks/profiles/smoke.yaml", "num_steps: 6", "num_steps: 7"),
     "num_steps was 6, and is 7 in profile smoke"),
    (edit(FIGURE, "a figure", "another"), f"{FIGURE} is not the one drawn with its results"),
    (lambda clone: (clone / FIGURE).unlink(), f"{FIGURE} is gone"),
    (edit(RESULTS, '"statements": "', '"statements": "0'),
     "the rules of dgutils/results/statements.py and ledger.py have changed since"),
    (edit(RESULTS, '"evaluate": 1', '"evaluate": 0'),
     "the numbers of step 'evaluate' have changed since, from version 0 to 1"),
    (edit(RESULTS, '"label": "net"', '"label": "fashion-mnist-edm"'), "fashion-mnist-edm is another file now"),
    (edit(RESULTS, '"code"', '"kode"'), "its results do not say which code made them")])
def test_results_older_than_what_made_them_are_named(clone, change, line):
    change(clone)
    assert f"{NOTEBOOK}: {line}" in found()


def test_notebooks_that_stand_on_different_images_are_named(clone):
    other = clone / "report/results/smoke/05.json"
    text = (clone / RESULTS).read_text().replace(NOTEBOOK, "05_reproduction").replace("arm.paper", "arm.other")
    text = text.replace('"arms"', '"others"').replace("04_arms", "05_arms").replace("settings.num_steps", "x.steps")
    other.write_text(re.sub(r"generate/\w{16}", "generate/" + "12" * 8, text))
    assert f"{NOTEBOOK}, 05_reproduction: each is made from another generate 'unguided sampling'" in found()
