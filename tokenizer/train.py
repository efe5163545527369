"""Trains a sentencepiece tokenizer that gives every UTF-8 text back byte for byte.

    python -m tokenizer.train --input texts --output tokenizer.model --vocab-size 2048

Inputs are .txt, .jsonl, .jsonl.gz, .jsonl.zst, .json.gz, .json.zst and .parquet files. Only the training documents are
used; which ones those are depends on the options and on the documents' ids and sizes alone (with --deduplicate text, on
their texts), so tokenizer.encode with the same options holds out the same ones.

All inputs are read twice: to find the training documents, and to draw lines from them. With --sample-bytes only about
as much as it says is read: from the beginnings of input files that are drawn by --seed, documents whose id comes in
the later half of the order by which tokenizer.encode holds documents out, at its beginning.
"""

import argparse
import io
import random
import sys
import time
from collections.abc import Iterable, Iterator
from pathlib import Path

import sentencepiece

from em_megatron.data.manifest import DataError
from em_megatron.data.vocabulary import Vocabulary
from tokenizer.atomic import write_atomically
from tokenizer.corpus import add_corpus_arguments, find_corpus, layout_of, selection_of
from tokenizer.encoding.training_texts import TextSource, all_texts, sampled_texts
from tokenizer.scores import rounded_scores

SENTENCE_CHARS = 1000  # at most 4000 UTF-8 bytes, below sentencepiece's limit of 4192 above which it drops a line
MEASURED_BYTES = 32 << 20
SMALLEST_VOCABULARY = 512
# Unigram starts from this many candidates a piece; sentencepiece's million takes far longer and packs no better.
SEEDS_PER_PIECE = 8


def sentences(texts: Iterable[str]) -> Iterator[str]:
    """Lines of at most SENTENCE_CHARS characters, cut at tabs too: sentencepiece drops a line that holds one."""
    for text in texts:
        for line in text.replace("\t", "\n").replace("\x00", "\n").split("\n"):
            for start in range(0, len(line), SENTENCE_CHARS):
                yield line[start : start + SENTENCE_CHARS]


def sample(lines: Iterable[str], count: int, seed: int) -> list[str]:
    """A random sample of `count` lines in one pass (all of them if count is 0), a function of the arguments alone.

    sentencepiece's own sampling differs from run to run.
    """
    if count == 0:
        return list(lines)
    kept: list[str] = []
    generator = random.Random(seed)
    for index, line in enumerate(lines):
        if index < count:
            kept.append(line)
        elif (slot := int(generator.random() * (index + 1))) < count:
            kept[slot] = line
    return kept


def train(
    texts: Iterable[str], vocab_size: int, model_type: str, reserved: int, seed: int, max_sentences: int, threads: int
) -> bytes:
    """The bytes of a sentencepiece model; the same ones for the same arguments. Ids: pad 0, unk 1, bos 2, eos 3.

    Then come the reserved control ids, the newline, and the 256 bytes. Scores of a unigram model are rounded, which
    changes next to nothing and lets a Hugging Face tokenizer give the same ids (tokenizer/scores.py). Raises DataError where sentencepiece cannot
    make a vocabulary of this size from these texts.
    """
    model = io.BytesIO()
    lines = sample(sentences(texts), max_sentences, seed)
    try:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=iter(lines),
            model_writer=model,
            model_type=model_type,
            vocab_size=vocab_size,
            pad_id=0,
            unk_id=1,
            bos_id=2,
            eos_id=3,
            control_symbols=[f"<|reserved_{index}|>" for index in range(reserved)],
            user_defined_symbols=["\n"],
            byte_fallback=True,
            normalization_rule_name="identity",
            add_dummy_prefix=False,
            remove_extra_whitespaces=False,
            allow_whitespace_only_pieces=True,
            split_digits=True,
            seed_sentencepiece_size=SEEDS_PER_PIECE * vocab_size,
            num_threads=threads,
            minloglevel=2,
        )
    except (RuntimeError, OSError) as error:
        reason = str(error).splitlines()[-1].strip()
        raise DataError(
            f"sentencepiece cannot make {vocab_size} pieces of these texts ({reason}); "
            "give more text or another --vocab-size"
        ) from None
    return rounded_scores(model.getvalue()) if model_type == "unigram" else model.getvalue()


