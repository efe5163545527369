"""Plans of every recipe on one node and many; refusals, proposals, and the entry point."""

from __future__ import annotations

import json
import subprocess
import sys
from itertools import pairwise
from pathlib import Path

import pytest

from em_megatron.config import ConfigError, load_config
from em_megatron.data.manifest import DataError
from em_megatron.planning.gpus import GPUS, find_gpu
from em_megatron.planning.job import Cluster, Job
from em_megatron.planning.planner import DEFAULT_VOCAB_SIZE, Plan, make_plan, overrides_of
from em_megatron.planning.report import as_dict, as_text
from em_megatron.planning.search import Planned, usable_bytes
from em_megatron.planning.speed import estimate, group_bandwidth
from em_megatron.planning.traffic import traffic
from em_megatron.validate import validate
from launch.plan import main
from tests.training import corpora

RECIPES = sorted(Path("launch/recipes").glob("*.yaml"))
ONE_B, SEVEN_B = Path("launch/recipes/pretrain_1b.yaml"), Path("launch/recipes/pretrain_7b.yaml")
STATED = {  # nodes of 8 GPUs that a recipe's first lines name, and that it must fit as it is
    "compare_125m": (1,),
    "pretrain_125m": (1,), "pretrain_400m": (2,), "pretrain_1b": (1, 8), "pretrain_1b_256k": (1,), "pretrain_3b": (8,),
    "pretrain_7b": (16,),
}  # fmt: skip
PROPOSED = 5


def take(plan: Plan, planned: Planned, *overrides: str) -> Plan:
    """Plans again what a user gets who pastes a proposal; `validate` must have nothing against it."""
    pasted = [*overrides, *overrides_of(planned, plan.recipe)]
    cluster = planned.cluster
    return make_plan(plan.recipe, pasted, cluster.nodes, cluster.gpus_per_node, cluster.gpu.name)


@pytest.mark.parametrize("nodes", [1, 8, 64])
@pytest.mark.parametrize("recipe", RECIPES, ids=lambda path: path.stem)
def test_every_recipe(recipe, nodes):
    plan = make_plan(recipe, nodes=nodes, gpus_per_node=8, gpu="h100")
    assert "tokens/s" in as_text(plan)
    assert plan.proposals
    assert json.loads(json.dumps(as_dict(plan)))["fits"] == (plan.refusal is None)
    speeds = [planned.estimate.tokens_per_second for planned in plan.layouts]
    assert all(fast > 0.98 * slow for fast, slow in pairwise(speeds))
    for planned in plan.proposals[:PROPOSED]:
        job = planned.job
        validate(job.config, 8 * nodes)
        assert planned.memory.total <= usable_bytes(planned.cluster)
        assert 8 % job.tensor == 0  # tensor ranks stay inside a node
    again = take(plan, plan.proposals[0])
    assert again.refusal is None
    assert again.asked is not None
    assert again.asked.memory == plan.proposals[0].memory


@pytest.mark.parametrize("gpu", ["a100-80", "h100"])
@pytest.mark.parametrize("recipe", RECIPES, ids=lambda path: path.stem)
def test_recipes_fit_what_they_are_written_for(recipe, gpu):
    for nodes in STATED.get(recipe.stem, ()):
        assert make_plan(recipe, nodes=nodes, gpus_per_node=8, gpu=gpu).refusal is None
    assert recipe.stem in STATED or recipe.stem == "quickstart"


def test_what_does_not_fit_is_refused_with_the_part_that_is_too_large():
    plan = make_plan(SEVEN_B, ["parallel.tensor_model_parallel_size=1", "parallel.sequence_parallel=false"], gpu="h100")
    assert plan.refusal is not None
    assert "the largest part is activations" in plan.refusal
    assert "training.recompute=full" in plan.refusal
    assert "\n" not in plan.refusal
    assert plan.asked is not None
    assert not plan.asked.fits
    assert "REFUSED" in as_text(plan)
    assert take(plan, plan.proposals[0]).refusal is None


