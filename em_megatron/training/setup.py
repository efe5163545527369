"""From a recipe to everything a run holds: groups, data, model, optimizer, checkpoints."""

from __future__ import annotations

import dataclasses
import logging
import os
from collections.abc import Generator
from dataclasses import dataclass, field
from functools import cached_property
from operator import attrgetter
from pathlib import Path
from typing import Any

import torch
from megatron.core import tensor_parallel
from megatron.core.distributed import (
    DistributedDataParallel,
    DistributedDataParallelConfig,
    finalize_model_grads,
)

from em_megatron.checkpoint.folder import find_checkpoint
from em_megatron.checkpoint.sharded import CheckpointStore
from em_megatron.config import ConfigError, ModelConfig, RunConfig, config_text, load_config
from em_megatron.data.blend import BlendedStream
from em_megatron.data.loading import ahead, load
from em_megatron.data.manifest import TOKENIZER_NAMES
from em_megatron.data.stream import RankBatches
from em_megatron.data.vocabulary import Vocabulary, find_tokenizer
from em_megatron.model.carried_memory import CarriedMemory
from em_megatron.model.initialization import initialize_weights
from em_megatron.model.language_model import attach_carried_memory, build_model, model_chunks, transformer_config
from em_megatron.model.sizes import memory_layers, padded_vocab_size, shape_of
from em_megatron.parallel import cpu_backend
from em_megatron.parallel.process_groups import Layout, initialize
from em_megatron.training.bad_batches import BadBatches
from em_megatron.training.corpus import Corpus
from em_megatron.training.microbatch import MicroBatch, arrived, micro_batches
from em_megatron.training.optimizer import build_optimizer, build_scheduler
from em_megatron.validate import check_same_weights, validate

log = logging.getLogger(__name__)

# Settings a run keeps from its first step to its last; layout, schedule and the memory's reader may change on the way.
FIXED = (
    "seed",
    "data.sequence_length",
    "data.shuffle_shards",
    "memory.block_length",
    "memory.carry_memory",
    *(f"model.{item.name}" for item in dataclasses.fields(ModelConfig) if item.name not in ("size", "hidden_dropout")),
)


# What of the model section a set of weights does not depend on, other than by its shapes.
NOT_IN_WEIGHTS = ("size", "hidden_dropout", "init_method_std", "make_vocab_size_divisible_by")

# And where memory is carried from step to step, what says which states there are.
FIXED_WITH_CARRIED_MEMORY = (
    "training.global_batch_size",
    "memory.kind",
    "memory.order",
    "memory.layers",
    "memory.discretization",
)


@dataclass
class TrainState:
    """What a checkpoint holds besides weights and optimizer."""

    step: int = 0
    consumed_samples: int = 0
    consumed_tokens: int = 0
    data_identity: str = ""
    wandb_id: str = ""
    owes_validation: bool = False
    bad_batches: dict[str, list[Any]] = field(default_factory=dict)


