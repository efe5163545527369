"""Corpora of chosen ids with a real tokenizer beside them, and tiny runs on them."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from em_megatron.config import RunConfig, load_config
from em_megatron.data.manifest import Manifest
from em_megatron.data.vocabulary import Vocabulary
from em_megatron.data.writing import EncodedDocument, write_shard
from tests.tokenizer.small_corpus import train_model, write_texts

BOS, EOS = 2, 3
VOCAB_SIZE = 640

RUN = (
    "model.num_layers=2",
    "model.hidden_size=64",
    "model.num_attention_heads=4",
    "model.num_query_groups=2",
    "model.kv_channels=16",
    "model.ffn_hidden_size=96",
    "memory.block_length=16",
    "memory.order=16",
    "memory.slots=8",
    "memory.bank_cache=null",
    "data.sequence_length=80",
    "training.precision=fp32",
    "training.train_steps=20",
    "training.global_batch_size=4",
    "training.micro_batch_size=2",
    "optimizer.lr=1e-2",
    "optimizer.min_lr=1e-3",
    "optimizer.warmup_steps=2",
    "logging.wandb=disabled",
    "logging.tensorboard=false",
    "logging.progress=false",
)


def run_config(corpus: Path | str, runs: Path, *overrides: str) -> RunConfig:
    """A run of 20 steps of a model of two layers."""
    return load_config(None, [f"data.path={corpus}", f"output_dir={runs}", "name=test", *RUN, *overrides])


def recipe(path: Path, corpus: Path, *overrides: str) -> Path:
    """The same as a recipe file, for the entry point."""
    from em_megatron.config import config_text

    path.write_text(config_text(run_config(corpus, path.parent / "runs", *overrides)))
    return path


def tokenizer(folder: Path) -> Path:
    """A tokenizer of `VOCAB_SIZE` ids."""
    return train_model(write_texts(folder / "texts", files=20, words=400), folder / "tokenizer.model")


def write_ids(folder: Path, model: Path, splits: dict[str, list[list[int]]]) -> Path:
    """A corpus with these documents (bos and eos included), as `tokenizer.encode` writes it."""
    folder.mkdir(parents=True, exist_ok=True)
    shards = {}
    for split, documents in splits.items():
        encoded = (
            EncodedDocument(f"{split}{index}", np.array(ids, "<u2").tobytes(), 2 * (len(ids) - 2))
            for index, ids in enumerate(documents)
        )
        shard = write_shard(folder, f"{split}-000000.tar", encoded, "<u2")
        shards[split] = (shard,) if shard else ()
    (folder / "tokenizer.model").write_bytes(model.read_bytes())
    Manifest(Vocabulary(model).sha256, VOCAB_SIZE, "<u2", "s" * 64, shards).save(folder)
    return folder


def numbers(seed: int, count: int) -> np.ndarray:
    """Raw 64-bit words, which numpy promises to keep over its versions."""
    return np.random.PCG64(np.random.SeedSequence(seed)).random_raw(count)


def chain_document(seed: int, length: int) -> list[int]:
    """A document in which an id follows from the one before it two times out of three."""
    words, ids = numbers(seed, length), [BOS]
    for word in words[: length - 2].tolist():
        ids.append((ids[-1] * 7 + 3) % 320 + 10 if word % 3 else word // 3 % 320 + 10)
    return [*ids, EOS]


def chain_corpus(folder: Path, model: Path) -> Path:
    """Documents from 4 to 300 ids: longer than a sample, longer than a block, and short."""
    lengths = [300, 9, 81, 4, 40, 200, 17, 12, 33, 7] * 4
    documents = [chain_document(seed, length) for seed, length in enumerate(lengths)]
    return write_ids(folder, model, {"train": documents[:-4], "validation": documents[-4:]})


# The key task: a key in the first block decides what follows each marker in later blocks.
KEYS, FILLER, MARKER, ANSWERS = range(10, 18), range(20, 36), 40, range(50, 58)
BLOCK, BLOCKS = 16, 5
FAR, NEAR = (3, 4), (1, 4)  # blocks with a marker: more than two blocks after the key; the first in the block after it


def key_document(seed: int, asked: tuple[int, int] = FAR) -> list[int]:
    """bos, half a block of the key, a cycle of filler; in each block `asked` one marker and the key's answer."""
    words = numbers(seed, 8).tolist()
    key = words[0] % len(KEYS)
    ids = [BOS, *[KEYS[key]] * (BLOCK // 2)]
    ids += [FILLER[at % len(FILLER)] for at in range(len(ids), BLOCK * BLOCKS)]
    for block in asked:
        at = block * BLOCK + 1 + words[block] % (BLOCK - 3)
        ids[at : at + 2] = [MARKER, ANSWERS[key]]
    return [*ids, EOS]


def key_corpus(folder: Path, model: Path, asked: tuple[int, int] = FAR) -> Path:
    """Each document fills a sample of five blocks."""
    documents = [key_document(seed, asked) for seed in range(1200)]
    return write_ids(folder, model, {"train": documents[:-64], "validation": documents[-64:]})


# The copy task: a place of the first block is named in the two blocks after it, and its symbol has to follow.
PLACES, SYMBOLS, FIRST_SYMBOL, FIRST_PLACE = 12, 4, 100, 60


def copy_document(seed: int) -> list[int]:
    """bos, a random symbol for each place, a cycle of filler, then half of the places in each of two blocks, each with its
    symbol: exact recall of what cannot be guessed."""
    words = numbers(seed, 2 * PLACES).tolist()
    symbols = [FIRST_SYMBOL + SYMBOLS * place + words[place] % SYMBOLS for place in range(PLACES)]
    order = sorted(range(PLACES), key=lambda place: words[PLACES + place])
    ids = [BOS, *symbols]
    ids += [FILLER[at % len(FILLER)] for at in range(len(ids), BLOCK * BLOCKS)]
    for block, places in ((1, order[: PLACES // 2]), (2, order[PLACES // 2 :])):
        asked = [token for place in places for token in (FIRST_PLACE + place, symbols[place])]
        ids[block * BLOCK + 2 : block * BLOCK + 2 + len(asked)] = asked
    return [*ids, EOS]


def copy_corpus(folder: Path, model: Path) -> Path:
    """Each document fills a sample of five blocks."""
    documents = [copy_document(seed) for seed in range(6064)]
    return write_ids(folder, model, {"train": documents[:-64], "validation": documents[-64:]})
