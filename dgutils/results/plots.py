"""Every figure of the study. Numbers come in, a figure goes out; nothing is computed but what a picture needs.

Figures are made for the report's text column, 5.5 in wide, and read in greyscale: whatever has a colour also has a line
style or a marker of its own. They look the same whatever a user's matplotlibrc says.
"""

import math
import re
import textwrap
from contextlib import contextmanager

import matplotlib as mpl
import numpy as np
import seaborn as sns
from IPython.display import Image
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from dgutils.paths import figures_dir
from dgutils.pipeline.store import disk_errors

TEXT_WIDTH = 5.5  # inches, the text column of the report

# Okabe & Ito 2008, told apart by colour-blind readers; in order, with the marks that replace them in grey.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
LINES = ("-", "--", "-.", ":", (0, (5, 1, 1, 1, 1, 1)), (0, (1, 0.6)), (0, (8, 2)))
MARKERS = ("o", "s", "^", "D", "v", "P", "X")

LOOK = sns.axes_style("ticks") | {
    "font.family": "STIXGeneral", "mathtext.fontset": "stix", "font.size": 9, "axes.labelsize": 9,
    "axes.titlesize": 9, "xtick.labelsize": 8, "ytick.labelsize": 8, "legend.fontsize": 8,
    "legend.frameon": False, "legend.handlelength": 2.4, "axes.spines.top": False, "axes.spines.right": False,
    "axes.linewidth": 0.6, "xtick.major.width": 0.6, "ytick.major.width": 0.6, "xtick.minor.width": 0.4,
    "ytick.minor.width": 0.4, "lines.linewidth": 1.2, "lines.markersize": 3.5, "grid.linewidth": 0.4,
    "image.cmap": "gray", "patch.force_edgecolor": False,
    "pdf.fonttype": 42,  # TrueType; Type 3 is rejected by NeurIPS-style submissions
    "figure.constrained_layout.use": True,
}  # fmt: skip
SIGMA = {"xscale": "log", "xlabel": r"noise level $\sigma$"}
GUIDANCE = r"norm of $w\,\sigma^2\,\nabla_x \log r$"


@contextmanager
def look():
    """Matplotlib's defaults and LOOK, in the place of the user's settings; also a decorator."""
    with mpl.rc_context():
        mpl.rcdefaults()
        mpl.rcParams.update(LOOK)
        yield


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


def curves(ax, x, series: dict, **settings) -> None:
    """A line for each series, label -> values; settings of the axis."""
    for index, (label, values) in enumerate(series.items()):
        ax.plot(x, values, **style(index), label=label)
    ax.set(**settings)


def level(ax, y: float) -> None:
    """A dotted line: what knows nothing reaches."""
    ax.axhline(y, color="0.55", linewidth=0.8, linestyle=":")


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


def name_rows(ax, names: list[str], height: int) -> None:
    """Name the rows of a mosaic of images so high."""
    ax.set_yticks(np.arange(len(names)) * (height + 1) + height / 2, names)
    ax.tick_params(length=0)


def dot(ax, x, y, interval, index, horizontal, filled=True) -> None:
    """A dot with its interval as a bar, along x or along y."""
    arms = [[interval.value - interval.low], [interval.high - interval.value]]
    mark = style(index) | {"linestyle": "none", "markerfacecolor": COLOURS[index % 7] if filled else "white"}
    ax.errorbar([x], [y], **{"xerr" if horizontal else "yerr": arms}, **mark, capsize=2, elinewidth=1, markersize=4.5)


def zero(ax, horizontal: bool) -> None:
    """The line of no change, and a grid across it."""
    (ax.axvline if horizontal else ax.axhline)(0, color="0.4", linewidth=0.8, zorder=0)
    ax.grid(axis="x" if horizontal else "y")


def band(ax, x, values, index, label) -> None:
    """Median over the last axis of values [L, K], NaN left out, with a band from the 10th to the 90th percentile."""
    some = np.isfinite(values).any(axis=1)
    if not some.any():  # a guide that never acted still has its place in the legend
        ax.plot([], [], **style(index), label=label)
        return
    x, (low, middle, high) = x[some], np.nanquantile(values[some], [0.1, 0.5, 0.9], axis=1)
    ax.plot(x, middle, **style(index), label=label)
    ax.fill_between(x, low, high, color=COLOURS[index], alpha=0.2, linewidth=0)


