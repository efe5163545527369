"""A run saved under one layout goes on under another as it would have under its own; under the same one, bit for bit."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch

from em_megatron.config import ConfigError
from em_megatron.training.loop import train
from em_megatron.training.setup import check_continues, set_up
from tests.multi_rank import leave_groups
from tests.training.corpora import run_config

pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="the CPU backend is off where CUDA is present")

# fp32 losses of order 5: sums in another order differ by some 1e-7 relative, and seven steps amplify that.
TOLERANCE = 1e-5
SAVED, STEPS = 2, 7

TP, PP = "parallel.tensor_model_parallel_size", "parallel.pipeline_model_parallel_size"
CP, VPP = "parallel.context_parallel_size", "parallel.virtual_pipeline_model_parallel_size"
DIST, SP = "parallel.use_distributed_optimizer=true", "parallel.sequence_parallel=true"

LAYOUTS: dict[str, tuple[int, tuple[str, ...]]] = {
    "one rank": (1, ()),
    "tensor 2": (2, (f"{TP}=2", SP)),
    "pipeline 2": (2, (f"{PP}=2",)),
    "interleaved 2": (2, (f"{PP}=2", f"{VPP}=2")),
    "context 2": (2, (f"{CP}=2", DIST)),
    "data 2, distributed": (2, (DIST,)),
    "data 2": (2, ()),
    "context 2 × tensor 2": (4, (f"{CP}=2", f"{TP}=2", DIST)),
    "interleaved 2 × data 2": (4, (f"{PP}=2", f"{VPP}=2", DIST)),
}
# Each axis is left and entered, with and without the distributed optimizer on either side; True: with carried memory.
PAIRS = [
    ("one rank", "context 2", False),
    ("one rank", "context 2", True),
    ("context 2", "tensor 2", False),
    ("context 2", "tensor 2", True),
    ("tensor 2", "interleaved 2", False),
    ("tensor 2", "interleaved 2", True),
    ("interleaved 2", "data 2, distributed", False),
    ("interleaved 2", "data 2, distributed", True),
    ("data 2, distributed", "pipeline 2", False),
    ("pipeline 2", "data 2", False),
    ("data 2", "one rank", False),
    ("data 2, distributed", "one rank", True),
]
RUNS = [
    *((name, False) for name, (count, _) in LAYOUTS.items() if count <= 2),
    *((name, True) for name in ("one rank", "tensor 2", "interleaved 2", "context 2", "data 2, distributed")),
]
MODEL = (
    "memory.block_length=8",
    "data.sequence_length=96",
    "model.num_layers=4",
    "model.hidden_size=32",
    "model.num_attention_heads=4",
    "model.kv_channels=8",
    "model.ffn_hidden_size=48",
    "training.micro_batch_size=1",
    f"training.train_steps={STEPS}",
    f"checkpoint.save_interval={SAVED}",
    "checkpoint.keep_last=9",
    "validation.interval=0",
)


def train_runs(corpus: Path, folder: Path, calls: list[tuple[str, tuple[str, ...]]]) -> list[list[float]]:
    """Trains (name, overrides) to the end, from its newest checkpoint if it has one; all losses of each."""
    import torch.distributed as dist

    found = []
    for name, overrides in calls:
        train(set_up(run_config(corpus, folder, *MODEL, f"name={name}", *overrides), dist.get_world_size()))
        leave_groups()
        rows = (folder / name / "metrics.jsonl").read_text().splitlines()
        found.append([json.loads(row)["loss"] for row in rows])
    return found


def name_of(layout: str, carry: bool) -> str:
    return layout.replace(" × ", "-x-").replace(", ", "-").replace(" ", "-") + ("-carry" if carry else "")


def overrides_of(layout: str, carry: bool) -> tuple[str, ...]:
    return (*LAYOUTS[layout][1], f"memory.carry_memory={str(carry).lower()}")


@pytest.fixture(scope="module")
def runs(ranks, chain_corpus, tmp_path_factory):
    """Losses of every layout's own run, and the folder with their checkpoints."""
    folder, losses = tmp_path_factory.mktemp("runs"), {}
    for size in (1, 2):
        here = [run for run in RUNS if LAYOUTS[run[0]][0] == size]
        calls = [(name_of(*run), overrides_of(*run)) for run in here]
        done = ranks(size).run(train_runs, chain_corpus, folder, calls, timeout=280)[0]
        losses |= dict(zip(here, done, strict=True))
    return folder, losses


