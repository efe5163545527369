"""A document that goes on from step to step against the same document in one long sample, on every layout."""

from __future__ import annotations

import pytest
import torch

from tests.parallel.parity import SAMPLES, STEPS, VOCABULARY, Trained, config_of
from tests.parallel.test_parity import CARRY, CHAIN, CP, CP4, FULL, GATHER, PP, TP, TWO, VPP

pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="the test of layouts covers GPUs")

# fp32 losses of order 4 from one long sum or from the same sum in three parts: a few hundred units of 6e-8.
TOLERANCE = 2e-5

LAYOUTS: dict[str, tuple[int, tuple[str, ...]]] = {
    "one rank": (1, ()),
    "one rank, blocks one by one": (1, ("memory.superchunk=1",)),
    "tensor": (2, (TP,)),
    "interleaved": (2, (PP, VPP, TWO)),
    "context, all-gather": (2, (CP, GATHER)),
    "context, chain": (2, (CP, CHAIN)),
    "data": (2, ()),
    "context 4, all-gather": (4, (CP4, GATHER, TWO)),
    "context 4, chain": (4, (CP4, CHAIN)),
}


def losses_of_steps(overrides: tuple[str, ...], carries: bool) -> torch.Tensor | None:
    """The loss of every token [samples, all tokens], steps side by side, weights unchanged; on one rank of each model
    copy and sequence part, None on the others. The rest is NaN."""
    from em_megatron.training.step import is_reporting_rank, run_schedule, token_loss_step

    settings = (CARRY,) if carries else (f"data.sequence_length={40 * STEPS}",)
    trained = Trained(config_of((*overrides, *settings)))
    config, layout, length = trained.config, trained.layout, trained.config.data.sequence_length
    micro = config.training.micro_batch_size
    count = SAMPLES // (micro * layout.dp_size)
    out = torch.full((SAMPLES, 40 * STEPS), float("nan"))
    for step in range(STEPS if carries else 1):
        feeds = [trained._micro_batches(step) for _ in trained.model]
        with torch.no_grad():
            found = run_schedule(token_loss_step, feeds, trained.model, config, count, micro, forward_only=True)
        if trained.carried is not None:
            trained.carried.advance()
        part = length // layout.cp_size
        start = step * length + layout.cp_rank * part
        for index, losses in enumerate(found):
            first = (index * layout.dp_size + layout.dp_rank) * micro
            out[first : first + micro, start : start + part] = losses
    return out if is_reporting_rank(layout) else None


def long_samples() -> torch.Tensor:
    """The same documents, uncut, on one rank."""
    from unittest.mock import patch

    from tests.parallel import parity
    from tests.parallel.documents import batch

    whole = batch(7, SAMPLES, 8 * STEPS, 5, VOCABULARY)
    with patch.object(parity, "global_batch", lambda config, step: whole):
        losses = losses_of_steps((), carries=False)
    assert losses is not None
    return losses


@pytest.fixture(scope="module")
def truth(ranks) -> torch.Tensor:
    return ranks(1).run(long_samples)[0]


@pytest.mark.parametrize("name", LAYOUTS)
def test_steps_with_carried_memory_are_one_long_sample(ranks, truth, name):
    count, overrides = LAYOUTS[name]
    found = [part for part in ranks(count).run(losses_of_steps, overrides, True) if part is not None]
    losses = torch.stack(found).nanmean(0)
    assert not losses.isnan().any()
    torch.testing.assert_close(losses, truth, rtol=TOLERANCE, atol=TOLERANCE)


def test_without_carrying_the_numbers_are_others(ranks, truth):
    """So that the test above compares something: the same samples, each beginning with an empty memory."""
    (losses,) = ranks(1).run(forgetful)
    first, later = (losses - truth).abs()[:, :40].max(), (losses - truth).abs()[:, 40:].max()
    assert first < TOLERANCE
    assert later > 0.01


def forgetful() -> torch.Tensor:
    from unittest.mock import patch

    from tests.parallel import parity

    original = parity.global_batch

    def without_history(config, step):
        whole = original(config, step)
        return {**whole, "history": whole["history"] * 0, "continues": whole["continues"] & False}

    with patch.object(parity, "global_batch", without_history):
        losses = losses_of_steps((), carries=True)
    assert losses is not None
    return losses


def test_gradients_stop_at_the_step(ranks):
    """What a step carries on is detached: there is no graph behind the state it reads."""
    assert ranks(1).run(graphs_behind_carried_states) == [(True, False)]


def graphs_behind_carried_states() -> tuple[bool, bool]:
    """Whether states are carried after a step of training, and whether any has a graph."""
    trained = Trained(config_of((CARRY, FULL)))
    trained.model[0].train()
    micro = next(trained._micro_batches(0))
    trained.model[0](micro.tokens, None, None, labels=micro.labels, packed_seq_params=micro.layout)
    assert trained.carried is not None
    trained.carried.advance()
    states = [trained.carried.read(layer, [0]) for layer in range(4)]
    return all(bool(state.any()) for state in states), any(state.requires_grad for state in states)


def test_a_slot_without_a_state_is_an_error():
    from em_megatron.model.carried_memory import CarriedMemory

    carried = CarriedMemory({0: (7, 2, 16)}, torch.float32, torch.device("cpu"))
    carried.write(0, [3], torch.ones(7, 1, 2, 16))
    with pytest.raises(KeyError, match="batch slot 3 goes on with a document, but layer 0 holds no state"):
        carried.read(0, [3])
    carried.advance()
    assert torch.equal(carried.read(0, [3]), torch.ones(7, 1, 2, 16))
    assert carried.num_bytes == 4 * 7 * 2 * 16
    carried.advance()
    assert carried.num_bytes == 0