def legend_above(ax) -> None:
    """A legend that hides nothing, whatever the curves do."""
    ax.legend(loc="lower left", bbox_to_anchor=(0, 1), ncols=2, borderaxespad=0, columnspacing=1)


def legend_below(fig, ax, **options) -> None:
    """The legend of one axis for the whole figure."""
    handles, labels = ax.get_legend_handles_labels()
    fig.legend(handles, labels, loc="outside lower center", ncols=len(labels), **options)


def sampler_axis(ax, sigmas, window) -> None:
    """Noise levels as the sampler goes, from noise to image, the guided window shaded."""
    ax.axvspan(*window, color="0.92", lw=0)
    ax.set(**SIGMA, xlim=(max(sigmas) * 1.6, min(sigmas) / 1.6))


# --- 01: fake samples


@look()
def schedule(sigmas, vp_times, guided, num_steps, errors):
    """The schedule by step, sigmas and vp_times [S], guided bool [S]; and Heun's error by number of steps."""
    fig, axes = panels(1, 3, 1.9)
    steps = np.arange(len(sigmas))
    for ax, values, name in zip(axes, (sigmas, vp_times), (r"noise level $\sigma$", r"VP time $\tau$"), strict=False):
        shade = ax.axvspan(steps[guided].min() - 0.5, steps[guided].max() + 0.5, color="0.88", lw=0)
        curves(ax, steps, {"": values}, xlabel="step", ylabel=name)
        ax.xaxis.set_major_locator(MaxNLocator(4, integer=True))
    axes[0].set_yscale("log")
    axes[1].legend([shade], ["guided"], loc="lower left", handlelength=1.2)
    slope = errors[-1] * (np.array(num_steps) / num_steps[-1]) ** -2.0
    axes[2].plot(num_steps, slope, color="0.4", linestyle=":", label="slope $-2$")
    curves(axes[2], num_steps, {"Heun": errors}, xscale="log", yscale="log", xlabel="steps",
           ylabel="largest error on a Gaussian", xticks=num_steps, xticklabels=num_steps)  # fmt: skip
    axes[2].minorticks_off()
    axes[2].legend()
    return fig


@look()
def trajectory(noisy, clean, sigmas):
    """Per image two rows: the sample and its denoised guess, uint8 [steps, N, H, W, C]; a column a noise level."""
    steps, n, height, width, channels = noisy.shape
    rows = np.stack([noisy, clean]).transpose(2, 0, 1, 3, 4, 5).reshape(-1, height, width, channels)
    fig, ax = panels(1, 1, (TEXT_WIDTH - 0.3) * 2 * n / steps + 0.4)
    mosaic(ax, rows, steps)
    name_rows(ax, ["$x$", "$D$"] * n, height)
    ax.set_xticks(np.arange(steps) * (width + 1) + width / 2, [f"{s:.3g}" for s in sigmas])
    ax.xaxis.tick_top()
    ax.set_xlabel(r"noise level $\sigma$")
    ax.xaxis.set_label_position("top")
    return fig


