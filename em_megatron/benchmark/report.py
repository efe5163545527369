"""The report of a run: JSON with every reading, Markdown for people, a picture."""

from __future__ import annotations

import dataclasses
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from em_megatron.benchmark.machine import Ceilings
from em_megatron.benchmark.options import Options
from em_megatron.benchmark.picture import draw
from em_megatron.benchmark.results import Findings, Row, Rows
from em_megatron.training.metrics import finite

HEADER = ("candidate", "time, ms (range)", "tokens/s", "× peer", "GFLOP/s", "floor, ms", "time / floor", "peak, MB")

PEAK = (
    "; peak: device memory during a call, on the CPU resident memory, beyond what was held before it (inputs, matrices, "
    "weights)"
)


@dataclass
class Report:
    """All of a run.

    machine: `machine.describe`. rows: of the candidates. judged: targets, where the shapes are the default ones.
    """

    subcommand: str
    command: str
    options: Options
    machine: dict[str, Any]
    ceilings: Ceilings
    rows: list[Row]
    findings: Findings
    judged: list[dict[str, Any]]

    def write(self, folder: Path) -> None:
        """report.json, report.md and report.png in `folder`, which is made if absent."""
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "report.json").write_text(json.dumps(finite(self.document()), indent=1, ensure_ascii=False) + "\n")
        title = f"{self.subcommand}: {self.machine['device']}, {self.machine['dtype']}"
        picture = draw(title, self.findings.charts, folder / "report.png")
        (folder / "report.md").write_text(self.markdown() + ("\n![](report.png)\n" if picture else ""))

    def document(self) -> dict[str, Any]:
        """What report.json holds."""
        options = {name: list(v) if isinstance(v, tuple) else v for name, v in vars(self.options).items()}
        return {
            "subcommand": self.subcommand,
            "command": self.command,
            "machine": self.machine,
            "ceilings": vars(self.ceilings),
            "options": options,
            "targets": self.judged,
            "figures": [dataclasses.asdict(figure) for figure in self.findings.figures],
            "rows": self.rows,
            "notes": self.findings.notes,
            **self.findings.data,
        }

    def markdown(self) -> str:
        """The whole report as text."""
        parts = [self._head(), self._targets(), self._figures()]
        table = Rows(self.rows)
        parts += [self._group(group, table.group(group)) for group in table.groups]
        parts += [
            _titled(extra.title, _table(extra.header, extra.lines)) for extra in self.findings.tables if extra.lines
        ]
        if self.findings.notes:
            parts.append("\n".join(f"- {note}" for note in self.findings.notes))
        return "\n\n".join(part for part in parts if part) + "\n"

    def _head(self) -> str:
        machine, ceilings = self.machine, self.ceilings
        versions = ", ".join(
            f"{name} {machine[name]}"
            for name in ("python", "torch", "triton", "megatron-core", "cuda")
            if machine[name]
        )
        return "\n".join(
            [
                f"# Benchmark of `{self.subcommand}`",
                "",
                f"- {machine['device']}, {machine['threads']} CPU threads, {machine['dtype']}",
                f"- {versions}",
                f"- commit {machine['commit']}, {machine['date']}",
                f"- `{self.command}`",
                f"- measured ceilings: copy {ceilings.copied_per_second / 1e9:,.1f} GB/s (read and written), sum "
                f"{ceilings.read_per_second / 1e9:,.1f} GB/s (read), matrix product "
                f"{ceilings.flops_per_second / 1e9:,.1f} GFLOP/s",
                f"- medians of up to {self.options.rounds} rounds, in each of which every candidate runs once; × peer: tokens/s "
                "over those of the row marked so; floor: the larger of FLOPs and bytes (`em_megatron/benchmark/floors.py`) "
                "over these ceilings" + (PEAK if machine["device_type"] == "cuda" else ""),
            ]
        )

    def _targets(self) -> str:
        words = {True: "yes", False: "**no**", None: "not measured"}
        lines = [
            [row["target"], row["wanted"], *_two(row["measured"], row["by_shortest_readings"], row["unit"])]
            + [words[row["met"]]]
            for row in self.judged
        ]
        header = ["target", "wanted", "measured", "by the shortest readings", "met"]
        return _titled("Targets", _table(header, lines)) if lines else ""

    def _figures(self) -> str:
        lines = [[figure.text, *_two(figure.value, figure.best, figure.unit)] for figure in self.findings.figures]
        return _titled("Figures", _table(["figure", "measured", "by the shortest readings"], lines)) if lines else ""

    def _group(self, group: str, rows: list[Row]) -> str:
        extra = list(dict.fromkeys(name for row in rows for name in row.get("details", {})))
        lines = [_line(row) + [row.get("details", {}).get(name, "") for name in extra] for row in rows]
        keep = [index for index in range(len(HEADER) + len(extra)) if any(line[index] for line in lines)]
        header = [*HEADER, *extra]
        return _titled(
            group, _table([header[index] for index in keep], [[line[index] for index in keep] for line in lines])
        )


def _line(row: Row) -> list[str]:
    name = row["name"] + (" (peer)" if row["is_peer"] else "")
    floor = f"{1e3 * row['floor_seconds']:,.3g}"
    if row["seconds"] is None:
        return [name, f"not measured: {row['reason']}", "", "", "", floor, "", ""]
    median, least, most = (1e3 * row["seconds"][kind] for kind in ("median", "min", "max"))
    return [
        name,
        f"{median:,.4g} ({least:,.4g} to {most:,.4g})",
        f"{row['tokens_per_second']:,.4g}",
        "" if row["times_peer"] is None else f"{row['times_peer']:,.3g}",
        f"{row['flops_per_second'] / 1e9:,.4g}",
        floor,
        f"{row['times_floor']:,.3g}",
        "" if row["peak_bytes"] is None else f"{row['peak_bytes'] / 1e6:,.4g}",
    ]


def _number(value: float | None, unit: str) -> str:
    return "not measured" if value is None else f"{value:,.4g} {unit}".strip()


def _two(value: float | None, best: float | None, unit: str) -> list[str]:
    return [_number(value, unit), "" if best is None else _number(best, unit)]


def _titled(title: str, body: str) -> str:
    return f"## {title[:1].upper()}{title[1:]}\n\n{body}"


def _table(header: list[str], lines: list[list[str]]) -> str:
    return "\n".join(
        f"| {' | '.join(cell.replace('|', '/') for cell in cells)} |"
        for cells in [header, ["---"] * len(header), *lines]
    )
