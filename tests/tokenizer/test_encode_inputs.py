"""Documents of jsonl, gzip, zstandard and parquet files: places, ids, what is left out, damage."""

import gzip
import json
import os
import re
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
import zstandard

from em_megatron.data.index import document_key
from em_megatron.data.manifest import DataError
from em_megatron.data.shards import ShardReader
from em_megatron.data.vocabulary import Vocabulary
from tests.tokenizer.small_corpus import ODD_STRINGS, files_of, run_encode, train_model
from tests.tokenizer.test_encode import names_of
from tokenizer import corpus
from tokenizer.readers import streams
from tokenizer.readers.files import Layout, read_documents

TEXTS = [f"{number} {text} {'word ' * (number % 7)}" for number, text in enumerate(ODD_STRINGS * 3)]
SMALL = ["--shard-bytes", "300", "--validation-fraction", "0.2"]


def rows(texts: list[str], prefix: str = "d") -> list[dict[str, str]]:
    return [{"id": f"{prefix}{number}", "text": text, "url": "x"} for number, text in enumerate(texts)]


def jsonl(entries: list[dict[str, str]]) -> bytes:
    return b"".join(json.dumps(entry).encode() + b"\n" for entry in entries)


def two_parts(pack: Callable[[bytes], bytes]) -> Callable[[Path, list[dict[str, str]]], None]:
    def write(path: Path, entries: list[dict[str, str]]) -> None:
        middle = len(entries) // 2
        path.write_bytes(pack(jsonl(entries[:middle]) + b" \n\n") + pack(jsonl(entries[middle:])))

    return write


def write_parquet(path: Path, entries: list[dict[str, str]]) -> None:
    pyarrow.parquet.write_table(
        pyarrow.Table.from_pylist(entries), path, row_group_size=5, use_dictionary=False, write_page_checksum=True
    )


FORMATS: dict[str, Callable[[Path, list[dict[str, str]]], None]] = {
    "jsonl": two_parts(bytes),
    "jsonl.gz": two_parts(lambda content: gzip.compress(content, mtime=0)),
    "jsonl.zst": two_parts(zstandard.compress),
    "parquet": write_parquet,
}


