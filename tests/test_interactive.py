"""Figures under sliders: moved here without a browser, as a notebook without widgets shows them."""

import base64

import pytest
from ipywidgets import FloatRangeSlider, SelectionSlider

from dgutils.results import plots
from dgutils.results.interactive import Explorer


@pytest.fixture
def explorer():
    drawn = []

    def draw(weight=1.0, window=(0.0, 1.0), rule="mean", sigma=0.5, seed=3):
        drawn.append((weight, window, rule, sigma, seed))
        figure, ax = plots.panels()
        ax.plot([weight, window[1] * seed * sigma])
        ax.set_title(rule)
        return figure

    made = Explorer(draw, weight=(0.0, 4.0, 0.5), window=FloatRangeSlider(min=0, max=1), rule=["mean", "median"],
                    sigma=SelectionSlider(options=[(f"{sigma}", sigma) for sigma in (0.1, 0.5, 2.0)]), seed=(0, 9, 1))
    return made, drawn


def test_the_first_figure_is_that_of_the_defaults_and_stands_without_widgets(explorer):
    made, drawn = explorer
    assert drawn == [(1.0, (0.0, 1.0), "mean", 0.5, 3)]
    shown = made._repr_mimebundle_()
    assert base64.b64decode(shown["image/png"]) == bytes(made.picture.value)
    assert bytes(made.picture.value).startswith(b"\x89PNG")
    assert "application/vnd.jupyter.widget-view+json" in shown


@pytest.mark.parametrize(("name", "value"), [("weight", 2.5), ("window", (0.2, 0.5)), ("rule", "median"),
                                             ("sigma", 2.0), ("seed", 7)])  # fmt: skip
def test_a_control_redraws_with_its_value(explorer, name, value):
    made, drawn = explorer
    before = made.picture.value
    made.controls[name].value = value
    assert len(drawn) == 2 and value in drawn[1] and len(set(map(str, drawn[0])) ^ set(map(str, drawn[1]))) == 2
    assert made.picture.value != before