@look()
def real_and_fake(real, fake, columns: int = 8):
    """Real images beside generated ones, uint8 [N, H, W, C] each."""
    fig, axes = panels(1, 2, 2.75 * -(-len(real) // columns) / columns + 0.25)
    for ax, images, name in zip(axes, (real, fake), ("real", "generated"), strict=True):
        mosaic(ax, images, columns)
        ax.set_title(name)
    return fig


# --- 02: discriminator training


@look()
def training_density(times, levels):
    """Shares of training draws by sigma: times, name -> (sigma of sorted draws [n]); levels: the sampler's sigmas."""
    fig, axes = panels(1, 2, 1.9, width_ratios=(3, 2))
    for i, (name, (sigma, vp_time)) in enumerate(times.items()):
        line = {"color": COLOURS[i], "linestyle": LINES[i]}
        sns.ecdfplot(x=sigma, ax=axes[0], label=name, **line)
        axes[1].hist(vp_time, np.linspace(0, 1, 41), density=True, histtype="step", **line)
    for sigma in levels:
        axes[0].axvline(sigma, ymax=0.06, color="0.3", linewidth=0.7)
    axes[0].set(xscale="log", xlabel=r"noise level $\sigma$ (ticks: sampling steps)", ylabel="share of draws below")
    axes[0].legend(title=r"minimum $\tau$", loc="upper left")
    axes[1].set(yscale="log", xlabel=r"VP time $\tau$", ylabel="density")
    return fig


@look()
def training_curves(histories: dict, chance: float):
    """The study's figure 1: loss (above) and accuracy (below) of every member by epoch, training and validation.

    histories: name -> rows of `Trained.history`; chance: the loss that knows nothing, ln 2.
    """
    fig, axes = panels(2, len(histories), 2.1, squeeze=False, sharey="row")
    for (name, history), column in zip(histories.items(), axes.T, strict=True):
        epochs = [entry["epoch"] for entry in history]
        best = min(history, key=lambda entry: entry["val_loss"])["epoch"]
        for ax, quantity, nothing in zip(column, ("loss", "accuracy"), (chance, 0.5), strict=True):
            level(ax, nothing)
            ax.axvline(best, color="0.75", linewidth=2.5, zorder=0)
            curves(ax, epochs, {label: [entry[f"{part}_{quantity}"] for entry in history]
                                for part, label in (("train", "training"), ("val", "validation"))},
                   xlim=(0.5, len(epochs) + 0.5))  # fmt: skip
            for line in ax.lines[-2:]:
                line.set_markevery(max(1, len(epochs) // 5))
            ax.xaxis.set_major_locator(MaxNLocator(3, integer=True, min_n_ticks=1))
            ax.tick_params(labelsize=7)
        column[0].set_title(f"{name}\nbest: epoch {best}", fontsize=8, linespacing=1)
        column[1].set_xlabel("epoch", fontsize=8)
    axes[0, 0].set_ylabel("loss (nats)")
    axes[1, 0].set_ylabel("accuracy")
    legend_below(fig, axes[0, 0])
    return fig


@look()
def calibration(reliability: dict, sigmas, bce: dict, error: dict, chance: float):
    """Reliability of one member at some levels, and the members' held-out loss and calibration error by sigma.

    reliability: name -> (probabilities [N], labels [N]), ten bins of equal count; bce, error: member -> [levels].
    """
    fig, axes = panels(1, 3, 2.35)
    axes[0].plot([0, 1], [0, 1], color="0.55", linewidth=0.8, linestyle=":")
    for i, (name, (probability, labels)) in enumerate(reliability.items()):
        bins = np.array_split(np.argsort(probability, kind="stable"), 10)
        said, real = ([values[b].mean() for b in bins] for values in (probability, labels))
        axes[0].plot(said, real, **style(i), label=name)
    everything = np.concatenate([probability for probability, _ in reliability.values()])
    axes[0].set(xlabel="said probability of real", ylabel="share that is real", ylim=(0, 1.4),
                xlim=(everything.min() - 0.02, everything.max() + 0.02), yticks=[0, 0.5, 1])  # fmt: skip
    axes[0].legend(loc="upper left", borderaxespad=0.1, handlelength=1.8)
    for ax, values, name in ((axes[1], bce, "held-out loss (nats)"), (axes[2], error, "calibration error")):
        curves(ax, sigmas, values, **SIGMA, ylabel=name, xticks=[0.1, 1, 10, 100])
    level(axes[1], chance)
    axes[2].set_ylim(bottom=0)
    legend_below(fig, axes[1], columnspacing=1.2)
    return fig


@look()
def log_ratios(by_level: dict):
    """Histograms of log r of real and generated held-out images: name of the level -> (real [N], fake [N])."""
    fig, axes = panels(1, len(by_level), 1.8, sharey=True)
    for ax, (name, (real, fake)) in zip(axes, by_level.items(), strict=True):
        low, high = np.quantile(np.concatenate([real, fake]), [0.005, 0.995])
        bins = np.linspace(low - 0.01, high + 0.01, 25)
        for values, i, label, drawn in ((fake, 4, "generated", {"linewidth": 0, "alpha": 0.55}),
                                        (real, 0, "real", {"element": "step", "fill": False, "linewidth": 1.3})):
            sns.histplot(np.clip(values, *bins[[0, -1]]), bins=bins, stat="probability", ax=ax, color=COLOURS[i],
                         label=label, **drawn)  # fmt: skip
        ax.axvline(0, color="0.3", linewidth=0.7, linestyle=":")
        ax.set(title=name, xlabel=r"$\log r$ (nats)", xlim=bins[[0, -1]], ylabel="share of images")
    axes[0].set_ylim(top=axes[0].get_ylim()[1] * 1.25)
    axes[0].legend(loc="upper left", handlelength=1.4, borderaxespad=0.1)
    return fig


# --- 03: guided sampling


@look()
def toy_world(points: dict, grid, density):
    """Samples of the 2-D world over contours of the data's density: title -> points [N, 2]; density on grid^2."""
    fig, axes = panels(1, len(points), TEXT_WIDTH / len(points) + 0.35, sharex=True, sharey=True)
    for ax, (title, xy) in zip(axes, points.items(), strict=True):
        ax.scatter(*xy.T, s=1.2, color=COLOURS[1], alpha=0.55, linewidths=0, rasterized=True)
        ax.contour(grid, grid, density, levels=density.max() * np.array([0.02, 0.15, 0.6]), colors="0.1",
                   linewidths=0.7)  # fmt: skip
        ax.set(title=title, aspect="equal", xlim=grid[[0, -1]], ylim=grid[[0, -1]], xlabel="$x_1$")
        ax.tick_params(labelsize=7)
    axes[0].set_ylabel("$x_2$")
    return fig


@look()
def toy_scores(distances: dict, num_steps, errors: dict):
    """Energy distances, label -> (value, low, high), and by number of steps the distance to the exact answer."""
    fig, (left, right) = panels(1, 2, 2.2)
    for row, (value, low, high) in enumerate(distances.values()):
        left.plot([low, high], [row, row], color="0.4", linewidth=1)
        left.plot(value, row, **style(row) | {"linestyle": ""})
    left.axvline(0, color="0.55", linewidth=0.8, linestyle=":")
    left.set(yticks=range(len(distances)), yticklabels=distances, xlabel="energy distance to the data")
    left.invert_yaxis()
    curves(right, num_steps, errors, xscale="log", yscale="log", xlabel="steps", ylabel="mean distance to exact",
           xticks=num_steps, xticklabels=num_steps)  # fmt: skip
    right.minorticks_off()
    right.legend()
    return fig


@look()
def guided_pairs(unguided, guided):
    """The same seeds without and with guidance, and their difference (grey: none); uint8 [N, H, W, C] each."""
    n, height = unguided.shape[:2]
    difference = guided.astype(float) - unguided
    scale = max(1.0, np.quantile(np.abs(difference), 0.999))  # that much is white, or black
    difference = np.clip(127.5 * (1 + difference / scale), 0, 255).astype(np.uint8)
    fig, ax = panels(1, 1, (TEXT_WIDTH - 0.8) * 3 / n + 0.3)
    mosaic(ax, np.concatenate([unguided, guided, difference]), n)
    name_rows(ax, ["unguided", "guided", f"difference\n($\\pm${scale:.0f})"], height)
    ax.set_xlabel(r"most changed $\longrightarrow$ least changed")
    return fig


@look()
def guidance_by_step(sigmas, strength, log_ratio: dict, apart, window):
    """Along the trajectory: guidance over the denoiser's own update, log r, distance between the two arms.

    strength (a ratio), apart: [steps, N]; log_ratio: name -> [steps, N], nan outside the window, whose lowest and
    highest sigma are `window`.
    """
    fig, axes = panels(1, 3, 2.1)
    series = [{"": 100 * strength}, log_ratio, {"": apart}]
    names = (r"guidance / score's update (%)", r"mean $\log r$ (nats)", "arms apart (grey levels, rms)")
    for ax, arms, name in zip(axes, series, names, strict=True):
        sampler_axis(ax, sigmas, window)
        for i, values in enumerate(arms.values()):
            mean, half = values.mean(1), 1.96 * values.std(1, ddof=1) / np.sqrt(values.shape[1])
            ax.fill_between(sigmas, mean - half, mean + half, color=COLOURS[i], alpha=0.25, lw=0)
        curves(ax, sigmas, {label: values.mean(1) for label, values in arms.items()}, ylabel=name)
    level(axes[1], 0)
    axes[1].legend(loc="best")
    return fig


# --- 04 to 06: evaluation, reproduction, ensemble


@look()
def differences(changes: dict, groups: dict, height: float = 3.2) -> Figure:
    """Dots with intervals, a row an arm, a panel a score; zero is the arm that all are compared to.

    changes: panel's axis label -> {arm: Interval}, two panels a row; groups: arm -> style index; height: at most, in.
    "mended: a fault" is labelled "\u2212 a fault", and "only: a fault" "+ a fault".
    """
    down = -(-len(changes) // 2)
    short = {arm: re.sub("^mended: ", "\u2212 ", re.sub("^only: ", "+ ", arm)) for arm in groups}
    names = {arm: "\n".join(textwrap.wrap(name, 52)) for arm, name in short.items()}
    lines = sum(name.count("\n") + 1 for name in names.values())
    height = min(height, down * (0.6 + 0.13 * lines))
    fig, axes = panels(down, min(2, len(changes)), height, sharey=True, squeeze=False)
    for ax, (label, arms) in zip(axes.flat, changes.items(), strict=False):
        for row, (arm, interval) in enumerate(arms.items()):
            dot(ax, interval.value, row, interval, groups[arm], horizontal=True)
        zero(ax, horizontal=True)
        ax.set(yticks=range(len(arms)), ylim=(len(arms) - 0.5, -0.5))
        ax.set_yticklabels([names[arm] for arm in arms], linespacing=0.9)
        ax.set_xlabel(label + compressed(ax, list(arms.values())), linespacing=1)
    return fig


def compressed(ax, intervals: list) -> str:
    """Where one arm would squeeze the others into a line, the axis is logarithmic beyond them; it says from where."""
    typical = float(np.median([max(abs(i.low), abs(i.high)) for i in intervals]))
    largest = max(abs(i.high) for i in intervals)
    if largest <= 10 * typical:
        return ""
    decades = range(math.ceil(math.log10(typical)), math.ceil(math.log10(largest)) + 1)
    ticks = [10.0**d for d in decades]
    ax.set_xscale("symlog", linthresh=ticks[0], linscale=2)
    words = [f"{x:g}" if x < 1000 else f"$10^{{{d}}}$" for x, d in zip(ticks, decades, strict=True)]
    minus = "\u2212" if ticks[0] < 1000 else "$-$"
    ax.set_xticks([-ticks[0], 0, *ticks], [minus + words[0], "0", *words], minor=False)
    ax.set_xticks([], minor=True)
    return f"\nlogarithmic beyond {words[0]}"


@look()
def sensitivity(changes: dict, defaults: dict, height: float = 3.4) -> Figure:
    """Dots with intervals over settings: a row of panels a score, a column a parameter; the default is filled.

    changes: row's axis label -> {column's axis label: {setting: Interval}}; defaults: column's label -> setting.
    """
    widths = [max(2, len(settings)) for settings in next(iter(changes.values())).values()]
    fig, axes = panels(len(changes), len(widths), height, sharey="row", sharex="col", squeeze=False,
                       width_ratios=widths)  # fmt: skip
    for row, (label, charts) in zip(axes, changes.items(), strict=True):
        row[0].set_ylabel(label, linespacing=1)
        for i, (ax, (column, settings)) in enumerate(zip(row, charts.items(), strict=True)):
            for x, (setting, interval) in enumerate(settings.items()):
                dot(ax, x, interval.value, interval, i, horizontal=False, filled=setting == defaults[column])
            zero(ax, horizontal=False)
            ax.set(xticks=range(len(settings)), xticklabels=list(settings), xlim=(-0.6, len(settings) - 0.4))
            if ax.get_subplotspec().is_last_row():
                ax.set_xlabel(column)
    return fig


@look()
def image_rows(named: dict, columns: int = 12, height: float = 3.6) -> Figure:
    """Images uint8 [N, H, W, C] of several arms below each other; the same place is the same seed."""
    fig, axes = panels(len(named), 1, height, squeeze=False)
    for ax, (label, images) in zip(axes[:, 0], named.items(), strict=True):
        mosaic(ax, images, columns)
        ax.set_ylabel(label, rotation=0, ha="right", va="center")
    return fig


@look()
def gradient_likeness(sigmas, pairs, to_mean, matrix, names, height: float = 2.5) -> Figure:
    """Cosines of the members' gradients by noise level (pairs, to_mean [L, K]), and their mean [M, M] by pair."""
    fig, (left, right) = panels(1, 2, height, width_ratios=[1.35, 1])
    band(left, sigmas, to_mean, 1, "a member and the mean")
    band(left, sigmas, pairs, 0, "two members")
    left.axhline(0, color="0.4", linewidth=0.8, zorder=0)
    left.set(**SIGMA, ylabel="cosine of gradients", ylim=(None, 1.05))
    legend_above(left)
    sns.heatmap(matrix, vmin=0, vmax=1, cmap="Greys", annot=True, fmt=".2f", annot_kws={"fontsize": 7}, cbar=False,
                square=True, xticklabels=names, yticklabels=names, ax=right)  # fmt: skip
    right.set_title("mean over noise levels")
    right.tick_params(axis="y", rotation=0)
    return fig


@look()
def fault(sigmas, silent: dict, strength: dict, height: float = 1.75) -> Figure:
    """The raw-logit fault by noise level: share of images without guidance [L], and guidance norms [L, N].

    A norm that is NaN counts as absent, since zero has no place on a logarithmic axis.
    """
    fig, (left, right) = panels(1, 2, height)
    for index, (label, share) in enumerate(silent.items()):
        left.plot(sigmas, np.asarray(share) * 100, **style(index + 1), label=label)
    left.set(**SIGMA, ylabel="images without guidance (%)", ylim=(-3, 103))
    for index, (label, norms) in enumerate(strength.items()):
        band(right, sigmas, norms, index, label)
    right.set(**SIGMA, yscale="log", ylabel=GUIDANCE)
    for ax in (left, right):
        legend_above(ax)
    return fig


@look()
def norms_by_step(sigmas, norms: dict, window, height: float = 2.2) -> Figure:
    """Along the trajectory: norm of what guidance adds, name -> [steps, N]; window: its lowest and highest sigma."""
    fig, ax = panels(1, 1, height)
    sampler_axis(ax, sigmas, window)
    for index, (label, values) in enumerate(norms.items()):
        band(ax, sigmas, np.where(values > 0, values, np.nan), index, label)
    ax.set(yscale="log", ylabel=GUIDANCE)
    legend_above(ax)
    return fig


# --- pictures that go with equations


@look()
def lines(x, named: dict, xlabel: str, ylabel: str) -> Figure:
    """Some lines over a positive x, on a logarithmic axis: name -> values like x."""
    fig, ax = panels(1, 1, 1.9)
    for i, (name, values) in enumerate(named.items()):
        ax.plot(x, values, **style(i) | {"marker": ""}, label=name)
    ax.set(xscale="log", xlabel=xlabel, ylabel=ylabel)
    ax.legend()
    return fig


@look()
def planes(maps: dict, grid, label: str) -> Figure:
    """Log-ratios of the 2-D world on one scale, title -> [G, G] on grid^2; nan is left white, the line is zero.

    The twentieth of the values that lies farthest from zero may exceed the scale.
    """
    fig, axes = panels(1, len(maps), TEXT_WIDTH / len(maps) + 0.25, sharex=True, sharey=True)
    top = max(np.nanquantile(np.abs(values), 0.95) for values in maps.values())
    for ax, (title, values) in zip(axes, maps.items(), strict=True):
        shown = ax.pcolormesh(grid, grid, values, cmap="PuOr", vmin=-top, vmax=top, rasterized=True)
        ax.contour(grid, grid, values, levels=[0], colors="0.1", linewidths=0.7)
        ax.set(title=title, aspect="equal", xlabel="$x_1$")
        ax.tick_params(labelsize=7)
    axes[0].set_ylabel("$x_2$")
    fig.colorbar(shown, ax=axes, label=label, fraction=0.02, extend="both")
    return fig


@look()
def members_at_level(sigmas, logits, at: int, image, gradients, names) -> Figure:
    """One image at the noise level of number `at`: the members' logits there and elsewhere, and their gradients.

    logits [M, L]; image and gradients, [C, H, W] and [M, C, H, W], are arrays of any scale: grey is zero, and a
    gradient's largest pixel is white or black.
    """
    fig, (top, bottom) = panels(2, 1, 3.3, height_ratios=(1.6, 1))
    for i, name in enumerate(names):
        top.plot(sigmas, logits[i], **style(i), label=name)
    top.axvline(sigmas[at], color="0.6", linewidth=3, zorder=0)
    level(top, 0)
    top.set(**SIGMA, ylabel=r"$\log r$ (nats)")
    top.legend(loc="center left", bbox_to_anchor=(1, 0.5))
    shown = np.stack([image, *gradients]).transpose(0, 2, 3, 1)
    largest = np.abs(shown).max((1, 2, 3), keepdims=True)
    mosaic(bottom, (127.5 * (1 + shown / largest)).astype(np.uint8), len(shown))
    width = shown.shape[2] + 1
    words = ["noised image", *(f"{name}\n{logit[at]:+.2f}" for name, logit in zip(names, logits, strict=True))]
    bottom.set_xticks(np.arange(len(words)) * width + width / 2, words)
    bottom.tick_params(length=0)
    return fig
