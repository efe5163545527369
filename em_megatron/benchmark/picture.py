"""The picture of a report: panels side by side, curves or bars."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from em_megatron.benchmark.results import Chart
from em_megatron.training.plots import STYLE

COLORS = ("#3b6fb6", "#d1495b", "#66a182", "#edae49", "#7d5ba6", "#8d96a3", "#2e4057", "#c77d3e")
WIDTH, HEIGHT = 6.0, 4.4  # inches of a panel
MOST_MARKERS = 12  # points of a curve that are marked


def draw(title: str, charts: list[Chart], path: Path) -> bool:
    """Draws the charts that hold something to a PNG at `path`; whether there were any."""
    charts = [chart for chart in charts if chart.bars or any(chart.series.values())]
    if not charts:
        return False
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib.figure import Figure

    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(WIDTH * len(charts), HEIGHT), layout="constrained")
        for axes, chart in zip(figure.subplots(1, len(charts), squeeze=False)[0], charts, strict=True):
            (_bars if chart.bars else _curves)(axes, chart)
            axes.set_title(chart.title)
            axes.spines["top"].set_visible(False)
        figure.suptitle(title, fontsize=10, x=0.01, ha="left")
        figure.savefig(path)
    return True


def _curves(axes: Any, chart: Chart) -> None:
    from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter, NullLocator, StrMethodFormatter

    named = {label: sorted(points) for label, points in chart.series.items() if points}
    for color, (label, points) in zip(COLORS * len(named), named.items(), strict=False):
        marker = "o" if len(points) <= MOST_MARKERS else ""
        axes.plot(*zip(*points, strict=True), color=color, marker=marker, markersize=4, linewidth=1.6, label=label)
    axes.set_xscale("log", base=2)
    axes.set_yscale("log")
    shown = [points for points in named.values() if len(points) <= MOST_MARKERS] or list(named.values())
    axes.set_xticks(sorted({x for points in shown for x, _ in points}))
    axes.xaxis.set_major_formatter(FuncFormatter(lambda x, _: binary(x)))
    axes.xaxis.set_minor_locator(NullLocator())
    axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axes.yaxis.set_major_formatter(StrMethodFormatter("{x:,g}"))
    axes.yaxis.set_minor_formatter(NullFormatter())
    axes.set_xlabel(chart.x)
    axes.set_ylabel(chart.y)
    axes.legend(fontsize=8)


def binary(number: float) -> str:
    """4096 as 4k, 2²⁰ as 1M, others as they are."""
    for unit, size in (("M", 2**20), ("k", 2**10)):
        if number >= size and number % size == 0:
            return f"{number / size:g}{unit}"
    return f"{number:g}"


def _bars(axes: Any, chart: Chart) -> None:
    labels, values = list(chart.bars), list(chart.bars.values())
    colors = [COLORS[index % len(COLORS)] for index in range(len(labels))]
    drawn = axes.barh(labels, values, color=colors, height=0.65)
    axes.bar_label(drawn, labels=[f"{value:,.4g}" for value in values], padding=3, fontsize=8)
    axes.invert_yaxis()
    axes.margins(x=0.15)
    axes.grid(visible=False, axis="y")
    axes.set_xlabel(chart.x)
