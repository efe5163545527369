"""What a candidate cannot avoid: multiply-adds (counted as 2 FLOPs) and bytes that must move once.

    floor time = max(bytes / measured rate of a copy or sum, FLOPs / measured rate of a matrix product in the dtype)

Legend: T tokens, L block length, B = T/L blocks, S slots, N order, m blocks of a superchunk, hq and hk query and KV
heads, d head dimension, e bytes per number, b = 1 sample. Small working sets may live in caches, which are faster than
large tensors are copied: there a candidate can be below its floor of bytes.
"""

from __future__ import annotations

from dataclasses import dataclass

from em_megatron.hippo.cost_model import memory_cost, plan
from em_megatron.model.sizes import Shape


@dataclass(frozen=True)
class Work:
    """FLOPs to do and bytes to move."""

    flops: float
    bytes: float

    def __add__(self, other: Work) -> Work:
        return Work(self.flops + other.flops, self.bytes + other.bytes)

    def __mul__(self, times: float) -> Work:
        return Work(self.flops * times, self.bytes * times)


@dataclass(frozen=True)
class Heads:
    """hq, hk, d and e of an attention."""

    query: int
    kv: int
    dim: int
    itemsize: int


@dataclass(frozen=True)
class MemorySizes:
    """N, S, L and T of a memory, and m: 0 takes the planner's."""

    order: int
    slots: int
    block: int
    tokens: int
    superchunk: int = 0

    @property
    def blocks(self) -> int:
        return self.tokens // self.block

    @property
    def m(self) -> int:
        return self.superchunk or plan(self.blocks, self.order, self.slots, self.block)


def causal_pairs(tokens: int) -> int:
    """Query-key pairs of causal attention: T(T+1)/2."""
    return tokens * (tokens + 1) // 2


def trapezoid_pairs(tokens: int, block: int, slots: int) -> int:
    """Query-key pairs of trapezoidal attention: B triangles of L(L+1)/2, and rectangles L×S for all but the first."""
    blocks = tokens // block
    return blocks * causal_pairs(block) + (blocks - 1) * block * slots


def attention_flops(pairs: float, heads: Heads, backward: bool) -> float:
    """4·d·hq FLOPs per pair forward (QKᵀ and PV); backward 2.5 times as many (QKᵀ again, dV, dP, dQ, dK)."""
    return 4.0 * heads.dim * heads.query * pairs * (3.5 if backward else 1.0)


def attention_work(tokens: int, key_rows: int, pairs: float, heads: Heads, backward: bool) -> Work:
    """Attention whose inputs and outputs move once.

    Forward reads q [T, hq, d] and keys and values [key_rows, hk, d] each, and writes out. Backward reads these and the
    gradient of out, and writes three gradients.
    """
    queries, keys = tokens * heads.query * heads.dim, 2 * key_rows * heads.kv * heads.dim
    moved = 2 * queries + keys
    if backward:
        moved += (3 * queries + keys) + (queries + keys)
    return Work(attention_flops(pairs, heads, backward), float(moved * heads.itemsize))


def memory_work(sizes: MemorySizes, heads: Heads, backward: bool) -> Work:
    """The memory operator of one factorisation (`cost_model.memory_cost`) on 2·d·hk channels.

    The matrices have no gradient, so backward is the transposed map: as many FLOPs again. Forward reads the signal
    [T, channels] and the matrices and writes the slots [B·S, channels]; backward the same with the roles exchanged.
    A carry counts as the triangle that it is.
    """
    channels, shape = 2 * heads.dim * heads.kv, (sizes.blocks, sizes.m, sizes.order, sizes.slots, sizes.block)
    numbers = channels * (sizes.tokens + sizes.blocks * sizes.slots) + matrix_elements(*shape)
    once = Work(2.0 * channels * memory_cost(*shape), float(numbers * heads.itemsize))
    return once * (2 if backward else 1)


