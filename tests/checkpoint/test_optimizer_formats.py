"""What one of Megatron's optimizers saved arrives in another, to the bit, and the run goes on as it would have."""

from pathlib import Path
from typing import Any

import pytest
import torch

from em_megatron.checkpoint.folder import CheckpointError
from em_megatron.checkpoint.sharded import CheckpointStore
from tests.checkpoint.tiny_run import TOLERANCE, content, resume, save, trainer

pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="runs on the CPU backend")

# Where precision changes, or tensor parallelism in bf16: activations are rounded at other places, to 2^-9 each time.
BF16 = {"rtol": 0.02, "atol": 0.02}

# Saved on one layout with one optimizer → loaded on others with each of the other three.
CONVERSIONS = {
    ("tp2", "plain"): [("dp2", "distributed"), ("dp2", "bf16"), ("vpp2", "bf16 distributed")],
    ("vpp2", "distributed"): [("tp2", "plain"), ("tp2", "bf16"), ("dp2", "bf16 distributed")],
    ("dp2", "bf16"): [("vpp2", "bf16 distributed"), ("vpp2", "plain"), ("tp2", "distributed")],
    ("dp2", "bf16 distributed"): [("tp2", "bf16"), ("tp2", "plain"), ("vpp2", "distributed")],
}
CASES = [(*saved, *loaded) for saved, others in CONVERSIONS.items() for loaded in others]


def master_of(tensors: dict[str, torch.Tensor], weight: str) -> torch.Tensor:
    """The fp32 copy of a weight, wherever that checkpoint has it."""
    for key in (f"optimizer.state.param.{weight}", f"optimizer.state.fp32_param.{weight}", weight):
        if key in tensors and tensors[key].dtype == torch.float32:
            return tensors[key]
    raise AssertionError(f"{weight} is stored in fp32 nowhere")


def differing(saved: dict[str, torch.Tensor], arrived: dict[str, torch.Tensor]) -> list[str]:
    """The moments, master weights and weights that did not arrive to the bit."""
    found = []
    for key in saved:
        if key.startswith("optimizer.state.exp_avg"):
            found += [] if torch.equal(saved[key], arrived[key]) else [key]
        elif not key.startswith("optimizer."):
            master, weight = master_of(saved, key), arrived[key]
            found += [] if torch.equal(master, master_of(arrived, key)) else [f"master of {key}"]
            found += [] if torch.equal(master.to(weight.dtype), weight) else [key]
    return found


def groups_of(optimizer: Any) -> list[dict[str, Any]]:
    """The settings of each parameter group, Adam's step among them."""
    groups = [group for part in optimizer.chained_optimizers for group in part.optimizer.param_groups]
    return [{key: value for key, value in group.items() if key != "params"} for group in groups]


def convert(root: Path, run: Any, others: list[tuple[str, Any]]) -> list[dict[str, Any]]:
    """Saves after two steps; for each other run, what did not arrive and what both did in two more steps."""
    store = CheckpointStore(root / "saved", keep_last=1)
    run.train(2)
    saved, groups = content(save(store, run)), groups_of(run.optimizer)
    went_on, results = run.train(2), []
    for name, start in others:
        other = start()
        resume(store, other)
        again = save(CheckpointStore(root / name, keep_last=1), other)
        results.append(
            {
                "differing": differing(saved, content(again)),
                "groups": (groups, groups_of(other.optimizer)),
                "steps": (went_on, other.train(2)),
            }
        )
    return results


def probe_conversions(root: Path) -> dict[tuple[str, str, str, str], dict[str, Any]]:
    results = {}
    for saved, others in CONVERSIONS.items():
        starts = [(" ".join(other), lambda other=other: trainer(*other, seed=8)) for other in others]
        found = convert(root / " ".join(saved), trainer(*saved), starts)
        results |= {(*saved, *other): one for other, one in zip(others, found, strict=True)}
    return results


