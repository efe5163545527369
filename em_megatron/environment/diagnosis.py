"""Runs all probes and collects what they find."""

from __future__ import annotations

import contextlib
import io
import logging
import warnings
from collections.abc import Collection, Iterator

from em_megatron.environment import (
    communication,
    devices,
    network,
    operators,
    optional_packages,
    slurm,
    versions,
)
from em_megatron.environment.report import Level, Probe, Report, Section, attempt

# Title of a section → (name of the row if the probe raises, its level then, the probe).
SECTIONS: dict[str, tuple[tuple[str, Level, Probe], ...]] = {
    "versions": (
        ("versions", "ERROR", versions.package_versions),
        ("CUDA", "ERROR", versions.cuda_versions),
        ("apex", "ERROR", optional_packages.apex),
        ("transformer-engine", "ERROR", optional_packages.transformer_engine),
    ),
    "devices": (
        ("GPU", "ERROR", devices.gpus),
        ("processors", "warning", devices.processors),
        ("disks", "warning", devices.disks),
        ("shared memory", "warning", devices.shared_memory),
        ("limits", "warning", devices.limits),
    ),
    "operators": (
        ("CPU backend", "ERROR", operators.cpu_backend),
        ("memory and attention", "ERROR", operators.block_operators),
        ("RMSNorm", "ERROR", operators.norm),
        ("SwiGLU", "ERROR", operators.swiglu),
        ("cross entropy", "ERROR", operators.cross_entropy),
        ("gradient accumulation", "ERROR", operators.gradient_accumulation_fusion),
        ("gradient clipping", "ERROR", operators.gradient_clipping),
        ("optimizer", "ERROR", operators.optimizer),
    ),
    "communication": (
        ("gloo", "ERROR", communication.gloo),
        ("NCCL", "ERROR", communication.nccl),
        ("interfaces", "warning", network.interfaces),
        ("InfiniBand", "warning", network.infiniband),
        ("hostname", "warning", network.hostname),
        ("variables", "warning", network.variables),
        ("Slurm", "warning", slurm.slurm),
    ),
}


def examine(titles: Collection[str] = tuple(SECTIONS)) -> Report:
    """The report, or the sections of it that `titles` names.

    "operators" imports Megatron-Core, and on a machine without a GPU enables the CPU backend.
    """
    with _quiet():
        sections = tuple(
            Section(title, tuple(row for name, failing, probe in probes for row in attempt(name, probe, failing)))
            for title, probes in SECTIONS.items()
            if title in titles
        )
        return Report(sections, devices.usable_gpus(), partial=len(sections) < len(SECTIONS))


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Nothing that an import prints, logs or warns of comes between the lines."""
    level = logging.root.manager.disable
    logging.disable(logging.CRITICAL)
    try:
        with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(level)
