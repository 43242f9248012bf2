"""What the inference notebook found, in words and in files: tables, the verdict, numbers, pictures.

`python -m models.lab.report` brings the README's table and picture up to date with the files in `results/`.
"""

import argparse
import json
import re
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path

import matplotlib.pyplot as plt
import torch
from matplotlib.figure import Figure
from torch import Tensor

from models.lab import plots
from models.lab.device import choose_precision
from models.lab.files import ROOT, explained, written_whole
from models.lab.statistics import standard_error
from models.lab.timing import time_unit

CHANCE_FACTOR = 1.5  # a network below so many times the chance level has not learned
POINTS = "{:+.2f} ± {:.2f}"
SHIPPED = ("R20_SYN", "R32_C10", "R110_C10")  # the models of the README's table


class Report:
    """Files of one model on one device in `folder`, named `<model>_<device>…`; None: nothing is written.

    The names hold a precision other than "auto" gives, and `max_images` where it is set: a quick look does
    not replace the report of all images. RuntimeError where the folder can't be written to.
    """

    def __init__(self, folder: str | None, model: str, device: str, precision: str, max_images: int | None):
        self.folder = None if folder is None else Path(folder)
        usual = choose_precision("auto", torch.device(device), training=False)
        unusual = [precision] if precision != usual else []
        unusual += [f"{max_images}images"] if max_images is not None else []
        self.name = "_".join([model, device, *unusual])
        self.title = f"BlockDrop against the sole ResNet: {model}, {' '.join([device, *unusual])}"
        self.pictures: dict[str, str] = {}  # by name, as Markdown
        if self.folder is not None:
            with explained(self.folder):
                self.folder.mkdir(parents=True, exist_ok=True)
                tempfile.TemporaryFile(dir=self.folder).close()

    def picture(self, name: str, figure: Figure) -> None:
        """Write a figure as SVG, letters as letters, and as PNG; show it."""
        if self.folder is not None:
            path = self.folder / f"{self.name}_{name}"
            with explained(path):
                figure.savefig(f"{path}.svg", metadata={"Date": None})
                figure.savefig(f"{path}.png", metadata={"Software": None}, dpi=100)
            self.pictures[name] = f"![{name.replace('_', ' ')}]({path.name}.png)"
        plt.show()

    def write(self, numbers: Mapping, text: str) -> list[Path]:
        """Write numbers as JSON, nan as null, a text and the pictures as Markdown; return the files."""
        if self.folder is None:
            return []
        plain = json.loads(json.dumps(numbers), parse_constant=lambda _: None)
        contents = {
            self.folder / f"{self.name}.json": json.dumps(plain, indent=1, ensure_ascii=False),
            self.folder / f"{self.name}.md": "\n\n".join([f"# {self.title}", text, *self.pictures.values()]),
        }
        for path, content in contents.items():
            with written_whole(path) as file:
                file.write(f"{content}\n".encode())
        return list(contents)


def figures(hits: Tensor, policies: Tensor, flops: Tensor) -> dict[str, float]:
    """Return a network's figures on N images: hits (N,), 1 where right; policies (N, K); FLOPs (N,)."""
    blocks = policies.sum(1)
    return {
        "accuracy": hits.mean().item(), "error": standard_error(hits),
        "blocks": blocks.mean().item(), "blocks_deviation": blocks.std(correction=0).item(),
        "blocks_minimum": int(blocks.min()), "policies": len(policies.unique(dim=0)),
        "flops": flops.mean().item(),
    }  # fmt: skip


def three_digits(number: float) -> str:
    """Write a number in three significant digits, or whole from 1,000 on."""
    return f"{number:,.0f}" if abs(number) >= 999.5 else f"{number:#.3g}".rstrip(".")


