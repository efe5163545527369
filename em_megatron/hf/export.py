"""A distributed checkpoint of any layout → a Hugging Face folder that carries its own code.

    checkpoint/  ──table──▶  safetensors + config.json + 7 Python files + tokenizer + model card  ──▶ compared with Megatron

Weights are read on the CPU, tensor by tensor, without the world that trained them.
"""

from __future__ import annotations

import json
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from em_megatron.checkpoint.contents import StoredTensor, stored_tensors
from em_megatron.checkpoint.folder import CheckpointError, damage, find_checkpoint
from em_megatron.config import ConfigError, RunConfig
from em_megatron.data.vocabulary import Vocabulary, find_tokenizer
from em_megatron.hf.config_mapping import MEMORY, hugging_face_config
from em_megatron.hf.generation import READER_KEYS
from em_megatron.hf.weight_mapping import ConversionError, Row, check_complete, table, to_hugging_face
from em_megatron.model.sizes import padded_vocab_size, shape_of
from em_megatron.training.restore import saved_config

RECIPE_NAME = "training_recipe.yaml"
CODE = ("configuration", "hippo", "kinds", "melodi", "cache", "layers", "modeling")
AUTO_MAP = {
    "AutoConfig": "configuration_elastic_memory.ElasticMemoryConfig",
    "AutoModel": "modeling_elastic_memory.ElasticMemoryModel",
    "AutoModelForCausalLM": "modeling_elastic_memory.ElasticMemoryForCausalLM",
}
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
_NOT_WEIGHTS = ("optimizer.", "extra.")


@dataclass(frozen=True)
class Source:
    """A checkpoint that is whole, and what it holds. `dtype` is that of the exported weights."""

    checkpoint: Path
    config: RunConfig
    vocabulary: Vocabulary
    rows: list[Row]
    dtype: torch.dtype
    step: int

    @property
    def run_dir(self) -> Path:
        return self.checkpoint.parent.parent


def open_checkpoint(path: Path, overrides: Sequence[str], dtype: str = "stored") -> Source:
    """Reads a run or checkpoint folder, but no weights yet.

    Args:
        path: run folder, or one of its checkpoints/step_*.
        overrides: memory.KEY=VALUE, the reader that the folder will have.
        dtype: of the exported weights: stored, fp32 or bf16.

    Raises:
        CheckpointError, ConfigError, DataError, ConversionError: what cannot be exported, in one sentence.
    """
    readers = tuple(f"memory.{key}=" for key in READER_KEYS)
    for override in overrides:
        if not override.startswith(readers):
            raise ConfigError(f"override '{override}' has no place in an export: these have: {' '.join(readers)}")
    checkpoint = find_checkpoint(path)
    if reason := damage(checkpoint):
        raise CheckpointError(f"{checkpoint} cannot be exported: {reason}")
    config = saved_config(checkpoint, overrides)
    _check_reader(config.memory.kind, overrides)
    if config.model.layer_pattern and set(config.model.layer_pattern) != {"*"}:
        raise ConfigError(
            f"{checkpoint} has layers M or G (model.layer_pattern '{config.model.layer_pattern}'), which the exported class "
            "does not have"
        )
    vocabulary = Vocabulary(find_tokenizer(checkpoint.parent.parent))
    vocab_size = padded_vocab_size(vocabulary.size, config.model.make_vocab_size_divisible_by)
    rows = table(config.model, vocab_size, config.memory)
    weights = {key: found for key, found in stored_tensors(checkpoint).items() if not key.startswith(_NOT_WEIGHTS)}
    expected, found = {row.megatron: row.shape for row in rows}, {key: tensor.shape for key, tensor in weights.items()}
    check_complete(expected, found, str(checkpoint))
    step = int(json.loads((checkpoint / "train_state.json").read_text())["step"])
    return Source(checkpoint, config, vocabulary, rows, DTYPES.get(dtype) or _one_dtype(weights), step)


def _check_reader(kind: str, overrides: Sequence[str]) -> None:
    """Raises ConfigError for a reader that the memory kind does not have."""
    from em_megatron.hf.configuration_elastic_memory import reader_kinds

    kind = "elastic" if kind == "block_local" else kind
    for override in overrides:
        if kind not in reader_kinds(MEMORY[override.removeprefix("memory.").partition("=")[0]]):
            raise ConfigError(f"override '{override}' has no place in a memory of kind '{kind}': leave it out")


def _one_dtype(weights: dict[str, StoredTensor]) -> torch.dtype:
    found = {tensor.dtype for tensor in weights.values()}
    if len(found) > 1:
        raise ConversionError(
            f"the weights are stored in {', '.join(sorted(map(str, found)))}: give --dtype fp32 or bf16"
        )
    return found.pop()


