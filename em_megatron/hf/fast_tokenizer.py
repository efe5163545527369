"""The tokenizer as a Hugging Face fast tokenizer that gives the ids of Vocabulary.encode.

One that was made by Hugging Face is taken as it is. In one of sentencepiece pieces are named with real spaces instead
of sentencepiece's U+2581, so that no space is ever rewritten and a real U+2581 falls back to its bytes. Special pieces
and byte pieces keep their names, "<s>" and "<0x0A>".
"""

import re
from collections.abc import Iterable
from dataclasses import dataclass
from itertools import pairwise
from typing import TYPE_CHECKING, Any

from em_megatron.data.manifest import DataError
from em_megatron.data.vocabulary import Vocabulary
from em_megatron.data.vocabulary_cuts import SPACE_MARK
from em_megatron.data.vocabulary_hugging_face import HuggingFaceTokenizer
from em_megatron.data.vocabulary_sentencepiece import (
    ADD_DUMMY_PREFIX,
    CHARSMAP,
    REMOVE_EXTRA_WHITESPACES,
    SentencePieceTokenizer,
    message_fields,
)

if TYPE_CHECKING:
    from tokenizers import Tokenizer
    from tokenizers.decoders import Decoder
    from tokenizers.normalizers import Normalizer
    from tokenizers.pre_tokenizers import PreTokenizer
    from transformers import PreTrainedTokenizerFast

MODEL_TYPES = {1: "unigram", 2: "bpe", 3: "word", 4: "char"}  # TrainerSpec.ModelType of sentencepiece_model.proto
PRIVATE_USE = range(0xE000, 0xF900)
READ_AS_BYTE = re.compile("<0x[+0-9A-Fa-f][0-9A-Fa-f]>")  # what the decoder ByteFallback takes for a byte
SHOWN_CHARS = 40

_MIXED = " \t  x\n\n   \t\ty \r\n  z\u3000\u00a0 \n \n"
ODD_STRINGS: tuple[str, ...] = (
    "",
    *(" " * count for count in range(1, 41)),
    *("a" + " " * count + "b" for count in range(1, 41)),
    *("\n" * count + " " * count + "\t" * count for count in range(1, 10)),
    "\r\nx\r\n\r\n  y\r z\n\r",
    _MIXED,
    _MIXED * 9,
    "emoji \U0001f642 \U0001f469\u200d\U0001f469\u200d\U0001f467 flags \U0001f1eb\U0001f1f7 \u2764\ufe0f",
    "\u0e44\u0e17\u0e22 \u4e2d\u6587 \u0627\u0644\u0639\u0631\u0628\u064a\u0629 \u10d0\u10d1 \U00012000 \ud55c\uae00",
    "e\u0301 \u00e9 \u1e9b\u0323 \ufb01 \uff21 \u212b a\u0300\u0301\u0302\u0303 Z\u0351\u036b\u0343",
    "\u2581",
    "\u2581\u2581 a real\u2581lower block \u2581\n\u2581 ",
    "<s>",
    "<|reserved_0|>",
    "<s></s><unk><pad><0x0A><0x00><0xFF> <s> x<s>y </s>\n<pad><|reserved_1|><|reserved_9|>",
    "<0x41><0xE2><0x96><0x81><0xff><0x+f><0x0a>",
    "\u2581<s>\u2581<<s>>< s><\n><<<<<<<<<<<<<<<<<<<<<<<<<<<<<<",
    "\ue000<\ue000\ue000s>\ue000 <\ue000/\ue000 <\ue001",
    '<p class="a">x &lt; y</p><br/>\n  <!-- <s> -->\n if (a<b && b<<2 <= c) {}',
    "0123456789 3.14159 1e-12 00 007 1,000,000 \u0661\u0662\u0663 \u2160\u00bd\u00b2",
    "".join(map(chr, range(32))),
    "\x7f\x80\x85\x9f\u2028\u2029\ufeff\u200b\u202e a\x00b\x00\x00c\x00",
    "\uffff\ufffe\ufdd0\ufffd\U0010fffe\U0010ffff\U000f0000",
    "".join(map(chr, range(0xA0, 0x250))),
    "aaaaaaaaaaaaaaaaaaaaaaaaaaaaa =============================== ------- ######## ........",
    "the quick brown fox; don't  stop.   def f(x):\n        return x[0] if x else None\n" * 3,
    "0 ab<\u2581 the " * 10_000,  # 120,000 characters without a newline
)


