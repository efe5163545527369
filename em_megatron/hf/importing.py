"""A Hugging Face folder → a run folder with one checkpoint of weights: Elastic Memory's own, or a Llama-style model.

    config.json + *.safetensors  ──table──▶  Megatron model  ──▶  RUN/checkpoints/step_00000000, RUN/tokenizer.*

Elastic Memory has no weights, so a model trained with full attention can go on training with it.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from em_megatron.config import ConfigError, RunConfig, config_text, load_config
from em_megatron.data.manifest import DataError
from em_megatron.data.vocabulary import Vocabulary, find_tokenizer
from em_megatron.hf.config_mapping import take_memory, take_model
from em_megatron.hf.export import RECIPE_NAME
from em_megatron.hf.weight_mapping import (
    ConversionError,
    check_complete,
    shapes_there,
    table,
    tensor_parallel_part,
    to_megatron,
)
from em_megatron.model.sizes import padded_vocab_size, shape_of, weight_identity
from em_megatron.validate import validate

OVERRIDES = ("memory.", "data.", "parallel.tensor_model_parallel_size=", "training.precision=")
OURS = "ElasticMemoryForCausalLM"
LLAMA_STYLE = ("LlamaForCausalLM", "MistralForCausalLM", "Qwen3ForCausalLM")
PRECISION = {"F32": "fp32", "F16": "fp32", "BF16": "bf16"}  # fp16 fits into fp32 without loss


@dataclass(frozen=True)
class HubFolder:
    """config: config.json as it stands; shapes, dtypes, files: of each tensor."""

    path: Path
    config: dict[str, Any]
    shapes: dict[str, tuple[int, ...]]
    dtypes: dict[str, str]
    files: dict[str, Path]


def read_folder(path: Path) -> HubFolder:
    """Reads the configuration and the headers of the weight files.

    Raises:
        ConversionError: a file is missing, cut short, or is not what its name says.
    """
    config = _read_json(path / "config.json")
    index = path / "model.safetensors.index.json"
    listed = _listed(index) if index.is_file() else ["model.safetensors"]
    shapes: dict[str, tuple[int, ...]] = {}
    dtypes: dict[str, str] = {}
    files: dict[str, Path] = {}
    for name in sorted(set(listed)):
        with _open(path / name) as file:
            for key in file.keys():  # noqa: SIM118
                part = file.get_slice(key)
                shapes[key], dtypes[key], files[key] = tuple(part.get_shape()), part.get_dtype(), path / name
    return HubFolder(path, config, shapes, dtypes, files)


def _listed(index: Path) -> list[str]:
    """The weight files that an index names."""
    weight_map = _read_json(index).get("weight_map")
    names = weight_map.values() if isinstance(weight_map, dict) else ()
    if not names or not all(isinstance(name, str) and Path(name).name == name for name in names):
        raise ConversionError(f"{index} is not valid: its weight_map must name a file beside it for each tensor")
    return list(names)


def _read_json(path: Path) -> dict[str, Any]:
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ConversionError(
            f"{path.parent} is no Hugging Face folder with safetensors: {path.name} is missing"
        ) from None
    except ValueError as error:
        raise ConversionError(f"{path} is not valid JSON ({error}): fetch it again") from None
    if not isinstance(found, dict):
        raise ConversionError(f"{path} is not valid: it holds no mapping")
    return found


def _open(path: Path) -> Any:
    from safetensors import SafetensorError, safe_open

    if not path.is_file():
        raise ConversionError(f"the weight file {path} is missing: fetch it (pickled .bin files are not read)")
    try:
        return safe_open(path, "pt")
    except SafetensorError as error:
        raise ConversionError(f"the weight file {path} is damaged ({error}): fetch it again") from None


def run_config(folder: HubFolder, out: Path, overrides: Sequence[str]) -> RunConfig:
    """The recipe of the run that the folder becomes.

    Raises:
        ConversionError: an architecture, or an option of it, that this model does not have.
        ConfigError: overrides that cannot work.
    """
    architectures = folder.config.get("architectures") or ["none"]
    architectures = [architectures] if isinstance(architectures, str) else architectures
    if architectures[0] not in (OURS, *LLAMA_STYLE):
        raise ConversionError(
            f"{folder.path} holds the architecture {architectures[0]}, which is unknown here: this reads {OURS} and "
            f"the Llama-style {', '.join(LLAMA_STYLE)}"
        )
    ours = architectures[0] == OURS
    config = load_config(*_starting_point(folder.path / RECIPE_NAME))
    config.name, config.output_dir = out.name, str(out.parent)
    try:
        fields = _fields_of_ours(folder.config) if ours else _fields_of_llama(folder, architectures[0])
        rows = int(fields["vocab_size"])
        take_model(config.model, fields)
        if ours:
            take_memory(config.memory, fields)
    except (KeyError, TypeError, ValueError) as error:
        raise ConversionError(f"{folder.path}/config.json lacks or garbles a field ({error})") from None
    if rows % config.model.make_vocab_size_divisible_by or not ours:
        config.model.make_vocab_size_divisible_by = rows  # any tokenizer that fits then fills these rows
    config.training.precision = _precision(folder)
    for override in overrides:
        if not override.startswith(OVERRIDES):
            raise ConfigError(f"override '{override}' has no place in an import: these do: {', '.join(OVERRIDES)}")
    there = weight_identity(config.model, config.memory)
    config = load_config(config, overrides)
    if weight_identity(config.model, config.memory) != there:
        raise ConversionError(
            f"{folder.path} has no weights for memory.kind '{config.memory.kind}' as it is set here, or has others: kinds "
            "with weights of their own (infini, memorizing, melodi) are imported as they were exported"
        )
    return config


def _starting_point(recipe: Path) -> tuple[Path | None, list[str]]:
    """The recipe that travelled with the weights, on one rank; else the defaults, to be filled."""
    overrides = [
        *(f"parallel.{axis}_parallel_size=1" for axis in ("tensor_model", "pipeline_model", "virtual_pipeline_model", "context")),
        "parallel.sequence_parallel=false",
        "memory.carry_memory=false",
        "checkpoint.initial_load_path=null",
    ]  # fmt: skip
    if recipe.is_file():
        return recipe, overrides
    return None, [*overrides, "name=imported", "data.path=data", "model.size=tiny"]


def _fields_of_ours(config: dict[str, Any]) -> dict[str, Any]:
    from em_megatron.hf.configuration_elastic_memory import ElasticMemoryConfig

    known = {"name_or_path", "architectures", "auto_map", "dtype", "transformers_version", "model_type"}
    return ElasticMemoryConfig(**{name: value for name, value in config.items() if name not in known}).to_dict()


def _fields_of_llama(folder: HubFolder, architecture: str) -> dict[str, Any]:
    """What a Llama-style configuration says, in the names of ours; refuses what this model cannot compute."""
    config = folder.config
    rope = config.get("rope_parameters") or config.get("rope_scaling") or {}
    kind = rope.get("rope_type", rope.get("type", "default"))
    wrong = {
        "attention_bias": config.get("attention_bias", False),
        "mlp_bias": config.get("mlp_bias", False),
        f"rotary embedding of type '{kind}'": kind != "default",
        f"activation '{config.get('hidden_act')}'": config.get("hidden_act", "silu") != "silu",
        f"sliding window of {config.get('sliding_window')}": config.get("sliding_window") is not None
        and config.get("use_sliding_window", True),
    }
    if found := [name for name, present in wrong.items() if present]:
        raise ConversionError(
            f"{folder.path} has a {found[0]}, which this model does not have: it cannot be a starting point"
        )
    heads = config["num_attention_heads"]
    return {
        "initializer_range": 0.02,
        "rms_norm_eps": 1e-6,
        "tie_word_embeddings": False,
        **config,
        "num_key_value_heads": config.get("num_key_value_heads") or heads,
        "head_dim": config.get("head_dim") or config["hidden_size"] // heads,
        "rope_theta": config.get("rope_theta") or rope.get("rope_theta", 10000.0),
        "qk_norm": architecture == "Qwen3ForCausalLM",
    }


def _precision(folder: HubFolder) -> str:
    found = {PRECISION.get(dtype, dtype) for dtype in folder.dtypes.values()}
    if unknown := found - {"fp32", "bf16"}:
        raise ConversionError(f"{folder.path} stores weights as {', '.join(sorted(unknown))}: give fp32, fp16 or bf16")
    return "bf16" if found == {"bf16"} else "fp32"


def vocabulary_of(folder: HubFolder, config: RunConfig) -> Vocabulary | None:
    """The folder's tokenizer where it is one that can be used, else None.

    Raises:
        ConversionError: one of our own without a tokenizer, or one with other rows than the embedding's.
    """
    ours = OURS in folder.config["architectures"]
    try:
        vocabulary = Vocabulary(find_tokenizer(folder.path))
    except DataError as error:
        if ours:
            raise ConversionError(
                f"the tokenizer of {folder.path} cannot be used ({error.args[0].partition(';')[0]}): copy "
                "tokenizer.model from the folder that was exported (tokenizer.json where it holds no tokenizer.model)"
            ) from None
        return None
    rows = int(folder.config["vocab_size"])
    if padded_vocab_size(vocabulary.size, config.model.make_vocab_size_divisible_by) != rows:
        raise ConversionError(
            f"{vocabulary.path} has {vocabulary.size} ids, which does not fit the {rows} rows of the embedding: it belongs to "
            "another model"
        )
    return vocabulary


def import_folder(folder: HubFolder, config: RunConfig, out: Path, world_size: int, say: Callable[[str], None]) -> None:
    """Writes the run folder `out` beside its place, and then gives it its name; all tensor-parallel ranks take part.

    Raises:
        ConversionError, ConfigError, CheckpointError: what cannot be imported; nothing is left behind.
    """
    from em_megatron.checkpoint.ranks import on_rank_zero
    from em_megatron.checkpoint.sharded import CheckpointStore
    from em_megatron.training.setup import build_chunks, initialize_layout

    config.training.global_batch_size = config.training.micro_batch_size = 1
    validate(config, world_size)
    if out.exists():
        raise ConversionError(f"{out} is there already: give another folder, or remove it")
    rows = int(folder.config["vocab_size"])
    _check(folder, config, rows)
    vocabulary = vocabulary_of(folder, config)
    layout = initialize_layout(config)
    model = build_chunks(config, layout, rows, initialize=False)
    fill(folder, config, rows, model[0], layout.tp_rank, layout.tp_size, say)
    writing = out.with_name(f".{out.name}.writing")
    on_rank_zero(lambda: shutil.rmtree(writing, ignore_errors=True))
    try:
        say("writing the checkpoint")
        CheckpointStore(writing / "checkpoints", 1).save(
            0,
            model_chunks=model,
            optimizer=None,
            scheduler=None,
            train_state={"step": 0},
            config_text=config_text(config),
        )

        def finish() -> None:
            if vocabulary is not None:
                (writing / vocabulary.file_name).write_bytes(vocabulary.serialized)
            (writing / "config.yaml").write_text(config_text(config))
            writing.rename(out)

        on_rank_zero(finish)
    finally:
        if layout.world_rank == 0:
            shutil.rmtree(writing, ignore_errors=True)


def _check(folder: HubFolder, config: RunConfig, rows: int) -> None:
    """Names and shapes of the weights against the table."""
    shape = shape_of(config.model)
    expected = {
        name: size
        for row in table(config.model, rows, config.memory)
        for name, size in shapes_there(row, shape).items()
    }
    found = {name: size for name, size in folder.shapes.items() if not name.endswith("rotary_emb.inv_freq")}
    if config.model.share_embeddings_and_output_weights and "lm_head.weight" in found:
        same = torch.equal(*(_tensor(folder, name) for name in ("lm_head.weight", "model.embed_tokens.weight")))
        if not same:
            raise ConversionError(f"{folder.path} ties its embeddings, but stores an lm_head.weight of other numbers")
        del found["lm_head.weight"]
    check_complete(expected, found, str(folder.path))


def _tensor(folder: HubFolder, name: str) -> Tensor:
    with _open(folder.files[name]) as file:
        found: Tensor = file.get_tensor(name)
    return found


@torch.no_grad()
def fill(
    folder: HubFolder,
    config: RunConfig,
    vocab_size: int,
    model: torch.nn.Module,
    rank: int,
    size: int,
    say: Callable[[str], None],
) -> None:
    """Gives a Megatron model of one pipeline stage this tensor-parallel rank's part of the folder's weights."""
    from megatron.core.utils import unwrap_model

    shape, here = shape_of(config.model), dict(unwrap_model([model])[0].named_parameters())
    rows = table(config.model, vocab_size, config.memory)
    for number, row in enumerate(rows):
        if number % 100 == 0:
            say(f"reading weights, {number} of {len(rows)} tensors")
        weights: Mapping[str, Tensor] = {name: _tensor(folder, name) for name in row.hugging_face}
        part = tensor_parallel_part(row, to_megatron(row, weights, shape), rank, size)
        parameter = here.pop(row.megatron)
        if parameter.shape != part.shape:
            raise ConversionError(
                f"{row.megatron} is {list(parameter.shape)} in the model and {list(part.shape)} there"
            )
        parameter.copy_(part)
    if here:
        raise ConversionError(f"{len(here)} weights of the model have no row in the table, such as {next(iter(here))}")
