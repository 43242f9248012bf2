"""The pictures' common style, and the pictures that several notebooks draw."""

from collections.abc import Sequence
from itertools import accumulate

import matplotlib.pyplot as plt
from cycler import cycler
from matplotlib.axes import Axes
from matplotlib.axis import Axis
from torch import Tensor

# Colors that people with any color vision tell apart, and that differ in grey.
# Source: Okabe and Ito, "Color Universal Design", 2008.
BLUE, ORANGE, GREEN, PINK, GRAY = "#0072B2", "#E69F00", "#009E73", "#CC79A7", "#808080"
WIDTH = 7.0  # inches, a column of text


def use_style() -> None:
    """Set matplotlib's defaults: one size of letters, thin grids, white paper also on dark screens."""
    plt.rcParams.update(
        {
            "figure.figsize": (WIDTH, 3.2),
            "figure.constrained_layout.use": True,
            "figure.facecolor": "white",
            "axes.prop_cycle": cycler(color=[BLUE, ORANGE, GREEN, PINK], linestyle=["-", "--", "-.", ":"]),
            "axes.grid": True,
            "axes.axisbelow": True,
            "axes.titlesize": "medium",
            "axes.spines.top": False,
            "axes.spines.right": False,
            "font.size": 9,
            "grid.alpha": 0.3,
            "legend.frameon": False,
            "svg.hashsalt": "blockdrop",  # the same picture, the same file
        }
    )


def whole_numbers(*axes: Axis) -> None:
    """Put ticks of an axis (such as `figure.axes[0].xaxis`) at whole numbers alone."""
    for axis in axes:
        axis.get_major_locator().set_params(integer=True)


def mark_segments(axes: Axes, layer_config: Sequence[int]) -> None:
    """Number a ResNet's blocks along x, from 1, with a line between its segments."""
    axes.set(xlabel="block", xlim=(0.5, sum(layer_config) + 0.5))
    whole_numbers(axes.xaxis)
    for last in list(accumulate(layer_config))[:-1]:
        axes.axvline(last + 0.5, color=GRAY, linewidth=0.8, linestyle="-")


def draw_policies(axes: Axes, policies: Tensor, layer_config: Sequence[int], labels: Sequence[str]) -> None:
    """Draw policies (n, K) as rows of dots, full where a block is kept, with a label each."""
    for row, policy in enumerate(policies.tolist()):
        for block, kept in enumerate(policy, start=1):
            axes.plot(block, row, "o", markersize=4, color=BLUE if kept else "none", markeredgecolor=GRAY)
    mark_segments(axes, layer_config)
    axes.set_ylim(len(policies) - 0.5, -0.5)
    axes.set_yticks(range(len(policies)), labels)
    axes.grid(False)


def show_image(axes: Axes, pixels: Tensor, title: str) -> None:
    """Draw an image (H, W, 3) in bytes, without axes."""
    axes.imshow(pixels.numpy())
    axes.set_title(title, fontsize="small")
    axes.axis("off")
