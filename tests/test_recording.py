"""Recording, on a CPU with a stand-in for CUDA's graphs: what is called when, and that a failure costs a line."""

from contextlib import contextmanager
from types import SimpleNamespace

import pytest
import torch

from dgutils.recording import WARM, Recorded


class Graph:
    """Replays the last function that was run while it recorded."""

    def replay(self):
        self.work()


@pytest.fixture
def recorded(monkeypatch):
    total = torch.zeros(3)

    def work(x, y):
        total.add_(x * y)
        return total

    one = Recorded(work, "cpu")
    one.device = SimpleNamespace(type="cuda")

    @contextmanager
    def recording(graph):
        before = total.clone()
        yield
        total.copy_(before)  # what is recorded is not done
        graph.work = lambda: work(*one.inputs)

    monkeypatch.setattr(torch.cuda, "CUDAGraph", Graph)
    monkeypatch.setattr(torch.cuda, "graph", recording)
    one.inputs = [torch.zeros(3), torch.zeros(3)]
    return one


def test_every_call_does_its_work_once_recorded_or_not(recorded):
    expected = torch.zeros(3)
    for i in range(2 * WARM):
        x, y = torch.full((3,), float(i)), torch.arange(3.0)
        expected += x * y
        assert torch.equal(recorded(x, y), expected)
        assert (recorded.graph is not None) == (i >= WARM)


def test_what_cannot_be_recorded_runs_as_it_stands_and_one_line_says_so(recorded, monkeypatch, capsys):
    def broken(graph):
        raise RuntimeError("operation not permitted when stream is capturing\nand more")

    monkeypatch.setattr(torch.cuda, "graph", broken)
    for i in range(2 * WARM):
        result = recorded(torch.ones(3), torch.ones(3))
        assert torch.equal(result, torch.full((3,), i + 1.0))
    assert capsys.readouterr().err == ("a step is not recorded (operation not permitted when stream is capturing): "
                                       "slower\n")  # fmt: skip


def test_on_a_cpu_calls_beside_each_other_are_made_in_turn():
    made = []
    Recorded(None, "cpu").beside([lambda i=i: made.append(i) for i in range(3)])
    assert made == [0, 1, 2]
