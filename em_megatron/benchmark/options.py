"""What the subcommands of `launch/benchmark.py` take, with defaults for the CPU and for a GPU; imports no torch."""

from __future__ import annotations

import argparse
import dataclasses
import typing
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, NoReturn

from em_megatron.config import ConfigError
from em_megatron.kinds.matching import COMPARED

DTYPES = ("fp32", "bf16", "fp16")
PRECISIONS = ("fp32", "bf16")  # of whole models
ALWAYS = ("elastic", "block_local", "full")  # measured in every step; --kinds chooses of the others
KINDS = tuple(name for name in COMPARED if name not in ALWAYS)
CONTEXTS = {"megatron": (4096, 65536, 1048576), "transformers": (4096, 262144)}  # by what `decode` goes through


def told(cpu: Any, gpu: Any, text: str, shapes: bool = True) -> dict[str, Any]:
    """An option's defaults and meaning; `shapes` where the stated targets hold for its default only."""
    return {"cpu": cpu, "gpu": gpu, "help": text, "shapes": shapes}


@dataclass(frozen=True)
class Options:
    """What all of them take."""

    device: str = field(metadata=told("auto", "auto", "auto (the GPU where there is one), cpu or cuda", False))
    threads: int = field(metadata=told(0, 0, "CPU threads; 0: as many as torch takes by itself", False))
    rounds: int = field(metadata=told(5, 5, "rounds, in each of which every candidate runs once", False))
    seconds: float = field(
        metadata=told(900.0, 300.0, "no round begins after so many seconds; the first one always does", False)
    )
    seed: int = field(metadata=told(1234, 1234, "seed of the inputs", False))
    output: str = field(
        metadata=told(
            "", "", "folder of the report; default: docs/results/benchmark/SUBCOMMAND[-transformers]-DEVICE", False
        )
    )
    bank_cache: str = field(
        metadata=told(
            "~/.cache/em_megatron/banks",
            "~/.cache/em_megatron/banks",
            "folder that keeps the memory's matrices between calls; '' keeps none",
            False,
        )
    )


@dataclass(frozen=True)
class HeadOptions(Options):
    """Shapes of the operators."""

    kv_heads: int = field(metadata=told(8, 8, "key/value heads"))
    head_dim: int = field(metadata=told(64, 128, "dimension of a head"))
    block: int = field(metadata=told(512, 2048, "tokens per block, L"))
    slots: int = field(metadata=told(128, 512, "memory slots, S"))
    dtype: str = field(metadata=told("fp32", "bf16", f"one of {', '.join(DTYPES)}"))


@dataclass(frozen=True)
class MemoryOptions(HeadOptions):
    """The memory operator, forward and backward: planned, fully parallel and recurrent, at several orders.

    The peer is the recurrence of HiPPO-LegS token by token. The matrices are built before anything is timed.
    """

    length: int = field(metadata=told(16384, 32768, "tokens of the sample, T"))
    orders: tuple[int, ...] = field(
        metadata=told((128, 540, 8640), (540, 2160, 8640), "orders of the memory, N", False)
    )
    peer_tokens: int = field(metadata=told(16, 16, "tokens over which the recurrence token by token is timed", False))
    bank_limit: float = field(
        metadata=told(4.0, 4.0, "GiB of matrices above which a candidate is left out, as the planner does", False)
    )


@dataclass(frozen=True)
class AttentionOptions(HeadOptions):
    """Memory and trapezoidal attention together, forward and with backward, at several lengths.

    The peer is torch's causal attention over the whole sample; FlexAttention with the trapezoid's mask runs beside it.
    """

    lengths: tuple[int, ...] = field(
        metadata=told((8192, 16384, 32768), (8192, 16384, 32768), "tokens of a sample", False)
    )
    heads: int = field(metadata=told(8, 16, "query heads"))
    order: int = field(metadata=told(128, 540, "order of the memory, N"))
    flex: int = field(metadata=told(1, 1, "0 leaves FlexAttention out (it is compiled for every length)", False))


@dataclass(frozen=True)
class LayerOptions(Options):
    """One layer of the Megatron model (attention with its projections, and MLP), forward and with backward.

    The peer is the same layer with causal attention over the whole sample; block-local attention runs beside it, and
    Melodi with its paper's window of 512 tokens, and with the blocks of the others.
    """

    size: str = field(metadata=told("125m", "1b", "named size that gives the layer's shape"))
    length: int = field(metadata=told(8192, 32768, "tokens of a sample, T"))
    block: int = field(metadata=told(512, 2048, "tokens per block, L"))
    slots: int = field(metadata=told(128, 512, "memory slots, S"))
    orders: tuple[int, ...] = field(metadata=told((128, 540), (540, 2160, 8640), "orders of the memory, N"))
    precision: str = field(metadata=told("fp32", "bf16", "fp32 or bf16"))


