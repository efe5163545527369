"""Every layout trains the same model: losses, all gradients by name, memory slots and states, input gradients, gradient
norms, and the weights after three optimizer steps, against one rank on the same global batches.

The samples are packed documents with unequal loss masks, so that ranks differ in documents, tokens and losses. On a
machine with GPUs `pytest -m gpu` runs the same cases over NCCL, those that the number of devices allows.
"""

from __future__ import annotations

import importlib.util
import re
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.parallel.parity import STEPS, Outcome, Parts, entering_states, error, run_case

# One tolerance for everything in fp32, relative to the norm of the whole tensor: sums of some thousand terms in another
# order differ by a few hundred units of 6e-8; four layers and three Adam steps amplify that a little.
TOLERANCE = 2e-5

TP, PP = (f"parallel.{axis}_model_parallel_size=2" for axis in ("tensor", "pipeline"))
CP = "parallel.context_parallel_size=2"
VPP, CP4 = "parallel.virtual_pipeline_model_parallel_size=2", "parallel.context_parallel_size=4"
SP, DIST = "parallel.sequence_parallel=true", "parallel.use_distributed_optimizer=true"
GATHER, CHAIN = "parallel.memory_handoff=all_gather", "parallel.memory_handoff=chain"
FULL, SELECTIVE = "training.recompute=full", "training.recompute=selective"
TIED, QK_NORM = "model.share_embeddings_and_output_weights=true", "model.qk_layernorm=true"
TWO, CARRY = "training.micro_batch_size=2", "memory.carry_memory=true"

# name → (ranks, overrides). The table of layouts in the README has these names.
CASES: dict[str, tuple[int, tuple[str, ...]]] = {
    "one rank, full recompute": (1, (FULL, TWO)),
    "tensor": (2, (TP,)),
    "tensor + sequence": (2, (TP, SP, QK_NORM, SELECTIVE, TWO)),
    "pipeline": (2, (PP, TIED)),
    "interleaved": (2, (PP, VPP, TIED)),
    "interleaved, full recompute": (2, (PP, VPP, FULL, TWO)),
    "context, all-gather": (2, (CP, GATHER, TWO)),
    "context, chain": (2, (CP, CHAIN)),
    "context, full recompute": (2, (CP, GATHER, FULL)),
    "context, selective recompute": (2, (CP, CHAIN, SELECTIVE, TWO)),
    "context, distributed optimizer": (2, (CP, GATHER, DIST)),
    "context, memory in two layers": (2, (CP, GATHER, "memory.layers=0,2")),
    "context, detached memory": (2, (CP, CHAIN, "memory.detach_memory=true")),
    "context, no memory": (2, (CP, "memory.kind=block_local")),
    "context, small superchunks": (2, (CP, GATHER, "memory.superchunk=3")),
    "tensor, carried memory": (2, (TP, SP, CARRY)),
    "interleaved, carried memory": (2, (PP, VPP, CARRY, TWO)),
    "context, carried memory": (2, (CP, GATHER, CARRY, FULL)),
    "data, carried memory": (2, (DIST, CARRY, TWO)),
    "data": (2, (TWO,)),
    "data, distributed optimizer": (2, (DIST, FULL)),
    "tensor × pipeline": (4, (TP, SP, PP, TIED)),
    "tensor × interleaved": (4, (TP, PP, VPP, SELECTIVE)),
    "tensor × context": (4, (TP, SP, CP, GATHER, QK_NORM)),
    "tensor × context, chain": (4, (TP, CP, CHAIN, FULL)),
    "tensor × data": (4, (TP, SP, DIST, TWO)),
    "pipeline × context": (4, (PP, CP, GATHER, TIED)),
    "pipeline × data": (4, (PP, DIST)),
    "interleaved × context": (4, (PP, VPP, CP, CHAIN, TIED, TWO)),
    "interleaved × data": (4, (PP, VPP, DIST, FULL, TWO)),
    "context × data": (4, (CP, GATHER, DIST, TWO)),
    "context 4": (4, (CP4, GATHER)),
    "context 4, chain": (4, (CP4, CHAIN, SELECTIVE, TWO)),
    "context 4, carried memory": (4, (CP4, CHAIN, CARRY, TWO)),
    "tensor × pipeline × context": (8, (TP, SP, PP, CP, GATHER, DIST, TIED)),
    "tensor × interleaved × context": (8, (TP, PP, VPP, CP, CHAIN, FULL)),
}
MODEL_ONLY = ("model.", "memory.")
# Variants whose axes other cases cover: left to the slow tests, as those on 8 ranks are.
VARIANTS = (
    "interleaved, full recompute",
    "context, memory in two layers",
    "context, no memory",
    "context, small superchunks",
    "tensor × context, chain",
    "interleaved × data",
)

devices = torch.cuda.device_count() if torch.cuda.is_available() else 0


def marks(device: str, count: int, fast: bool) -> list[pytest.MarkDecorator]:
    """Of a case on so many ranks: where it runs, and whether the fast tests do without it on the CPU."""
    return [
        *([pytest.mark.gpu] if device == "gpu" else []),
        *([pytest.mark.slow] if not fast and device == "cpu" else []),
        pytest.mark.skipif(
            count > devices if device == "gpu" else devices > 0,
            reason=f"needs {count} GPUs" if device == "gpu" else "the CPU backend is off where CUDA is present",
        ),
    ]


