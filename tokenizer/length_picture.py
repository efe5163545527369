"""A picture of the lengths of a corpus' documents."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from em_megatron.training.plots import HELD_OUT, INK, STYLE, TRAINING

BINS_PER_OCTAVE = 3
COLOURS = (TRAINING, HELD_OUT, "#2a9d8f", "#8d6a9f", INK)


def edges(shortest: int, longest: int) -> NDArray[np.float64]:
    """Edges of logarithmic bins that hold all lengths, BINS_PER_OCTAVE of them to a doubling.

    They lie halfway between whole numbers and are at least one apart, so that no bin of small lengths is empty for want
    of a number in it.
    """
    first = int(np.floor(BINS_PER_OCTAVE * np.log2(shortest)))
    last = int(np.ceil(BINS_PER_OCTAVE * np.log2(longest + 1))) + 1
    found = np.exp2(np.arange(first, last + 1) / BINS_PER_OCTAVE)
    return np.unique(np.floor(found)) - 0.5


def draw_lengths(
    histograms: Mapping[str, tuple[NDArray[np.int64], NDArray[np.int64]]], marks: Mapping[str, int | None], path: Path
) -> None:
    """Shares of documents and of tokens over the documents' length, one line for each split, as a PNG.

    histograms: lengths and how many documents have each, of each split. marks: lengths to mark, None for none.
    """
    import matplotlib
    from matplotlib.figure import Figure
    from matplotlib.ticker import FuncFormatter, PercentFormatter

    bins = edges(min(int(v[0]) for v, _ in histograms.values()), max(int(v[-1]) for v, _ in histograms.values()))
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(7.2, 5.4), layout="constrained")
        upper, lower = figure.subplots(2, 1, sharex=True)
        for (split, (values, counts)), colour in zip(histograms.items(), COLOURS * len(histograms), strict=False):
            _steps(upper, bins, values, counts, colour, f"{split}: {counts.sum():,} documents")
            _steps(lower, bins, values, counts * values, colour, f"{split}: {counts @ values:,} tokens")
        upper.set(title="Documents by length", ylabel="share of documents")
        lower.set(title="Tokens by length of their document", ylabel="share of tokens", xscale="log")
        lower.set_xlabel("length of the document (tokens, logarithmic)")
        lower.xaxis.set_major_formatter(FuncFormatter(lambda length, _: f"{length:,.0f}"))
        for axes in (upper, lower):
            axes.yaxis.set_major_formatter(PercentFormatter(1, decimals=0))
            axes.set_ylim(0, 1.1 * axes.get_ylim()[1])  # room for the marks' names
            axes.legend(loc="lower right", bbox_to_anchor=(1, 1), ncols=2, fontsize=8, borderaxespad=0.2)
            axes.spines["top"].set_visible(False)
            _mark(axes, marks)
        figure.savefig(path)


def _steps(
    axes: Any, bins: NDArray[np.float64], values: NDArray[np.int64], weights: NDArray[np.int64], colour: str, label: str
) -> None:
    heights = np.histogram(values, bins, weights=weights)[0] / weights.sum()
    axes.stairs(heights, bins, color=colour, linewidth=1.4, label=label)
    axes.stairs(heights, bins, color=colour, alpha=0.15, fill=True)


def _mark(axes: Any, marks: Mapping[str, int | None]) -> None:
    for name, length in marks.items():
        if length:
            axes.axvline(length, color=INK, linewidth=0.9, linestyle=":")
            axes.annotate(
                f" {name}: {length:,}", (length, 1), xycoords=("data", "axes fraction"), va="top", fontsize=8, color=INK
            )
