"""Hugging Face tokenizers (tokenizer.json) as tokenizers of a corpus.

Two families have bytes behind each id: byte-level ones (GPT-2, Llama 3, Qwen), whose pieces spell bytes as printable
characters, and those made from sentencepiece models (Llama 2, Gemma), whose pieces write a space as U+2581. Special
tokens come from no text: what spells one is ordinary text.
"""

import json
import re
from itertools import pairwise
from pathlib import Path
from typing import Any

from em_megatron.data.manifest import TOKENIZER_NAMES, DataError
from em_megatron.data.vocabulary_cuts import SPACE_MARK, NextCut, after_lines, between_pieces, never
from em_megatron.data.vocabulary_special_tokens import (
    SpecialIds,
    check_no_code,
    named_ids,
    recorded_ids,
    standing_alone,
)

JSON_NAME = TOKENIZER_NAMES[1]
BYTE_PIECE = re.compile("<0x[0-9A-F]{2}>")
# Pre-tokenizers that keep every character, unless they are told to remove what they find.
KEEPS_CHARACTERS = {"ByteLevel", "Digits", "Punctuation", "Split", "UnicodeScripts"}

_CONTRACTIONS = "(?i:'s|'t|'re|'ve|'m|'ll|'d)"
_REST = r" ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
_UPPER, _LOWER = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]", r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]"
LINE_PATTERNS = {  # that vocabulary_cuts.after_lines was thought through for
    r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+",  # GPT-2
    rf"{_CONTRACTIONS}|[^\r\n\p{{L}}\p{{N}}]?\p{{L}}+|\p{{N}}{{1,3}}|{_REST}",  # Llama 3
    rf"{_CONTRACTIONS}|[^\r\n\p{{L}}\p{{N}}]?\p{{L}}+|\p{{N}}|{_REST}",  # Qwen
    rf"[^\r\n\p{{L}}\p{{N}}]?{_UPPER}*{_LOWER}+{_CONTRACTIONS}?|[^\r\n\p{{L}}\p{{N}}]?{_UPPER}+{_LOWER}*{_CONTRACTIONS}?"
    r"|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+",  # o200k
    r"""[!"#$%&'()*+,\-./:;<=>?@\[\\\]^_`{|}~][A-Za-z]+|[^\r\n\p{L}\p{P}\p{S}]?[\p{L}\p{M}]+"""
    r"| ?[\p{P}\p{S}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+",  # DeepSeek
}
RUN_PATTERNS = {  # that cut within a run of such characters, or at its ends
    r"\p{N}",
    r"\p{N}{1,3}",
    "[\u4e00-\u9fa5\u3040-\u309f\u30a0-\u30ff]+",
}


