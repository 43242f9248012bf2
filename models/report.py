"""What the inference notebook found, in files: numbers as JSON, pictures as SVG, a table as Markdown.

`python -m models.report` puts the results tables that these files make into the README.
"""

import contextlib
import json
import os
import platform
import re
from collections.abc import Iterator, Mapping
from importlib import metadata
from pathlib import Path
from typing import IO

from matplotlib.figure import Figure

from models.checkpoints import written_whole

ROOT = Path(__file__).resolve().parent.parent
MARKS = ("<!-- results: made by python -m models.report -->", "<!-- end of results -->")


class Report:
    """Numbers, pictures and a table of one model on one device, written to `folder`.

    The files begin with `<model>_<device>`, and tell another precision than fp32 and `max_images`
    where it is set: a quick look doesn't replace the report of all images. Without a folder (None)
    nothing is written.
    """

    def __init__(
        self,
        folder: str | os.PathLike | None,
        model: str,
        device: str,
        precision: str = "fp32",
        max_images: int | None = None,
        **about: object,
    ):
        self.folder = None if folder is None else Path(folder)
        unusual = [precision] * (precision != "fp32") + [f"{max_images}images"] * (max_images is not None)
        self.name = "_".join([model, device, *unusual])
        self.numbers: dict[str, object] = {
            "model": model,
            "device": device,
            "precision": precision,
            "max_images": max_images,
            "versions": {"python": platform.python_version()}
            | {name: metadata.version(name) for name in ("torch", "torchvision", "numpy")},
            **about,
        }

    def picture(self, name: str, figure: Figure) -> None:
        """Write a figure as `<model>_<device>…_<name>.svg`. RuntimeError where that fails."""
        if self.folder is not None:
            with self._writing(f"_{name}.svg") as file:
                figure.savefig(file, format="svg", metadata={"Date": None})

    def write(self, table: str) -> list[Path]:
        """Write the numbers as JSON and a Markdown table; return the files. RuntimeError where that fails."""
        if self.folder is None:
            return []
        numbers = json.dumps(self.numbers, default=str)
        plain = json.loads(numbers, parse_constant=lambda _: None)  # nan is no JSON
        files = {".json": json.dumps(plain, indent=1) + "\n", ".md": table + "\n"}
        for ending, text in files.items():
            with self._writing(ending) as file:
                file.write(text.encode())
        return [self.folder / f"{self.name}{ending}" for ending in files]

    @contextlib.contextmanager
    def _writing(self, ending: str) -> Iterator[IO[bytes]]:
        """Yield the file `<model>_<device>…<ending>` to write to; say what to do where that fails."""
        try:
            with written_whole(self.folder / f"{self.name}{ending}") as file:
                yield file
        except OSError as error:
            raise RuntimeError(
                f"could not write the report ({error}): free some space or set another results_dir"
            ) from error


def three_digits(number: float) -> str:
    """Write a number in three significant digits, or whole from 1,000 on."""
    return f"{number:,.0f}" if abs(number) >= 999.5 else f"{number:#.3g}".rstrip(".")


def results_tables(reports: list[Mapping]) -> str:
    """Return the README's Markdown tables, a row a report, small ResNets first: accuracy and cost, time."""
    quality = [
        "| model | accuracy (%): sole, BlockDrop, one policy | blocks kept: BlockDrop, one policy "
        "| distinct policies | FLOPs an image: sole, BlockDrop, one policy "
        "| deciding per image brings, over the one policy (points) "
        "| rank correlation of difficulty and blocks kept (95 % interval) |",
        "|---" * 7 + "|",
    ]
    time = [
        "| model | machine | ms an image, batch 1, mean (median): sole, BlockDrop "
        "| large batch, median: sole, BlockDrop, one policy "
        "| break-even in blocks (range), batch 1; large batch | break-even in images, batch 1; large batch "
        "| seconds of training: sole, policy with what it builds on, finetuning |",
        "|---" * 7 + "|",
    ]
    for report in sorted(reports, key=lambda report: report["blocks"]):
        sole, ours = report["sole"], report["blockdrop"]
        model, blocks, large = f"`{report['model']}`", report["blocks"], str(report["large batch"])
        one_by_one = ", ".join(
            f"{three_digits(1000 * side['seconds'])} ({three_digits(1000 * side['seconds quartiles'][1])})"
            for side in (sole, ours)
        )
        in_batches = ", ".join(
            three_digits(1000 * report["seconds per image"][name][large])
            for name in ("sole ResNet", "BlockDrop, conditional", "finetuned ResNet, one policy")
            if large in report["seconds per image"][name]
        )
        paid = [
            "none shown" if images is None else f"{float(f'{images:.2g}'):,.0f}"
            for images in map(report["break-even in images"].get, ("1", large))
        ]
        wins = []
        for size in ("1", large):
            low, high = report["break-even in blocks, range"][size]
            wins.append(f"{report['break-even in blocks'][size]:.1f} ({low:.1f} to {high:.1f})")
        training = "; ".join(
            "unknown" if s is None else f"{s:,.0f}" for s in report["training seconds"].values()
        )
        stages_on: dict[str, list[str]] = {}
        for stage, machine in report["training machines"].items():
            stages_on.setdefault(machine or "unknown machine", []).append(stage)
        if set(stages_on) != {report["machine"]}:
            told = [f"{', '.join(stages)}: {machine}" for machine, stages in stages_on.items()]
            training += f" ({'; '.join(told)})"
        static = report["one learned policy"]
        choice, per_image = next(iter(report["learned policies better by, in points"].items()))
        correlation = "difficulty unknown"
        found = report.get("rank correlation of difficulty and blocks")
        if found and found["rho"] is None:
            correlation = "the same blocks for all"
        elif found:
            correlation = "{:.3f} ({:.3f} to {:.3f})".format(found["rho"], *found["interval"])
        quality.append(
            f"| {model} | {100 * sole['accuracy']:.2f}, {100 * ours['accuracy']:.2f}, "
            f"{100 * report['baselines'][choice]['finetuned ResNet']:.2f} "
            f"| {ours['blocks kept']:.2f}, {sum(static['keeps'])} of {blocks} | {ours['distinct policies']} "
            f"| {sole['FLOPs']:.2E}, {ours['FLOPs']:.2E}, {static['FLOPs']:.2E} "
            f"| {per_image[0]:+.2f} ± {per_image[1]:.2f} "
            f"| {correlation} |"
        )
        time.append(
            f"| {model} | {report['machine']}, {report['precision']} | {one_by_one} "
            f"| {in_batches} (batch {large}) | {'; '.join(wins)} of {blocks} | {'; '.join(paid)} "
            f"| {training} |"
        )
    return "\n".join([*quality, "", *time])


def with_results(readme: str, reports: list[Mapping]) -> str:
    """Return the README's text with the reports' tables between its marks. ValueError without the marks."""
    before, after = map(re.escape, MARKS)
    table = f"{MARKS[0]}\n{results_tables(reports)}\n{MARKS[1]}"
    text, found = re.subn(f"{before}.*{after}", lambda _: table, readme, flags=re.DOTALL)
    if not found:
        raise ValueError(f"the README lacks the lines {MARKS[0]!r} and {MARKS[1]!r}")
    return text


if __name__ == "__main__":
    path = ROOT / "README.md"
    reports = [json.loads(file.read_text()) for file in sorted((ROOT / "results").glob("*.json"))]
    whole = [report for report in reports if report["max_images"] is None]
    text = with_results(path.read_text(), whole)
    with written_whole(path) as file:
        file.write(text.encode())
