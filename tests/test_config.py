"""What cannot work is refused in one sentence, before anything is allocated."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

from em_megatron.config import ConfigError, config_text, describe_options, load_config
from em_megatron.model.sizes import memory_floats_per_sequence, memory_layers
from em_megatron.validate import validate
from tests.one_rank import TINY, tiny_config

BAD = {
    "memory.ordr=3": "unknown config key 'memory.ordr': did you mean 'memory.order'?",
    "nothing.like.this=1": "unknown config key 'nothing': see --help",
    "memory.order=many": "config key 'memory.order'",
    "order": "not of the form section.key=value",
    "model.size=huge": "model.size 'huge' is unknown: choose one of tiny",
    "memory.kind=magic": "memory.kind 'magic' is unknown",
    "memory.sampler=random": "memory.sampler: ",
    "memory.sampler=points": "memory.sampler: ",  # and no points are given
    "memory.layers=0,9": "does not fit a model with layers 0 to 1",
    "memory.layers=first": "is not 'auto', 'all', 'none' or a list",
    "memory.order=0": "memory.order is 0: it must be at least 1",
    "data.sequence_length=41": "data.sequence_length 41 is not a multiple of memory.block_length 8",
    "model.num_attention_heads=3": "not a multiple of model.num_query_groups",
    "model.kv_channels=7": "rotary embedding needs an even number",
    "parallel.tensor_model_parallel_size=3": "does not divide the 4 ranks started",
    "parallel.pipeline_model_parallel_size=4": "model.num_layers 2 is not divisible by pipeline_model_parallel_size 4",
    "parallel.tensor_model_parallel_size=4": "model.num_query_groups 2 is not divisible by tensor_model_parallel_size 4",
    "parallel.sequence_parallel=true": "needs tensor_model_parallel_size > 1",
    "parallel.context_parallel_size=0": "parallel.context_parallel_size is 0: it must be at least 1",
    "parallel.context_parallel_size=2": "is not a multiple of memory.block_length 8 × context_parallel_size 2",
    "parallel.context_parallel_size=5": "does not divide the 4 ranks started",
    "parallel.virtual_pipeline_model_parallel_size=2": "needs pipeline_model_parallel_size of 2 or more",
    "memory.carry_memory=true memory.kind=block_local": "memory.carry_memory needs layers with an elastic memory",
    "parallel.memory_handoff=mail": "choose one of auto, all_gather, chain",
    "training.global_batch_size=6": "not a multiple of micro_batch_size 1 × data-parallel size 4",
    "optimizer.warmup_steps=5000": "does not fit training.train_steps",
    "optimizer.min_lr=1": "need 0 <= min_lr <= lr",
    "training.precision=fp8": "choose one of bf16, fp32",
    "name=a/b": "cannot name a folder",
}


BAD_TOGETHER = {
    "memory.kind=melodi parallel.context_parallel_size=2 data.sequence_length=64": "one after another",
    "memory.kind=melodi data.sequence_length=8": "needs two windows",
    "memory.kind=melodi memory.long_term_tokens=9 memory.long_term_increment=2": "not a multiple",
    "memory.kind=melodi memory.detach_memory=true": "learns through its memory",
    "memory.kind=full memory.detach_memory=true": "learns through its memory",
    "memory.kind=infini memory.carry_memory=true": "needs layers with an elastic memory",
    "memory.kind=memorizing memory.pairs=0": "memory.pairs is 0",
    "memory.kind=infini memory.update=square": "choose one of linear, delta",
    "memory.kind=lstm memory.order=5": "choose one of elastic, block_local, full",
    "model.num_layers=4 parallel.pipeline_model_parallel_size=2 parallel.virtual_pipeline_model_parallel_size=3": (
        "model.num_layers 4 is not divisible by pipeline_model_parallel_size 2 × virtual_pipeline_model_parallel_size 3"
    ),
    "model.num_layers=4 parallel.pipeline_model_parallel_size=2 parallel.virtual_pipeline_model_parallel_size=2 "
    "training.global_batch_size=6": "micro-batches per step (3) that are a multiple of pipeline_model_parallel_size 2",
    "data.sequence_length=48 parallel.context_parallel_size=2 memory.superchunk=4": "more than the 3 blocks of a sample",
    "data.sequence_length=18 memory.block_length=9 parallel.context_parallel_size=2 parallel.sequence_parallel=true "
    "parallel.tensor_model_parallel_size=2": "divides the 9 tokens of a sample on a rank",
}


@pytest.mark.parametrize("overrides", BAD_TOGETHER)
def test_combinations_are_refused_in_one_sentence(overrides):
    with pytest.raises(ConfigError) as refusal:
        validate(tiny_config(*overrides.split()), world_size=4)
    assert BAD_TOGETHER[overrides] in str(refusal.value)
    assert "\n" not in str(refusal.value)


@pytest.mark.parametrize("override", BAD)
def test_refused_in_one_sentence(override):
    with pytest.raises(ConfigError) as refusal:
        validate(tiny_config(*override.split(" ")), world_size=4)
    assert BAD[override] in str(refusal.value)
    assert "\n" not in str(refusal.value)


def test_good_configuration_passes():
    validate(tiny_config(), world_size=4)


def test_refusal_comes_before_anything_is_built(tmp_path):
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text("name: x\ndata: {path: nowhere}\nmodel: {size: 7b}\nmemory: {block_length: 1000}\n")
    done = subprocess.run(
        [sys.executable, "launch/pretrain.py", str(recipe), f"output_dir={tmp_path}/runs"],
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert done.returncode == 2
    assert done.stderr.strip() == (
        "error: data.sequence_length 32768 is not a multiple of memory.block_length 1000: choose a whole number of blocks"
    )
    assert not (tmp_path / "runs").exists()


def test_missing_and_broken_recipes(tmp_path):
    with pytest.raises(ConfigError, match="does not exist"):
        load_config(tmp_path / "none.yaml")
    broken = tmp_path / "broken.yaml"
    broken.write_text("model: [")
    with pytest.raises(ConfigError, match="is not valid YAML"):
        load_config(broken)
    with pytest.raises(ConfigError, match=r"data\.path and name not set"):
        load_config(None)


def test_resolved_config_round_trips(tmp_path):
    config = tiny_config("memory.sampler=points", "memory.sampler_points=[0.1,0.5]", "memory.slots=2")
    path = tmp_path / "config.yaml"
    path.write_text(config_text(config))
    assert load_config(path) == config


def test_help_lists_every_option():
    text = describe_options()
    for key in ("memory.order", "parallel.tensor_model_parallel_size", "optimizer.lr", "data.path", "name"):
        assert f"  {key} " in text


def test_memory_layers_and_floats():
    config = tiny_config("memory.layers=1")
    assert memory_layers(config.memory, 2) == (1,)
    assert memory_floats_per_sequence(config.model, config.memory, 40) == 2 * 12 * 8 * 2  # K and V, N, d, KV heads
    assert memory_layers(tiny_config("memory.layers=0,3-5").memory, 8) == (0, 3, 4, 5)
    assert memory_layers(tiny_config("memory.kind=block_local").memory, 8) == ()
    assert len(TINY) > 10


@pytest.mark.parametrize("recipe", sorted(Path("launch/recipes").glob("*.yaml")), ids=lambda path: path.stem)
def test_every_recipe_of_the_repo_is_valid(recipe):
    validate(load_config(recipe), world_size=8 if recipe.stem != "quickstart" else 2)


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("memory.superchunk=9", "more than the 5 blocks of a sample"),
        ("memory.superchunk=-1", "must be at least 0"),
        ("seed=-1", "seed is -1: it must be at least 0"),
        ("validation.interval=-1", "must be at least 0"),
        ("model.hidden_dropout=1.5", "must be at least 0 and below 1"),
        ("optimizer.beta1=1.0", "must be at least 0 and below 1"),
        ("optimizer.epsilon=0.0", "must be above 0"),
        ("name=..", "cannot name a folder"),
        ("model=tiny", "write section.key=value"),
    ],
)
def test_values_out_of_range_are_refused(override, message):
    with pytest.raises(ConfigError, match=re.escape(message)):
        validate(tiny_config(override), world_size=1)
