"""Several corpora read in exact proportions, as a pure function of the sample number.

Which corpus gives sample n follows Tijdeman's rule for the chairman assignment problem (R. Tijdeman, The chairman
assignment problem, Discrete Mathematics 32, 1980): of k corpora with the shares λ_i, after any number n of samples corpus i
has given within 1 - 1/(2k - 2) of λ_i·n, so never a whole sample more or less than its share. Shares are rounded to common
denominators of at most RESOLUTION, so the choices repeat after D samples, in which corpus i gives exactly λ_i·D.
"""

import hashlib
import json
import math
import re
import shlex
from collections.abc import Sequence
from fractions import Fraction
from functools import cached_property
from pathlib import Path
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from em_megatron.data.manifest import DataError
from em_megatron.data.stream import Sample, TokenStream

RESOLUTION = 100_000


class Entry(NamedTuple):
    """A corpus of a blend and its weight."""

    weight: Fraction
    location: str


class Phase(NamedTuple):
    """From sample `start` of the run on, corpora are read in these shares, whose sum is 1."""

    start: int
    shares: tuple[Fraction, ...]


def parse_blend(text: str) -> list[Entry]:
    """`CORPUS`, or `WEIGHT CORPUS WEIGHT CORPUS ...`, each corpus quoted as in a shell where it has spaces.

    A text that does not begin with a number, or is a folder, is one corpus. Raises DataError for a weight that is none.
    """
    begins_with_weight = _number(text.split(maxsplit=1)[0]) is not None if text.strip() else False
    if not begins_with_weight or Path(text).expanduser().exists():
        return [Entry(Fraction(1), text)]
    try:
        words = shlex.split(text)
    except ValueError as error:
        raise DataError(f"data.path {text!r} cannot be read ({error}); quote it as in a shell") from None
    if len(words) % 2:
        raise DataError(f"data.path {text!r} is no list of weights and corpora; write WEIGHT CORPUS WEIGHT CORPUS")
    entries = []
    for weight, location in zip(words[::2], words[1::2], strict=True):
        number = _number(weight)
        if number is None:
            raise DataError(
                f"data.path {text!r} has {weight!r} where a weight of at least 0 belongs; write W PATH W PATH"
            )
        entries.append(Entry(number, location))
    return entries


def parse_changes(texts: Sequence[str], corpora: int) -> list[tuple[int, list[Fraction]]]:
    """`SAMPLE WEIGHT WEIGHT ...` each. Raises DataError for one that is not of this form, or out of order."""
    found: list[tuple[int, list[Fraction]]] = []
    for text in texts:
        first, *others = text.split() or [""]
        weights = [_number(word) for word in others]
        if not re.fullmatch("[0-9]+", first) or len(weights) != corpora or None in weights:
            raise DataError(
                f"data.blend_changes has {text!r}; write the sample from which it holds and a weight of at least 0 for each "
                f"of the {corpora} corpora of data.path"
            )
        if int(first) <= (found[-1][0] if found else 0):
            raise DataError(f"data.blend_changes has sample {first} out of order; write growing numbers above 0")
        found.append((int(first), [weight for weight in weights if weight is not None]))
    return found


def _number(word: str) -> Fraction | None:
    try:
        value = Fraction(word)
    except (ValueError, ZeroDivisionError):
        return None
    return value if value >= 0 else None


def shares_of(weights: Sequence[Fraction]) -> tuple[Fraction, ...]:
    """Shares with the sum 1, exact where their common denominator is at most RESOLUTION, else rounded to it.

    Raises DataError where no weight is above 0, or one that is would be rounded to nothing.
    """
    total = sum(weights)
    if not total:
        raise DataError("the weights of the blend are all 0; give one corpus a weight above 0")
    shares = [weight / total for weight in weights]
    if math.lcm(*(share.denominator for share in shares)) <= RESOLUTION:
        return tuple(shares)
    parts = [int(share * RESOLUTION) for share in shares]
    remainders = [share * RESOLUTION - part for share, part in zip(shares, parts, strict=True)]
    for index in sorted(range(len(parts)), key=lambda i: -remainders[i])[: RESOLUTION - sum(parts)]:
        parts[index] += 1
    if any(weight and not part for weight, part in zip(weights, parts, strict=True)):
        raise DataError(f"a corpus of the blend has a share below 1/{RESOLUTION}; give it a larger weight, or 0")
    return tuple(Fraction(part, RESOLUTION) for part in parts)


def choices(shares: Sequence[Fraction]) -> NDArray[np.int64]:
    """One period of Tijdeman's rule: the corpus of samples 0 to D-1, D the shares' common denominator."""
    period = math.lcm(*(share.denominator for share in shares))
    parts = [int(share * period) for share in shares]
    used = [index for index, part in enumerate(parts) if part]
    if len(used) == 1:
        return np.array(used, np.int64)
    scale, given, chosen = 2 * len(used) - 2, dict.fromkeys(used, 0), np.empty(period, np.int64)
    for step in range(period):
        best, slack = -1, 0
        for index in used:
            lag = scale * (parts[index] * (step + 1) - period * given[index])  # how far behind, times D·(2k - 2)
            if lag < period:
                continue
            mine = period * (scale - 1) - lag  # over its share: how long it can still wait
            if best < 0 or mine * parts[best] < slack * parts[index]:
                best, slack = index, mine
        chosen[step] = best
        given[best] += 1
    return chosen


