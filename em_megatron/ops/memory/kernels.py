"""Triton kernels of the memory operator: four stacked matrix products, for keys and values together.

Legend: L block length, P the order N rounded up to ORDER_MULTIPLE (the rows and columns beyond N are zero), S slots,
m blocks of a superchunk, d head dimension, T tokens, b samples, B blocks, h KV heads.

    p_key, p_value            [T, b, h, d] strided, d adjacent
    p_dkey, p_dvalue          [T, b, h, d] contiguous
    p_states, p_dstates       [P, states, h, 2d] contiguous fp32, keys and values side by side
    p_slot_keys, p_slot_values, their gradients    [B, b, h, S, d] contiguous, as attention reads them
    p_triangle                G packed: row i of blocks is [S, i·L], one after another, nothing stored above the diagonal
    p_read_carry              A stacked over the blocks of the superchunk, [m·S, P]
    p_carry, p_inject         [P, P] and [P, m·L], fp32
    p_table                   int32, one line per program of the last grid axis: the document, block and states it serves
                              (`schedule.py` says what is in a line); a state of −1 is none

The carry is multiplied in three TF32 products whatever the inputs are: one would cut what it does not hold off the states
at every superchunk, always towards zero, and that adds up over a long history.
"""

from __future__ import annotations

import triton
import triton.language as tl

from em_megatron.ops.tiles import Tiles, dot, tuned

ORDER_MULTIPLE = 64  # so that tiles over the order need no masks

# BLOCK_M rows of the result, BLOCK_K of the sum; a program holds two accumulators [BLOCK_M, d], keys and values.
CONFIGS: list[Tiles] = [
    {"BLOCK_M": 128, "BLOCK_K": 64, "num_warps": 8, "num_stages": 3},
    {"BLOCK_M": 128, "BLOCK_K": 32, "num_warps": 8, "num_stages": 3},
    {"BLOCK_M": 64, "BLOCK_K": 64, "num_warps": 4, "num_stages": 3},
    {"BLOCK_M": 64, "BLOCK_K": 32, "num_warps": 4, "num_stages": 2},
]
# Of the kernels that move states, whose fp32 tiles are three times as many.
STATE_CONFIGS: list[Tiles] = [
    {"BLOCK_M": 64, "BLOCK_K": 32, "num_warps": 8, "num_stages": 3},
    {"BLOCK_M": 64, "BLOCK_K": 32, "num_warps": 8, "num_stages": 2},
    {"BLOCK_M": 64, "BLOCK_K": 16, "num_warps": 8, "num_stages": 3},
    {"BLOCK_M": 64, "BLOCK_K": 16, "num_warps": 4, "num_stages": 2},
]


def fits(tiles: Tiles, width: int, itemsize: int, limit: int) -> bool:
    """Whether the tiles of the matrix, of keys and of values fit shared memory in every stage, and fp32 ones registers."""
    if tiles["BLOCK_K"] * itemsize > 128:
        return False
    return tiles["num_stages"] * tiles["BLOCK_K"] * (tiles["BLOCK_M"] + 2 * width) * itemsize <= limit


@triton.jit
def _product(acc_k, acc_v, p_matrix, stride_matrix, p_k, stride_k, p_v, stride_v, m_m, m_d, K,
             BLOCK_K: tl.constexpr, EVEN: tl.constexpr, PRECISION: tl.constexpr):  # fmt: skip
    """acc + matrix · x for x = keys and values, the sum running over K; EVEN says that no tile sticks out.

    p_matrix points at rows [BLOCK_M, 1], p_k and p_v at channels [1, BLOCK_D].
    """
    for o in range(0, K, BLOCK_K):
        o_k = o + tl.arange(0, BLOCK_K)
        o_x = o_k[:, None].to(tl.int64)
        if EVEN:
            b_matrix = tl.load(p_matrix + o_k[None, :] * stride_matrix)  # [BLOCK_M, BLOCK_K]
            b_k = tl.load(p_k + o_x * stride_k)  # [BLOCK_K, BLOCK_D]
            b_v = tl.load(p_v + o_x * stride_v)
        else:
            m_k = o_k < K
            b_matrix = tl.load(p_matrix + o_k[None, :] * stride_matrix, mask=m_m[:, None] & m_k[None, :], other=0.0)
            b_k = tl.load(p_k + o_x * stride_k, mask=m_k[:, None] & m_d[None, :], other=0.0)
            b_v = tl.load(p_v + o_x * stride_v, mask=m_k[:, None] & m_d[None, :], other=0.0)
        acc_k = dot(b_matrix, b_k.to(b_matrix.dtype), acc_k, PRECISION)
        acc_v = dot(b_matrix, b_v.to(b_matrix.dtype), acc_v, PRECISION)
    return acc_k, acc_v


