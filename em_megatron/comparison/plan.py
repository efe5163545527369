"""A plan of a comparison: a base recipe, and groups of cells (kind × memory size × model size × corpus × seed).

    PLAN.yaml  ->  Plan  ->  cells: a name and the overrides of the base recipe with which pretrain.py runs it

The Elastic Memory of the base recipe is 1x; the other kinds get the sizes with which they keep as many numbers per
sequence (`kinds.matching`).
"""

from __future__ import annotations

import copy
import itertools
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from omegaconf import MISSING, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from em_megatron.config import ConfigError, RunConfig, load_config, option
from em_megatron.kinds import kind_of
from em_megatron.kinds.matching import COMPARED, can_match, matched
from em_megatron.model.sizes import Costs, costs, memory_floats_per_sequence, padded_vocab_size
from em_megatron.validate import validate

PLANS = Path(__file__).parents[2] / "launch" / "plans"
FOLLOWS_ORDER = "order"


@dataclass
class CorpusPlan:
    """Where a corpus comes from: one of domain, texts, shards, recall."""

    domain: str | None = option(None, "of tokenizer.domains: prose, code, manuals; fetched and encoded when needed")
    texts: str | None = option(None, "folder of .txt files; encoded when needed")
    shards: str | None = option(None, "folder written by tokenizer.encode")
    recall: str | None = option(None, "texts made to teach a task of evaluation.recall: passkey, single, ...")
    recall_documents: int = option(4000, "recall: texts made")
    recall_digits: int = option(3, "recall: digits of a number")


@dataclass
class Group:
    """Cells that are run: the product of the lists."""

    kinds: list[str] = option([], "names of kinds.matching.COMPARED (elastic, memorizing_dense, ...) or of variants")
    factors: list[int] = option(
        [1], "memory sizes, in those of the base recipe's Elastic Memory; kinds without a size have one"
    )
    corpora: list[str] = option([], "names of corpora")
    sizes: list[str] = option([], "names of sizes")
    seeds: list[int] = option([1], "seeds of initial weights and order of data")
    suite: str = option("", "parts of launch/evaluate.py --suite for these cells; empty: the plan's")


@dataclass
class SpeedPlan:
    """Short runs, one at a time, of which only the speed is kept."""

    kinds: list[str] = option([], "as in groups, at 1x; NAME_FACTORx for other sizes")
    sizes: list[str] = option([], "names of sizes")
    corpus: str = option("", "name of a corpus")
    steps: int = option(12, "steps of a run; the first quarter is not counted")


@dataclass
class Claim:
    """A comparison that the report answers: is the held-out loss of `better` lower than that of `than`?"""

    text: str = option(MISSING, "what is claimed")
    better: str = option(MISSING, "label of a row, such as elastic_1x")
    than: str = option(MISSING, "label of a row")


@dataclass
class Plan:
    """The whole comparison."""

    name: str = option(MISSING, "name of the comparison: its runs lie in output_dir/name")
    output_dir: str = option("runs/compare", "folder of all comparisons")
    base: dict[str, Any] = field(default_factory=dict, metadata={"help": "the recipe that all cells share"})
    vocab_size: int = option(1024, "tokenizer of corpora that are encoded here (of the others theirs counts)")
    corpora: dict[str, CorpusPlan] = field(default_factory=dict)
    sizes: dict[str, Any] = field(default_factory=dict, metadata={"help": "name: overrides such as model.hidden_size"})
    variants: dict[str, Any] = field(
        default_factory=dict, metadata={"help": "name: keys of the memory section; slots: order follows the order"}
    )
    groups: list[Group] = field(default_factory=list)
    speed: SpeedPlan = field(default_factory=SpeedPlan)
    suite: str = option("perplexity", "parts of launch/evaluate.py --suite for every cell, with their options")
    evaluate: list[str] = option([], "further arguments of launch/evaluate.py for every cell")
    evaluator: str = option(
        "", "label of the row whose run (same corpus and size, first seed) finds the key tokens of long_ppl"
    )
    claims: list[Claim] = field(default_factory=list)
    ranks: int = option(1, "processes of a run (GPUs), by torchrun where more than one")
    workers: int = option(1, "runs at a time on one machine")
    threads: int = option(1, "CPU threads of a process")

    @property
    def folder(self) -> Path:
        return Path(self.output_dir).expanduser() / self.name

    def shards(self, corpus: str) -> Path:
        """Folder of the corpus' shards, whether they are there yet or not."""
        found = self.corpora[corpus]
        return Path(found.shards).expanduser() if found.shards else self.prepared(corpus) / "shards"

    def prepared(self, corpus: str) -> Path:
        """Where a corpus that is encoded here lies; comparisons share those of domains."""
        source = self.corpora[corpus]
        folder = f"{source.domain}-{self.vocab_size}" if source.domain else f"{self.name}-{corpus}-{self.vocab_size}"
        if source.recall:
            folder = f"{source.recall}-{source.recall_digits}-{source.recall_documents}-{self.vocab_size}"
        return Path(self.output_dir).expanduser() / "corpora" / folder


