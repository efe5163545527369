"""Small tokenizers of every kind that people bring along, trained on the spot."""

from __future__ import annotations

import io
import json
import random
from pathlib import Path
from typing import Any

import sentencepiece
from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers

from em_megatron.data.vocabulary_hugging_face import LINE_PATTERNS, RUN_PATTERNS

EXACT = {"normalization_rule_name": "identity", "remove_extra_whitespaces": False, "byte_fallback": True}
SENTENCEPIECE: dict[str, dict[str, Any]] = {
    "no dummy prefix": EXACT | {"add_dummy_prefix": False, "pad_id": 3},
    "no pad, no bos": EXACT | {"add_dummy_prefix": False, "bos_id": -1, "eos_id": 1},
    "dummy prefix": EXACT,
    "suffix": EXACT | {"treat_whitespace_as_suffix": True},
    "no bytes": EXACT | {"byte_fallback": False, "vocab_size": 250},
    "NFKC": {"byte_fallback": True},
    "NFKC, no prefix": EXACT | {"normalization_rule_name": "nfkc", "add_dummy_prefix": False},
}
BYTES = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
GPT_2 = pre_tokenizers.ByteLevel(add_prefix_space=False)
BYTE_LEVEL: dict[str, tuple[Any, Any]] = {  # pre-tokenizer, normalizer
    "GPT-2": (GPT_2, None),
    "NFC": (GPT_2, normalizers.NFC()),
    "digits": (pre_tokenizers.Sequence([pre_tokenizers.Digits(individual_digits=True), GPT_2]), None),
    "runs": (
        pre_tokenizers.Sequence([*(pre_tokenizers.Split(Regex(p), "isolated") for p in sorted(RUN_PATTERNS)), GPT_2]),
        None,
    ),
    "prefix": (pre_tokenizers.ByteLevel(add_prefix_space=True), None),
    "unknown pattern": (pre_tokenizers.Sequence([pre_tokenizers.Split(Regex(r"\w+|\W+"), "isolated"), BYTES]), None),
} | {
    f"pattern {number}": (pre_tokenizers.Sequence([pre_tokenizers.Split(Regex(pattern), "isolated"), BYTES]), None)
    for number, pattern in enumerate(sorted(LINE_PATTERNS))
}
MARKS = normalizers.Replace(" ", "\u2581")
SPACE_MARKED: dict[str, tuple[Any, Any]] = {
    "Llama 2": (None, normalizers.Sequence([normalizers.Prepend("\u2581"), MARKS])),
    "Metaspace": (pre_tokenizers.Metaspace(prepend_scheme="first", split=False), None),
    "Metaspace, split": (pre_tokenizers.Metaspace(prepend_scheme="always", split=True), None),
    "Unigram": (pre_tokenizers.Metaspace(prepend_scheme="always"), None),
    "Gemma": (pre_tokenizers.Split(" ", "merged_with_previous"), MARKS),
}
GAPS = (" ", " ", ",  ", "\n", "\n\n", " \n", "!\n\n ", "1\n2", "\t\n", ".\r\n", "\u3002\n")


def made_text(words: int, seed: int = 0) -> str:
    """Words from a lexicon of 300 with gaps of every sort between them."""
    generator = random.Random(seed)
    lexicon = ["".join(generator.choices("abcdefghijklmnop", k=generator.randint(2, 9))) for _ in range(300)]
    return "".join(word + generator.choice(GAPS) for word in generator.choices(lexicon, k=words))


def sentencepiece_model(path: Path, model_type: str = "bpe", **options: Any) -> Path:
    serialized = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(made_text(3000).splitlines()),
        model_writer=serialized,
        model_type=model_type,
        minloglevel=2,
        **({"vocab_size": 500} | options),
    )
    path.write_bytes(serialized.getvalue())
    return path


def byte_level(kind: str = "GPT-2", special: tuple[str, ...] = ("<|endoftext|>",)) -> Tokenizer:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer, normalizer = BYTE_LEVEL[kind]
    if normalizer is not None:
        tokenizer.normalizer = normalizer
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=400,
        special_tokens=list(special),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator([made_text(3000)], trainer)
    return tokenizer


def space_marked(kind: str) -> Tokenizer:
    """As the conversions of sentencepiece models are; with byte pieces, unless it is a unigram model."""
    bpe = kind != "Unigram"
    tokenizer = Tokenizer(models.BPE(byte_fallback=True, unk_token="<unk>", fuse_unk=True) if bpe else models.Unigram())
    pre_tokenizer, normalizer = SPACE_MARKED[kind]
    if normalizer is not None:
        tokenizer.normalizer = normalizer
    if pre_tokenizer is not None:
        tokenizer.pre_tokenizer = pre_tokenizer
    steps = [decoders.Replace("\u2581", " "), decoders.ByteFallback(), decoders.Fuse()]
    tokenizer.decoder = decoders.Sequence([*steps, *([] if kind == "Gemma" else [decoders.Strip(" ", 1, 0)])])
    special = ["<unk>", "<s>", "</s>"]
    byte_pieces = [f"<0x{byte:02X}>" for byte in range(256)]
    trainer: trainers.Trainer = (
        trainers.BpeTrainer(vocab_size=600, special_tokens=[*special, *byte_pieces], show_progress=False)
        if bpe
        else trainers.UnigramTrainer(vocab_size=300, special_tokens=special, unk_token="<unk>", show_progress=False)
    )
    tokenizer.train_from_iterator(made_text(3000).splitlines(), trainer)
    content = json.loads(tokenizer.to_str())
    content["added_tokens"] = [token for token in content["added_tokens"] if token["content"] in special]
    return Tokenizer.from_str(json.dumps(content))


def saved(tokenizer: Tokenizer, folder: Path, **config: Any) -> Path:
    """A folder as transformers saves it; `config` names special tokens."""
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer.save(str(folder / "tokenizer.json"))
    if config:
        (folder / "tokenizer_config.json").write_text(json.dumps(config))
    return folder
