"""Recall of facts out of a long text: passkeys, and needles in the manner of RULER, over lengths and depths.

    filler ... fact ... filler, question  ->  greedy decoding  ->  exact match, and digits that are right

Tasks, each with its own question at the end:

- passkey: one number hidden in filler;
- single: the number of one name, told once;
- multi_key: numbers of several names are told, one is asked;
- multi_value: several numbers of one name are told one after another at different depths, all are asked, in order.

A guess is right in a tenth of the digits, and in 10^-digits of the numbers.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from em_megatron.config import ConfigError
from em_megatron.data.vocabulary import Vocabulary
from em_megatron.evaluation.generation import Sampling, TextModel

FILLER = (
    "The river bends twice before it meets the road.",
    "A cart of apples stood in front of the mill.",
    "Nobody had swept the stairs since the winter.",
    "Two sparrows argued about a crumb of bread.",
    "The clock in the hall was a little slow.",
    "Rain fell on the roofs until the evening.",
    "She folded the letter and put it away.",
    "The dog slept beside the warm stove.",
)
NAMES = ("amber", "birch", "cedar", "delta", "ember", "fjord", "grove", "heron", "ivory", "jasper", "koala", "linen")
KEYS_TOLD, VALUES_TOLD = 4, 2
GAPS, GAP_SHARES = ((0, 0), (1, 3), (4, 40)), (0.55, 0.3, 0.15)  # sentences between questions of a training text


@dataclass(frozen=True)
class Question:
    """text: what is read, the question at its end included. answers: numbers that must follow, in this order."""

    text: str
    answers: tuple[str, ...]


@dataclass(frozen=True)
class Task:
    """facts, question: told at depths and asked; see `TASKS`. digits: of a number, as usual for the task."""

    name: str
    digits: int
    facts: Callable[[np.random.Generator, int], tuple[list[str], str, tuple[str, ...]]]


def number(rng: np.random.Generator, digits: int) -> str:
    """A number of so many digits, zeros in front allowed."""
    return "".join(str(digit) for digit in rng.integers(0, 10, digits))


def _passkey(rng: np.random.Generator, digits: int) -> tuple[list[str], str, tuple[str, ...]]:
    key = number(rng, digits)
    return [f"The pass key is {key}. Remember it."], "What is the pass key? The pass key is", (key,)


def _needles(keys: int, values: int) -> Callable[[np.random.Generator, int], tuple[list[str], str, tuple[str, ...]]]:
    def facts(rng: np.random.Generator, digits: int) -> tuple[list[str], str, tuple[str, ...]]:
        names = [NAMES[index] for index in rng.permutation(len(NAMES))[:keys]]
        told = [[number(rng, digits) for _ in range(values)] for _ in names]
        asked = int(rng.integers(0, keys))
        texts = [f"The number of {name} is {value}." for name, row in zip(names, told, strict=True) for value in row]
        question = f"Which number has {names[asked]}? The number of {names[asked]} is"
        return texts, question, tuple(told[asked])

    return facts


TASKS = {
    task.name: task
    for task in (
        Task("passkey", 5, _passkey),
        Task("single", 7, _needles(1, 1)),
        Task("multi_key", 7, _needles(KEYS_TOLD, 1)),
        Task("multi_value", 7, _needles(1, VALUES_TOLD)),
    )
}


def ask(
    task: Task, rng: np.random.Generator, tokens: int, depth: float, digits: int, vocabulary: Vocabulary
) -> Question:
    """A text of about `tokens` tokens, the asked fact at `depth` (0: at the begin, 1: just before the question).

    Further facts lie at random depths; of several values that are asked, one is at `depth`.

    Raises:
        ConfigError: facts and question alone are longer.
    """
    facts, question, answers = task.facts(rng, digits)
    asked_at = [depth, *rng.random(len(facts) - 1)]
    if task.name == "multi_key":  # the one that is asked is at `depth`
        name = question.split()[3].rstrip("?")
        facts = sorted(facts, key=lambda fact: f" {name} " not in fact)
    elif len(facts) > 1:
        asked_at = sorted(asked_at)  # values are told in the order in which they are asked
    room = tokens - sum(len(vocabulary.encode(text + " ")) for text in [*facts, question])
    if room < 0:
        raise ConfigError(
            f"{tokens} tokens are too few for the task {task.name} with {digits} digits: ask at greater lengths"
        )
    sentences = _filler(rng, room, vocabulary)
    places = [round(at * len(sentences)) for at in asked_at]
    for place, _, fact in sorted(zip(places, range(len(facts)), facts, strict=True), reverse=True):
        sentences.insert(place, fact)  # the last first, so that facts at one place keep their order
    return Question(" ".join([*sentences, question]), answers)


def _filler(rng: np.random.Generator, room: int, vocabulary: Vocabulary) -> list[str]:
    """Sentences of at most `room` tokens."""
    costs = [len(vocabulary.encode(sentence + " ")) for sentence in FILLER]
    found: list[str] = []
    while room >= max(costs):
        index = int(rng.integers(0, len(FILLER)))
        found.append(FILLER[index])
        room -= costs[index]
    return found


def answer(model: TextModel, question: Question, vocabulary: Vocabulary) -> list[str]:
    """The digits that greedy decoding writes after the question, cut into numbers as long as the answers."""
    model.read(question.text)
    wanted = sum(map(len, question.answers))
    budget = len(vocabulary.encode(" " + ", ".join(question.answers))) + 2
    written = "".join(model.write(budget, Sampling(temperature=0.0)))
    digits = "".join(character for character in written if character in "0123456789")[:wanted]
    found, at = [], 0
    for expected in question.answers:
        found.append(digits[at : at + len(expected)])
        at += len(expected)
    return found


def score(found: Sequence[str], question: Question) -> tuple[bool, float]:
    """Whether every number is right, and the share of digits that are."""
    right = sum(a == b for x, y in zip(found, question.answers, strict=True) for a, b in zip(x, y, strict=False))
    return list(found) == list(question.answers), right / sum(map(len, question.answers))


def training_texts(task: Task, documents: int, characters: int, digits: int, seed: int) -> Iterator[str]:
    """Documents of about `characters` that teach a task: facts, and questions about them again and again.

    Mostly nothing or little lies between, so that there is much to learn from; now and then a lot, so that the answer before
    is out of sight.
    """
    rng = np.random.default_rng(seed)
    for _ in range(documents):
        facts, question, answers = task.facts(rng, digits)
        order = rng.permutation(len(facts)) if task.name == "multi_key" else range(len(facts))
        parts = [_sentences(rng, int(rng.integers(0, 4))), *(facts[index] for index in order)]
        asked = f"{question} {', '.join(answers)}."
        while sum(map(len, parts)) < characters:
            least, most = GAPS[int(rng.choice(len(GAPS), p=GAP_SHARES))]
            gap = rng.integers(least, most + 1)
            parts += [_sentences(rng, int(gap)), asked]
        yield " ".join(part for part in parts if part) + "\n"


def _sentences(rng: np.random.Generator, count: int) -> str:
    return " ".join(FILLER[index] for index in rng.integers(0, len(FILLER), count))


def default_lengths(block_length: int, sequence_length: int) -> list[int]:
    """Half a block, then doubled up to the sample."""
    found = []
    length = max(block_length // 2, 48)
    while length <= sequence_length:
        found.append(length)
        length *= 2
    return found


def nth_question(
    vocabulary: Vocabulary, task: Task, tokens: int, depth: float, digits: int, number: int, seed: int
) -> Question:
    """The `number`-th question at this length and depth. Raises ConfigError where so many tokens are too few."""
    rng = np.random.default_rng([seed, tokens, round(1000 * depth), number])
    return ask(task, rng, tokens, depth, digits, vocabulary)


def trial(
    new_text: Callable[[], TextModel], vocabulary: Vocabulary, task: Task, tokens: int, depth: float, digits: int, number: int,
    seed: int,
) -> dict[str, Any]:  # fmt: skip
    """The `number`-th question put to a new text: exact, digits (share right), asked, written."""
    question = nth_question(vocabulary, task, tokens, depth, digits, number, seed)
    found = answer(new_text(), question, vocabulary)
    exact, share = score(found, question)
    return {"exact": exact, "digits": share, "asked": ", ".join(question.answers), "written": ", ".join(found)}


def summary(tokens: int, depth: float, trials: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Means over the trials of one length and depth, and the first of them."""
    return {
        "tokens": tokens,
        "depth": depth,
        "exact": float(np.mean([row["exact"] for row in trials])),
        "digits": float(np.mean([row["digits"] for row in trials])),
        "trials": len(trials),
        "example": {"asked": trials[0]["asked"], "written": trials[0]["written"]},
    }