@dataclass(frozen=True)
class _Piece:
    """name: in the exported vocabulary. score: the larger is merged, or counts more. in_text: a text can match it."""

    name: str
    score: float
    in_text: bool


def fast_tokenizer(vocabulary: Vocabulary) -> "PreTrainedTokenizerFast":
    """The same tokenizer for transformers; it puts bos in front of a text, and no text gives a special id.

    One of Hugging Face gives the ids of `vocabulary` for every text that does not spell a special token. Of those of
    sentencepiece that are lossless, a bpe model gives the ids of `vocabulary` for every text. So does a unigram model
    whose scores are multiples of 1/128: sums of those are exact in sentencepiece's float32. With other scores it rounds,
    and may prefer another segmentation that scores the same or less by its rounding; check_same_ids notices. One that
    is not lossless may give other ids for odd texts.

    Raises DataError for a model of another kind, or with a piece that cannot be exported.
    """
    from tokenizers import Tokenizer
    from transformers import PreTrainedTokenizerFast

    if isinstance(vocabulary.tokenizer, HuggingFaceTokenizer):
        backend = Tokenizer.from_str(vocabulary.serialized.decode())
    else:
        backend = _of_sentencepiece(vocabulary)
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        bos_token=backend.id_to_token(vocabulary.bos_id),
        eos_token=backend.id_to_token(vocabulary.eos_id),
        pad_token=backend.id_to_token(vocabulary.pad_id),
        unk_token=backend.id_to_token(vocabulary.unk_id) if vocabulary.unk_id >= 0 else None,
        split_special_tokens=True,
        padding_side="left",  # places count real tokens, and generation goes on at the right
        clean_up_tokenization_spaces=False,
        model_input_names=["input_ids", "attention_mask"],
    )


def _of_sentencepiece(vocabulary: Vocabulary) -> "Tokenizer":
    from tokenizers import AddedToken, decoders, normalizers, processors

    pieces = _pieces(vocabulary)
    if _sentencepiece(vocabulary).suffix:
        raise DataError(
            f"{vocabulary.path} puts spaces at the end of words (treat_whitespace_as_suffix) and cannot be exported"
        )
    kind = _model_type(_sentencepiece(vocabulary).processor.serialized_model_proto())
    if kind not in ("unigram", "bpe"):
        raise DataError(f"{vocabulary.path} is a {kind} model; only unigram and bpe models can be exported")
    backend = (_unigram if kind == "unigram" else _bpe)(pieces, vocabulary.unk_id)
    if rewriting := _normalizers(vocabulary):
        kept = [backend.normalizer] if backend.normalizer is not None else []
        backend.normalizer = normalizers.Sequence([*rewriting, *kept])
        backend.decoder = decoders.Sequence([backend.decoder, *_prefix_decoders(vocabulary)])
    special = [
        AddedToken(piece.name, normalized=False, special=True)
        for token, piece in enumerate(pieces)
        if not piece.in_text and not _sentencepiece(vocabulary).processor.is_byte(token)
    ]
    backend.add_special_tokens(special)
    bos = pieces[vocabulary.bos_id].name
    backend.post_processor = processors.TemplateProcessing(
        single=f"{bos} $A", pair=f"{bos} $A {bos}:1 $B:1", special_tokens=[(bos, vocabulary.bos_id)]
    )
    return backend


def _normalizers(vocabulary: Vocabulary) -> "list[Normalizer]":
    """What sentencepiece does to a text before it looks for pieces; nothing for a lossless model."""
    from tokenizers import Regex, normalizers

    if vocabulary.lossless:
        return []
    spec = _sentencepiece(vocabulary).normalizer
    charsmap: Any = spec.get(CHARSMAP)
    found: list[Normalizer] = [normalizers.Precompiled(charsmap)] if charsmap else []
    if spec.get(REMOVE_EXTRA_WHITESPACES, 1):
        found += [normalizers.Replace(Regex(r"\A +| +\z"), ""), normalizers.Replace(Regex(" {2,}"), " ")]
    found.append(normalizers.Replace(SPACE_MARK, " "))
    return [*found, normalizers.Prepend(" ")] if spec.get(ADD_DUMMY_PREFIX, 1) else found


