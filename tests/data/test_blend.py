"""Blends: exact proportions, a pure function of the sample number, changed only from a later sample on."""

from collections import Counter
from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from em_megatron.data.blend import (
    RESOLUTION,
    Blend,
    BlendedStream,
    Phase,
    choices,
    parse_blend,
    parse_changes,
    shares_of,
    slots_of,
)
from em_megatron.data.manifest import DataError
from em_megatron.data.stream import TokenStream
from tests.data.handmade import SPACING, CountingReader

T, L = 8, 4


def fractions(*weights: int | str) -> list[Fraction]:
    return [Fraction(weight) for weight in weights]


def blend(*phases: tuple[int, list[Fraction]]) -> Blend:
    return Blend([Phase(start, shares_of(weights)) for start, weights in phases])


@settings(max_examples=150, deadline=None)
@given(weights=st.lists(st.integers(0, 40), min_size=1, max_size=7).filter(any))
def test_every_prefix_is_within_one_sample_of_its_share(weights: list[int]) -> None:
    """And every window, which is between two prefixes, within two; Tijdeman's bound is 1 - 1/(2k - 2)."""
    shares = shares_of(fractions(*weights))
    chosen = choices(shares)
    counts = np.cumsum(chosen[:, None] == np.arange(len(shares)), axis=0)
    used = sum(share > 0 for share in shares)
    bound = 1 - Fraction(1, 2 * used - 2) if used > 1 else 0
    for step, row in enumerate(counts.tolist(), start=1):
        assert max(abs(count - share * step) for count, share in zip(row, shares, strict=True)) <= bound
    assert counts[-1].tolist() == [share * len(chosen) for share in shares]


def test_proportions_far_into_a_run() -> None:
    shares = shares_of(fractions("0.7", "0.2", "0.1"))
    mixed = Blend([Phase(0, shares)])
    for n in (0, 1, 9, 10, 12_345_678_901):
        assert max(abs(count - share * n) for count, share in zip(mixed.counts(n).tolist(), shares, strict=True)) < 1
    chosen = Counter(mixed.choose(n)[0] for n in range(10**9, 10**9 + 1000))
    assert chosen == {0: 700, 1: 200, 2: 100}


def test_every_sample_of_each_corpus_comes_once_and_in_order() -> None:
    mixed = blend((0, fractions(3, 0, 1)), (10, fractions(1, 1, 1)), (17, fractions(0, 5, 2)))
    expected = Counter[int]()
    for n in range(60):
        corpus, number = mixed.choose(n)
        assert mixed.counts(n).tolist() == [expected[0], expected[1], expected[2]]
        assert number == expected[corpus]
        expected[corpus] += 1
    assert [mixed.choose(n)[0] for n in range(10)].count(1) == 0
    assert [mixed.choose(n)[0] for n in range(17, 60)].count(0) == 0


def test_weights_need_not_be_round() -> None:
    weights = fractions(123_456_789_012, 98_765_432_109, "0.5e9")
    shares = shares_of(weights)
    assert sum(shares) == 1
    assert all(abs(s - w / sum(weights)) < Fraction(1, RESOLUTION) for s, w in zip(shares, weights, strict=True))
    with pytest.raises(DataError, match="a share below 1/100000; give it a larger weight, or 0"):
        shares_of(fractions(10**9, 10**9 + 1, 1))
    with pytest.raises(DataError, match="are all 0"):
        shares_of(fractions(0, 0))


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("data/prose", [(1, "data/prose")]),
        ("my data", [(1, "my data")]),
        ("bob's", [(1, "bob's")]),
        ("1 'my data'", [(1, "my data")]),
        ("0.7 a 0.3 b", [(Fraction(7, 10), "a"), (Fraction(3, 10), "b")]),
        ("1/3 a 2 'my data'", [(Fraction(1, 3), "a"), (2, "my data")]),
        ("1 s3://x/a 1 'pipe:ssh h cat {}'", [(1, "s3://x/a"), (1, "pipe:ssh h cat {}")]),
        ("pipe:ssh h cat {}", [(1, "pipe:ssh h cat {}")]),
    ],
)
def test_paths_and_weights(text: str, expected: list[tuple[Fraction, str]]) -> None:
    assert [tuple(entry) for entry in parse_blend(text)] == expected


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("1 a x b", "has 'x' where a weight"),
        ("1 a -1 b", "has '-1' where"),
        ("1 'a", "quote it"),
        ("1 a 2", "no list of weights"),
        ("2024", "no list of"),
    ],
)
def test_a_weight_that_is_none_is_named(text: str, reason: str) -> None:
    with pytest.raises(DataError, match=reason):
        parse_blend(text)


