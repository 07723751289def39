"""What figures are made of, and those figures that are drawn more than once; numbers come in, a figure goes out.

Figures are as wide as the report's text column and read in greyscale: whatever has a colour also has a line style or a
marker of its own. They look the same whatever a user's matplotlibrc says. Images are uint8 [N, H, W, C].
"""

import math
import textwrap
from pathlib import Path

import matplotlib.style
import numpy as np
import seaborn as sns
from IPython.display import Image
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from dgutils.paths import figures_dir
from dgutils.pipeline.store import disk_errors

STYLE = Path(__file__).resolve().parents[1] / "assets" / "figures.mplstyle"
TEXT_WIDTH = 5.5  # inches, the text column of the report

# Okabe & Ito 2008, told apart by colour-blind readers; in order, with the marks that replace them in grey.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
LINES = ("-", "--", "-.", ":", (0, (5, 1, 1, 1, 1, 1)), (0, (1, 0.6)), (0, (8, 2)))
MARKERS = ("o", "s", "^", "D", "v", "P", "X")

SIGMA = {"xscale": "log", "xlabel": r"noise level $\sigma$"}
GUIDANCE = r"norm of $w\,\sigma^2\,\nabla_x \log r$"
FINE = {"color": "0.55", "linewidth": 0.8, "linestyle": ":"}  # what knows nothing reaches


def look():
    """Matplotlib's defaults and dgutils/assets/figures.mplstyle, in the place of the user's; also a decorator."""
    return matplotlib.style.context(STYLE, after_reset=True)


def style(index: int) -> dict:
    """Colour, line style and marker of the series `index`, the same in every figure."""
    return {"color": COLOURS[index % 7], "linestyle": LINES[index % 7], "marker": MARKERS[index % 7]}


@look()
def panels(rows: int = 1, columns: int = 1, height: float = 2.2, **options):
    """A figure of the text column's width, `height` inches high, and its axes [rows, columns] (one: the axis)."""
    fig = Figure(figsize=(TEXT_WIDTH, height))
    return fig, fig.subplots(rows, columns, **options)


@look()
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


# --- what figures are made of


def curves(ax, x, series: dict, markevery: int = 1, **settings) -> None:
    """A line for each series, label -> values, with a mark at each so many of them; settings of the axis."""
    for index, (label, values) in enumerate(series.items()):
        ax.plot(x, values, **style(index), label=label, markevery=markevery)
    ax.set(**settings)


def bands(ax, x, series: dict, estimator="median", errorbar=("pi", 80)) -> None:
    """For each series, label -> values [L, K], seaborn's estimate over the last axis, and a band; NaN is left out."""
    for index, (label, values) in enumerate(series.items()):
        sns.lineplot(x=np.repeat(x, values.shape[1]), y=values.ravel(), estimator=estimator, errorbar=errorbar,
                     label=label, legend=False, err_kws={"linewidth": 0}, ax=ax, **style(index))


def dots(ax, intervals: dict, groups: dict | None = None, along: str = "x", hollow=()) -> None:
    """A dot for each label, its interval as a bar along x (rows from the top down) or along y (columns); a line at 0.

    groups: label -> style index (default: its place). hollow: labels whose dots are not filled.
    """
    for place, (label, found) in enumerate(intervals.items()):
        look = style(groups[label] if groups else place) | {"linestyle": "none"}
        at = (found.value, place) if along == "x" else (place, found.value)
        bar = {f"{along}err": [[found.value - found.low], [found.high - found.value]]}
        ax.errorbar(*at, **bar, **look, capsize=2, elinewidth=1, markersize=4.5,
                    markerfacecolor="white" if label in hollow else look["color"])
    if along == "x":
        ax.set(yticks=range(len(intervals)), yticklabels=intervals, ylim=(len(intervals) - 0.5, -0.5))
        ax.axvline(0, color="0.4", linewidth=0.8, zorder=0)
    else:
        ax.set(xticks=range(len(intervals)), xticklabels=intervals, xlim=(-0.6, len(intervals) - 0.4))
        ax.axhline(0, color="0.4", linewidth=0.8, zorder=0)
    ax.grid(axis=along)


