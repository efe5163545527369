"""Triton kernels of trapezoidal attention, flash style: no [L, S + L] matrix is stored, nothing is added atomically.

Legend: L block length, S slots, d head dimension, hq query heads, hk KV heads, r = hq/hk, n = B·b blocks of all samples,
numbered block · b + sample. T tokens.

    p_query, p_value, p_dout     [T, b, heads, d] strided, d adjacent; p_out, p_dquery, p_dkey, p_dvalue contiguous
    p_key, p_rotated             rotated keys [n, hk, L, d], rotated queries [n, hq, L, d], contiguous
    p_slot_keys, p_slot_values   [n, hk, S, d] by strides of n, hk and S
    p_cos, p_sin                 [L, d/2] fp32
    p_lse, p_delta               [n, hq, L] fp32: log₂ of Σ 2^(score · log₂e / √d), and Σ out · dout
    p_readers                    [n] how many leading tokens of the block read the slots
    p_start, p_stop              [b, T] where a token's document begins and ends inside the block; only if SEGMENTS

Queries and keys are held as two halves [rows, d/2], because rotation pairs column i of one with column i of the other;
a score is the sum of both halves' products. Values are held whole. Halves are BLOCK_H wide, values BLOCK_D.
"""

from __future__ import annotations

import triton
import triton.language as tl

from em_megatron.ops.tiles import Tiles, dot, tuned
from em_megatron.ops.trapezoid_attention.rows import halves, scores, store_halves, tile, turn

# BLOCK_M queries, BLOCK_N keys.
FORWARD_CONFIGS: list[Tiles] = [
    {"BLOCK_M": 128, "BLOCK_N": 128, "num_warps": 8, "num_stages": 2},
    {"BLOCK_M": 128, "BLOCK_N": 64, "num_warps": 8, "num_stages": 3},
    {"BLOCK_M": 64, "BLOCK_N": 64, "num_warps": 4, "num_stages": 3},
    {"BLOCK_M": 64, "BLOCK_N": 32, "num_warps": 4, "num_stages": 2},
]
QUERY_GRADIENT_CONFIGS: list[Tiles] = [
    {"BLOCK_M": 128, "BLOCK_N": 64, "num_warps": 8, "num_stages": 2},
    {"BLOCK_M": 128, "BLOCK_N": 32, "num_warps": 8, "num_stages": 3},
    {"BLOCK_M": 64, "BLOCK_N": 64, "num_warps": 4, "num_stages": 2},
    {"BLOCK_M": 64, "BLOCK_N": 32, "num_warps": 4, "num_stages": 1},
]
KEY_GRADIENT_CONFIGS: list[Tiles] = [
    {"BLOCK_M": 64, "BLOCK_N": 128, "num_warps": 8, "num_stages": 2},
    {"BLOCK_M": 32, "BLOCK_N": 128, "num_warps": 8, "num_stages": 3},
    {"BLOCK_M": 32, "BLOCK_N": 64, "num_warps": 4, "num_stages": 2},
    {"BLOCK_M": 32, "BLOCK_N": 64, "num_warps": 4, "num_stages": 1},
]
LN_2 = tl.constexpr(0.6931471805599453)
LOWEST = tl.constexpr(-1.0e30)  # stands for −∞ where differences must stay finite


def _fits(staying: int, staged: int, tiles: Tiles, width: int, itemsize: int, limit: int) -> bool:
    """Whether two tiles that stay and two of each stage fit shared memory, and fp32 scores registers."""
    if itemsize == 4 and staying * staged > 16 * 32 * tiles["num_warps"]:  # 16 scores per thread
        return False
    copies = 2 if itemsize == 4 else 1  # three TF32 products keep what one leaves over
    return (2 * staying + 2 * tiles["num_stages"] * staged) * width * itemsize * copies <= limit


def query_side_fits(tiles: Tiles, width: int, itemsize: int, limit: int) -> bool:
    """Tiles of queries stay, those of keys and values come in stages."""
    return _fits(tiles["BLOCK_M"], tiles["BLOCK_N"], tiles, width, itemsize, limit)


