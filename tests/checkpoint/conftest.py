"""The two ranks that all tests of this folder share: starting them costs more than what they do."""

import gc
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest

from tests.multi_rank import RankError, run_ranks


def probe(root: Path) -> dict[str, Any]:
    """What every test of this folder looks at, by its module."""
    from em_megatron.parallel import process_groups

    process_groups.initialize()  # the CPU backend, before Megatron is imported
    from tests.checkpoint import test_asynchronous, test_extra, test_optimizer_formats, test_sharded

    import_module("tests.tiny_megatron")
    gc.freeze()  # the distributed optimizer collects garbage at each save and load: 0.1 s with Megatron imported
    return {
        "sharded": test_sharded.probe(root / "sharded"),
        "asynchronous": test_asynchronous.probe(root / "asynchronous"),
        "formats": test_optimizer_formats.probe(root / "formats"),
        "extra": test_extra.probe(root / "extra"),
        "killed": test_sharded.go_on_after_death(root),
    }


@pytest.fixture(scope="session")
def ranks(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """`probe` on two ranks, after two others died in the middle of saves to the same folder."""
    from tests.checkpoint.test_sharded import die_while_saving

    root = tmp_path_factory.mktemp("checkpoints")
    with pytest.raises(RankError, match="Rank 1 was ended by signal 9"):
        run_ranks(die_while_saving, 2, root, timeout=140)
    return run_ranks(probe, 2, root, timeout=240)
