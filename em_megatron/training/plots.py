"""Pictures of a run, drawn from its metrics.jsonl, and of an evaluation.

loss.png        training loss (each step and smoothed), held-out loss, learning rate; steps below, tokens above
positions.png   held-out perplexity by position in the context: falling where memory of earlier blocks helps
throughput.png  tokens/s, where the time of a step goes (waits for data, communication), and memory peaks, over steps
"""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

Row = dict[str, Any]
Floats = NDArray[np.float64]

TRAINING, HELD_OUT, INK, FAINT = "#3b6fb6", "#d1495b", "#333333", "#d9d9d9"
STYLE = {
    "font.size": 10,
    "axes.titlesize": 11,
    "axes.titlelocation": "left",
    "axes.spines.right": False,
    "axes.edgecolor": INK,
    "axes.labelcolor": INK,
    "axes.linewidth": 0.8,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": "#ececec",
    "grid.linewidth": 0.8,
    "xtick.color": INK,
    "ytick.color": INK,
    "legend.frameon": False,
    "savefig.dpi": 160,
}
SMOOTHED_SHARE = 0.04  # of the rows; the width of the moving average
MAX_CURVES = 12  # validations in one picture; evenly spaced ones of more
MAX_BOUNDARIES = 64  # more lines than this would hide the curves
WIDEST_LINEAR = 4.0  # perplexities further apart than this factor get a logarithmic axis


class Curve(NamedTuple):
    """Perplexities [bins] over positions [bins] in tokens; an empty label leaves it out of the legend."""

    label: str
    positions: Floats
    perplexities: Floats


def plot_run(run_dir: Path, block_length: int | None = None) -> list[Path]:
    """Draws what run_dir/metrics.jsonl holds; returns the pictures written, none where there is nothing to draw.

    run_dir: folder of a run. block_length: tokens per memory block, to mark block boundaries in positions.png.
    Damaged lines (a run killed while writing) and values that are not finite are left out.
    """
    rows = read_rows(Path(run_dir) / "metrics.jsonl")
    training = _by_step(rows, "train")
    validations = _by_step(rows, "validation")
    if not training and not validations:
        return []
    import matplotlib

    written = []
    with matplotlib.rc_context(STYLE):
        written.append(_draw_loss(training, validations, Path(run_dir) / "loss.png"))
        curves = [Curve(f"step {row['step']:,}", *position_curve(row)) for row in validations]
        if any(len(curve.positions) for curve in curves):
            written.append(_draw_positions(curves, block_length, Path(run_dir) / "positions.png"))
        if any(_is_finite(row.get("data_wait")) for row in training):
            written.append(_draw_throughput(training, Path(run_dir) / "throughput.png"))
    return written


def plot_positions(positions: list[Row], path: Path, block_length: int | None = None) -> None:
    """Draws one evaluation's perplexity by position in the context to `path`, a PNG.

    positions: bins {"start", "stop", "perplexity", ...}. block_length: as in `plot_run`. Without a bin of finite
    perplexity nothing is written.
    """
    curve = Curve("", *position_curve({"positions": positions}))
    if not len(curve.positions):
        return
    import matplotlib

    with matplotlib.rc_context(STYLE):
        _draw_positions([curve], block_length, path)


def read_rows(path: Path) -> list[Row]:
    """The rows of a metrics.jsonl that are whole; none if there is no file."""
    if not path.is_file():
        return []
    rows = []
    for line in path.read_text(encoding="utf-8", errors="replace").splitlines():
        try:
            row = json.loads(line)
        except ValueError:
            continue
        if isinstance(row, dict):
            rows.append(row)
    return rows


def smoothed(values: Floats) -> Floats:
    """A moving average over SMOOTHED_SHARE of the values, [n] -> [n].

    Centred; narrower at the start, where the loss falls steeply; of past values only at the end.
    """
    count = len(values)
    at = np.arange(count)
    before = np.minimum(int(count * SMOOTHED_SHARE / 2), at)
    after = np.minimum(before, count - 1 - at)
    sums = np.concatenate([[0.0], np.cumsum(values)])
    found: Floats = (sums[at + after + 1] - sums[at - before]) / (before + after + 1)
    return found


def position_curve(row: Row) -> tuple[Floats, Floats]:
    """Middles of the position bins of a validation, in tokens from the document's start, and their perplexities."""
    bins = row.get("positions")
    points: list[tuple[float, float]] = []
    for entry in bins if isinstance(bins, list) else []:
        if isinstance(entry, dict) and all(_is_finite(entry.get(name)) for name in ("start", "stop", "perplexity")):
            points.append(((entry["start"] + entry["stop"]) / 2, entry["perplexity"]))
    table = np.array(sorted(points), dtype=np.float64).reshape(-1, 2)
    return table[:, 0], table[:, 1]