PARAMETERS = [
    pytest.param(name, id=f"{name} on {device}", marks=marks(device, count, count <= 4 and name not in VARIANTS))
    for device in ("cpu", "gpu")
    for name, (count, _) in CASES.items()
]
# The other memory kinds, each with the variant of its settings that differs most in what ranks do.
KINDS: dict[str, tuple[str, ...]] = {
    "full": ("memory.kind=full",),
    "transformer_xl": ("memory.kind=transformer_xl",),
    "subsample": ("memory.kind=subsample",),
    "infini, linear": ("memory.kind=infini",),
    "infini, delta": ("memory.kind=infini", "memory.update=delta"),
    "memorizing, dense": ("memory.kind=memorizing", "memory.top_k=0", "memory.pairs=13", "memory.layers=0,2"),
    "memorizing, top-k": ("memory.kind=memorizing", "memory.top_k=3", "memory.pairs=17"),
    "melodi": (
        "memory.kind=melodi",
        "memory.short_term_tokens=3",
        "memory.long_term_tokens=4",
        "memory.long_term_increment=2",
    ),
    "gated delta net": ("model.layer_pattern=G*",),
}
WHOLE_SAMPLES = {
    "melodi": (CP, CP4),
    "gated delta net": (TP, CP, CP4),
}  # refused axes: tests/test_config.py, tests/model
# name → (ranks, overrides), for every kind; on the CPU the fast tests run the first two.
KIND_LAYOUTS: dict[str, tuple[int, tuple[str, ...]]] = {
    "tensor + sequence": (2, (TP, SP, SELECTIVE, TWO)),
    "context": (2, (CP, DIST, FULL)),
    "interleaved": (2, (PP, VPP, TIED, TWO)),
    "data": (2, (DIST, FULL)),
    "context 4": (4, (CP4, SELECTIVE, TWO)),
    "tensor × pipeline": (4, (TP, SP, PP)),
    "tensor × context": (4, (TP, CP, QK_NORM)),
}
FAST_LAYOUTS = {"tensor + sequence", "context"}


def kind_parameters() -> list[Any]:
    found = []
    for device in ("cpu", "gpu"):
        for layout, (count, overrides) in KIND_LAYOUTS.items():
            for kind in KINDS:
                if set(WHOLE_SAMPLES.get(kind, ())) & set(overrides):
                    continue
                fast = layout in FAST_LAYOUTS or (kind in WHOLE_SAMPLES and layout == "interleaved")
                when = marks(device, count, fast)
                if kind == "gated delta net":
                    missing = importlib.util.find_spec("fla") is None
                    when.append(pytest.mark.skipif(missing, reason="needs flash-linear-attention"))
                found.append(pytest.param(kind, layout, id=f"{kind}: {layout} on {device}", marks=when))
    return found


@pytest.fixture(scope="module")
def references() -> dict[tuple[str, ...], Outcome]:
    return {}


def model_only(overrides: tuple[str, ...]) -> tuple[str, ...]:
    return tuple(item for item in overrides if item.startswith(MODEL_ONLY))


def names(parts: Parts, start: str) -> list[str]:
    return sorted(name for name in parts.pieces if name.startswith(start))


@pytest.mark.parametrize("case", PARAMETERS)
def test_equals_one_rank(ranks, references, case):
    check_case(ranks, references, case, *CASES[case])


@pytest.mark.parametrize(("kind", "layout"), kind_parameters())
def test_every_kind_equals_one_rank(ranks, references, kind, layout):
    count, overrides = KIND_LAYOUTS[layout]
    check_case(ranks, references, f"{kind}: {layout}", count, (*KINDS[kind], *overrides))


def check_case(ranks, references, case: str, count: int, overrides: tuple[str, ...]) -> None:
    model = model_only(overrides)
    if model not in references:
        (references[model],) = ranks(1).run(run_case, model)
    truth, outcomes = references[model], ranks(count).run(run_case, overrides)
    for outcome in outcomes:  # every rank reports the same figures
        assert outcome.losses == pytest.approx(truth.losses, rel=TOLERANCE)
        assert outcome.grad_norms == pytest.approx(truth.grad_norms, rel=TOLERANCE)
    assert len(truth.losses) == STEPS
    parts = [outcome.parts for outcome in outcomes]
    known = {name for part in parts for name in part.pieces}
    assert set(truth.parts.pieces) <= known
    assert all(name.startswith("state of") for name in known - set(truth.parts.pieces))  # at boundaries between ranks
    errors = {
        name: error(name, truth.parts, parts, whole=not name.startswith(("slots", "state")))
        for name in truth.parts.pieces
    }
    assert len(names(truth.parts, "gradient of")) == len(names(truth.parts, "weight of")) > 20
    worst = max(errors, key=lambda name: errors[name])
    print(f"{case}: the largest relative error of {len(errors)} tensors is {errors[worst]:.1e} ({worst})")
    assert {name: value for name, value in errors.items() if value > TOLERANCE} == {}
    check_states(ranks, model, parts, expected=CP in overrides or CP4 in overrides)


def check_states(ranks, model: tuple[str, ...], parts: list[Parts], expected: bool) -> None:
    """The states that entered, against the reference stepped from the layer's keys and values on one rank."""
    found = {name for part in parts for name in names(part, "state of")}
    elastic = not any(item.startswith("memory.kind=") for item in model)
    assert bool(found) == (expected and elastic) or CARRY in model
    if not found or CARRY in model:  # test_carried_memory.py compares those with samples that are longer
        return
    at = {tuple(int(number) for number in re.findall(r"\d+", name)) for name in found}
    (truth,) = ranks(1).run(entering_states, model, at)
    errors = {name: error(name, truth, parts, whole=True) for name in found}
    assert {name: value for name, value in errors.items() if value > TOLERANCE} == {}


def test_the_readme_names_every_case():
    text = Path("README.md").read_text()
    section = text[text.index("## Layouts and the tests") : text.index("## Kernels and speed")]
    rows = [line for line in section.splitlines() if line.startswith("|")]
    named = {name for row in rows for name in re.findall(r"`([^`]+)`", row)}
    assert named == set(CASES)
