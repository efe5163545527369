"""Lines of the report, how a probe that fails becomes one, and the report as text and JSON."""

from __future__ import annotations

import json
import textwrap
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Literal

Level = Literal["ok", "note", "warning", "ERROR"]
Probe = Callable[[], Iterable["Row"]]

WIDTH = 120


@dataclass(frozen=True)
class Row:
    """One finding. Only an ERROR makes the environment unfit."""

    name: str
    text: str
    level: Level = "ok"


@dataclass(frozen=True)
class Section:
    """Findings of one kind."""

    title: str
    rows: tuple[Row, ...]


@dataclass(frozen=True)
class Report:
    """All findings; `gpus` is the number that torch can use, `partial` says that not all sections were asked for."""

    sections: tuple[Section, ...]
    gpus: int
    partial: bool = False

    @property
    def errors(self) -> int:
        return sum(row.level == "ERROR" for section in self.sections for row in section.rows)

    @property
    def fit(self) -> bool:
        return self.errors == 0

    @property
    def verdict(self) -> str:
        """The last line."""
        if not self.fit:
            return f"not fit: {self.errors} error{'s' if self.errors > 1 else ''}"
        if self.partial:
            return f"no error in: {', '.join(section.title for section in self.sections)}"
        if self.gpus:
            return f"fit to train on {self.gpus} GPU{'s' if self.gpus > 1 else ''}"
        return "fit to train on CPU processes"

    def as_text(self) -> str:
        """Aligned lines, wrapped under their own column."""
        name_width = max((len(row.name) for section in self.sections for row in section.rows), default=0)
        lines = []
        for section in self.sections:
            lines.append(section.title)
            lines += [line(row, name_width) for row in section.rows]
        return "\n".join([*lines, self.verdict])

    def as_json(self) -> str:
        """The same lines as {"fit", "verdict", "errors", "gpus", "rows": [{"section", "name", "level", "text"}]}."""
        rows = [
            {"section": section.title, "name": row.name, "level": row.level, "text": row.text}
            for section in self.sections
            for row in section.rows
        ]
        whole = {"fit": self.fit, "verdict": self.verdict, "errors": self.errors, "gpus": self.gpus, "rows": rows}
        return json.dumps(whole, indent=1, ensure_ascii=False)


def attempt(name: str, probe: Probe, failing: Level = "ERROR") -> Iterator[Row]:
    """The rows of `probe`; if it raises, one more row of level `failing` that says so."""
    try:
        yield from probe()
    except (Exception, SystemExit) as error:  # a broken package may raise anything on import
        yield Row(name, f"could not be examined: {cause(error)}", failing)


def cause(error: BaseException) -> str:
    """An exception on one line."""
    message = " ".join(str(error).split())
    return f"{type(error).__name__}: {message}" if message else type(error).__name__


def line(row: Row, name_width: int) -> str:
    """`row` aligned with others, wrapped under its own column."""
    start = f"  {row.level:7}  {row.name:{name_width}}  "
    wrapped = textwrap.wrap(
        row.text, WIDTH - len(start), break_long_words=False, break_on_hyphens=False
    )  # paths and names stay whole
    return start + f"\n{' ' * len(start)}".join(wrapped)
