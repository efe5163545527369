"""Text to token ids and back: sentencepiece models and Hugging Face tokenizers as a corpus and a run need them.

A thin layer that adds four things: the number of text bytes behind each id (bits per byte), decoding to bytes, so that
a character spread over several ids can be printed as it arrives, ids of documents of any length in bounded memory, and
one file that says all of it, to lie in a corpus or run folder.
"""

import hashlib
import logging
import multiprocessing
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from em_megatron.data.manifest import TOKENIZER_NAMES, DataError
from em_megatron.data.vocabulary_cuts import NextCut
from em_megatron.data.vocabulary_hugging_face import HuggingFaceTokenizer
from em_megatron.data.vocabulary_sentencepiece import SentencePieceTokenizer
from em_megatron.data.vocabulary_special_tokens import SpecialIds, check_no_code

CHUNK_CHARS = 1 << 16

log = logging.getLogger(__name__)


class Tokenizer(Protocol):
    """What a kind of tokenizer does for `Vocabulary`.

    pieces: the UTF-8 bytes of each id. why_lossy: why texts may not come back exactly, "" where all do.
    next_cut: where a text may be cut (vocabulary_cuts.py).
    """

    serialized: bytes
    special: SpecialIds
    pieces: list[bytes]
    why_lossy: str
    next_cut: NextCut

    @property
    def file_name(self) -> str: ...

    def encode(self, text: str, begins: bool) -> list[int]: ...


def find_tokenizer(folder: Path) -> Path:
    """The tokenizer of a corpus, run or Hugging Face folder: its tokenizer.model, else its tokenizer.json.

    Raises DataError where there is neither.
    """
    for name in TOKENIZER_NAMES:
        if (folder / name).is_file():
            return folder / name
    check_no_code(folder)
    raise DataError(
        f"cannot read the tokenizer of {folder}: it holds no {' or '.join(TOKENIZER_NAMES)}; run tokenizer.train, or copy one "
        "there"
    )


class Vocabulary:
    """A tokenizer: a sentencepiece model, a tokenizer.json, or a folder that holds one of them.

    size: number of ids. pad_id, unk_id (-1 for none), bos_id, eos_id; bos and pad are eos where there is none.
    lossless: whether every text comes back exactly; then token_bytes[encode(text)].sum() == len(text.encode()).
    token_bytes: int32 [size], the UTF-8 bytes of text each id stands for (0 for special ids, 1 for a single byte).
    file_name, serialized: name and bytes of the one file to keep in a corpus or run folder. sha256: of these bytes.

    Raises DataError if there is no such file, or a tokenizer that cannot be used; warns of one that is not lossless.
    """

    def __init__(self, path: str | Path) -> None:
        path = Path(path)
        self.path = find_tokenizer(path) if path.is_dir() else path
        try:
            serialized = self.path.read_bytes()
        except OSError as error:
            raise DataError(f"cannot read the tokenizer {self.path}: {error.strerror}; run tokenizer.train") from None
        self._load(serialized, self.path.parent)

    @classmethod
    def from_bytes(cls, serialized: bytes, name: str = "in memory") -> "Vocabulary":
        """A vocabulary from the bytes of one file that says all; `name` stands in messages."""
        vocabulary = cls.__new__(cls)
        vocabulary.path = Path(name)
        vocabulary._load(serialized, None)
        return vocabulary

    def _load(self, serialized: bytes, folder: Path | None) -> None:
        tokenizer: Tokenizer
        if serialized.lstrip()[:1] == b"{":
            tokenizer = HuggingFaceTokenizer(serialized, self.path, folder)
        else:
            tokenizer = SentencePieceTokenizer(serialized, self.path)
        self.tokenizer = tokenizer
        self.file_name, self.serialized = tokenizer.file_name, tokenizer.serialized
        self.sha256 = hashlib.sha256(tokenizer.serialized).hexdigest()
        self.size = len(tokenizer.pieces)
        self.pad_id, self.unk_id, self.bos_id, self.eos_id = tokenizer.special
        self.token_bytes = np.array([len(piece) for piece in tokenizer.pieces], dtype=np.int32)
        self.lossless = not tokenizer.why_lossy
        if not self.lossless and multiprocessing.parent_process() is None:  # not again from each worker
            log.warning("%s is not lossless (%s): bits per byte are approximate", self.path, tokenizer.why_lossy)

    def __len__(self) -> int:
        return self.size

    def encode(self, text: str) -> list[int]:
        """Ids of a text, without bos and eos. Raises DataError for a lone surrogate, which UTF-8 cannot hold."""
        return [token for part in self._parts(text) for token in part]

    def encode_array(self, text: str, dtype: str = "<u4") -> NDArray[Any]:
        """The same ids as an array [tokens], for long texts: a list of Python numbers is eight times as large."""
        parts = [np.array(part, dtype) for part in self._parts(text)]
        return parts[0] if len(parts) == 1 else np.concatenate(parts)

    def _parts(self, text: str) -> Iterator[list[int]]:
        """Ids of about CHUNK_CHARS characters at a time, cut where no id changes."""
        start = 0
        while len(text) - start > CHUNK_CHARS:
            cut = self.tokenizer.next_cut(text, start + CHUNK_CHARS)
            if cut < 0:
                break
            yield self._ids(text[start:cut], start == 0)
            start = cut
        yield self._ids(text[start:], start == 0)

    def _ids(self, part: str, begins: bool) -> list[int]:
        try:
            part.encode()
        except UnicodeEncodeError as error:
            raise DataError(f"the text holds {part[error.start]!a}, which UTF-8 cannot hold; remove it") from None
        return self.tokenizer.encode(part, begins)

    def decode_bytes(self, ids: Iterable[int]) -> bytes:
        """The UTF-8 bytes of some ids; special ids give none. The bytes of two calls join to those of one."""
        return b"".join(self.tokenizer.pieces[token] for token in ids)

    def decode(self, ids: Sequence[int] | NDArray[Any]) -> str:
        """The text of some ids; a character cut in half becomes U+FFFD."""
        return self.decode_bytes(ids).decode("utf-8", errors="replace")
