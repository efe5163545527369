"""Pictures of a comparison.

CORPUS-SIZE-memory.png, -positions.png, -corruption.png, -recall-TASK-LABEL.png of every corpus and model size; speed.png
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
from matplotlib import colormaps
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, NullFormatter, StrMethodFormatter

from em_megatron.comparison.results import Row, grouped, places
from em_megatron.evaluation.pictures import heat_map
from em_megatron.training.plots import STYLE

MARKS = "osD^vP*Xhd<>"
REFERENCES = ("block_local", "full")  # drawn as lines
IN_POSITIONS = 9  # curves at most


def draw(rows: Sequence[Row], folder: Path) -> list[Path]:
    """Draws what the rows hold; returns the files."""
    written = []
    colors = _colors(rows)
    with matplotlib.rc_context(STYLE):
        for corpus, size in places(rows):
            groups = grouped(rows, corpus, size)
            stem = f"{corpus}-{size}"
            written.append(_memory(groups, colors, f"{corpus}, model size {size}", folder / f"{stem}-memory.png"))
            written.append(_positions(groups, colors, f"{corpus}, model size {size}", folder / f"{stem}-positions.png"))
            if any("corruption" in row for group in groups.values() for row in group):
                written.append(
                    _corruption(groups, colors, f"{corpus}, model size {size}", folder / f"{stem}-corruption.png")
                )
            for label, group in groups.items():
                for task, found in group[0].get("recall", {}).get("tasks", {}).items():
                    path = folder / f"{stem}-recall-{task}-{label}.png"
                    written.append(heat_map(f"{label}: {task}", found, group[0]["recall"]["block_length"], path))
        if any(row["speed_only"] for row in rows):
            written.append(_speed(rows, colors, folder / "speed.png"))
    return written


def _colors(rows: Sequence[Row]) -> dict[str, Any]:
    kinds = list(dict.fromkeys(row["kind"] for row in rows))
    return {kind: colormaps["tab20"](index % 20) for index, kind in enumerate(kinds)}


def _memory(groups: dict[str, list[Row]], colors: dict[str, Any], title: str, path: Path) -> Path:
    """Perplexity of the first seed against floats kept per sequence; a line joins the sizes of a kind, other seeds are dots."""
    figure = Figure(figsize=(7.4, 4.8), layout="constrained")
    axes = figure.subplots()
    by_kind: dict[str, list[tuple[int, float]]] = {}
    for label, group in groups.items():
        color, floats = colors[group[0]["kind"]], group[0]["memory_floats_per_sequence"]
        first, *others = (row["perplexity"] for row in group)
        if label in REFERENCES:
            axes.axhline(first, color=color, linestyle=(0, (5, 3)), linewidth=1.2, label=f"{label} {first:.2f}")
            continue
        by_kind.setdefault(group[0]["kind"], []).append((floats, first))
        axes.plot([floats] * len(others), others, ".", color=color, markersize=4, alpha=0.7)
    for index, (kind, points) in enumerate(by_kind.items()):
        x, y = zip(*sorted(points), strict=True)
        axes.plot(x, y, marker=MARKS[index % len(MARKS)], color=colors[kind], label=kind, markersize=5)
    axes.set_xscale("log", base=2)
    axes.xaxis.set_major_formatter(StrMethodFormatter("{x:,.0f}"))
    axes.tick_params(axis="x", labelrotation=30, labelsize=8)
    axes.set(xlabel="floats kept per sequence", ylabel="held-out perplexity")
    axes.set_title(title)
    axes.legend(fontsize=7, loc="center left", bbox_to_anchor=(1.0, 0.5))
    figure.savefig(path)
    return path


def _positions(groups: dict[str, list[Row]], colors: dict[str, Any], title: str, path: Path) -> Path:
    """Perplexity of the first seed by position, smoothed over four bins, of the smallest and largest size of each kind at most."""
    figure = Figure(figsize=(7.4, 4.6), layout="constrained")
    axes = figure.subplots()
    for label in _few(groups):
        group = groups[label]
        bins = group[0]["positions"]
        losses = np.array([bin_["loss"] for bin_ in bins])
        width = min(4, len(losses))
        smooth = np.convolve(losses, np.ones(width) / width, mode="valid")
        at = np.convolve([(bin_["start"] + bin_["stop"]) / 2 for bin_ in bins], np.ones(width) / width, mode="valid")
        style = "--" if label in REFERENCES else "-"
        axes.plot(at, np.exp(smooth), style, color=colors[group[0]["kind"]], label=label, linewidth=1.5)
    axes.set_yscale("log")
    axes.yaxis.set_major_locator(LogLocator(subs=(1, 1.2, 1.5, 2, 3, 5, 7)))
    axes.yaxis.set_major_formatter(StrMethodFormatter("{x:,g}"))
    axes.yaxis.set_minor_formatter(NullFormatter())
    axes.set(xlabel="position in the context (tokens)", ylabel="held-out perplexity")
    axes.set_title(title)
    axes.legend(fontsize=7, loc="center left", bbox_to_anchor=(1.0, 0.5))
    figure.savefig(path)
    return path


def _few(groups: dict[str, list[Row]]) -> list[str]:
    """Labels for a picture of lines: references, and each kind at its smallest size, and while there is room its largest."""
    found = [label for label in REFERENCES if label in groups]
    kinds: dict[str, list[str]] = {}
    for label, group in groups.items():
        if label not in REFERENCES:
            kinds.setdefault(group[0]["kind"], []).append(label)
    ordered = {kind: sorted(labels, key=lambda label: groups[label][0]["factor"]) for kind, labels in kinds.items()}
    found += [labels[0] for labels in ordered.values()]
    found += [labels[-1] for labels in ordered.values() if len(labels) > 1]
    return found[: IN_POSITIONS + len(REFERENCES)]


def _corruption(groups: dict[str, list[Row]], colors: dict[str, Any], title: str, path: Path) -> Path:
    """How much the loss on clean tokens rises as the block around them is replaced."""
    figure = Figure(figsize=(7.4, 4.4), layout="constrained")
    axes = figure.subplots()
    for label in _few({label: group for label, group in groups.items() if any("corruption" in row for row in group)}):
        group = [row for row in groups[label] if "corruption" in row]
        shares = [100 * part["share"] for part in group[0]["corruption"]["shares"]]
        rises = [part["rise"] for part in group[0]["corruption"]["shares"]]
        style = "--" if label in REFERENCES else "-"
        axes.plot(shares, rises, style, marker="o", markersize=3, color=colors[group[0]["kind"]], label=label)
    axes.set(xlabel="tokens of the last block replaced (%)", ylabel="rise of the loss on clean tokens (nats)")
    axes.set_title(title)
    axes.legend(fontsize=7, loc="center left", bbox_to_anchor=(1.0, 0.5))
    figure.savefig(path)
    return path


def _speed(rows: Sequence[Row], colors: dict[str, Any], path: Path) -> Path:
    """Training tokens/s against parameters."""
    figure = Figure(figsize=(7.0, 4.4), layout="constrained")
    axes = figure.subplots()
    labels = list(dict.fromkeys(row["label"] for row in rows if row["speed_only"]))
    for index, label in enumerate(labels):
        chosen = sorted(
            (row for row in rows if row["speed_only"] and row["label"] == label), key=lambda row: row["parameters"]
        )
        chosen = [row for row in chosen if row["training_tokens_per_second"]]
        if chosen:
            x, y = [row["parameters"] / 1e6 for row in chosen], [row["training_tokens_per_second"] for row in chosen]
            axes.plot(
                x, y, marker=MARKS[index % len(MARKS)], color=colormaps["tab20"](index % 20), label=label, markersize=5
            )
    axes.set(xlabel="parameters (millions)", ylabel="training tokens/s", xscale="log", yscale="log")
    for axis in (axes.xaxis, axes.yaxis):
        axis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        axis.set_major_formatter(StrMethodFormatter("{x:,g}"))
        axis.set_minor_formatter(NullFormatter())
    axes.set_title("Speed, each run alone on the machine")
    axes.legend(fontsize=7, loc="center left", bbox_to_anchor=(1.0, 0.5))
    figure.savefig(path)
    return path
