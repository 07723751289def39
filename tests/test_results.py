"""Result records: kept at full precision, printed by rule, never mixed, never retyped."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from ledgers import blank_ledger

from dgutils.errors import UserError
from dgutils.metrics import Interval
from dgutils.results import ledger
from dgutils.results import records as results
from dgutils.results.records import (
    format_value,
    load_results,
    published,
)
from report.build import latex_escape, latex_value, write_latex

WHERE = dict(label="FD", section="The table of arms")


@pytest.fixture(autouse=True)
def root(tmp_path, monkeypatch):
    """The folder of results, in a clone of nothing but what the report's numbers are written with."""
    monkeypatch.setenv("DGUTILS_ROOT", str(tmp_path))
    for name in ("notebooks/profiles", "docs"):
        shutil.copytree(Path(__file__).resolve().parents[1] / name, tmp_path / name)
    return tmp_path / "report/results"


def evaluation(fd=13.812345678901234, profile="quick"):
    """The recorder of a small evaluation notebook."""
    recorder = blank_ledger(profile, "04_evaluation")
    recorder.value("fd.unguided", Interval(25.3, 24.8, 25.9, 0.95, 0), n=1000, seeds=range(50, 1050), **WHERE)
    recorder.value("fd.ensemble", Interval(fd, 13.1, 14.6, 0.95, 0), artifacts=["ab" * 32], **WHERE)
    recorder.value("kid.ensemble", np.float32(-0.00012), digits=4, **WHERE)
    recorder.value("time.sampling", 47, unit="%", **WHERE)
    recorder.value("fd.direction", "lower", **WHERE)
    recorder.show("arms", ["Arm", "FD", "KID", "EDM"], caption="FD over 1,000 images.",
                   rows=[("Unguided & plain", "fd.unguided", None, "dg.edm.fid"),
                         ("Ensemble", "fd.ensemble", "kid.ensemble", "dg.edmgpp.fid")])
    return recorder


# --- recording and reading


def test_records_come_back_at_full_precision_with_their_origin(root):
    path = evaluation().write()
    assert path == root / "quick" / "04.json"
    loaded = load_results("quick")
    record = loaded["fd.ensemble"]
    assert record["value"] == 13.812345678901234 and record["artifacts"] == ["ab" * 32]
    assert record["notebook"] == "04_evaluation" and record["cell"] == "The table of arms"
    assert {"date", "device", "revision", "versions"} <= loaded.runs["04_evaluation"].keys()
    assert loaded["fd.unguided"]["seeds"] == {"first": 50, "count": 1000}
    assert loaded["kid.ensemble"]["value"] == float(np.float32(-0.00012))


def test_same_results_leave_the_file_alone_and_new_ones_change_it(root, monkeypatch):
    path = evaluation().write()
    before = path.read_bytes()
    monkeypatch.setattr(ledger, "now", lambda: "2100-01-01T00:00:00+00:00")
    evaluation().write()
    assert path.read_bytes() == before
    evaluation(fd=13.8).write()
    content = json.loads(path.read_text())
    assert content["records"]["fd.ensemble"]["value"] == 13.8
    assert content["provenance"]["date"].startswith("2100")


@pytest.mark.parametrize("arguments, words", [
    (dict(key="FD", value=1.0), "result key 'FD'"), (dict(key="fd..x", value=1.0), "result key"),
    (dict(key="fd}", value=1.0), "result key"), (dict(key="fd", value=float("nan")), "fd is nan"),
    (dict(key="fd", value=np.float64("inf")), "fd is inf"), (dict(key="fd", value=None), "neither a number"),
    (dict(key="fd", value=True), "neither a number"), (dict(key="fd", value=np.zeros(2)), "neither a number"),
    (dict(key="fd", value=Interval(1.0, 2, 0, 0.95, 0)), r"not \[low, high\]"),
    (dict(key="fd", value=Interval(1.0, 0, float("inf"), 0.95, 0)), "fd is inf")])
def test_bad_records_are_refused(root, arguments, words):
    with pytest.raises(UserError, match=words):
        blank_ledger("quick", "04_evaluation").value(**arguments, **WHERE)


def test_bad_tables_are_refused():
    recorder = blank_ledger("quick", "04_evaluation")
    with pytest.raises(UserError, match="table name 'a b'"):
        recorder.show("a b", ["x"], [])
    with pytest.raises(UserError, match="every row needs 2 cells"):
        recorder.show("arms", ["Arm", "FD"], [("Unguided",)])


def test_profiles_never_mix(root):
    evaluation().write()
    (root / "paper").mkdir()
    shutil.copy(root / "quick" / "04.json", root / "paper" / "04.json")
    with pytest.raises(UserError, match="results of profile 'quick': remove it"):
        load_results("paper")


