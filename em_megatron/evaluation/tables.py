"""An evaluation's figures as text: a table for the terminal, a page of Markdown."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

REFERENCES = {"unigram_tokens": "unigram model of the tokens", "byte_order_2": "order-2 model of the bytes"}
Found = dict[str, Any]


def terminal(found: Found) -> str:
    """Everything in short lines."""
    lines = [
        f"{found['checkpoint']}: {found['reader']}, {found['memory_floats_per_sequence']:,} memory floats per sequence",
        f"{found['parameters']:,} parameters, {found['memory_parameters']:,} of them the memory's, "
        f"{found['flops_per_token'] / 1e6:,.1f} MFLOP per token of training",
    ]
    for name, write in TERMINAL.items():
        if name == "perplexity" and "loss" in found:
            lines += write(found)
        elif name in found:
            lines += write(found[name])
    lines += [f"{part} left out: {why}" for part, why in found.get("skipped", {}).items()]
    return "\n".join(lines)


def _perplexity(found: Found) -> Iterable[str]:
    yield f"held-out: {found['tokens']:,} tokens, {found['bytes']:,} bytes of text"
    yield f"  loss {found['loss']:.4f} nats per token, perplexity {_number(found['perplexity'])}"
    yield f"  {found['bits_per_byte']:.4f} bits per byte"
    for name, value in found.get("references", {}).items():
        share = found["bits_per_byte"] / value - 1
        side = "lower" if share < 0 else "higher"
        yield f"  {value:.4f} bits per byte: {REFERENCES[name]} (this model is {abs(share):.1%} {side})"
    yield "  position in the context    perplexity"
    for row in found["positions"]:
        yield f"  {row['start']:>10,} to {row['stop'] - 1:<10,}  {_number(row['perplexity']):>10}"


def _long_ppl(found: Found) -> Iterable[str]:
    yield f"LongPPL {_number(found['long_ppl'])} over {found['key_tokens']:,} key tokens of {found['tokens']:,} in {found['texts']} texts"
    yield f"  {long_ppl_constants(found)}"
    yield (
        f"  all tokens of these texts: perplexity {_number(found['perplexity'])}; the evaluator's own: LongPPL "
        f"{_number(found['evaluator_long_ppl'])}, perplexity {_number(found['evaluator_perplexity'])}"
    )


def long_ppl_constants(found: Found) -> str:
    """Evaluator and constants in one line."""
    c = found["constants"]
    return (
        f"evaluator {found['evaluator']} ({found['evaluator_kind']}); K {c['context']:,} tokens, stride {c['stride']:,}, "
        f"LSD > {c['lsd']:g}, LCL > {c['lcl']:g} nats"
    )


def _recall(found: Found) -> Iterable[str]:
    for name, task in found["tasks"].items():
        yield (
            f"recall, {name} of {task['digits']} digits: exact match (digits right), chance {task['chance_exact']:.1g} "
            f"({task['chance_digits']:.0%})"
        )
        depths = sorted({cell["depth"] for cell in task["cells"]})
        yield "  tokens   " + "".join(f"{f'depth {depth:.0%}':>16}" for depth in depths)
        for tokens in sorted({cell["tokens"] for cell in task["cells"]}):
            row = {cell["depth"]: cell for cell in task["cells"] if cell["tokens"] == tokens}
            shown = (f"{row[depth]['exact']:.0%} ({row[depth]['digits']:.0%})" for depth in depths)
            yield f"  {tokens:>7,}  " + "".join(f"{text:>16}" for text in shown)


def _corruption(found: Found) -> Iterable[str]:
    yield f"corruption of the last block ({found['block_length']} tokens), clean tokens, nats"
    yield "  share     with history    its rise     without history    its rise"
    for row in found["shares"]:
        yield (
            f"  {row['share']:>5.0%}     {row['loss']:12.4f}    {row['rise']:8.4f}     {row['loss_without_history']:15.4f}    "
            f"{row['rise_without_history']:8.4f}"
        )


def _sweep(found: Found) -> Iterable[str]:
    yield "other readers of the same weights: perplexity"
    for row in found["readers"]:
        yield f"  {_number(row['perplexity']):>10}  {row['changes'] or 'as trained'} ({row['reader']})"


def _noise(found: Found) -> Iterable[str]:
    yield "explained variance, memory alone: N, T, N/T, white noise, smooth signal"
    for row in found["rows"]:
        yield f"  {row['order']:>6,} {row['tokens']:>8,} {row['ratio']:8.4f} {row['white']:8.4f} {row['smooth']:8.4f}"


TERMINAL: dict[str, Callable[[Found], Iterable[str]]] = {
    "perplexity": _perplexity,
    "long_ppl": _long_ppl,
    "recall": _recall,
    "corruption": _corruption,
    "sweep": _sweep,
    "noise": _noise,
}


def markdown_table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A table; the first column left, the others right."""
    lines = [f"| {' | '.join(head)} |", f"|---|{'--:|' * (len(head) - 1)}"]
    return "\n".join([*lines, *(f"| {' | '.join(row)} |" for row in rows)])


