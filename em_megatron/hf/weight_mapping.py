"""Megatron's weights and their Hugging Face names: one table of rows, read in both directions.

    linear_qkv   for each key/value head: the rows of its query heads, then of its key, then of its value
    linear_fc1   the gate's rows, then those of the way up; on a tensor rank its part of each

Names and shapes on the right are those of Llama, so that the same rows read a Llama-style model.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from em_megatron.config import MemoryConfig, ModelConfig
from em_megatron.hf.kinds_elastic_memory import PARAMETERS
from em_megatron.kinds import kind_of
from em_megatron.model.sizes import Shape, memory_layers, shape_of


class ConversionError(RuntimeError):
    """Weights or a folder that cannot be converted; the message says what and how to mend it."""


@dataclass(frozen=True)
class Row:
    """One tensor of Megatron's.

    megatron: its key in a distributed checkpoint, and its name in a model of one pipeline stage.
    hugging_face: the tensors it holds.
    shape: of the whole tensor in Megatron.
    split: which dimension tensor-parallel ranks share, None where each holds all of it.
    layout: how the tensors on the right lie in it.
    """

    megatron: str
    hugging_face: tuple[str, ...]
    shape: tuple[int, ...]
    split: int | None
    layout: Literal["alone", "qkv", "gated"] = "alone"


def table(model: ModelConfig, vocab_size: int, memory: MemoryConfig) -> list[Row]:
    """The rows of a model with such a memory; `vocab_size` is the padded one."""
    shape, hidden = shape_of(model), shape_of(model).hidden_size
    rows = [_row("embedding.word_embeddings.weight", "model.embed_tokens.weight", (vocab_size, hidden), 0)]
    whole = kind_of(memory).whole_layers
    query, key = shape.num_attention_heads * shape.kv_channels, shape.num_query_groups * shape.kv_channels
    for layer in range(shape.num_layers):
        attention, mlp = f"decoder.layers.{2 * layer}", f"decoder.layers.{2 * layer + 1}"  # sub-layers alternate
        if whole:
            attention = mlp = f"decoder.layers.{layer}"
        linear = attention if whole else f"{attention}.self_attention"
        there = f"model.layers.{layer}"
        qkv = tuple(f"{there}.self_attn.{name}_proj.weight" for name in "qkv")
        gated = tuple(f"{there}.mlp.{name}_proj.weight" for name in ("gate", "up"))
        rows += [
            _row(f"{attention}.input_layernorm.weight", f"{there}.input_layernorm.weight", (hidden,), None),
            Row(f"{linear}.linear_qkv.weight", qkv, (query + 2 * key, hidden), 0, "qkv"),
            _row(f"{linear}.linear_proj.weight", f"{there}.self_attn.o_proj.weight", (hidden, query), 1),
            _row(f"{mlp}.pre_mlp_layernorm.weight", f"{there}.post_attention_layernorm.weight", (hidden,), None),
            Row(f"{mlp}.mlp.linear_fc1.weight", gated, (2 * shape.ffn_hidden_size, hidden), 0, "gated"),
            _row(f"{mlp}.mlp.linear_fc2.weight", f"{there}.mlp.down_proj.weight", (hidden, shape.ffn_hidden_size), 1),
        ]
        if model.qk_layernorm:
            rows += [
                _row(
                    f"{linear}.{name}_layernorm.weight",
                    f"{there}.self_attn.{name}_norm.weight",
                    (shape.kv_channels,),
                    None,
                )
                for name in "qk"
            ]
    rows += _kind_rows(memory, shape)
    rows.append(_row("decoder.final_norm.weight", "model.norm.weight", (hidden,), None))
    if not model.share_embeddings_and_output_weights:
        rows.append(_row("output_layer.weight", "lm_head.weight", (vocab_size, hidden), 0))
    return rows


def _kind_rows(memory: MemoryConfig, shape: Shape) -> Iterator[Row]:
    """The memory kind's own parameters."""
    layers = memory_layers(memory, shape.num_layers)
    for layer in layers:
        for name in PARAMETERS.get(memory.kind, ()):
            here, there = f"decoder.layers.{2 * layer}.self_attention.core_attention", f"model.layers.{layer}.self_attn"
            yield _row(f"{here}.{name}", f"{there}.{name}", (shape.num_attention_heads,), 0)
    if memory.kind != "melodi":
        return
    tokens, width = memory.short_term_tokens, memory.block_length + memory.short_term_tokens
    yield _row("decoder.summary_tokens.weight", "model.summary_tokens", (tokens, shape.hidden_size), None)
    for layer in range(shape.num_layers):
        here, there = f"decoder.layers.{layer}", f"model.layers.{layer}"
        yield _row(f"{here}.mixer_norm.weight", f"{there}.mixer_norm.weight", (shape.hidden_size,), None)
        mixers = {"short_mixer": tokens}
        mixers |= {"summary_mixer": tokens} if layer + 1 < shape.num_layers else {}
        mixers |= {"long_mixer": memory.long_term_increment} if layer in layers else {}
        for name, count in mixers.items():
            yield _row(f"{here}.{name}.weight", f"{there}.{name}.weight", (count, width), None)
            yield _row(f"{here}.{name}.bias", f"{there}.{name}.bias", (count,), None)
        if layer in layers:
            gate = (shape.num_attention_heads * shape.kv_channels,)
            yield _row(f"{here}.long_gate.weight", f"{there}.long_gate", gate, 0)


