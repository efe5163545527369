"""Runs on several corpora: what is logged, what may change on the way, and data workers, through the trainer."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from em_megatron.data.manifest import DataError
from em_megatron.parallel.process_groups import shutdown
from em_megatron.training.corpus import corpus_names
from em_megatron.training.loop import train
from em_megatron.training.report import describe_run
from em_megatron.training.setup import set_up
from tests.data.servers import FolderServer, Trouble
from tests.training.corpora import run_config, tokenizer

STEPS = ("training.train_steps=6", "logging.interval=1", "checkpoint.save_interval=3", "validation.interval=6")


@pytest.fixture
def blend(chain_corpus: Path, key_corpus: Path) -> str:
    return f"3 {chain_corpus} 1 {key_corpus}"


def rows(runs: Path, kind: str = "train") -> list[dict]:
    lines = (runs / "test" / "metrics.jsonl").read_text().splitlines()
    return [row for row in map(json.loads, lines) if row["kind"] == kind]


def run(path: str, runs: Path, *overrides: str) -> list[float]:
    """The losses of a run, or of its goings-on."""
    try:
        train(set_up(run_config(path, runs, *STEPS, *overrides), world_size=1))
    finally:
        shutdown()
    return [row["loss"] for row in rows(runs)]


def test_a_blend_is_reported_and_counted(blend: str, chain_corpus: Path, tmp_path: Path) -> None:
    try:
        held = set_up(run_config(blend, tmp_path, *STEPS), world_size=1)
        text = describe_run(held)
        names = [member.name for member in held.corpus.members]
        train(held)
    finally:
        shutdown()
    assert f"data    {chain_corpus}: 75 % of the samples" in text
    assert "% of a sample's tokens are text" in text
    last, validation = rows(tmp_path)[-1], rows(tmp_path, "validation")[-1]
    stream, consumed = held.stream, last["consumed_samples"]
    for name, member, share in zip(names, stream.streams, (0.75, 0.25), strict=True):
        assert last[f"epochs/{name}"] == member.epochs(round(share * consumed))
    assert 0.5 < last["packing_efficiency"] <= 1
    parts = [validation[f"loss/{name}"] for name in names]
    assert min(parts) < validation["loss"] < max(parts)
    assert all(validation[f"bits_per_byte/{name}"] > 0 for name in names)


def test_a_blend_changes_only_explicitly_and_from_now_on(blend: str, tmp_path: Path) -> None:
    batch = 4
    change = f"data.blend_changes=['{4 * batch} 1 1']"
    changed = run(blend, tmp_path / "whole", change)
    first = run(blend, tmp_path / "parts", "training.stop_after_steps=3")
    assert len(first) == 3
    assert first == changed[:3]
    other = blend.replace("3 ", "2 ", 1)
    for path, overrides in ((other, ()), (blend, (f"data.blend_changes=['{2 * batch} 1 1']",)), (blend.split()[1], ())):
        with pytest.raises(DataError, match=r"not the one this checkpoint was trained on .*from sample 12 or later"):
            run(path, tmp_path / "parts", *overrides)
    assert run(blend, tmp_path / "parts", change) == changed
    assert changed != run(blend, tmp_path / "plain")


def test_a_corpus_joins_on_the_way(blend: str, chain_corpus: Path, tmp_path: Path) -> None:
    alone = run(str(chain_corpus), tmp_path, "training.stop_after_steps=3")
    other = blend.split()[3]
    joined = run(f"1 {chain_corpus} 0 {other}", tmp_path, "data.blend_changes=['12 1 1']")
    assert joined[:3] == alone
    assert rows(tmp_path)[-1][f"epochs/{Path(other).parent.name}"] > 0


def test_data_workers_change_nothing(blend: str, tmp_path: Path) -> None:
    """Order, and random state too: dropout would show it."""
    dropout = "model.hidden_dropout=0.1"
    assert run(blend, tmp_path / "workers", dropout, "data.workers=2") == run(
        blend, tmp_path / "none", dropout, "data.prefetch=0"
    )


def test_memory_is_carried_in_slots_of_their_own_corpus(blend: str, tmp_path: Path) -> None:
    assert len(run(blend, tmp_path, "memory.carry_memory=true")) == 6
    with pytest.raises(DataError, match="each corpus needs whole slots of the 4 samples"):
        run(blend.replace("3 ", "2 ", 1), tmp_path / "other", "memory.carry_memory=true")


def test_corpora_of_other_tokenizers_are_not_blended(chain_corpus: Path, tmp_path: Path) -> None:
    from tests.tokenizer.small_corpus import train_model, write_texts
    from tests.training.corpora import chain_document, write_ids

    model = train_model(write_texts(tmp_path / "texts", files=20, words=400, seed=9), tmp_path / "other.model")
    assert model.read_bytes() != tokenizer(tmp_path / "usual").read_bytes()
    other = write_ids(tmp_path / "other", model, {"train": [chain_document(1, 300)], "validation": []})
    with pytest.raises(
        DataError, match=r"encoded with another tokenizer than .*encode the corpora of a blend with one"
    ):
        run(f"1 {chain_corpus} 1 {other}", tmp_path)


def test_a_run_reads_from_an_address_as_from_the_folder(chain_corpus: Path, tmp_path: Path) -> None:
    server = FolderServer(chain_corpus, troubles=[Trouble(), Trouble(status=503), Trouble(cut=100)])
    try:
        fetched = run(server.url, tmp_path / "fetched", f"data.cache_path={tmp_path}/cache", "data.workers=1")
    finally:
        server.close()
    assert fetched == run(str(chain_corpus), tmp_path / "folder")
    assert any((tmp_path / "cache").rglob("*.tar"))


def test_a_cache_too_small_for_what_is_read_at_a_time_is_refused(chain_corpus: Path, tmp_path: Path) -> None:
    server = FolderServer(chain_corpus)
    try:
        with pytest.raises(
            DataError, match=r"cache_gigabytes 1e-06 is less than .* give more, or a smaller data\.shuffle"
        ):
            run(server.url, tmp_path, f"data.cache_path={tmp_path}/cache", "data.cache_gigabytes=1e-6")
    finally:
        server.close()


def test_names_of_corpora() -> None:
    locations = ["x/a-2", "y/a", "z/a", "s3://bucket/books/shards", "pipe:cat x/{}", "pipe:cat y/{}", "http://host/"]
    assert corpus_names(locations) == ["a-2", "a", "a-3", "books", "pipe", "pipe-2", "host"]
