"""The terminal stays calm: a bar in its last line, a line a notebook, the rest in the log; what went wrong is said."""

import io
import re

import pytest
from ledgers import blank_ledger

from dgutils import terminal
from dgutils.cli import summary
from dgutils.metrics import Interval
from dgutils.pipeline import jobs
from dgutils.results.records import load_results


class Tty(io.StringIO):
    def isatty(self):
        return True


@pytest.fixture
def clone(tmp_path, monkeypatch):
    monkeypatch.setenv("DGUTILS_ROOT", str(tmp_path))
    monkeypatch.delenv("VERBOSE", raising=False)
    return tmp_path


@pytest.mark.parametrize("text, lines, state", [
    ("a warning\nand more\n", ["a warning", "and more"], ""),
    ("\r 10 % |#   | 00:09 left", [], "10 % |#   | 00:09 left"),
    ("\r 10 %\r 20 %", [], "20 %"),
    ("\r 10 %\r      \r", [], ""),
    ("\r 10 %\r      \rdgutils: WAIT x\n\r 10 %", ["dgutils: WAIT x"], "10 %"),
    ("no end", [], None),
    ("\r100 %\n\n \n", ["100 %"], ""),
])  # fmt: skip
@pytest.mark.parametrize("size", [1, 3, 1000], ids=lambda size: f"{size} at once")
def test_a_bar_is_the_last_line_of_a_terminal_and_lines_go_elsewhere(text, lines, state, size):
    stream, found = Tty(), []
    screen = terminal.Screen(stream, found.append)
    screen.head = "[1/6] 01  "
    for start in range(0, len(text), size):
        screen.write(text[start : start + size])
    assert found == lines and "\n" not in stream.getvalue()
    assert stream.getvalue().rpartition("\r\033[K")[2] == ("" if state is None else f"[1/6] 01  {state}")


def test_a_bar_is_cut_to_the_width_and_a_line_that_stays_is_whole(monkeypatch):
    monkeypatch.setenv("COLUMNS", "40")
    screen = terminal.Screen(stream := Tty())
    screen.write("\r" + 100 * "x")
    assert stream.getvalue() == "\r\033[K" + 39 * "x"
    screen.say(100 * "y")
    assert stream.getvalue().endswith("\r\033[K" + 100 * "y" + "\n")


def test_without_a_terminal_a_bar_is_a_plain_line_now_and_then(monkeypatch, capsys):
    clock = [0.0]
    monkeypatch.setattr(terminal.time, "monotonic", lambda: clock[0])
    screen = terminal.Screen(stream := io.StringIO())
    for minute in range(61):
        clock[0] = 60.0 * minute
        screen.write(f"\r{minute} of 60 minutes")
    assert stream.getvalue().splitlines() == [f"{minute} of 60 minutes" for minute in (11, 22, 33, 44, 55)]


def test_bars_leave_nothing_behind(monkeypatch):
    for stream, seen in ((Tty(), True), (io.StringIO(), False)):
        monkeypatch.setattr("sys.stderr", stream)
        with terminal.bar(4, "images", 1) as bar:
            bar.update(3)
            bar.refresh()
        assert (re.search(r"100 % \|.+\| 00:00 left, images", stream.getvalue()) is not None) == seen
        assert stream.getvalue().rpartition("\r")[2] == "" and "\n" not in stream.getvalue()


def make(store, number, step="generate"):
    return store.artifact(step, 1, {"number": number}, label="some").ensure(lambda folder: None)


def test_what_is_found_and_made_is_noted_with_its_time_and_counted_once(clone, capsys):
    make(jobs.open_store("smoke"), 0)
    begun = terminal.log_file("smoke").stat().st_size
    for number in (0, 1, 0, 1, 2):
        make(jobs.open_store("smoke"), number)
    lines = (clone / "runs/smoke/log").read_text().splitlines()
    assert all(re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\+00:00 (HIT|MISS) generate [0-9a-f]{16} \(some\).*", line)
               for line in lines)
    assert terminal.tally("smoke", begun) == "1 artifacts found, 2 made"
    assert terminal.tally("smoke", 0) == "0 artifacts found, 3 made" and terminal.tally("quick", 0)[0] == "0"
    assert capsys.readouterr() == ("", "")


@pytest.mark.parametrize("verbose, said", [("1", 2), ("yes", 2), ("0", 0), ("", 0)])
def test_the_verbose_see_it_all(clone, monkeypatch, capsys, verbose, said):
    monkeypatch.setenv("VERBOSE", verbose)
    make(jobs.open_store("smoke"), 0)
    make(jobs.open_store("smoke"), 0)
    assert re.findall(r"^dgutils: (HIT|MISS) ", capsys.readouterr().err, re.MULTILINE) == ["MISS", "HIT"][:said]


def test_what_is_damaged_is_said_and_noted(clone, capsys):
    artifact = make(jobs.open_store("smoke"), 0)
    (artifact.path / "manifest.json").write_text("{}")
    make(jobs.open_store("smoke"), 0)
    said = capsys.readouterr().err
    assert said.startswith("dgutils: QUARANTINED generate-") and said.count("\n") == 1
    assert said.removeprefix("dgutils: ") in (clone / "runs/smoke/log").read_text()


def test_a_log_that_cannot_be_written_stops_nothing(clone):
    (clone / "runs/smoke/log").mkdir(parents=True)
    assert not make(jobs.open_store("smoke"), 0).lacks()


def test_a_run_ends_with_tables_sentences_and_places(clone, capsys):
    ledger = blank_ledger("smoke", "04_evaluation")
    about = dict(section="arms", n=500)
    for slot, space, shift in (("first", "here", -3.0), ("second", "there", 1.0)):
        change = Interval(shift, shift - 2, shift + 2, 0.95, 0)
        for score, name in (("FD", "fd"), ("KID x 1000", "kid")):
            ledger.value(f"arm.paper.{slot}.{name}", 7.0, f"{score} of guidance by Paper, {space}", digits=1, **about)
            ledger.value(f"arm.paper.{slot}.{name}_change", change,
                         f"{score} of guidance by Paper minus unguided sampling, {space}", digits=1, **about)
        columns = ("fd", "kid", "fd_change", "kid_change", "precision")
        keys = [f"arm.paper.{slot}.{column}" for column in columns[:4]]
        ledger.show("arms" if slot == "first" else "arms_second",
                    ["Arm", "FD", "KID x 1000", "FD change", "KID change", "Precision"], [("Paper", *keys, None)])
    ledger.write()
    assert summary.sentences(load_results("smoke")) == [
        "Guidance by Paper: KID x 1000 is lower than that of unguided sampling in here (-3.0 [-5.0, -1.0]) and "
        "not distinguishable from it in there (1.0 [-1.0, 3.0])."]
    summary.show("smoke")
    lines = capsys.readouterr().out.splitlines()
    assert "| here, 500 images | FD  | FD change         | KID x 1000 | KID change        |" in lines
    assert "| Paper            | 7.0 | -3.0 [-5.0, -1.0] | 7.0        | -3.0 [-5.0, -1.0] |" in lines
    assert [line.split()[-1] for line in lines[-4:]] == [
        "runs/smoke/notebooks/", "figures/smoke/", "report/results/smoke/", "PROFILE=smoke"]
