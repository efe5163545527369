"""Counts against numbers that are counted by hand, exact quantiles, packing, and what is written."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest

from em_megatron.data.packing import pack
from tests.data.handmade import write_corpus
from tokenizer import length_picture, statistics

LENGTHS = [4, 4, 6, 10, 40, 7, 100, 3]


@pytest.fixture
def corpus(tmp_path: Path) -> Path:
    (tmp_path / "corpus").mkdir()
    write_corpus(tmp_path / "corpus", LENGTHS, shard_tokens=20)
    return tmp_path / "corpus"


def run(corpus: Path, *options: str) -> int:
    return statistics.main([str(corpus), "--quiet", *options])


def test_a_page_of_numbers(corpus: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(corpus, "--sequence-length", "32", "--block-length", "8", "--output", str(tmp_path / "out/deep")) == 0
    summary = json.loads((tmp_path / "out/deep/statistics.json").read_text())
    train = summary["splits"]["train"]
    assert (train["documents"], train["tokens"], train["longest"]) == (8, sum(LENGTHS), 100)
    assert train["text_bytes"] == 2 * (sum(LENGTHS) - 2 * 8)
    assert train["bytes_per_token"] == 2
    assert train["length_percentiles"] == {"p1": 3, "p5": 3, "p25": 4, "p50": 6, "p75": 10, "p95": 100, "p99": 100}
    assert train["share_of_tokens_in_documents_longer_than_sequence"] == 140 / sum(LENGTHS)
    for name, rest_follows in (("new_memory", False), ("carried_memory", True)):
        index = pack(np.array(LENGTHS), np.arange(8), 32, 8, rest_follows)
        assert train["packing"][name] == {"samples": index.num_samples, "filled": index.efficiency}
    assert (tmp_path / "out/deep/lengths.png").read_bytes().startswith(b"\x89PNG")
    said = capsys.readouterr().out
    assert "samples of 32, carried memory" in said
    assert "tokens in documents over 32 80.5%" in " ".join(said.split())


def test_without_options_only_a_table_is_printed(corpus: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = sorted(corpus.iterdir())
    assert run(corpus) == 0
    assert "samples" not in capsys.readouterr().out
    assert sorted(corpus.iterdir()) == before


def test_only_the_indexes_are_read(corpus: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for path in corpus.glob("*.tar"):
        path.unlink()
    assert run(corpus) == 0
    assert f"{sum(LENGTHS)}" in capsys.readouterr().out


def test_quantiles_are_those_of_the_sorted_lengths() -> None:
    generator = np.random.default_rng(0)
    lengths, parts = statistics.Lengths(), [generator.integers(2, 50, size) for size in (1, 30, 400)]
    for part in parts:
        lengths.add(part)
    ordered = np.sort(np.concatenate(parts))
    assert lengths.documents == len(ordered)
    assert lengths.tokens == ordered.sum()
    for percent in (1, 5, 25, 50, 75, 95, 99, 100):
        assert lengths.quantile(percent) == np.quantile(ordered, percent / 100, method="inverted_cdf")


def test_it_says_so_where_not_all_documents_are_packed(
    corpus: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(statistics, "MOST_PACKED", 5)
    assert run(corpus, "--sequence-length", "32", "--block-length", "8") == 0
    said = capsys.readouterr().out
    assert "train: packed were the first 5 of 8 documents" in said
    index = pack(np.array(LENGTHS[:5]), np.arange(5), 32, 8)
    assert f"samples of 32, new memory  {index.num_samples:>8}".split() == [
        word for line in said.splitlines() if "new memory" in line for word in line.split()
    ]


@pytest.mark.parametrize(("shortest", "longest"), [(2, 2), (3, 100), (2, 1 << 27)])
def test_every_length_lies_in_one_bin(shortest: int, longest: int) -> None:
    edges = length_picture.edges(shortest, longest)
    assert edges[0] < shortest <= longest < edges[-1]
    assert (np.diff(edges) >= 1).all()
    assert set(edges % 1) == {0.5}


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        (["--block-length", "8"], "give their --sequence-length too"),
        (["--sequence-length", "30", "--block-length", "8"], "not a multiple of block_length"),
        (["--sequence-length", "0"], "give at least 1"),
    ],
)
def test_refusals(options: list[str], reason: str, corpus: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(corpus, *options) == 2
    assert reason in capsys.readouterr().err


def test_a_missing_or_altered_index_is_named(corpus: Path, capsys: pytest.CaptureFixture[str]) -> None:
    shutil.copyfile(corpus / "train-000001.idx", corpus / "train-000002.idx")
    assert run(corpus) == 2
    assert "train-000002" in capsys.readouterr().err
    (corpus / "train-000000.idx").unlink()
    assert run(corpus) == 2
    error = capsys.readouterr().err
    assert "train-000000.idx" in error
    assert len(error.splitlines()) == 1
