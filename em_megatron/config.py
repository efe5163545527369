"""A run is one typed tree: a YAML recipe plus dotted overrides, checked whole before anything is built."""

from __future__ import annotations

import dataclasses
import difflib
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from omegaconf import MISSING, OmegaConf
from omegaconf.errors import OmegaConfBaseException


class ConfigError(ValueError):
    """The recipe or an override cannot work; the message is one sentence that says what and how to mend it."""


def option(default: Any, text: str) -> Any:
    """A documented field; `text` is what `--help` prints."""
    factory = {"default_factory": lambda: list(default)} if isinstance(default, list) else {"default": default}
    return field(**factory, metadata={"help": text})


@dataclass
class ModelConfig:
    """Shape of the Transformer. `size` names one of model/sizes.py; fields given here override it."""

    size: str | None = option(None, "named size: tiny, 125m, 400m, 1b, 3b, 7b (or give every field below)")
    num_layers: int | None = option(None, "Transformer layers (attention and MLP)")
    hidden_size: int | None = option(None, "width of the residual stream")
    num_attention_heads: int | None = option(None, "query heads")
    num_query_groups: int | None = option(None, "key/value heads; query heads are a multiple of them")
    kv_channels: int | None = option(None, "dimension of a head")
    ffn_hidden_size: int | None = option(None, "inner width of the SwiGLU MLP")
    share_embeddings_and_output_weights: bool = option(False, "tie the output layer to the embedding")
    qk_layernorm: bool = option(False, "RMSNorm on queries and keys of each head (the memory holds normed keys)")
    rotary_base: float = option(10000.0, "base of the rotary frequencies; positions count inside a block")
    layernorm_epsilon: float = option(1e-5, "epsilon of every RMSNorm")
    init_method_std: float = option(0.02, "standard deviation of initial weights; output projections / sqrt(2 layers)")
    hidden_dropout: float = option(0.0, "dropout on the residual branches")
    layer_pattern: str | None = option(
        None,
        "a letter per layer, repeated over the depth: * attention with memory.kind, M Mamba-2 (needs mamba_ssm and a GPU), "
        "G Gated DeltaNet (needs flash-linear-attention); each with an MLP behind it; null: all *; in YAML a pattern that "
        "begins with * is put in quotes",
    )
    make_vocab_size_divisible_by: int = option(
        128, "the vocabulary is padded to a multiple of this, whatever the layout"
    )


@dataclass
class MemoryConfig:
    """What a block of tokens sees beyond itself. The elastic memory has no parameters: its reader may change at test
    time. The other kinds are the systems it is measured against."""

    kind: str = option(
        "elastic",
        "elastic (HiPPO memory), block_local (no memory), full (causal attention over the document), transformer_xl "
        "(the block before), subsample (raw tokens at the sampler's moments), infini, memorizing, melodi",
    )
    block_length: int = option(2048, "tokens per block, L")
    order: int = option(540, "polynomial coefficients kept per head and channel, N")
    slots: int = option(512, "moments read back per block, S")
    sampler: str = option("uniform", "moments read back: uniform, exponential (dense near the present), window, points")
    sampler_a: float = option(3.0, "exponential: steepness, > 0")
    sampler_lo: float = option(0.0, "window: where it begins, in (0, 1) of the history")
    sampler_hi: float = option(1.0, "window: where it ends")
    sampler_points: list[float] = option([], "points: the moments themselves, in (0, 1)")
    layers: str = option(
        "auto",
        "layers with memory: all, none, numbers from 0 and ranges such as 0,4-7, or auto (all; memorizing: the one at "
        "three quarters of the depth; melodi: the long-term one, in the middle)",
    )
    pairs: int = option(8192, "memorizing: (key, value) pairs kept per head, M")
    top_k: int = option(32, "memorizing: best pairs that a query reads; 0: all of them (dense)")
    update: str = option("linear", "infini: how keys and values are added to the matrix: linear or delta")
    short_term_tokens: int = option(64, "melodi: short-term tokens kept per layer, S, and summary tokens per block, U")
    long_term_tokens: int = option(4096, "melodi: long-term tokens kept, G")
    long_term_increment: int = option(32, "melodi: long-term tokens added per block, L_inc; divides long_term_tokens")
    detach_memory: bool = option(False, "cut the gradient through the memory")
    carry_memory: bool = option(
        False, "a document longer than a sample goes on in its batch slot at the next step, its state carried, detached"
    )
    discretization: str = option("exact", "exact, zero_order_hold, bilinear, forward_euler, backward_euler")
    superchunk: int = option(
        0,
        "blocks computed at once, 0: chosen by cost; the same numbers up to rounding (documents that begin within a "
        "context-parallel rank's part and leave it, or go on from another step, are computed one block at a time)",
    )
    kernels: str = option(
        "auto", "auto (Triton on GPUs, batched PyTorch on CPUs), triton, batched, or naive (the slow reference)"
    )
    bank_dtype: str = option("compute", "dtype of the memory's matrices: compute (that of the activations), fp32")
    bank_cache: str | None = option(
        "~/.cache/em_megatron/banks", "folder that keeps the matrices between runs; null: none"
    )


