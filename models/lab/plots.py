"""Every picture of the notebooks: data in, figure out."""

from collections.abc import Mapping, Sequence
from itertools import accumulate, chain

import matplotlib.pyplot as plt
import numpy as np
from cycler import cycler
from matplotlib.axes import Axes
from matplotlib.axis import Axis
from matplotlib.colors import ListedColormap
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, MaxNLocator, NullFormatter
from torch import Tensor

from models.lab.names import parse_model
from models.lab.timing import time_unit

# Colors that people with any color vision tell apart, and that differ in gray.
# Source: Okabe and Ito, "Color Universal Design", 2008.
BLUE, ORANGE, GREEN, PINK, GRAY = "#0072B2", "#E69F00", "#009E73", "#CC79A7", "#808080"
WIDTH = 7.0  # inches, a column of text
MANY_BLOCKS = 20  # from here on every fifth block is labelled
MOST_CLASSES = 20  # of a picture with a row per class
FEW_IMAGES = 20  # a mean over fewer is not drawn
MOST_BEHIND = 2.5  # points; where accuracy is drawn against cost, networks further behind are outside
NETWORKS = {
    "sole": {"label": "sole ResNet", "color": "black", "marker": "o"},
    "blockdrop": {"label": "BlockDrop", "color": BLUE, "marker": "s"},
    "one_policy": {"label": "one policy", "color": ORANGE, "marker": "^"},
}


def use_style() -> None:
    """Set matplotlib's defaults: one size of letters, thin grids, white paper also on dark screens."""
    plt.rcParams.update(
        {
            "figure.figsize": (WIDTH, 3.2),
            "figure.constrained_layout.use": True,
            "figure.facecolor": "white",
            "figure.titlesize": "medium",
            "axes.prop_cycle": cycler(color=[BLUE, ORANGE, GREEN, PINK], linestyle=["-", "--", "-.", ":"]),
            "axes.grid": True,
            "axes.axisbelow": True,
            "axes.titlesize": "medium",
            "axes.spines.top": False,
            "axes.spines.right": False,
            "font.size": 9,
            "grid.alpha": 0.3,
            "legend.columnspacing": 1,
            "legend.frameon": False,
            "legend.handlelength": 1.5,
            "svg.fonttype": "none",  # letters stay letters
            "svg.hashsalt": "blockdrop",  # the same picture, the same file
        }
    )


def whole_numbers(axis: Axis) -> None:
    """Put an axis's ticks at whole numbers."""
    axis.set_major_locator(MaxNLocator(6, integer=True, min_n_ticks=1))


def log_ticks(axis: Axis) -> None:
    """Put a logarithmic axis's ticks at 1, 2 and 5, or on a short one evenly, written as plain numbers."""
    low, high = axis.get_view_interval()
    axis.set_major_locator(LogLocator(subs=(1, 2, 5)) if high > 5 * low else MaxNLocator(4))
    axis.set_major_formatter("{x:.3g}")
    axis.set_minor_formatter(NullFormatter())


def legend_below(figure: Figure, axes: Axes, columns: int) -> None:
    """Put a legend of what these axes hold below the whole figure."""
    figure.legend(*axes.get_legend_handles_labels(), loc="outside lower center", ncols=columns)


def block_axis(axes: Axes, layer_config: Sequence[int], which: str = "x") -> None:
    """Number a ResNet's blocks from 1 along an axis, "x" or "y", with a line between its segments."""
    num_blocks = sum(layer_config)
    numbers = [1, *range(5, num_blocks + 1, 5)] if num_blocks > MANY_BLOCKS else range(1, num_blocks + 1)
    axes.set(**{f"{which}label": "block", f"{which}ticks": list(numbers)})
    line = axes.axvline if which == "x" else axes.axhline
    for last in accumulate(layer_config[:-1]):
        line(last + 0.5, color="black", linewidth=1.2, linestyle="-")


