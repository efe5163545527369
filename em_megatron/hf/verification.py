"""Whether a Hugging Face folder computes what the Megatron model computes: logits, memory state, token ids."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor

from em_megatron.config import RunConfig
from em_megatron.data.manifest import DataError
from em_megatron.data.vocabulary import Vocabulary
from em_megatron.hf.export import Source
from em_megatron.hf.fast_tokenizer import ODD_STRINGS, check_same_ids, differing_texts, gives_the_same_ids
from em_megatron.hf.weight_mapping import ConversionError
from em_megatron.model.kind_core import KindCache
from em_megatron.model.melodi_cache import MelodiCache, MelodiLayerCache
from em_megatron.model.memory_cache import MemoryCache

TOLERANCE = 1e-4  # of logits and states in fp32, absolute up to a size of 1 (states), relative beyond
BLOCKS = 3  # whole blocks that are read, and half of another


@dataclass(frozen=True)
class Computed:
    """logits [T, vocab]; states: what the layers keep at the end of the text, by layer and name."""

    logits: Tensor
    states: dict[str, Tensor]


@dataclass(frozen=True)
class Comparison:
    """Largest differences over `tokens` tokens, of logits, and of states as a share of the larger of 1 and their size.

    texts: compared by their ids, and how many of them got others (only where scores of the tokenizer are not rounded).
    """

    tokens: int
    logits: float
    states: float
    texts: int = 0
    other_ids: int = 0

    def check(self) -> None:
        """Raises ConversionError where Hugging Face computes something else."""
        if not (self.logits <= TOLERANCE and self.states <= TOLERANCE):  # not a number fails too
            raise ConversionError(
                f"the exported folder computes something else: over {self.tokens} tokens logits differ by up to "
                f"{self.logits:.3g} and memory states by {self.states:.3g} ({TOLERANCE:g} is allowed)"
            )


def verify(source: Source, folder: Path, overrides: Sequence[str], text: str) -> Comparison:
    """Loads `folder` as a user would, and compares it with the checkpoint in fp32 on the CPU.

    Raises:
        ConversionError, DataError: they differ.
    """
    ids = _ids(source.vocabulary, text, source.config.memory.block_length)
    texts = [*ODD_STRINGS, *text[: 1 << 20].splitlines(keepends=True)]
    other_ids = check_tokenizer(source.vocabulary, folder, texts)
    found = compare(megatron(source, overrides, ids), hugging_face(folder, ids))
    found.check()
    return replace(found, texts=len(texts), other_ids=other_ids)


def _ids(vocabulary: Vocabulary, text: str, block_length: int) -> Tensor:
    """bos and the first tokens of the text, [1, T] over more than BLOCKS blocks."""
    wanted = BLOCKS * block_length + max(1, block_length // 2)
    ids = vocabulary.encode(text[: 16 * wanted])  # more than enough characters, as a rule
    while len(ids) < wanted - 1:
        if len(ids) == 0:
            raise ConversionError("the text to compare with is empty: give another --text")
        ids += ids
    return torch.tensor([[vocabulary.bos_id, *ids][:wanted]])


def check_tokenizer(vocabulary: Vocabulary, folder: Path, texts: Sequence[str]) -> int:
    """How many texts get other ids from the folder's tokenizer: none, or an error, where the tokenizer promises that.

    Raises:
        DataError: other ids, though the model is one of those that fast_tokenizer copies exactly; or a text is not given
            back.
    """
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=True, local_files_only=True)
    if gives_the_same_ids(vocabulary):
        check_same_ids(vocabulary, tokenizer, texts)
        return 0
    return differing_texts(vocabulary, tokenizer, texts)


@torch.no_grad()
def megatron(source: Source, overrides: Sequence[str], ids: Tensor) -> Computed:
    """ids [1, T] through the Megatron model in a world of one: logits as in training, states as in generation."""
    from em_megatron.model.language_model import memory_cache
    from em_megatron.ops.block_layout import BlockLayout
    from em_megatron.parallel.process_groups import shutdown
    from em_megatron.training.restore import restore

    run = restore(source.checkpoint, [*overrides, "training.precision=fp32"], world_size=1)
    try:
        model, length = run.model[0], run.config.memory.block_length
        for parameter in model.parameters():
            parameter.copy_(parameter.to(source.dtype))
        tokens = torch.zeros(1, math.ceil(ids.shape[1] / length) * length, dtype=torch.int64)
        tokens[:, : ids.shape[1]] = ids
        segments = torch.zeros_like(tokens)
        segments[:, : ids.shape[1]] = 1
        layout = BlockLayout.from_segment_ids(segments, length, ids.device)
        logits = model(tokens, None, None, packed_seq_params=layout, runtime_gather_output=True)[0, : ids.shape[1]]
        cache = memory_cache(model, batch_size=1)
        for part in ids.split(length, 1):
            model(part, None, None, inference_context=cache, runtime_gather_output=True)
        states = _kept(cache)
    finally:
        shutdown()
    return Computed(logits, states)


def _kept(cache: MemoryCache | MelodiCache) -> dict[str, Tensor]:
    """What Megatron's layers keep of one row, as the layers of `transformers` name it."""
    found: dict[str, Tensor] = {}
    for number, layer in cache.layers.items():
        if isinstance(layer, MelodiLayerCache):
            index, tensors = number - 1, {name: x for name, x in vars(layer.memory).items() if isinstance(x, Tensor)}
        else:  # sub-layers alternate: attention, MLP
            index, tensors = (number - 1) // 2, dict(layer.kept) if isinstance(layer, KindCache) else {}
            if layer.state is not None:
                tensors["state"] = layer.state.permute(1, 2, 0, 3)
        found |= {f"layer {index}, {name}": x[0] for name, x in tensors.items()}
    return found


