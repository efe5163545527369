"""Proof-Pile: papers, formal proofs, textbooks and answers of mathematics, in compressed jsonl files with official splits.

The hub holds train/proofpile_train_0.jsonl.gz to 20, dev/proofpile_dev.jsonl.gz and test/proofpile_test.jsonl.gz. A
line has `text` and `meta`; there is no length column. Copies as plain .jsonl and .jsonl.zst are read as well.
"""

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

from tokenizer.paper_corpora import hub
from tokenizer.paper_corpora.recipe import TEST, TRAIN, VALIDATION, Recipe, Row, Selection, SourceFile, first_folder
from tokenizer.readers.entry import Columns
from tokenizer.readers.files import JSONL_SUFFIXES
from tokenizer.readers.jsonl import read_jsonl

REPOSITORY = "hoskinson-center/proof-pile"
TEXT = "text"
SPLITS = {TRAIN: TRAIN, "dev": VALIDATION, VALIDATION: VALIDATION, TEST: TEST}


def split_of(name: str) -> str:
    return first_folder(name, SPLITS)


def list_remote(base_url: str, subset: str) -> list[SourceFile]:
    """The data files on the hub. Raises DataError where they cannot be listed."""
    files = hub.list_files(base_url, REPOSITORY)
    return [replace(file, split=split_of(file.name)) for file in files if file.name.endswith(JSONL_SUFFIXES)]


def read(path: Path, selection: Selection) -> Iterator[Row]:
    return (Row(entry.position.row + 1, entry.text) for entry in read_jsonl(path, Columns(TEXT)))


RECIPE = Recipe(
    key="proof_pile",
    title="Proof-Pile",
    homepage=f"https://huggingface.co/datasets/{REPOSITORY}",
    base_url=hub.BASE_URL,
    licence="Apache License 2.0 for the collection, by its card; the parts keep their own licences, among them those "
    "of arXiv and Creative Commons BY-SA for answers and wikis",
    citation="Azerbayev, Ayers, Piotrowski: Proof-Pile, Hoskinson Center for Formal Mathematics, 2022",
    size="8.3 billion tokens of GPT-NeoX's tokenizer; about 13 GB of compressed files",
    suffixes=JSONL_SUFFIXES,
    list_remote=list_remote,
    split_of=split_of,
    read=read,
    text_column=TEXT,
)