def band(axes: Axes, x: Sequence[float], low: Sequence, middle: Sequence, high: Sequence, **style) -> None:
    """Draw a line and the range around it."""
    (line,) = axes.plot(x, middle, **style)
    axes.fill_between(x, low, high, color=line.get_color(), alpha=0.2, linewidth=0)


def draw_policies(axes: Axes, policies: Tensor, layer_config: Sequence[int], labels: Sequence[str]) -> None:
    """Draw policies (n, K) as rows of squares, dark where a block is kept, with a label per row."""
    n, num_blocks = policies.shape
    edges = (np.arange(num_blocks + 1) + 0.5, np.arange(n + 1) - 0.5)
    colors, gap = ListedColormap(["#E4E4E4", BLUE]), 0.5 if num_blocks > MANY_BLOCKS else 1.5
    axes.pcolormesh(*edges, policies.numpy(), cmap=colors, vmin=0, vmax=1, edgecolor="white", linewidth=gap)
    block_axis(axes, layer_config)
    axes.set(ylim=(n - 0.5, -0.5), yticks=range(n), yticklabels=labels)
    axes.tick_params(length=0)
    axes.grid(False)


def show_image(axes: Axes, pixels: Tensor, title: str = "") -> None:
    """Draw an image (H, W, 3) in bytes, without axes."""
    axes.imshow(pixels.numpy())
    axes.set_title(title, fontsize="small")
    axes.axis("off")


def draw_history(axes: Axes, history: Sequence[Mapping], lines: Mapping[str, str | None], label: str) -> None:
    """Draw values of a history over epochs, accuracies in percent; `lines`: {name: label in the legend}."""
    epochs = [row["epoch"] for row in history]
    for name, line in lines.items():
        scale = 100 if "accuracy" in name else 1
        axes.plot(epochs, [scale * row[name] for row in history], marker=".", label=line)
    axes.set(xlabel="epoch", ylabel=label)
    whole_numbers(axes.xaxis)


def learning_curves(history: Sequence[Mapping], title: str, whole_images_from: int) -> Figure:
    """Draw loss and accuracy over epochs, on training and held-out images.

    `whole_images_from`: the epoch from which training sees whole images instead of crops.
    """
    figure, both = plt.subplots(1, 2)
    labels = {"loss": "cross-entropy (nats)", "accuracy": "accuracy (%)"}
    for axes, (name, label) in zip(both, labels.items(), strict=True):
        lines = {name: "training images, augmented", f"val_{name}": "held-out images"}
        draw_history(axes, history, lines, label)
        if whole_images_from:
            axes.axvline(whole_images_from, linestyle=":", color="black", label="whole images from here on")
    figure.suptitle(title)
    legend_below(figure, both[0], 3)
    return figure


def reward_curve(penalties: Mapping[str, float]) -> Figure:
    """Draw the reward against the share of blocks kept; `penalties`: the reward if wrong, per stage."""
    share = np.linspace(0, 1, 101)
    figure, axes = plt.subplots(figsize=(WIDTH, 2.6))
    axes.plot(share, 1 - share**2, label="prediction right")
    for stage, penalty in penalties.items():
        axes.plot(share, np.full_like(share, penalty), label=f"prediction wrong, {stage}")
    axes.set(title="Reward of a policy", xlabel="share of blocks kept", ylabel="reward", xlim=(0, 1))
    legend_below(figure, axes, 3)
    return figure


def stage_history(history: Sequence[Mapping], num_blocks: int, title: str) -> Figure | None:
    """Draw loss, and held-out accuracy, reward, blocks kept and policies, over epochs; None without any."""
    if not history:
        return None
    labels = {
        "loss": "loss, training images",
        "val_accuracy": "accuracy (%)",
        "val_reward": "mean reward",
        "val_sparsity": f"mean blocks kept (of {num_blocks})",
        "val_policies": "distinct policies",
    }
    figure, panels = plt.subplot_mosaic("aabbcc;dddeee", figsize=(WIDTH, 4))
    for axes, (name, label) in zip(panels.values(), labels.items(), strict=True):
        draw_history(axes, history, {name: None}, label)
    whole_numbers(panels["e"].yaxis)
    figure.suptitle(title)
    return figure


