"""The exported tokenizer against the vocabulary it was made from."""

import io
import json
import random
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import sentencepiece

from em_megatron.data.manifest import DataError
from em_megatron.data.vocabulary import Vocabulary
from em_megatron.hf.fast_tokenizer import ODD_STRINGS, check_same_ids, fast_tokenizer, gives_the_same_ids
from tests.tokenizer import small_corpus
from tokenizer.scores import rounded_scores
from tokenizer.train import train

KINDS = ["unigram", "bpe", "unigram-markup", "bpe-markup"]
TEXTS = (*ODD_STRINGS, *small_corpus.ODD_STRINGS)
SPECIAL = ["<s>", "</s>", "<unk>", "<pad>", "<0x0A>", "<|reserved_0|>", "<", "\u2581", "\ue000", "\r\n", "\x00"]

LOAD = """
import importlib.util, json, sys

def blocked(name):
    return name.split(".")[0] in ("em_megatron", "sentencepiece") or name.startswith("google.protobuf")

class Block:
    def find_spec(self, name, path=None, target=None):
        if blocked(name):
            raise ModuleNotFoundError(name, name=name)

find_spec = importlib.util.find_spec
importlib.util.find_spec = lambda name, package=None: None if blocked(name) else find_spec(name, package)
sys.meta_path.insert(0, Block())
from transformers import AutoTokenizer

texts = json.loads(sys.stdin.read())
for folder in sys.argv[1:]:
    tokenizer = AutoTokenizer.from_pretrained(folder)
    ids = [tokenizer(text).input_ids for text in texts]
    print(json.dumps([len(tokenizer), ids, [tokenizer.decode(row, skip_special_tokens=True) for row in ids]]))
assert not any(blocked(name) for name in sys.modules)
"""


def corpus(folder: Path, markup: bool) -> list[str]:
    texts = [path.read_text(encoding="utf-8") for path in sorted(small_corpus.write_texts(folder, 12, 400).iterdir())]
    code = ["if (a < b) {\n" + " " * 8 + "x << 2;\n", "=======\n", "a\tb 123\n", " " * 24 + "y\n"]
    if markup:
        code += ["<b>x</b> <s>y</s>\n", "<p class=q><|x|><0x", "</div>\n    <div>\ue000\n"]
    generator = random.Random(3)
    return [text + "".join(generator.choices(code, k=200)) for text in texts] if markup else [*texts, *code[1:] * 30]


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    """As sentencepiece trains them; the plain ones without, the others with reserved ids."""
    made = {}
    for kind in KINDS:
        texts = corpus(tmp_path_factory.mktemp("texts"), "markup" in kind)
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr("tokenizer.train.rounded_scores", lambda serialized: serialized)
            made[kind] = train(texts, 640, kind.split("-")[0], 2 if "markup" in kind else 0, 0, 0, 1)
    return made


@pytest.fixture(scope="module")
def vocabularies(models: dict[str, bytes]) -> dict[str, Vocabulary]:
    """With scores for which the unigram models are exact."""
    return {
        kind: Vocabulary.from_bytes(rounded_scores(model) if "unigram" in kind else model)
        for kind, model in models.items()
    }


def mixtures(vocabulary: Vocabulary, count: int, parts: int, seed: int) -> Iterator[str]:
    """Random pieces, specials, runs and characters."""
    generator = random.Random(seed)
    pieces = [vocabulary.decode([token]) for token in range(vocabulary.size)]

    def part() -> str:
        return generator.choice(
            [
                generator.choice(pieces),
                generator.choice(pieces),
                generator.choice(SPECIAL),
                generator.choice(" \t\n=a<") * generator.randint(1, 40),
                "".join(generator.choices("abcdefgh </>s\n1", k=9)),
                chr(generator.choice([generator.randrange(0xD800), generator.randrange(0xE000, 0x110000)])),
            ]
        )

    for _ in range(count):
        yield "".join(part() for _ in range(generator.randint(1, parts)))