def test_missing_damaged_and_double_results_are_refused():
    with pytest.raises(UserError, match="make reproduce PROFILE=quick"):
        load_results("quick")
    path = evaluation().write()
    other = blank_ledger("quick", "05_reproduction")
    other.value("fd.ensemble", 1.0, **WHERE)
    other.write()
    with pytest.raises(UserError, match="'fd.ensemble' is recorded elsewhere too"):
        load_results("quick")
    whole = json.loads(path.read_text())
    parts = [{"records": []}, {"records": {"a": [1]}}, {"tables": 3}, {"figures": {"a": 1}}, {"figures": None}]
    parts = [whole | part for part in parts] + [{key: value for key, value in whole.items() if key != name}
                                                for name in ("notebook", "provenance")]  # fmt: skip
    for damage in ("", "{", "[]", "null", "<<<<<<< HEAD\n{}", *map(json.dumps, parts)):
        path.write_text(damage)
        with pytest.raises(UserError, match="04.json is not a results file"):
            load_results("quick")
    path.write_text(json.dumps(whole | {"profile": None}))
    with pytest.raises(UserError, match="04.json holds results of profile None: remove it"):
        load_results("quick")


def test_unwritable_results_are_one_clear_line(tmp_path):
    (tmp_path / "report").write_text("in the way")
    with pytest.raises(UserError, match="cannot read and write under"):
        evaluation().write()


def test_published_numbers():
    numbers = published()
    assert numbers["dg.edm.fid"]["value"] == 2.03 and numbers["dg.edmgpp.fid"]["value"] == 1.77
    assert format_value(numbers["study.ensemble.fid"]) == "14.348"
    assert format_value(numbers["dg.lsgm.fid"]) == "2.10"
    assert format_value(numbers["later.sims.nfe"]) == "70"
    assert all(record["source"] and record["where"] and record["label"] for record in numbers.values())


# --- printing


@pytest.mark.parametrize("value, interval, digits, unit, text", [
    (13.8123, (13.1, 14.6), None, "", "13.8 [13.1, 14.6]"),
    (356.2, (346.0, 367.0), None, "", "356 [346, 367]"),
    (0.129, (0.02, 0.23), None, "", "0.13 [0.02, 0.23]"),
    (1.84, (1.83, 1.85), None, "", "1.840 [1.830, 1.850]"),
    (-0.06, (-0.11, 0.02), 2, "", "-0.06 [-0.11, 0.02]"),
    (3, (2, 5), 1, "", "3.0 [2.0, 5.0]"),
    (2.5, (2.5, 2.5), None, "", "2.50 [2.50, 2.50]"),
    (2.0, None, None, "", "2.00"),
    (0.01234, None, None, "", "0.0123"),
    (1234.4, None, None, "s", "1234 s"),
    (50000, None, None, "images", "50,000 images"),
    (-0.04, None, 1, "", "0.0"),
    (0.0, None, None, "", "0"),
    ("lower", None, None, "", "lower")])
def test_rounding(value, interval, digits, unit, text):
    record = {"value": value, "interval": interval, "digits": digits, "unit": unit}
    assert format_value(record) == text
    latex = text.replace("-", r"\ensuremath{-}").replace(" ", "~").replace(",~", ", ")
    assert latex_value(record) == latex


def test_latex_escape():
    assert latex_escape(r"a_b & 5% {x} $1 #2 ~^ \n") == (
        r"a\_b \& 5\% \{x\} \$1 \#2 \textasciitilde{}\textasciicircum{} \textbackslash{}n")


def test_tables_in_markdown():
    evaluation().write()
    assert load_results("quick").markdown("arms") == """\
| Arm              | FD                | KID     | EDM  |
|------------------|-------------------|---------|------|
| Unguided & plain | 25.3 [24.8, 25.9] |         | 2.03 |
| Ensemble         | 13.8 [13.1, 14.6] | -0.0001 | 1.77 |"""


def test_unknown_names_are_one_clear_line():
    recorder = evaluation()
    recorder.tables["wrong"] = {"columns": ["Arm", "FD"], "rows": [("Unguided", "fd.ungided")], "caption": ""}
    recorder.write()
    with pytest.raises(UserError, match="no result 'fd.ungided' in profile quick"):
        write_latex("quick")
    with pytest.raises(UserError, match="no table 'arm' in profile quick"):
        load_results("quick").markdown("arm")