def matrix_elements(blocks: int, superchunk: int, order: int, slots: int, block: int) -> int:
    """Numbers in the memory's matrices that are not zero by construction: triangles of S×L tiles, reads, carries, writes."""
    elements = 0
    for start in range(0, blocks, superchunk):
        size = min(superchunk, blocks - start)
        elements += slots * block * (size * (size - 1) // 2)
        elements += slots * order * size if start else 0
        if start + size < blocks:
            elements += order * block * size + (order * (order + 1) // 2 if start else 0)
    return elements


def per_token_work(order: int, tokens: int, heads: Heads) -> Work:
    """The recurrence token by token: a triangular carry [N, N] and an outer product, on 2·d·hk channels.

    The carry of every token is another matrix, read once; the state [N, channels] is read and written.
    """
    channels, triangle = 2 * heads.dim * heads.kv, order * (order + 1) // 2
    numbers = triangle + order + channels * (2 * order + 1)
    return Work(2.0 * channels * (triangle + order), float(numbers * heads.itemsize)) * tokens


def layer_weights(shape: Shape) -> int:
    """Numbers in a layer's matrices: query, key, value and output projections, and the three of the SwiGLU MLP."""
    projected = 2 * shape.num_attention_heads * shape.kv_channels + 2 * shape.num_query_groups * shape.kv_channels
    return shape.hidden_size * projected + 3 * shape.hidden_size * shape.ffn_hidden_size


def heads_of(shape: Shape, itemsize: int) -> Heads:
    return Heads(shape.num_attention_heads, shape.num_query_groups, shape.kv_channels, itemsize)


def layer_work(shape: Shape, tokens: int, memory: MemorySizes | None, itemsize: int, backward: bool) -> Work:
    """One layer: 2 FLOPs per weight and token forward, 4 more backward; its attention; its memory if it has one.

    `memory` None with the block length `tokens` is causal attention over the whole sample; block-local attention is a
    memory of no slots. Weights are read forward and again backward, their gradients written; the layer's input and output
    move once forward, with their gradients once more backward. What lies between is left out.
    """
    heads, weights = heads_of(shape, itemsize), layer_weights(shape)
    pairs = trapezoid_pairs(tokens, memory.block, memory.slots) if memory else causal_pairs(tokens)
    edges, (passes, directions) = 2 * tokens * shape.hidden_size, (3, 2) if backward else (1, 1)
    matrices = Work(2.0 * passes * weights * tokens, float(itemsize * (passes * weights + directions * edges)))
    found = matrices + Work(attention_flops(pairs, heads, backward), 0.0)
    if memory is not None and memory.slots:
        found = found + Work(memory_work(memory, heads, backward).flops, 0.0)
    return found


def step_work(
    shape: Shape, samples: int, tokens: int, memory: MemorySizes | None, vocabulary: int, parameters: int, itemsize: int
) -> Work:
    """A training step of `samples` samples of T tokens: its layers, the output layer, and the optimizer's numbers.

    Per parameter AdamW reads the fp32 gradient, and reads and writes fp32 weight and two moments (28 bytes); below fp32
    it writes the computing weight as well.
    """
    layers = layer_work(shape, tokens, memory, itemsize, backward=True) * shape.num_layers
    output = Work(6.0 * vocabulary * shape.hidden_size * tokens, float(3 * vocabulary * shape.hidden_size * itemsize))
    optimizer = Work(0.0, float(parameters * (28 + (itemsize if itemsize < 4 else 0))))
    return (layers + output) * samples + optimizer


def token_work(shape: Shape, keys: float, vocabulary: int, itemsize: int) -> Work:
    """Generating a token that sees `keys` keys in every layer: all weights and all these keys and values are read once."""
    heads = heads_of(shape, itemsize)
    weights = shape.num_layers * layer_weights(shape) + vocabulary * shape.hidden_size
    cached = shape.num_layers * 2 * keys * heads.kv * heads.dim
    flops = 2.0 * weights + shape.num_layers * attention_flops(keys, heads, backward=False)
    return Work(flops, float(itemsize * (weights + cached)))