def _by_step(rows: list[Row], kind: str) -> list[Row]:
    """Rows of a kind with a finite loss, in the order of their steps; of two with the same step, the later one."""
    kept = {
        row["step"]: row
        for row in rows
        if row.get("kind") == kind and _is_finite(row.get("step")) and _is_finite(row.get("loss"))
    }
    return [kept[step] for step in sorted(kept)]


def _is_finite(value: Any) -> bool:
    return isinstance(value, int | float) and math.isfinite(value)


def _column(rows: list[Row], name: str) -> tuple[Floats, Floats]:
    """Steps and values of the rows that have a finite `name`."""
    pairs = [(row["step"], row[name]) for row in rows if _is_finite(row.get(name))]
    table = np.array(pairs, dtype=np.float64).reshape(-1, 2)
    return table[:, 0], table[:, 1]


def _draw_loss(training: list[Row], validations: list[Row], path: Path) -> Path:
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator, StrMethodFormatter

    figure = Figure(figsize=(7.2, 5.0), layout="constrained")
    upper, lower = figure.subplots(2, 1, sharex=True, height_ratios=[3.4, 1])
    steps, loss = _column(training, "loss")
    if len(steps):
        upper.plot(steps, loss, color=TRAINING, alpha=0.28, linewidth=0.9)
        line = smoothed(loss)
        upper.plot(steps, line, color=TRAINING, linewidth=1.8, label=f"training, smoothed: {line[-1]:.3f}")
    held_out_steps, held_out = _column(validations, "loss")
    if len(held_out_steps):
        upper.plot(
            held_out_steps,
            held_out,
            color=HELD_OUT,
            linewidth=1.0,
            marker="o",
            markersize=4.5,
            markeredgecolor="white",
            markeredgewidth=0.6,
            label=_held_out_label(validations[-1]),
        )
    upper.set_ylabel("loss (nats per token)")
    upper.legend(loc="upper right")
    lower.plot(*_column(training, "learning_rate"), color=INK, linewidth=1.2)
    lower.set_ylabel("learning rate")
    lower.set_ylim(bottom=0)
    lower.ticklabel_format(axis="y", style="sci", scilimits=(0, 0), useMathText=True)
    lower.set_xlabel("step")
    lower.set_xlim(left=0)
    lower.xaxis.set_major_locator(MaxNLocator(8, integer=True))
    lower.xaxis.set_major_formatter(StrMethodFormatter("{x:,.0f}"))
    lower.spines["top"].set_visible(False)
    _add_token_axis(upper, *_column(training, "consumed_tokens"))
    figure.savefig(path)
    return path


def _draw_throughput(training: list[Row], path: Path) -> Path:
    from matplotlib.figure import Figure
    from matplotlib.ticker import EngFormatter, MaxNLocator, PercentFormatter, StrMethodFormatter

    figure = Figure(figsize=(7.2, 6.0), layout="constrained")
    speed, shares, memory = figure.subplots(3, 1, sharex=True, height_ratios=[1.4, 1.4, 1])
    steps, rate = _column(training, "tokens_per_second")
    if len(steps):
        speed.plot(steps, rate, color=TRAINING, alpha=0.28, linewidth=0.9)
        speed.plot(steps, smoothed(rate), color=TRAINING, linewidth=1.8, label=_speed_label(training))
        speed.legend(loc="lower right")
    speed.set_ylabel("tokens per second")
    speed.yaxis.set_major_formatter(EngFormatter(sep=""))
    dots: Row = {"marker": "o", "markersize": 3.5, "linewidth": 1.0}  # measured now and then
    for name, label, color, look in (
        ("data_wait", "waiting for data", TRAINING, {"linewidth": 1.2}),
        ("communication_share", "communication", HELD_OUT, dots),
        ("exposed_communication_share", "of it, exposed", HELD_OUT, dots | {"linestyle": ":"}),
        ("slowest_rank_excess", "slowest rank over median", INK, dots),
    ):
        steps, values = _column(training, name)
        if len(steps):
            shares.plot(steps, values, color=color, label=label, **look)
    shares.set_ylabel("share of a step")
    shares.yaxis.set_major_formatter(PercentFormatter(1.0))
    shares.legend(loc="lower left", bbox_to_anchor=(0, 1.0), ncols=4, fontsize=8, borderaxespad=0.2, borderpad=0)
    for name, label, color in (("memory_reserved_gb", "reserved", FAINT), ("memory_peak_gb", "peak", INK)):
        steps, values = _column(training, name)
        if len(steps):
            memory.plot(steps, values, color=color, linewidth=1.4, label=label)
    memory.set_ylabel("GB, fullest rank")
    if memory.lines:
        memory.legend(loc="lower right", fontsize=8)
    memory.set_xlabel("step")
    memory.set_xlim(left=0)
    memory.xaxis.set_major_locator(MaxNLocator(8, integer=True))
    memory.xaxis.set_major_formatter(StrMethodFormatter("{x:,.0f}"))
    for axes in (speed, shares, memory):
        axes.set_ylim(bottom=0)
        axes.spines["top"].set_visible(False)
    figure.savefig(path)
    return path


