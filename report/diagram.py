"""The diagram of the method, which shows no result."""

import io

from matplotlib.figure import Figure
from matplotlib.patches import Circle, FancyArrowPatch, FancyBboxPatch
from matplotlib.path import Path

from dgutils.files import write_file
from dgutils.results.plots import COLOURS, TEXT_WIDTH, look


@look()
def save(fig: Figure, path) -> None:
    """Write a figure that shows no result, as a PDF without a date; the file stays if it is the same."""
    buffer = io.BytesIO()
    fig.savefig(buffer, format="pdf", metadata={"CreationDate": None})
    if not path.is_file() or path.read_bytes() != buffer.getvalue():
        write_file(path, buffer.getvalue())


@look()
def method() -> Figure:
    """How discriminators are trained, and what they add to a step of the sampler. It shows no result."""
    width, height, net, added = TEXT_WIDTH, 1.9, "0.9", COLOURS[1]
    fig = Figure(figsize=(width, height), layout="none")
    ax = fig.add_axes((0, 0, 1, 1), xlim=(0, width), ylim=(0, height))
    ax.set_axis_off()

    def box(x, y, w, h, *lines, frozen=False, fill="white"):
        """A box centred at (x, y); a frozen network has a broken outline."""
        ax.add_patch(FancyBboxPatch((x - w / 2, y - h / 2), w, h, boxstyle="round,pad=0,rounding_size=0.05",
                                    facecolor=fill, edgecolor="black", linewidth=0.8,
                                    linestyle=(0, (3, 1.5)) if frozen else "-"))  # fmt: skip
        write(x, y, *lines)

    def write(x, y, *lines, size=7.5, ha="center", **look):
        ax.text(x, y, "\n".join(lines), ha=ha, va="center", fontsize=size, linespacing=1.15, **look)

    def arrow(*points, colour="black"):
        ax.add_patch(FancyArrowPatch(path=Path(points), arrowstyle="-|>", mutation_scale=6, linewidth=0.9,
                                     color=colour, shrinkA=0, shrinkB=0))  # fmt: skip

    write(0.02, height - 0.1, "Training", size=8.5, ha="left", weight="bold")
    box(0.42, 1.42, 0.76, 0.34, "real images", "$y = 1$")
    box(0.42, 0.94, 0.76, 0.34, "generated", "$y = 0$")
    box(1.26, 1.18, 0.5, 0.34, "noise", r"to $\sigma$")
    arrow((0.8, 1.42), (0.9, 1.42), (0.9, 1.24), (1.01, 1.24))
    arrow((0.8, 0.94), (0.9, 0.94), (0.9, 1.12), (1.01, 1.12))
    box(1.26, 0.68, 0.78, 0.28, "discriminator", fill=net)
    arrow((1.26, 1.01), (1.26, 0.82))
    box(1.26, 0.2, 0.78, 0.28, "cross-entropy")
    arrow((1.26, 0.54), (1.26, 0.34))
    write(1.35, 0.45, r"$\ell$")
    arrow((0.42, 0.77), (0.42, 0.2), (0.87, 0.2))
    write(0.33, 0.45, "$y$")
    ax.axvline(1.8, 0.03, 0.97, color="0.7", linewidth=0.6)

    write(1.92, height - 0.1, "One guided step of the sampler", size=8.5, ha="left", weight="bold")
    write(2.12, 1.4, r"$x,\,\sigma_i$", size=8.5)
    box(2.98, 1.4, 0.82, 0.36, "score network", r"$D(x, \sigma)$", frozen=True, fill=net)
    arrow((2.3, 1.4), (2.57, 1.4))
    ax.add_patch(Circle((4.1, 1.4), 0.09, facecolor="white", edgecolor="black", linewidth=0.8))
    write(4.1, 1.4, "$+$", size=9)
    arrow((3.39, 1.4), (4.01, 1.4))
    write(3.68, 1.47, "$D$")
    arrow((4.19, 1.4), (4.62, 1.4))
    write(4.4, 1.5, r"$D_\mathrm{guided}$")
    box(4.8, 1.4, 0.36, 0.3, "Heun")
    arrow((4.98, 1.4), (5.1, 1.4))
    write(5.29, 1.4, r"$x,\,\sigma_{i+1}$", size=8.5)
    box(2.22, 0.5, 0.58, 0.4, "scale to", r"$x_\mathrm{VP},\,\tau$")
    arrow((2.12, 1.29), (2.12, 0.7))
    box(2.91, 0.5, 0.54, 0.4, "frozen", "encoder", frozen=True, fill=net)
    arrow((2.51, 0.5), (2.64, 0.5))
    for y, name in ((0.8, "1"), (0.2, "$M$")):
        box(3.5, y, 0.42, 0.24, f"head {name}", fill=net)
        arrow((3.18, 0.5), (3.235, 0.5), (3.235, y), (3.29, y))
        arrow((3.71, y), (3.79, y), (3.79, 0.5), (3.87, 0.5))
    write(3.5, 0.53, r"$\vdots$", size=9)
    write(3.8, 0.91, r"$\ell_1$")
    write(3.83, 0.1, r"$\ell_M$")
    box(4.13, 0.5, 0.52, 0.4, "combine", r"$\log r$")
    arrow((4.1, 0.7), (4.1, 1.31), colour=added)
    write(4.16, 1.0, r"$w\,\sigma^2\, \nabla_{\!x} \log r$", size=8, ha="left", color=added)
    write(4.45, 0.5, "mean probability,", "mean logit or, by mistake,", "logits as probabilities", size=6.5, ha="left")
    return fig
