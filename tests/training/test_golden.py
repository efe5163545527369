"""Golden losses: 20 steps of a tiny run, kept in the repo. `python -m tests.training.test_golden` writes them anew."""

from __future__ import annotations

import json
import sys
import tempfile
from pathlib import Path

import pytest

from em_megatron.parallel.process_groups import shutdown
from em_megatron.training.loop import train
from em_megatron.training.setup import set_up
from tests.training import corpora

GOLDEN = Path(__file__).with_name("golden_losses.json")
# Another CPU or torch release sums in another order; over 20 steps at a high rate that stays below this.
TOLERANCE = 1e-4


def tiny_run(corpus: Path, folder: Path) -> dict[str, list[float]]:
    """Training and held-out losses by step."""
    try:
        train(set_up(corpora.run_config(corpus, folder, "validation.interval=10"), world_size=1))
    finally:
        shutdown()
    rows = [json.loads(line) for line in (folder / "test" / "metrics.jsonl").read_text().splitlines()]
    return {kind: [row["loss"] for row in rows if row["kind"] == kind] for kind in ("train", "validation")}


def test_losses_are_the_golden_ones(chain_corpus, tmp_path):
    golden, found = json.loads(GOLDEN.read_text()), tiny_run(chain_corpus, tmp_path)
    assert len(golden["train"]) == 20
    assert found["train"] == pytest.approx(golden["train"], rel=TOLERANCE)
    assert found["validation"] == pytest.approx(golden["validation"], rel=TOLERANCE)
    assert golden["train"][-1] < golden["train"][0] - 0.5


def main() -> int:
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        corpus = corpora.chain_corpus(folder / "corpus", corpora.tokenizer(folder))
        GOLDEN.write_text(json.dumps(tiny_run(corpus, folder / "runs"), indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