@dataclass(frozen=True)
class StepOptions(Options):
    """A whole step of the trainer: forward, backward, clipping, AdamW and schedule, on random tokens; all memory kinds.

    Candidates train the same weights with the same optimizer, only the core attention is exchanged between them; but
    melodi, which has layers of its own. The peer attends causally to the whole sample. Memories have the floats per
    sequence of the smallest order where they have a size to choose.
    """

    size: str = field(metadata=told("tiny", "1b", "named size of the model"))
    length: int = field(metadata=told(8192, 32768, "tokens of a sample, T"))
    block: int = field(metadata=told(512, 2048, "tokens per block, L"))
    slots: int = field(metadata=told(128, 512, "memory slots, S"))
    orders: tuple[int, ...] = field(metadata=told((540, 2160, 8640), (540, 2160, 8640), "orders of the memory, N"))
    vocabulary: int = field(metadata=told(1024, 32000, "size of the vocabulary"))
    batch: int = field(metadata=told(1, 1, "samples of a step, one micro-batch each"))
    kinds: tuple[str, ...] = field(metadata=told(KINDS, KINDS, "the other systems to measure beside them", False))
    recompute: str = field(metadata=told("none", "full", "none, selective or full"))
    precision: str = field(metadata=told("fp32", "bf16", "fp32 or bf16"))


@dataclass(frozen=True)
class DecodeOptions(Options):
    """Time of a generated token and memory held after contexts that are really read, block by block.

    The peer is the same model with a cache of all keys and values, which holds random numbers; through transformers it
    is a Llama of that shape. A round is one block of tokens for each context, taken in turns token by token.
    """

    through: str = field(metadata=told("megatron", "megatron", "megatron, or transformers: the exported class", False))
    contexts: tuple[int, ...] = field(
        metadata=told((), (), "tokens read before (default 4096,65536,1048576; transformers 4096,262144)", False)
    )
    layers: int = field(metadata=told(1, 12, "layers"))
    hidden: int = field(metadata=told(128, 768, "width of the residual stream"))
    heads: int = field(metadata=told(2, 12, "query heads"))
    kv_heads: int = field(metadata=told(2, 12, "key/value heads"))
    head_dim: int = field(metadata=told(64, 64, "dimension of a head"))
    ffn: int = field(metadata=told(384, 2048, "inner width of the MLP"))
    vocabulary: int = field(metadata=told(256, 32000, "size of the vocabulary"))
    block: int = field(metadata=told(512, 2048, "tokens per block, L"))
    slots: int = field(metadata=told(128, 512, "memory slots, S"))
    order: int = field(metadata=told(128, 540, "order of the memory, N"))
    precision: str = field(metadata=told("fp32", "bf16", "fp32 or bf16"))
    peer_every: int = field(metadata=told(32, 32, "the peer writes a token in every so many turns", False))


@dataclass(frozen=True)
class DataOptions(Options):
    """The loader alone, from encoded shards to tensors, on one core.

    The peer is Megatron-Core's GPTDataset on the same documents; a plain webdataset pipeline runs beside it. Then so many
    samples go by while the memory of the process is read.
    """

    threads: int = field(metadata=told(1, 1, "CPU threads", False))
    length: int = field(metadata=told(32768, 32768, "tokens of a sample, T"))
    block: int = field(metadata=told(2048, 2048, "tokens per block, L"))
    tokens: int = field(metadata=told(1 << 26, 1 << 26, "tokens of the corpus that is made"))
    shards: int = field(metadata=told(8, 8, "its shards"))
    group: int = field(metadata=told(4, 4, "shards whose documents are mixed, data.shuffle_shards"))
    memory_samples: int = field(metadata=told(100_000, 100_000, "samples read for the memory"))


SUBCOMMANDS: dict[str, type[Options]] = {
    "memory": MemoryOptions,
    "attention": AttentionOptions,
    "layer": LayerOptions,
    "step": StepOptions,
    "decode": DecodeOptions,
    "data": DataOptions,
}


class _Parser(argparse.ArgumentParser):
    """Refuses in one sentence, which the entry point prints."""

    def error(self, message: str) -> NoReturn:
        raise ConfigError(f"{message} (see {self.prog} --help)")


