"""Figures under sliders, for JupyterLab. Where there are no widgets, the first figure stands in their place."""

import base64
import inspect
import io
from collections.abc import Callable

import ipywidgets as widgets
from matplotlib.figure import Figure


class Explorer(widgets.VBox):
    """One control for each argument of `draw`, and below them the figure that `draw` returns.

    Every argument of `draw` has a default; the first figure is drawn with the defaults. controls: argument -> a widget,
    or what ipywidgets makes one of: (low, high, step) for a slider, a list of choices, of pairs (words, choice) too.
    A page without widgets, such as an executed notebook on a code host, shows the newest figure as a picture.
    """

    def __init__(self, draw: Callable[..., Figure], **controls):
        self.draw, self.controls, self.picture = draw, {}, widgets.Image(format="png", width=770)
        for name, argument in inspect.signature(draw).parameters.items():
            control = widgets.interactive.widget_from_abbrev(controls[name], argument.default)
            control.set_trait("value", argument.default)
            control.description, control.style.description_width = name, "6em"
            if hasattr(control, "continuous_update"):
                control.continuous_update, control.layout.width = False, "34em"  # draw when the slider is let go
            control.observe(self.redraw, "value")
            self.controls[name] = control
        super().__init__([*self.controls.values(), self.picture])
        self.redraw()

    def redraw(self, change=None):
        """Draw the figure anew, with the controls' values."""
        figure, png = self.draw(**{name: control.value for name, control in self.controls.items()}), io.BytesIO()
        figure.savefig(png, format="png", dpi=140)  # 770 pixels wide, as the notebooks' other figures
        self.picture.value = png.getvalue()

    def _repr_mimebundle_(self, **kwargs):
        return super()._repr_mimebundle_(**kwargs) | {"image/png": base64.b64encode(self.picture.value).decode()}
