"""Megatron-Core on gloo and CPU: every layout trains like one rank, and each silent hazard has a test."""

import os
from typing import Any
from unittest.mock import patch

import pytest
import torch
import torch.distributed as dist

from em_megatron.parallel import cpu_backend, process_groups
from em_megatron.parallel.fused_adamw import FusedAdamW
from em_megatron.parallel.process_groups import validate_layout
from tests.multi_rank import Pools, run_ranks

# fp32 losses of a few steps: sums in another order differ by a few units in the last place of 1.2e-7.
TOLERANCE = {"rtol": 1e-5, "atol": 1e-5}
STEPS = 4

pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="the CPU backend is off where CUDA is present")

LAYOUTS: dict[str, tuple[dict[str, int], dict[str, bool]]] = {
    "tp2": ({"tensor_model_parallel_size": 2}, {}),
    "tp2 tied, sequence parallel": ({"tensor_model_parallel_size": 2}, {"sequence_parallel": True, "tied": True}),
    "pp2": ({"pipeline_model_parallel_size": 2}, {}),
    "pp2 tied": ({"pipeline_model_parallel_size": 2}, {"tied": True}),
    "pp2 vpp2": ({"pipeline_model_parallel_size": 2, "virtual_pipeline_model_parallel_size": 2}, {}),
    "dp2": ({}, {}),
    "dp2 distributed": ({}, {"distributed_optimizer": True}),
    "dp2 bf16": ({}, {"bf16": True}),
    "dp2 bf16 distributed": ({}, {"bf16": True, "distributed_optimizer": True}),
}


def train(cases: list[tuple[dict[str, int], dict[str, bool]]], steps: int) -> list[list[tuple[float, float]]]:
    """(loss, gradient norm) of each step, for each (layout, options)."""
    from megatron.core import parallel_state

    results = []
    for sizes, options in cases:
        layout = process_groups.initialize(**sizes)
        from tests.tiny_megatron import Options, Trainer

        results.append(Trainer(layout, Options(**options)).train(steps))
        parallel_state.destroy_model_parallel()
    return results


@pytest.fixture(scope="module")
def one_rank() -> dict[str, Any]:
    options: dict[str, dict[str, bool]] = {"plain": {}, "tied": {"tied": True}, "bf16": {"bf16": True}}
    cases = [({}, chosen) for chosen in options.values()]
    trained, alone = run_ranks(train_and_start_alone, 1, cases)[0]
    return {"alone": alone, **dict(zip(options, trained, strict=True))}


def train_and_start_alone(cases: list[tuple[dict[str, int], dict[str, bool]]]) -> tuple[Any, Any]:
    return train(cases, STEPS), start_alone()


def probe() -> dict[str, Any]:
    """Everything that needs two ranks."""
    start = probe_start()
    return {"start": start, "randomness": probe_randomness(), "training": train(list(LAYOUTS.values()), STEPS)}


@pytest.fixture(scope="module")
def two_ranks(ranks: Pools) -> list[dict[str, Any]]:
    return ranks(2).run(probe)


