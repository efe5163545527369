"""Pictures of an evaluation: positions.png, recall_TASK.png, corruption.png, sweep.png, noise.png."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from em_megatron.training.plots import HELD_OUT, STYLE, TRAINING, plot_positions

Found = dict[str, Any]
MAP = "viridis"


def draw(found: Found, folder: Path, block_length: int) -> list[Path]:
    """Draws what is there; returns the files."""
    import matplotlib

    written = []
    if "positions" in found:
        plot_positions(found["positions"], folder / "positions.png", block_length=block_length)
        written.append(folder / "positions.png")
    with matplotlib.rc_context(STYLE):
        for name, task in found.get("recall", {}).get("tasks", {}).items():
            written.append(heat_map(name, task, block_length, folder / f"recall_{name}.png"))
        for name, drawing in DRAWINGS.items():
            if name in found:
                written.append(drawing(found[name], folder / f"{name}.png"))
    return written


def _figure(width: float, height: float) -> tuple[Any, Any]:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), layout="constrained")
    return figure, figure.subplots()


def _save(figure: Any, path: Path) -> Path:
    figure.savefig(path)
    return path


def heat_map(name: str, task: Found, block_length: int, path: Path) -> Path:
    """Exact match over length (right) and depth (down), the share written into each cell."""
    lengths = sorted({cell["tokens"] for cell in task["cells"]})
    depths = sorted({cell["depth"] for cell in task["cells"]})
    values = np.full((len(depths), len(lengths)), np.nan)
    for cell in task["cells"]:
        values[depths.index(cell["depth"]), lengths.index(cell["tokens"])] = cell["exact"]
    figure, axes = _figure(1.6 + 0.8 * len(lengths), 1.4 + 0.5 * len(depths))
    image = axes.imshow(values, vmin=0, vmax=1, cmap=MAP, aspect="auto")
    for (row, column), value in np.ndenumerate(values):
        if np.isfinite(value):
            color = "white" if value < 0.6 else "black"
            axes.text(column, row, f"{value:.0%}", ha="center", va="center", color=color, fontsize=8)
    axes.set_xticks(range(len(lengths)), [f"{length:,}" for length in lengths])
    axes.set_yticks(range(len(depths)), [f"{depth:.0%}" for depth in depths])
    axes.set(xlabel="tokens of the text", ylabel="depth of the fact")
    axes.set_title(f"{name}, {task['digits']} digits: exact match (a block has {block_length:,} tokens)", fontsize=9)
    axes.grid(False)
    figure.colorbar(image, ax=axes, label="exact match")
    return _save(figure, path)


def _corruption(found: Found, path: Path) -> Path:
    figure, axes = _figure(5.5, 3.6)
    shares = [100 * row["share"] for row in found["shares"]]
    axes.plot(shares, [row["loss"] for row in found["shares"]], "o-", color=TRAINING, label="with its history")
    axes.plot(shares, [row["loss_without_history"] for row in found["shares"]], "s--", color=HELD_OUT, label="alone")
    axes.set(xlabel="tokens of the block replaced (%)", ylabel="loss on clean tokens (nats)")
    axes.set_title("A corrupted block, read with its history and alone")
    axes.legend()
    return _save(figure, path)


def _sweep(found: Found, path: Path) -> Path:
    rows = [row for row in found["readers"] if row["perplexity"] is not None]
    figure, axes = _figure(7.5, 0.9 + 0.26 * len(rows))
    names = [row["changes"].replace("memory.", "") or "as trained" for row in rows]
    values = [row["perplexity"] for row in rows]
    colors = [TRAINING if name == "as trained" else "#a9c1de" for name in names]
    axes.barh(range(len(rows)), values, color=colors)
    axes.set_yticks(range(len(rows)), names, fontsize=8)
    axes.invert_yaxis()
    low, high = min(values), max(values)
    axes.set_xlim(low - 0.15 * (high - low + 1e-9), high + 0.12 * (high - low + 1e-9))
    for index, value in enumerate(values):
        axes.text(value, index, f" {value:.2f}", va="center", fontsize=8)
    axes.set(xlabel="held-out perplexity")
    axes.set_title("Other readers of the same weights")
    axes.grid(False, axis="y")
    return _save(figure, path)


def _noise(found: Found, path: Path) -> Path:
    figure, axes = _figure(5.5, 3.6)
    ratios = [row["ratio"] for row in found["rows"]]
    axes.plot([min(ratios), max(ratios)], [min(ratios), max(ratios)], "-", color="#999999", label="N / T")
    axes.plot(ratios, [row["white"] for row in found["rows"]], "o", color=HELD_OUT, label="white noise")
    axes.plot(ratios, [row["smooth"] for row in found["rows"]], "s", color=TRAINING, label="smooth signal")
    axes.set(xscale="log", xlabel="N / T", ylabel="explained variance")
    axes.set_title("What N coefficients keep of T tokens")
    axes.legend()
    return _save(figure, path)


DRAWINGS: dict[str, Callable[[Found, Path], Path]] = {"corruption": _corruption, "sweep": _sweep, "noise": _noise}