def markdown_table(columns: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Return a Markdown table."""
    return "\n".join(f"| {' | '.join(cells)} |" for cells in (columns, ["---"] * len(columns), *rows))


def compared(numbers: Mapping) -> list[str]:
    """Return the batch sizes for which there is a verdict: 1 and the large one."""
    return list(dict.fromkeys(["1", str(numbers["large_batch"])]))


def per_image(numbers: Mapping, size: str, name: str, quartiles: bool = True) -> str:
    """Write a network's time per image at a batch size."""
    time = numbers["times"][size][name]
    unit, per_second = time_unit(numbers["times"][size]["sole"]["seconds"])
    low, middle, high = (three_digits(per_second * time[key]) for key in ("low", "seconds", "high"))
    return f"{middle} ({low} to {high}) {unit}" if quartiles else f"{middle} {unit}"


def speedup(numbers: Mapping, size: str, name: str = "blockdrop") -> str:
    """Write how many times as fast as the sole ResNet a network is."""
    times = numbers["times"][size]
    return f"{times['sole']['seconds'] / times[name]['seconds']:.2f}"


def summary_table(numbers: Mapping) -> str:
    """Return the main table: a column per network, a row per figure."""
    networks, training = numbers["networks"], numbers["training"]
    rows = [
        ["Accuracy (%, ± standard error)",
         *(f"{100 * n['accuracy']:.2f} ± {100 * n['error']:.2f}" for n in networks.values())],
        [f"Blocks kept, of {numbers['blocks']} (mean ± standard deviation)",
         *(f"{n['blocks']:.2f} ± {n['blocks_deviation']:.2f}" for n in networks.values())],
        ["Distinct policies", *(str(n["policies"]) for n in networks.values())],
        ["FLOPs per image (millions)", *(three_digits(n["flops"] / 1e6) for n in networks.values())],
        ["Training (s, BlockDrop's on top of the sole ResNet's)",
         *(f"{s:,.0f}" if s else "unknown" for s in (training["sole"], training["extra"])), ""],
    ]  # fmt: skip
    for size in compared(numbers):
        low_to_high = "{:.1f} ({:.1f} to {:.1f})".format(*numbers["break_even_blocks"][size])
        rows += [
            [f"Batch {size}: time per image (quartiles)", *(per_image(numbers, size, n) for n in networks)],
            [f"Batch {size}: of that, policy network", "", per_image(numbers, size, "policy_network"), ""],
            [f"Batch {size}: speed, sole ResNet = 1", *(speedup(numbers, size, n) for n in networks)],
            [f"Batch {size}: break-even in blocks (range)", "", low_to_high, ""],
            [f"Batch {size}: break-even in images (range)", "", images_words(numbers, size), ""],
        ]
    return markdown_table(["", *(plots.NETWORKS[name]["label"] for name in networks)], rows)


def images_words(numbers: Mapping, size: str) -> str:
    """Write after how many images BlockDrop's training is paid for at a batch size, if that is known.

    "about" where the training ran on another machine.
    """
    saved, least, most = numbers["saved"][size]
    if least <= 0 <= most:
        return "within noise"
    if saved < 0:
        return "never"
    found = [three_digits(images / 1e6) for images in numbers["break_even_images"].get(size, [])]
    about = "" if numbers["training"]["here"] else "about "
    return about + "{} million ({} to {})".format(*found) if found else "unknown"


def rivals_table(numbers: Mapping) -> str:
    """Return the table of the rivals: a row per network. Empty without any."""
    sizes = compared(numbers)
    columns = ["rival", "accuracy (%)", "blocks kept", "FLOPs per image (millions)",
               *(f"batch {size}: time per image" for size in sizes),
               "BlockDrop minus rival (points, ± standard error)",
               "training (s), without finding the policy"]  # fmt: skip
    rows = [
        [name, f"{100 * found['accuracy']:.2f}", f"{found['blocks']:.0f}", three_digits(found["flops"] / 1e6),
         *(per_image(numbers, size, name, False) for size in sizes), POINTS.format(*found["better_by"]),
         f"{found['seconds']:,.0f}" if found["seconds"] else "unknown"]
        for name, found in numbers["rivals"].items()
    ]  # fmt: skip
    return markdown_table(columns, rows) if rows else ""


def headroom_words(numbers: Mapping) -> str:
    """Say how much deciding could bring at most, on held-out images."""
    found = numbers["headroom"]
    percent = {name: f"{100 * found[name]:.2f} %" for name in ("best_one", "oracle")}
    return (
        f"Of {found['policies']} learned policies the best one is right on {percent['best_one']} of the "
        f"held-out images, an oracle on {percent['oracle']}. Deciding among them could bring "
        f"{100 * (found['oracle'] - found['best_one']):.2f} points at most; if errors were unrelated, "
        f"{100 * (found['chance'] - found['best_one']):.2f}."
    )


def penalty_sweep(folder: str | None, model: str) -> list[dict]:
    """Return a model's runs of `models.lab.sweep` in `folder` (None: results/); none without a sweep."""
    path = Path(folder or "results", "penalties", f"{model}.json")
    try:
        return list(map(dict, json.loads(path.read_text(encoding="utf-8"))["runs"])) if path.is_file() else []
    except (ValueError, TypeError, KeyError):
        print(f"Left out: {path} is damaged, or not a sweep's")
        return []


def verdict(numbers: Mapping) -> str:
    """Say in a few sentences when BlockDrop is worth it."""
    networks, training = numbers["networks"], numbers["training"]
    percent = {name: f"{100 * network['accuracy']:.2f} %" for name, network in networks.items()}
    said = [
        f"On {numbers['machine']}, {numbers['precision']}, BlockDrop keeps "
        f"{networks['blockdrop']['blocks']:.1f} of {numbers['blocks']} blocks. "
        f"Its accuracy is {percent['blockdrop']}, the sole ResNet's "
        f"{percent['sole']} ({POINTS.format(*numbers['better_than_sole'])} points)."
    ]
    least = CHANCE_FACTOR * numbers["chance"]
    if bad := [plots.NETWORKS[n]["label"] for n in networks if networks[n]["accuracy"] < least]:
        said.append(f"At chance level, so that this is no verdict on BlockDrop: {', '.join(bad)}.")
    said += [_speed_words(numbers, size) for size in compared(numbers)]
    if training["sole_trainings"]:
        said.append(f"BlockDrop's training adds {training['sole_trainings']:.1f} times the sole ResNet's.")
    if training["extra"] is None:
        said.append("How long BlockDrop's training took is unknown, and so is break-even in images.")
    elif not training["same_kind"]:
        said.append("The training ran on another kind of device: break-even in images is unknown.")
    elif not training["here"]:
        said.append("The training ran on another machine: break-even in images is a rough estimate.")
    said.append(
        f"One policy for all images, without a policy network, has an accuracy of {percent['one_policy']}. "
        f"BlockDrop minus one policy: {POINTS.format(*numbers['better_than_one_policy'])} points."
    )
    added = [f"{POINTS.format(*found['better_by'])} points ({name})"
             for name, found in numbers["rivals"].items() if found["finetuned"]]  # fmt: skip
    if added:
        said.append(f"BlockDrop minus a ResNet finetuned for one policy: {', '.join(added)}.")
    said.append(_smaller_words(numbers))
    if not numbers["like_for_like"]:
        said.append("The pair's file does not say that it started from this sole ResNet: not like for like.")
    said.append(numbers["busy"])
    return " ".join(filter(None, said))


def _smaller_words(numbers: Mapping) -> str:
    """Name the smallest sole ResNet that is at most two standard errors behind BlockDrop, and its cost."""
    smaller = {name: found for name, found in numbers["rivals"].items() if not found["finetuned"]}
    if not smaller:
        return "There is no smaller sole ResNet to compare with."
    close = [n for n, found in smaller.items() if found["better_by"][0] <= 2 * found["better_by"][1]]
    limit = "two standard errors behind BlockDrop"
    if not close:
        return f"Every smaller sole ResNet ({', '.join(smaller)}) is more than {limit}."
    name, sizes = close[0], compared(numbers)
    times = [numbers["times"][size] for size in sizes]
    speeds = " and ".join(f"{t['blockdrop']['seconds'] / t[name]['seconds']:.2f}" for t in times)
    minus = POINTS.format(*smaller[name]["better_by"])
    words = f"The smallest sole ResNet at most {limit} is {name} (BlockDrop minus it: {minus} points). "
    words += f"It has {speeds} times BlockDrop's speed at batch {' and '.join(sizes)}."
    own, sole, extra = smaller[name]["seconds"], numbers["training"]["sole"], numbers["training"]["extra"]
    if own and sole and extra is not None:
        words += f" Its training took {own:,.0f} s, BlockDrop's with its sole ResNet {sole + extra:,.0f} s"
        words += "." if smaller[name]["same_machine"] else ", not all on the same machine."
    return words


def _speed_words(numbers: Mapping, size: str) -> str:
    """Say at which speed BlockDrop, and one policy for all, run at a batch size."""
    paid = images_words(numbers, size)
    known = {"within noise": ", which is within noise", "never": " and is not worth it", "unknown": ""}
    return (
        f"At batch {size} BlockDrop has {speedup(numbers, size)} times the sole ResNet's speed"
        + known.get(paid, f" and has paid for its training after {paid} images")
        + f"; one policy for all images has {speedup(numbers, size, 'one_policy')} times."
    )


def baselines_table(numbers: Mapping) -> str:
    """Return the table of the other ways to choose blocks."""
    columns = ["blocks chosen", "finetuned ResNet (%)", "sole ResNet (%)",
               "learned per image minus this (points, ± standard error)"]  # fmt: skip
    rows = [
        [choice, f"{100 * found['finetuned']:.2f}", f"{100 * found['sole']:.2f}",
         POINTS.format(*found["better_by"])]
        for choice, found in numbers["baselines"].items()
    ]  # fmt: skip
    return markdown_table(columns, rows)


def difficulty_words(numbers: Mapping) -> str:
    """Say how the difficulty of images and their blocks are related; empty where it is not known."""
    if "difficulty" not in numbers:
        return ""
    found, (low, high) = numbers["difficulty"]["rank_correlation"], numbers["difficulty"]["interval"]
    interval = f"95 % interval {low:.3f} to {high:.3f}"
    return f"The rank correlation of difficulty and blocks kept is {found:.3f} ({interval})."


def readme_table(reports: Mapping[str, Sequence[Mapping]]) -> str:
    """Return the README's table, a row per model and network, and how it was measured.

    `reports`: {"CPU" or "GPU": numbers of the same models}; accuracies and blocks are those of the first.
    """
    columns = ["model", "network", "accuracy (%)", "blocks kept", "FLOPs per image (millions)",
               *(f"{device}: time per image, batch {'; '.join(compared(some[0]))}"
                 for device, some in reports.items())]  # fmt: skip
    rows = [
        [f"`{each[0]['model']}`", plots.NETWORKS[name]["label"], f"{100 * found['accuracy']:.2f}",
         f"{found['blocks']:.3g} of {each[0]['blocks']}", three_digits(found["flops"] / 1e6),
         *("; ".join(per_image(one, size, name, False) for size in compared(one)) for one in each)]
        for each in zip(*reports.values(), strict=True)
        for name, found in each[0]["networks"].items()
    ]  # fmt: skip
    machines = dict.fromkeys(
        f"{found['machine']}, {found['precision']}" for some in reports.values() for found in some
    )
    return (
        f"{markdown_table(columns, rows)}\n\n{'; '.join(machines)}. "
        "One policy: the same blocks for all images. [Terms](results/README.md)."
    )


def _read(model: str, device: str) -> dict:
    """Return a report's numbers. ValueError where there is no report of all images of this model."""
    path = ROOT / "results" / f"{model}_{device}.json"
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
        known = [found[key] for key in ("model", "device", "max_images")] == [model, device, None]
    except (OSError, ValueError, TypeError, KeyError):
        known = False
    if not known:
        raise ValueError(f"{path} is not the report of {model}: run blockdrop_inference.ipynb on {device}")
    return found


def main() -> None:
    """Bring the README's table, and its picture of the GPU, up to date with the reports that ship."""
    devices = {"CPU": "cpu", "GPU": "cuda"}
    reports = {name: [_read(model, device) for model in SHIPPED] for name, device in devices.items()}
    for some in reports.values():
        sizes = {report["model"]: " and ".join(compared(report)) for report in some}
        if len(set(sizes.values())) > 1:
            raise ValueError(f"the reports compare different batch sizes, {sizes}: measure the same ones")
    readme = ROOT / "README.md"
    begin, end = "<!-- results: made by python -m models.lab.report -->", "<!-- end of results -->"
    table = f"{begin}\n{readme_table(reports)}\n{end}"
    old = readme.read_text(encoding="utf-8")
    text, found = re.subn(f"{begin}.*{end}", lambda _: table, old, flags=re.DOTALL)
    if not found:
        raise ValueError(f"{readme} has no lines {begin} and {end}: put them around the table's place")
    with written_whole(readme) as file:
        file.write(text.encode())
    plots.use_style()
    picture = plots.trade_off(reports["GPU"], compared(reports["GPU"][0]))
    picture.savefig(ROOT / "results" / "accuracy_time.png", dpi=120)


if __name__ == "__main__":
    argparse.ArgumentParser(description=main.__doc__).parse_args()
    main()