def test_a_batch_that_cannot_be_kept_is_raised_and_the_budget_of_tokens_stays():
    plan = make_plan(
        "launch/recipes/quickstart.yaml",
        ["optimizer.schedule=wsd", "optimizer.wsd_decay_steps=140"],
        nodes=8,
        gpus_per_node=8,
    )
    assert plan.refusal is not None
    assert "training.global_batch_size 1 is not a multiple" in plan.refusal
    assert plan.layouts == []
    best = plan.larger_batch[0].job.config
    ratio = best.training.global_batch_size / plan.recipe.training.global_batch_size
    assert ratio > 1
    for now, before in (
        (best.training.train_steps, plan.recipe.training.train_steps),
        (best.optimizer.warmup_steps, plan.recipe.optimizer.warmup_steps),
        (best.optimizer.wsd_decay_steps, plan.recipe.optimizer.wsd_decay_steps),
    ):
        assert now == pytest.approx(before / ratio, abs=0.5)
    assert f"training.global_batch_size={best.training.global_batch_size}" in overrides_of(
        plan.larger_batch[0], plan.recipe
    )


def test_a_world_that_is_too_small_is_told_how_large_it_must_be():
    plan = make_plan(SEVEN_B, nodes=1, gpus_per_node=1, gpu="a100-40")
    assert plan.proposals == []
    assert plan.smallest is not None
    assert plan.smallest.cluster.nodes > 1
    assert f"nothing fits 1 GPU; {plan.smallest.cluster.nodes} " in as_text(plan)
    assert take(plan, plan.smallest).refusal is None


def test_what_fits_nowhere_is_said():
    huge = ["model.num_query_groups=1", "model.hidden_size=32768", "model.ffn_hidden_size=131072"]
    plan = make_plan(SEVEN_B, huge, nodes=512, gpu="a100-40")
    assert plan.proposals == []
    assert plan.smallest is None
    assert "nothing fits, on any number of GPUs" in as_text(plan)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"overrides": ["memory.ordr=3"]}, "did you mean 'memory.order'"),
        ({"overrides": ["data.sequence_length=1000"]}, "not a multiple of memory.block_length"),
        ({"overrides": ["optimizer.warmup_steps=90000"]}, "does not fit training.train_steps"),
        ({"gpu": "v100"}, "--gpu 'v100' is unknown: choose one of a100-40, a100-80, h100"),
        ({"nodes": 0}, "must be at least 1"),
        ({"mfu": 40.0}, "not a share of the peak"),
        ({"vocab_size": 0}, "--vocab-size is 0"),
    ],
)
def test_what_no_layout_mends_is_an_error(arguments, message):
    with pytest.raises(ConfigError, match=message):
        make_plan(ONE_B, **arguments)


def test_long_contexts_are_planned_with_as_many_ranks_as_their_matrices_need():
    plan = make_plan(ONE_B, ["data.sequence_length=4194304", "training.global_batch_size=1"], nodes=64)
    assert plan.refusal is not None
    assert all(planned.job.context > 1 for planned in plan.proposals)


def test_vocabulary_comes_from_the_corpus(tmp_path):
    assert make_plan(ONE_B).asked.job.vocab_size == DEFAULT_VOCAB_SIZE
    corpus = corpora.chain_corpus(tmp_path / "corpus", corpora.tokenizer(tmp_path / "tokenizer"))
    plan = make_plan(ONE_B, [f"data.path={corpus}"])
    assert plan.asked.job.vocab_size == corpora.VOCAB_SIZE
    assert str(corpus) in as_text(plan)
    assert make_plan(ONE_B, [f"data.path={corpus}"], vocab_size=50000).asked.job.vocab_size == 50000
    (corpus / "manifest.json").write_text("{")
    with pytest.raises(DataError, match="not valid JSON"):
        make_plan(ONE_B, [f"data.path={corpus}"])


def test_kernels_of_other_machines_are_planned_for():
    assert make_plan(ONE_B, ["memory.kernels=triton"]).refusal is None  # though this machine may have no GPU
    assert "which keeps more" in as_text(make_plan(ONE_B, ["memory.kernels=batched"]))