@triton.jit
def _carried(acc_k, acc_v, p_carry, stride_m, stride_k, p_c, stride_c, o_m, m_m, m_d, start, stop,
             D: tl.constexpr, BLOCK_K: tl.constexpr):  # fmt: skip
    """acc + carry · C, or carryᵀ · C with exchanged strides, over the columns start … stop − 1 that are not zero.

    o_m: rows of the result [BLOCK_M]; p_c points at the channels of the keys [1, BLOCK_D] of row 0 of C.
    """
    for o in range(start, stop, BLOCK_K):
        o_k = o + tl.arange(0, BLOCK_K)
        b_carry = tl.load(p_carry + o_m[:, None] * stride_m + o_k[None, :] * stride_k, mask=m_m[:, None], other=0.0)
        b_k = tl.load(p_c + o_k[:, None].to(tl.int64) * stride_c, mask=m_d[None, :], other=0.0)
        b_v = tl.load(p_c + D + o_k[:, None].to(tl.int64) * stride_c, mask=m_d[None, :], other=0.0)
        acc_k = dot(b_carry, b_k, acc_k, "tf32x3")
        acc_v = dot(b_carry, b_v, acc_v, "tf32x3")
    return acc_k, acc_v


@tuned(
    CONFIGS,
    ["S", "L", "P", "D", "HAS_TOKENS", "HAS_STATES"],
    "p_read_carry",
    fits,
    restore_value=["p_slot_keys", "p_slot_values"],
)
@triton.jit(do_not_specialize=["states"])
def read_kernel(
    p_key, p_value, p_states, p_triangle, p_read_carry, p_table, p_slot_keys, p_slot_values,
    stride_kt, stride_kb, stride_kh, stride_vt, stride_vb, stride_vh, rows, states,
    S: tl.constexpr, L: tl.constexpr, P: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr,
    HAS_TOKENS: tl.constexpr, HAS_STATES: tl.constexpr, ACCUMULATE: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """M_i = A(i) C + Σ_{j<i} G(i,j) X_j. Grid: heads × tiles of S × blocks that read.

    Line: block at hand, sample, first token of the superchunk, i, state.
    """
    i_h, heads = tl.program_id(0), tl.num_programs(0)
    p_line = p_table + tl.program_id(2) * 5
    i_block, i_row, t_first = (
        tl.load(p_line).to(tl.int64),
        tl.load(p_line + 1).to(tl.int64),
        tl.load(p_line + 2).to(tl.int64),
    )
    i, state = tl.load(p_line + 3), tl.load(p_line + 4)
    o_m, o_d = tl.program_id(1) * BLOCK_M + tl.arange(0, BLOCK_M), tl.arange(0, BLOCK_D)
    m_m, m_d = o_m < S, o_d < D
    acc_k = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
    acc_v = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
    EVEN_M: tl.constexpr = S % BLOCK_M == 0 and D == BLOCK_D
    if HAS_STATES:
        stride_c = states * heads * 2 * D
        p_c = p_states + (state * heads + i_h) * 2 * D + o_d[None, :]
        p_rows = p_read_carry + i.to(tl.int64) * S * P + o_m[:, None] * P
        acc_k, acc_v = _product(acc_k, acc_v, p_rows, 1, p_c, stride_c, p_c + D, stride_c, m_m, m_d,
                                tl.where(state >= 0, P, 0), BLOCK_K, EVEN_M, PRECISION)  # fmt: skip
    if HAS_TOKENS:
        p_k = p_key + t_first * stride_kt + i_row * stride_kb + i_h * stride_kh + o_d[None, :]
        p_v = p_value + t_first * stride_vt + i_row * stride_vb + i_h * stride_vh + o_d[None, :]
        p_rows = p_triangle + (i * (i - 1) // 2).to(tl.int64) * S * L + o_m[:, None] * (i * L)
        acc_k, acc_v = _product(acc_k, acc_v, p_rows, 1, p_k, stride_kt, p_v, stride_vt, m_m, m_d, i * L,
                                BLOCK_K, EVEN_M and L % BLOCK_K == 0, PRECISION)  # fmt: skip
    o_out = (((i_block * rows + i_row) * heads + i_h).to(tl.int64) * S + o_m[:, None]) * D + o_d[None, :]
    m_out = m_m[:, None] & m_d[None, :]
    if ACCUMULATE:
        acc_k += tl.load(p_slot_keys + o_out, mask=m_out, other=0.0).to(tl.float32)
        acc_v += tl.load(p_slot_values + o_out, mask=m_out, other=0.0).to(tl.float32)
    tl.store(p_slot_keys + o_out, acc_k.to(p_slot_keys.dtype.element_ty), mask=m_out)
    tl.store(p_slot_values + o_out, acc_v.to(p_slot_values.dtype.element_ty), mask=m_out)


@tuned(STATE_CONFIGS, ["L", "P", "D", "HAS_TOKENS", "HAS_STATES"], "p_inject", fits)
@triton.jit(do_not_specialize=["states"])
def write_kernel(
    p_key, p_value, p_states, p_carry, p_inject, p_table,
    stride_kt, stride_kb, stride_kh, stride_vt, stride_vb, stride_vh, states, tokens,
    L: tl.constexpr, P: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr,
    HAS_TOKENS: tl.constexpr, HAS_STATES: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """C_out = carry · C_in + inject · X over the `tokens` of a superchunk. Grid: heads × tiles of P × documents.

    Line: sample, first token of the superchunk, state in, state out.
    """
    i_h, heads = tl.program_id(0), tl.num_programs(0)
    p_line = p_table + tl.program_id(2) * 4
    i_row, t_first = tl.load(p_line).to(tl.int64), tl.load(p_line + 1).to(tl.int64)
    state_in, state_out = tl.load(p_line + 2), tl.load(p_line + 3)
    o_m, o_d = tl.program_id(1) * BLOCK_M + tl.arange(0, BLOCK_M), tl.arange(0, BLOCK_D)
    m_m, m_d = o_m < P, o_d < D
    acc_k = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
    acc_v = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
    stride_c = states * heads * 2 * D
    if HAS_STATES:  # noqa: SIM102  (the first is decided when compiling)
        if state_in >= 0:
            p_c = p_states + (state_in * heads + i_h) * 2 * D + o_d[None, :]
            stop = tl.minimum((tl.program_id(1) + 1) * BLOCK_M, P)  # beyond it the carry is zero
            acc_k, acc_v = _carried(acc_k, acc_v, p_carry, P, 1, p_c, stride_c, o_m, m_m, m_d, 0, stop,
                                    D, BLOCK_K)  # fmt: skip
    if HAS_TOKENS:
        p_k = p_key + t_first * stride_kt + i_row * stride_kb + i_h * stride_kh + o_d[None, :]
        p_v = p_value + t_first * stride_vt + i_row * stride_vb + i_h * stride_vh + o_d[None, :]
        EVEN: tl.constexpr = P % BLOCK_M == 0 and D == BLOCK_D and L % BLOCK_K == 0
        acc_k, acc_v = _product(acc_k, acc_v, p_inject + o_m[:, None].to(tl.int64) * tokens, 1, p_k, stride_kt, p_v, stride_vt,
                                m_m, m_d, tokens, BLOCK_K, EVEN, PRECISION)  # fmt: skip
    p_out = p_states + (state_out * heads + i_h) * 2 * D + o_m[:, None].to(tl.int64) * stride_c + o_d[None, :]
    tl.store(p_out, acc_k, mask=m_m[:, None] & m_d[None, :])
    tl.store(p_out + D, acc_v, mask=m_m[:, None] & m_d[None, :])


@tuned(CONFIGS, ["S", "L", "P", "D", "HAS_TOKENS", "HAS_STATES"], "p_inject", fits)
@triton.jit(do_not_specialize=["states"])
def signal_gradient_kernel(
    p_dslot_keys, p_dslot_values, p_dstates, p_triangle, p_inject, p_table, p_dkey, p_dvalue,
    rows, states, tokens,
    S: tl.constexpr, L: tl.constexpr, P: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr,
    HAS_TOKENS: tl.constexpr, HAS_STATES: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """dX_j = Σ_{i>j} G(i,j)ᵀ dM_i + inject_jᵀ dC. Grid: heads × tiles of L × blocks.

    Line: sample, first token of the superchunk, first block at hand of the superchunk, j, its blocks, state out.
    """
    i_h, heads = tl.program_id(0), tl.num_programs(0)
    p_line = p_table + tl.program_id(2) * 6
    i_row, t_first, first_block = tl.load(p_line), tl.load(p_line + 1), tl.load(p_line + 2)
    j, blocks, state = tl.load(p_line + 3), tl.load(p_line + 4), tl.load(p_line + 5)
    o_m, o_d = tl.program_id(1) * BLOCK_M + tl.arange(0, BLOCK_M), tl.arange(0, BLOCK_D)
    m_m, m_d = o_m < L, o_d < D
    acc_k = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
    acc_v = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
    EVEN_M: tl.constexpr = L % BLOCK_M == 0 and D == BLOCK_D
    if HAS_STATES:
        stride_c = states * heads * 2 * D
        p_c = p_dstates + (state * heads + i_h) * 2 * D + o_d[None, :]
        acc_k, acc_v = _product(acc_k, acc_v, p_inject + j * L + o_m[:, None], tokens, p_c, stride_c, p_c + D, stride_c,
                                m_m, m_d, tl.where(state >= 0, P, 0), BLOCK_K, EVEN_M, PRECISION)  # fmt: skip
    if HAS_TOKENS:
        tiles: tl.constexpr = (S + BLOCK_K - 1) // BLOCK_K
        for step in range(0, (blocks - 1 - j) * tiles):
            i, o_k = j + 1 + step // tiles, step % tiles * BLOCK_K + tl.arange(0, BLOCK_K)
            p_rows = p_triangle + (i * (i - 1) // 2).to(tl.int64) * S * L + j * L
            p_tile = p_rows + o_m[:, None] + o_k[None, :] * (i * L)
            at = (((first_block + i) * rows + i_row) * heads + i_h).to(tl.int64) * S * D
            o_x = at + o_k[:, None] * D + o_d[None, :]
            if EVEN_M and S % BLOCK_K == 0:
                b_matrix = tl.load(p_tile)
                b_k, b_v = tl.load(p_dslot_keys + o_x), tl.load(p_dslot_values + o_x)
            else:
                m_k = o_k < S
                b_matrix = tl.load(p_tile, mask=m_m[:, None] & m_k[None, :], other=0.0)
                b_k = tl.load(p_dslot_keys + o_x, mask=m_k[:, None] & m_d[None, :], other=0.0)
                b_v = tl.load(p_dslot_values + o_x, mask=m_k[:, None] & m_d[None, :], other=0.0)
            acc_k = dot(b_matrix, b_k.to(b_matrix.dtype), acc_k, PRECISION)
            acc_v = dot(b_matrix, b_v.to(b_matrix.dtype), acc_v, PRECISION)
    t = (t_first + j * L + o_m[:, None]).to(tl.int64)
    o_out = ((t * rows + i_row) * heads + i_h) * D + o_d[None, :]
    m_out = m_m[:, None] & m_d[None, :]
    tl.store(p_dkey + o_out, acc_k.to(p_dkey.dtype.element_ty), mask=m_out)
    tl.store(p_dvalue + o_out, acc_v.to(p_dvalue.dtype.element_ty), mask=m_out)


@tuned(STATE_CONFIGS, ["S", "P", "D", "HAS_TOKENS", "HAS_STATES"], "p_carry", fits, restore_value=["p_dstates"])
@triton.jit(do_not_specialize=["states"])
def state_gradient_kernel(
    p_dslot_keys, p_dslot_values, p_dstates, p_read_carry, p_carry, p_table, rows, states,
    S: tl.constexpr, P: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr,
    HAS_TOKENS: tl.constexpr, HAS_STATES: tl.constexpr, ACCUMULATE: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """dC_in = Σ_i A(i)ᵀ dM_i + carryᵀ dC_out (+ dC_in). Grid: heads × tiles of P × documents.

    Line: sample, first block at hand of the superchunk, its blocks, state in, state out.
    """
    i_h, heads = tl.program_id(0), tl.num_programs(0)
    p_line = p_table + tl.program_id(2) * 5
    i_row, first_block, blocks = tl.load(p_line), tl.load(p_line + 1), tl.load(p_line + 2)
    state_in, state_out = tl.load(p_line + 3), tl.load(p_line + 4)
    o_m, o_d = tl.program_id(1) * BLOCK_M + tl.arange(0, BLOCK_M), tl.arange(0, BLOCK_D)
    m_m, m_d = o_m < P, o_d < D
    acc_k = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
    acc_v = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
    stride_c = states * heads * 2 * D
    if HAS_STATES:  # noqa: SIM102  (the first is decided when compiling)
        if state_out >= 0:
            p_c = p_dstates + (state_out * heads + i_h) * 2 * D + o_d[None, :]
            start = tl.program_id(1) * BLOCK_M // BLOCK_K * BLOCK_K  # before it the transposed carry is zero
            acc_k, acc_v = _carried(acc_k, acc_v, p_carry, 1, P, p_c, stride_c, o_m, m_m, m_d, start, P,
                                    D, BLOCK_K)  # fmt: skip
    if HAS_TOKENS:
        tiles: tl.constexpr = (S + BLOCK_K - 1) // BLOCK_K
        for step in range(0, blocks * tiles):
            i, o_k = step // tiles, step % tiles * BLOCK_K + tl.arange(0, BLOCK_K)
            p_tile = p_read_carry + i * S * P + o_m[:, None] + o_k[None, :] * P
            at = (((first_block + i) * rows + i_row) * heads + i_h).to(tl.int64) * S * D
            o_x = at + o_k[:, None] * D + o_d[None, :]
            m_k = o_k < S
            b_matrix = tl.load(p_tile, mask=m_m[:, None] & m_k[None, :], other=0.0)
            b_k = tl.load(p_dslot_keys + o_x, mask=m_k[:, None] & m_d[None, :], other=0.0)
            b_v = tl.load(p_dslot_values + o_x, mask=m_k[:, None] & m_d[None, :], other=0.0)
            acc_k = dot(b_matrix, b_k.to(b_matrix.dtype), acc_k, PRECISION)
            acc_v = dot(b_matrix, b_v.to(b_matrix.dtype), acc_v, PRECISION)
    p_in = p_dstates + (state_in * heads + i_h) * 2 * D + o_m[:, None].to(tl.int64) * stride_c + o_d[None, :]
    m_in = m_m[:, None] & m_d[None, :]
    if ACCUMULATE:
        acc_k += tl.load(p_in, mask=m_in, other=0.0)
        acc_v += tl.load(p_in + D, mask=m_in, other=0.0)
    tl.store(p_in, acc_k, mask=m_in)
    tl.store(p_in + D, acc_v, mask=m_in)
