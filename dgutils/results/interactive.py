"""Figures under sliders, for JupyterLab. Where there are no widgets, the first figure stands in their place."""

import base64
import inspect
import io
from collections.abc import Callable

import ipywidgets as widgets
from matplotlib.figure import Figure


def png(figure: Figure) -> bytes:
    """The figure as a PNG, 770 pixels wide, as the notebooks' other figures are."""
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=140)
    return buffer.getvalue()


def _control(name: str, value, choices) -> widgets.Widget:
    """The control of one argument, which has the default `value`."""
    about = {"value": value, "description": name, "style": {"description_width": "9em"}}
    if isinstance(choices, list) and isinstance(value, str):
        return widgets.Dropdown(options=choices, **about)
    if isinstance(choices, list):
        options = [(f"{choice:.3g}", choice) for choice in choices]
        return widgets.SelectionSlider(options=options, continuous_update=False, **about)
    low, high, step = choices
    slider = (widgets.FloatRangeSlider if isinstance(value, tuple) else
              widgets.FloatSlider if isinstance(step, float) else widgets.IntSlider)  # fmt: skip
    return slider(min=low, max=high, step=step, continuous_update=False, **about)


class Explorer(widgets.VBox):
    """One control for each argument of `draw`, and below them the figure that `draw` returns.

    Every argument of `draw` has a default; the first figure is drawn with the defaults. choices: argument ->
    (low, high, step), which makes a slider, with two handles where the default is a pair; or a list of what there is.
    A page without widgets, such as an executed notebook on a code host, shows the newest figure as a picture.
    """

    def __init__(self, draw: Callable[..., Figure], **choices):
        defaults = {name: argument.default for name, argument in inspect.signature(draw).parameters.items()}
        self.draw, self.controls = draw, {name: _control(name, defaults[name], choices[name]) for name in defaults}
        self.picture = widgets.Image(format="png", width=770)
        super().__init__([*self.controls.values(), self.picture])
        for control in self.controls.values():
            control.observe(self.redraw, "value")
        self.redraw()

    def redraw(self, change=None):
        """Draw the figure anew, with the controls' values."""
        self.picture.value = png(self.draw(**{name: control.value for name, control in self.controls.items()}))

    def _repr_mimebundle_(self, **kwargs):
        return super()._repr_mimebundle_(**kwargs) | {"image/png": base64.b64encode(self.picture.value).decode()}
