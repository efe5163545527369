"""Questions about a text: where their facts lie, and what a perfect, a guessing and a silent model get for them."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator

import numpy as np
import pytest

from em_megatron.config import ConfigError
from em_megatron.data.vocabulary import Vocabulary
from em_megatron.evaluation import recall, recall_texts
from em_megatron.evaluation.generation import Sampling, stream_text

DEPTHS = (0.0, 0.25, 0.5, 1.0)
FACT = re.compile(r"The number of (\w+) is (\d+)\.|The pass key is (\d+)\. Remember it\.")


@pytest.fixture(scope="module")
def vocabulary(tokenizer) -> Vocabulary:
    return Vocabulary(tokenizer)


class Written:
    """A text model that has read a text and writes, token by token, what `reply` makes of it."""

    def __init__(self, vocabulary: Vocabulary) -> None:
        self.vocabulary, self.text = vocabulary, ""

    def read(self, text: str) -> None:
        self.text += text

    def write(self, max_new_tokens: int, sampling: Sampling) -> Iterator[str]:
        assert sampling.temperature == 0
        return stream_text(iter(self.vocabulary.encode(self.reply())[:max_new_tokens]), self.vocabulary)

    def copy(self) -> Written:
        raise NotImplementedError

    def reply(self) -> str:
        raise NotImplementedError


class Searching(Written):
    """Finds every number that was told of what is asked."""

    def reply(self) -> str:
        asked = re.search(r"The (?:pass key|number of (\w+)) is$", self.text)
        assert asked is not None
        found = [key or value for name, value, key in FACT.findall(self.text) if name == (asked[1] or "")]
        return " " + ", ".join(found) + ". The river bends."


class Guessing(Written):
    rng = np.random.default_rng(5)

    def reply(self) -> str:
        return f" {recall.number(self.rng, 14)} "


class Silent(Written):
    def reply(self) -> str:
        return ""


def places(text: str) -> list[tuple[str, str, float]]:
    """Facts (name, number, share of the filler before them) in the order of the text."""
    count = sum(map(text.count, recall.FILLER))
    return [
        (found[1] or "", found[2] or found[3], sum(map(text[: found.start()].count, recall.FILLER)) / max(1, count))
        for found in FACT.finditer(text)
    ]


@pytest.mark.parametrize("depth", DEPTHS)
@pytest.mark.parametrize("name", recall.TASKS)
def test_the_fact_lies_at_its_depth_in_a_text_of_the_wanted_length(name, depth, vocabulary):
    task, longest = recall.TASKS[name], max(len(vocabulary.encode(sentence + " ")) for sentence in recall.FILLER)
    elsewhere = set()
    for number in range(4):
        question = recall.nth_question(vocabulary, task, 1500, depth, task.digits, number, 0)
        assert abs(len(vocabulary.encode(question.text)) - 1500) <= longest
        assert all(len(answer) == task.digits for answer in question.answers)
        found = places(question.text)
        sentence = 1 / sum(map(question.text.count, recall.FILLER))
        asked = re.search(r"The number of (\w+) is$", question.text)
        told = [fact for fact in found if fact[0] == (asked[1] if asked else "")]
        assert tuple(value for _, value, _ in told) == question.answers
        assert any(abs(at - depth) <= sentence for _, _, at in told)
        assert len(found) == {"multi_key": recall.KEYS_TOLD, "multi_value": recall.VALUES_TOLD}.get(name, 1)
        if name == "multi_key":
            assert len({fact[0] for fact in found}) == recall.KEYS_TOLD
        elsewhere |= {at for _, _, at in found}
        assert question == recall.nth_question(vocabulary, task, 1500, depth, task.digits, number, 0)
        assert question != recall.nth_question(vocabulary, task, 1500, depth, task.digits, number, 1)
    if name.startswith("multi"):
        assert len(elsewhere) > 4  # other facts at random depths


def test_values_keep_their_order_where_no_sentence_lies_between(vocabulary):
    task, longest = recall.TASKS["multi_value"], max(len(vocabulary.encode(text + " ")) for text in recall.FILLER)
    for number in range(20):
        rng = np.random.default_rng(number)
        facts, asked, _ = task.facts(rng, 7)
        least = sum(len(vocabulary.encode(text + " ")) for text in [*facts, asked])
        question = recall.ask(task, np.random.default_rng(number), least + longest // 2, 1.0, 7, vocabulary)
        assert tuple(value for _, value, _ in places(question.text)) == question.answers


@pytest.mark.parametrize("name", recall.TASKS)
def test_a_perfect_model_gets_all_of_it(name, vocabulary):
    task = recall.TASKS[name]
    for tokens in (400, 900):
        for depth in DEPTHS:
            rows = [
                recall.trial(lambda: Searching(vocabulary), vocabulary, task, tokens, depth, task.digits, number, 0)
                for number in range(3)
            ]
            found = recall.summary(tokens, depth, rows)
            assert (found["exact"], found["digits"], found["trials"]) == (1.0, 1.0, 3)
            assert found["example"]["asked"] == found["example"]["written"] == rows[0]["asked"]


def test_a_guess_gets_a_tenth_of_the_digits(vocabulary):
    task = recall.TASKS["single"]
    rows = [
        recall.trial(lambda: Guessing(vocabulary), vocabulary, task, 250, 0.5, 7, number, 0) for number in range(250)
    ]
    found = recall.summary(250, 0.5, rows)
    assert found["digits"] == pytest.approx(0.1, abs=0.025)  # three standard deviations are 0.022
    assert found["exact"] == 0


def test_a_silent_model_gets_nothing(vocabulary):
    row = recall.trial(lambda: Silent(vocabulary), vocabulary, recall.TASKS["multi_value"], 400, 0.5, 3, 0, 0)
    assert (row["exact"], row["digits"]) == (False, 0.0)
    assert re.fullmatch(r"\d{3}, \d{3}", row["asked"])


@pytest.mark.parametrize(
    ("written", "found", "exact", "share"),
    [
        (" 12345, 678.", ["12345", "678"], True, 1.0),
        (" 12 3a45678", ["12345", "678"], True, 1.0),
        (" 12345, 67", ["12345", "67"], False, 7 / 8),
        (" 12045, 678", ["12045", "678"], False, 7 / 8),
        (" 2345678", ["23456", "78"], False, 0.0),
        (" ٣ none", ["", ""], False, 0.0),
    ],
)
def test_digits_are_cut_into_answers_and_compared_in_place(written, found, exact, share, vocabulary):
    class Says(Written):
        def write(self, max_new_tokens, sampling):
            yield from written

    question = recall.Question("", ("12345", "678"))
    assert recall.answer(Says(vocabulary), question, vocabulary) == found
    assert recall.score(found, question) == (exact, pytest.approx(share))


@pytest.mark.parametrize("name", recall.TASKS)
def test_too_few_tokens_are_refused(name, vocabulary):
    with pytest.raises(ConfigError, match=f"^20 tokens are too few for the task {name} with 3 digits: ask at greater"):
        recall.nth_question(vocabulary, recall.TASKS[name], 20, 0.5, 3, 0, 0)


def test_usual_lengths():
    assert recall.default_lengths(2048, 32768) == [1024, 2048, 4096, 8192, 16384, 32768]
    assert recall.default_lengths(16, 200) == [48, 96, 192]


@pytest.mark.parametrize("name", recall.TASKS)
def test_texts_to_learn_from_answer_every_question_as_it_was_told(name):
    texts = list(recall.training_texts(recall.TASKS[name], 5, 2500, 4, seed=1))
    assert texts == list(recall.training_texts(recall.TASKS[name], 5, 2500, 4, seed=1))
    assert len(set(texts)) == 5
    for text in texts:
        assert 2300 < len(text) < 5000
        told, asked = text.split("Wh", 1) if "Wh" in text else (text, "")
        numbers = [value for _, value, _ in places(told)]
        assert len(numbers) == {"multi_key": recall.KEYS_TOLD, "multi_value": recall.VALUES_TOLD}.get(name, 1)
        answers = re.findall(r"\? The (?:pass key|number of \w+) is ([\d, ]+)\.", asked)
        assert len(answers) > 5
        expected = next(x for x in [", ".join(numbers)] if name == "multi_value") if name == "multi_value" else None
        for answer in answers:
            assert answer == expected if expected else answer in numbers


def test_texts_are_written_once(tmp_path, capsys):
    folder = tmp_path / "texts"
    options = ["single", "--output", str(folder), "--documents", "3", "--characters", "500"]
    assert recall_texts.main(options) == 0
    assert {path.name for path in folder.iterdir()} == {"000000.txt", "000001.txt", "000002.txt", "contents.json"}
    assert json.loads((folder / "contents.json").read_text())["digits"] == 3
    assert recall_texts.main(options) == 2
    assert f"{folder} already holds such texts; give another --output" in capsys.readouterr().err
