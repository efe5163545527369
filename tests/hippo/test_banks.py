"""Every superchunk size gives the memory of the direct projection; the caches give what was built; costs add up.

One tolerance: fp64 results of a few thousand operations on numbers of size 1 agree to 1e-10.
"""

from pathlib import Path

import pytest
import torch

from em_megatron.hippo import banks as banks_module
from em_megatron.hippo import cost_model, legs, recurrences, samplers
from em_megatron.hippo.banks import MemoryBanks, Superchunk, shared_banks

TOLERANCE = 1e-10
FP64, CPU = torch.float64, torch.device("cpu")


def noise(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, dtype=FP64, generator=torch.Generator().manual_seed(0))


def dense_triangle(chunk: Superchunk, slots: int, block_length: int) -> torch.Tensor:
    """The levels put back at their places: [m·S, m·L]."""
    m = chunk.num_blocks
    dense = torch.zeros(m * slots, m * block_length, dtype=FP64)
    for depth, level in enumerate(chunk.triangle):
        w = 1 << depth
        assert level.shape == (len(range(w, m, 2 * w)), w * slots, w * block_length)
        for p, tile in enumerate(level):
            rows = min(m - (2 * p + 1) * w, w)
            assert not tile[rows * slots :].any()
            top, left = (2 * p + 1) * w * slots, 2 * p * w * block_length
            dense[top : top + rows * slots, left : left + w * block_length] += tile[: rows * slots]
    return dense