def test_latex_holds_every_number_and_changes_only_with_results(root):
    path, generated = evaluation().write(), root.with_name("generated")
    write_latex("quick")
    numbers = generated / "numbers.tex"
    lines = numbers.read_text().splitlines()
    for what, key, text in (
            ("result", "fd.ensemble", "13.8~[13.1, 14.6]"), ("value", "fd.ensemble", "13.8"),
            ("interval", "fd.ensemble", "[13.1, 14.6]"), ("count", "fd.unguided", "1,000"),
            ("result", "kid.ensemble", r"\ensuremath{-}0.0001"), ("result", "time.sampling", r"47~\%"),
            ("result", "fd.direction", "lower"), ("result", "study.ensemble.fid_metrics_file", "17.930"),
            ("columns", "arms", "fd,kid,edm"), ("rows", "arms", "2"), ("caption", "arms", "FD over 1,000 images."),
            ("cell", "arms/0/kid", "KID"), ("cell", "arms/1/label", r"Unguided \& plain"), ("cell", "arms/1/kid", "{}"),
            ("cell", "arms/2/edm", "1.77"), ("mark", "fd.direction", r"04 The table of arms\\made in the notebook"),
            ("mark", "fd.ensemble", r"04 The table of arms\\artifact abababab"),
            ("body", "compute", r"\begin{tabular}{@{}lrr@{}}\toprule Step & Artifacts & Time\\\midrule "
             r"\bottomrule\end{tabular}")):
        assert rf"\dg@set{{{what}}}{{{key}}}{{{text}}}" in lines, (what, key)
    assert not [line for line in lines if "{count}{fd.ensemble}" in line]  # an unknown n is no empty text
    assert r"\def\dgprofile{quick}" in lines and r"\def\dgwatermark{quick}" in lines

    made = {file: file.stat().st_mtime_ns for file in generated.iterdir()}
    write_latex("quick")
    assert {file: file.stat().st_mtime_ns for file in generated.iterdir()} == made
    path.write_text(path.read_text().replace("13.812345678901234", "13.912345678901234"))
    write_latex("quick")
    assert r"\dg@set{value}{fd.ensemble}{13.9}" in numbers.read_text()


def test_two_columns_of_one_name_are_told_apart(root):
    recorder = evaluation()
    recorder.show("ladder", ["Arm", "FD (one space)", "step", "KID", "step (other)"],
                   [("Ensemble", "fd.ensemble", "fd.unguided", None, "kid.ensemble")])
    recorder.write()
    write_latex("quick")
    text = (root.with_name("generated") / "numbers.tex").read_text()
    assert r"\dg@set{columns}{ladder}{fd,step,kid,step-2}" in text
    assert r"\dg@set{cell}{ladder/1/step}{25.3" in text
    assert r"\dg@set{cell}{ladder/1/step-2}{\ensuremath{-}0.0001}" in text


# --- why the ensemble failed


def ladder(steps: dict[str, float], alone: dict[str, tuple[float, float]]) -> results.Results:
    """Results with a ladder of two faults: steps by rung, and for single faults (step, change against unguided)."""
    def record(value):
        return {"value": value, "interval": [value - 1, value + 1], "unit": "", "digits": 1}

    records = {f"ladder.{rung}.step.first.kid_change": record(step) for rung, step in steps.items()}
    for fault, (step, change) in alone.items():
        records |= {f"ladder.only_{fault}.step.first.kid_change": record(step),
                    f"ladder.only_{fault}.first.kid_change": record(change)}  # fmt: skip
    rows = [("as it ran", None), *((f"only: {fault.replace('_', ' ')}", f"ladder.only_{fault}.first.kid_change")
                                   for fault in alone)]  # fmt: skip
    return results.Results("quick", records, {"ladder": {"columns": ["Ensemble", "KID"], "rows": rows}})


def test_causes_follow_the_rules_of_the_design():
    faults = {"raw_logits": (8.0, 7.0), "wrong_file": (0.2, -3.0)}
    found = results.causes(ladder({"without_raw_logits": -9.0, "correct": -0.5}, faults), "first")
    assert found == {"alone": "raw logits (8.0 [7.0, 9.0]); wrong file (0.2 [-0.8, 1.2])", "sufficient": "raw logits",
                     "carries": "raw logits (-9.0 [-10.0, -8.0])"}  # fmt: skip
    found = results.causes(ladder({"without_raw_logits": 0.2, "correct": -0.5}, faults | {"raw_logits": (8.0, 0.5)}),
                           "first")
    assert found["sufficient"] == found["carries"] == "none", "no fault is named beyond what the intervals carry"
    assert results.causes(ladder({}, {}), "first") == results.causes(results.Results("quick", {}, {}), "first") == {}


def test_a_change_with_an_interval_has_its_word():
    recorder = blank_ledger("quick", "04_evaluation")
    for name, low, high in (("a", -2, -1), ("b", -1, 1), ("c", 1, 2)):
        recorder.value(f"{name}.kid_change", Interval((low + high) / 2, low, high, 0.95, 0), **WHERE)
    recorder.value("d.fd_change", 1.0, **WHERE)
    recorder.write()
    for found in (recorder.results, load_results("quick")):
        words = [found.text(f"{name}.kid_direction") for name in "abc"]
        assert words == ["lower than", "not distinguishable from", "higher than"]
        assert "d.fd_direction" not in found.records
