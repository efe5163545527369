"""Arithmetic of corrupted blocks, what coefficients keep of noise, and the readers that a sweep tries."""

from __future__ import annotations

import numpy as np
import pytest

from em_megatron.config import load_config
from em_megatron.evaluation import corruption
from em_megatron.evaluation.noise import noise
from em_megatron.evaluation.sweep import SAMPLERS, reader_keys, readers
from em_megatron.kinds import KINDS as ALL_KINDS
from em_megatron.validate import validate
from tests.hf.made_runs import KINDS, VARIANTS, config_of

BLOCK, HISTORY = 50, 150
STRANGE = 10**6  # an id that only corruption brings in


@pytest.mark.parametrize("share", corruption.SHARES)
def test_a_share_of_the_tokens_is_replaced_and_none_before(share):
    ids, candidates = list(range(20_000)), np.array([STRANGE, STRANGE + 1])
    found, hit = corruption.corrupted(ids, 10_000, share, candidates, np.random.default_rng(3))
    assert found[:10_000] == ids[:10_000]
    assert not hit[:10_000].any()
    assert hit[10_000:].mean() == pytest.approx(share, abs=0.02)
    assert all(new in candidates if was_hit else new == old for new, old, was_hit in zip(found, ids, hit, strict=True))


def test_only_clean_labels_of_the_last_block_count():
    texts = [list(range(start, start + HISTORY + BLOCK + 1)) for start in (1000, 5000, 7000)]
    read = []

    def losses(asked):
        """A loss is its label plus a thousandth of the tokens before it."""
        read.append(asked)
        return [np.array(ids[1:]) + 0.001 * np.arange(1, len(ids)) for ids in asked]

    found = corruption.at_share(losses, texts, BLOCK, np.array([STRANGE]), 0.25, seed=4)
    whole, alone = read
    clean = []
    for before, after, block in zip(texts, whole, alone, strict=True):
        assert after[:HISTORY] == before[:HISTORY]
        assert block == after[HISTORY:]
        clean += [label for label, now in zip(before[HISTORY + 1 :], after[HISTORY + 1 :], strict=True) if now == label]
        assert 0 < sum(token == STRANGE for token in after) < BLOCK
    assert found["tokens"] == len(clean) < 3 * BLOCK
    assert found["loss"] < STRANGE / 2  # no corrupted label is among them
    assert found["loss"] == pytest.approx(np.mean(clean), abs=0.001 * (HISTORY + BLOCK))
    assert found["memory_benefit"] == pytest.approx(-0.001 * HISTORY)
    assert found["loss_without_history"] - found["loss"] == pytest.approx(found["memory_benefit"])
    assert (found["share"], found["texts"]) == (0.25, 3)
    again = corruption.at_share(losses, texts, BLOCK, np.array([STRANGE]), 0.25, seed=4)
    assert again == found
    assert corruption.at_share(losses, texts, BLOCK, np.array([STRANGE]), 0.0)["tokens"] == 3 * BLOCK


def test_the_rise_is_over_the_clean_block():
    rows = [{"share": 0.0, "loss": 2.0, "loss_without_history": 3.0}]
    rows += [{"share": 0.5, "loss": 2.5, "loss_without_history": 4.5}]
    found = corruption.with_rise(rows)
    assert [(row["rise"], row["rise_without_history"]) for row in found] == [(0.0, 0.0), (0.5, 1.5)]
    assert found[1]["share"] == 0.5


def test_noise_keeps_about_n_of_t_and_a_smooth_signal_is_kept():
    (row,) = noise([2160], [540])["rows"]
    assert row["white"] == pytest.approx(0.237, abs=0.01)
    assert row["smooth"] > 0.999
    assert (row["tokens"], row["order"], row["ratio"]) == (2160, 540, 0.25)


def test_noise_leaves_out_orders_that_compress_nothing():
    rows = noise([16, 64], [4, 16, 63, 64, 100], channels=2)["rows"]
    assert [(row["tokens"], row["order"]) for row in rows] == [(16, 4), (64, 4), (64, 16), (64, 63)]
    white = [row["white"] for row in rows[1:]]
    assert white == sorted(white)
    assert white[-1] <= 1


def test_readers_of_each_kind():
    memory = config_of("memory.order=16", "memory.slots=8").memory
    assert readers(memory) == [
        "",
        *(f"memory.order={order}" for order in (2, 4, 8, 32, 64)),
        *(f"memory.slots={slots}" for slots in (1, 2, 4, 16, 32)),
        *SAMPLERS,
    ]
    assert readers(config_of(*VARIANTS["subsample"], "memory.slots=3").memory) == [
        "",
        *(f"memory.slots={slots}" for slots in (1, 6, 12)),
        *SAMPLERS,
    ]
    assert readers(config_of("memory.kind=memorizing", "memory.pairs=64", "memory.top_k=8").memory) == [
        "",
        *(f"memory.pairs={pairs}" for pairs in (8, 16, 32, 128, 256)),
        "memory.top_k=0",
        "memory.top_k=32",
    ]
    for kind in ("block_local", "full", "transformer_xl", "infini", "melodi"):
        assert readers(config_of(f"memory.kind={kind}").memory) == []


@pytest.mark.parametrize("variant", ["plain", "bilinear, points", "memory in two layers, window", *KINDS])
def test_every_reader_can_be(variant):
    config = config_of(*VARIANTS[variant])
    chosen = readers(config.memory)
    assert bool(chosen) == (config.memory.kind in ("elastic", "subsample", "memorizing"))
    assert len(set(chosen)) == len(chosen)
    for changes in chosen:
        changed = load_config(config, changes.split())
        validate(changed, world_size=1)
        keys = {change.partition("=")[0].removeprefix("memory.") for change in changes.split()}
        assert keys <= set(reader_keys(config.memory))


def test_every_kind_is_among_the_variants():
    assert {config_of(*overrides).memory.kind for overrides in VARIANTS.values()} == set(ALL_KINDS)
