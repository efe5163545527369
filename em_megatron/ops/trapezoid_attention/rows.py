"""What the attention kernels do with rows of queries, keys and values: load, store, rotate, multiply.

Legend: R rows, d head dimension, L block length. Queries and keys are held as two halves [R, BLOCK_H] of d/2 columns, as
`kernels.py` explains; o_r are the numbers of the rows, m_r says which of them exist.
"""

from __future__ import annotations

import triton
import triton.language as tl

from em_megatron.ops.tiles import dot


@triton.jit
def tile(p_rows, stride, o_r, m_r, WIDTH: tl.constexpr, BLOCK: tl.constexpr, EVEN: tl.constexpr):
    """Columns 0 … WIDTH − 1 of rows o_r [R], [R, BLOCK], zeros where there is nothing; EVEN says that all is there."""
    o_d = tl.arange(0, BLOCK)
    p_tile = p_rows + o_r[:, None] * stride + o_d[None, :]
    if EVEN:
        return tl.load(p_tile)
    return tl.load(p_tile, mask=m_r[:, None] & (o_d < WIDTH)[None, :], other=0.0)


@triton.jit
def halves(p_rows, stride, o_r, m_r, D: tl.constexpr, BLOCK_H: tl.constexpr, EVEN: tl.constexpr):
    """Both halves of rows of queries or keys, each [R, BLOCK_H]."""
    b_1 = tile(p_rows, stride, o_r, m_r, D // 2, BLOCK_H, EVEN)
    b_2 = tile(p_rows + D // 2, stride, o_r, m_r, D // 2, BLOCK_H, EVEN)
    return b_1, b_2


@triton.jit
def store_halves(p_rows, stride, o_r, m_r, b_1, b_2, D: tl.constexpr, BLOCK_H: tl.constexpr):
    o_d = tl.arange(0, BLOCK_H)
    p_tile = p_rows + o_r[:, None] * stride + o_d[None, :]
    m_tile = m_r[:, None] & (o_d < D // 2)[None, :]
    tl.store(p_tile, b_1.to(p_rows.dtype.element_ty), mask=m_tile)
    tl.store(p_tile + D // 2, b_2.to(p_rows.dtype.element_ty), mask=m_tile)


@triton.jit
def turn(b_1, b_2, p_cos, p_sin, o_l, L, BACK: tl.constexpr, D: tl.constexpr, BLOCK_H: tl.constexpr):
    """Rotates rows, given as halves [R, BLOCK_H], to positions o_l, or back; fp32."""
    o_angle = o_l[:, None] * (D // 2) + tl.arange(0, BLOCK_H)[None, :]
    m_angle = (o_l < L)[:, None] & (tl.arange(0, BLOCK_H) < D // 2)[None, :]
    b_cos = tl.load(p_cos + o_angle, mask=m_angle, other=0.0)
    b_sin = tl.load(p_sin + o_angle, mask=m_angle, other=0.0)
    if BACK:
        b_sin = -b_sin
    b_1, b_2 = b_1.to(tl.float32), b_2.to(tl.float32)
    return b_1 * b_cos - b_2 * b_sin, b_2 * b_cos + b_1 * b_sin


@triton.jit
def scores(b_q1, b_q2, b_k1, b_k2, PRECISION: tl.constexpr):
    """Products of all rows of the first with all of the second, [R, C]."""
    nothing = tl.zeros([b_q1.shape[0], b_k1.shape[0]], tl.float32)
    return dot(b_q2, tl.trans(b_k2), dot(b_q1, tl.trans(b_k1), nothing, PRECISION), PRECISION)