class HuggingFaceTokenizer:
    """A tokenizer.json; ids are those of the package tokenizers with special tokens in texts taken for plain text.

    serialized: a tokenizer.json that stands alone (vocabulary_special_tokens.py), the same for the same tokenizer.
    why_lossy: the reason why some texts do not come back exactly, "" where all do.
    spelled: names of special tokens that the model would find in a text (unigram models); texts are cut within them.
    """

    file_name = JSON_NAME

    def __init__(self, serialized: bytes, path: Path, folder: Path | None) -> None:
        """folder: where files that name special tokens may lie. Raises DataError for what cannot be used."""
        original = _parsed(serialized, path)
        loaded = _loaded(original, path)
        content = json.loads(loaded.to_str())  # with every field of this version of the package
        ids: dict[str, int] = loaded.get_vocab(with_added_tokens=True)
        special = recorded_ids(original)
        if special is None:
            if folder is not None:
                check_no_code(folder)
            special = named_ids(folder or Path(), ids, path)
            names = {token: name for name, token in ids.items()}
            original = standing_alone(original | {"added_tokens": content["added_tokens"]}, special, names)
            serialized = json.dumps(original, ensure_ascii=False, separators=(",", ":")).encode()
            loaded = _loaded(original, path)
        self.serialized = serialized
        self._normalizers, self._pre_tokenizers = (_flat(content[key]) for key in ("normalizer", "pre_tokenizer"))
        self._model = content["model"]
        self._text_tokens = [
            token for token in content["added_tokens"] if not token["special"] and token["id"] not in special.values()
        ]
        self._byte_level = any(part["type"] == "ByteLevel" for part in (*self._normalizers, *self._pre_tokenizers))
        self._check_kind(path)
        self.pieces = self._bytes_of(ids, {token["id"] for token in content["added_tokens"]}, set(special.values()))
        unknown = self._model.get("unk_token")
        unk = ids.get(unknown, -1) if unknown is not None else self._model.get("unk_id")
        self.special = SpecialIds(special["pad"], -1 if unk is None else unk, special["bos"], special["eos"])
        self.why_lossy = self._why_lossy(ids)
        self.next_cut = self._cuts(ids)
        continuing = _without_prefix(original)
        self._begins = loaded
        self._continues = loaded if continuing == original else _loaded(continuing, path)
        special_names = {token["content"] for token in content["added_tokens"] if token["special"]}
        special_names |= {name for name, token in ids.items() if token in special.values()}
        self.spelled = [
            name for name in sorted(special_names) if len(name) > 1 and ids[name] in self._ids(name, begins=False)
        ]
        self._starts = re.compile("|".join(f"(?={re.escape(name)})" for name in self.spelled))

    def _check_kind(self, path: Path) -> None:
        """Raises DataError for a model whose ids do not stand for bytes, or are drawn at random."""
        model, kind = self._model, self._model["type"]
        marked = any(
            part["type"] == "Metaspace" or _is_mark(part) for part in (*self._normalizers, *self._pre_tokenizers)
        )
        affixes = model.get("continuing_subword_prefix") or model.get("end_of_word_suffix")
        if kind not in ("BPE", "Unigram") or affixes or not (self._byte_level or marked):
            raise DataError(
                f"{path} is a {kind} tokenizer whose ids do not stand for bytes of text: use a byte-level one, or one made "
                "from a sentencepiece model"
            )
        if model.get("dropout"):
            raise DataError(f'{path} draws its merges at random: set "dropout" of its model to null')

    def _bytes_of(self, ids: dict[str, int], added: set[int], special: set[int]) -> list[bytes]:
        """The UTF-8 bytes of each id; none for special ones and for numbers without a token."""
        in_text, values = {token["id"] for token in self._text_tokens}, _byte_values()
        pieces = [b""] * (1 + max(ids.values()))
        for name, token in ids.items():
            if token in in_text:
                pieces[token] = name.encode()
            elif token in added or token in special or name == self._model.get("unk_token"):
                continue
            elif self._byte_level:
                pieces[token] = bytes(values[character] for character in name if character in values)
            elif self._model.get("byte_fallback") and BYTE_PIECE.fullmatch(name):
                pieces[token] = bytes([int(name[1:-1], 16)])
            else:
                pieces[token] = name.replace(SPACE_MARK, " ").encode()
        if self._model.get("unk_id") is not None:
            pieces[self._model["unk_id"]] = b""
        return pieces

    def _why_lossy(self, ids: dict[str, int]) -> str:
        rewrites = [part["type"] for part in self._normalizers if part["type"] != "ByteLevel" and not _is_mark(part)]
        removes = [part["type"] for part in self._pre_tokenizers if not _keeps(part)]
        reasons = {
            f"its normalizer {' and '.join(rewrites)} rewrites texts": rewrites,
            f"its pre-tokenizer {' and '.join(removes)} changes texts": removes and self._byte_level,
            f"to it a space and {SPACE_MARK} are one": not self._byte_level,
            "it has no pieces for single bytes": not self._has_bytes(ids),
            "tokens in it swallow white space": any(token["lstrip"] or token["rstrip"] for token in self._text_tokens),
        }
        return " and ".join(reason for reason, applies in reasons.items() if applies)

    def _has_bytes(self, ids: dict[str, int]) -> bool:
        if self._byte_level:
            return ids.keys() >= _byte_values().keys()
        return bool(self._model.get("byte_fallback")) and all(f"<0x{byte:02X}>" in ids for byte in range(256))

    def _cuts(self, ids: dict[str, int]) -> NextCut:
        kinds = [part["type"] for part in self._normalizers]
        tokens = self._text_tokens
        if any(token["lstrip"] or token["rstrip"] or token["single_word"] for token in tokens):
            return never
        if self._byte_level:
            known = set(kinds) <= {"NFC"} and _cuts_lines(self._pre_tokenizers)
            return after_lines if known and not any("\n" in token["content"] for token in tokens) else never
        # Parts of a text between added tokens each get a prefix, so without the first one they would change.
        prefixes = "Prepend" in kinds or any(part.get("prepend_scheme") == "always" for part in self._pre_tokenizers)
        known = all(part["type"] == "Prepend" or _is_mark(part) for part in self._normalizers)
        known &= all(part["type"] == "Metaspace" or _splits_spaces(part) for part in self._pre_tokenizers)
        if not known or (prefixes and tokens):
            return never
        return between_pieces(ids, known_only=not self._has_bytes(ids))

    def encode(self, text: str, begins: bool) -> list[int]:
        """Ids of a text, or of a part of one that `begins` it or goes on at a cut."""
        if not self.spelled:
            return self._ids(text, begins)
        cuts = [0, *(start.end() + 1 for start in self._starts.finditer(text)), len(text)]
        return [token for start, end in pairwise(cuts) for token in self._ids(text[start:end], begins and start == 0)]

    def _ids(self, text: str, begins: bool) -> list[int]:
        tokenizer = self._begins if begins else self._continues
        # The batch call leaves out the offsets, which take most of the time of `encode`.
        ids: list[int] = tokenizer.encode_batch_fast([text], add_special_tokens=False)[0].ids
        return ids


