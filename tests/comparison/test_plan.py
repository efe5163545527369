"""Plans become cells: names, sizes, seeds, refusals; the plans in the repository can be run."""

from __future__ import annotations

import pytest

from em_megatron.comparison.overview import overview, write_variants
from em_megatron.comparison.plan import PLANS, Plan, cells_of, load_plan
from em_megatron.config import ConfigError
from launch import compare

PLAN = """
name: tiny
base:
  model: {num_layers: 2, hidden_size: 32, num_attention_heads: 2, num_query_groups: 2, kv_channels: 16, ffn_hidden_size: 48}
  memory: {block_length: 16, order: 8, slots: 4, bank_cache: null}
  data: {sequence_length: 64}
  training: {precision: fp32, train_steps: 4, global_batch_size: 2, micro_batch_size: 2}
  optimizer: {warmup_steps: 1}
  logging: {wandb: disabled, tensorboard: false}
vocab_size: 512
corpora:
  mine: {shards: nowhere}
sizes:
  1x: {}
  2x: {model.num_layers: 4}
variants:
  wide: {kind: elastic, slots: order}
groups:
  - {kinds: [elastic, block_local], factors: [1, 4], corpora: [mine], sizes: [1x], seeds: [1, 2]}
  - {kinds: [elastic, wide], factors: [4], corpora: [mine], sizes: [1x], seeds: [1], suite: "perplexity,noise"}
speed:
  kinds: [elastic, elastic_4x, full]
  sizes: [1x, 2x]
  corpus: mine
  steps: 8
"""


@pytest.fixture
def plan(tmp_path, monkeypatch) -> Plan:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "plan.yaml").write_text(PLAN)
    return load_plan("plan.yaml")


def test_cells_are_the_product_each_once(plan):
    cells = {cell.name: cell for cell in cells_of(plan)}
    runs = [name for name, cell in cells.items() if not cell.speed_only]
    assert runs == [
        "mine-1x-elastic_1x-seed1",
        "mine-1x-elastic_4x-seed1",
        "mine-1x-block_local-seed1",
        "mine-1x-elastic_1x-seed2",
        "mine-1x-elastic_4x-seed2",
        "mine-1x-block_local-seed2",
        "mine-1x-wide_4x-seed1",
    ]
    assert len(cells) == len(runs) + 6
    wide, big = cells["mine-1x-wide_4x-seed1"], cells["speed-2x-elastic_4x"]
    assert (wide.config.memory.order, wide.config.memory.slots, wide.suite) == (32, 32, "perplexity,noise")
    assert cells["mine-1x-elastic_4x-seed1"].suite == "perplexity"  # what comes first counts
    assert (big.config.model.num_layers, big.config.memory.order, big.config.training.train_steps) == (4, 32, 8)
    assert wide.costs.memory_floats_per_sequence == 4 * cells[runs[0]].costs.memory_floats_per_sequence
    assert {cell.config.seed for cell in cells.values()} == {1, 2}


def test_overview_and_variants(plan, tmp_path):
    cells = cells_of(plan)
    assert overview(plan, cells).splitlines()[-1].startswith("13 cells, ")
    said = write_variants(plan, cells, tmp_path / "variants.txt")
    assert "sbatch --array=1-13 slurm/compare.sh" in said
    lines = (tmp_path / "variants.txt").read_text().splitlines()
    assert lines[1] == "mine-1x-elastic_1x-seed1 seed=1 data.path=nowhere memory.kind=elastic memory.order=8"


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("groups=[{kinds: [elastc], corpora: [mine], sizes: [1x]}]", "kind 'elastc' of the plan is unknown"),
        ("groups=[{kinds: [elastic], corpora: [other], sizes: [1x]}]", "corpus 'other' is not one of mine"),
        ("groups=[{kinds: [elastic], corpora: [mine], sizes: [3x]}]", "size '3x' is not one of 1x, 2x"),
        ("corpora.mine.domain=prose", "corpus 'mine' needs one of domain, texts, shards, recall"),
        ("base.data.sequence_length=60", "cell mine-1x-elastic_1x-seed1: "),
        ("base.modl.num_layers=2", "modl"),
        ("workrs=2", "workrs"),
        ("groups.0.seeds=[3]", "lists are overridden whole"),
    ],
)
def test_what_cannot_be_is_refused_in_one_sentence(plan, tmp_path, capsys, override, message):
    assert compare.main([str(tmp_path / "plan.yaml"), override, "--dry-run"]) == 2
    said = capsys.readouterr().err
    assert message in said
    assert len(said.strip().splitlines()) == 1


def test_a_plan_that_is_not_there_names_those_that_are(tmp_path):
    with pytest.raises(ConfigError, match="small_cpu"):
        load_plan(tmp_path / "none.yaml")


@pytest.mark.parametrize("path", sorted(PLANS.glob("*.yaml")), ids=lambda path: path.stem)
def test_the_plans_of_the_repository_pass_a_dry_run(path, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert compare.main([path.stem, "--dry-run"]) == 0
    assert " cells, " in capsys.readouterr().out


def test_the_papers_grid(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    cells = cells_of(load_plan("paper"))
    orders = {cell.config.memory.order for cell in cells if cell.kind == "elastic"}
    assert orders == {540, 1080, 2160, 4320, 8640}
    assert {cell.config.data.sequence_length for cell in cells} == {32768}
    once = next(cell for cell in cells if cell.label == "elastic_1x" and cell.size == "125m").costs
    for cell in cells:
        if cell.factor and cell.size == "125m":
            ratio = cell.costs.memory_floats_per_sequence / once.memory_floats_per_sequence
            assert ratio == pytest.approx(cell.factor, rel=0.03), cell.name