def probe_tied(root: Path) -> list[dict[str, Any]]:
    """The first and the last stage share a weight, and save it once."""
    there = convert(
        root / "there",
        trainer("vpp2", "plain", tied=True),
        [("dp2", lambda: trainer("dp2", "distributed", 8, tied=True))],
    )
    back = convert(
        root / "back",
        trainer("dp2", "distributed", tied=True),
        [("vpp2", lambda: trainer("vpp2", "plain", 8, tied=True))],
    )
    return there + back


def chained(kind: str, seed: int = 7) -> Any:
    """A run whose two model chunks have an optimizer each."""
    from megatron.core.optimizer import ChainedOptimizer, get_megatron_optimizer

    run = trainer("vpp2", kind, seed=seed)
    parts = [
        get_megatron_optimizer(
            run.optimizer.config, [chunk], use_gloo_process_groups=False, pg_collection=run.layout.pg_collection
        )
        for chunk in run.chunks
    ]
    run.optimizer = run.scheduler.optimizer = ChainedOptimizer([part.chained_optimizers[0] for part in parts])
    return run


def probe_chained(root: Path) -> list[dict[str, Any]]:
    there = convert(root / "there", chained("plain"), [("distributed", lambda: chained("distributed", 8))])
    return there + convert(root / "back", chained("distributed"), [("plain", lambda: chained("plain", 8))])


def probe_refused(root: Path) -> dict[str, str]:
    store = CheckpointStore(root, keep_last=1)
    run = trainer("vpp2", "plain")
    save(store, run)
    one_more = chained("distributed")
    other_rate = trainer("vpp2", "distributed")
    for group in other_rate.optimizer.param_groups:
        group["max_lr"] = 0.5
    found = {}
    for name, other in (("chain", one_more), ("rate", other_rate)):
        before = [parameter.detach().clone() for chunk in other.chunks for parameter in chunk.parameters()]
        try:
            resume(store, other)
        except CheckpointError as error:
            found[name] = str(error)
        after = [parameter for chunk in other.chunks for parameter in chunk.parameters()]
        assert all(torch.equal(a, b) for a, b in zip(before, after, strict=True))
    return found


def probe(root: Path) -> dict[str, Any]:
    return {
        "conversions": probe_conversions(root / "conversions"),
        "tied": probe_tied(root / "tied"),
        "chained": probe_chained(root / "chained"),
        "refused": probe_refused(root / "refused"),
    }


def check(found: dict[str, Any], tolerance: dict[str, float]) -> None:
    assert found["differing"] == []
    saved, loaded = found["groups"]
    assert saved == loaded
    assert {group["step"] for group in loaded} == {2}
    assert {group["wd_mult"] for group in loaded} == {0.0, 1.0}
    went_on, resumed = found["steps"]
    torch.testing.assert_close(torch.tensor(resumed), torch.tensor(went_on), **tolerance)


@pytest.mark.parametrize(("layout", "kind", "to_layout", "to_kind"), CASES)
def test_another_optimizer_goes_on(layout: str, kind: str, to_layout: str, to_kind: str, ranks: Any) -> None:
    rounded = ("bf16" in kind) != ("bf16" in to_kind) or ("bf16" in kind and layout != to_layout == "tp2")
    for rank in ranks:
        found = rank["formats"]["conversions"][layout, kind, to_layout, to_kind]
        check(found, BF16 if rounded else TOLERANCE)


def test_tied_embeddings_arrive(ranks: Any) -> None:
    for found in ranks[0]["formats"]["tied"]:
        check(found, TOLERANCE)


def test_a_chain_of_optimizers_arrives(ranks: Any) -> None:
    for found in ranks[0]["formats"]["chained"]:
        check(found, TOLERANCE)


@pytest.mark.parametrize(
    ("case", "message"),
    [
        ("chain", "groups of parameters ([2] there and [2, 2] here)"),
        ("rate", "by an optimizer with max_lr 0.01 instead of 0.5"),
    ],
)
def test_other_groups_are_refused_on_every_rank(case: str, message: str, ranks: Any) -> None:
    for rank in ranks:
        assert message in rank["formats"]["refused"][case]
