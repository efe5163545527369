"""Text to token ids and back, without losing a byte.

A thin layer over a sentencepiece model that adds three things a language-model corpus needs: a round trip that is
exact for every UTF-8 text, the number of text bytes behind each id (bits per byte), and decoding to bytes, so that
a character spread over several ids can be printed as it arrives.
"""

import hashlib
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

import numpy as np
import sentencepiece

from em_megatron.data.manifest import DataError

SPACE_MARK = "\u2581"  # sentencepiece writes a space as this character, so a real one has to go in as bytes
CHUNK_CHARS = 1 << 16
PROBE = f"  two  \n\n\tline{SPACE_MARK} \u00e9\u200d\U0001f642\x00 9876 \r\n"


class Vocabulary:
    """A tokenizer model.

    size: number of ids. pad_id, unk_id, bos_id, eos_id. sha256: of the model file. token_bytes: int32 [size], the
    UTF-8 bytes of text each id stands for (0 for special ids, 1 for a byte piece), so that
    token_bytes[encode(text)].sum() == len(text.encode()).

    Raises DataError if the file is missing, is no sentencepiece model, or does not give every text back exactly.
    """

    def __init__(self, model_path: str | Path) -> None:
        self.path = Path(model_path)
        try:
            serialized = self.path.read_bytes()
        except OSError as error:
            raise DataError(f"cannot read the tokenizer {self.path}: {error.strerror}; run tokenizer.train") from None
        self._load(serialized)

    @classmethod
    def from_bytes(cls, serialized: bytes, name: str = "in memory") -> "Vocabulary":
        """A vocabulary from the bytes of a model file; `name` stands in messages."""
        vocabulary = cls.__new__(cls)
        vocabulary.path = Path(name)
        vocabulary._load(serialized)
        return vocabulary

    def _load(self, serialized: bytes) -> None:
        try:
            self._processor = sentencepiece.SentencePieceProcessor(model_proto=serialized)
        except RuntimeError:
            raise DataError(f"{self.path} is not a sentencepiece model") from None
        self.sha256 = hashlib.sha256(serialized).hexdigest()
        self.size: int = self._processor.vocab_size()
        self.pad_id: int = self._processor.pad_id()
        self.unk_id: int = self._processor.unk_id()
        self.bos_id: int = self._processor.bos_id()
        self.eos_id: int = self._processor.eos_id()
        self._pieces = [self._bytes_of(token) for token in range(self.size)]
        self._space_mark = [self._processor.piece_to_id(f"<0x{byte:02X}>") for byte in SPACE_MARK.encode()]
        self.token_bytes = np.array([len(piece) for piece in self._pieces], dtype=np.int32)
        self._check()

    def _bytes_of(self, token: int) -> bytes:
        processor = self._processor
        if processor.is_control(token) or processor.is_unknown(token) or processor.is_unused(token):
            return b""
        piece: str = processor.id_to_piece(token)
        if processor.is_byte(token):
            return bytes([int(piece[1:-1], 16)])
        return piece.replace(SPACE_MARK, " ").encode()

    def _check(self) -> None:
        if min(self.pad_id, self.bos_id, self.eos_id) < 0:
            raise DataError(f"{self.path} has no pad, bos or eos id; make one with tokenizer.train")
        if self.unk_id in self._space_mark or self.decode(self.encode(PROBE)) != PROBE:
            raise DataError(
                f"{self.path} does not give every text back exactly (it needs byte fallback, identity normalisation "
                "and no dummy prefix); make one with tokenizer.train"
            )

    def __len__(self) -> int:
        return self.size

    def encode(self, text: str) -> list[int]:
        """Ids of a text, without bos and eos. Raises DataError for a lone surrogate, which UTF-8 cannot hold."""
        _refuse_surrogates(text)
        ids: list[int] = []
        for chunk in _line_chunks(text):
            for index, part in enumerate(chunk.split(SPACE_MARK)):
                if index:
                    ids.extend(self._space_mark)
                ids.extend(self._processor.encode(part, out_type=int))
        return ids

    def decode_bytes(self, ids: Iterable[int]) -> bytes:
        """The UTF-8 bytes of some ids; special ids give none. The bytes of two calls join to those of one."""
        return b"".join(self._pieces[token] for token in ids)

    def decode(self, ids: Sequence[int] | np.ndarray) -> str:
        """The text of some ids; a character cut in half becomes U+FFFD."""
        return self.decode_bytes(ids).decode("utf-8", errors="replace")


def _refuse_surrogates(text: str) -> None:
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise DataError(f"the text holds {text[error.start]!a}, which UTF-8 cannot hold; remove it") from None


def _line_chunks(text: str) -> Iterator[str]:
    """Cuts after a newline about every 64 k characters: sentencepiece's memory grows with the length of one call.

    A newline is a piece of its own, so no piece spans a cut and the ids are those of the whole text.
    """
    start = 0
    while len(text) - start > CHUNK_CHARS:
        newline = text.find("\n", start + CHUNK_CHARS)
        if newline < 0:
            break
        yield text[start : newline + 1]
        start = newline + 1
    yield text[start:]