def keep_probabilities(history: Sequence[Mapping], layer_config: Sequence[int], title: str) -> Figure | None:
    """Draw each block's mean keep probability over epochs, and how far the curriculum has come.

    None where the history has no epochs.
    """
    if not history:
        return None
    num_blocks = sum(layer_config)
    figure, axes = plt.subplots(figsize=(WIDTH, 1.8 + 0.06 * num_blocks))
    first, last = history[0]["epoch"] - 0.5, history[-1]["epoch"] + 0.5
    colors = axes.imshow(
        np.array([row["val_probs"] for row in history]).T,
        aspect="auto", cmap="Blues", vmin=0, vmax=1, extent=(first, last, num_blocks + 0.5, 0.5),
        interpolation="nearest",
    )  # fmt: skip
    undecided = [num_blocks - row.get("cl_step", num_blocks) for row in history]
    if any(undecided):
        edges = [first + i for i in range(len(history) + 1)]
        axes.stairs([u + 0.5 for u in undecided], edges, baseline=0.5, fill=True, facecolor="none",
                    edgecolor="black", hatch="////", label="not decided yet: always kept")  # fmt: skip
        legend_below(figure, axes, 1)
    axes.grid(False)
    block_axis(axes, layer_config, "y")
    axes.set(title=title, xlabel="epoch", ylim=(num_blocks + 0.5, 0.5))
    whole_numbers(axes.xaxis)
    figure.colorbar(colors, label="mean keep probability")
    return figure


def images_and_policies(
    pictures: Sequence[Tensor],
    policies: Tensor,
    labels: Sequence[str],
    layer_config: Sequence[int],
    title: str,
) -> Figure:
    """Draw n images (H, W, 3) in bytes, with some policies each: (n, len(labels), K)."""
    size = (WIDTH, 0.5 + (0.5 + 0.1 * len(labels)) * len(pictures))
    figure, grid = plt.subplots(len(pictures), 2, figsize=size, width_ratios=(1, 9), squeeze=False)
    for pixels, some, (left, right) in zip(pictures, policies.float().cpu(), grid, strict=True):
        show_image(left, pixels)
        draw_policies(right, some, layer_config, labels)
        if right is not grid[-1, 1]:
            right.set(xlabel="", xticklabels=[])
    figure.suptitle(title)
    return figure


def blocks_kept(kept: Tensor, num_blocks: int, model: str) -> Figure:
    """Draw how many images keep how many blocks; `kept`: (N,)."""
    levels, counts = kept.unique(return_counts=True)
    figure, axes = plt.subplots(figsize=(WIDTH, 2.4))
    axes.bar(levels.tolist(), counts.tolist(), color=BLUE)
    axes.set(title=f"{model}: {kept.mean():.1f} of {num_blocks} blocks are kept in the mean",
             xlabel="blocks kept", ylabel="test images")  # fmt: skip
    whole_numbers(axes.xaxis)
    return figure


def keep_rates(rates: Tensor, layer_config: Sequence[int], model: str) -> Figure:
    """Draw the share of images that keep each block; `rates`: (K,)."""
    figure, axes = plt.subplots(figsize=(WIDTH, 2.4))
    axes.bar(range(1, len(rates) + 1), (100 * rates).tolist(), color=BLUE)
    block_axis(axes, layer_config)
    axes.set_xlim(0.4, len(rates) + 0.6)
    always, never = int((rates == 1).sum()), int((rates == 0).sum())
    axes.set(title=f"{model}: blocks that always run: {always}, never: {never}, "
             f"depending on the image: {len(rates) - always - never}",
             ylabel="images that keep it (%)")  # fmt: skip
    return figure