def test_a_folder_whose_name_looks_like_a_blend(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert len(parse_blend("2024 news 1 old")) == 2
    (tmp_path / "2024 news 1 old").mkdir()
    assert parse_blend("2024 news 1 old") == [(1, "2024 news 1 old")]


def test_changes_are_read_and_refused() -> None:
    assert parse_changes(["100 1 2", "250 0.5 0"], 2) == [(100, fractions(1, 2)), (250, fractions("0.5", 0))]
    for texts, reason in {
        ("100 1",): "a weight of at least 0 for each of the 2 corpora",
        ("x 1 2",): "has 'x 1 2'",
        ("",): "has ''",
        ("\u00b2 1 2",): "write the sample",
        ("100 1 2", "100 1 1"): "sample 100 out of order",
        ("0 1 2",): "sample 0 out of order",
    }.items():
        with pytest.raises(DataError, match=reason):
            parse_changes(texts, 2)


def test_the_identity_covers_what_was_read_and_nothing_later() -> None:
    plain = blend((0, fractions(1, 1)))
    later = blend((0, fractions(1, 1)), (100, fractions(1, 3)))
    names = ["a", "b"]
    assert plain.identity(names, 100) == later.identity(names, 100) != later.identity(names, 101)
    assert plain.identity(names, 0) != plain.identity(["a", "c"], 0)
    assert plain.identity(names, 5) != blend((0, fractions(2, 1))).identity(names, 5)
    assert plain.identity(names, 5) == blend((0, fractions(3, 3))).identity(names, 5)
    # A corpus alone has its own; another one may join later without a trace in the past.
    alone, joined = blend((0, fractions(1))), blend((0, fractions(1, 0)), (40, fractions(1, 1)))
    assert alone.identity(["a"], 40) == joined.identity(names, 40) == "a" != joined.identity(names, 41)


def make_stream(number: int, slots: int = 0, shards: int = 1) -> TokenStream:
    """Corpora whose ids tell them apart: ids of corpus c are above c·10^7."""
    lengths = [7, 4, 30, 2, 3, 12, 9, 5, 5, 21, 6, 40 + number]
    reader = CountingReader(lengths, shards, first_id=10_000_000 * number)
    return TokenStream(reader, T, L, seed=5, pad_id=-1, slots=slots, shuffle_shards=2)


def corpus_of(tokens: np.ndarray) -> int:
    return int(tokens[tokens >= 0][0]) // 10_000_000


def test_a_blended_stream_gives_each_corpus_its_own_order() -> None:
    mixed = blend((0, fractions(2, 1)))
    stream = BlendedStream([make_stream(0), make_stream(1)], mixed)
    alone = [make_stream(0), make_stream(1)]
    for n in range(80):
        corpus, number = mixed.choose(n)
        sample, expected = stream.sample(n), alone[corpus].sample(number)
        assert all(np.array_equal(sample[name], expected[name]) for name in expected)
        assert corpus_of(sample["tokens"]) == corpus
    epochs = stream.epochs(60)
    assert epochs == [alone[0].epochs(40), alone[1].epochs(20)]
    assert epochs[0] == pytest.approx(40 / alone[0].num_samples(), rel=0.1)


@pytest.mark.parametrize("shards", [1, 2, 5])
def test_with_slots_each_corpus_keeps_its_own(shards: int) -> None:
    mixed, G = blend((0, fractions(3, 1))), 4
    shared = slots_of(mixed, G)
    assert shared == [3, 1]
    stream = BlendedStream([make_stream(c, slots, shards) for c, slots in enumerate(shared)], mixed, G)
    owners = [{mixed.choose(n)[0] for n in range(slot, 200, G)} for slot in range(G)]
    assert sorted(map(sorted, owners)) == [[0], [0], [0], [1]]
    continued = 0
    read = Counter[int]()
    for n in range(200):
        sample, after = stream.sample(n), stream.sample(n + G)
        assert sample["slot"] == n % G
        read.update(sample["tokens"][sample["loss_mask"] == 1].tolist())
        if sample["continues"]:
            continued += 1
            last = sample["tokens"][sample["segment_ids"] == sample["segment_ids"].max()][-1]
            assert after["tokens"][0] == last + 1
            assert after["history"] > 0
        else:
            assert after["history"] == 0
    assert continued > 10
    for number, member in enumerate(
        stream.streams
    ):  # whole epochs hold every token as often, the begun one once at most
        epochs = int(stream.epochs(200)[number])
        lengths = member.reader.document_lengths.tolist()
        ids = [10_000_000 * number + SPACING * d + k for d, length in enumerate(lengths) for k in range(length - 1)]
        assert epochs >= 1
        assert {read[i] - epochs for i in ids} <= {0, 1}


def test_slots_that_cannot_be_shared_out_are_refused() -> None:
    with pytest.raises(DataError, match=r"each corpus needs whole slots of the 4 samples .* 2\.67 1\.33"):
        slots_of(blend((0, fractions(2, 1))), 4)
    with pytest.raises(DataError, match=r"blend_changes cannot be used with memory\.carry_memory"):
        slots_of(blend((0, fractions(1, 1)), (8, fractions(3, 1))), 4)