@pytest.mark.parametrize("kind", KINDS)
def test_same_ids_and_round_trip(vocabularies, kind):
    vocabulary = vocabularies[kind]
    tokenizer = fast_tokenizer(vocabulary)
    check_same_ids(vocabulary, tokenizer, TEXTS)
    check_same_ids(vocabulary, tokenizer, mixtures(vocabulary, 600, 60, seed=1))
    line = "".join(mixtures(vocabulary, 1500, 60, seed=3)).replace("\n", " ")
    assert len(line) > 150_000  # far below a score of -100,000, where sentencepiece starts its sums afresh
    check_same_ids(vocabulary, tokenizer, [line])


def test_trained_tokenizers_are_exact(models, vocabularies, tmp_path):
    assert all(gives_the_same_ids(vocabulary) for vocabulary in vocabularies.values())
    assert not gives_the_same_ids(Vocabulary.from_bytes(models["unigram"]))
    rounded = train(corpus(tmp_path, markup=False), 640, "unigram", 0, 0, 0, 1)
    assert rounded == rounded_scores(models["unigram"])


def test_a_mark_follows_each_less_than_sign_where_pieces_hold_it(vocabularies):
    made = [fast_tokenizer(vocabularies[kind]).backend_tokenizer for kind in ("unigram", "unigram-markup")]
    assert [json.loads(tokenizer.to_str())["normalizer"]["content"] for tokenizer in made] == ["<", "<\ue001"]


@pytest.mark.parametrize("kind", ["unigram", "unigram-markup"])
def test_rounding_of_sentencepiece_alone_makes_unigram_models_differ(models, kind):
    """The exported one finds the best segmentation; with scores as trained sentencepiece's is as good to 1e-3."""
    vocabulary = Vocabulary.from_bytes(models[kind])
    tokenizer = fast_tokenizer(vocabulary)
    differ = 0
    for text in mixtures(vocabulary, 400, 60, seed=4):
        ours, theirs = vocabulary.encode(text), tokenizer.encode(text, add_special_tokens=False)
        differ += ours != theirs
        assert vocabulary.decode(theirs) == text
        best, found = (sum(vocabulary.tokenizer.processor.get_score(token) for token in ids) for ids in (theirs, ours))
        assert found - 1e-9 <= best <= found + 1e-3
    assert differ
    with pytest.raises(DataError, match="differs from in memory at position"):
        check_same_ids(vocabulary, tokenizer, mixtures(vocabulary, 400, 60, seed=4))


@pytest.mark.parametrize("kind", ["bpe-markup", "unigram-markup"])
def test_special_ids(vocabularies, kind):
    vocabulary = vocabularies[kind]
    tokenizer = fast_tokenizer(vocabulary)
    assert len(tokenizer) == vocabulary.size
    ids = [tokenizer.pad_token_id, tokenizer.unk_token_id, tokenizer.bos_token_id, tokenizer.eos_token_id]
    assert ids == [vocabulary.pad_id, vocabulary.unk_id, vocabulary.bos_id, vocabulary.eos_id]
    controls = {token for token in range(vocabulary.size) if not vocabulary.token_bytes[token]}
    assert tokenizer.convert_tokens_to_ids("<|reserved_1|>") in controls
    assert tokenizer.decode(sorted(controls), skip_special_tokens=True) == ""
    for text in ("<s>", "a</s>", "<pad><unk>", "<|reserved_1|>"):
        assert not controls & set(tokenizer.encode(text, add_special_tokens=False))
    first, second = vocabulary.encode("<s>"), vocabulary.encode("b")
    assert tokenizer("<s>", "b").input_ids == [vocabulary.bos_id, *first, vocabulary.bos_id, *second]


@pytest.mark.parametrize("kind", ["bpe", "unigram-markup"])
def test_a_batch_gives_the_ids_of_single_texts(vocabularies, kind):
    tokenizer = fast_tokenizer(vocabularies[kind])
    texts = [text for text in TEXTS if len(text) < 1000]
    batch = tokenizer(texts, padding=True)
    for text, row, mask in zip(texts, batch.input_ids, batch.attention_mask, strict=True):
        ids = tokenizer(text).input_ids
        assert row == [tokenizer.pad_token_id] * (len(row) - len(ids)) + ids
        assert mask == [0] * (len(row) - len(ids)) + [1] * len(ids)


