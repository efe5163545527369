"""Layouts through the whole trainer: losses, gradient norms and validation of 20 steps against one rank."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from em_megatron.parallel.process_groups import shutdown
from em_megatron.training.loop import train
from em_megatron.training.setup import set_up
from tests.multi_rank import Pools, leave_groups
from tests.training.corpora import run_config

# fp32 losses of order 5: sums in another order differ by some 1e-7 relative, and 20 steps at a high rate amplify that.
TOLERANCE = 1e-5
# bf16 rounds at 2⁻⁹ where fp32 does at 2⁻²⁴; averaged over the tokens of a step, of which 20 follow each other.
TOLERANCE_BF16 = 1e-2

LAYOUTS = {
    "tensor 2, sequence parallel, qk norm": (
        "parallel.tensor_model_parallel_size=2",
        "parallel.sequence_parallel=true",
        "model.qk_layernorm=true",
    ),
    "interleaved 2": (
        "parallel.pipeline_model_parallel_size=2",
        "parallel.virtual_pipeline_model_parallel_size=2",
        "model.num_layers=4",
    ),
    "context 2": ("parallel.context_parallel_size=2", "data.sequence_length=96"),
    "data 2, distributed optimizer, full recompute": (
        "parallel.use_distributed_optimizer=true",
        "training.recompute=full",
    ),
    "tensor 2, bf16": (
        "parallel.tensor_model_parallel_size=2",
        "training.precision=bf16",
        "optimizer.lr=1e-3",  # the rate of the others would amplify bf16's rounding
        "optimizer.min_lr=1e-4",
    ),
    "context 2, chain, bf16, carried memory": (
        "parallel.context_parallel_size=2",
        "parallel.memory_handoff=chain",
        "data.sequence_length=96",
        "memory.carry_memory=true",
        "training.precision=bf16",
        "optimizer.lr=1e-3",
        "optimizer.min_lr=1e-4",
    ),
}
MODEL_ONLY = ("model.", "memory.", "data.", "training.precision", "optimizer.")


def losses_of_runs(corpus: Path, folder: Path, settings: list[tuple[str, ...]]) -> list[list[dict]]:
    """Trains one run per setting on the ranks at hand; their metrics."""
    import torch.distributed as dist

    found = []
    for index, overrides in enumerate(settings):
        config = run_config(corpus, folder, f"name=run{index}", *overrides)
        world = dist.get_world_size() if dist.is_initialized() else 1
        train(set_up(config, world))
        leave_groups()
        rows = (folder / f"run{index}" / "metrics.jsonl").read_text().splitlines()
        found.append([json.loads(row) for row in rows])
    return found


def without_layout(overrides: tuple[str, ...]) -> tuple[str, ...]:
    return tuple(item for item in overrides if item.startswith(MODEL_ONLY))


@pytest.fixture(scope="module")
def runs(ranks: Pools, chain_corpus, tmp_path_factory) -> tuple[dict, dict]:
    """Metrics per layout, on two ranks and on one."""
    folder, settings = tmp_path_factory.mktemp("two"), list(LAYOUTS.values())
    on_two = ranks(2).run(losses_of_runs, chain_corpus, folder, settings, timeout=280)[0]
    kinds = sorted({without_layout(overrides) for overrides in LAYOUTS.values()})
    try:
        on_one = losses_of_runs(chain_corpus, tmp_path_factory.mktemp("one"), kinds)
    finally:
        shutdown()
    return dict(zip(LAYOUTS, on_two, strict=True)), dict(zip(kinds, on_one, strict=True))


@pytest.mark.parametrize("layout", LAYOUTS)
def test_two_ranks_train_as_one(runs, layout):
    on_two, on_one = runs
    expected = on_one[without_layout(LAYOUTS[layout])]
    actual = on_two[layout]
    assert [row["kind"] for row in actual] == [row["kind"] for row in expected]
    assert len([row for row in actual if row["kind"] == "train"]) == 20
    tolerance = TOLERANCE_BF16 if "training.precision=bf16" in LAYOUTS[layout] else TOLERANCE
    for ours, truth in zip(actual, expected, strict=True):
        # A later gradient norm is taken at weights that already differ by rounding; the losses follow it instead.
        for name in ("loss", "bits_per_byte", *(["grad_norm"] if truth["step"] == 1 else [])):
            if name in truth:
                assert ours[name] == pytest.approx(truth[name], rel=tolerance), (name, truth["step"])
        for name in ("step", "consumed_samples", "consumed_tokens", "learning_rate", "tokens", "bytes"):
            assert ours.get(name) == truth.get(name)