@dataclass
class DataConfig:
    """Token shards written by `python -m tokenizer.encode`."""

    path: str = option(
        MISSING,
        "folder with manifest.json, tokenizer and shards, or its address (http, https, s3, pipe:COMMAND with {} for the "
        "file's name); several are blended as 'WEIGHT PATH WEIGHT PATH ...', weights in samples of all",
    )
    blend_changes: list[str] = option(
        [],
        "other weights on the way: 'SAMPLE WEIGHT WEIGHT ...' each, from this sample of the run on (step × batch size)",
    )
    sequence_length: int = option(32768, "tokens per sample, T; a multiple of memory.block_length")
    shuffle_shards: int = option(
        32, "shards whose documents are mixed with each other; a node reads from two such groups at a time"
    )
    workers: int = option(0, "processes per rank that make micro-batches; 0: a thread of the rank does")
    prefetch: int = option(
        4,
        "micro-batches made, and copied to the GPU on a stream of their own, ahead of use (and as many again by workers); 0 "
        "without workers: none",
    )
    verify_checksums: bool = option(
        True, "compare the sha256 of a shard with the manifest's before it is used, once per machine; false: sizes only"
    )
    cache_path: str | None = option(
        None,
        "folder of fetched shards, and of what is known of local ones, on a disk of the node; null: the environment's "
        "EM_DATA_CACHE, else ~/.cache/em_megatron/shards",
    )
    cache_gigabytes: float = option(
        0.0,
        "of fetched shards kept in cache_path, those read longest ago go first, and their room is free when they are closed, a "
        "group of shards later; 0: as much as there is room for",
    )
    timeout_seconds: float = option(60.0, "without a byte of a fetched shard before it is asked for again")
    attempts: int = option(10, "in a row that bring no byte more of a fetched shard before the run ends")


@dataclass
class ParallelConfig:
    """How the model is spread over ranks; the data-parallel size is what remains of the world."""

    tensor_model_parallel_size: int = option(1, "ranks that share every layer, heads and memory state split")
    pipeline_model_parallel_size: int = option(1, "ranks that hold successive layers")
    virtual_pipeline_model_parallel_size: int = option(
        1, "interleaved model chunks per pipeline rank; micro-batches per step must be a multiple of the pipeline size"
    )
    context_parallel_size: int = option(1, "ranks that share a sample in contiguous runs of blocks")
    memory_handoff: str = option(
        "auto", "how states pass between context-parallel ranks: all_gather, chain, or auto (by estimated time)"
    )
    sequence_parallel: bool = option(False, "split norms and dropout along the sequence over the tensor ranks")
    use_distributed_optimizer: bool = option(False, "shard the optimizer state over data-parallel ranks")


@dataclass
class TrainingConfig:
    """Steps, batches, precision."""

    train_steps: int = option(1000, "optimizer steps of the whole run")
    global_batch_size: int = option(8, "samples per step over all ranks")
    micro_batch_size: int = option(1, "samples per forward pass of a rank; the rest is gradient accumulation")
    precision: str = option("bf16", "bf16 (fp32 master weights and gradients) or fp32")
    recompute: str = option("none", "activations recomputed in backward: none, selective (attention core), full")
    stop_after_steps: int = option(0, "end this call after so many steps, to be resumed later; 0: run to the end")