@pytest.mark.parametrize("kind", FORMATS)
def test_documents_of_every_format_come_back(
    kind: str, model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(streams, "CHUNK", 97)
    inputs = tmp_path / "in"
    inputs.mkdir()
    for name, texts in (("a", TEXTS), ("b", TEXTS[::-1])):
        FORMATS[kind](inputs / f"{name}.{kind}", rows(texts, name))
    assert run_encode(model, inputs, tmp_path / "out", *SMALL) == 0
    vocabulary = Vocabulary(model)
    expected = {f"a{n}": text for n, text in enumerate(TEXTS)} | {f"b{n}": t for n, t in enumerate(TEXTS[::-1])}
    found = {}
    for split in ("train", "validation"):
        reader = ShardReader(tmp_path / "out", split)
        assert len(reader.shards) > 2
        for document, name in enumerate(reader.names):
            found[name] = vocabulary.decode(reader.tokens(document)[1:-1])
        keys = np.concatenate(
            [np.fromfile(p, "<i8").reshape(-1, 4)[:, 3] for p in sorted((tmp_path / "out").glob(f"{split}*.idx"))]
        )
        assert keys.tolist() == [document_key(name) for name in reader.names]
    assert found == expected


def test_formats_give_the_same_shards(model: Path, tmp_path: Path) -> None:
    found = []
    for kind, write in FORMATS.items():
        (tmp_path / kind).mkdir()
        write(tmp_path / kind / f"x.{kind}", rows(TEXTS))
        assert run_encode(model, tmp_path / kind, tmp_path / f"{kind}.out", *SMALL) == 0
        found.append({n: c for n, c in files_of(tmp_path / f"{kind}.out").items() if n.endswith((".tar", ".idx"))})
    assert found[0]
    assert all(one == found[0] for one in found[1:])


@pytest.mark.parametrize("separator", ["|", "<->", "aab"])
@pytest.mark.parametrize("chunk", [1, 2, 5, 1000])
def test_separators_across_chunks(separator: str, chunk: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(streams, "CHUNK", chunk)
    text = separator.join(["one", "", "aaaé-", "a<<->>", "|||", "aaaab", "end"])
    (tmp_path / "a.txt").write_text(text)
    entries = list(read_documents(tmp_path / "a.txt", Layout(separator)))
    assert [entry.text for entry in entries] == text.split(separator)
    for number, entry in enumerate(entries):  # and from each place on
        rest = list(read_documents(tmp_path / "a.txt", Layout(separator), entry.position))
        assert rest == entries[number:]


def test_ids_columns_and_inputs_of_several_kinds(model: Path, tmp_path: Path) -> None:
    (tmp_path / "in" / "deep").mkdir(parents=True)
    (tmp_path / "in" / "plain.txt").write_text("a plain text")
    entries = [{"body": "first", "key": 7}, {"body": "second", "key": ""}, {"body": "third", "key": None}]
    (tmp_path / "in" / "deep" / "a.jsonl").write_bytes(jsonl([*entries, {"body": "fourth"}]))  # type: ignore[list-item]
    write_parquet(tmp_path / "in" / "b.parquet", [{"body": "fifth"}])
    columns = ["--text-column", "body", "--id-column", "key", "--validation-fraction", "0"]
    assert run_encode(model, tmp_path / "in", tmp_path / "out", *columns) == 0
    rest = ["deep/a.jsonl#000001", "deep/a.jsonl#000002", "deep/a.jsonl#000003", "plain.txt"]
    assert names_of(tmp_path / "out", "train") == ["b.parquet#000000", "7", *rest]


def test_what_is_left_out_is_counted(model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    texts = ["one text", "two texts", "one text", "x", "long " * 50, "", "\ud800 half", "one text", "last text"]
    ids = ["a", "b", "a", "c", "d", "e", "f", "g", "h"]
    entries = [{"id": i, "text": text} for i, text in zip(ids, texts, strict=True)]
    (tmp_path / "x.jsonl").write_bytes(jsonl(entries))
    options = ["--validation-fraction", "0", "--min-bytes", "4", "--max-bytes", "100"]
    kept = {"off": ["a", "b", "a", "g", "h"], "id": ["a", "b", "g", "h"], "text": ["a", "b", "h"]}
    for how, names in kept.items():
        assert run_encode(model, tmp_path / "x.jsonl", tmp_path / how, *options, "--deduplicate", how) == 0
        assert names_of(tmp_path / how, "train") == names
    said = capsys.readouterr().err
    for line in (
        "1 empty documents",
        "1 documents with half of a surrogate pair",
        "1 documents of fewer than --min-bytes",
        "1 documents of more than --max-bytes",
        "1 documents with the id of an earlier one",
        "1 documents with the text of an earlier one",
    ):
        assert line in said
    left_out = json.loads((tmp_path / "text" / "inputs.json").read_bytes())["left_out"]
    assert left_out == {
        "train": 3, "validation": 0, "empty": 1, "not_unicode": 1, "too_short": 1, "too_long": 1, "id_seen": 1, "text_seen": 1,
    }  # fmt: skip


def test_held_out_files_lose_what_the_training_files_have(model: Path, tmp_path: Path) -> None:
    (tmp_path / "train.jsonl").write_bytes(jsonl(rows(TEXTS[:6])))
    (tmp_path / "held.jsonl").write_bytes(jsonl(rows(TEXTS[:8])))
    held = ["--validation-input", str(tmp_path / "held.jsonl")]
    assert run_encode(model, tmp_path / "train.jsonl", tmp_path / "out", *held) == 0
    assert names_of(tmp_path / "out", "validation") == ["d6", "d7"]


GOOD = jsonl(rows(["one", "two", "three" * 9000]))
ALL = ["--validation-fraction", "0"]


def test_json_of_other_endings_links_and_what_is_passed_over(
    model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    inputs, other = tmp_path / "in", tmp_path / "other"
    for folder in (inputs / "deep", other):
        folder.mkdir(parents=True)
    (inputs / "a.json.gz").write_bytes(gzip.compress(jsonl([{"text": "one"}, {"text": "two\n\nthree"}])))
    (inputs / "b.json.zst").write_bytes(zstandard.compress(jsonl([{"text": "four"}])))
    (other / "c.txt").write_text("five\n\nsix")
    (inputs / "linked").symlink_to(other)
    (inputs / "deep" / "loop").symlink_to(inputs)
    (other / "back").symlink_to(inputs)
    for name in ("x.md", "y.md", "x.csv", "LICENSE", "deep/contents.json", "deep/x.tsv.gz"):
        (inputs / name).write_text("passed over")
    assert run_encode(model, inputs, tmp_path / "out", *ALL, "--document-separator", "\\n\\n") == 0
    said = capsys.readouterr()
    assert said.err == "passed over: 2 .md, 1 .csv, 1 .json, 1 .tsv.gz, 1 without an ending\n"
    assert "passed over" not in said.out
    names = ["a.json.gz#000000", "a.json.gz#000001", "b.json.zst#000000", "linked/c.txt#000000", "linked/c.txt#000001"]
    assert names_of(tmp_path / "out", "train") == names


def test_many_endings_are_summed_up() -> None:
    assert corpus.passed_over_words(Counter({f".{n}": n for n in range(1, 10)})).endswith("4 .4, 6 of other endings")


def test_inputs_that_are_refused(model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    inputs = tmp_path / "in"
    (inputs / "sub").mkdir(parents=True)
    (inputs / "sub" / "a.txt").write_text("a text")

    def refused(*options: str) -> str:
        assert run_encode(model, inputs, tmp_path / "out", *ALL, *options) == 2
        return capsys.readouterr().err

    assert "sub/a.txt (as a.txt) are one file; give inputs that do not hold" in refused(
        "--input", str(inputs), str(inputs / "sub")
    )
    (inputs / "twice").symlink_to("sub")
    assert "sub/a.txt (as sub/a.txt) and" in refused()
    (inputs / "twice").unlink()
    for name, target in (("gone.txt", "nowhere"), ("gone", "nowhere"), ("self.txt", "self.txt")):
        (inputs / name).symlink_to(target)
        assert f"{inputs / name} is a link to {target}, which is not there" in refused()
        (inputs / name).unlink()
    odd = Path(os.fsdecode(os.fsencode(inputs) + b"/caf\xe9.txt"))
    odd.write_text("a text")
    assert f"the name of the file {inputs}/caf\\xe9.txt is not UTF-8; rename it" in refused()
    odd.unlink()
    os.mkfifo(tmp_path / "pipe")
    assert "is neither a file nor a folder" in refused("--input", str(tmp_path / "pipe"))
    (inputs / "sub" / "a.txt").rename(inputs / "a.json")
    assert f"no file of documents in {inputs} (passed over: 1 .json); give files" in refused()
    assert not (tmp_path / "out").exists()


def test_null_is_empty_in_both_formats(model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    entries: list[Any] = [{"id": 1.0, "text": "one"}, {"id": 2.0, "text": None}, {"id": None, "text": "three"}]
    (tmp_path / "a.jsonl").write_bytes(jsonl(entries))
    write_parquet(tmp_path / "a.parquet", entries)
    for name in ("a.jsonl", "a.parquet"):
        assert run_encode(model, tmp_path / name, tmp_path / f"{name}.out", *ALL) == 0
        assert "1 empty documents are left out" in capsys.readouterr().err
        assert names_of(tmp_path / f"{name}.out", "train") == ["1", f"{name}#000002"]


@pytest.mark.parametrize("chunk", [1, 4, 1000])
def test_byte_order_marks(chunk: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(streams, "CHUNK", chunk)
    (tmp_path / "a.txt").write_text("\ufeffone|\ufefftwo|three")
    (tmp_path / "a.jsonl").write_text('\ufeff\n{"text": "one"}\n{"text": "\ufefftwo"}\n')
    (tmp_path / "b.jsonl").write_text('\ufeff{"text": "one"}\n{"text": "two"}\n')
    found = {"a.txt": ["one", "\ufefftwo", "three"], "a.jsonl": ["one", "\ufefftwo"], "b.jsonl": ["one", "two"]}
    for name, expected in found.items():
        entries = list(read_documents(tmp_path / name, Layout("|")))
        assert [entry.text for entry in entries] == expected
        for number, entry in enumerate(entries):  # and from each place on
            assert list(read_documents(tmp_path / name, Layout("|"), entry.position)) == entries[number:]
    assert [entry.text for entry in read_documents(tmp_path / "a.txt", Layout())] == ["one|\ufefftwo|three"]
    (tmp_path / "a.txt").write_bytes("\ufeffcaf".encode() + b"\xe9")
    with pytest.raises(DataError, match=r"offset 6 \(byte 0xe9\)"):
        list(read_documents(tmp_path / "a.txt", Layout()))


@pytest.mark.parametrize(
    ("values", "reason"),
    [
        ({"text": b"x"}, "column text is of type binary; name a column of strings with --text-column"),
        ({"text": 1}, "column text is of type int64"),
        ({"text": ["x"]}, "column text is of type list<"),
        ({"id": b"x"}, "column id is of type binary; name a column of strings or integers with --id-column"),
        ({"id": True}, "column id is of type bool"),
        ({"id": 1.5}, "row 1: column id holds 1.5; name a column"),
    ],
)
def test_columns_of_other_types(values: dict[str, Any], reason: str, tmp_path: Path) -> None:
    texts = pyarrow.array(["one", "two"]).dictionary_encode()
    good = {"text": texts, "id": pyarrow.array([1.0, None]) if "id" not in values else None}
    columns = {name: good[name] if name not in values else [None, values[name]] for name in good}
    pyarrow.parquet.write_table(pyarrow.table(columns), tmp_path / "a.parquet")
    with pytest.raises(DataError, match=re.escape(f"a.parquet: {reason}")):
        list(read_documents(tmp_path / "a.parquet", Layout()))


@pytest.mark.parametrize(
    ("line", "reason"),
    [
        ('{"text": 1}', "line 2: column text is of type int; name a column of strings with --text-column"),
        ('{"text": ["x"]}', "line 2: column text is of type list"),
        ('{"text": "x", "id": 1.5}', "line 2: column id holds 1.5; name a column of strings or integers"),
        ('{"text": "x", "id": NaN}', "line 2: column id holds nan"),
        ('{"text": "x", "id": {}}', "line 2: column id is of type dict"),
        ('{"text": "x", "id": true}', "line 2: column id is of type bool"),
    ],
)
def test_values_of_other_types(line: str, reason: str, tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text(f'{{"text": "x"}}\n{line}\n')
    with pytest.raises(DataError, match=re.escape(f"a.jsonl: {reason}")):
        list(read_documents(tmp_path / "a.jsonl", Layout()))


@pytest.mark.parametrize("name", ["text", "id"])
def test_a_column_that_is_there_twice(name: str, tmp_path: Path) -> None:
    texts = pyarrow.array(["one", "two"])
    table = pyarrow.Table.from_arrays([texts, texts, texts], names=["text", "id", name])
    pyarrow.parquet.write_table(table, tmp_path / "a.parquet")
    with pytest.raises(DataError, match=f"has 2 columns of the name {name}; write it with one of them"):
        list(read_documents(tmp_path / "a.parquet", Layout()))


@pytest.mark.parametrize(
    ("name", "content", "reason"),
    [
        ("latin.txt", b"caf\xe9 au lait", r"latin\.txt is not UTF-8 at offset 3 \(byte 0xe9\)"),
        ("a.jsonl", GOOD[:-9], r"a\.jsonl is damaged at line 3 "),
        ("a.jsonl", GOOD + b'{"text": "\xff"}\n', "a.jsonl is damaged at line 4 .*utf-8"),
        ("a.jsonl", GOOD + b'{"id": 1}\n', r"damaged at line 4 \(no text under 'text'\)"),
        ("a.jsonl.gz", gzip.compress(GOOD)[:-40], r"a\.jsonl\.gz is cut after line "),
        ("a.jsonl.gz", gzip.compress(GOOD)[:-8] + b"\0" * 8, "damaged after line 3 .*CRC"),
        ("a.jsonl.zst", zstandard.compress(GOOD)[:-3], r"a\.jsonl\.zst is cut after line "),
        ("a.jsonl.zst", GOOD, "damaged after line 0 "),
        ("a.parquet", b"PAR1 and no more", "a.parquet is cut or damaged in its footer"),
    ],
)
def test_damage_is_named_and_a_whole_copy_mends_it(
    name: str, content: bytes, reason: str, model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    inputs, out = tmp_path / "in", tmp_path / "out"
    inputs.mkdir()
    (inputs / "good.jsonl").write_bytes(GOOD)
    (inputs / name).write_bytes(content)
    assert run_encode(model, inputs, out) == 2
    said = capsys.readouterr().err
    assert re.search(reason, said)
    assert len(said.splitlines()) == 1
    assert not list(out.glob("*.json"))
    (inputs / name).unlink()
    assert run_encode(model, inputs, out) == 0


def test_a_damaged_row_group_is_named(model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "a.parquet"
    write_parquet(path, rows([text * 40 for text in TEXTS]))
    content = bytearray(path.read_bytes())
    column = pyarrow.parquet.ParquetFile(path).metadata.row_group(2).column(1)
    end = column.data_page_offset + column.total_compressed_size
    content[end - 30 : end - 10] = bytes(20)
    path.write_bytes(content)
    assert run_encode(model, path, tmp_path / "out") == 2
    assert "a.parquet is cut or damaged in row group 2" in capsys.readouterr().err


def test_damage_between_reading_and_encoding(
    model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    from tokenizer.encoding import phases

    path = tmp_path / "a.jsonl"
    path.write_bytes(GOOD)

    def plan_and_change(*arguments: object) -> object:
        made = real(*arguments)
        path.write_bytes(GOOD + GOOD)
        return made

    real = phases.make_plan
    monkeypatch.setattr(phases, "make_plan", plan_and_change)
    assert run_encode(model, path, tmp_path / "out") == 2
    assert "a.jsonl was changed while it was being encoded; run again with --overwrite" in capsys.readouterr().err
    monkeypatch.undo()
    assert run_encode(model, path, tmp_path / "out") == 0


def test_large_vocabularies_are_stored_in_four_bytes(tmp_path: Path) -> None:
    texts = tmp_path / "in"
    texts.mkdir()
    (texts / "a.txt").write_text("".join(chr(0x4E00 + n) + " " for n in range(20_000)))
    (texts / "b.txt").write_text("".join(chr(0xAC00 + n) + " " for n in range(11_000)))
    letters = "".join(chr(0x20000 + n) for n in range(38_000))
    (texts / "c.txt").write_text(letters)
    model = train_model(
        texts, tmp_path / "m.model", "--vocab-size", "70000", "--model-type", "bpe", "--validation-fraction", "0"
    )
    assert run_encode(model, texts, tmp_path / "out", "--validation-fraction", "0") == 0
    reader = ShardReader(tmp_path / "out")
    assert reader.manifest.dtype == "<u4"
    assert max(int(reader.tokens(document).max()) for document in range(3)) > 1 << 16
    assert Vocabulary(model).decode(reader.tokens(2)[1:-1]) == letters