def export(
    source: Source, out: Path, max_shard_bytes: int, describe: Callable[[Path], str], say: Callable[[str], None]
) -> None:
    """Writes the folder beside its place, compares it, and only then gives it its name.

    Args:
        source: what to export.
        out: the folder to make; must not hold anything yet.
        max_shard_bytes: size of a safetensors file, at most (one tensor may be larger).
        describe: compares the finished folder with Megatron, and returns the model card; raises if they differ.
        say: shows progress.

    Raises:
        ConversionError: the folder cannot be made, or the comparison failed; nothing is left behind.
    """
    out = out.absolute()
    if out.is_symlink() or os.path.ismount(out) or (out.exists() and (not out.is_dir() or any(out.iterdir()))):
        raise ConversionError(f"{out} is there already: give another folder, or remove it")
    out.parent.mkdir(parents=True, exist_ok=True)
    writing = Path(tempfile.mkdtemp(prefix=f".{out.name}.", suffix=".writing", dir=out.parent))  # this call's alone
    try:
        writing.chmod(0o755)
        write_weights(source, writing, max_shard_bytes, say)
        write_configuration(source, writing)
        write_tokenizer(source, writing)
        (writing / "README.md").write_text(describe(writing))
        if out.exists():
            out.rmdir()
        writing.rename(out)
    finally:
        shutil.rmtree(writing, ignore_errors=True)


def write_weights(source: Source, folder: Path, max_shard_bytes: int, say: Callable[[str], None]) -> None:
    """model.safetensors, or numbered files and their index."""
    from safetensors import SafetensorError
    from safetensors.torch import save_file

    shards = list(_shards(source, max_shard_bytes))
    weight_map: dict[str, str] = {}
    total = 0
    for number, rows in enumerate(shards, start=1):
        name = f"model-{number:05}-of-{len(shards):05}.safetensors" if len(shards) > 1 else "model.safetensors"
        say(f"writing {name}")
        tensors = _converted(source, rows)
        try:
            save_file(tensors, folder / name, {"format": "pt"})
        except SafetensorError as error:
            raise ConversionError(f"{folder / name} cannot be written ({error}): make room, and call again") from None
        (folder / name).chmod(0o644)  # safetensors gives its files to their owner alone
        weight_map |= dict.fromkeys(tensors, name)
        total += sum(tensor.nbytes for tensor in tensors.values())
    if len(shards) > 1:
        index = {"metadata": {"total_size": total}, "weight_map": dict(sorted(weight_map.items()))}
        (folder / "model.safetensors.index.json").write_text(json.dumps(index, indent=1) + "\n")


def _shards(source: Source, max_bytes: int) -> Iterator[list[Row]]:
    """The rows in order, as many in each file as fit."""
    rows: list[Row] = []
    held = 0
    for row in source.rows:
        size = torch.empty(row.shape, device="meta").numel() * source.dtype.itemsize
        if rows and held + size > max_bytes:
            yield rows
            rows, held = [], 0
        rows.append(row)
        held += size
    yield rows


def _converted(source: Source, rows: list[Row]) -> dict[str, Tensor]:
    """Hugging Face tensors of these rows, read from the checkpoint in one pass."""
    shape = shape_of(source.config.model)
    weights = read_weights(source.checkpoint, [row.megatron for row in rows])
    out: dict[str, Tensor] = {}
    for row in rows:
        for name, part in to_hugging_face(row, weights.pop(row.megatron), shape).items():
            out[name] = part.to(source.dtype, copy=True).contiguous()
    return out


def read_weights(checkpoint: Path, keys: Sequence[str]) -> dict[str, Tensor]:
    """Whole tensors of a checkpoint in the dtype they are stored in, by this process alone."""
    from torch.distributed.checkpoint.filesystem import FileSystemReader
    from torch.distributed.checkpoint.state_dict_loader import load

    stored = stored_tensors(checkpoint)
    tensors = {key: torch.empty(stored[key].shape, dtype=stored[key].dtype) for key in keys}
    load(tensors, storage_reader=FileSystemReader(checkpoint), no_dist=True)
    return tensors


def write_configuration(source: Source, folder: Path) -> None:
    """config.json, generation_config.json, the recipe, and the Python files that travel with the weights."""
    config = hugging_face_config(source.config, source.vocabulary)
    fields = {
        **json.loads(config.to_json_string()),
        "architectures": ["ElasticMemoryForCausalLM"],
        "auto_map": AUTO_MAP,
    }
    fields["dtype"] = str(source.dtype).removeprefix("torch.")
    (folder / "config.json").write_text(json.dumps(fields, indent=2, sort_keys=True) + "\n")
    generation = {"bos_token_id": config.bos_token_id, "eos_token_id": config.eos_token_id}
    generation |= {"pad_token_id": config.pad_token_id, "transformers_version": fields["transformers_version"]}
    if without_token := list(range(source.vocabulary.size, config.vocab_size)):
        generation["suppress_tokens"] = without_token  # rows that only round the embedding up
    (folder / "generation_config.json").write_text(json.dumps(generation, indent=2) + "\n")
    shutil.copyfile(source.checkpoint / "config.yaml", folder / RECIPE_NAME)
    for name in CODE:
        file = f"{name}_elastic_memory.py"
        shutil.copyfile(Path(__file__).with_name(file), folder / file)


def write_tokenizer(source: Source, folder: Path) -> None:
    """The fast tokenizer of the same ids, and the run's own file, which is part of it or what it was made from."""
    from em_megatron.hf.fast_tokenizer import fast_tokenizer

    fast_tokenizer(source.vocabulary).save_pretrained(folder)
    (folder / source.vocabulary.file_name).write_bytes(source.vocabulary.serialized)