def bytes_per_token(vocabulary: Vocabulary, texts: Iterable[str]) -> tuple[float, int]:
    """UTF-8 bytes of text per id over the first MEASURED_BYTES or more, and the bytes that were measured."""
    measured = tokens = 0
    for text in texts:
        measured += len(text.encode())
        tokens += len(vocabulary.encode(text))
        if measured >= MEASURED_BYTES:
            break
    return measured / max(tokens, 1), measured


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m tokenizer.train",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add_corpus_arguments(parser)
    parser.add_argument("--output", type=Path, required=True, metavar="OUT.model", help="the model file to write")
    parser.add_argument("--vocab-size", type=int, default=32_000, help="number of ids (default: %(default)s)")
    parser.add_argument(
        "--model-type", choices=("unigram", "bpe"), default="unigram", help="kind of model (default: %(default)s)"
    )
    parser.add_argument(
        "--reserved",
        type=int,
        default=0,
        metavar="N",
        help="keep N control ids <|reserved_0|>, ... for later use; no text encodes to them (default: 0)",
    )
    parser.add_argument(
        "--max-sentences",
        type=int,
        default=100_000,
        metavar="N",
        help="learn from a random sample of N lines (default: %(default)s; 0 uses all)",
    )
    parser.add_argument(
        "--sample-bytes",
        type=int,
        metavar="N",
        help="read only about N bytes of a large corpus, spread over its files (default: read all)",
    )
    parser.add_argument("--seed", type=int, default=1234, help="of both samples (default: %(default)s)")
    parser.add_argument(
        "--threads", type=int, default=1, help="threads; part of what decides the result (default: %(default)s)"
    )
    return parser


def check_arguments(arguments: argparse.Namespace) -> None:
    """Raises DataError for an option outside its range."""
    smallest = SMALLEST_VOCABULARY + arguments.reserved
    if arguments.reserved < 0 or arguments.vocab_size < smallest:
        raise DataError(
            f"--vocab-size {arguments.vocab_size} with --reserved {arguments.reserved} leaves no room beside the 256 "
            f"bytes; give a --vocab-size of at least {smallest} and a --reserved of at least 0"
        )
    if arguments.sample_bytes is not None and arguments.sample_bytes < 1:
        raise DataError(f"--sample-bytes {arguments.sample_bytes} reads nothing; give at least 1, or leave it out")
    if arguments.threads < 1 or arguments.max_sentences < 0 or not 0 <= arguments.seed < 1 << 32:
        raise DataError("give a --seed from 0 to 2**32-1, --threads of at least 1 and --max-sentences of at least 0")


def texts_of(arguments: argparse.Namespace) -> TextSource:
    """The training texts that the arguments ask for. Raises DataError."""
    layout, selection, files = layout_of(arguments), selection_of(arguments), find_corpus(arguments)
    if arguments.sample_bytes is None:
        return all_texts(files, layout, selection)
    return sampled_texts(files, layout, selection, arguments.sample_bytes, arguments.seed)


def run(arguments: argparse.Namespace) -> None:
    check_arguments(arguments)
    texts = texts_of(arguments)
    started = time.monotonic()
    serialized = train(
        texts.read(),
        arguments.vocab_size,
        arguments.model_type,
        arguments.reserved,
        arguments.seed,
        arguments.max_sentences,
        arguments.threads,
    )
    vocabulary = Vocabulary.from_bytes(serialized, str(arguments.output))
    write_atomically(arguments.output, serialized)
    seconds = time.monotonic() - started
    ratio, measured = bytes_per_token(vocabulary, texts.read())
    print(
        f"{arguments.output}: {vocabulary.size} pieces ({arguments.model_type}) in {seconds:.1f} s, {texts.words}, "
        f"{ratio:.3f} bytes per token over {measured} bytes of training text"
    )


def main(argv: list[str] | None = None) -> int:
    arguments = build_parser().parse_args(argv)
    try:
        run(arguments)
    except DataError as error:
        print(f"tokenizer.train: {error}", file=sys.stderr)
        return 2
    except OSError as error:
        place = f" {error.filename}" if error.filename else ""
        print(
            f"tokenizer.train: cannot read or write{place} ({error.strerror or error}); mend that, and run the same "
            "command again",
            file=sys.stderr,
        )
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
