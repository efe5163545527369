"""Training: exact round trips, reproducible bytes, reserved ids, held-out documents, refusals."""

import os
import random
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from em_megatron.data.vocabulary import Vocabulary
from tests.tokenizer.small_corpus import ODD_STRINGS, train_model, write_texts
from tokenizer import train
from tokenizer.corpus import find_files, hold_out, summarize, training_texts


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


def test_held_out_documents_are_not_trained_on(texts: Path) -> None:
    files = find_files([texts])
    held = hold_out((summarize(file, None) for file in files), 0.2)
    used = list(training_texts(files, None, held))
    assert 0 < len(held) < len(files)
    assert len(used) == len(files) - len(held)
    assert not set(used) & {(texts / name).read_text(encoding="utf-8") for name in held}


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        (["--vocab-size", "300"], "leaves no room"),
        (["--vocab-size", "100000"], "sentencepiece cannot make 100000 pieces"),
        (["--threads", "0"], "give a --seed"),
        (["--input", "/nonexistent"], "does not exist"),
        (["--validation-fraction", "1.5"], "is not in [0, 1)"),
        (["--document-separator", ""], "is empty"),
    ],
)
def test_refusals(
    texts: Path, tmp_path: Path, options: list[str], reason: str, capsys: pytest.CaptureFixture[str]
) -> None:
    output = tmp_path / "out.model"
    assert train.main(["--input", str(texts), "--output", str(output), *options]) == 2
    assert reason in capsys.readouterr().err
    assert not output.exists()


def test_one_document_cannot_be_split(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    texts = write_texts(tmp_path / "one", files=1, words=6000)
    assert train.main(["--input", str(texts), "--output", str(tmp_path / "m"), "--vocab-size", "640"]) == 2
    assert "--validation-fraction 0" in capsys.readouterr().err
    train_model(texts, tmp_path / "m", "--validation-fraction", "0")
