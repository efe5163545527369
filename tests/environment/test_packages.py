"""Versions against pyproject.toml, and the three cases of apex and of Transformer Engine."""

from __future__ import annotations

import importlib.metadata
import platform
from pathlib import Path

import pytest
import torch
from packaging.requirements import Requirement

from em_megatron.environment import nvidia_driver, versions
from em_megatron.environment.optional_packages import apex, transformer_engine
from em_megatron.environment.report import Row, attempt
from tests.environment.fake_packages import importable

NEVER = "raise RuntimeError('apex was imported')"
TAKEN = "but Megatron-Core's bare `import apex` takes it for that and selects a fused layer norm that then fails"


def test_every_requirement_has_a_row_with_its_bounds() -> None:
    rows = {row.name: row for row in versions.package_versions()}
    assert rows["python"] == Row("python", f"{platform.python_version()} (>=3.12,<3.13)")
    assert rows["megatron-core"].text.endswith("(>=0.19,<0.20)")
    assert {"torch", "numpy", "webdataset", "sentencepiece", "wandb", "triton"} <= set(rows)
    assert "pytest" not in rows  # of the extra for developers


def test_versions_outside_are_flagged() -> None:
    installed = importlib.metadata.version("numpy")
    assert versions.package_row(Requirement("numpy>=1,<1.5")) == Row(
        "numpy", f"{installed} is outside >=1,<1.5: pip install 'numpy>=1,<1.5'", "ERROR"
    )
    assert versions.package_row(Requirement("wandb<0.1")).level == "warning"  # training goes on without it
    assert versions.package_row(Requirement("numpy<1"), in_extra=True).level == "warning"
    assert versions.python_row(">=3.10,<3.12").level == "ERROR"


def test_missing_packages_are_flagged() -> None:
    wanted = Requirement("no-such-package>=2")
    assert versions.package_row(wanted) == Row(
        "no-such-package", "is not installed: pip install 'no-such-package>=2'", "ERROR"
    )
    assert versions.package_row(wanted, in_extra=True).level == "note"


def test_a_pre_release_of_an_allowed_version_is_a_warning(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.metadata, "version", lambda name: "2.11.0a0+vendor")
    assert versions.package_row(Requirement("torch>=2.11")).level == "warning"
    assert versions.package_row(Requirement("torch>=2.12")).level == "ERROR"


def test_an_uninstalled_project_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(versions, "DISTRIBUTION", "no-such-package")
    (row,) = versions.package_versions()
    assert row.level == "ERROR"
    assert "pip install -e ." in row.text


def test_a_driver_older_than_torch_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.setattr(nvidia_driver, "version", lambda: "550.54")
    levels = {}
    for supported in ((12, 4), (13, 0), (13, 2), None):
        monkeypatch.setattr(nvidia_driver, "cuda_version", lambda supported=supported: supported)
        (row,) = versions.cuda_versions()
        levels[supported] = row.level
    assert levels == {(12, 4): "ERROR", (13, 0): "ok", (13, 2): "ok", None: "note"}


@pytest.mark.parametrize(
    ("files", "what", "mend"),
    [
        ({"apex": None}, "is a bare folder, not NVIDIA's apex with its compiled module amp_C", "remove or rename it"),
        ({"apex/__init__.py": NEVER}, "is not NVIDIA's apex with its compiled module amp_C", "remove or rename it"),
        (
            {"apex/__init__.py": NEVER, "apex-0.9.10.dist-info/METADATA": "Name: apex\nVersion: 0.9.10\n"},
            "is the package apex 0.9.10, on PyPI a web toolkit, not NVIDIA's with its compiled module amp_C",
            "pip uninstall apex",
        ),
        (
            {"apex/__init__.py": NEVER, "apex/optimizers/fused_adam.py": NEVER},
            "is NVIDIA's apex built without its compiled module amp_C",
            "build it with its C++ and CUDA extensions, or remove or rename it",
        ),
    ],
    ids=["folder", "package", "installed", "without extensions"],
)
def test_a_wrong_apex_is_an_error(tmp_path: Path, files: dict[str, str | None], what: str, mend: str) -> None:
    with importable(tmp_path, files):
        assert list(apex()) == [Row("apex", f"{tmp_path}/apex {what}, {TAKEN}: {mend}", "ERROR")]


def test_nvidias_apex_is_known_by_its_compiled_modules(tmp_path: Path) -> None:
    files = {"apex/__init__.py": NEVER, "amp_C.py": ""}
    with importable(tmp_path / "without", files):
        assert [row.level for row in apex()] == ["note"]
    with importable(tmp_path / "with", {**files, "fused_weight_gradient_mlp_cuda.py": ""}):
        text = "NVIDIA's, with the compiled modules amp_C and fused_weight_gradient_mlp_cuda"
        assert list(apex()) == [Row("apex", text)]
    with importable(tmp_path / "broken", {**files, "amp_C.py": "raise ImportError('undefined symbol')"}):
        (row,) = apex()
        assert row.level == "ERROR"
        assert "amp_C does not load (ImportError: undefined symbol)" in row.text


@pytest.mark.parametrize("error", ["ImportError", "OSError"])
def test_a_transformer_engine_that_does_not_import_is_an_error(tmp_path: Path, error: str) -> None:
    with importable(tmp_path, {"transformer_engine/__init__.py": f"raise {error}('undefined symbol')"}):
        (row,) = attempt("transformer-engine", transformer_engine)
    assert row.level == "ERROR"
    assert f"does not import ({error}: undefined symbol)" in row.text


def test_a_transformer_engine_that_imports_is_in_order(tmp_path: Path) -> None:
    files = {
        "transformer_engine/__init__.py": "__version__ = '2.9'",
        "transformer_engine/pytorch/__init__.py": "",
        "transformer_engine/pytorch/optimizers.py": "",
    }
    with importable(tmp_path, files):
        assert list(transformer_engine()) == [Row("transformer-engine", "2.9, imports")]


def test_what_the_driver_says(monkeypatch: pytest.MonkeyPatch) -> None:
    class Library:
        def __getattr__(self, name: str) -> object:
            return lambda: 0

        def cuDriverGetVersion(self, number) -> int:  # noqa: N802
            number._obj.value = 13020
            return 0

        def nvmlSystemGetDriverVersion(self, text, size: int) -> int:  # noqa: N802
            text.value = b"580.65.06"
            return 0

        def nvmlDeviceGetCount_v2(self, number) -> int:  # noqa: N802
            number._obj.value = 8
            return 0

    monkeypatch.setattr(nvidia_driver.ctypes, "CDLL", lambda name: Library())
    assert nvidia_driver.cuda_version() == (13, 2)
    assert nvidia_driver.version() == "580.65.06"
    assert nvidia_driver.gpu_count() == 8

    def absent(name: str) -> object:
        raise OSError(name)

    monkeypatch.setattr(nvidia_driver.ctypes, "CDLL", absent)
    assert nvidia_driver.cuda_version() is None
    assert nvidia_driver.version() is None
    assert nvidia_driver.gpu_count() == 0