def _speed_label(training: list[Row]) -> str:
    """The medians of the run."""
    _, rate = _column(training, "tokens_per_second")
    _, mfu = _column(training, "mfu")
    return f"median {np.median(rate):,.0f} tokens/s" + (f", MFU {np.median(mfu):.1%}" if len(mfu) else "")


def _held_out_label(row: Row) -> str:
    bits = row.get("bits_per_byte")
    return f"held out: {row['loss']:.3f}" + (f" ({bits:.3f} bits per byte)" if _is_finite(bits) else "")


def _add_token_axis(axes: Any, steps: Floats, tokens: Floats) -> None:
    """Round numbers of tokens above the steps at which they had been seen."""
    if len(steps) < 2 or not (np.diff(tokens) > 0).all():
        axes.spines["top"].set_visible(False)
        return
    from matplotlib.ticker import EngFormatter, MaxNLocator

    ticks = MaxNLocator(6).tick_values(tokens[0], tokens[-1])
    ticks = ticks[(ticks >= tokens[0]) & (ticks <= tokens[-1])]
    top = axes.secondary_xaxis("top")
    top.set_xticks(np.interp(ticks, tokens, steps), [EngFormatter(sep="")(tick) for tick in ticks])
    top.set_xlabel("tokens seen", labelpad=6)


def _draw_positions(curves: list[Curve], block_length: int | None, path: Path) -> Path:
    """The last curve bold, earlier ones faint; at least one has points."""
    from matplotlib import colormaps
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7.2, 4.4), layout="constrained")
    axes = figure.subplots()
    curves = [curve for curve in curves if len(curve.positions)]
    shown = [curves[index] for index in np.unique(np.linspace(0, len(curves) - 1, MAX_CURVES).round().astype(int))]
    for index, curve in enumerate(shown[:-1]):
        color = colormaps["Blues"](0.22 + 0.4 * index / max(1, len(shown) - 2))
        label = curve.label if index in (0, len(shown) - 2) else None
        axes.plot(curve.positions, curve.perplexities, color=color, linewidth=1.0, label=label)
    last = shown[-1]
    bold: Row = {"color": HELD_OUT, "linewidth": 2.2, "marker": "o", "markersize": 3.5}
    axes.plot(last.positions, last.perplexities, label=last.label or None, **bold)
    axes.set_xlim(left=0)
    if block_length:
        _mark_blocks(axes, block_length, end=max(float(curve.positions[-1]) for curve in curves))
    _scale_perplexity(axes, np.concatenate([curve.perplexities for curve in shown]))
    axes.spines["top"].set_visible(False)
    axes.set_xlabel("position in the context (tokens since the memory began)")
    axes.set_ylabel("held-out perplexity")
    if axes.get_legend_handles_labels()[0]:
        axes.legend(loc="lower left", bbox_to_anchor=(0, 1.0), ncols=4, borderaxespad=0.2, borderpad=0)
    figure.savefig(path)
    return path


def _mark_blocks(axes: Any, block_length: int, end: float) -> None:
    """Lines at block boundaries up to `end` tokens, and ticks at some of them."""
    from matplotlib.ticker import MultipleLocator, StrMethodFormatter

    blocks = math.ceil(end / block_length)
    axes.xaxis.set_major_locator(MultipleLocator(block_length * max(1, math.ceil(blocks / 8))))
    axes.xaxis.set_major_formatter(StrMethodFormatter("{x:,.0f}"))
    if blocks - 1 > MAX_BOUNDARIES:
        return
    axes.grid(visible=False, axis="x")
    line: Row = {"color": FAINT, "linewidth": 0.9, "linestyle": (0, (4, 3))}
    for number in range(1, blocks):
        label = f"block boundary, every {block_length:,}" if number == 1 else None
        axes.axvline(number * block_length, zorder=0.5, label=label, **line)


def _scale_perplexity(axes: Any, values: Floats) -> None:
    """A logarithmic axis with plain numbers where early and late curves are far apart."""
    if values.max() <= WIDEST_LINEAR * values.min():
        return
    from matplotlib.ticker import LogLocator, NullFormatter, StrMethodFormatter

    axes.set_yscale("log")
    axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axes.yaxis.set_major_formatter(StrMethodFormatter("{x:,g}"))
    axes.yaxis.set_minor_formatter(NullFormatter())