@pytest.mark.parametrize("kind", ["bpe", "unigram-markup"])
def test_streamed_ids_give_the_text(vocabularies, kind):
    from tokenizers.decoders import DecodeStream

    tokenizer = fast_tokenizer(vocabularies[kind])
    text = "if a<b </s> \U0001f642 \u4e2d\u6587  x\n\n\u2581 end <\ue000"
    stream = DecodeStream(skip_special_tokens=True)
    steps = [stream.step(tokenizer.backend_tokenizer, token) for token in tokenizer.encode(text)]
    assert "".join(step or "" for step in steps) == text


def test_it_loads_without_this_project_and_sentencepiece(vocabularies, tmp_path):
    folders = {kind: str(tmp_path / kind) for kind in ("bpe-markup", "unigram-markup")}
    for kind, folder in folders.items():
        fast_tokenizer(vocabularies[kind]).save_pretrained(folder)
    texts = [text for text in TEXTS if len(text) < 1000]
    run = subprocess.run(
        [sys.executable, "-c", LOAD, *folders.values()],
        input=json.dumps(texts), capture_output=True, text=True, cwd=tmp_path, timeout=120, check=False,
    )  # fmt: skip
    assert run.returncode == 0, run.stderr
    for kind, line in zip(folders, run.stdout.splitlines(), strict=True):
        vocabulary = vocabularies[kind]
        size, ids, decoded = json.loads(line)
        assert size == vocabulary.size
        assert ids == [[vocabulary.bos_id, *vocabulary.encode(text)] for text in texts]
        assert decoded == texts


def altered(vocabulary: Vocabulary, folder: Path, change):
    from transformers import AutoTokenizer

    fast_tokenizer(vocabulary).save_pretrained(folder)
    file = folder / "tokenizer.json"
    content = json.loads(file.read_text(encoding="utf-8"))
    change(content)
    file.write_text(json.dumps(content), encoding="utf-8")
    return AutoTokenizer.from_pretrained(folder)


def test_an_altered_tokenizer_is_caught(vocabularies, tmp_path):
    bpe, unigram = vocabularies["bpe"], vocabularies["unigram-markup"]
    texts = ["", "ab", *TEXTS]
    fine = altered(bpe, tmp_path / "fine", lambda content: None)
    check_same_ids(bpe, fine, texts)
    cases = [
        (bpe, lambda content: content["model"]["merges"].reverse(), "differs from in memory at position"),
        (bpe, lambda content: content.update(post_processor=None), "at position 0 of ''"),
        (bpe, lambda content: content.update(decoder=None), "does not give back 'ab'"),
        (bpe, lambda content: content["model"]["vocab"].update(more=640), "size, pad, unk, bos and eos"),
        (unigram, lambda content: content.update(normalizer=None), "does not give back '<s>'"),
    ]
    for index, (vocabulary, change, message) in enumerate(cases):
        with pytest.raises(DataError, match=message):
            check_same_ids(vocabulary, altered(vocabulary, tmp_path / str(index), change), texts)


@pytest.mark.parametrize(("kind", "symbol", "message"), [("char", "\n", "a char model"), ("bpe", "<0xff>", "<0xff>")])
def test_a_model_without_a_counterpart_is_refused(kind, symbol, message):
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(["a b cc dd a b"] * 9), model_writer=model, model_type=kind, vocab_size=280, pad_id=3,
        byte_fallback=True, normalization_rule_name="identity", add_dummy_prefix=False, minloglevel=2,
        remove_extra_whitespaces=False, user_defined_symbols=[symbol], hard_vocab_limit=False,
    )  # fmt: skip
    with pytest.raises(DataError, match=message):
        fast_tokenizer(Vocabulary.from_bytes(model.getvalue()))
