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
    """Return the README's Markdown tables, small ResNets first: networks, what they bring, training."""
    reports = sorted(reports, key=lambda report: report["blocks"])
    networks = [
        "model", "network", "accuracy (%)", "blocks kept", "distinct policies", "FLOPs an image",
        "ms, batch 1: mean (median)", "ms an image, large batch: median", "measured on, precision",
    ]  # fmt: skip
    brings = [
        "model", "deciding per image brings, over the one policy (points)",
        "rank correlation of difficulty and blocks kept (95 % interval)",
        "break-even in blocks (range): batch 1; large batch", "break-even in images: batch 1; large batch",
    ]  # fmt: skip
    training = ["model", "sole ResNet", "policy, with what it builds on", "finetuning"]
    return "\n\n".join(
        _table(columns, [row for report in reports for row in rows(report)])
        for columns, rows in ((networks, _networks), (brings, _brings), (training, _training))
    )


def _table(columns: list[str], rows: list[list[str]]) -> str:
    """Return a Markdown table."""
    lines = [columns, ["---"] * len(columns), *rows]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in lines)


def _networks(report: Mapping) -> Iterator[list[str]]:
    """Yield a row for the sole ResNet, one for BlockDrop, one for BlockDrop's ResNet under one policy."""
    large, static = str(report["large batch"]), report["one learned policy"]
    choice = next(iter(report["learned policies better by, in points"]))
    for title, timed, found in (
        ("sole ResNet", "sole ResNet", report["sole"]),
        ("BlockDrop", "BlockDrop, conditional", report["blockdrop"]),
        ("one policy", "finetuned ResNet, one policy", None),
    ):
        if found is None:
            accuracy = report["baselines"][choice]["finetuned ResNet"]
            kept, policies, flops, one = str(sum(static["keeps"])), 1, static["FLOPs"], ""
        else:
            accuracy, policies, flops = found["accuracy"], found["distinct policies"], found["FLOPs"]
            kept = str(report["blocks"]) if title == "sole ResNet" else f"{found['blocks kept']:.2f}"
            mean, median = found["seconds"], found["seconds quartiles"][1]
            one = f"{three_digits(1000 * mean)} ({three_digits(1000 * median)})"
        in_batches = report["seconds per image"][timed].get(large)
        yield [
            f"`{report['model']}`", title, f"{100 * accuracy:.2f}", f"{kept} of {report['blocks']}",
            str(policies), f"{flops:.2E}", one,
            "" if in_batches is None else f"{three_digits(1000 * in_batches)} (batch {large})",
            f"{report['machine']}, {report['precision']}",
        ]  # fmt: skip


def _brings(report: Mapping) -> Iterator[list[str]]:
    """Yield a row on what deciding per image brings, and where BlockDrop breaks even."""
    points, error = next(iter(report["learned policies better by, in points"].values()))
    correlation = "difficulty unknown"
    found = report.get("rank correlation of difficulty and blocks")
    if found and found["rho"] is None:
        correlation = "the same blocks for all"
    elif found:
        correlation = "{:.3f} ({:.3f} to {:.3f})".format(found["rho"], *found["interval"])
    blocks, images = [], []
    for size in ("1", str(report["large batch"])):
        low, high = report["break-even in blocks, range"][size]
        blocks.append(f"{report['break-even in blocks'][size]:.1f} ({low:.1f} to {high:.1f})")
        paid = report["break-even in images"].get(size)
        images.append("none shown" if paid is None else f"{float(f'{paid:.2g}'):,.0f}")
    yield [
        f"`{report['model']}`", f"{points:+.2f} ± {error:.2f}", correlation,
        f"{'; '.join(blocks)} of {report['blocks']}", "; ".join(images),
    ]  # fmt: skip


def _training(report: Mapping) -> Iterator[list[str]]:
    """Yield a row on the seconds of training, and where they were spent."""
    cells = [f"`{report['model']}`"]
    for stage, seconds in report["training seconds"].items():
        machine = report["training machines"][stage] or "unknown machine"
        cells.append("unknown" if seconds is None else f"{seconds:,.0f} s ({machine})")
    yield cells


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
