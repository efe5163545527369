"""Training: exact round trips, reproducible bytes, reserved ids, held-out documents, refusals."""

import json
import os
import random
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from em_megatron.data.shards import ShardReader
from em_megatron.data.vocabulary import Vocabulary
from tests.tokenizer.small_corpus import ODD_STRINGS, run_encode, train_model, write_texts
from tokenizer import train
from tokenizer.corpus import Selection, find_files
from tokenizer.encoding import training_texts
from tokenizer.encoding.training_texts import all_texts, even_share, sampled_texts
from tokenizer.readers.files import Layout


@pytest.fixture(scope="module", params=["unigram", "bpe"])
def vocabulary(request: pytest.FixtureRequest, texts: Path, tmp_path_factory: pytest.TempPathFactory) -> Vocabulary:
    output = tmp_path_factory.mktemp(request.param) / "out" / "tokenizer.model"
    return Vocabulary(train_model(texts, output, "--model-type", request.param, "--reserved", "2"))


@pytest.mark.parametrize("text", ODD_STRINGS)
def test_round_trip_of_odd_strings(vocabulary: Vocabulary, text: str) -> None:
    ids = vocabulary.encode(text)
    assert vocabulary.decode(ids) == text
    assert int(vocabulary.token_bytes[ids].sum()) == len(text.encode())


def test_round_trip_of_random_strings(vocabulary: Vocabulary) -> None:
    generator = random.Random(1)
    alphabet = "ab \n\t\r\u2581\u00e9\u4e2d\U0001f642<>|0x_\x00 s"
    for _ in range(300):
        text = "".join(generator.choices(alphabet, k=generator.randint(0, 40)))
        ids = vocabulary.encode(text)
        assert vocabulary.decode(ids) == text
        assert int(vocabulary.token_bytes[ids].sum()) == len(text.encode())


def test_special_ids(vocabulary: Vocabulary) -> None:
    assert (vocabulary.pad_id, vocabulary.unk_id, vocabulary.bos_id, vocabulary.eos_id) == (0, 1, 2, 3)
    assert vocabulary.size == len(vocabulary) == 640
    reserved = [4, 5]
    assert np.all(vocabulary.token_bytes[[0, 1, 2, 3, *reserved]] == 0)
    assert vocabulary.decode([2, *vocabulary.encode("a b"), 4, 3, 0]) == "a b"
    assert not set(vocabulary.encode("".join(ODD_STRINGS))) & {0, 1, 2, 3, *reserved}