@dataclass
class OptimizerConfig:
    """AdamW and its schedule."""

    lr: float = option(3e-4, "peak learning rate")
    min_lr: float = option(3e-5, "final learning rate")
    schedule: str = option("cosine", "cosine, wsd (warm-up, stable, decay), constant")
    warmup_steps: int = option(100, "linear warm-up")
    wsd_decay_steps: int = option(0, "wsd: steps of the final decay; 0: a tenth of the run")
    weight_decay: float = option(0.1, "decoupled weight decay; not on norms and biases")
    beta1: float = option(0.9, "AdamW β1")
    beta2: float = option(0.95, "AdamW β2")
    epsilon: float = option(1e-8, "AdamW ε")
    clip_grad: float = option(1.0, "largest global gradient norm; 0: no clipping")


@dataclass
class CheckpointConfig:
    """Distributed checkpoints with the whole train state, under runs/NAME/checkpoints."""

    save_interval: int = option(500, "steps between checkpoints; the last step always saves")
    keep_last: int = option(2, "complete checkpoints kept")
    keep_every: int = option(0, "checkpoints of steps that are a multiple of this are kept for good; 0: none")
    retry_interval: int = option(20, "steps after which a save that failed, as on a full disk, is tried again")
    asynchronous: bool = option(
        True, "write in a forked process while training goes on; false waits (and needs no second copy in memory)"
    )
    initial_load_path: str | None = option(
        None,
        "run or checkpoint whose weights a new run starts from, with a fresh optimizer, at step 0 (such as one of "
        "launch/import_hf.py); not read once the run has a checkpoint of its own",
    )
    resume: bool = option(
        True, "go on from the newest complete checkpoint of this run; false refuses where there is one"
    )


@dataclass
class FaultConfig:
    """What a run does about bad batches, and about ranks that hang."""

    skip_limit: int = option(
        8,
        "batches skipped (loss or gradient norm not finite, or a spike) within skip_window steps before the run stops; "
        "0 stops at the first",
    )
    skip_window: int = option(1000, "steps over which skipped batches are counted")
    spike_factor: float = option(
        0.0,
        "a batch is a spike, and skipped, where its loss is above the median of the last spike_window losses by more "
        "than this many times their usual distance from it (median absolute deviation / 0.6745); 0: never",
    )
    spike_window: int = option(128, "losses that a spike is measured against; no spike is seen before so many")
    hang_minutes: float = option(
        15.0,
        "a rank without progress for so long writes the stacks of its threads to runs/NAME/stacks and ends, so that the "
        "run can be restarted; three times as long for set-up and first step, which loads and compiles; 0: never",
    )


@dataclass
class ProfilingConfig:
    """A window of steps under a profiler."""

    tool: str = option(
        "torch",
        "torch (Chrome traces and tables of operators in runs/NAME/profile) or nsys (marks the window for `nsys "
        "profile --capture-range=cudaProfilerApi`, an NVTX range for each step; needs a GPU)",
    )
    first_step: int = option(0, "first step of the window, from 1; 0: no profiling")
    steps: int = option(3, "steps in the window, after one step of warm-up")
    ranks: list[int] = option([0], "ranks that are profiled")


@dataclass
class ValidationConfig:
    """Held-out loss during training."""

    interval: int = option(500, "steps between validations; the last step always validates; 0: never")
    samples: int = option(0, "samples of the held-out split per validation, evenly spread over it; 0: all")


@dataclass
class LoggingConfig:
    """What the run shows; all of it also lies in runs/NAME/metrics.jsonl."""

    interval: int = option(1, "steps between rows of metrics.jsonl")
    tensorboard: bool = option(True, "write TensorBoard events")
    wandb: str = option("auto", "auto (online with a key, else offline), online, offline, disabled")
    wandb_project: str = option("em-megatron", "wandb project")
    progress: bool = option(True, "one progress bar on rank 0")
    communication_interval: int = option(
        200,
        "steps between measurements of the share of time spent in communication, and of the slowest rank, by profiling "
        "one step; 0: never",
    )