def go_on(ranks, corpus: Path, folder: Path, before: str, after: str, carry: bool) -> list[float]:
    """Losses after the checkpoint of `before`, under the layout `after`."""
    resumed, step = f"{name_of(before, carry)}-then-{name_of(after, carry)}", Path("checkpoints") / f"step_{SAVED:08d}"
    shutil.copytree(folder / name_of(before, carry) / step, folder / resumed / step)
    call = (resumed, overrides_of(after, carry))
    return ranks(LAYOUTS[after][0]).run(train_runs, corpus, folder, [call])[0][0]


def test_every_layout_gives_the_same_losses(runs):
    _, losses = runs
    for name, carry in RUNS:
        assert losses[name, carry] == pytest.approx(losses["one rank", carry], rel=TOLERANCE), (name, carry)
    assert losses["one rank", False] != losses["one rank", True]


@pytest.mark.parametrize(
    ("before", "after", "carry"),
    # Slow: pairs that run with carried memory too.
    [
        pytest.param(*pair, marks=pytest.mark.slow) if (*pair[:2], not pair[2]) in PAIRS and not pair[2] else pair
        for pair in PAIRS
    ],
)
def test_another_layout_goes_on(ranks, chain_corpus, runs, before, after, carry):
    folder, losses = runs
    expected = losses[before, carry][SAVED:]
    assert len(expected) == 5
    assert go_on(ranks, chain_corpus, folder, before, after, carry) == pytest.approx(expected, rel=TOLERANCE)


@pytest.mark.slow
def test_from_four_ranks_to_four_others_and_to_two(ranks, chain_corpus, tmp_path):
    before, between, after = "context 2 × tensor 2", "interleaved 2 × data 2", "context 2"
    expected = ranks(4).run(
        train_runs, chain_corpus, tmp_path, [(name_of(before, True), overrides_of(before, True))], timeout=280
    )[0][0][SAVED:]
    for name in (between, after):
        found = go_on(ranks, chain_corpus, tmp_path, before, name, True)
        assert found == pytest.approx(expected, rel=TOLERANCE), name


@pytest.mark.parametrize("carry", [False, True], ids=["", "carried memory"])
@pytest.mark.parametrize("name", ["context 2", "interleaved 2", "data 2, distributed", "one rank"])
def test_the_same_layout_goes_on_bit_for_bit(ranks, chain_corpus, runs, name, carry):
    folder, losses = runs
    assert go_on(ranks, chain_corpus, folder, name, name, carry) == losses[name, carry][SAVED:]


def test_what_carried_states_depend_on_may_not_change(chain_corpus, runs):
    folder, _ = runs
    checkpoint = folder / name_of("one rank", True) / "checkpoints" / f"step_{SAVED:08d}"
    for override, message in {
        "memory.carry_memory=false": f"memory.carry_memory was True when {checkpoint.name} was saved and is False now",
        "training.global_batch_size=8": "training.global_batch_size was 4",
        "memory.order=12": "memory.order was 16",
        "memory.layers=0": "memory.layers was auto",
    }.items():
        config = run_config(chain_corpus, folder, *MODEL, "memory.carry_memory=true", override)
        with pytest.raises(ConfigError, match=message):
            check_continues(config, checkpoint)
    same = run_config(chain_corpus, folder, *MODEL, "memory.carry_memory=true", "memory.layers=all")
    check_continues(same, checkpoint)  # the same layers by another name