@dataclass
class Run:
    """A run that is ready to train."""

    config: RunConfig
    layout: Layout
    device: torch.device
    corpus: Corpus
    model: list[torch.nn.Module]
    optimizer: Any
    scheduler: Any
    store: CheckpointStore
    state: TrainState
    bad: BadBatches
    carried: CarriedMemory | None = None

    def save(self) -> Path:
        """Writes a checkpoint of this step, in the background if the run says so: `store.finalize` completes it.

        Gives the folder that holds it then.
        """
        self.state.bad_batches = self.bad.state
        self.state.data_identity = self.corpus.identity(self.state.consumed_samples)
        return self.store.save(
            self.state.step,
            model_chunks=self.model,
            optimizer=self.optimizer,
            scheduler=self.scheduler,
            train_state=vars(self.state),
            config_text=config_text(self.config),
            extra=self.carried_state(loading=False),
            asynchronous=self.config.checkpoint.asynchronous,
        )

    @cached_property
    def stream(self) -> BlendedStream:
        """The samples of the run."""
        return self.corpus.training_stream(self.config)

    def training_data(self) -> Generator[MicroBatch]:
        """This data-parallel rank's micro-batches from where the run stands."""
        data, layout = self.config.data, self.layout
        micro_batch_size = self.config.training.micro_batch_size
        batches = RankBatches(
            self.stream, self.state.consumed_samples, micro_batch_size, layout.dp_rank, layout.dp_size
        )
        made = micro_batches(
            load(batches, data.workers, data.prefetch),
            self.config.memory.block_length,
            self.device,
            layout.cp_rank,
            layout.cp_size,
        )
        # Workers are waited for in a thread, also because torch would raise the death of one anywhere in the main thread.
        depth = max(data.prefetch, 1 if data.workers else 0)
        return arrived(ahead(made, depth) if depth else made)

    @property
    def batch_slots(self) -> list[int]:
        """Which samples of every global batch this data-parallel rank reads."""
        size, micro = self.config.training.global_batch_size, self.config.training.micro_batch_size
        return [slot for slot in range(size) if slot // micro % self.layout.dp_size == self.layout.dp_rank]

    def carried_state(self, loading: bool) -> dict[str, Any] | None:
        """The states carried from step to step, as a checkpoint holds them; None where none are."""
        if self.carried is None:
            return None
        size = self.config.training.global_batch_size
        return self.carried.sharded_state(self.layout.pg_collection, self.batch_slots, size, loading)


def seed_ranks(seed: int, layout: Layout) -> None:
    """Megatron's random states, which sequence parallelism asks for in evaluation too.

    Dropout differs between stages, data- and context-parallel ranks; Megatron adds the tensor rank itself.
    """
    place = (layout.pp_rank * layout.dp_size + layout.dp_rank) * layout.cp_size + layout.cp_rank
    tensor_parallel.model_parallel_cuda_manual_seed(seed + place * layout.tp_size)


def set_up(config: RunConfig, world_size: int) -> Run:
    """Checks everything, then builds it, and goes on from the newest complete checkpoint.

    Raises:
        ConfigError: the recipe cannot work; before anything is allocated.
        DataError: the shards cannot be used.
    """
    validate(config, world_size)
    corpus = Corpus.open(config.data)
    corpus.slots(config)  # refuses a blend that they cannot be shared out to
    layout = initialize_layout(config)
    device = cpu_backend.device()
    seed_ranks(config.seed, layout)
    store = CheckpointStore(config.run_dir / "checkpoints", config.checkpoint.keep_last, config.checkpoint.keep_every)
    newest = store.latest(resuming=True)
    if newest is not None:
        check_continues(config, newest)
    start = config.checkpoint.initial_load_path if newest is None else None
    chunks = build_chunks(config, layout, corpus.vocabulary.size, initialize=newest is None and start is None)
    if start is not None:
        load_initial_weights(config, Path(start), chunks, corpus.vocabulary)
    model = wrap_for_training(config, chunks, layout)
    optimizer = build_optimizer(config, model, layout.pg_collection)
    run = Run(
        config=config,
        layout=layout,
        device=device,
        corpus=corpus,
        model=model,
        optimizer=optimizer,
        scheduler=build_scheduler(config, optimizer),
        store=store,
        state=TrainState(data_identity=corpus.identity(0)),
        bad=BadBatches(config.faults),
        carried=attach_carried_memory(model) if config.memory.carry_memory else None,
    )
    if newest is not None:
        _resume(run, newest)
    if layout.world_rank == 0:
        _keep_tokenizer(run)
    connect_schedule(run.model, run.optimizer)
    return run


def initialize_layout(config: RunConfig) -> Layout:
    """Megatron's process groups for the run's layout."""
    parallel, chunks = config.parallel, model_chunks(config)
    return initialize(
        parallel.tensor_model_parallel_size,
        parallel.pipeline_model_parallel_size,
        chunks if chunks > 1 else None,
        parallel.context_parallel_size,
    )


def build_chunks(config: RunConfig, layout: Layout, vocab_size: int, initialize: bool = True) -> list[torch.nn.Module]:
    """This rank's part of the model, with the initial weights of the seed unless a checkpoint will fill it."""
    vocab, count = padded_vocab_size(vocab_size, config.model.make_vocab_size_divisible_by), model_chunks(config)
    chunks = []
    for chunk in range(count):
        first = layout.pp_rank == 0 and chunk == 0
        last = layout.pp_rank == layout.pp_size - 1 and chunk == count - 1
        model = build_model(config, vocab, layout.pg_collection, pre_process=first, post_process=last, chunk=chunk)
        chunks.append(model.to(cpu_backend.device()))
    if initialize:
        initialize_weights(chunks, config.seed, config.model.init_method_std, shape_of(config.model).num_layers)
        if config.model.layer_pattern:
            from em_megatron.model.linear_attention import initialize_recurrences

            for chunk_of_model in chunks:
                initialize_recurrences(chunk_of_model, config.seed)
    return chunks


def wrap_for_training(config: RunConfig, chunks: list[torch.nn.Module], layout: Layout) -> list[torch.nn.Module]:
    """Megatron's DistributedDataParallel around each chunk; gradients are kept and reduced in fp32."""
    ddp = DistributedDataParallelConfig(
        grad_reduce_in_fp32=True,
        use_distributed_optimizer=config.parallel.use_distributed_optimizer,
        overlap_grad_reduce=torch.cuda.is_available(),
        check_for_nan_in_grad=False,  # train_step decides on loss and norm, on all ranks alike
    )
    return [
        # Later chunks finish their backward pass first and together, so that buckets would gain them nothing.
        DistributedDataParallel(
            transformer_config(config), ddp, chunk, disable_bucketing=index > 0, pg_collection=layout.pg_collection
        )
        for index, chunk in enumerate(chunks)
    ]


def connect_schedule(model: list[torch.nn.Module], optimizer: Any) -> None:
    """Tells Megatron's schedules how to finish gradients, once per step."""
    from megatron.core.utils import get_model_config

    megatron_config = get_model_config(model[0])
    megatron_config.finalize_model_grads_func = finalize_model_grads
    megatron_config.grad_scale_func = optimizer.scale_loss
    if torch.cuda.is_available():
        no_sync = [chunk.no_sync for chunk in model]
        megatron_config.no_sync_func = no_sync if len(model) > 1 else no_sync[0]


def load_initial_weights(config: RunConfig, path: Path, chunks: list[torch.nn.Module], vocabulary: Vocabulary) -> None:
    """Takes the weights of another run's checkpoint, of any layout; its memory may have been another one, or none.

    Raises:
        CheckpointError: there is no such checkpoint, or its weights have other shapes.
        ConfigError: the weights mean something else under this recipe, or stand for the ids of another tokenizer.
    """
    checkpoint = find_checkpoint(path)
    saved = load_config(checkpoint / "config.yaml")
    for item in dataclasses.fields(ModelConfig):
        before, now = getattr(saved.model, item.name), getattr(config.model, item.name)
        if before != now and item.name not in NOT_IN_WEIGHTS:
            raise ConfigError(
                f"model.{item.name} is {now}, but checkpoint.initial_load_path holds weights for {before}: give the "
                f"model section of {checkpoint / 'config.yaml'}"
            )
    check_same_weights(saved, config, checkpoint)
    run = checkpoint.parent.parent
    if not any((run / name).is_file() for name in TOKENIZER_NAMES):
        log.warning("%s lies without a tokenizer: its rows are taken for the ids of this corpus", checkpoint)
    elif Vocabulary(find_tokenizer(run)).sha256 != vocabulary.sha256:
        raise ConfigError(
            f"{checkpoint} was trained with another tokenizer than the corpus {config.data.path}: encode the corpus with "
            f"{find_tokenizer(run)}"
        )
    CheckpointStore(checkpoint.parent, config.checkpoint.keep_last).load(checkpoint, model_chunks=chunks)


def check_continues(config: RunConfig, checkpoint: Path) -> None:
    """Refuses to go on from `checkpoint` with settings under which its weights or its place in the data mean another thing.

    Raises:
        ConfigError: resuming is switched off, or a setting that is fixed over a run differs from the one saved.
    """
    if not config.checkpoint.resume:
        raise ConfigError(
            f"{checkpoint.parent} already holds checkpoints and checkpoint.resume is false: "
            "choose another name, or remove the folder"
        )
    saved = load_config(checkpoint / "config.yaml")
    check_same_weights(saved, config, checkpoint)
    for key in (*FIXED, *(FIXED_WITH_CARRIED_MEMORY if config.memory.carry_memory else ())):
        before, now = attrgetter(key)(saved), attrgetter(key)(config)
        if key == "memory.layers" and _memory_layers(saved) == _memory_layers(config):
            continue  # the same layers by another name
        if before != now:
            raise ConfigError(
                f"{key} was {before} when {checkpoint.name} was saved and is {now} now: keep it, or choose another name"
            )


def _memory_layers(config: RunConfig) -> tuple[int, ...]:
    return memory_layers(config.memory, shape_of(config.model).num_layers)


def _resume(run: Run, newest: Path) -> None:
    """Loads weights, optimizer, schedule, random states and the place in the data."""
    saved = run.store.load(
        newest,
        model_chunks=run.model,
        optimizer=run.optimizer,
        scheduler=run.scheduler,
        extra=run.carried_state(loading=True),
    )
    run.state = TrainState(**saved)
    run.bad = BadBatches(run.config.faults, **run.state.bad_batches)
    run.corpus.check_identity(run.state.data_identity, run.state.consumed_samples)
    if torch.distributed.get_rank() == 0:
        log.warning("resumed from %s at step %d", newest, run.state.step)


def _keep_tokenizer(run: Run) -> None:
    """Puts the tokenizer beside the checkpoints, so that they are of use without the corpus."""
    target = run.config.run_dir / run.corpus.vocabulary.file_name
    if not target.exists():
        target.parent.mkdir(parents=True, exist_ok=True)
        temporary = target.with_suffix(".writing")
        temporary.write_bytes(run.corpus.vocabulary.serialized)
        os.replace(temporary, target)