@dataclass
class RunConfig:
    """One training run."""

    name: str = option(MISSING, "name of the run; everything goes to runs/NAME")
    output_dir: str = option("runs", "folder of all runs")
    seed: int = option(1234, "initial weights, data order and dropout")
    model: ModelConfig = field(default_factory=ModelConfig)
    memory: MemoryConfig = field(default_factory=MemoryConfig)
    data: DataConfig = field(default_factory=DataConfig)
    parallel: ParallelConfig = field(default_factory=ParallelConfig)
    training: TrainingConfig = field(default_factory=TrainingConfig)
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    faults: FaultConfig = field(default_factory=FaultConfig)
    validation: ValidationConfig = field(default_factory=ValidationConfig)
    logging: LoggingConfig = field(default_factory=LoggingConfig)
    profiling: ProfilingConfig = field(default_factory=ProfilingConfig)

    @property
    def run_dir(self) -> Path:
        return Path(self.output_dir).expanduser() / self.name


def load_config(recipe: RunConfig | Path | str | None, overrides: Sequence[str] = ()) -> RunConfig:
    """Recipe (a file, or a tree), then overrides `section.key=value`, into one checked tree (layout: `validate.validate`).

    Raises:
        ConfigError: missing file, invalid YAML, unknown key, wrong type, missing value.
    """
    tree: Any = OmegaConf.structured(recipe if isinstance(recipe, RunConfig) else RunConfig)
    recipe = None if isinstance(recipe, RunConfig) else recipe
    if recipe is not None and not Path(recipe).is_file():
        raise ConfigError(
            f"recipe '{recipe}' does not exist: give the path of a YAML file, such as launch/recipes/*.yaml"
        )
    for override in overrides:
        if not re.match(r"^[\w.]+=", override):
            raise ConfigError(f"override '{override}' is not of the form section.key=value")
    try:
        if recipe is not None:
            tree = OmegaConf.merge(tree, OmegaConf.load(Path(recipe)))
        tree = OmegaConf.merge(tree, OmegaConf.from_dotlist(list(overrides)))
        missing = sorted(OmegaConf.missing_keys(tree))
        if missing:
            raise ConfigError(f"{' and '.join(missing)} not set: add to the recipe or as {missing[0]}=VALUE")
        config = OmegaConf.to_object(tree)
    except OmegaConfBaseException as error:
        raise ConfigError(_one_sentence(error)) from None
    except Exception as error:
        if isinstance(error, ConfigError):
            raise
        raise ConfigError(f"recipe '{recipe}' is not valid YAML: {' '.join(str(error).split())}") from None
    assert isinstance(config, RunConfig)
    from em_megatron.model.sizes import apply_size

    apply_size(config.model)
    return config


def plain_overrides(arguments: Sequence[str]) -> list[str]:
    """Command-line arguments with `--memory.KEY=VALUE`, as other tools write it, in the form `memory.KEY=VALUE`."""
    return [re.sub(r"^--(?=memory\.\w+=)", "", argument) for argument in arguments]


def config_text(config: RunConfig) -> str:
    """The resolved tree as YAML, as saved with the run and every checkpoint."""
    return OmegaConf.to_yaml(OmegaConf.structured(config))


def describe_options() -> str:
    """Every option with its default and meaning, for `--help`."""
    lines = [f"{name:42} {default!s:12} {text}" for name, default, text in _options(RunConfig, "")]
    return "options (override as KEY=VALUE):\n" + "\n".join(f"  {line}" for line in lines)


def _options(cls: type, prefix: str) -> Iterator[tuple[str, object, str]]:
    for item in dataclasses.fields(cls):
        if "help" in item.metadata:
            factory = item.default_factory
            default = item.default if factory is dataclasses.MISSING else factory()
            yield f"{prefix}{item.name}", "required" if default == MISSING else default, item.metadata["help"]
        elif item.default_factory is not dataclasses.MISSING:
            yield from _options(type(item.default_factory()), f"{item.name}.")


def _one_sentence(error: OmegaConfBaseException) -> str:
    key = error.full_key or ""
    if not key:
        return "a section of the recipe is given a plain value: write section.key=value, or a mapping in YAML"
    if "not in" in str(error):
        close = difflib.get_close_matches(key, [name for name, _, _ in _options(RunConfig, "")], n=1, cutoff=0.5)
        return f"unknown config key '{key}'" + (
            f": did you mean '{close[0]}'?" if close else ": see --help for all keys"
        )
    return f"config key '{key}': {str(error).splitlines()[0]}"