def top_policies(
    policies: Tensor, shares: Sequence[float], pictures: Sequence[Sequence[Tensor]],
    layer_config: Sequence[int], title: str,
) -> Figure:  # fmt: skip
    """Draw policies (n, K), the share of the images that each serves, and up to 5 of these images."""
    rows, examples = len(policies), 3 if policies.shape[1] > MANY_BLOCKS else 5
    figure = plt.figure(figsize=(WIDTH, 0.8 + 0.42 * rows))
    grid = figure.add_gridspec(rows, 1 + examples, width_ratios=[9] + [1] * examples)
    labels = [f"{100 * share:.1f} %, {p.sum():.0f} blocks" for p, share in zip(policies, shares, strict=True)]
    draw_policies(figure.add_subplot(grid[:, 0]), policies, layer_config, labels)
    for row, some in enumerate(pictures):
        for column, pixels in enumerate(some[:examples]):
            show_image(figure.add_subplot(grid[row, 1 + column]), pixels)
    figure.suptitle(title)
    return figure


def blocks_by_class(found: Mapping[str, tuple[float, float]], overall: float, model: str) -> Figure:
    """Draw {class: mean number of blocks kept, its standard error}, and the mean of all images."""
    means, errors = zip(*found.values(), strict=True)
    figure, axes = plt.subplots(figsize=(WIDTH, 1 + 0.2 * len(found)))
    axes.errorbar(means, range(len(found)), xerr=errors, fmt="o", color=BLUE, capsize=3)
    axes.axvline(overall, color="black", linestyle="--")
    low, high = axes.get_xlim()
    axes.set_xlim(min(low, overall - 0.5), max(high, overall + 0.5))  # less than a block looks like little
    axes.set_yticks(range(len(found)), found)
    axes.set(title=f"{model}: blocks kept by class", ylim=(-0.5, len(found) - 0.5),
             xlabel="mean blocks kept ± standard error; dashed: all classes")  # fmt: skip
    return figure


def described_images(rows: Sequence[Sequence[tuple[Tensor, str]]], title: str) -> Figure:
    """Draw rows of images (H, W, 3) in bytes, with some words above each."""
    figure, grid = plt.subplots(len(rows), len(rows[0]), figsize=(WIDTH, 1.1 * len(rows)), squeeze=False)
    for axes, (pixels, words) in zip(grid.flat, chain(*rows), strict=True):
        show_image(axes, pixels, words)
    figure.suptitle(title)
    return figure


def difficulty(found: Mapping, num_blocks: int, model: str) -> Figure:
    """Draw mean blocks kept, and the accuracy of each network, against the images' difficulty.

    `found`: {"difficulty", "blocks": (n,), "accuracy": {network: (n,)}, "rank_correlation"}.
    """
    figure, (left, right) = plt.subplots(1, 2)
    left.plot(found["difficulty"], found["blocks"], "o-")
    left.set(title=f"blocks kept: rank correlation {found['rank_correlation']:.2f}",
             ylabel=f"mean blocks kept (of {num_blocks})", ylim=(0, num_blocks))  # fmt: skip
    for name, accuracies in found["accuracy"].items():
        right.plot(found["difficulty"], [100 * accuracy for accuracy in accuracies], **NETWORKS[name])
    right.set(title="accuracy", ylabel="accuracy (%)")
    right.legend()
    for axes in (left, right):
        axes.set_xlabel("difficulty of the image (0 to 1)")
    figure.suptitle(model)
    return figure


def times_by_batch(times: Mapping[int, Mapping[str, Mapping]], allowed: float, model: str) -> Figure:
    """Draw the time per image of each network against the batch size, with quartiles.

    `times`: {batch size: {network: {"seconds", "low", "high"}}}. `allowed`: BlockDrop's share of the FLOPs.
    """
    figure, axes = plt.subplots(figsize=(WIDTH, 3.6))
    for name, style in NETWORKS.items():
        ms = ([1000 * of[name][key] for of in times.values()] for key in ("low", "seconds", "high"))
        band(axes, list(times), *ms, **style)
    flops_alone = [1000 * allowed * found["sole"]["seconds"] for found in times.values()]
    axes.loglog(list(times), flops_alone, ":", color="black", label="BlockDrop, if FLOPs alone counted")
    log_ticks(axes.yaxis)
    axes.set_xticks(list(times), times)
    axes.set_xticks([], minor=True)
    axes.set(title=f"{model}: time per image against batch size", xlabel="images per batch",
             ylabel="time per image (ms)")  # fmt: skip
    legend_below(figure, axes, 4)
    return figure


