"""Recipes of equal memory: what is committed is what the command writes, can be trained, and has the sizes it says."""

from __future__ import annotations

from pathlib import Path

import pytest

from em_megatron.config import load_config
from em_megatron.kinds.matching import COMPARED, FACTORS, family
from em_megatron.model.sizes import memory_floats_per_sequence, num_parameters
from em_megatron.validate import validate
from launch import match

BASE, FOLDER, VOCABULARY = "launch/recipes/compare_125m.yaml", Path("launch/recipes/compare"), 32000
MATCHED = ("elastic", "memorizing", "memorizing_dense", "melodi")


@pytest.fixture(scope="module")
def rows():
    return family(load_config(BASE), VOCABULARY)


def test_the_committed_recipes_are_those_that_the_command_writes(tmp_path, capsys):
    assert match.main([BASE, "--write", str(tmp_path)]) == 0
    written = {path.name: path.read_text() for path in tmp_path.iterdir()}
    assert written == {path.name: path.read_text() for path in FOLDER.iterdir()}
    assert len(capsys.readouterr().out.splitlines()) == len(written) + 1


def test_every_kind_at_every_factor(rows):
    names = {row.name for row in rows}
    assert {f"{kind}_{factor}x" for kind in MATCHED for factor in FACTORS} <= names
    assert set(COMPARED) - set(MATCHED) <= names


@pytest.mark.parametrize("path", sorted(FOLDER.glob("*.yaml")), ids=lambda path: path.stem)
def test_recipe(path, rows):
    config, row = load_config(path), next(row for row in rows if row.name == path.stem)
    validate(config, world_size=8)
    assert (
        memory_floats_per_sequence(config.model, config.memory, config.data.sequence_length)
        == row.costs.memory_floats_per_sequence
    )
    assert num_parameters(config.model, VOCABULARY, config.memory) == row.costs.parameters
    if path.stem.startswith(MATCHED):
        assert row.costs.memory_floats_per_sequence == pytest.approx(row.wanted, rel=0.005)
    transformer = num_parameters(load_config(BASE).model, VOCABULARY)
    if path.stem.endswith("equal_parameters"):
        assert row.costs.parameters == pytest.approx(transformer, rel=0.005)
    else:
        assert row.costs.parameters == transformer + row.costs.memory_parameters


def test_refusals(capsys):
    assert match.main([BASE, "--factors", "one"]) == 2
    assert "error: --factors" in capsys.readouterr().err
    assert match.main(["nothing.yaml"]) == 2
    assert "does not exist" in capsys.readouterr().err