def test_bytes_of_a_cut_character_join(vocabulary: Vocabulary) -> None:
    text = "a \U0001f642 b"
    ids = vocabulary.encode(text)
    for cut in range(len(ids) + 1):
        assert vocabulary.decode_bytes(ids[:cut]) + vocabulary.decode_bytes(ids[cut:]) == text.encode()
    assert "\ufffd" in vocabulary.decode(ids[: len(ids) // 2])


def test_digits_stand_alone(vocabulary: Vocabulary) -> None:
    assert int(vocabulary.token_bytes[vocabulary.encode("123456")].max()) == 1


def test_training_is_reproducible_in_another_process(texts: Path, model: Path, tmp_path: Path) -> None:
    output = tmp_path / "again.model"
    command = [sys.executable, "-m", "tokenizer.train", "--input", str(texts), "--output", str(output)]
    command += ["--vocab-size", "640", "--reserved", "2"]
    result = subprocess.run(
        command, capture_output=True, text=True, check=True, env=os.environ | {"PYTHONHASHSEED": "7"}
    )
    assert output.read_bytes() == model.read_bytes()
    assert "bytes per token" in result.stdout
    assert list(tmp_path.iterdir()) == [output]


def test_the_sample_of_lines_is_seeded_and_uniform() -> None:
    lines = [str(number) for number in range(1000)]
    assert train.sample(lines, 100, seed=1) == train.sample(iter(lines), 100, seed=1)
    assert train.sample(lines, 100, seed=1) != train.sample(lines, 100, seed=2)
    assert train.sample(lines, 0, seed=1) == lines
    kept = [int(line) for seed in range(50) for line in train.sample(lines, 100, seed)]
    # 5000 uniform draws of 0..999 have a mean of 499.5 with a standard error of 4.1: five of those is 20.
    assert abs(float(np.mean(kept)) - 499.5) < 20


def test_long_lines_tabs_and_nuls_are_trained_on() -> None:
    parts = list(train.sentences(["a" * 2500 + "\tb\x00c\n\nd"]))
    assert [len(part) for part in parts] == [1000, 1000, 500, 1, 1, 1]


@pytest.mark.parametrize("how", [["--deduplicate", "id"], ["--deduplicate", "text", "--min-bytes", "60"]])
def test_the_documents_that_encoding_holds_out_are_not_trained_on(how: list[str], model: Path, tmp_path: Path) -> None:
    lines = [f"document {number % 30} " * (1 + number % 9) for number in range(40)]
    entries = "".join(json.dumps({"id": f"d{number}", "text": line}) + "\n" for number, line in enumerate(lines))
    (tmp_path / "a.jsonl").write_text(entries)
    selection = Selection(60 if "text" in how else 0, None, how[1], 0.2)
    texts = all_texts(find_files([tmp_path / "a.jsonl"]), Layout(), selection)
    assert run_encode(model, tmp_path / "a.jsonl", tmp_path / "out", "--validation-fraction", "0.2", *how) == 0
    trained = [lines[int(name[1:])] for name in ShardReader(tmp_path / "out", "train").names]
    assert list(texts.read()) == list(texts.read()) == trained
    assert texts.words == f"{len(ShardReader(tmp_path / 'out', 'validation'))} documents held out"


def test_a_sample_reads_little_and_nothing_that_is_held_out(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for number in range(12):
        rows = [{"id": f"{number}-{row}", "text": f"{number} {row} " * 30} for row in range(300)]
        content = "".join(json.dumps(row) + "\n" for row in rows)
        (tmp_path / f"{number:02d}.jsonl").write_text(content + "damage behind what is read\n")
    files = find_files([tmp_path])
    found = {seed: list(sampled_texts(files, Layout(), Selection(), 60_000, seed).read()) for seed in (1, 2)}
    assert found[1] == list(sampled_texts(files, Layout(), Selection(), 60_000, 1).read())
    assert found[1] != found[2]
    assert 60_000 <= sum(map(len, found[1])) < 70_000
    assert {text.split()[0] for text in found[1]} == {str(number) for number in range(12)}
    monkeypatch.setattr(training_texts, "SAMPLED_FILES", 2)
    some = list(sampled_texts(files, Layout(), Selection(), 30_000, 1).read())
    assert len({text.split()[0] for text in some}) == 2

    for path in tmp_path.iterdir():
        path.write_text(path.read_text().rpartition("damage")[0])
    assert run_encode(model, tmp_path, tmp_path / "out") == 0
    held = {" ".join(name.split("-")) for name in ShardReader(tmp_path / "out", "validation").names}
    assert len(held) > 100
    assert not held & {" ".join(text.split()[:2]) for texts in found.values() for text in texts}


def test_a_sample_of_all_is_all_but_the_lower_half(texts: Path, tmp_path: Path) -> None:
    whole = sampled_texts(find_files([texts]), Layout(), Selection(fraction=None), 1 << 40, 1)
    assert sorted(whole.read()) == sorted(path.read_text(encoding="utf-8") for path in texts.iterdir())
    output = train_model(texts, tmp_path / "m.model", "--sample-bytes", "100000", "--vocab-size", "560")
    assert Vocabulary(output).size == 560


def test_even_shares() -> None:
    assert even_share([10, 10, 10], 15) == 5
    assert even_share([1, 10, 100], 31) == 20
    assert even_share([1, 2], 100) == 2
    assert even_share([], 5) == 0


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        (["--vocab-size", "300"], "leaves no room"),
        (["--vocab-size", "100000"], "sentencepiece cannot make 100000 pieces"),
        (["--threads", "0"], "give a --seed"),
        (["--input", "/nonexistent"], "does not exist"),
        (["--validation-fraction", "1.5"], "is not in [0, 1)"),
        (["--document-separator", ""], "is empty"),
        (["--sample-bytes", "0"], "reads nothing"),
        (["--sample-bytes", "9", "--min-bytes", "1000000"], "finds no training document"),
    ],
)
def test_refusals(
    texts: Path, tmp_path: Path, options: list[str], reason: str, capsys: pytest.CaptureFixture[str]
) -> None:
    output = tmp_path / "out.model"
    assert train.main(["--input", str(texts), "--output", str(output), *options]) == 2
    assert reason in capsys.readouterr().err
    assert not output.exists()


def test_an_output_that_cannot_be_written(texts: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "file").write_text("x")
    output = tmp_path / "file" / "m.model"
    assert train.main(["--input", str(texts), "--output", str(output), "--vocab-size", "560"]) == 2
    said = capsys.readouterr().err
    assert re.fullmatch(r"tokenizer\.train: cannot read or write .*/file.* \(.*\); mend that, and .*\n", said)


@pytest.mark.parametrize("name", ["b.txt", "b.jsonl"])
def test_an_input_that_disappears(
    name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    texts = write_texts(tmp_path / "in", files=3, words=40)
    (texts / name).write_text(json.dumps({"text": "a text"}) + "\n")

    def find_and_delete(*arguments: object) -> object:
        found = real(*arguments)
        (texts / name).unlink()
        return found

    real = train.all_texts
    monkeypatch.setattr(train, "all_texts", find_and_delete)
    options = ["--vocab-size", "560", "--validation-fraction", "0"]
    assert train.main(["--input", str(texts), "--output", str(tmp_path / "m"), *options]) == 2
    said = capsys.readouterr().err
    assert f"tokenizer.train: cannot read or write {texts / name} (No such file or directory)" in said


def test_one_document_cannot_be_split(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    texts = write_texts(tmp_path / "one", files=1, words=6000)
    assert train.main(["--input", str(texts), "--output", str(tmp_path / "m"), "--vocab-size", "640"]) == 2
    assert "--validation-fraction 0" in capsys.readouterr().err
    train_model(texts, tmp_path / "m", "--validation-fraction", "0")