@dataclass(frozen=True)
class Cell:
    """One run: `overrides` of the base recipe; label is the kind with its factor, as in tables."""

    name: str
    label: str
    kind: str
    factor: int
    corpus: str
    size: str
    seed: int
    overrides: tuple[str, ...]
    config: RunConfig
    costs: Costs
    suite: str
    speed_only: bool = False

    @property
    def run_dir(self) -> Path:
        return self.config.run_dir


def load_plan(path: Path | str, overrides: Sequence[str] = ()) -> Plan:
    """A plan file, or the name of one in launch/plans; overrides as `base.training.train_steps=10`.

    Raises:
        ConfigError: missing file, unknown key, wrong type.
    """
    found = Path(path) if Path(path).is_file() else PLANS / f"{path}.yaml"
    if not found.is_file():
        known = ", ".join(sorted(plan.stem for plan in PLANS.glob("*.yaml")))
        raise ConfigError(f"plan '{path}' does not exist: give a YAML file, or one of {known}")
    try:
        tree = OmegaConf.merge(
            OmegaConf.structured(Plan), OmegaConf.load(found), OmegaConf.from_dotlist(list(overrides))
        )
        plan = OmegaConf.to_object(tree)
    except (OmegaConfBaseException, TypeError) as error:  # TypeError: an override of a part of a list
        raise ConfigError(f"plan {found}: {str(error).splitlines()[0]} (lists are overridden whole)") from None
    assert isinstance(plan, Plan)
    _check(plan, found)
    return plan


def _check(plan: Plan, path: Path) -> None:
    """Raises ConfigError for names that nothing has."""
    if plan.name in ("", MISSING):
        raise ConfigError(f"plan {path} has no name")
    for name, corpus in plan.corpora.items():
        if sum(source is not None for source in (corpus.domain, corpus.texts, corpus.shards, corpus.recall)) != 1:
            raise ConfigError(f"plan {path}: corpus '{name}' needs one of domain, texts, shards, recall")
    wanted: list[Group | SpeedPlan] = [*plan.groups, *([plan.speed] if plan.speed.kinds else [])]
    for group in wanted:
        corpora = group.corpora if isinstance(group, Group) else [group.corpus]
        known = {"corpus": (corpora, plan.corpora), "size": (group.sizes, plan.sizes)}
        for what, (names, table) in known.items():
            for name in names:
                if name not in table:
                    raise ConfigError(f"plan {path}: {what} '{name}' is not one of {', '.join(table) or 'none'}")
        for kind in group.kinds:
            _section(plan, kind.rpartition("_")[0] if _factor_of(kind) else kind)


def _factor_of(kind: str) -> int:
    """The factor in NAME_FACTORx, 0 where there is none."""
    last = kind.rpartition("_")[2]
    return int(last[:-1]) if last[-1:] == "x" and last[:-1].isdigit() else 0


def _section(plan: Plan, kind: str) -> dict[str, Any]:
    """What a kind of the plan changes of the memory section."""
    if kind in plan.variants:
        return dict(plan.variants[kind])
    if kind in COMPARED:
        return dict(COMPARED[kind])
    known = ", ".join([*COMPARED, *plan.variants])
    raise ConfigError(f"kind '{kind}' of the plan is unknown: it is one of {known}")


def base_recipe(plan: Plan) -> RunConfig:
    """The recipe all cells share, as a checked tree with the plan's name.

    Raises:
        ConfigError: see `load_config`.
    """
    plan.folder.mkdir(parents=True, exist_ok=True)
    path = plan.folder / "base.yaml"
    path.write_text(base_text(plan))
    return load_config(path)


def base_text(plan: Plan) -> str:
    """The base recipe as YAML text."""
    tree = copy.deepcopy(plan.base)
    tree.setdefault("name", plan.name)
    tree["output_dir"] = str(plan.folder)
    tree.setdefault("data", {}).setdefault("path", "")
    return OmegaConf.to_yaml(OmegaConf.create(tree))