def parse(arguments: Sequence[str] | None) -> tuple[str, dict[str, Any]]:
    """The subcommand, and the options that were given.

    Raises:
        ConfigError: an unknown subcommand or option, or a value that cannot be read.
    """
    parser = _Parser(
        prog="benchmark.py",
        description="Measures speed and memory, always beside what a user would pick instead, in one run. Writes "
        "report.json, report.md and report.png, and prints the second.",
        epilog="benchmark.py SUBCOMMAND --help lists the options of one.",
        allow_abbrev=False,
    )
    subparsers = parser.add_subparsers(dest="subcommand", required=True, metavar="SUBCOMMAND", parser_class=_Parser)
    for name, options in SUBCOMMANDS.items():
        text = " ".join((options.__doc__ or "").split())
        sub = subparsers.add_parser(name, help=text.split(". ")[0], description=text, allow_abbrev=False)
        for item in dataclasses.fields(options):
            sub.add_argument(
                f"--{item.name.replace('_', '-')}", default=argparse.SUPPRESS, metavar="X", help=_help(item)
            )
    given = vars(parser.parse_args(arguments))
    return given.pop("subcommand"), given


def _help(item: dataclasses.Field[Any]) -> str:
    cpu, gpu = (_spelled(item.metadata[kind]) for kind in ("cpu", "gpu"))
    default = f"default {cpu}" if cpu == gpu else f"default {cpu} on the CPU, {gpu} on a GPU"
    return (item.metadata["help"] + (f" ({default})" if cpu else "")).replace("%", "%%")


def _spelled(value: Any) -> str:
    return ",".join(map(str, value)) if isinstance(value, tuple) else str(value)


def resolve(subcommand: str, given: dict[str, Any], device_type: str) -> Any:
    """The options of a subcommand, typed, with the defaults of the device where nothing was given.

    Args:
        subcommand: one of SUBCOMMANDS.
        given: text by option.
        device_type: cpu or cuda.

    Raises:
        ConfigError: a value that cannot be.
    """
    cls = SUBCOMMANDS[subcommand]
    hints = typing.get_type_hints(cls)
    values = {}
    for item in dataclasses.fields(cls):
        default = item.metadata["cpu" if device_type == "cpu" else "gpu"]
        values[item.name] = _read(item.name, hints[item.name], given[item.name]) if item.name in given else default
    if values.get("contexts") == ():
        values["contexts"] = CONTEXTS.get(values["through"], ())
    _check(values)
    return cls(**values)


def at_default_shapes(options: Options, device_type: str) -> bool:
    """Whether everything that the stated targets depend on has its default."""
    kind = "cpu" if device_type == "cpu" else "gpu"
    shaping = [item for item in dataclasses.fields(options) if item.metadata["shapes"]]
    return all(getattr(options, item.name) == item.metadata[kind] for item in shaping)


def _read(name: str, kind: Any, text: str) -> Any:
    try:
        if kind in (int, float, str):
            return kind(text)
        if kind == tuple[str, ...]:
            return tuple(part for part in text.split(",") if part)
        return tuple(int(part) for part in text.split(","))
    except ValueError:
        wanted = {int: "a whole number", float: "a number"}.get(kind, "whole numbers with commas between them")
        raise ConfigError(f"--{name.replace('_', '-')} '{text}' is not {wanted}") from None


def _check(values: dict[str, Any]) -> None:
    free = ("threads", "seed", "flex", "seconds", "bank_limit")
    for name, value in values.items():
        numbers = value if isinstance(value, tuple) else (value,)
        least = 0 if name in free else 1
        if any(isinstance(number, int | float) and number < least for number in numbers):
            raise ConfigError(f"--{name.replace('_', '-')} {_spelled(value)} must be at least {least}")
    for name, allowed in (("dtype", DTYPES), ("precision", PRECISIONS), ("through", tuple(CONTEXTS))):
        if values.get(name, allowed[0]) not in allowed:
            raise ConfigError(f"--{name} '{values[name]}' is unknown: choose one of {', '.join(allowed)}")
    for name in values.get("kinds", ()):
        if name not in KINDS:
            raise ConfigError(f"--kinds '{name}' is unknown: choose some of {', '.join(KINDS)}")
    for name in ("length", "lengths", "contexts"):
        lengths = values.get(name, ())
        for length in lengths if isinstance(lengths, tuple) else (lengths,):
            if length % values["block"]:
                raise ConfigError(f"--{name} {length} is not a whole number of blocks of {values['block']} tokens")
    if values.get("heads", 0) % values.get("kv_heads", 1):
        raise ConfigError(f"--heads {values['heads']} is not a multiple of --kv-heads {values['kv_heads']}")