@pytest.fixture(scope="module")
def randomness(two_ranks: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return [rank["randomness"] for rank in two_ranks]


@pytest.mark.parametrize("name", LAYOUTS)
def test_layout_trains_like_one_rank(name: str, one_rank: Any, two_ranks: Any) -> None:
    options = LAYOUTS[name][1]
    reference = one_rank["tied" if options.get("tied") else "bf16" if options.get("bf16") else "plain"]
    for rank in two_ranks:
        seen = rank["training"][list(LAYOUTS).index(name)]
        torch.testing.assert_close(torch.tensor(seen), torch.tensor(reference), **TOLERANCE)


def probe_randomness() -> dict[str, Any]:
    """What the patches of the random generators must make true, on one rank of TP2."""
    process_groups.initialize(tensor_model_parallel_size=2)
    from megatron.core import parallel_state
    from megatron.core.tensor_parallel import get_cuda_rng_tracker, model_parallel_cuda_manual_seed

    def seeded(seed: int) -> torch.Tensor:
        model_parallel_cuda_manual_seed(seed)
        return torch.rand(5)

    first, again, other = seeded(7), seeded(7), seeded(8)
    before = torch.get_rng_state()
    tracker = get_cuda_rng_tracker()
    with tracker.fork():
        forked = torch.rand(5)
    with tracker.fork():
        forked_next = torch.rand(5)
    found = {
        "first": first,
        "again": again,
        "other": other,
        "forked": forked,
        "forked_next": forked_next,
        "default_untouched": torch.equal(before, torch.get_rng_state()),
        "recompute": _recompute_probe(),
        "optimizer": _optimizer_probe(),
    }
    parallel_state.destroy_model_parallel()
    return found


def _recompute_probe() -> list[list[tuple[float, float]]]:
    from tests.tiny_megatron import Options, Trainer

    layout = process_groups._layout(None)
    return [Trainer(layout, Options(dropout=0.3, recompute=recompute)).train(2) for recompute in (False, True)]


def _optimizer_probe() -> list[str]:
    from tests.tiny_megatron import Options, Trainer

    layout = process_groups._layout(None)
    names = []
    for options in (Options(), Options(bf16=True), Options(distributed_optimizer=True)):
        part = Trainer(layout, options).optimizer.chained_optimizers[0]
        names.append(f"{type(part).__name__} {type(part.optimizer).__name__}")
    return names


def test_seed_is_applied(randomness: Any) -> None:
    for rank in randomness:
        assert torch.equal(rank["first"], rank["again"])
        assert not torch.equal(rank["first"], rank["other"])
    assert torch.equal(randomness[0]["first"], randomness[1]["first"])


def test_tracker_switches_generators(randomness: Any) -> None:
    for rank in randomness:
        assert not torch.equal(rank["forked"], rank["forked_next"])
        assert rank["default_untouched"]
    assert not torch.equal(randomness[0]["forked"], randomness[1]["forked"])


def test_recomputed_dropout_is_the_same(randomness: Any) -> None:
    plain, recomputed = randomness[0]["recompute"]
    assert plain == recomputed


def test_megatron_uses_the_fused_adamw(randomness: Any) -> None:
    assert randomness[0]["optimizer"] == [
        "FP32Optimizer FusedAdamW",
        "Float16OptimizerWithFloat16Params FusedAdamW",
        "DistributedOptimizer FusedAdamW",
    ]


@pytest.mark.parametrize("decoupled", [True, False])
def test_fused_adamw_equals_torch(decoupled: bool) -> None:
    generator = torch.Generator().manual_seed(0)
    start = [torch.randn(shape, generator=generator) for shape in ((3, 5), (7,), (0,))]
    ours, theirs = ([torch.nn.Parameter(t.clone()) for t in start] for _ in range(2))
    settings: dict[str, Any] = {"lr": 1e-2, "betas": (0.9, 0.95), "eps": 1e-8, "weight_decay": 0.1}
    fused = FusedAdamW(ours, adam_w_mode=decoupled, **settings)
    reference = (torch.optim.AdamW if decoupled else torch.optim.Adam)(theirs, **settings)
    for _ in range(5):
        for a, b in zip(ours, theirs, strict=True):
            a.grad = torch.randn(a.shape, generator=generator)
            b.grad = a.grad.clone()
        fused.step()
        reference.step()
    torch.testing.assert_close(ours, theirs, **TOLERANCE)
    assert fused.param_groups[0]["step"] == 5
    assert set(fused.state[ours[0]]) == {"exp_avg", "exp_avg_sq"}


def test_fused_adamw_refuses_capture() -> None:
    with pytest.raises(ValueError, match="optimizer_cuda_graph=False"):
        FusedAdamW([torch.nn.Parameter(torch.zeros(1))], capturable=True)


def test_off_where_cuda_is_present(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setenv("LOCAL_RANK", "3")
    untouched = torch.cuda.current_device
    assert cpu_backend.enable() is False
    assert torch.cuda.current_device is untouched
    assert cpu_backend.device() == torch.device("cuda", 3)
    assert cpu_backend.distributed_backend() == "nccl"


def probe_start() -> dict[str, Any]:
    """Versions, repeated calls and the layout, on one rank."""
    from megatron.core import parallel_state

    refused = ""
    # Another test may have enabled it in this process, after which the version is not looked at again.
    with patch.multiple(cpu_backend, SUPPORTED_MEGATRON=(0, 18), _enabled=False):
        try:
            cpu_backend.enable()
        except RuntimeError as error:
            refused = str(error)
    enabled = [cpu_backend.enable(), cpu_backend.enable()]
    layout = process_groups.initialize(pipeline_model_parallel_size=2)
    ranks = (layout.world_rank, layout.tp_rank, layout.pp_rank, layout.cp_rank, layout.dp_rank)
    sizes = (layout.world_size, layout.tp_size, layout.pp_size, layout.cp_size, layout.dp_size)
    parallel_state.destroy_model_parallel()
    return {"refused": refused, "enabled": enabled, "ranks": ranks, "sizes": sizes}


def test_start(two_ranks: Any) -> None:
    for rank, seen in enumerate(report["start"] for report in two_ranks):
        assert "install 'megatron-core==0.18.*'" in seen["refused"]
        assert seen["enabled"] == [True, True]
        assert seen["ranks"] == (rank, 0, rank, 0, 0)
        assert seen["sizes"] == (2, 1, 2, 1, 1)


def start_alone() -> tuple[int, int, bool]:
    """What `python launch/...` does without torchrun, after which nothing is left."""
    dist.destroy_process_group()
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"):
        del os.environ[name]
    layout = process_groups.initialize()
    seen = (layout.world_size, layout.pg_collection.tp.size())
    process_groups.shutdown()
    process_groups.shutdown()
    return *seen, dist.is_initialized()


def test_start_without_torchrun(one_rank: Any) -> None:
    assert one_rank["alone"] == (1, 1, False)


@pytest.mark.parametrize(
    ("world", "sizes", "message"),
    [
        (8, {"tensor_model_parallel_size": 3}, "does not divide the 8 ranks"),
        (2, {"pipeline_model_parallel_size": 2, "context_parallel_size": 2}, "= 4 ranks"),
        (4, {"tensor_model_parallel_size": 0}, "tensor_model_parallel_size is 0"),
        (4, {"virtual_pipeline_model_parallel_size": 2}, "pipeline_model_parallel_size of 2 or more"),
        (4, {"pipeline_model_parallel_size": 2, "virtual_pipeline_model_parallel_size": 1}, "at least 2 chunks"),
    ],
)
def test_impossible_layout_is_refused(world: int, sizes: dict[str, int], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        validate_layout(world, **sizes)


def test_possible_layouts_pass() -> None:
    validate_layout(1)
    validate_layout(16, 2, 2, 2, 2)


def test_threads_per_rank(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OMP_NUM_THREADS", "3")
    assert process_groups.threads_per_rank() == 3
    monkeypatch.delenv("OMP_NUM_THREADS")
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "1000")
    assert process_groups.threads_per_rank() == 1