def test_speed_follows_from_the_stated_share_of_the_peak():
    fast, slow = (make_plan(ONE_B, mfu=mfu).asked.estimate for mfu in (0.5, 0.25))
    assert fast.seconds["compute"] == pytest.approx(slow.seconds["compute"] / 2)
    assert slow.mfu < 0.25
    needed = fast.flops_per_token * fast.tokens_per_second
    assert needed == pytest.approx(fast.mfu * 8 * GPUS["h100"].peak_flops)
    assert fast.step_seconds * fast.tokens_per_second == pytest.approx(64 * 32768)


def test_bytes_by_axis_of_a_small_layout():
    """By hand: 2 layers of width 64 on 40 tokens, fp32, TP 2 with sequence parallelism, PP 2, CP 2, DP 2, all of size 2."""
    config = load_config(
        None,
        ["name=x", "data.path=nowhere", "data.sequence_length=80", "model.num_layers=2", "model.hidden_size=64",
         "model.num_attention_heads=4", "model.num_query_groups=2", "model.kv_channels=16", "model.ffn_hidden_size=96",
         "memory.block_length=10", "memory.order=16", "memory.slots=8", "training.precision=fp32",
         "parallel.tensor_model_parallel_size=2", "parallel.sequence_parallel=true",
         "parallel.pipeline_model_parallel_size=2", "parallel.context_parallel_size=2",
         "parallel.memory_handoff=chain", "training.global_batch_size=6"],
    )  # fmt: skip
    job = Job(config, 16, 512)
    sent, micro_batches, hidden = traffic(job), 3, 40 * 64 * 4
    # One layer a rank: 4 sums of the layer, 1 of an end; a reduce-scatter and an all-gather send half of it each.
    assert sent.tensor == micro_batches * 5 * 2 * hidden / 2
    assert sent.sequence == micro_batches * 3 * hidden / 2
    assert sent.pipeline == micro_batches * 2 * hidden / 2
    assert sent.context == micro_batches * 2 * 16 * 1 * 2 * 16 * 4  # order, heads, keys and values, d, fp32
    parameters = 256 * 64 + 64 * (2 * 32 + 2 * 16) + 3 * 64 * 48 + 2 * 64
    assert sent.data == 2 * 3 / 4 * 4 * parameters
    h100 = find_gpu("H100")
    assert group_bandwidth(job, Cluster(h100, 1, 16)) > group_bandwidth(job, Cluster(h100, 8, 2))
    assert estimate(job, Cluster(h100, 2, 8), 0.4).seconds["bubble"] > 0


def test_gpus_by_name():
    assert find_gpu("A100") is GPUS["a100-80"]


def test_entry_point(tmp_path, capsys):
    command = [sys.executable, "launch/plan.py", str(ONE_B), "--nodes", "64", "--json", "training.train_steps=1200"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.returncode == 1, done.stderr
    plan = json.loads(done.stdout)
    assert (plan["nodes"], plan["gpus_per_node"], plan["gpu"]["name"]) == (64, 8, "h100")
    assert "256" in plan["refusal"]
    best = plan["layouts"][0]
    assert best["fits"]
    assert best["memory_bytes"]["total"] < plan["usable_bytes"]
    assert main([str(ONE_B), *best["overrides"], "--nodes=64"]) == 0
    assert "assumptions" in capsys.readouterr().out
    assert main([str(tmp_path / "none.yaml")]) == 2
    assert capsys.readouterr().err.startswith("error: recipe")
    with pytest.raises(SystemExit):
        main(["--help"])
    text = capsys.readouterr().out
    assert all(option in text for option in ("--mfu", "--vocab-size", "--gpus-per-node", "b200", "memory.order"))


def test_kinds_whose_memory_is_not_planned_are_refused():
    with pytest.raises(ConfigError, match="not yet for 'infini'"):
        make_plan(ONE_B, ["memory.kind=infini"])