def mosaic(ax, images, columns: int, rows: list[str] | None = None, heads: list[str] | None = None) -> None:
    """Draw images row by row on `ax`, `columns` a row, one white pixel apart; rows, heads: names of rows and columns.
    """
    n, height, width, channels = images.shape
    down = -(-n // columns)
    canvas = np.full((down * (height + 1) - 1, columns * (width + 1) - 1, channels), 255, np.uint8)
    for i, image in enumerate(images):
        top, left = (i // columns) * (height + 1), (i % columns) * (width + 1)
        canvas[top : top + height, left : left + width] = image
    ax.imshow(canvas.squeeze(-1) if channels == 1 else canvas, vmin=0, vmax=255, interpolation="nearest")
    ax.set_xticks(np.arange(len(heads or ())) * (width + 1) + width / 2, heads)
    ax.set_yticks(np.arange(len(rows or ())) * (height + 1) + height / 2, rows)
    ax.tick_params(length=0)
    ax.spines[:].set_visible(False)


def legend_above(ax) -> None:
    """A legend that hides nothing, whatever the curves do."""
    ax.legend(loc="lower left", bbox_to_anchor=(0, 1), ncols=2, borderaxespad=0, columnspacing=1)


def legend_below(fig, ax, **options) -> None:
    """The legend of one axis for the whole figure."""
    handles, labels = ax.get_legend_handles_labels()
    fig.legend(handles, labels, **{"loc": "outside lower center", "ncols": len(labels)} | options)


def sampler_axis(ax, sigmas, window, **settings) -> None:
    """Noise levels as the sampler goes, from noise to image, the guided window (lowest, highest sigma) shaded."""
    ax.axvspan(*window, color="0.92", lw=0)
    ax.set(**SIGMA, xlim=(max(sigmas) * 1.6, min(sigmas) / 1.6), **settings)


# --- figures of several notebooks


def errors_by_steps(ax, num_steps, errors: dict, ylabel: str) -> None:
    """Errors by number of sampling steps, on logarithmic axes."""
    curves(ax, num_steps, errors, xscale="log", yscale="log", xlabel="steps", ylabel=ylabel, xticks=num_steps,
           xticklabels=num_steps)
    ax.minorticks_off()
    ax.legend()


@look()
def trajectory(noisy, clean, sigmas, names=("",)) -> Figure:
    """Per image two rows: the sample x and its denoised guess D, uint8 [steps, N, H, W, C]; a column a noise level.

    names: of the images, in turn.
    """
    steps, n, height, width, channels = noisy.shape
    images = np.stack([noisy, clean]).transpose(2, 0, 1, 3, 4, 5).reshape(-1, height, width, channels)
    rows = [f"{names[i % len(names)]} ${what}$" for i in range(n) for what in "xD"]
    fig, ax = panels(1, 1, (TEXT_WIDTH - 0.3) * 2 * n / steps + 0.4)
    mosaic(ax, images, steps, rows, heads=[f"{s:.3g}" for s in sigmas])
    ax.xaxis.tick_top()
    ax.set_xlabel(r"noise level $\sigma$")
    ax.xaxis.set_label_position("top")
    return fig


@look()
def training_curves(histories: dict, chance: float) -> Figure:
    """The study's figure 1: loss (above) and accuracy (below) of every member by epoch, training and validation.

    histories: name -> rows of `Trained.history`; chance: the loss that knows nothing, ln 2.
    """
    fig, axes = panels(2, len(histories), 2.1, squeeze=False, sharex="col", sharey="row")
    for (name, history), column in zip(histories.items(), axes.T, strict=True):
        table = {key: [row[key] for row in history] for key in history[0]}
        best = table["epoch"][np.argmin(table["val_loss"])]
        for ax, quantity, nothing in zip(column, ("loss", "accuracy"), (chance, 0.5), strict=True):
            ax.axhline(nothing, **FINE)
            ax.axvline(best, color="0.75", linewidth=2.5, zorder=0)
            curves(ax, table["epoch"], {"training": table[f"train_{quantity}"], "validation": table[f"val_{quantity}"]},
                   markevery=max(1, len(history) // 5), xlim=(0.5, len(history) + 0.5))
            ax.xaxis.set_major_locator(MaxNLocator(3, integer=True, min_n_ticks=1))
            ax.tick_params(labelsize=7)
        column[0].set_title(f"{name}\nbest: epoch {best}", fontsize=8, linespacing=1)
        column[1].set_xlabel("epoch", fontsize=8)
    axes[0, 0].set_ylabel("loss (nats)")
    axes[1, 0].set_ylabel("accuracy")
    legend_below(fig, axes[0, 0])
    return fig


@look()
def plane(points: dict, height: float | None = None, contours=None):
    """The 2-D world: title -> points [N, 2], which may be empty, and its axes.

    contours: (grid [G], density [G, G]) of the data, drawn over the points in the grid's frame.
    """
    fig, axes = panels(1, len(points), height or TEXT_WIDTH / len(points) + 0.35, sharex=True, sharey=True)
    for ax, (title, xy) in zip(axes, points.items(), strict=True):
        ax.set(title=title, aspect="equal", xlabel="$x_1$", xticks=[-1, 0, 1], yticks=[-1, 0, 1])
        ax.tick_params(labelsize=7)
        ax.scatter(*np.reshape(xy, (-1, 2)).T, s=1.2, color=COLOURS[1], alpha=0.55, linewidths=0, rasterized=True)
        if contours:
            grid, density = contours
            ax.contour(grid, grid, density, density.max() * np.array([0.02, 0.15, 0.6]), colors="0.1", linewidths=0.7)
            ax.set(xlim=grid[[0, -1]], ylim=grid[[0, -1]])
    axes[0].set_ylabel("$x_2$")
    return fig, axes


@look()
def differences(changes: dict, groups: dict, height: float = 3.2) -> Figure:
    """Dots with intervals, a row an arm, a panel a score; zero is the arm that all are compared to.

    changes: panel's axis label -> {arm: Interval}, two panels a row; groups: arm -> style index; height: at most, in.
    """
    names = [textwrap.fill(arm, 52) for arm in groups]
    lines = sum(name.count("\n") + 1 for name in names)
    down = -(-len(changes) // 2)
    fig, axes = panels(down, min(2, len(changes)), min(height, down * (0.6 + 0.13 * lines)), sharey=True, squeeze=False)
    for ax, (label, arms) in zip(axes.flat, changes.items(), strict=False):
        dots(ax, arms, groups)
        ax.set_yticklabels([textwrap.fill(arm, 52) for arm in arms], linespacing=0.9)
        ax.set_xlabel(label + compress(ax, arms.values()), linespacing=1)
    return fig


def compress(ax, intervals) -> str:
    """Where one arm would squeeze the others into a line, make the axis logarithmic beyond them, and say from where."""
    reach = [max(abs(interval.low), abs(interval.high)) for interval in intervals]
    if max(reach) <= 10 * np.median(reach):
        return ""
    limit = 10.0 ** math.ceil(math.log10(np.median(reach)))
    ax.set_xscale("symlog", linthresh=limit, linscale=2)
    return f"\nlogarithmic beyond {limit:g}"
