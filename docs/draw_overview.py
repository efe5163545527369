"""Draws docs/overview.png, the picture of the README, with the project's own matrices: python docs/draw_overview.py"""

from __future__ import annotations

from pathlib import Path

import matplotlib
import torch

matplotlib.use("Agg")
import matplotlib.pyplot as plt
from matplotlib.axes import Axes
from matplotlib.patches import Rectangle

from em_megatron.hippo import legs, samplers

TOKENS, ORDER, SLOTS, BLOCK = 1024, 48, 24, 256
OWN, MEMORY, INK = "#2b6cb0", "#dd6b20", "#333333"


def history(tokens: int) -> torch.Tensor:
    """A smooth signal with some noise, [T]: one channel of the keys of one head."""
    x = torch.linspace(0, 1, tokens, dtype=torch.float64)
    generator = torch.Generator().manual_seed(4)
    waves = sum(torch.sin(2 * torch.pi * k * x + 1.3 * k) / k for k in (1, 2, 3, 5, 9))
    return waves + 0.25 * torch.randn(tokens, dtype=torch.float64, generator=generator)


def draw_compression(axes: Axes) -> None:
    """The history, what its coefficients keep, and the moments that are read back."""
    signal = history(TOKENS)
    state = legs.inject(ORDER, 0, TOKENS, TOKENS) @ signal
    every = (torch.arange(TOKENS, dtype=torch.float64) + 0.5) / TOKENS
    points = samplers.exponential(SLOTS, 2.5)
    axes.plot(signal, color="#bbbbbb", lw=0.7, label=f"history: {TOKENS} tokens")
    axes.plot(legs.read(ORDER, every) @ state, color=INK, lw=1.6, label=f"its {ORDER} coefficients (HiPPO-LegS)")
    axes.plot(points * TOKENS, legs.read(ORDER, points) @ state, "o", color=MEMORY, ms=6, label=f"{SLOTS} slots read")
    axes.set(xlabel="token", ylabel="one channel of the keys", title="Compress everything, read back some moments")
    axes.legend(frameon=False, fontsize=9, loc="lower left")
    axes.spines[["top", "right"]].set_visible(False)


def draw_mask(axes: Axes) -> None:
    """What each block attends to: a rectangle of slots joined to a triangle of its own tokens."""
    slots, blocks = 3, 4
    for block in range(blocks):
        left, top = slots + block * 4, block * 4
        if block:
            axes.add_patch(Rectangle((0, top), slots, 4, color=MEMORY, alpha=0.85, lw=0))
            axes.add_patch(Rectangle((0, top), slots, 4, fill=False, ec="white", lw=2))
        for row in range(4):
            axes.add_patch(Rectangle((left, top + row), row + 1, 1, color=OWN, alpha=0.85, lw=0))
    axes.text(slots / 2, -0.4, "memory\nslots", ha="center", va="bottom", color=MEMORY, fontsize=10)
    axes.text(slots + 8, -0.4, "tokens of four blocks", ha="center", va="bottom", color=OWN, fontsize=10)
    axes.set(xlim=(-0.3, slots + blocks * 4 + 0.3), ylim=(blocks * 4 + 0.3, -2.6), aspect="equal")
    axes.set_title("Trapezoidal attention: one softmax over both")
    axes.set_ylabel("query")
    axes.set_xticks([])
    axes.set_yticks([])
    axes.spines[:].set_visible(False)


def main() -> None:
    figure, (left, right) = plt.subplots(1, 2, figsize=(12, 4.4), width_ratios=(1.45, 1), layout="constrained")
    draw_compression(left)
    draw_mask(right)
    figure.savefig(Path(__file__).with_name("overview.png"), dpi=110)


if __name__ == "__main__":
    main()
