"""Initial weights are a function of the seed and the tensor's name, whatever the layout."""

import math
from typing import Any

import pytest
import torch

from em_megatron.model.initialization import _sharded_parts, initialize_weights
from em_megatron.parallel import process_groups
from tests.multi_rank import Pools

pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="runs on the CPU backend")

STD = 0.2
LAYOUTS: dict[str, dict[str, int]] = {
    "tp2": {"tensor_model_parallel_size": 2},
    "pp2": {"pipeline_model_parallel_size": 2},
    "vpp2": {"pipeline_model_parallel_size": 2, "virtual_pipeline_model_parallel_size": 2},
}

# key → [(slice bounds, this rank's part)]
Parts = dict[str, list[tuple[tuple[tuple[int, int], ...], torch.Tensor]]]


def parts_of(sizes: dict[str, int], tied: bool, seed: int = 7) -> Parts:
    from megatron.core import parallel_state

    layout = process_groups.initialize(**sizes)
    from tests.tiny_megatron import Options, Trainer

    parts: Parts = {}
    for model in Trainer(layout, Options(tied=tied), seed=seed).models:
        for part in _sharded_parts(model.sharded_state_dict()):
            bounds = tuple((s.start, s.stop) for s in part.global_slice())
            parts.setdefault(part.key, []).append((bounds, part.data.detach().clone()))
    parallel_state.destroy_model_parallel()
    return parts


def probe() -> dict[str, Any]:
    found: dict[str, Any] = {"whole": {}, "parts": {}}
    for tied in (False, True):
        # With two data ranks and nothing else each rank holds the whole model.
        found["whole"][tied] = parts_of({}, tied)
        found["parts"][tied] = {name: parts_of(sizes, tied) for name, sizes in LAYOUTS.items()}
    found["other_seed"] = parts_of({}, False, seed=8)
    found["generator_untouched"] = _generator_probe()
    found["refused"] = _refusal_probe()
    return found


def _generator_probe() -> bool:
    from tests.tiny_megatron import LAYERS, Trainer

    models = Trainer(process_groups.initialize()).models
    before = torch.get_rng_state()
    initialize_weights(models, 3, STD, LAYERS)
    return torch.equal(before, torch.get_rng_state())


def _refusal_probe() -> str:
    from tests.tiny_megatron import LAYERS, Trainer

    model = Trainer(process_groups._layout(None)).models[0]
    model.sharded_state_dict = lambda: {}
    try:
        initialize_weights([model], 3, STD, LAYERS)
    except RuntimeError as error:
        return str(error)
    return ""


@pytest.fixture(scope="module")
def found(ranks: Pools) -> list[dict[str, Any]]:
    return ranks(2).run(probe)


def assemble(parts: Parts) -> dict[str, torch.Tensor]:
    whole = {}
    for key, pieces in parts.items():
        shape = [max(bounds[axis][1] for bounds, _ in pieces) for axis in range(len(pieces[0][0]))]
        whole[key] = torch.full(shape, math.nan)
        for bounds, piece in pieces:
            whole[key][tuple(slice(*b) for b in bounds)] = piece
    return whole


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("name", LAYOUTS)
def test_every_layout_starts_from_the_same_weights(name: str, tied: bool, found: Any) -> None:
    whole = assemble(found[0]["whole"][tied])
    seen = set()
    for rank in found:
        for key, pieces in rank["parts"][tied][name].items():
            seen.add(key)
            for bounds, piece in pieces:
                # Equal to the bit: both are slices of one draw. Tied copies on two stages are covered here too.
                assert torch.equal(piece, whole[key][tuple(slice(*b) for b in bounds)]), key
    assert seen == set(whole)


def test_distribution_and_names(found: Any) -> None:
    whole = assemble(found[0]["whole"][False])
    for key, weight in whole.items():
        if weight.dim() < 2:
            assert torch.equal(weight, torch.ones_like(weight)), key
            continue
        small = key.endswith(("linear_proj.weight", "linear_fc2.weight"))
        expected = STD / math.sqrt(2 * 2) if small else STD
        # The sample deviation of n draws has relative deviation 1/√(2n); 5 of those.
        assert abs(weight.std().item() / expected - 1) < 5 / math.sqrt(2 * weight.numel()), key
    proj = [whole[f"decoder.layers.{layer}.self_attention.linear_proj.weight"] for layer in (0, 2)]
    assert not torch.equal(*proj)


def test_gated_halves_differ(found: Any) -> None:
    gate, up = assemble(found[0]["whole"][False])["decoder.layers.1.mlp.linear_fc1.weight"].chunk(2)
    assert not torch.equal(gate, up)


def test_seed_changes_every_matrix(found: Any) -> None:
    whole, other = assemble(found[0]["whole"][False]), assemble(found[0]["other_seed"])
    assert all(not torch.equal(whole[key], other[key]) for key in whole if whole[key].dim() > 1)


def test_global_generator_is_left_alone(found: Any) -> None:
    assert all(rank["generator_untouched"] for rank in found)


def test_matrix_outside_the_state_dict_is_refused(found: Any) -> None:
    assert "is not in the model's sharded state dict" in found[0]["refused"]
