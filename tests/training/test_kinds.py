"""Memory kinds with parameters of their own through the whole trainer: saved, resumed bit for bit, evaluated, refused."""

from __future__ import annotations

import pytest
import torch

from em_megatron.config import ConfigError
from em_megatron.parallel.process_groups import shutdown
from em_megatron.training.loop import train
from em_megatron.training.report import describe_run
from em_megatron.training.restore import restore
from em_megatron.training.setup import set_up
from tests.training.corpora import run_config

KINDS = {
    "infini": ("memory.kind=infini", "memory.update=delta"),
    "memorizing": ("memory.kind=memorizing", "memory.pairs=40", "memory.top_k=4"),
    "melodi": (
        "memory.kind=melodi",
        "memory.short_term_tokens=3",
        "memory.long_term_tokens=4",
        "memory.long_term_increment=2",
    ),
}


def trained(corpus, folder, *overrides: str) -> tuple[dict[str, torch.Tensor], str]:
    """The weights at the end of this call, and what the run said of itself at the start."""
    config = run_config(corpus, folder, "training.train_steps=6", "validation.interval=0", *overrides)
    try:
        run = set_up(config, world_size=1)
        said = describe_run(run)
        train(run)
        return {name: weight.detach().clone() for name, weight in run.model[0].named_parameters()}, said
    finally:
        shutdown()


@pytest.mark.parametrize("kind", KINDS)
def test_resumed_equals_uninterrupted(chain_corpus, tmp_path, kind):
    whole, said = trained(chain_corpus, tmp_path / "whole", *KINDS[kind])
    assert f"of them {kind}'s)" in said
    assert f"memory  {kind} in " in said
    trained(chain_corpus, tmp_path / "parts", *KINDS[kind], "training.stop_after_steps=3")
    parts, _ = trained(chain_corpus, tmp_path / "parts", *KINDS[kind])
    assert whole.keys() == parts.keys()
    for name, weight in whole.items():
        assert torch.equal(weight, parts[name]), name


def test_weights_of_one_kind_are_not_read_as_another(chain_corpus, tmp_path):
    trained(chain_corpus, tmp_path, *KINDS["infini"])
    with pytest.raises(ConfigError, match="'infini', and 'elastic'"):
        trained(chain_corpus, tmp_path)
    for override in ("memory.kind=block_local", "memory.layers=0"):
        with pytest.raises(ConfigError, match="others"):
            restore(tmp_path / "test", [override], world_size=1)
    try:
        assert restore(tmp_path / "test", ["memory.update=linear"], world_size=1).config.memory.update == "linear"
    finally:
        shutdown()