def _prefix_decoders(vocabulary: Vocabulary) -> "list[Decoder]":
    from tokenizers import decoders

    prefixed = _sentencepiece(vocabulary).normalizer.get(ADD_DUMMY_PREFIX, 1)
    return [decoders.Fuse(), decoders.Strip(" ", 1, 0)] if prefixed else []


def _sentencepiece(vocabulary: Vocabulary) -> SentencePieceTokenizer:
    if not isinstance(vocabulary.tokenizer, SentencePieceTokenizer):
        raise DataError(f"{vocabulary.path} is no sentencepiece model")
    return vocabulary.tokenizer


def gives_the_same_ids(vocabulary: Vocabulary) -> bool:
    """Whether fast_tokenizer gives the ids of `vocabulary` for every text, by the argument there."""
    if isinstance(vocabulary.tokenizer, HuggingFaceTokenizer):
        return not vocabulary.tokenizer.spelled
    if not vocabulary.lossless:
        return False
    processor = _sentencepiece(vocabulary).processor
    if _model_type(processor.serialized_model_proto()) == "bpe":
        return True
    return all((128 * processor.get_score(token)).is_integer() for token in range(vocabulary.size))


def check_same_ids(vocabulary: Vocabulary, tokenizer: "PreTrainedTokenizerFast", texts: Iterable[str]) -> None:
    """Raises DataError at the first text that gives other ids than bos and vocabulary.encode, or does not come back.

    Positions count ids; bos is at 0.
    """
    unknown = -1 if tokenizer.unk_token_id is None else tokenizer.unk_token_id
    special = (tokenizer.pad_token_id, unknown, tokenizer.bos_token_id, tokenizer.eos_token_id)
    found = (len(tokenizer), *special)
    expected = (vocabulary.size, vocabulary.pad_id, vocabulary.unk_id, vocabulary.bos_id, vocabulary.eos_id)
    if found != expected:
        raise DataError(f"size, pad, unk, bos and eos of the exported tokenizer are {found} instead of {expected}")
    for text in texts:
        theirs, ours = _both(vocabulary, tokenizer, text)
        if theirs != ours:
            same = (left == right for left, right in zip(theirs, ours, strict=False))
            at = next((index for index, equal in enumerate(same) if not equal), min(len(theirs), len(ours)))
            raise DataError(
                f"the exported tokenizer differs from {vocabulary.path} at position {at} of {_short(text)}: ids "
                f"{theirs[at : at + 3]} instead of {ours[at : at + 3]}"
            )


def differing_texts(vocabulary: Vocabulary, tokenizer: "PreTrainedTokenizerFast", texts: Iterable[str]) -> int:
    """How many texts get other ids, for tokenizers that check_same_ids would refuse; raises where one does not come back."""
    return sum(theirs != ours for theirs, ours in (_both(vocabulary, tokenizer, text) for text in texts))


def _both(vocabulary: Vocabulary, tokenizer: "PreTrainedTokenizerFast", text: str) -> tuple[list[int], list[int]]:
    """Ids of the exported tokenizer, which must give the text back where ours does, and of ours."""
    theirs: list[int] = tokenizer.encode(text)
    if (
        vocabulary.lossless
        and tokenizer.decode(theirs, skip_special_tokens=True, clean_up_tokenization_spaces=False) != text
    ):
        raise DataError(f"the exported tokenizer does not give back {_short(text)}")
    return theirs, [vocabulary.bos_id, *vocabulary.encode(text)]


def _short(text: str) -> str:
    return ascii(text) if len(text) <= SHOWN_CHARS else f"{text[:SHOWN_CHARS]!a}... ({len(text)} characters)"


