"""Plots of a run: what is drawn, and that no damaged metrics.jsonl stops them."""

import json
import math
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from matplotlib.figure import Figure

from em_megatron.training.plots import plot_positions, plot_run, position_curve, read_rows, smoothed

PNG_SIGNATURE = b"\x89PNG\r\n\x1a\n"


def train_row(step: int, **changes: Any) -> dict[str, Any]:
    row = {
        "kind": "train",
        "step": step,
        "loss": 3 + 4 * math.exp(-step / 20),
        "grad_norm": 1.0,
        "learning_rate": 1e-3 * min(1, step / 10),
        "consumed_samples": 4 * step,
        "consumed_tokens": 4000 * step,
        "tokens_per_second": 5000.0,
        "memory_floats_per_sequence": 1024,
    }
    return row | changes


def validation_row(step: int, **changes: Any) -> dict[str, Any]:
    loss = 3.1 + 4 * math.exp(-step / 20)
    positions = [
        {"start": 64 * i, "stop": 64 * (i + 1), "loss": loss - 0.1 * i, "perplexity": math.exp(loss - 0.1 * i)}
        for i in range(9)
    ]
    row = {"kind": "validation", "step": step, "loss": loss, "perplexity": math.exp(loss), "bits_per_byte": 2.0}
    return row | {"positions": positions} | changes


def write_rows(run_dir: Path, rows: list[Any], rest: str = "") -> Path:
    (run_dir / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows) + rest)
    return run_dir


def check_pictures(paths: list[Path], run_dir: Path, names: list[str]) -> None:
    assert paths == [run_dir / name for name in names]
    for path in paths:
        assert path.read_bytes().startswith(PNG_SIGNATURE)
        assert path.stat().st_size > 5000


def test_a_run_gives_two_pictures(tmp_path):
    rows = [row for step in range(1, 61) for row in (train_row(step), validation_row(step))[: 1 + (step % 20 == 0)]]
    paths = plot_run(write_rows(tmp_path, rows), block_length=128)
    check_pictures(paths, tmp_path, ["loss.png", "positions.png"])


def test_the_picture_shows_the_numbers(tmp_path, monkeypatch):
    figures: list[Figure] = []
    monkeypatch.setattr(Figure, "savefig", lambda figure, path: figures.append(figure))
    rows = [train_row(step) for step in range(1, 41)] + [validation_row(20), validation_row(40)]
    plot_run(write_rows(tmp_path, rows), block_length=128)
    upper, lower = figures[0].axes
    raw, line, held_out = (artist.get_xydata() for artist in upper.lines)
    assert raw.tolist() == [[row["step"], row["loss"]] for row in rows[:40]]
    assert line[:, 0].tolist() == raw[:, 0].tolist()
    assert held_out.tolist() == [[row["step"], row["loss"]] for row in rows[40:]]
    assert lower.lines[0].get_ydata().tolist() == [row["learning_rate"] for row in rows[:40]]
    top = upper.child_axes[0]
    shown = dict(zip((label.get_text() for label in top.get_xticklabels()), top.get_xticks(), strict=True))
    assert shown["60k"] == pytest.approx(15)  # 4,000 tokens a step

    (axes,) = figures[1].axes
    assert axes.lines[0].get_ydata().tolist() == [entry["perplexity"] for entry in rows[40]["positions"]]
    last = axes.lines[1]
    assert last.get_xdata().tolist() == [64 * i + 32 for i in range(9)]
    assert last.get_ydata().tolist() == [entry["perplexity"] for entry in rows[41]["positions"]]
    assert last.get_linewidth() > 2 * axes.lines[0].get_linewidth()
    assert [boundary.get_xdata()[0] for boundary in axes.lines[2:]] == [128, 256, 384, 512]


@pytest.mark.parametrize(
    "content", [None, "", "\n\n", '{"kind": "train", "st', '[1]\n3\nnull\n"x"\n{"kind": "train"}\n']
)
def test_nothing_to_draw(tmp_path, content):
    if content is not None:
        (tmp_path / "metrics.jsonl").write_text(content)
    assert plot_run(tmp_path) == []
    assert list(tmp_path.glob("*.png")) == []


def test_half_written_last_line_is_left_out(tmp_path):
    rows = [train_row(step) for step in range(1, 6)]
    write_rows(tmp_path, rows, json.dumps(train_row(6))[:40])
    assert read_rows(tmp_path / "metrics.jsonl") == rows
    check_pictures(plot_run(tmp_path), tmp_path, ["loss.png"])


def test_a_line_cut_within_a_character_is_left_out(tmp_path):
    write_rows(tmp_path, [train_row(1), train_row(2)])
    with (tmp_path / "metrics.jsonl").open("ab") as file:
        file.write(b'{"kind": "\xc3')
    check_pictures(plot_run(tmp_path), tmp_path, ["loss.png"])


@pytest.mark.parametrize(
    "rows",
    [
        [train_row(1)],
        [train_row(1, learning_rate=0.0), train_row(2, loss=float("nan")), train_row(3, loss=float("inf"))],
        [{"kind": "train", "step": step, "loss": 3.0} for step in (1, 2)],
        [train_row(2), train_row(1), train_row(2)],
        [validation_row(5, positions=[])],
        [validation_row(5, positions=None), train_row(5, consumed_tokens="many")],
        [train_row(1, learning_rate=None), train_row(2, consumed_tokens=None)],
    ],
    ids=["one row", "not finite", "few fields", "repeated steps", "validation only", "wrong types", "nothing known"],
)
def test_odd_rows_are_drawn(tmp_path, rows):
    check_pictures(plot_run(write_rows(tmp_path, rows), block_length=128), tmp_path, ["loss.png"])


@pytest.mark.parametrize("block_length", [None, 1, 100, 4096])
def test_any_block_length(tmp_path, block_length):
    rows = [train_row(1), *(validation_row(step) for step in range(1, 14))]
    paths = plot_run(write_rows(tmp_path, rows), block_length)
    check_pictures(paths, tmp_path, ["loss.png", "positions.png"])


def test_one_evaluation(tmp_path):
    plot_positions(validation_row(1)["positions"], tmp_path / "positions.png", block_length=128)
    check_pictures([tmp_path / "positions.png"], tmp_path, ["positions.png"])
    plot_positions([], tmp_path / "nothing.png")
    assert not (tmp_path / "nothing.png").exists()


def test_infinite_perplexity_is_left_out_of_the_curve():
    row = validation_row(1)
    row["positions"][0]["perplexity"] = math.inf
    del row["positions"][1]["stop"]
    positions, perplexities = position_curve(row)
    assert positions.tolist() == [64 * i + 32 for i in range(2, 9)]
    assert perplexities.tolist() == [entry["perplexity"] for entry in row["positions"][2:]]


def test_smoothing_keeps_lines_and_looks_back_at_the_end():
    line = np.arange(101.0)
    found = smoothed(line)  # 4 % of 101: two to each side
    assert found[:99] == pytest.approx(line[:99], abs=1e-9)
    assert found[-1] == pytest.approx(np.mean([98, 99, 100]))
    assert smoothed(np.array([5.0])).tolist() == [5.0]


def test_the_module_does_not_import_matplotlib():
    code = "import sys, em_megatron.training.plots; sys.exit('matplotlib' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