@torch.no_grad()
def hugging_face(folder: Path, ids: Tensor) -> Computed:
    """ids [1, T] through the folder's own code."""
    from transformers import AutoModelForCausalLM
    from transformers.utils import logging

    logging.disable_progress_bar()
    model = AutoModelForCausalLM.from_pretrained(
        folder, trust_remote_code=True, local_files_only=True, dtype=torch.float32
    ).eval()
    from em_megatron.hf.modeling_elastic_memory import CACHE

    out = model(ids, use_cache=True)
    layers = out[CACHE].groups[0].layers
    elastic = model.config.memory_kind == "elastic"
    states = {
        f"layer {i}, {name}": x[0]
        for i, layer in enumerate(layers)
        for name, x in layer.tensors().items()
        if name == "state" or not elastic
    }
    return Computed(out.logits[0], states)


def compare(here: Computed, there: Computed) -> Comparison:
    """Largest differences; a memory that only one of them has is an error."""
    if here.states.keys() != there.states.keys():
        raise ConversionError(f"Megatron keeps {sorted(here.states)} of a text, the export {sorted(there.states)}")
    states = [
        float((state - there.states[layer]).abs().max() / state.abs().max().clamp(min=1))
        for layer, state in here.states.items()
    ]
    logits = float((here.logits - there.logits).abs().max())
    return Comparison(len(here.logits), logits, float(torch.tensor([0.0, *states]).max()))  # keeps a NaN, unlike max()


def sample_text(config: RunConfig, vocabulary: Vocabulary, file: Path | None) -> str:
    """Real text to compare on: the given file, else held-out documents of the run, else this package's own source."""
    if file is not None:
        if not file.is_file():
            raise ConversionError(f"there is no text file {file}")
        return file.read_text(encoding="utf-8")
    return _held_out_text(config, vocabulary) or _own_source()


def _held_out_text(config: RunConfig, vocabulary: Vocabulary) -> str:
    from em_megatron.data.blend import parse_blend
    from em_megatron.data.manifest import Manifest
    from em_megatron.data.shards import ShardReader

    folder = Path(parse_blend(config.data.path)[0].location).expanduser()
    wanted = (BLOCKS + 1) * config.memory.block_length
    try:
        manifest = Manifest.load(folder)
        manifest.check_tokenizer(vocabulary)
        reader = ShardReader(folder, "validation" if manifest.splits.get("validation") else "train")
    except DataError:  # the corpus has moved, or is not on this machine
        return ""
    ids: list[int] = []
    for document in range(len(reader)):
        ids += reader.tokens(document).tolist()
        if len(ids) >= wanted:
            break
    return vocabulary.decode(ids)


def _own_source() -> str:
    package = Path(__file__).parent.parent
    return "\n".join(path.read_text(encoding="utf-8") for path in sorted(package.rglob("*.py")))
