"""Versions of Python, of the packages that pyproject.toml asks for, and of CUDA."""

from __future__ import annotations

import importlib
import importlib.metadata
import platform
import re
from collections.abc import Iterator
from functools import partial
from typing import TYPE_CHECKING

from em_megatron.environment import nvidia_driver
from em_megatron.environment.report import Level, Row, attempt

if TYPE_CHECKING:
    from packaging.requirements import Requirement
    from packaging.specifiers import SpecifierSet

DISTRIBUTION = "em-megatron"
EXTRA = "gpu"  # the extra whose packages are looked at too
TRAINING_GOES_ON_WITHOUT = ("tensorboard", "matplotlib", "wandb", "transformers", "safetensors")
MODULES = {"megatron-core": "megatron.core"}  # where the module is not called as the distribution


def package_versions() -> Iterator[Row]:
    """One row for Python and for each package that the installed em-megatron requires."""
    try:
        metadata = importlib.metadata.metadata(DISTRIBUTION)
    except importlib.metadata.PackageNotFoundError:
        yield Row(DISTRIBUTION, "is not installed: pip install -e . in the folder of its pyproject.toml", "ERROR")
        return
    yield Row(DISTRIBUTION, metadata["Version"])
    yield python_row(metadata["Requires-Python"])
    for line in importlib.metadata.requires(DISTRIBUTION) or []:
        name = re.split(r"[^\w.-]", line)[0]
        yield from attempt(name, partial(_requirement_rows, line))


def python_row(allowed: str) -> Row:
    """The running Python beside what is allowed."""
    from packaging.specifiers import SpecifierSet

    running, specifier = platform.python_version(), SpecifierSet(allowed)
    if specifier.contains(running, prereleases=True):
        return Row("python", f"{running} ({spelled(specifier)})")
    return Row("python", f"{running} runs, but {spelled(specifier)} is needed", "ERROR")


def package_row(requirement: Requirement, in_extra: bool = False) -> Row:
    """A package beside what is allowed, imported where training cannot do without it.

    Args:
        requirement: a distribution and its allowed versions.
        in_extra: whether only an extra asks for it.
    """
    name, allowed = requirement.name, spelled(requirement.specifier)
    spared = in_extra or name in TRAINING_GOES_ON_WITHOUT
    wrong: Level = "warning" if spared else "ERROR"
    try:
        version = importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return Row(name, f"is not installed: pip install '{name}{allowed}'", "note" if in_extra else wrong)
    if not requirement.specifier.contains(version, prereleases=True):
        return _outside(requirement, version, wrong)
    if not spared:
        importlib.import_module(MODULES.get(name, name.replace("-", "_")))
    return Row(name, f"{version} ({allowed})")


def spelled(specifier: SpecifierSet) -> str:
    """Lower bounds first."""
    return ",".join(sorted((str(bound) for bound in specifier), reverse=True))


def cuda_versions() -> Iterator[Row]:
    """CUDA of torch beside that of the driver."""
    import torch

    built, supported = torch.version.cuda, nvidia_driver.cuda_version()
    of_torch = f"torch is built for {built}" if built else "torch is built without CUDA"
    if supported is None:
        yield Row("CUDA", f"{of_torch}; there is no NVIDIA driver", "note")
        return
    text = f"{of_torch}; driver {nvidia_driver.version() or 'of unknown version'} supports up to {'.'.join(map(str, supported))}"
    too_old = built is not None and int(built.split(".")[0]) > supported[0]
    yield Row(
        "CUDA", text + ": update the driver, or install a torch built for it" * too_old, "ERROR" if too_old else "ok"
    )


def _requirement_rows(line: str) -> Iterator[Row]:
    from packaging.requirements import Requirement

    requirement = Requirement(line)
    marker = requirement.marker
    if marker is None or marker.evaluate({"extra": ""}):
        yield package_row(requirement)
    elif marker.evaluate({"extra": EXTRA}):
        yield package_row(requirement, in_extra=True)


def _outside(requirement: Requirement, version: str, level: Level) -> Row:
    from packaging.version import Version

    name, allowed = requirement.name, spelled(requirement.specifier)
    if requirement.specifier.contains(Version(version).base_version):  # vendors' containers carry such builds of torch
        return Row(name, f"{version} is a pre-release of a version that {allowed} allows", "warning")
    return Row(name, f"{version} is outside {allowed}: pip install '{name}{allowed}'", level)
