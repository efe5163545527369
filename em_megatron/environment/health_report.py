"""The health check's page: a table with a line for each node, findings, a verdict; as text and JSON."""

from __future__ import annotations

import json
from dataclasses import dataclass, field

from em_megatron.environment.links import Measured
from em_megatron.environment.node_comparison import GIB, Node
from em_megatron.environment.report import Row, line

HEADINGS = (
    "node",
    "ranks",
    "GPUs",
    "GPU free",
    "clock",
    "output free",
    "tmp free",
    "/dev/shm",
    "own ranks",
    "with next",
)


@dataclass
class HealthReport:
    """Filled step by step, so that it can be printed when the check ends early."""

    nodes: list[Node] = field(default_factory=list)
    rows: list[Row] = field(default_factory=list)
    measured: list[Measured] = field(default_factory=list)

    @property
    def errors(self) -> int:
        return sum(row.level == "ERROR" for row in self.rows)

    @property
    def fit(self) -> bool:
        return self.errors == 0

    @property
    def verdict(self) -> str:
        """The last line."""
        if not self.fit:
            return f"not fit: {counted(self.errors, 'error')}"
        ranks = sum(len(node.ranks) for node in self.nodes)
        gpus = sum(node.facts.visible_gpus for node in self.nodes)
        return f"fit to train: {counted(len(self.nodes), 'node')}, {counted(ranks, 'rank')}, {counted(gpus, 'GPU')}"

    def as_text(self) -> str:
        """The table, aligned, and the findings."""
        cells = [HEADINGS, *(tuple(row.values()) for row in self.table())] if self.nodes else []
        widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
        lines = [
            "  ".join(f"{cell:{width}}" for cell, width in zip(row, widths, strict=True)).rstrip() for row in cells
        ]
        name_width = max((len(row.name) for row in self.rows), default=0)
        return "\n".join([*lines, *(line(row, name_width) for row in self.rows), self.verdict])

    def as_json(self) -> str:
        """As {"fit", "verdict", "errors", "nodes": [{heading: cell}], "rows": [{"name", "level", "text"}]}."""
        rows = [{"name": row.name, "level": row.level, "text": row.text} for row in self.rows]
        whole = {"fit": self.fit, "verdict": self.verdict, "errors": self.errors, "nodes": self.table(), "rows": rows}
        return json.dumps(whole, indent=1, ensure_ascii=False)

    def table(self) -> list[dict[str, str]]:
        """A row per node, by heading; sizes in GiB, bus bandwidths in GB/s, "-" for what was not measured."""
        return [dict(zip(HEADINGS, self._cells(index, node), strict=True)) for index, node in enumerate(self.nodes)]

    def _cells(self, index: int, node: Node) -> tuple[str, ...]:
        whole = node.ranks == list(range(node.ranks[0], node.ranks[-1] + 1))
        ranks = f"{node.ranks[0]}-{node.ranks[-1]}" if whole and len(node.ranks) > 1 else ",".join(map(str, node.ranks))
        right = sum(not gpu.error for gpu in node.gpus)
        found = node.facts.visible_gpus
        return (
            node.name,
            ranks,
            str(found) if right == found else f"{right} of {found}",
            f"{min(gpu.free for gpu in node.gpus) / GIB:.1f}" if node.gpus else "-",
            f"{node.clock:+.3f} s",
            f"{node.folder.free / GIB:,.1f}" if not node.folder.error else "-",
            f"{node.facts.temporary_free / GIB:,.1f}",
            f"{node.facts.shared_memory / GIB:,.1f}",
            self._bandwidth((index,)),
            self._bandwidth((index, index + 1)),
        )

    def _bandwidth(self, nodes: tuple[int, ...]) -> str:
        found = [measured for measured in self.measured if measured.link.nodes == nodes]
        return f"{found[0].bandwidth / 1e9:.2f}" if found else "-"


def counted(number: int, noun: str) -> str:
    """As 1 node, 2 nodes."""
    return f"{number} {noun}{'' if number == 1 else 's'}"
