"""What a user would pick instead: causal attention over everything, FlexAttention, HiPPO token by token, a KV cache."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
import torch.nn.functional as F
from megatron.core.inference.config import InferenceConfig
from megatron.core.inference.contexts import BaseInferenceContext
from torch import Tensor

from em_megatron.benchmark.timing import UnavailableError
from em_megatron.hippo import legs
from em_megatron.model.memory_attention import MemoryAttention
from em_megatron.ops.rotary import rotary_tables, rotate

FLEX_TILE = 128  # tokens per side of a tile of FlexAttention's mask
MOST_PER_TOKEN_ORDER = 2160  # building the matrices of single tokens takes minutes beyond


def causal_attention(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    """torch's attention of every token to all before it, on GPUs with the flash kernel and no other.

    Args:
        query: [b, hq, T, d]. key, value: [b, hk, T, d]. No rotary embedding, which is in its favour.

    Returns:
        [b, hq, T, d].
    """
    grouped = query.shape[1] != key.shape[1]
    if query.device.type == "cpu" and grouped:  # the CPU's flash kernel wants a KV head for each query head
        key, value = (x.repeat_interleave(query.shape[1] // key.shape[1], 1) for x in (key, value))
        grouped = False
    with _flash_only(query.device):
        return F.scaled_dot_product_attention(query, key, value, is_causal=True, enable_gqa=grouped)


def _flash_only(device: torch.device) -> AbstractContextManager[Any]:
    if device.type != "cuda":
        return nullcontext()
    from torch.nn.attention import SDPBackend, sdpa_kernel

    context: AbstractContextManager[Any] = sdpa_kernel(SDPBackend.FLASH_ATTENTION)
    return context


def flex_attention(
    tokens: int, block: int, slots: int, device: torch.device, backward: bool
) -> Callable[[Tensor, Tensor, Tensor], Tensor]:
    """FlexAttention, compiled, with the trapezoid as its mask.

    The function takes query [1, hq, T, d] and keys and values [1, hk, B·S + T, d], the slots of all blocks first. It
    knows one kind of query only, so nothing is rotated.

    Raises:
        UnavailableError: block length or slots are not whole tiles of its mask.
        NotImplementedError: it has no backward pass here, as torch says.
    """
    if block % FLEX_TILE or slots % FLEX_TILE:
        raise UnavailableError(f"its mask is made here for blocks and slots that are multiples of {FLEX_TILE} only")
    from torch.nn.attention import flex_attention as flex

    eager: Any = flex.flex_attention
    if backward:  # asked uncompiled: after a refusal while compiling, torch runs the function uncompiled for good
        eager(*(torch.zeros(1, 1, FLEX_TILE, 16, device=device, requires_grad=True) for _ in range(3)))
    mask = flex_mask(tokens, block, slots, device)
    compiled: Any = torch.compile(eager, dynamic=False)
    return lambda query, key, value: compiled(
        query, key, value, block_mask=mask, enable_gqa=query.shape[1] != key.shape[1]
    )


def flex_mask(tokens: int, block: int, slots: int, device: torch.device) -> Any:
    """The trapezoid as FlexAttention's BlockMask, written down tile by tile instead of evaluated pair by pair."""
    from torch.nn.attention.flex_attention import BlockMask

    blocks = tokens // block
    q = torch.arange(tokens // FLEX_TILE, device=device)[:, None]
    k = torch.arange((blocks * slots + tokens) // FLEX_TILE, device=device)[None]
    own = k - blocks * slots // FLEX_TILE
    mine, reads = q // (block // FLEX_TILE), k // (slots // FLEX_TILE)
    whole = torch.where(own < 0, (reads == mine) & (mine > 0), (own // (block // FLEX_TILE) == mine) & (own < q))

    def visible(b: Tensor, h: Tensor, query: Tensor, key: Tensor) -> Tensor:
        token = key - blocks * slots
        in_block = (token // block == query // block) & (token <= query)
        return torch.where(token < 0, (key // slots == query // block) & (query >= block), in_block)

    return BlockMask.from_kv_blocks(
        *_listed(own == q), *_listed(whole), BLOCK_SIZE=FLEX_TILE, mask_mod=visible,
        seq_lengths=(tokens, blocks * slots + tokens),
    )  # fmt: skip


def _listed(tiles: Tensor) -> tuple[Tensor, Tensor]:
    """Tiles [queries, keys] bool → how many each row has [1, 1, queries], and which, first ones first."""
    order = torch.argsort(tiles.int(), dim=-1, descending=True, stable=True)
    return tiles.sum(-1).int()[None, None], order.int()[None, None].contiguous()


def per_token_recurrence(order: int, signal: Tensor, tokens: int, tokens_before: int) -> Callable[[], Tensor]:
    """C ← carry(t → t+1) C + inject x, one token at a time, as HiPPO-LegS is usually run.

    Args:
        order: N.
        signal: [T, b, h, c].
        tokens: how many to take, beginning with `tokens_before`; their matrices are built here, none of them twice.

    Returns:
        A function that gives the state [N, b·h·c] after them.

    Raises:
        UnavailableError: an order whose matrices would take minutes to build.
    """
    if order > MOST_PER_TOKEN_ORDER:
        raise UnavailableError(f"building the carry of single tokens takes minutes above order {MOST_PER_TOKEN_ORDER}")
    times = range(tokens_before, tokens_before + tokens)
    carries = [legs.carry(order, t, t + 1).to(signal) for t in times]
    injects = [legs.inject(order, t, t + 1, t + 1).to(signal) for t in times]
    rows = signal.detach().flatten(1)[tokens_before : tokens_before + tokens]
    start = torch.zeros(order, rows.shape[1], dtype=signal.dtype, device=signal.device)

    def run() -> Tensor:
        state = start
        for carry, inject, row in zip(carries, injects, rows.split(1), strict=True):
            state = torch.addmm(inject @ row, carry, state)
        return state

    return run


class GrowingLayer:
    """All keys and values of one layer, in a buffer that is large enough from the start.

    It has what a memory's LayerCache has for the model, `room` and `attend`, so that all else of a token is the same.
    """

    def __init__(self, shape: tuple[int, int, int, int], held: int, dtype: torch.dtype, device: torch.device) -> None:
        """shape: [b, hk, capacity, d]; the first `held` tokens are random numbers."""
        self.keys, self.values = (torch.zeros(shape, dtype=dtype, device=device) for _ in range(2))
        for buffer in (self.keys, self.values):
            buffer[:, :, :held].normal_()
        self.filled = held

    @property
    def room(self) -> int:
        return self.keys.shape[2] - self.filled

    @property
    def num_bytes(self) -> int:
        """Bytes that the tokens so far take."""
        return 2 * self.keys[:, :, : self.filled].numel() * self.keys.element_size()

    def attend(self, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        """One token: query [1, b, hq, d], key and value [1, b, hk, d] → [1, b, hq, d]; rotated at any position, which
        costs the same at all."""
        cos, sin = rotary_tables(1, query.shape[-1], 10000.0, query.dtype, query.device)
        at, self.filled = self.filled, self.filled + 1
        self.keys[:, :, at] = rotate(key[0], cos, sin)
        self.values[:, :, at] = value[0]
        q = rotate(query[0], cos, sin)[:, :, None]
        keys, values = self.keys[:, :, : self.filled], self.values[:, :, : self.filled]
        grouped = q.shape[1] != keys.shape[1]
        return F.scaled_dot_product_attention(q, keys, values, enable_gqa=grouped)[None, :, :, 0]


class GrowingCache(BaseInferenceContext):
    """A cache of all keys and values of all layers, in the place of the model's constant memory."""

    def __init__(self, attentions: Sequence[MemoryAttention], held: int, capacity: int, like: Tensor) -> None:
        super().__init__(InferenceConfig())
        self.layers = {
            layer.layer_number: GrowingLayer(
                (1, layer.num_query_groups_per_partition, capacity, layer.hidden_size_per_attention_head),
                held, like.dtype, like.device,
            )
            for layer in attentions
        }  # fmt: skip

    def is_static_batching(self) -> bool:
        return False

    @property
    def num_bytes(self) -> int:
        """Bytes of all layers."""
        return sum(layer.num_bytes for layer in self.layers.values())