@dataclass(frozen=True)
class Place:
    """Where in the grid cells lie; steps: of a measurement of speed, 0 otherwise."""

    corpus: str
    size: str
    seed: int
    suite: str
    steps: int = 0


def cells_of(plan: Plan) -> list[Cell]:
    """Every cell once, those of the speed measurement last; all are checked before any is run.

    Raises:
        ConfigError: a cell that cannot be run, by its name.
    """
    base_recipe(plan)
    found: dict[str, Cell] = {}
    for group in plan.groups:
        for corpus, size, seed in itertools.product(group.corpora, group.sizes, group.seeds):
            place = Place(corpus, size, seed, group.suite or plan.suite)
            for kind in group.kinds:
                for cell in _cells(plan, kind, group.factors, place):
                    found.setdefault(cell.name, cell)
    for size, kind in itertools.product(plan.speed.sizes, plan.speed.kinds):
        factor = _factor_of(kind)
        name = kind.rpartition("_")[0] if factor else kind
        place = Place(plan.speed.corpus, size, 1, "", plan.speed.steps)
        (cell,) = _cells(plan, name, [factor or 1], place)
        found[cell.name] = cell
    cells = list(found.values())
    return [_with_judge(plan, cells, cell) for cell in cells]


def _with_judge(plan: Plan, cells: Sequence[Cell], cell: Cell) -> Cell:
    """The cell, without LongPPL where the plan's evaluator is not among the cells of its corpus and size."""
    parts = cell.suite.split(",")
    if "long_ppl" not in parts or not plan.evaluator or evaluator_of(plan, cells, cell) is not None:
        return cell
    return replace(cell, suite=",".join(part for part in parts if part != "long_ppl"))


def evaluator_of(plan: Plan, cells: Sequence[Cell], cell: Cell) -> Path | None:
    """The run that finds the key tokens for a cell, None where the plan names none or the comparison has none."""
    same = [
        other
        for other in cells
        if (other.label, other.corpus, other.size) == (plan.evaluator, cell.corpus, cell.size) and not other.speed_only
    ]
    return min(same, key=lambda other: other.seed).run_dir if same else None


def _cells(plan: Plan, kind: str, factors: Sequence[int], place: Place) -> list[Cell]:
    """A kind at its memory sizes."""
    sized = load_config(plan.folder / "base.yaml", _size_overrides(plan, place.size))
    elastic = replace(sized.memory, kind="elastic")
    once = memory_floats_per_sequence(sized.model, elastic, sized.data.sequence_length)
    section = _section(plan, kind)
    follows = section.get("slots") == FOLLOWS_ORDER
    memory = replace(elastic, **{key: value for key, value in section.items() if value != FOLLOWS_ORDER})
    sizable = can_match(memory)
    found = []
    for factor in factors if sizable else [0]:
        settings = section | matched(sized.model, memory, sized.data.sequence_length, factor * once).settings
        if follows:
            settings["slots"] = settings.get("order", memory.order)
        found.append(_cell(plan, kind, factor, place, settings))
    return found


def _size_overrides(plan: Plan, size: str) -> list[str]:
    return [f"{key}={value}" for key, value in dict(plan.sizes[size] or {}).items()]


def _cell(plan: Plan, kind: str, factor: int, place: Place, memory: dict[str, Any]) -> Cell:
    label = f"{kind}_{factor}x" if factor else kind
    name = f"speed-{place.size}-{label}" if place.steps else f"{place.corpus}-{place.size}-{label}-seed{place.seed}"
    overrides = [
        f"name={name}",
        f"seed={place.seed}",
        f"data.path={plan.shards(place.corpus)}",
        *_size_overrides(plan, place.size),
        *(f"memory.{key}={value}" for key, value in memory.items()),
    ]
    if place.steps:
        overrides += [f"training.train_steps={place.steps}", f"optimizer.warmup_steps={max(1, place.steps // 4)}"]
        overrides += ["validation.interval=0"]
    try:
        config = load_config(plan.folder / "base.yaml", overrides)
        validate(config, plan.ranks)
    except ConfigError as error:
        raise ConfigError(f"cell {name}: {error}") from None
    vocab = padded_vocab_size(plan.vocab_size, config.model.make_vocab_size_divisible_by)
    cost = costs(config.model, config.memory, vocab, config.data.sequence_length)
    return Cell(
        name, label, kind, factor, place.corpus, place.size, place.seed, tuple(overrides), config, cost, place.suite,
        place.steps > 0,
    )  # fmt: skip


def grows(cell: Cell) -> bool:
    """Whether the cell's memory grows with the context."""
    return kind_of(cell.config.memory).grows