def _pieces(vocabulary: Vocabulary) -> list[_Piece]:
    """Raises DataError for a piece without a counterpart, or that would be matched or decoded as something else."""
    processor = _sentencepiece(vocabulary).processor
    pieces = []
    for token in range(vocabulary.size):
        name: str = processor.id_to_piece(token)
        reserved = processor.is_byte(token) or processor.is_control(token) or processor.is_unknown(token)
        clash = not re.match("<.", name) if reserved else READ_AS_BYTE.fullmatch(name)
        if clash or processor.is_unused(token):
            raise DataError(f"{vocabulary.path} cannot be exported because of its piece {token}, {name!a}")
        pieces.append(
            _Piece(name if reserved else name.replace(SPACE_MARK, " "), processor.get_score(token), not reserved)
        )
    return pieces


def _isolate(characters: str, pieces: list[_Piece]) -> "list[PreTokenizer]":
    """Cuts a text around each of the characters that no longer piece holds, which changes no id."""
    from tokenizers import pre_tokenizers

    longer = [piece.name for piece in pieces if piece.in_text and len(piece.name) > 1]
    alone = [character for character in characters if not any(character in name for name in longer)]
    return [pre_tokenizers.Split(character, "isolated") for character in alone]


def _unigram(pieces: list[_Piece], unk_id: int) -> "Tokenizer":
    """A model that matches every name literally, "<s>" too, which sentencepiece does not.

    So either "<" is cut off from what follows, or, where pieces hold it, a mark that no piece holds comes after each
    "<" of the pieces and of the text: only the reserved names have none. As "<" is then never without its mark, the
    segmentations are those of the text without marks.
    """
    from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers

    cuts = _isolate("\n<", pieces)
    if any("<" in piece.name and len(piece.name) > 1 for piece in pieces if piece.in_text):
        held = set("".join(piece.name for piece in pieces))
        marked = "<" + next(mark for mark in map(chr, PRIVATE_USE) if mark not in held)
    else:
        marked = "<"
    scored = [(piece.name.replace("<", marked) if piece.in_text else piece.name, piece.score) for piece in pieces]
    tokenizer = Tokenizer(models.Unigram(scored, unk_id=unk_id, byte_fallback=True))
    tokenizer.normalizer = normalizers.Replace("<", marked)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(cuts)
    tokenizer.decoder = decoders.Sequence([decoders.Replace(marked, "<"), decoders.ByteFallback()])
    return tokenizer


def _bpe(pieces: list[_Piece], unk_id: int) -> "Tokenizer":
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers

    scores = {piece.name: piece.score for piece in pieces if piece.in_text}
    ranked = sorted(scores, key=lambda name: -scores[name])
    merges = [pair for name in ranked if (pair := _last_merge(name, scores))]
    names = {piece.name: token for token, piece in enumerate(pieces)}
    tokenizer = Tokenizer(models.BPE(names, merges, unk_token=pieces[unk_id].name, fuse_unk=True, byte_fallback=True))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(_isolate("\n", pieces))
    tokenizer.decoder = decoders.ByteFallback()
    return tokenizer


def _last_merge(name: str, scores: dict[str, float]) -> tuple[str, str] | None:
    """The two symbols a piece is merged from; None for one character, or if merging never makes it.

    sentencepiece merges the two neighbours that spell the best piece, a merge list names the two. Until a piece is
    made nothing merges across its ends, so what merges inside it is what merges in it alone: these two symbols are
    the only ones that ever make it.
    """
    symbols = list(name)
    while len(symbols) > 2:
        spelled = [left + right for left, right in pairwise(symbols)]
        best = max(range(len(spelled)), key=lambda index: scores.get(spelled[index], float("-inf")))
        if spelled[best] not in scores:
            return None
        symbols[best : best + 2] = [spelled[best]]
    return (symbols[0], symbols[1]) if len(symbols) == 2 and scores.keys() >= set(symbols) else None


def _model_type(serialized: bytes) -> str:
    """Field 3 of trainer_spec, field 2 of the message, read without the package protobuf; unigram if left out."""
    specs = (value for field, value in message_fields(serialized) if field == 2 and isinstance(value, bytes))
    kinds = [value for spec in specs for field, value in message_fields(spec) if field == 3 and isinstance(value, int)]
    return MODEL_TYPES.get(kinds[-1], "strange") if kinds else "unigram"