def apply(banks: MemoryBanks, num_blocks: int, m: int, signal: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Memory of every block [B·S, d] and the last state, m blocks at a time."""
    S, L = banks.slots, banks.block_length
    state, memories = torch.zeros(banks.order, signal.shape[1], dtype=FP64), []
    for start in range(0, num_blocks, m):
        chunk = banks.superchunk(start, min(m, num_blocks - start), FP64, CPU)
        x = signal[start * L : (start + chunk.num_blocks) * L]
        memory = dense_triangle(chunk, S, L) @ x
        if chunk.read_carry is not None:
            memory += chunk.read_carry @ state
        memories.append(memory)
        state = chunk.carry @ state + chunk.inject @ x
    return torch.cat(memories), state


@pytest.mark.parametrize(("order", "block_length", "slots"), [(1, 3, 1), (33, 7, 5), (64, 31, 9), (5, 1, 4)])
@pytest.mark.parametrize("num_blocks", [1, 6, 7])
def test_every_superchunk_size_is_the_direct_projection(
    order: int, block_length: int, slots: int, num_blocks: int
) -> None:
    points = samplers.exponential(slots, 1.5)
    banks = MemoryBanks(order, block_length, points)
    signal = noise(num_blocks * block_length, 3)
    ends = [i * block_length for i in range(1, num_blocks + 1)]
    states = [legs.inject(order, 0, t, t) @ signal[:t] for t in ends]
    empty = torch.zeros(slots, 3, dtype=FP64)
    expected = torch.cat([empty, *(legs.read(order, points) @ state for state in states[:-1])])
    for m in range(1, num_blocks + 1):
        memory, state = apply(banks, num_blocks, m, signal)
        torch.testing.assert_close(memory, expected, rtol=0, atol=TOLERANCE)
        torch.testing.assert_close(state, states[-1], rtol=0, atol=TOLERANCE)


@pytest.mark.parametrize("discretization", ["backward_euler", "bilinear", "zero_order_hold"])
def test_other_discretizations_in_every_size(discretization: str) -> None:
    banks = MemoryBanks(17, 9, samplers.uniform(4), discretization)
    signal = noise(45, 2)
    expected, _ = apply(banks, 5, 5, signal)
    reference = recurrences.inject(discretization, 17, 0, 36, 36) @ signal[:36]
    torch.testing.assert_close(expected[-4:], banks.read(FP64, CPU) @ reference, rtol=0, atol=TOLERANCE)
    for m in (1, 2, 3):
        torch.testing.assert_close(apply(banks, 5, m, signal)[0], expected, rtol=0, atol=TOLERANCE)


def test_triangle_is_built_in_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    whole = MemoryBanks(20, 13, samplers.uniform(3)).superchunk(2, 5, FP64, CPU)
    monkeypatch.setattr(banks_module, "_PIECE_BYTES", 8 * 20 * 5)
    pieces = MemoryBanks(20, 13, samplers.uniform(3)).superchunk(2, 5, FP64, CPU)
    for one, other in zip(whole.triangle, pieces.triangle, strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=TOLERANCE)


def test_a_block_is_the_superchunk_of_one_block() -> None:
    banks = MemoryBanks(11, 6, samplers.uniform(3))
    for number in (0, 1, 12):
        block, chunk = banks.block(number, FP64, CPU), banks.superchunk(number, 1, FP64, CPU)
        assert torch.equal(block.carry, chunk.carry)
        assert torch.equal(block.inject, chunk.inject)
        assert block.triangle == chunk.triangle == ()
        assert (block.read_carry is None) == (chunk.read_carry is None) == (number == 0)
        if number:
            assert torch.equal(block.read_carry, chunk.read_carry)
        assert torch.equal(banks.step(number, FP64, CPU).carry, chunk.carry)
    assert banks.block(12, FP64, CPU) is banks.block(12, FP64, "cpu")
    assert not banks.block(0, FP64, CPU).carry.any()


def test_carry_between_any_two_moments() -> None:
    banks = MemoryBanks(11, 6, samplers.uniform(3))
    assert torch.equal(banks.carry(2, 7, FP64, CPU), legs.carry(11, 12, 42))
    assert banks.carry(2, 7, FP64, CPU) is banks.carry(2, 7, FP64, CPU)
    for start, stop in ((0, 3), (4, 3)):
        with pytest.raises(ValueError, match="0 < start_block <= stop_block"):
            banks.carry(start, stop, FP64, CPU)


def test_passing_matrices_are_kept_while_they_fit(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(banks_module, "_PASSING_BYTES", 3 * 8 * 11 * 11)  # three carries
    banks = MemoryBanks(11, 6, samplers.uniform(3))
    first = [banks.carry(1, stop, FP64, CPU) for stop in (2, 3, 4)]
    assert banks.carry(1, 2, FP64, CPU) is first[0]
    banks.carry(1, 5, FP64, CPU)
    assert banks.carry(1, 2, FP64, CPU) is first[0]
    assert banks.carry(1, 3, FP64, CPU) is not first[1]
    assert torch.equal(banks.carry(1, 3, FP64, CPU), first[1])
    steps = [banks.step(number, FP64, CPU) for number in range(9)]
    assert banks.step(8, FP64, CPU) is steps[8]
    assert banks.step(0, FP64, CPU) is not steps[0]


def test_memory_identity_and_dtypes() -> None:
    points = tuple(samplers.uniform(3).tolist())
    banks = shared_banks(8, 4, points, "exact", None)
    assert shared_banks(8, 4, points, "exact", None) is banks
    assert shared_banks(9, 4, points, "exact", None) is not banks
    assert banks.superchunk(0, 3, FP64, CPU) is banks.superchunk(0, 3, FP64, CPU)
    assert banks.read(FP64, CPU) is banks.read(FP64, CPU)
    chunk, half = banks.superchunk(1, 3, FP64, CPU), banks.superchunk(1, 3, torch.bfloat16, CPU)
    assert chunk.carry is chunk.carry
    for one, other in zip(chunk.triangle, half.triangle, strict=True):
        assert torch.equal(one.to(torch.bfloat16), other)
    assert torch.equal(half.inject, chunk.inject.float())  # the state is kept in fp32 or better
    assert torch.equal(half.carry, chunk.carry.float())


def test_built_in_inference_mode_serves_training() -> None:
    banks = MemoryBanks(8, 4, samplers.uniform(3))
    with torch.inference_mode():
        chunk = banks.superchunk(1, 2, FP64, CPU)
        tensors = [*chunk.triangle, chunk.read_carry, chunk.carry, chunk.inject, banks.read(FP64, CPU)]
        block = banks.block(3, FP64, CPU)
        tensors += [block.carry, block.inject, block.read_carry, banks.carry(2, 5, FP64, CPU)]
    assert not any(tensor is None or tensor.is_inference() for tensor in tensors)


def test_long_context() -> None:
    """A superchunk that ends near a million tokens against the direct projection of its own tokens."""
    order, L, start, m = 16, 64, 15_620, 3
    points = samplers.uniform(5)
    chunk = MemoryBanks(order, L, points).superchunk(start, m, FP64, CPU)
    x = noise(m * L, 2)
    t = (start + m - 1) * L
    expected = legs.read(order, points) @ legs.inject(order, start * L, t, t) @ x[: t - start * L]
    torch.testing.assert_close((dense_triangle(chunk, 5, L) @ x)[-5:], expected, rtol=0, atol=TOLERANCE)
    state = noise(order, 2)
    moved = legs.read(order, points) @ legs.carry(order, start * L, t) @ state
    assert chunk.read_carry is not None
    torch.testing.assert_close(chunk.read_carry[-5:] @ state, moved, rtol=0, atol=TOLERANCE)


def make(cache: Path, order: int = 8) -> Superchunk:
    chunk = MemoryBanks(order, 4, samplers.uniform(3), cache_dir=cache).superchunk(1, 3, FP64, CPU)
    _ = chunk.triangle, chunk.read_carry, chunk.carry  # built when first used
    return chunk


def same(one: Superchunk, other: Superchunk) -> bool:
    pairs = zip(
        (*one.triangle, one.read_carry, one.carry), (*other.triangle, other.read_carry, other.carry), strict=True
    )
    return all(a is not None and b is not None and torch.equal(a, b) for a, b in pairs)


def test_disk_cache_is_read_back(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    built = make(tmp_path / "new" / "folder")
    files = sorted(path.suffix for path in (tmp_path / "new" / "folder").iterdir())
    assert files == [".pt"] * 3
    monkeypatch.setattr(legs, "_recurrence", None)  # any rebuild would now fail
    monkeypatch.setattr(MemoryBanks, "_read", None)
    assert same(make(tmp_path / "new" / "folder"), built)


def test_different_inputs_have_different_files(tmp_path: Path) -> None:
    make(tmp_path, order=8)
    make(tmp_path, order=9)
    assert len(list(tmp_path.iterdir())) == 6


@pytest.mark.parametrize("damage", ["empty", "cut", "noise", "one_byte", "other_key", "other_object"])
def test_damaged_file_is_built_again(tmp_path: Path, damage: str) -> None:
    built = make(tmp_path)
    for path in tmp_path.iterdir():
        content = bytearray(path.read_bytes())
        if damage == "empty":
            path.write_bytes(b"")
        elif damage == "cut":
            path.write_bytes(content[: len(content) // 2])
        elif damage == "noise":
            path.write_bytes(b"not a cache file" * 20)
        elif damage == "one_byte":
            saved = torch.load(path, weights_only=True)
            needle = saved["tensors"][0].flatten()[1:3].numpy().tobytes()
            content[content.index(needle)] ^= 1
            path.write_bytes(content)
        elif damage == "other_key":
            torch.save({**torch.load(path, weights_only=True), "key": "{}"}, path)
        else:
            torch.save([1, 2, 3], path)
    with pytest.warns(UserWarning, match="built again"):
        again = make(tmp_path)
    assert same(again, built)
    assert same(make(tmp_path), built)


@pytest.mark.parametrize("blocks", [1, 2, 5, 8])
def test_what_kernels_read_holds_the_same_numbers(blocks: int) -> None:
    chunk = MemoryBanks(9, 4, samplers.uniform(3)).superchunk(2, blocks, FP64, CPU)
    assert chunk.padded_read_carry.shape == (blocks * 3, 64)
    assert (chunk.padded_carry.shape, chunk.padded_inject.shape) == ((64, 64), (64, 4 * blocks))
    padded = (chunk.padded_read_carry[:, :9], chunk.padded_carry[:9, :9], chunk.padded_inject[:9])
    for ours, truth in zip(padded, (chunk.read_carry, chunk.carry, chunk.inject), strict=True):
        assert torch.equal(ours, truth)
    assert not chunk.padded_carry[9:].any()
    assert not chunk.padded_inject[9:].any()
    dense, start = dense_triangle(chunk, 3, 4), 0
    for i in range(1, blocks):
        row = chunk.packed_triangle[start : start + 3 * 4 * i].view(3, 4 * i)
        assert torch.equal(row, dense[3 * i : 3 * i + 3, : 4 * i])
        start += row.numel()
    assert start == chunk.packed_triangle.numel()


def test_unwritable_cache_costs_only_a_warning(tmp_path: Path) -> None:
    banks = MemoryBanks(8, 4, samplers.uniform(3), cache_dir=tmp_path / "gone")
    (tmp_path / "gone").rmdir()
    with pytest.warns(UserWarning, match="could not be kept"):
        assert len(banks.superchunk(0, 3, FP64, CPU).triangle) == 2


def test_bad_input_is_refused() -> None:
    points = samplers.uniform(3)
    with pytest.raises(ValueError, match="Unknown discretization"):
        MemoryBanks(8, 4, points, "euler")
    with pytest.raises(ValueError, match="at least 1"):
        MemoryBanks(8, 0, points)
    with pytest.raises(ValueError, match=r"inside \(0, 1\)"):
        MemoryBanks(8, 4, torch.tensor([0.0, 0.5]))
    with pytest.raises(ValueError, match="num_blocks >= 1"):
        MemoryBanks(8, 4, points).superchunk(0, 0, FP64, CPU)
    with pytest.raises(ValueError, match="numbered from 0"):
        MemoryBanks(8, 4, points).block(-1, FP64, CPU)


@pytest.mark.parametrize(("order", "millions"), [(540, 23), (2160, 118), (8640, 890)])
def test_costs_of_the_recurrent_form(order: int, millions: int) -> None:
    """T = 32k, L = 2048, S = 512. The rounded figures count a carry for the first block too, which starts from zero."""
    recurrent = cost_model.memory_cost(16, 1, order, 512, 2048)
    closed_form = 15 * (order**2 // 2 + order * 2048 + 512 * order)
    assert recurrent == closed_form - order**2 // 2
    assert closed_form == pytest.approx(millions * 1e6, rel=0.01)


def test_cost_of_the_parallel_form_does_not_depend_on_the_order() -> None:
    for order in (540, 8640):
        assert cost_model.memory_cost(16, 16, order, 512, 2048) == 512 * 2048 * 120 == 125_829_120


def test_cost_of_an_uneven_split_by_hand() -> None:
    """Three blocks as 2 + 1: one pair, one update of 2 blocks from zero, one read."""
    S, L, N = 5, 7, 11
    assert cost_model.memory_cost(3, 2, N, S, L) == S * L + N * 2 * L + S * N


def test_bank_elements_are_those_stored() -> None:
    S, L, N, B = 3, 4, 6, 7
    banks = MemoryBanks(N, L, samplers.uniform(S))
    for m in range(1, B + 1):
        stored = 0
        for start in range(0, B, m):
            chunk = banks.superchunk(start, min(m, B - start), FP64, CPU)
            stored += sum(level.numel() for level in chunk.triangle)
            stored += 0 if chunk.read_carry is None else chunk.read_carry.numel()
            if start + m < B:
                stored += chunk.inject.numel() + (chunk.carry.numel() if start else 0)
        assert cost_model.bank_elements(B, m, N, S, L) == stored


def test_plan_is_the_cheapest_that_fits() -> None:
    sizes = {"order": 540, "slots": 512, "block_length": 2048}
    chosen = cost_model.plan(16, **sizes)
    costs = [cost_model.memory_cost(16, m, **sizes) for m in range(1, 17)]
    assert costs[chosen - 1] == min(costs)
    assert cost_model.plan(16, order=8640, slots=512, block_length=2048) > chosen
    assert cost_model.plan(1, **sizes) == 1
    limit = 4 * cost_model.bank_elements(16, 16, **sizes) - 1
    assert 4 * cost_model.bank_elements(16, cost_model.plan(16, **sizes, bank_bytes_limit=limit), **sizes) <= limit
    assert cost_model.plan(512, **sizes) < 64
    with pytest.raises(ValueError, match="lower the order"):
        cost_model.plan(16, **sizes, bank_bytes_limit=1000)
    with pytest.raises(ValueError, match="superchunk 17"):
        cost_model.memory_cost(16, 17, **sizes)
