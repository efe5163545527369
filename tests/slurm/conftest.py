"""A Slurm of two nodes for all tests of this folder, a corpus, and the run that nothing disturbs."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from tests.multi_rank import Pools
from tests.slurm.box import SlurmBox, missing_programs
from tests.slurm.jobs import STEPS, overrides
from tests.training.corpora import chain_corpus, tokenizer


@pytest.fixture(scope="session")
def slurm_packages() -> None:
    if torch.cuda.is_available():
        pytest.skip("jobs of these tests run on CPU nodes")
    if missing := missing_programs():
        assert not os.environ.get("CI"), f"{', '.join(missing)} missing: .ci/run installs Slurm"
        pytest.skip(f"{', '.join(missing)} missing: apt-get install slurmctld slurmd slurm-client munge, as root")


@pytest.fixture(scope="session")
def box(slurm_packages: None, ranks: Pools, tmp_path_factory: pytest.TempPathFactory) -> Iterator[SlurmBox]:
    ranks.close()  # the threads of idle ranks would take time from the jobs
    with SlurmBox(tmp_path_factory.mktemp("slurm"), prefix=f"n{os.getpid()}-") as started:
        yield started


@pytest.fixture(scope="session")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("corpus")
    return chain_corpus(folder / "shards", tokenizer(folder))


@pytest.fixture(scope="session")
def undisturbed(corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The run folder of two ranks that run through, started by torchrun without Slurm."""
    runs = tmp_path_factory.mktemp("undisturbed")
    recipe = "launch/recipes/pretrain_1b.yaml"
    command = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--standalone",
        "--nproc-per-node=2",
        "launch/pretrain.py",
    ]
    done = subprocess.run(
        [*command, recipe, *overrides(corpus, runs, "whole", STEPS)], capture_output=True, text=True, timeout=250
    )
    assert done.returncode == 0, done.stderr
    return runs / "whole"
