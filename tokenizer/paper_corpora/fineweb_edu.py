"""FineWeb-Edu: web pages that a classifier found educational, in parquet files; documents of at least 32,768 tokens.

The hub holds data/CC-MAIN-YEAR-WEEK/*.parquet and random samples of them, sample/10BT/000_00000.parquet to 013,
sample/100BT and sample/350BT. Columns are text, id, dump, url, date, file_path, language, language_score, token_count
(tokens of GPT-2's tokenizer), score and int_score. There are no official splits: everything is training data.
"""

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

from tokenizer.paper_corpora import hub
from tokenizer.paper_corpora.recipe import TRAIN, Recipe, Row, Selection, SourceFile
from tokenizer.readers.entry import Columns
from tokenizer.readers.parquet import read_lengths, read_parquet

REPOSITORY = "HuggingFaceFW/fineweb-edu"
TEXT, LENGTH = "text", "token_count"
MIN_TOKENS = 32_768
SUBSET = "sample/10BT"


def split_of(name: str) -> str:
    return TRAIN


def list_remote(base_url: str, subset: str) -> list[SourceFile]:
    """The parquet files of a folder on the hub. Raises DataError where they cannot be listed."""
    files = hub.list_files(base_url, REPOSITORY, subset)
    return [replace(file, split=TRAIN) for file in files if file.name.endswith(".parquet")]


def read(path: Path, selection: Selection) -> Iterator[Row]:
    """All documents; those that are too short come without their text, and row groups of only such ones are not read."""
    lengths = read_lengths(path, TEXT, LENGTH)
    long_enough = read_parquet(path, Columns(TEXT), wanted=lengths >= selection.min_tokens)
    for number, tokens in enumerate(lengths.tolist()):
        text = next(long_enough).text if tokens >= selection.min_tokens else None
        yield Row(number, text, tokens)


RECIPE = Recipe(
    key="fineweb_edu",
    title="FineWeb-Edu",
    homepage=f"https://huggingface.co/datasets/{REPOSITORY}",
    base_url=hub.BASE_URL,
    licence="Open Data Commons Attribution License 1.0 (ODC-By); Common Crawl's terms of use apply to the pages",
    citation="Penedo, Kydlíček, Ben Allal, Lozhkov, Mitchell, Raffel, von Werra, Wolf: The FineWeb Datasets: Decanting "
    "the Web for the Finest Text Data at Scale, arXiv 2406.17557, 2024",
    size="1.3 trillion tokens of GPT-2 in all; the sample 10BT is 14 files of 2.15 GB, of which documents of 32,768 "
    "tokens or more are a small part",
    suffixes=(".parquet",),
    list_remote=list_remote,
    split_of=split_of,
    read=read,
    text_column=TEXT,
    length_column=LENGTH,
    min_tokens=MIN_TOKENS,
    subset=SUBSET,
)