def key_side_fits(tiles: Tiles, width: int, itemsize: int, limit: int) -> bool:
    """Tiles of keys and values stay, those of queries and output gradients come in stages."""
    return _fits(tiles["BLOCK_N"], tiles["BLOCK_M"], tiles, width, itemsize, limit)


@triton.jit
def rotate_kernel(
    p_x, p_cos, p_sin, p_rotated, stride_t, stride_b, stride_h, rows, L,
    D: tl.constexpr, BLOCK_H: tl.constexpr, BLOCK_M: tl.constexpr,
):  # fmt: skip
    """[T, b, h, d] strided → rotated [n, h, L, d]. Grid: tiles of L × heads × n."""
    i_h, i_n = tl.program_id(1), tl.program_id(2)
    o_l = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    p_rows = p_x + (i_n // rows * L).to(tl.int64) * stride_t + (i_n % rows).to(tl.int64) * stride_b + i_h * stride_h
    b_1, b_2 = halves(p_rows, stride_t, o_l, o_l < L, D, BLOCK_H, False)
    b_1, b_2 = turn(b_1, b_2, p_cos, p_sin, o_l, L, False, D, BLOCK_H)
    p_out = p_rotated + (i_n * tl.num_programs(1) + i_h).to(tl.int64) * L * D
    store_halves(p_out, D, o_l, o_l < L, b_1, b_2, D, BLOCK_H)


@triton.jit
def _attend(
    acc, top, total, b_q1, b_q2, p_k, stride_k, p_v, stride_v, o_m, b_start, readers, start, stop, keys, scale,
    CAUSAL: tl.constexpr, OF_DOCUMENT: tl.constexpr, OF_READERS: tl.constexpr, EVEN: tl.constexpr,
    D: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_H: tl.constexpr, BLOCK_N: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Online softmax over keys start … stop − 1: acc [M, D], top and total [M], in powers of two."""
    for o in range(start, stop, BLOCK_N):
        o_n = o + tl.arange(0, BLOCK_N)
        b_k1, b_k2 = halves(p_k, stride_k, o_n, o_n < keys, D, BLOCK_H, EVEN)
        b_s = scores(b_q1, b_q2, b_k1, b_k2, PRECISION) * scale
        if CAUSAL:
            b_s = tl.where(o_m[:, None] >= o_n[None, :], b_s, float("-inf"))
        if not EVEN:
            b_s = tl.where((o_n < keys)[None, :], b_s, float("-inf"))
        if OF_DOCUMENT:
            b_s = tl.where(o_n[None, :] >= b_start[:, None], b_s, float("-inf"))
        if OF_READERS:
            b_s = tl.where((o_m < readers)[:, None], b_s, float("-inf"))
        new_top = tl.maximum(top, tl.max(b_s, 1))
        b_p = tl.exp2(b_s - new_top[:, None])
        decay = tl.exp2(top - new_top)
        total = total * decay + tl.sum(b_p, 1)
        b_v = tile(p_v, stride_v, o_n, o_n < keys, D, BLOCK_D, EVEN)
        acc = dot(b_p.to(b_v.dtype), b_v, acc * decay[:, None], PRECISION)
        top = new_top
    return acc, top, total


@tuned(FORWARD_CONFIGS, ["S", "L", "D", "SEGMENTS"], "p_key", query_side_fits)
@triton.jit
def forward_kernel(
    p_query, p_key, p_value, p_slot_keys, p_slot_values, p_cos, p_sin, p_readers, p_start, p_out, p_lse,
    stride_qt, stride_qb, stride_qh, stride_vt, stride_vb, stride_vh, stride_sn, stride_sh, stride_ss,
    rows, group, tokens, scale,
    S: tl.constexpr, L: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_H: tl.constexpr,
    SEGMENTS: tl.constexpr,
    PRECISION: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """Output and log-sum-exp. Grid: tiles of L × hq × n; the tiles with most keys go first."""
    first = (tl.num_programs(0) - 1 - tl.program_id(0)) * BLOCK_M
    i_h, i_n, heads = tl.program_id(1), tl.program_id(2), tl.num_programs(1)
    i_kv, i_row, t_first = i_h // group, (i_n % rows).to(tl.int64), (i_n // rows * L).to(tl.int64)
    o_m = first + tl.arange(0, BLOCK_M)
    EVEN: tl.constexpr = L % BLOCK_M == 0 and L % BLOCK_N == 0 and D == BLOCK_D and D == 2 * BLOCK_H
    p_q = p_query + t_first * stride_qt + i_row * stride_qb + i_h * stride_qh
    b_q1, b_q2 = halves(p_q, stride_qt, o_m, o_m < L, D, BLOCK_H, EVEN)
    acc = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
    top = tl.zeros([BLOCK_M], tl.float32) + LOWEST
    total = tl.zeros([BLOCK_M], tl.float32)
    b_start = o_m * 0
    document = first * 0
    if SEGMENTS:
        p_s = p_start + i_row * tokens + t_first
        b_start = tl.load(p_s + o_m, mask=o_m < L, other=0)
        document = tl.load(p_s + first) // BLOCK_N * BLOCK_N  # no query of the tile sees keys before it
    if S > 0:
        readers = tl.load(p_readers + i_n)
        o_s = i_n.to(tl.int64) * stride_sn + i_kv * stride_sh
        acc, top, total = _attend(
            acc, top, total, b_q1, b_q2, p_slot_keys + o_s, stride_ss, p_slot_values + o_s, stride_ss, o_m, b_start,
            readers, 0, tl.where(first < readers, S, 0), S, scale, False, False, SEGMENTS,
            S % BLOCK_N == 0 and D == BLOCK_D and D == 2 * BLOCK_H, D, BLOCK_D, BLOCK_H, BLOCK_N, PRECISION,
        )  # fmt: skip
    turned_1, turned_2 = turn(b_q1, b_q2, p_cos, p_sin, o_m, L, False, D, BLOCK_H)
    b_q1, b_q2 = turned_1.to(b_q1.dtype), turned_2.to(b_q2.dtype)
    p_k = p_key + (i_n * (heads // group) + i_kv).to(tl.int64) * L * D
    p_v = p_value + t_first * stride_vt + i_row * stride_vb + i_kv * stride_vh
    diagonal = first // BLOCK_N * BLOCK_N
    acc, top, total = _attend(
        acc, top, total, b_q1, b_q2, p_k, D, p_v, stride_vt, o_m, b_start, 0, document, diagonal, L, scale,
        False, SEGMENTS, False, EVEN, D, BLOCK_D, BLOCK_H, BLOCK_N, PRECISION,
    )  # fmt: skip
    acc, top, total = _attend(
        acc, top, total, b_q1, b_q2, p_k, D, p_v, stride_vt, o_m, b_start, 0, diagonal,
        tl.minimum(first + BLOCK_M, L), L, scale, True, SEGMENTS, False, EVEN, D, BLOCK_D, BLOCK_H, BLOCK_N, PRECISION,
    )  # fmt: skip
    o_d = tl.arange(0, BLOCK_D)
    m_out = (o_m < L)[:, None] & (o_d < D)[None, :]
    o_out = (((t_first + o_m)[:, None] * rows + i_row) * heads + i_h) * D + o_d[None, :]
    tl.store(p_out + o_out, (acc / total[:, None]).to(p_out.dtype.element_ty), mask=m_out)
    tl.store(p_lse + (i_n * heads + i_h).to(tl.int64) * L + o_m, top + tl.log2(total), mask=o_m < L)


@triton.jit
def delta_kernel(
    p_out, p_dout, p_delta, stride_gt, stride_gb, stride_gh, rows, L,
    D: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_M: tl.constexpr,
):  # fmt: skip
    """Σ out · dout of every token and head. Grid: tiles of L × hq × n."""
    i_h, i_n, heads = tl.program_id(1), tl.program_id(2), tl.num_programs(1)
    i_row, t_first = (i_n % rows).to(tl.int64), (i_n // rows * L).to(tl.int64)
    o_l = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    p_o = p_out + ((t_first * rows + i_row) * heads + i_h) * D
    p_g = p_dout + t_first * stride_gt + i_row * stride_gb + i_h * stride_gh
    b_out = tile(p_o, rows * heads * D, o_l, o_l < L, D, BLOCK_D, False).to(tl.float32)
    b_dout = tile(p_g, stride_gt, o_l, o_l < L, D, BLOCK_D, False).to(tl.float32)
    tl.store(p_delta + (i_n * heads + i_h).to(tl.int64) * L + o_l, tl.sum(b_out * b_dout, 1), mask=o_l < L)


@triton.jit
def _query_gradient(
    dq_1, dq_2, b_q1, b_q2, b_dout, b_lse, b_delta, p_k, stride_k, p_v, stride_v, o_m, b_start, readers, start, stop,
    keys, scale, CAUSAL: tl.constexpr, OF_DOCUMENT: tl.constexpr, OF_READERS: tl.constexpr, EVEN: tl.constexpr,
    D: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_H: tl.constexpr, BLOCK_N: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """dq + dS K over keys start … stop − 1, without the factor 1/√d: dq [M, H] twice, b_dout [M, D]."""
    for o in range(start, stop, BLOCK_N):
        o_n = o + tl.arange(0, BLOCK_N)
        b_k1, b_k2 = halves(p_k, stride_k, o_n, o_n < keys, D, BLOCK_H, EVEN)
        b_v = tile(p_v, stride_v, o_n, o_n < keys, D, BLOCK_D, EVEN)
        b_p = tl.exp2(scores(b_q1, b_q2, b_k1, b_k2, PRECISION) * scale - b_lse[:, None])
        if CAUSAL:
            b_p = tl.where(o_m[:, None] >= o_n[None, :], b_p, 0.0)
        if not EVEN:
            b_p = tl.where((o_n < keys)[None, :], b_p, 0.0)
        if OF_DOCUMENT:
            b_p = tl.where(o_n[None, :] >= b_start[:, None], b_p, 0.0)
        if OF_READERS:
            b_p = tl.where((o_m < readers)[:, None], b_p, 0.0)
        b_dp = dot(b_dout, tl.trans(b_v), tl.zeros([b_q1.shape[0], BLOCK_N], tl.float32), PRECISION)
        b_ds = (b_p * (b_dp - b_delta[:, None])).to(b_k1.dtype)
        dq_1 = dot(b_ds, b_k1, dq_1, PRECISION)
        dq_2 = dot(b_ds, b_k2, dq_2, PRECISION)
    return dq_1, dq_2


@tuned(QUERY_GRADIENT_CONFIGS, ["S", "L", "D", "SEGMENTS"], "p_key", query_side_fits)
@triton.jit
def query_gradient_kernel(
    p_query, p_key, p_value, p_slot_keys, p_slot_values, p_cos, p_sin, p_readers, p_start, p_dout, p_lse, p_delta,
    p_dquery, stride_qt, stride_qb, stride_qh, stride_vt, stride_vb, stride_vh, stride_sn, stride_sh, stride_ss,
    stride_gt, stride_gb, stride_gh, rows, group, tokens, scale,
    S: tl.constexpr, L: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_H: tl.constexpr,
    SEGMENTS: tl.constexpr,
    PRECISION: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """Gradient of the queries. Grid: tiles of L × hq × n.

    The slots' part is added first and rotated as the queries are; at the end the whole is rotated back.
    """
    first = (tl.num_programs(0) - 1 - tl.program_id(0)) * BLOCK_M
    i_h, i_n, heads = tl.program_id(1), tl.program_id(2), tl.num_programs(1)
    i_kv, i_row, t_first = i_h // group, (i_n % rows).to(tl.int64), (i_n // rows * L).to(tl.int64)
    o_m = first + tl.arange(0, BLOCK_M)
    EVEN: tl.constexpr = L % BLOCK_M == 0 and L % BLOCK_N == 0 and D == BLOCK_D and D == 2 * BLOCK_H
    p_q = p_query + t_first * stride_qt + i_row * stride_qb + i_h * stride_qh
    p_g = p_dout + t_first * stride_gt + i_row * stride_gb + i_h * stride_gh
    b_q1, b_q2 = halves(p_q, stride_qt, o_m, o_m < L, D, BLOCK_H, EVEN)
    b_dout = tile(p_g, stride_gt, o_m, o_m < L, D, BLOCK_D, EVEN)
    o_lse = (i_n * heads + i_h).to(tl.int64) * L + o_m
    b_lse = tl.load(p_lse + o_lse, mask=o_m < L, other=0.0)
    b_delta = tl.load(p_delta + o_lse, mask=o_m < L, other=0.0)
    dq_1 = tl.zeros([BLOCK_M, BLOCK_H], tl.float32)
    dq_2 = tl.zeros([BLOCK_M, BLOCK_H], tl.float32)
    b_start = o_m * 0
    document = first * 0
    if SEGMENTS:
        p_s = p_start + i_row * tokens + t_first
        b_start = tl.load(p_s + o_m, mask=o_m < L, other=0)
        document = tl.load(p_s + first) // BLOCK_N * BLOCK_N
    if S > 0:
        readers = tl.load(p_readers + i_n)
        o_s = i_n.to(tl.int64) * stride_sn + i_kv * stride_sh
        dq_1, dq_2 = _query_gradient(
            dq_1, dq_2, b_q1, b_q2, b_dout, b_lse, b_delta, p_slot_keys + o_s, stride_ss, p_slot_values + o_s, stride_ss,
            o_m, b_start, readers, 0, tl.where(first < readers, S, 0), S, scale, False, False, SEGMENTS,
            S % BLOCK_N == 0 and D == BLOCK_D and D == 2 * BLOCK_H, D, BLOCK_D, BLOCK_H, BLOCK_N, PRECISION,
        )  # fmt: skip
        dq_1, dq_2 = turn(dq_1, dq_2, p_cos, p_sin, o_m, L, False, D, BLOCK_H)
    turned_1, turned_2 = turn(b_q1, b_q2, p_cos, p_sin, o_m, L, False, D, BLOCK_H)
    b_q1, b_q2 = turned_1.to(b_q1.dtype), turned_2.to(b_q2.dtype)
    p_k = p_key + (i_n * (heads // group) + i_kv).to(tl.int64) * L * D
    p_v = p_value + t_first * stride_vt + i_row * stride_vb + i_kv * stride_vh
    diagonal = first // BLOCK_N * BLOCK_N
    dq_1, dq_2 = _query_gradient(
        dq_1, dq_2, b_q1, b_q2, b_dout, b_lse, b_delta, p_k, D, p_v, stride_vt, o_m, b_start, 0, document, diagonal, L,
        scale, False, SEGMENTS, False, EVEN, D, BLOCK_D, BLOCK_H, BLOCK_N, PRECISION,
    )  # fmt: skip
    dq_1, dq_2 = _query_gradient(
        dq_1, dq_2, b_q1, b_q2, b_dout, b_lse, b_delta, p_k, D, p_v, stride_vt, o_m, b_start, 0, diagonal,
        tl.minimum(first + BLOCK_M, L), L, scale, True, SEGMENTS, False, EVEN, D, BLOCK_D, BLOCK_H, BLOCK_N, PRECISION,
    )  # fmt: skip
    dq_1, dq_2 = turn(dq_1, dq_2, p_cos, p_sin, o_m, L, True, D, BLOCK_H)
    p_out = p_dquery + ((t_first * rows + i_row) * heads + i_h) * D
    factor = scale * LN_2
    store_halves(p_out, rows * heads * D, o_m, o_m < L, dq_1 * factor, dq_2 * factor, D, BLOCK_H)


@triton.jit
def _key_gradient(
    dk_1, dk_2, dv, b_k1, b_k2, b_v, p_q, stride_q, p_g, stride_g, p_lse, p_delta, o_n, b_stop, readers, start, stop, L,
    keys, scale, CAUSAL: tl.constexpr, OF_DOCUMENT: tl.constexpr, OF_READERS: tl.constexpr, EVEN: tl.constexpr,
    D: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_H: tl.constexpr, BLOCK_M: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """dk + dSᵀ Q, without 1/√d, and dv + Pᵀ dout over queries start … stop − 1: dk [N, H] twice, dv [N, D]."""
    for o in range(start, stop, BLOCK_M):
        o_m = o + tl.arange(0, BLOCK_M)
        b_q1, b_q2 = halves(p_q, stride_q, o_m, o_m < L, D, BLOCK_H, EVEN)
        b_lse = tl.load(p_lse + o_m, mask=o_m < L, other=0.0)
        b_delta = tl.load(p_delta + o_m, mask=o_m < L, other=0.0)
        b_p = tl.exp2(scores(b_k1, b_k2, b_q1, b_q2, PRECISION) * scale - b_lse[None, :])
        if CAUSAL:
            b_p = tl.where(o_m[None, :] >= o_n[:, None], b_p, 0.0)
        if not EVEN:
            b_p = tl.where((o_m < L)[None, :] & (o_n < keys)[:, None], b_p, 0.0)
        if OF_DOCUMENT:
            b_p = tl.where(o_m[None, :] < b_stop[:, None], b_p, 0.0)
        if OF_READERS:
            b_p = tl.where((o_m < readers)[None, :], b_p, 0.0)
        b_dout = tile(p_g, stride_g, o_m, o_m < L, D, BLOCK_D, EVEN)
        dv = dot(b_p.to(b_dout.dtype), b_dout, dv, PRECISION)
        b_dp = dot(b_v, tl.trans(b_dout), tl.zeros([b_k1.shape[0], BLOCK_M], tl.float32), PRECISION)
        b_ds = (b_p * (b_dp - b_delta[None, :])).to(b_q1.dtype)
        dk_1 = dot(b_ds, b_q1, dk_1, PRECISION)
        dk_2 = dot(b_ds, b_q2, dk_2, PRECISION)
    return dk_1, dk_2, dv


@tuned(KEY_GRADIENT_CONFIGS, ["L", "D", "SEGMENTS"], "p_key", key_side_fits)
@triton.jit
def key_gradient_kernel(
    p_rotated, p_key, p_value, p_cos, p_sin, p_stop, p_dout, p_lse, p_delta, p_dkey, p_dvalue,
    stride_vt, stride_vb, stride_vh, stride_gt, stride_gb, stride_gh, rows, group, tokens, scale,
    L: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_H: tl.constexpr, SEGMENTS: tl.constexpr,
    PRECISION: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """Gradients of own keys and values. Grid: tiles of L × hk × n; the first tiles meet most queries."""
    first = tl.program_id(0) * BLOCK_N
    i_kv, i_n, kv_heads = tl.program_id(1), tl.program_id(2), tl.num_programs(1)
    i_row, t_first = (i_n % rows).to(tl.int64), (i_n // rows * L).to(tl.int64)
    o_n = first + tl.arange(0, BLOCK_N)
    EVEN: tl.constexpr = L % BLOCK_M == 0 and L % BLOCK_N == 0 and D == BLOCK_D and D == 2 * BLOCK_H
    p_k = p_key + (i_n * kv_heads + i_kv).to(tl.int64) * L * D
    p_v = p_value + t_first * stride_vt + i_row * stride_vb + i_kv * stride_vh
    b_k1, b_k2 = halves(p_k, D, o_n, o_n < L, D, BLOCK_H, EVEN)
    b_v = tile(p_v, stride_vt, o_n, o_n < L, D, BLOCK_D, EVEN)
    b_stop = o_n * 0
    last = first * 0 + L
    if SEGMENTS:
        p_s = p_stop + i_row * tokens + t_first
        b_stop = tl.load(p_s + o_n, mask=o_n < L, other=0)
        last = tl.load(p_s + tl.minimum(first + BLOCK_N, L) - 1)  # no key of the tile is seen by later queries
    dk_1 = tl.zeros([BLOCK_N, BLOCK_H], tl.float32)
    dk_2 = tl.zeros([BLOCK_N, BLOCK_H], tl.float32)
    dv = tl.zeros([BLOCK_N, BLOCK_D], tl.float32)
    start = first // BLOCK_M * BLOCK_M
    for i_g in range(0, group):
        i_h = i_kv * group + i_g
        o_h = (i_n * kv_heads * group + i_h).to(tl.int64) * L
        p_q = p_rotated + o_h * D
        p_g = p_dout + t_first * stride_gt + i_row * stride_gb + i_h * stride_gh
        dk_1, dk_2, dv = _key_gradient(
            dk_1, dk_2, dv, b_k1, b_k2, b_v, p_q, D, p_g, stride_gt, p_lse + o_h, p_delta + o_h, o_n, b_stop, 0, start,
            last, L, L, scale, True, SEGMENTS, False, EVEN, D, BLOCK_D, BLOCK_H, BLOCK_M, PRECISION,
        )  # fmt: skip
    dk_1, dk_2 = turn(dk_1, dk_2, p_cos, p_sin, o_n, L, True, D, BLOCK_H)
    o_out, stride_out, factor = ((t_first * rows + i_row) * kv_heads + i_kv) * D, rows * kv_heads * D, scale * LN_2
    store_halves(p_dkey + o_out, stride_out, o_n, o_n < L, dk_1 * factor, dk_2 * factor, D, BLOCK_H)
    o_d = tl.arange(0, BLOCK_D)
    tl.store(p_dvalue + o_out + o_n[:, None] * stride_out + o_d[None, :], dv.to(p_dvalue.dtype.element_ty),
             mask=(o_n < L)[:, None] & (o_d < D)[None, :])  # fmt: skip


@tuned(KEY_GRADIENT_CONFIGS, ["S", "L", "D", "SEGMENTS"], "p_slot_keys", key_side_fits)
@triton.jit
def slot_gradient_kernel(
    p_query, p_slot_keys, p_slot_values, p_readers, p_dout, p_lse, p_delta, p_dslot_keys, p_dslot_values,
    stride_qt, stride_qb, stride_qh, stride_sn, stride_sh, stride_ss, stride_gt, stride_gb, stride_gh, rows, group,
    scale, S: tl.constexpr, L: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_H: tl.constexpr,
    SEGMENTS: tl.constexpr,
    PRECISION: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """Gradients of slots [n, hk, S, d], zeros where nobody reads them. Grid: tiles of S × hk × n."""
    i_kv, i_n, kv_heads = tl.program_id(1), tl.program_id(2), tl.num_programs(1)
    i_row, t_first = (i_n % rows).to(tl.int64), (i_n // rows * L).to(tl.int64)
    o_n = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    EVEN_N: tl.constexpr = S % BLOCK_N == 0 and D == BLOCK_D and D == 2 * BLOCK_H
    o_s = i_n.to(tl.int64) * stride_sn + i_kv * stride_sh
    b_k1, b_k2 = halves(p_slot_keys + o_s, stride_ss, o_n, o_n < S, D, BLOCK_H, EVEN_N)
    b_v = tile(p_slot_values + o_s, stride_ss, o_n, o_n < S, D, BLOCK_D, EVEN_N)
    readers = tl.load(p_readers + i_n)
    dk_1 = tl.zeros([BLOCK_N, BLOCK_H], tl.float32)
    dk_2 = tl.zeros([BLOCK_N, BLOCK_H], tl.float32)
    dv = tl.zeros([BLOCK_N, BLOCK_D], tl.float32)
    for i_g in range(0, group):
        i_h = i_kv * group + i_g
        o_h = (i_n * kv_heads * group + i_h).to(tl.int64) * L
        p_q = p_query + t_first * stride_qt + i_row * stride_qb + i_h * stride_qh
        p_g = p_dout + t_first * stride_gt + i_row * stride_gb + i_h * stride_gh
        dk_1, dk_2, dv = _key_gradient(
            dk_1, dk_2, dv, b_k1, b_k2, b_v, p_q, stride_qt, p_g, stride_gt, p_lse + o_h, p_delta + o_h, o_n, o_n,
            readers, 0, readers, L, S, scale, False, False, SEGMENTS, EVEN_N and L % BLOCK_M == 0,
            D, BLOCK_D, BLOCK_H, BLOCK_M, PRECISION,
        )  # fmt: skip
    o_out, factor = (i_n * kv_heads + i_kv).to(tl.int64) * S * D, scale * LN_2
    store_halves(p_dslot_keys + o_out, D, o_n, o_n < S, dk_1 * factor, dk_2 * factor, D, BLOCK_H)
    o_d = tl.arange(0, BLOCK_D)
    tl.store(p_dslot_values + o_out + o_n[:, None] * D + o_d[None, :], dv.to(p_dslot_values.dtype.element_ty),
             mask=(o_n < S)[:, None] & (o_d < D)[None, :])  # fmt: skip