def _parsed(serialized: bytes, path: Path) -> dict[str, Any]:
    try:
        content = json.loads(serialized)
    except ValueError as error:
        raise DataError(f"{path} is not valid JSON ({error}); fetch it again") from None
    if not isinstance(content.get("model"), dict):
        raise DataError(f"{path} is no {JSON_NAME}: it holds no model; give the {JSON_NAME} of a Hugging Face folder")
    return dict(content)


def _loaded(content: dict[str, Any], path: Path) -> Any:
    try:
        import tokenizers
    except ImportError:
        raise DataError(f"{path} needs the package tokenizers: install it with pip install tokenizers") from None
    try:
        tokenizer = tokenizers.Tokenizer.from_str(json.dumps(content))
    except Exception as error:  # the package raises nothing narrower
        raise DataError(
            f"{path} cannot be read by tokenizers {tokenizers.__version__} ({error}): it may need a newer version, or code "
            "of its own, which is not run"
        ) from None
    tokenizer.no_truncation()
    tokenizer.no_padding()
    tokenizer.encode_special_tokens = True
    return tokenizer


def _flat(section: dict[str, Any] | None) -> list[dict[str, Any]]:
    """The parts of a normalizer or pre-tokenizer, sequences within sequences dissolved."""
    if section is None:
        return []
    if section["type"] != "Sequence":
        return [section]
    return [part for inner in section.get("normalizers", section.get("pretokenizers", [])) for part in _flat(inner)]


def _is_mark(part: dict[str, Any]) -> bool:
    """Whether a normalizer writes U+2581 for each space, and nothing else."""
    return (part["type"], part.get("pattern"), part.get("content")) == ("Replace", {"String": " "}, SPACE_MARK)


def _splits_spaces(part: dict[str, Any]) -> bool:
    """Whether a pre-tokenizer splits at spaces, of which none is left once they are marked."""
    return part["type"] == "Split" and part["pattern"] == {"String": " "}


def _keeps(part: dict[str, Any]) -> bool:
    """Whether a pre-tokenizer neither leaves out nor adds a character."""
    return part["type"] in KEEPS_CHARACTERS and part.get("behavior") != "Removed" and not part.get("add_prefix_space")


def _cuts_lines(parts: list[dict[str, Any]]) -> bool:
    """Whether these are the byte-level pre-tokenizers that `after_lines` is for.

    What comes before the one that cuts at newlines may only cut runs of digits or of Chinese and Japanese characters.
    """
    *splits, last = parts or [{"type": ""}]
    if last["type"] != "ByteLevel" or last["add_prefix_space"]:
        return False
    if not last["use_regex"] and (not splits or _pattern(splits.pop()) not in LINE_PATTERNS):
        return False
    return all(split["type"] == "Digits" or _pattern(split) in RUN_PATTERNS for split in splits)


def _pattern(part: dict[str, Any]) -> str:
    """The regular expression whose matches, and what lies between them, are the parts of a text; "" for another sort."""
    if part["type"] != "Split" or (part["behavior"], part["invert"]) != ("Isolated", False):
        return ""
    return str(part["pattern"].get("Regex", "")).replace("\r", r"\r").replace("\n", r"\n")


def _without_prefix(content: dict[str, Any]) -> dict[str, Any]:
    """The same tokenizer without a space before the text, for parts of a text after the first."""

    def changed(section: dict[str, Any] | None) -> dict[str, Any] | None:
        if section is None or section["type"] == "Prepend":
            return None
        if section["type"] == "Metaspace":
            return section | {"prepend_scheme": "never"}
        key = "normalizers" if "normalizers" in section else "pretokenizers"
        if section["type"] != "Sequence":
            return section
        return section | {key: [part for inner in section[key] if (part := changed(inner)) is not None]}

    return content | {key: changed(content.get(key)) for key in ("normalizer", "pre_tokenizer")}


def _byte_values() -> dict[str, int]:
    """The byte that each character of a byte-level piece stands for.

    Bytes that are printable in Latin-1 stand for themselves, the others take the characters from U+0100 on in order.
    """
    printable = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    others = (byte for byte in range(256) if byte not in printable)
    return {chr(byte): byte for byte in printable} | {chr(0x100 + number): byte for number, byte in enumerate(others)}
