"""The comparison as tables, pictures and raw JSON in one folder."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from em_megatron.comparison import pictures
from em_megatron.comparison.plan import Cell, Plan
from em_megatron.comparison.results import Mean, Row, answers, collect, grouped, later_loss, mean, places
from em_megatron.evaluation.tables import PAGES, markdown_table
from em_megatron.training.metrics import finite


def write(plan: Plan, cells: Sequence[Cell], corpora: dict[str, Any], folder: Path) -> str:
    """Writes results.json, report.md and the pictures; returns the page.

    corpora: what each is, by name (`corpora.describe`).
    """
    rows = collect(cells)
    folder.mkdir(parents=True, exist_ok=True)
    missing = sorted({cell.name for cell in cells} - {row["name"] for row in rows})
    drawn = pictures.draw(rows, folder)
    page = "\n".join(_page(plan, rows, corpora, missing, drawn))
    head = {"plan": plan.name, "machines": machines(rows), "corpora": corpora, "missing": missing}
    # Positions and readers in full; everything that a table or a picture shows comes from here.
    (folder / "results.json").write_text(json.dumps(finite(head | {"rows": rows}), indent=1) + "\n")
    (folder / "report.md").write_text(page)
    return page


def machines(rows: Sequence[Row]) -> dict[str, int]:
    """What the runs were trained on, and how many of them."""
    found = [row["machine"] for row in rows]
    return {machine: found.count(machine) for machine in dict.fromkeys(found)}


def _page(
    plan: Plan, rows: list[Row], corpora: dict[str, Any], missing: list[str], drawn: Sequence[Path]
) -> Iterable[str]:
    yield f"# Comparison {plan.name}\n"
    for machine, count in machines(rows).items():
        yield f"`python launch/compare.py {plan.name}`: {count} runs on {machine}.\n"
    if plan.groups:
        yield from _setting(plan, corpora)
    for corpus, size in places(rows):
        yield f"## {corpus}, model size {size}\n"
        yield from _quality(grouped(rows, corpus, size))
        yield from _recall(grouped(rows, corpus, size))
        yield from _corruption(grouped(rows, corpus, size))
        yield from _readers(grouped(rows, corpus, size))
        yield from _shown(drawn, f"{corpus}-{size}-")
    yield from _claims(plan, rows)
    yield from _speed(rows)
    yield from _shown(drawn, "speed")
    if missing:
        yield f"\n{len(missing)} of the plan's cells are not done: {', '.join(missing)}.\n"


def _setting(plan: Plan, corpora: dict[str, Any]) -> Iterable[str]:
    training, data = plan.base["training"], plan.base["data"]
    tokens = training["train_steps"] * training["global_batch_size"] * data["sequence_length"]
    yield (
        f"Every run: {tokens / 1e6:,.1f}M tokens in samples of {data['sequence_length']:,}, blocks of "
        f"{plan.base['memory']['block_length']:,}; everything but the memory is the same.\n"
    )
    if corpora:
        head = (
            "corpus",
            "training documents",
            "training tokens",
            "held-out documents",
            "held-out tokens",
            "vocabulary",
        )
        keys = ("train_documents", "train_tokens", "validation_documents", "validation_tokens", "vocabulary")
        yield (
            markdown_table(head, [(name, *(f"{found[key]:,}" for key in keys)) for name, found in corpora.items()])
            + "\n"
        )


def _quality(groups: dict[str, list[Row]]) -> Iterable[str]:
    """Kinds by the held-out loss of their first seed, best first: seeds differ in the order of the data, so only equal ones
    compare."""
    # Without the plan's evaluator each model judged itself, which does not compare.
    judges = {row["long_ppl"]["evaluator"] for group in groups.values() for row in group if "long_ppl" in row}
    has_long = len(judges) == 1
    floor = groups["block_local"][0] if "block_local" in groups else None
    rows = []
    for label, group in sorted(groups.items(), key=lambda pair: pair[1][0]["loss"]):
        first = group[0]
        against = "" if floor is None else f"{first['loss'] - floor['loss']:+.4f}"
        later = "" if floor is None else f"{later_loss(first) - later_loss(floor):+.4f}"
        rows.append(
            (
                label, f"{first['memory_floats_per_sequence']:,}{' (grows)' if first['grows'] else ''}",
                f"{first['parameters']:,}", f"{math.exp(first['loss']):.2f}", f"{first['bits_per_byte']:.4f}", against, later,
                ", ".join(f"{row['loss']:.4f}" for row in group), *(_long_ppl(first) if has_long else ()),
            )
        )  # fmt: skip
    head = [
        "memory",
        "floats per sequence",
        "parameters",
        "perplexity",
        "bits per byte",
        "nats against block_local",
        "the same behind the first block",
        "loss by seed",
    ]
    yield markdown_table([*head, *(["LongPPL", "key tokens"] if has_long else [])], rows) + "\n"


def _long_ppl(row: Row) -> tuple[str, str]:
    found = row.get("long_ppl", {})
    value = found.get("long_ppl")
    return ("" if value is None else f"{value:.2f}", f"{found['key_tokens']:,}" if found else "")


DISTANCES = (
    (-1, 1),
    (1, 2),
    (2, 4),
    (4, math.inf),
)  # blocks between the fact and the question's end, the last included


def _recall(groups: dict[str, list[Row]]) -> Iterable[str]:
    """Exact match by length, and by how many blocks the fact lies back."""
    asked = {label: [row["recall"] for row in group if "recall" in row] for label, group in groups.items()}
    asked = {label: found for label, found in asked.items() if found}
    for task in dict.fromkeys(name for found in asked.values() for part in found for name in part["tasks"]):
        parts = {label: found for label, found in asked.items() if all(task in part["tasks"] for part in found)}
        first = next(iter(parts.values()))[0]
        lengths = sorted({cell["tokens"] for cell in first["tasks"][task]["cells"]})
        block, digits = first["block_length"], first["tasks"][task]["digits"]
        yield (
            f"Recall, {task} of {digits} digits, exact match, chance {first['tasks'][task]['chance_exact']:.1g}: by the tokens of "
            f"the text over all depths, and by how far back the fact lies in blocks of {block} tokens (questions asked).\n"
        )
        table = []
        for label, found in parts.items():
            cells = [cell for part in found for cell in part["tasks"][task]["cells"]]
            by_length = [[cell["exact"] for cell in cells if cell["tokens"] == tokens] for tokens in lengths]
            shown = [_far(cells, block, low, high) for low, high in DISTANCES]
            table.append([label, *(f"{mean(values).value:.0%}" for values in by_length), *shown])
        names = ["up to 1", "1 to 2", "2 to 4", "beyond 4"]
        yield (
            markdown_table(["memory", *(f"{n:,} tokens" for n in lengths), *(f"{n} blocks back" for n in names)], table)
            + "\n"
        )


def _far(cells: Sequence[Any], block: int, low: float, high: float) -> str:
    chosen = [cell for cell in cells if low * block < (1 - cell["depth"]) * cell["tokens"] <= high * block]
    if not chosen:
        return ""
    return f"{mean([cell['exact'] for cell in chosen]).value:.1%} ({sum(cell['trials'] for cell in chosen)})"


def _corruption(groups: dict[str, list[Row]]) -> Iterable[str]:
    """Of the first seed: how much the loss on clean tokens rises, and what the history is worth where most is replaced."""
    found = {label: group[0]["corruption"]["shares"] for label, group in groups.items() if "corruption" in group[0]}
    if not found:
        return
    shares = [part["share"] for part in next(iter(found.values()))]
    yield (
        "Tokens of the last block replaced at random: rise of the loss on its clean tokens in nats, and what the history is then "
        "worth (the loss of the block read alone, minus that with its history), clean and at the last share.\n"
    )
    table = [
        [
            label, *(f"{part['rise']:+.3f}" for part in parts[1:]), f"{parts[0]['memory_benefit']:.3f}",
            f"{parts[-1]['memory_benefit']:.3f}",
        ]
        for label, parts in found.items()
    ]  # fmt: skip
    worth = ["history worth, clean", f"history worth, {shares[-1]:.0%}"]
    yield markdown_table(["memory", *(f"{share:.0%} replaced" for share in shares[1:]), *worth], table) + "\n"


def _readers(groups: dict[str, list[Row]]) -> Iterable[str]:
    """Other readers and noise, of the rows whose suite has them."""
    for label, group in groups.items():
        for part, title in (
            ("sweep", "other readers of the same weights"),
            ("noise", "what N coefficients keep of T tokens"),
        ):
            if part in group[0]:
                yield f"{label}, {title}:\n"
                yield from PAGES[part](group[0][part])
                yield ""


def _spread(value: Mean) -> str:
    return f"{value.value:.4f}" + (f" ± {value.spread:.4f}" if value.seeds > 1 else "")


def _claims(plan: Plan, rows: list[Row]) -> Iterable[str]:
    table = [
        (
            claim.text, f"{claim.better} against {claim.than}", f"{answer.corpus}, {answer.size}", _spread(answer.better),
            _spread(answer.than), ", ".join(f"{difference:+.4f}" for difference in answer.differences), answer.verdict,
        )
        for claim in plan.claims
        for answer in answers(claim, rows)
    ]  # fmt: skip
    if table:
        yield "## Claims\n"
        head = (
            "claim",
            "compared",
            "corpus, size",
            "loss of the first",
            "loss of the second",
            "difference by seed",
            "here",
        )
        yield markdown_table(head, table) + "\n"


def _speed(rows: list[Row]) -> Iterable[str]:
    measured = {
        (row["size"], row["label"]): row for row in rows if row["speed_only"] and row["training_tokens_per_second"]
    }
    if not measured:
        return
    yield "## Speed\n"
    yield "Training tokens/s, each run alone on the machine, median of its steps; in brackets, as a multiple of elastic_1x of that size.\n"
    sizes = list(dict.fromkeys(size for size, _ in measured))
    table = []
    for label in dict.fromkeys(label for _, label in measured):
        cells = [label]
        for size in sizes:
            row, base = measured.get((size, label)), measured.get((size, "elastic_1x"))
            ratio = (
                f" ({row['training_tokens_per_second'] / base['training_tokens_per_second']:.2f})"
                if row and base
                else ""
            )
            cells.append(f"{row['training_tokens_per_second']:,.0f}{ratio}" if row else "")
        table.append(cells)
    parameters = {size: next(row["parameters"] for (s, _), row in measured.items() if s == size) for size in sizes}
    yield markdown_table(["memory", *(f"{size} ({parameters[size] / 1e6:,.1f}M)" for size in sizes)], table) + "\n"


def _shown(drawn: Sequence[Path], prefix: str) -> Iterable[str]:
    yield from (f"![{path.stem}]({path.name})\n" for path in drawn if path.stem.startswith(prefix))
