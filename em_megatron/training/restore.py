"""A trained model out of a checkpoint, to evaluate or to generate with; its reader may be changed on the way."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from em_megatron.checkpoint.folder import find_checkpoint
from em_megatron.checkpoint.sharded import CheckpointStore
from em_megatron.config import ConfigError, MemoryConfig, RunConfig, load_config
from em_megatron.data.vocabulary import Vocabulary, find_tokenizer
from em_megatron.kinds import kind_of
from em_megatron.parallel.process_groups import Layout
from em_megatron.training.setup import build_chunks, initialize_layout, seed_ranks
from em_megatron.validate import check_same_weights, validate

# A layout of one rank, whatever the run was trained on.
ALONE = (
    "parallel.tensor_model_parallel_size=1",
    "parallel.pipeline_model_parallel_size=1",
    "parallel.virtual_pipeline_model_parallel_size=1",
    "parallel.context_parallel_size=1",
    "memory.carry_memory=false",
    "parallel.sequence_parallel=false",
    "parallel.use_distributed_optimizer=false",
    "training.recompute=none",
    "profiling.first_step=0",
)


@dataclass
class Restored:
    """Config, vocabulary and weights of a checkpoint, spread over the ranks at hand."""

    config: RunConfig
    layout: Layout
    vocabulary: Vocabulary
    model: list[torch.nn.Module]
    step: int
    checkpoint: Path


def saved_config(checkpoint: Path, overrides: Sequence[str]) -> RunConfig:
    """The recipe of the run, overridden; its layout is that of one rank unless an override says otherwise.

    Everything but `model.*` may change.

    Raises:
        ConfigError: an override that would need other weights.
    """
    for override in overrides:
        if override.startswith("model."):
            raise ConfigError(f"override '{override}' would need other weights: model.* is fixed by the checkpoint")
        if override.startswith("memory.carry_memory="):
            raise ConfigError(
                f"override '{override}' is for training: here each sample begins with an empty memory; for longer "
                "contexts raise data.sequence_length"
            )
    config, saved = (
        load_config(checkpoint / "config.yaml", [*ALONE, *overrides]),
        load_config(checkpoint / "config.yaml"),
    )
    check_same_weights(saved, config, checkpoint)
    return config


def restore(path: Path, overrides: Sequence[str], world_size: int, layout: Layout | None = None) -> Restored:
    """Loads the weights of a run or checkpoint folder onto the ranks at hand.

    layout: of another model in these processes, which this one is spread over in the same way.

    Raises:
        CheckpointError, ConfigError, DataError: what cannot be loaded, in one sentence.
    """
    checkpoint = find_checkpoint(path)
    config = saved_config(checkpoint, overrides)
    parallel = config.parallel
    model_ranks = parallel.tensor_model_parallel_size * parallel.pipeline_model_parallel_size
    data_parallel = max(1, world_size // (model_ranks * parallel.context_parallel_size))
    # Batch sizes of training say nothing here; one that divides keeps `validate` about what matters.
    config.training.global_batch_size = (
        config.training.micro_batch_size * data_parallel * parallel.pipeline_model_parallel_size
    )
    validate(config, world_size)
    vocabulary = Vocabulary(find_tokenizer(checkpoint.parent.parent))
    if layout is None:
        layout = initialize_layout(config)
        seed_ranks(config.seed, layout)
    model = build_chunks(config, layout, vocabulary.size, initialize=False)
    store = CheckpointStore(checkpoint.parent, config.checkpoint.keep_last)
    state = store.load(checkpoint, model_chunks=model)
    for chunk in model:
        chunk.eval()
    return Restored(config, layout, vocabulary, model, int(state["step"]), checkpoint)


def reader_of(memory: MemoryConfig) -> str:
    """The memory and its reader in a few words, for reports."""
    found = kind_of(memory).describe(memory)
    return found if memory.kind in ("elastic", "block_local") else f"{memory.kind}: {found}"