class _Period:
    """The choices of one phase, with the samples of each corpus counted."""

    def __init__(self, shares: Sequence[Fraction]) -> None:
        self.chosen = choices(shares)
        self.before = np.zeros((len(self.chosen) + 1, len(shares)), np.int64)
        self.before[np.arange(1, len(self.chosen) + 1), self.chosen] = 1
        np.cumsum(self.before, axis=0, out=self.before)

    def counts(self, samples: int) -> NDArray[np.int64]:
        """[corpora] how many of the first `samples` each corpus gives."""
        periods, rest = divmod(samples, len(self.chosen))
        return periods * self.before[-1] + self.before[rest]


class Blend:
    """Which corpus gives sample n, and which of its samples that is.

    phases: the first begins at sample 0, the others after it, in order.
    """

    def __init__(self, phases: Sequence[Phase]) -> None:
        self.phases = tuple(phases)

    @cached_property
    def _periods(self) -> list[_Period]:
        return [_Period(phase.shares) for phase in self.phases]

    @cached_property
    def _bases(self) -> list[NDArray[np.int64]]:
        """Samples of each corpus before each phase."""
        bases = [np.zeros(len(self.phases[0].shares), np.int64)]
        for period, phase, following in zip(self._periods, self.phases, self.phases[1:], strict=False):
            bases.append(bases[-1] + period.counts(following.start - phase.start))
        return bases

    def _phase(self, n: int) -> int:
        return max(index for index, phase in enumerate(self.phases) if phase.start <= n)

    def counts(self, n: int) -> NDArray[np.int64]:
        """[corpora] how many of samples 0 to n-1 each corpus gives."""
        phase = self._phase(n)
        return self._bases[phase] + self._periods[phase].counts(n - self.phases[phase].start)

    def choose(self, n: int) -> tuple[int, int]:
        """(corpus, number of the sample in that corpus' own order) of sample n."""
        phase = self._phase(n)
        period = self._periods[phase]
        corpus = int(period.chosen[(n - self.phases[phase].start) % len(period.chosen)])
        return corpus, int(self.counts(n)[corpus])

    def identity(self, corpora: Sequence[str], n: int) -> str:
        """What samples 0 to n-1 depend on: the corpora read by then and their shares over time.

        corpora: the identity of each. A single corpus has its own. Equal identities mean equal samples so far, so phases
        that begin later may change, and corpora that were not read yet may come and go.
        """
        past = [phase for phase in self.phases if phase.start < max(n, 1)]
        read = [index for index in range(len(corpora)) if any(phase.shares[index] for phase in past)]
        if len(read) == 1:
            return corpora[read[0]]
        shares = [[phase.start, *(str(phase.shares[index]) for index in read)] for phase in past]
        text = json.dumps([[corpora[index] for index in read], shares])
        return hashlib.sha256(text.encode()).hexdigest()


class BlendedStream:
    """The samples of a run: each from one of several streams, in the proportions of a blend.

    streams: one per corpus; with slots, each with its share of the global batch.
    slots: G where memory is carried: slot g of every batch then belongs to one corpus.
    Raises DataError where the slots cannot be shared out so.
    """

    def __init__(self, streams: Sequence[TokenStream], blend: Blend, slots: int = 0) -> None:
        self.streams, self.blend, self.slots = tuple(streams), blend, slots

    def sample(self, n: int) -> Sample:
        """Sample n of the run, as TokenStream.sample gives it; `slot` is that of the whole batch."""
        corpus, number = self.blend.choose(n)
        sample = self.streams[corpus].sample(number)
        if self.slots:
            sample["slot"] = np.array(n % self.slots, dtype=np.int64)
        return sample

    def epochs(self, n: int) -> list[float]:
        """How often each corpus was read when samples 0 to n-1 of the run were."""
        return [stream.epochs(int(count)) for stream, count in zip(self.streams, self.blend.counts(n), strict=True)]


def slots_of(blend: Blend, slots: int) -> list[int]:
    """How many of the slots of a batch belong to each corpus, so that the choices repeat with every batch.

    Raises DataError where a share of the slots is not whole, or shares change on the way.
    """
    if len(blend.phases) > 1:
        raise DataError(
            "data.blend_changes cannot be used with memory.carry_memory, whose slots stay with their corpus"
        )
    shares = [share * slots for share in blend.phases[0].shares]
    if any(share.denominator > 1 for share in shares):
        near = " ".join(str(round(float(share), 2)) for share in shares)
        raise DataError(
            f"with memory.carry_memory each corpus needs whole slots of the {slots} samples of a batch, and the weights give "
            f"{near}: change data.path's weights or training.global_batch_size"
        )
    return [int(share) for share in shares]
