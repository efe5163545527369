"""What a generation with Elastic Memory keeps: constant in the length of the text. This file travels with the weights.

    text of any length → blocks of L tokens → at a block's end: C ← carry C + inject X, then moments ← read C

Legend: g rows of the batch that stand at the same place, h key/value heads, n tokens at hand, d head dimension,
L block length, N order, S moments read back.
"""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor
from transformers.cache_utils import Cache, CacheLayerMixin

from .configuration_elastic_memory import ElasticMemoryConfig
from .hippo_elastic_memory import MemoryReader

if TYPE_CHECKING:
    from .modeling_elastic_memory import ElasticMemoryForCausalLM

OWN = ("rotated", "keys", "values")  # what is kept of the block at hand


class LayerMemory:
    """What one layer keeps for rows that stand at the same place: the block at hand, the state, the moments read.

    A layer works on a shallow copy and hands that on, so that it may be computed again for its gradient.
    """

    def __init__(self, block_length: int, has_memory: bool) -> None:
        self.block_length, self.has_memory = block_length, has_memory
        self.tokens = 0  # read so far
        self.own: tuple[Tensor, ...] = ()  # rotated keys, keys, values of the block at hand, [g, h, ≥ filled, d]
        self.state: Tensor | None = None  # [g, h, N, 2d], in fp32 or better
        self.slots: Tensor | None = None  # [g, h, S, 2d]
        self.reader: MemoryReader | None = None  # by which the slots were read

    @property
    def filled(self) -> int:
        """Tokens in the block at hand."""
        return self.tokens % self.block_length

    def take(self, new: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        """Takes n tokens that fit the block; its rotated keys, keys and values up to now."""
        first, last = self.filled, self.filled + new[0].shape[2]
        own = tuple(x[:, :, :first] for x in self.own) if first else ()
        if torch.is_grad_enabled():
            self.own = tuple(torch.cat(pair, 2) for pair in zip(own, new, strict=True)) if own else new
        else:
            self._make_room(own, new)
            for x, y in zip(self.own, new, strict=True):
                x[:, :, first:last] = y
        self.tokens += last - first
        return tuple(x[:, :, :last] for x in self.own)

    def _make_room(self, own: tuple[Tensor, ...], new: tuple[Tensor, ...]) -> None:
        """Buffers of a whole block that may be written to; every block gets its own, so that a call may be taken back."""
        if own:
            buffer = self.own[0]
            writable = torch.is_inference_mode_enabled() or not buffer.is_inference()
            if buffer.shape[2] == self.block_length and not buffer.requires_grad and writable:
                return
        self.own = tuple(x.new_zeros(*x.shape[:2], self.block_length, x.shape[3]) for x in new)
        for x, y in zip(self.own, own, strict=False):
            x[:, :, : y.shape[2]] = y

    def memory(self, reader: MemoryReader) -> Tensor | None:
        """The moments [g, h, S, 2d] under this reader; a state of a higher order is cut to the reader's."""
        if self.state is None or reader is self.reader:
            return self.slots
        if self.state.shape[2] < reader.order:
            raise ValueError(
                f"this cache holds a memory of order {self.state.shape[2]}, too small for order {reader.order}: read "
                "the text again, or set the order back"
            )
        self.state = self.state[:, :, : reader.order].contiguous()
        self.slots, self.reader = reader.read(self.state), reader
        return self.slots

    def close(self, reader: MemoryReader) -> None:
        """At a block's end: writes it to the state and reads the moments anew."""
        exact = torch.promote_types(self.own[0].dtype, torch.float32)
        if self.has_memory:
            block = torch.cat(self.own[1:], -1).to(exact)
            self.state = reader.write(self.state, block, self.tokens - self.block_length)
            self.slots, self.reader = reader.read(self.state), reader
        if torch.is_grad_enabled():
            self.own = ()

    def tensors(self) -> dict[str, Tensor]:
        """Everything that decides what comes next."""
        own = zip(OWN, (x[:, :, : self.filled] for x in self.own), strict=True) if self.filled else ()
        return dict(own) | ({} if self.state is None else {"state": self.state})

    def restore(self, tensors: dict[str, Tensor]) -> None:
        """Takes back what `tensors` gave."""
        self.own = tuple(tensors[name] for name in OWN) if self.filled else ()
        self.state = tensors.get("state")

    def select(self, rows: Tensor) -> LayerMemory:
        """A copy with these of its rows."""
        chosen = copy.copy(self)
        chosen.own = tuple(x.index_select(0, rows.to(x.device)) for x in self.own)
        chosen.state, chosen.slots = (
            x if x is None else x.index_select(0, rows.to(x.device)) for x in (self.state, self.slots)
        )
        return chosen

    def detached(self) -> LayerMemory:
        """The same content, cut from the gradient."""
        other = copy.copy(self)
        other.own = tuple(x.detach() for x in self.own)
        other.state, other.slots = (x if x is None else x.detach() for x in (self.state, self.slots))
        return other

    def __getstate__(self) -> dict[str, Any]:
        return {**vars(self), "reader": None}  # the moments are read again

    @property
    def num_bytes(self) -> int:
        """Bytes held; the same from the end of the first block on, whatever is read."""
        return sum(x.numel() * x.element_size() for x in (*self.own, self.state, self.slots) if x is not None)


class KeptMemory:
    """What one layer of another kind keeps for rows that stand at the same place, by name, rows first.

    A layer works on a shallow copy and hands that on; tensors are replaced, never changed.
    """

    def __init__(self, block_length: int) -> None:
        self.block_length = block_length
        self.tokens = 0  # read so far
        self.kept: dict[str, Tensor] = {}

    @property
    def filled(self) -> int:
        """Tokens in the block at hand."""
        return self.tokens % self.block_length

    def tensors(self) -> dict[str, Tensor]:
        """Everything that decides what comes next."""
        return dict(self.kept)

    def restore(self, tensors: dict[str, Tensor]) -> None:
        """Takes back what `tensors` gave."""
        self.kept = tensors

    def _with(self, change: Callable[[Tensor], Tensor]) -> KeptMemory:
        other = copy.copy(self)
        other.kept = {name: change(x) for name, x in self.kept.items()}
        return other

    def select(self, rows: Tensor) -> KeptMemory:
        """A copy with these of its rows."""
        return self._with(lambda x: x.index_select(0, rows.to(x.device)))

    def detached(self) -> KeptMemory:
        """The same content, cut from the gradient."""
        return self._with(Tensor.detach)

    @property
    def num_bytes(self) -> int:
        """Bytes held; those of `full` and `subsample` grow with the text."""
        return sum(x.numel() * x.element_size() for x in self.kept.values())


@dataclasses.dataclass
class RowGroup:
    """Rows of the batch that have read equally many tokens, and what each layer keeps for them."""

    rows: list[int]
    layers: list[Any]  # LayerMemory, or KeptMemory of the other kinds

    def select(self, positions: Sequence[int], rows: list[int]) -> RowGroup:
        """Those at `positions`, copied, as rows `rows` of a batch."""
        index = torch.tensor(positions)
        return RowGroup(rows, [layer.select(index) for layer in self.layers])


class _LayerView(CacheLayerMixin):
    """Lets generation ask a layer how long the cache is; what is kept lies in the cache's groups."""

    is_sliding = False

    def __init__(self, cache: ElasticMemoryCache) -> None:
        super().__init__()
        self.cache = cache

    def get_seq_length(self, *_: Any) -> int:
        return self.cache.columns

    def get_mask_sizes(self, query_length: Any, *_: Any) -> tuple[int, int]:
        new = query_length if isinstance(query_length, int) else len(query_length)
        return self.cache.columns + new, 0

    def get_max_length(self) -> int:
        return -1

    get_max_cache_shape = get_max_length  # its name before transformers 5.16

    def lazy_initialization(self, *_: Any) -> None:
        raise NotImplementedError("the layers of an ElasticMemoryCache are filled by the model")

    update = lazy_initialization


class ElasticMemoryCache(Cache):
    """The memory of a batch between calls: constant in the length of what was read, but for the kinds full and subsample.

    Rows that were padded differently stand at different places; they are kept, and computed, in groups.
    """

    def __init__(self, config: ElasticMemoryConfig) -> None:
        super().__init__(layers=[_LayerView(self) for _ in range(config.num_hidden_layers)])
        self.block_length, self.memory_layers = config.block_length, tuple(config.memory_layers)
        self.is_elastic = config.memory_kind == "elastic"
        self.columns = 0  # of input_ids read, padding included, since `fold`
        self.groups: list[RowGroup] = []

    def new_group(self, rows: list[int]) -> RowGroup:
        """Rows that have read nothing yet."""
        if self.is_elastic:
            layers = [LayerMemory(self.block_length, i in self.memory_layers) for i in range(len(self.layers))]
            return RowGroup(rows, layers)
        return RowGroup(rows, [KeptMemory(self.block_length) for _ in self.layers])

    @property
    def tokens_read(self) -> list[int]:
        """Real tokens read by each row."""
        read = {row: group.layers[0].tokens for group in self.groups for row in group.rows}
        return [read[row] for row in sorted(read)]

    @property
    def num_bytes(self) -> int:
        """Bytes held by all layers."""
        return sum(layer.num_bytes for group in self.groups for layer in group.layers)

    def fold(self) -> ElasticMemoryCache:
        """Lets the next call give only what is new: the length that generation sees starts from 0 again."""
        self.columns = 0
        return self

    def copy(self) -> ElasticMemoryCache:
        """A second cache of the same content; generating from one leaves the other as it was."""
        return self._chosen(range(sum(len(group.rows) for group in self.groups)))

    def detach(self) -> ElasticMemoryCache:
        """A second cache of the same content, cut from the gradient: for training on a text in successive calls."""
        other = self._chosen(range(sum(len(group.rows) for group in self.groups)))
        other.groups = [RowGroup(group.rows, [layer.detached() for layer in group.layers]) for group in other.groups]
        return other

    def _chosen(self, sources: Iterable[int]) -> ElasticMemoryCache:
        """Row i of the result is row sources[i] of this one."""
        wanted = [(new, int(old)) for new, old in enumerate(sources)]
        other = object.__new__(ElasticMemoryCache)
        other.__dict__.update(self.__dict__)
        other.layers, other.groups = [_LayerView(other) for _ in self.layers], []
        for group in self.groups:
            found = [(group.rows.index(old), new) for new, old in wanted if old in group.rows]
            if found:
                other.groups.append(group.select([old for old, _ in found], [new for _, new in found]))
        return other

    def reorder_cache(self, beam_idx: Tensor) -> None:
        self.groups = self._chosen(beam_idx.tolist()).groups

    batch_select_indices = reorder_cache

    def batch_repeat_interleave(self, repeats: int) -> None:
        rows = range(sum(len(group.rows) for group in self.groups))
        self.groups = self._chosen([row for row in rows for _ in range(repeats)]).groups

    def crop(self, *_: Any) -> None:
        raise ValueError(
            "a memory cannot be cropped: give generate() a copy() of the cache, or do without an assistant"
        )

    def reset(self) -> None:
        self.columns, self.groups = 0, []

    def split(self, new_tokens: Sequence[int]) -> list[tuple[RowGroup, int]]:
        """Groups whose rows take equally many tokens now, row i taking new_tokens[i], each with that number.

        A batch that is a multiple of what is held repeats each row.
        """
        if not self.groups:
            self.groups = [self.new_group(list(range(len(new_tokens))))]
        rows = sum(len(group.rows) for group in self.groups)
        if len(new_tokens) % rows:
            raise ValueError(f"this cache holds {rows} rows, which does not fit a batch of {len(new_tokens)}")
        if len(new_tokens) > rows:  # beams, or many questions on one text
            self.batch_repeat_interleave(len(new_tokens) // rows)
        groups = []
        for group in self.groups:
            counts = sorted({new_tokens[row] for row in group.rows})
            for count in counts:
                at = [i for i, row in enumerate(group.rows) if new_tokens[row] == count]
                part = group if len(counts) == 1 else group.select(at, [group.rows[i] for i in at])
                groups.append((part, count))
        self.groups = [group for group, _ in groups]
        return groups

    def save(self, path: str | Path, model: ElasticMemoryForCausalLM) -> None:
        """Writes the memory that `model` has read to one safetensors file, whole or not at all."""
        tensors, path = {}, Path(path)
        for g, group in enumerate(self.groups):
            tensors[f"{g}.rows"] = torch.tensor(group.rows)
            for i, layer in enumerate(group.layers):
                tensors |= {f"{g}.{i}.{name}": x.contiguous() for name, x in layer.tensors().items()}
        facts = {"fingerprint": model.fingerprint(), "columns": self.columns}
        facts |= {f"{g}.tokens": group.layers[0].tokens for g, group in enumerate(self.groups)}
        partial = path.with_name(path.name + ".partial")
        try:
            save_file(tensors, partial, {name: str(value) for name, value in facts.items()})
            partial.replace(path)
        finally:
            partial.unlink(missing_ok=True)

    @classmethod
    def load(cls, path: str | Path, model: ElasticMemoryForCausalLM) -> ElasticMemoryCache:
        """What `save` wrote, on the model's device.

        Raises:
            FileNotFoundError: there is no such file.
            ValueError: it is damaged, or was written with other weights, blocks or sizes of the memory.
        """
        if not Path(path).is_file():
            raise FileNotFoundError(f"there is no file {path}")
        try:
            with safe_open(path, "pt", device=str(model.device)) as file:
                facts = file.metadata() or {}
                tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        except SafetensorError as error:
            raise ValueError(f"{path} is no whole memory ({error}): save it again") from None
        if facts.get("fingerprint") != model.fingerprint():
            raise ValueError(
                f"{path} was written by a model with other weights, blocks or sizes of the memory: read the text again"
            )
        cache = cls(model.config)
        cache.columns = int(facts["columns"])
        for g in range(sum(name.endswith(".tokens") for name in facts)):
            group = cache.new_group(tensors[f"{g}.rows"].tolist())
            for i, layer in enumerate(group.layers):
                layer.tokens, prefix = int(facts[f"{g}.tokens"]), f"{g}.{i}."
                layer.restore({k.removeprefix(prefix): x for k, x in tensors.items() if k.startswith(prefix)})
            cache.groups.append(group)
        return cache


def real_tokens(attention_mask: Tensor | None, rows: int, new: int) -> Tensor | None:
    """[rows, new] bool; None where all are real."""
    if attention_mask is None:
        return None
    if attention_mask.dim() != 2 or len(attention_mask) != rows or attention_mask.shape[1] < new:
        raise ValueError(
            f"attention_mask is {list(attention_mask.shape)}: give one of [{rows}, at least {new}] that marks padding"
        )
    real = attention_mask[:, attention_mask.shape[1] - new :].bool()
    return None if bool(real.all()) else real


def refuse_packing(
    attention_mask: Tensor | None, rows: int, new: int, position_ids: Tensor | None = None, **kwargs: Any
) -> None:
    """Texts packed into one row would read each other: places that start again, or lengths of parts, are an error."""
    packed = any(kwargs.get(name) is not None for name in ("cu_seq_lens_q", "cu_seq_lens_k", "cu_seqlens", "seq_idx"))
    if position_ids is not None and new > 1:
        steps = (position_ids[..., -new:].diff(dim=-1) == 1).view(-1, new - 1).expand(rows, -1)
        real = real_tokens(attention_mask, rows, new)
        packed |= not bool((steps if real is None else steps | ~real[:, 1:] | ~real[:, :-1]).all())
    if packed:
        raise ValueError("several texts in one row would read each other's memory: give each a row, padded on the left")
