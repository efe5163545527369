"""sentencepiece models as tokenizers of a corpus."""

from collections.abc import Iterator
from pathlib import Path

import sentencepiece

from em_megatron.data.manifest import TOKENIZER_NAMES, DataError
from em_megatron.data.vocabulary_cuts import SPACE_MARK, NextCut, between_pieces, never
from em_megatron.data.vocabulary_special_tokens import EOS_NAMES, SpecialIds

PROBE = f"  two  \n\n\tline{SPACE_MARK} \u00e9\u200d\U0001f642\x00 9876 \r\n"
TRAINER_SPEC, NORMALIZER_SPEC = 2, 3  # fields of sentencepiece's ModelProto
CHARSMAP, ADD_DUMMY_PREFIX, REMOVE_EXTRA_WHITESPACES, ESCAPE_WHITESPACES = 2, 3, 4, 5  # of NormalizerSpec
WHITESPACE_AS_SUFFIX = 24  # of TrainerSpec
NO_DUMMY_PREFIX = b"\x1a\x02\x18\x00"  # a NormalizerSpec of that alone; protobuf merges it into the one before


class SentencePieceTokenizer:
    """A sentencepiece model. `why_lossy`: the reason why some texts do not come back exactly, "" where all do.
    processor: sentencepiece's own object. normalizer: the fields of its NormalizerSpec by number.
    suffix: whether spaces belong to the end of words.

    Where all do, a text's own U+2581 goes in as bytes, for sentencepiece would take it for a space; else ids are
    sentencepiece's own.
    """

    file_name = TOKENIZER_NAMES[0]

    def __init__(self, serialized: bytes, path: Path) -> None:
        """Raises DataError if these bytes are no sentencepiece model, or one without an end of document."""
        self.serialized = serialized
        self.processor = _load(serialized, path)
        self.special = self._special_ids(path)
        self.pieces = [self._bytes_of(token) for token in range(self.processor.vocab_size())]
        self._space_mark = [self.processor.piece_to_id(f"<0x{byte:02X}>") for byte in SPACE_MARK.encode()]
        self._byte_fallback = all(map(self.processor.is_byte, self._space_mark))
        self.normalizer = _last(serialized, NORMALIZER_SPEC)
        self.suffix = bool(_last(serialized, TRAINER_SPEC).get(WHITESPACE_AS_SUFFIX))
        self.why_lossy = self._why_lossy()
        self._prefix = bool(self.normalizer.get(ADD_DUMMY_PREFIX, 1))
        self._continues = _load(serialized + NO_DUMMY_PREFIX, path) if self._prefix else self.processor
        self.next_cut = self._cuts()
        if not self.why_lossy and self._decoded(PROBE) != PROBE.encode():
            self.why_lossy = "it does not give back a text of control characters and white space"

    def _special_ids(self, path: Path) -> SpecialIds:
        processor = self.processor
        named = [processor.piece_to_id(name) for name in EOS_NAMES]
        eos = next((token for token in (processor.eos_id(), *named) if token >= 0 and processor.is_control(token)), -1)
        if eos < 0:
            raise DataError(
                f"{path} has no eos id, which ends a document: train it with an eos id (sentencepiece's option eos_id), or "
                f"with one of {', '.join(EOS_NAMES[:3])} among its control_symbols"
            )
        bos, pad = (token if token >= 0 else eos for token in (processor.bos_id(), processor.pad_id()))
        return SpecialIds(pad, processor.unk_id(), bos, eos)

    def _bytes_of(self, token: int) -> bytes:
        processor = self.processor
        if processor.is_control(token) or processor.is_unknown(token) or processor.is_unused(token):
            return b""
        piece: str = processor.id_to_piece(token)
        if processor.is_byte(token):
            return bytes([int(piece[1:-1], 16)])
        return piece.replace(SPACE_MARK, " ").encode()

    def _why_lossy(self) -> str:
        spec = self.normalizer
        reasons = {
            "its normalisation rewrites characters": spec.get(CHARSMAP),
            "it puts a space before each text": spec.get(ADD_DUMMY_PREFIX, 1),
            "it removes white space": spec.get(REMOVE_EXTRA_WHITESPACES, 1),
            "it does not keep spaces": not spec.get(ESCAPE_WHITESPACES, 1),
            "it has no pieces for single bytes": not self._byte_fallback,
        }
        return " and ".join(reason for reason, applies in reasons.items() if applies)

    def _cuts(self) -> NextCut:
        spec = self.normalizer
        rewrites = spec.get(CHARSMAP) or spec.get(REMOVE_EXTRA_WHITESPACES, 1) or not spec.get(ESCAPE_WHITESPACES, 1)
        if rewrites or self.suffix:
            return never
        names = (self.processor.id_to_piece(token) for token in range(len(self.pieces)))
        return between_pieces(names, known_only=not self._byte_fallback)

    def encode(self, text: str, begins: bool) -> list[int]:
        """Ids of a text, or of a part of one that `begins` it or goes on at a cut."""
        processor = self.processor if begins else self._continues
        if self.why_lossy or SPACE_MARK not in text:
            ids: list[int] = processor.encode(text, out_type=int)
            return ids
        first, *others = (processor.encode(part, out_type=int) for part in text.split(SPACE_MARK))
        return [*first, *(token for part in others for token in (*self._space_mark, *part))]

    def _decoded(self, text: str) -> bytes:
        return b"".join(self.pieces[token] for token in self.encode(text, begins=True))


def _load(serialized: bytes, path: Path) -> sentencepiece.SentencePieceProcessor:
    try:
        return sentencepiece.SentencePieceProcessor(model_proto=serialized)
    except RuntimeError:
        raise DataError(
            f"{path} is neither a sentencepiece model nor a tokenizer.json; make a tokenizer with tokenizer.train"
        ) from None


def _last(serialized: bytes, number: int) -> dict[int, int | bytes]:
    """The fields of an embedded message, later ones over earlier ones, as protobuf merges them."""
    found: dict[int, int | bytes] = {}
    for field, value in message_fields(serialized):
        if field == number and isinstance(value, bytes):
            found.update(message_fields(value))
    return found


def message_fields(message: bytes) -> Iterator[tuple[int, int | bytes]]:
    """Field numbers and undecoded values of a protobuf message, read without the package protobuf."""
    place = 0

    def varint() -> int:
        nonlocal place
        value = shift = 0
        while True:
            byte = message[place]
            place += 1
            value |= (byte & 127) << shift
            shift += 7
            if byte < 128:
                return value

    while place < len(message):
        key = varint()
        if key & 7 == 0:
            yield key >> 3, varint()
        else:
            size = varint() if key & 7 == 2 else {1: 8, 5: 4}[key & 7]
            yield key >> 3, message[place : place + size]
            place += size
