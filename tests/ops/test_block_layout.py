"""Where documents lie when a sample is cut over ranks or goes on in the next one, read off by hand."""

from __future__ import annotations

import pytest
import torch

from em_megatron.ops.block_layout import BlockLayout, Run
from tests.parallel.documents import random_segments

LENGTH = 2
#        blocks: 0     1     2     3     4     5     6     7
ROW_A = [1, 1, 1, 1, 1, 1, 1, 1, 1, 2, 3, 3, 3, 3, 3, 3]
ROW_B = [1, 1, 2, 2, 2, 2, 3, 4, 5, 5, 5, 5, 5, 0, 6, 6]


def parts(size: int, **options) -> list[BlockLayout]:
    segments = torch.tensor([ROW_A, ROW_B])
    return [
        BlockLayout.from_segment_ids(segments, LENGTH, sequence_rank=rank, sequence_size=size, **options)
        for rank in range(size)
    ]


def test_four_parts_by_hand():
    layouts = parts(4)
    assert [layout.runs for layout in layouts] == [
        (Run(0, 0, 2),),
        (Run(0, 0, 2, 2), Run(1, 0, 1, 1)),
        (Run(0, 0, 1, 4), Run(1, 0, 2)),
        (Run(0, 0, 2, 1), Run(1, 0, 1, 2)),
    ]
    assert [layout.leaving for layout in layouts] == [
        (Run(0, 0, 2), Run(1, 1, 1)),
        (Run(0, 0, 2, 2),),
        (Run(0, 1, 1), Run(1, 0, 2)),
        (),
    ]
    assert all(layout.history == ((0, 0), (2, 1), (4, 0), (1, 2), (0, 0)) for layout in layouts)
    assert [layout.entering_rows for layout in layouts] == [[], [0, 1], [0], [0, 1]]
    assert layouts[2].memory_tokens.int().tolist() == [[1, 0, 0, 0], [0, 0, 1, 1]]
    assert [layout.shared_blocks for layout in layouts] == [False, True, True, True]
    assert all(layout.crosses_ranks and not layout.continued_rows for layout in layouts)


def test_what_comes_from_and_goes_to_other_samples():
    first, last = parts(
        2, history=torch.tensor([6, 0]), continues=torch.tensor([True, False]), slots=torch.tensor([4, 7])
    )
    assert first.history == last.history == ((3, 0), (7, 0), (3, 0))
    assert first.runs == (Run(0, 0, 4, 3), Run(1, 1, 2))
    assert first.leaving == (Run(0, 0, 4, 3),)
    assert last.leaving == (Run(0, 1, 3),)
    assert first.continued_rows == last.continued_rows == [0]
    assert (first.slots, first.entering_rows) == ((4, 7), [0])


def test_a_single_block_may_be_all_that_goes_on():
    layout = BlockLayout.from_segment_ids(torch.tensor([[1, 1, 2, 2]]), LENGTH, continues=torch.tensor([True]))
    assert layout.runs == ()
    assert layout.leaving == (Run(0, 1, 1),)
    assert layout.history == ((0,), (1,))


def test_only_the_document_that_goes_on_reads_what_was_carried():
    layout = BlockLayout.from_segment_ids(torch.tensor([[1, 1, 1, 2, 3, 3]]), 3, history=torch.tensor([9]))
    assert layout.memory_tokens.int().tolist() == [[1, 1, 1, 0, 0, 0]]
    layout = BlockLayout.from_segment_ids(torch.tensor([[1, 1, 2, 3, 3, 3]]), 3, history=torch.tensor([9]))
    assert layout.memory_tokens.int().tolist() == [[1, 1, 0, 0, 0, 0]]
    assert layout.runs == (Run(0, 0, 1, 3),)


@pytest.mark.parametrize("seed", range(20))
def test_parts_make_the_whole(seed):
    generator = torch.Generator().manual_seed(seed)
    segments = torch.tensor([random_segments(generator, 12, 3) for _ in range(3)])
    whole = BlockLayout.from_segment_ids(segments, 3)
    for size in (1, 2, 3, 6):
        cut = [BlockLayout.from_segment_ids(segments, 3, sequence_rank=r, sequence_size=size) for r in range(size)]
        assert torch.equal(torch.cat([part.segment_ids for part in cut], 1), segments)
        assert torch.equal(torch.cat([part.memory_tokens for part in cut], 1), whole.memory_tokens)
        per_part = 12 // size
        # Joined again, a run's blocks are those of the whole, and its history counts what came before.
        pieces = {
            (run.row, rank * per_part + run.first_block + step): run.history + step
            for rank, part in enumerate(cut)
            for run in part.runs
            for step in range(run.num_blocks)
        }
        expected = {(run.row, run.first_block + i): i for run in whole.runs for i in range(run.num_blocks)}
        assert {place: age for place, age in expected.items() if age} == {p: age for p, age in pieces.items() if age}


def test_a_sample_that_cannot_be_shared_is_refused():
    with pytest.raises(ValueError, match="on each of 3 ranks"):
        BlockLayout.from_segment_ids(torch.ones(1, 16), LENGTH, sequence_size=3)
