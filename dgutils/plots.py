"""Every figure of the study: the only module that draws. Numbers come in, a figure goes out; nothing is computed.

Figures are made for the report's text column, 5.5 in wide, and read in greyscale: whatever has a colour also
has a line style, a marker or a hatch of its own.
"""

import matplotlib as mpl
import numpy as np
from IPython.display import Image
from matplotlib.figure import Figure

from .paths import figures_dir
from .store import disk_errors

TEXT_WIDTH = 5.5  # inches, the text column of the report

# Okabe & Ito 2008, told apart by colour-blind readers; in order, with the marks that replace them in grey.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
LINES = ("-", "--", "-.", ":", (0, (5, 1, 1, 1, 1, 1)), (0, (1, 0.6)), (0, (8, 2)))
MARKERS = ("o", "s", "^", "D", "v", "P", "X")
HATCHES = ("", "////", "....", "xxxx", "\\\\\\\\", "++++", "oooo")

mpl.rcParams.update({
    "font.family": "STIXGeneral", "mathtext.fontset": "stix", "font.size": 9, "axes.labelsize": 9,
    "axes.titlesize": 9, "xtick.labelsize": 8, "ytick.labelsize": 8, "legend.fontsize": 8,
    "legend.frameon": False, "legend.handlelength": 2.4, "axes.spines.top": False, "axes.spines.right": False,
    "axes.linewidth": 0.6, "xtick.major.width": 0.6, "ytick.major.width": 0.6, "xtick.minor.width": 0.4,
    "ytick.minor.width": 0.4, "lines.linewidth": 1.2, "lines.markersize": 3.5, "hatch.linewidth": 0.5,
    "axes.grid": False, "grid.linewidth": 0.4, "grid.color": "0.85", "image.cmap": "gray",
    "pdf.fonttype": 42,  # TrueType; Type 3 is rejected by NeurIPS-style submissions
    "figure.constrained_layout.use": True,
})  # fmt: skip


def style(index: int) -> dict:
    """Colour, line style and marker of the series `index`, the same in every figure."""
    return {"color": COLOURS[index % 7], "linestyle": LINES[index % 7], "marker": MARKERS[index % 7]}


def panels(rows: int = 1, columns: int = 1, height: float = 2.2, **options):
    """A figure of the text column's width, `height` inches high, and its axes [rows, columns] (one: the axis)."""
    fig = Figure(figsize=(TEXT_WIDTH, height))
    return fig, fig.subplots(rows, columns, **options)


def save_figure(fig: Figure, profile: str, name: str) -> Image:
    """Write figures/<profile>/<name>.pdf and .png, name being NN_slug, and show the PNG in the notebook.

    The files hold no dates: the same numbers give the same bytes.
    """
    folder = figures_dir(profile)
    with disk_errors(folder):
        folder.mkdir(parents=True, exist_ok=True)
        fig.savefig(folder / f"{name}.pdf", metadata={"CreationDate": None})
        fig.savefig(folder / f"{name}.png", dpi=200, metadata={"Software": None})
    return Image(filename=folder / f"{name}.png", width=770)


def mosaic(ax, images, columns: int, gap: int = 1) -> None:
    """Draw images uint8 [N, H, W, C] row by row on `ax`, `columns` a row, with a white gap between them."""
    n, height, width, channels = images.shape
    rows = -(-n // columns)
    canvas = np.full((rows * (height + gap) - gap, columns * (width + gap) - gap, channels), 255, np.uint8)
    for i, image in enumerate(images):
        top, left = (i // columns) * (height + gap), (i % columns) * (width + gap)
        canvas[top : top + height, left : left + width] = image
    ax.imshow(canvas.squeeze(-1) if channels == 1 else canvas, vmin=0, vmax=255, interpolation="nearest")
    ax.set(xticks=[], yticks=[])
    ax.spines[:].set_visible(False)
