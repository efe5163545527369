"""apex and Transformer Engine: absent, in order, or something that Megatron-Core would trip over."""

from __future__ import annotations

import importlib
import importlib.metadata
import importlib.util
from collections.abc import Iterator
from importlib.machinery import ModuleSpec
from pathlib import Path

from em_megatron.environment.report import Row, cause

MULTI_TENSOR = "amp_C"  # optimizer and gradient clipping
GRADIENT_ACCUMULATION = (
    "fused_weight_gradient_mlp_cuda"  # weight gradients added into the fp32 buffer by the matrix product
)
NVIDIA_SOURCE = Path("optimizers", "fused_adam.py")  # in NVIDIA's apex, and in no other package of this name


def apex() -> Iterator[Row]:
    """NVIDIA's apex is known by its compiled modules; `apex` itself is never imported to find out."""
    found = importlib.util.find_spec("apex")
    compiled = [name for name in (MULTI_TENSOR, GRADIENT_ACCUMULATION) if importlib.util.find_spec(name)]
    if found is None:
        yield Row("apex", "absent: nothing here needs it", "note")
    elif MULTI_TENSOR not in compiled:
        yield Row("apex", wrong_apex(found), "ERROR")
    else:
        yield _compiled_apex(compiled)


def wrong_apex(found: ModuleSpec) -> str:
    """One sentence: what the thing called apex is, what it breaks, how to mend it."""
    path = Path(next(iter(found.submodule_search_locations or [found.origin or "an unknown place"])))
    installed = _installed_version(path)
    remove = "pip uninstall apex" if installed else "remove or rename it"
    if (path / NVIDIA_SOURCE).is_file():
        what = "is NVIDIA's apex built without its compiled module amp_C"
        remove = f"build it with its C++ and CUDA extensions, or {remove}"
    elif found.origin is None:
        what = "is a bare folder, not NVIDIA's apex with its compiled module amp_C"
    elif installed:
        what = f"is the package apex {installed}, on PyPI a web toolkit, not NVIDIA's with its compiled module amp_C"
    else:
        what = "is not NVIDIA's apex with its compiled module amp_C"
    return (
        f"{path} {what}, but Megatron-Core's bare `import apex` takes it for that and selects "
        f"a fused layer norm that then fails: {remove}"
    )


def transformer_engine() -> Iterator[Row]:
    """Imported for real: Megatron-Core imports it wherever it is found."""
    name = "transformer-engine"
    if importlib.util.find_spec("transformer_engine") is None:
        yield Row(name, "absent: nothing here needs it", "note")
        return
    try:
        importlib.import_module("torch")  # its libraries must be loaded first
        importlib.import_module("transformer_engine.pytorch.optimizers")
    except Exception as error:
        yield Row(
            name,
            f"is installed but does not import ({cause(error)}), and Megatron-Core imports it: install one that is "
            "built for this torch, or pip uninstall transformer-engine",
            "ERROR",
        )
        return
    module = importlib.import_module("transformer_engine")
    yield Row(name, f"{getattr(module, '__version__', 'of unknown version')}, imports")


def _compiled_apex(compiled: list[str]) -> Row:
    importlib.import_module("torch")  # its libraries must be loaded first
    for name in compiled:
        try:
            importlib.import_module(name)
        except Exception as error:
            return Row(
                "apex",
                f"NVIDIA's, but its compiled module {name} does not load ({cause(error)}): build apex for this torch, "
                "or pip uninstall apex",
                "ERROR",
            )
    text = f"NVIDIA's, with the compiled modules {' and '.join(compiled)}"
    if GRADIENT_ACCUMULATION in compiled:
        return Row("apex", text)
    return Row("apex", f"{text}, without {GRADIENT_ACCUMULATION}", "note")


def _installed_version(path: Path) -> str | None:
    """The version of the distribution `apex` if it put `path` there."""
    try:
        distribution = importlib.metadata.distribution("apex")
    except importlib.metadata.PackageNotFoundError:
        return None
    here = Path(str(distribution.locate_file("apex"))).resolve() == path.resolve()
    return distribution.version if here else None