def _row(megatron: str, hugging_face: str, shape: tuple[int, ...], split: int | None) -> Row:
    return Row(megatron, (hugging_face,), shape, split)


def shapes_there(row: Row, shape: Shape) -> dict[str, tuple[int, ...]]:
    """The Hugging Face tensors of a row and their shapes."""
    parts = to_hugging_face(row, torch.empty(row.shape, device="meta"), shape)
    return {name: tuple(part.shape) for name, part in parts.items()}


def to_hugging_face(row: Row, weight: Tensor, shape: Shape) -> dict[str, Tensor]:
    """A whole Megatron tensor → its Hugging Face tensors by name, some of them views of it."""
    if row.layout == "alone":
        return {row.hugging_face[0]: weight}
    if row.layout == "gated":
        return dict(zip(row.hugging_face, weight.chunk(2), strict=True))
    groups, dim = shape.num_query_groups, shape.kv_channels
    heads = weight.view(groups, -1, dim, weight.shape[1])
    parts = (heads[:, :-2], heads[:, -2], heads[:, -1])
    return dict(zip(row.hugging_face, (part.reshape(-1, weight.shape[1]) for part in parts), strict=True))


def to_megatron(row: Row, weights: Mapping[str, Tensor], shape: Shape) -> Tensor:
    """The Hugging Face tensors of a row → Megatron's whole tensor."""
    parts = [weights[name] for name in row.hugging_face]
    if row.layout == "alone":
        return parts[0]
    if row.layout == "gated":
        return torch.cat(parts)
    groups, dim = shape.num_query_groups, shape.kv_channels
    return torch.cat([part.view(groups, -1, dim, part.shape[1]) for part in parts], 1).reshape(-1, parts[0].shape[1])


def tensor_parallel_part(row: Row, weight: Tensor, rank: int, size: int) -> Tensor:
    """What tensor-parallel rank `rank` of `size` holds of Megatron's whole tensor."""
    if row.split is None:
        return weight
    if row.layout == "gated":
        return torch.cat([half.chunk(size)[rank] for half in weight.chunk(2)])
    return weight.chunk(size, row.split)[rank]


def check_complete(expected: Mapping[str, Sequence[int]], found: Mapping[str, Sequence[int]], where: str) -> None:
    """Compares names and shapes.

    Raises:
        ConversionError: a tensor that the table lacks, one that is missing, or one of another shape.
    """
    unknown, missing = sorted(found.keys() - expected.keys()), sorted(expected.keys() - found.keys())
    problems = [
        f"{len(names)} tensors {what}, such as {names[0]}"
        for what, names in (("have no row in the table", unknown), ("are missing", missing))
        if names
    ]
    problems += list(_other_shapes(expected, found))[:1]
    if problems:
        raise ConversionError(f"{where} does not hold the model its configuration describes: {'; '.join(problems)}")


def _other_shapes(expected: Mapping[str, Sequence[int]], found: Mapping[str, Sequence[int]]) -> Iterator[str]:
    for name in sorted(expected.keys() & found.keys()):
        if tuple(expected[name]) != tuple(found[name]):
            yield f"{name} is {list(found[name])} instead of {list(expected[name])}"
