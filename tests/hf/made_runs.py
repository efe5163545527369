"""Run folders with a checkpoint of weights alone, made without training, on one rank or several."""

from __future__ import annotations

import shutil
from pathlib import Path

import torch

from em_megatron.checkpoint.sharded import CheckpointStore
from em_megatron.config import RunConfig, config_text, load_config
from em_megatron.data.vocabulary import Vocabulary
from em_megatron.parallel.process_groups import shutdown
from em_megatron.training.setup import build_chunks, initialize_layout

MODEL = (
    "name=made",
    "data.path=nowhere",
    "data.sequence_length=80",
    "model.num_layers=4",
    "model.hidden_size=32",
    "model.num_attention_heads=4",
    "model.num_query_groups=2",
    "model.kv_channels=8",
    "model.ffn_hidden_size=48",
    "model.init_method_std=0.2",
    "memory.block_length=16",
    "memory.order=12",
    "memory.slots=5",
    "memory.bank_cache=null",
    "training.precision=fp32",
)
VARIANTS = {
    "plain": (),
    "tied": ("model.share_embeddings_and_output_weights=true",),
    "qk-norm, exponential": ("model.qk_layernorm=true", "memory.sampler=exponential"),
    "memory in two layers, window": ("memory.layers=1-2", "memory.sampler=window", "memory.sampler_hi=0.5"),
    "no memory": ("memory.kind=block_local",),
    "bilinear, points": (
        "memory.discretization=bilinear",
        "memory.sampler=points",
        "memory.slots=2",
        "memory.sampler_points=[0.25,0.75]",
    ),
    "backward Euler": ("memory.discretization=backward_euler",),
    "one key/value head, other base": ("model.num_query_groups=1", "model.rotary_base=500000", "model.kv_channels=6"),
    "bf16": ("training.precision=bf16",),
}
# The other memory kinds, with the settings that keep most of them busy in 56 tokens.
KINDS = {
    "full": ("memory.kind=full", "memory.layers=1,3"),
    "transformer_xl": ("memory.kind=transformer_xl",),
    "subsample": ("memory.kind=subsample", "memory.sampler=exponential"),
    "infini, linear": ("memory.kind=infini",),
    "infini, delta": ("memory.kind=infini", "memory.update=delta", "memory.layers=1-2"),
    "memorizing, top-k": ("memory.kind=memorizing", "memory.pairs=21", "memory.top_k=3"),
    "memorizing, dense": ("memory.kind=memorizing", "memory.top_k=0", "memory.layers=all"),
    "melodi": (
        "memory.kind=melodi",
        "memory.short_term_tokens=3",
        "memory.long_term_increment=2",
        "memory.long_term_tokens=4",
    ),
    "melodi, tied, short-term alone": (
        "memory.kind=melodi",
        "memory.short_term_tokens=3",
        "memory.layers=none",
        "model.share_embeddings_and_output_weights=true",
        "model.qk_layernorm=true",
    ),
}
VARIANTS |= KINDS


# Those that a change is least likely to break alone run in `make test-slow`.
SLOW = (
    "no memory",
    "backward Euler",
    "one key/value head, other base",
    "full",
    "infini, delta",
    "memorizing, dense",
    "melodi, tied, short-term alone",
)


def config_of(*overrides: str) -> RunConfig:
    return load_config(None, [*MODEL, *overrides])


def write_run(folder: Path, tokenizer: Path, config: RunConfig, saved_as: RunConfig | None = None) -> Path:
    """Called by all ranks of the config's layout; norms and padding rows get numbers too."""
    layout = initialize_layout(config)
    chunks = build_chunks(config, layout, Vocabulary(tokenizer).size)
    with torch.no_grad():
        for chunk in chunks:
            for parameter in chunk.parameters():
                if parameter.dim() == 1:
                    parameter.copy_(1 + 0.3 * torch.sin(torch.arange(len(parameter))))
    CheckpointStore(folder / "checkpoints", 1).save(
        7,
        model_chunks=chunks,
        optimizer=None,
        scheduler=None,
        train_state={"step": 7},
        config_text=config_text(saved_as or config),
    )
    if layout.world_rank == 0:
        shutil.copyfile(tokenizer, folder / "tokenizer.model")
    return folder


def made_run(folder: Path, tokenizer: Path, *overrides: str, saved_as: RunConfig | None = None) -> Path:
    """A run folder of one rank."""
    try:
        return write_run(folder, tokenizer, config_of(*overrides), saved_as)
    finally:
        shutdown()


def write_from_layout(folder: Path, tokenizer: Path, overrides: list[str]) -> None:
    """The same on the ranks of a pool, whose groups are made anew."""
    from megatron.core import parallel_state

    parallel_state.destroy_model_parallel()
    write_run(folder, tokenizer, config_of(*overrides))