def break_even_blocks(
    times: Mapping[int, Mapping], found: Mapping[int, Sequence[float]], kept: float, model: str
) -> Figure:
    """Draw the time per image against the blocks kept, a panel per batch size, and the break-even's range.

    `times`: as in `times_by_batch`, with the "policy_network" and numbers of blocks kept. `found`: {batch
    size: break-even and its range}. `kept`: BlockDrop's mean blocks.
    """
    figure, row = plt.subplots(1, len(found), squeeze=False)
    for axes, (size, (at, least, most)) in zip(row[0], found.items(), strict=True):
        levels = [name for name in times[size] if isinstance(name, int)]
        unit, per_second = time_unit(times[size]["sole"]["seconds"])
        ranges = ([per_second * times[size][k][key] for k in levels] for key in ("low", "seconds", "high"))
        band(axes, levels, *ranges, marker=".", label="BlockDrop, k random blocks")
        drawn = {name: per_second * time["seconds"] for name, time in times[size].items()}
        axes.plot(
            kept, drawn["blockdrop"], "*", color=ORANGE, markersize=11, label="BlockDrop's own policies"
        )
        axes.axhline(drawn["sole"], color="black", linestyle="--", label="sole ResNet")
        axes.axhline(drawn["policy_network"], color=GRAY, linestyle=":", label="policy network alone")
        axes.axvspan(least, most, color=GRAY, alpha=0.3, linewidth=0, label="break-even, range")
        axes.axvline(at, color=GRAY, linestyle="-")
        axes.set(title=f"batch {size}: break-even at {at:.1f} blocks", ylim=(0, None),
                 xlabel=f"blocks kept (of {max(levels)})", ylabel=f"time per image ({unit})")  # fmt: skip
        whole_numbers(axes.xaxis)
    figure.suptitle(model)
    legend_below(figure, row[0, 0], 3)
    return figure


def break_even_images(found: Mapping[int, Sequence[float]], extra: float, model: str) -> Figure:
    """Draw the hours that BlockDrop has won after so many images, a panel per batch size.

    `found`: {batch size: break-even in images and its range}. `extra`: seconds of BlockDrop's training.
    """
    figure, row = plt.subplots(1, len(found), squeeze=False)
    for axes, (size, (at, least, most)) in zip(row[0], found.items(), strict=True):
        images = np.array([0, 2 * at])
        band(axes, images / 1e6, *(extra / 3600 * (images / n - 1) for n in (most, at, least)))
        axes.plot(at / 1e6, 0, "o", color="black")
        axes.axhline(0, color="black", linewidth=0.8, linestyle="-")
        axes.set(title=f"batch {size}: after about {at / 1e6:.2g} million images", xlim=(0, None),
                 xlabel="images classified (millions)", ylabel="hours won by BlockDrop")  # fmt: skip
    figure.suptitle(f"{model}: when BlockDrop's training has paid for itself")
    return figure