def markdown(found: Found, pictures: Sequence[Path]) -> str:
    """The page; `pictures` lie beside it and stand under the part they are of."""
    step = f", step {found['step']:,}" if found["step"] else ""
    lines = [f"# Evaluation of {Path(found['checkpoint']).name}{step}", ""]
    lines += [
        f"{found['reader']}; {found['memory_floats_per_sequence']:,} memory floats per sequence of "
        f"{found['sequence_length']:,} tokens; {found['parameters']:,} parameters, {found['memory_parameters']:,} of them the "
        f"memory's; {found['flops_per_token'] / 1e6:,.1f} MFLOP per token of training.",
        "",
    ]
    for name, title in TITLES.items():
        part = found if name == "perplexity" else found.get(name)
        if part is None or (name == "perplexity" and "loss" not in found):
            continue
        lines += [f"## {title}", "", *PAGES[name](part), ""]
        lines += [f"![{title}]({path.name})\n" for path in pictures if path.stem.startswith(PICTURES[name])]
    lines += [f"{part}: left out, {why}.\n" for part, why in found.get("skipped", {}).items()]
    return "\n".join(lines)


def _perplexity_page(found: Found) -> Iterable[str]:
    yield (
        f"{found['tokens']:,} held-out tokens, {found['bytes']:,} bytes: loss {found['loss']:.4f} nats per token, perplexity "
        f"{_number(found['perplexity'])}, {found['bits_per_byte']:.4f} bits per byte."
    )
    for name, value in found.get("references", {}).items():
        yield f"\nTo beat: {value:.4f} bits per byte of the {REFERENCES[name]}."


def _long_ppl_page(found: Found) -> Iterable[str]:
    yield f"LongPPL **{_number(found['long_ppl'])}** over {found['key_tokens']:,} key tokens of {found['tokens']:,}; {long_ppl_constants(found)}.\n"
    head = ("", "LongPPL", "perplexity of all tokens")
    rows = [
        ("this model", _number(found["long_ppl"]), _number(found["perplexity"])),
        ("evaluator", _number(found["evaluator_long_ppl"]), _number(found["evaluator_perplexity"])),
    ]
    yield markdown_table(head, rows)


def _recall_page(found: Found) -> Iterable[str]:
    for name, task in found["tasks"].items():
        yield (
            f"{name}, {task['digits']} digits: exact match (digits right); chance is {task['chance_exact']:.1g} "
            f"({task['chance_digits']:.0%}); a block has {found['block_length']:,} tokens.\n"
        )
        depths = sorted({cell["depth"] for cell in task["cells"]})
        rows = []
        for tokens in sorted({cell["tokens"] for cell in task["cells"]}):
            row = {cell["depth"]: cell for cell in task["cells"] if cell["tokens"] == tokens}
            rows.append((f"{tokens:,}", *(f"{row[x]['exact']:.0%} ({row[x]['digits']:.0%})" for x in depths)))
        yield markdown_table(("tokens", *(f"depth {depth:.0%}" for depth in depths)), rows) + "\n"


def _corruption_page(found: Found) -> Iterable[str]:
    yield "Nats on clean tokens of the last block; its rise over the clean block beside it.\n"
    head = ("share replaced", "with history", "rise", "without history", "rise", "history is worth")
    yield markdown_table(
        head,
        [
            (
                f"{row['share']:.0%}", f"{row['loss']:.4f}", f"{row['rise']:.4f}", f"{row['loss_without_history']:.4f}",
                f"{row['rise_without_history']:.4f}", f"{row['memory_benefit']:.4f}",
            )
            for row in found["shares"]
        ],
    )  # fmt: skip


def _sweep_page(found: Found) -> Iterable[str]:
    rows = [(row["changes"] or "as trained", row["reader"], _number(row["perplexity"])) for row in found["readers"]]
    yield markdown_table(("reader", "", "perplexity"), rows)


def _noise_page(found: Found) -> Iterable[str]:
    rows = [
        (f"{r['order']:,}", f"{r['tokens']:,}", f"{r['ratio']:.4f}", f"{r['white']:.4f}", f"{r['smooth']:.4f}")
        for r in found["rows"]
    ]
    yield markdown_table(("N", "T", "N/T", "white noise", "smooth signal"), rows)


TITLES = {
    "perplexity": "Held-out text",
    "long_ppl": "LongPPL",
    "recall": "Recall",
    "corruption": "Corrupted block",
    "sweep": "Other readers of the same weights",
    "noise": "Noise and a smooth signal in N coefficients",
}
PICTURES = {name: name for name in TITLES} | {"perplexity": "positions"}
PAGES: dict[str, Callable[[Found], Iterable[str]]] = {
    "perplexity": _perplexity_page,
    "long_ppl": _long_ppl_page,
    "recall": _recall_page,
    "corruption": _corruption_page,
    "sweep": _sweep_page,
    "noise": _noise_page,
}


def _number(value: float | None) -> str:
    """A perplexity; null where it is infinite or there is none."""
    return "none" if value is None else f"{value:.2f}"