def trade_off(reports: Sequence[Mapping], sizes: Sequence[str], curve: Sequence[Mapping] = ()) -> Figure:
    """Draw accuracy against time per image, a panel per batch size, and against FLOPs; a color per model.

    `reports`: the numbers of up to four models, as `blockdrop_inference.ipynb` writes them; a row per data
    set. A line connects a model's sole ResNets by depth, as far as they are about as accurate as BlockDrop.
    `curve`: runs of `models.lab.sweep` of a single model.
    """
    datasets = list(dict.fromkeys(parse_model(report["model"]).dataset for report in reports))
    shape, inches = (len(datasets), len(sizes) + 1), (WIDTH, 1.2 + 2.2 * len(datasets))
    figure, rows = plt.subplots(*shape, squeeze=False, sharex="col", sharey="row", figsize=inches)
    units = [time_unit(max(report["times"][size]["sole"]["seconds"] for report in reports)) for size in sizes]
    known = [run for run in curve if "flops" in run]
    one_policies = [run["one_policy"] for run in known if "one_policy" in run]
    accuracies = {name: [run["test_accuracy"] for run in known + one_policies] for name in datasets}
    for report in reports:
        some = report["networks"].values()
        accuracies[parse_model(report["model"]).dataset] += [n["accuracy"] - n["error"] for n in some]
    lowest = {name: 100 * min(some) - MOST_BEHIND for name, some in accuracies.items()}
    flops_panel = rows[-1, -1]  # what is drawn there without data stands in the legend alone
    for runs, style in ((known, "s:"), (one_policies, "v:")):
        points = [(run["flops"] / 1e6, 100 * run["test_accuracy"]) for run in runs]
        flops_panel.plot(*np.reshape(points, (-1, 2)).T, style, color=GRAY, markersize=4, zorder=1)
    for report, color in zip(reports, (BLUE, ORANGE, GREEN, PINK), strict=False):
        networks, dataset = report["networks"] | report["rivals"], parse_model(report["model"]).dataset
        costs = [
            {name: per_second * report["times"][size][name]["seconds"] for name in networks}
            for size, (_, per_second) in zip(sizes, units, strict=True)
        ]
        costs.append({name: found["flops"] / 1e6 for name, found in networks.items()})
        for axes, cost in zip(rows[datasets.index(dataset)], costs, strict=True):
            _draw_networks(axes, networks, cost, color, lowest[dataset])
        flops_panel.plot([], [], "-", color=color, label=report["model"])
    for axes, (dataset, low) in zip(rows[:, 0], lowest.items(), strict=True):
        axes.set(ylabel=f"{dataset}: accuracy (%)", ylim=(max(axes.get_ylim()[0], low), None))
    titles = [f"batch {size}" for size in sizes] + ["FLOPs"]
    labels = [f"time per image ({unit})" for unit, _ in units] + ["FLOPs per image (millions)"]
    for top, bottom, title, label in zip(rows[0], rows[-1], titles, labels, strict=True):
        top.set(xscale="log", title=title)
        bottom.set_xlabel(label)
        log_ticks(bottom.xaxis)
    title = "accuracy against cost per image; lines join sole ResNets"
    machine = reports[0]["machine"].partition(",")[0]
    figure.suptitle(f"{reports[0]['model']}: {title}" if len(reports) == 1 else f"{machine}: {title}")
    if known:
        flops_panel.plot([], [], ":", color=GRAY, label="other penalties")
    for name in ("sole", "blockdrop", "one_policy"):
        flops_panel.plot([], [], **NETWORKS[name] | {"color": "black", "linestyle": ""})
    if one_policies or any(rival["finetuned"] for report in reports for rival in report["rivals"].values()):
        flops_panel.plot([], [], "v", color="black", label="one policy or every block, finetuned")
    legend_below(figure, flops_panel, 4)
    return figure


def _draw_networks(
    axes: Axes, networks: Mapping[str, Mapping], costs: Mapping[str, float], color: str, lowest: float
) -> None:
    """Draw a model's networks, from `lowest` % on, by cost and accuracy; a line joins its sole ResNets."""
    markers = {  # the rivals are sole ResNets too, or finetuned for themselves
        name: "v" if found.get("finetuned") else NETWORKS.get(name, NETWORKS["sole"])["marker"]
        for name, found in networks.items()
    }
    for name, found in networks.items():
        y, error = 100 * found["accuracy"], 100 * found["error"]
        if y >= lowest:
            axes.errorbar(costs[name], y, error, fmt=markers[name], color=color, markersize=5)
    soles = [name for name in networks if markers[name] == NETWORKS["sole"]["marker"]]
    soles.sort(key=costs.get)
    accuracies = [100 * networks[name]["accuracy"] for name in soles]
    axes.plot([costs[name] for name in soles], accuracies, "-", color=color)
