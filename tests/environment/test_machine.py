"""Paths of the operators, devices, disks and communication."""

from __future__ import annotations

import shutil
import sysconfig
from collections import namedtuple
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import torch.distributed as dist

from em_megatron.environment import communication, devices, operators
from em_megatron.environment.report import Row
from em_megatron.ops import dispatch
from em_megatron.parallel import cpu_backend
from em_megatron.parallel.fused_adamw import FusedAdamW


def test_the_reasons_are_those_of_dispatch() -> None:
    text = {row.name: row.text for row in operators.block_operators()}
    for dtype in (torch.bfloat16, torch.float32):
        for head_dim in (64, 128):
            choice = dispatch.choose("auto", cpu_backend.device(), dtype, head_dim)
            for operator in ("memory operator", "trapezoidal attention"):
                assert text[operator].startswith(f"{choice.name} for ")
                assert text[operator].endswith(choice.reason)


def test_choices_that_differ_have_rows_of_their_own(monkeypatch: pytest.MonkeyPatch) -> None:
    def choose(requested: str, device: object, dtype: torch.dtype, head_dim: int) -> dispatch.Choice:
        assert requested == "auto"
        return dispatch.Choice("batched", "small") if head_dim == 64 else dispatch.Choice("naive", "large")

    monkeypatch.setattr(dispatch, "choose", choose)
    assert [row.text for row in operators.block_operators() if row.name == "memory operator"] == [
        "batched for bf16/64, fp32/64 (dtype/head dimension): small",
        "naive for bf16/128, fp32/128 (dtype/head dimension): large",
    ]


def test_off_the_triton_path_on_a_gpu_is_a_warning(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cpu_backend, "device", lambda: torch.device("cuda"))
    assert operators.choice_row("memory operator", dispatch.Choice("batched", "old"), ["bf16/64"]).level == "warning"


@pytest.mark.skipif(torch.cuda.is_available(), reason="states the paths without a GPU")
def test_paths_without_a_gpu() -> None:
    rows = [
        *operators.cpu_backend(),
        *operators.norm(),
        *operators.swiglu(),
        *operators.gradient_accumulation_fusion(),
        *operators.cross_entropy(),
    ]
    assert [row.level for row in rows] == ["ok"] * 5
    text = {row.name: row.text for row in rows}
    assert text["RMSNorm"].startswith("em_megatron.model.norm.RMSNorm ")
    assert "unfused" in text["SwiGLU"]
    assert "not fused" in text["gradient accumulation"]
    assert "vocab_parallel_cross_entropy" in text["cross entropy"]


def test_the_optimizer_is_tried() -> None:
    (row,) = operators.optimizer()
    assert row.level == "ok"
    (clipping,) = operators.gradient_clipping()
    assert clipping.level == "ok"
    assert operators.adam_row(FusedAdamW).text.startswith("this project's em_megatron.parallel.fused_adamw.FusedAdamW")


def test_an_optimizer_that_cannot_step_here_is_an_error() -> None:
    class FusedAdam:
        __module__ = "apex.optimizers.fused_adam"

        def __init__(self, params: object, lr: float) -> None:
            raise RuntimeError("Found no NVIDIA driver")

    class Idle(FusedAdam):
        def __init__(self, params: object, lr: float) -> None: ...

        def step(self) -> None: ...

    row = operators.adam_row(FusedAdam)
    assert row.level == "ERROR"
    assert "fails on this device (RuntimeError: Found no NVIDIA driver)" in row.text
    assert "take apex out" in row.text
    assert operators.adam_row(Idle).level == "ERROR"


def test_a_fusion_module_that_does_not_load_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    from megatron.core.tensor_parallel import layers

    monkeypatch.setattr(operators, "default_config", lambda: SimpleNamespace(gradient_accumulation_fusion=True))
    levels = []
    for loaded in (True, False):
        monkeypatch.setattr(layers, "_grad_accum_fusion_available", loaded)
        levels += [row.level for row in operators.gradient_accumulation_fusion()]
    assert levels == ["ok", "ERROR"]


def test_gpus_that_torch_cannot_use(monkeypatch: pytest.MonkeyPatch) -> None:
    def no_driver() -> None:
        raise RuntimeError("driver too old")

    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.setattr(torch.cuda, "init", no_driver)
    assert devices.missing_gpu(0).level == "note"
    assert devices.missing_gpu(2) == Row(
        "GPU", "the driver shows 2, but torch cannot use them: RuntimeError: driver too old", "ERROR"
    )
    monkeypatch.setattr(torch.version, "cuda", None)
    assert "built without CUDA" in devices.missing_gpu(2).text
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    assert devices.missing_gpu(2).level == "warning"


def test_what_triton_compiles_with(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(sysconfig, "get_path", lambda name: str(tmp_path))
    monkeypatch.setenv("CC", "/usr/bin/cc")
    assert "Python.h is missing" in devices.compiler().text
    (tmp_path / "Python.h").touch()
    assert devices.compiler() == Row("compiler", "/usr/bin/cc")
    monkeypatch.delenv("CC")
    monkeypatch.setattr(shutil, "which", lambda name: None)
    assert devices.compiler().level == "ERROR"


def test_folders(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage(0, 0, 50 * devices.GIB))
    assert devices.folder("runs", str(tmp_path / "a" / "b"), "move").text == f"{tmp_path}/a/b, 50.0 GiB free"
    assert not (tmp_path / "a").exists()
    (tmp_path / "file").touch()
    unwritable = devices.folder("runs", str(tmp_path / "file" / "b"), "move")
    assert unwritable == Row("runs", f"{tmp_path}/file/b cannot be written: move", "warning")
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage(0, 0, devices.GIB))
    assert devices.folder("runs", str(tmp_path), "move").level == "warning"


def test_an_all_reduce_that_fails_says_why(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*args: object, **kwargs: object) -> None:
        raise RuntimeError("no network interface")

    monkeypatch.setattr(dist, "init_process_group", refuse)
    row = communication.reduced("gloo", "available", "ERROR")
    text = "available, but an all-reduce of one rank fails: RuntimeError: no network interface"
    assert row == Row("gloo", text, "ERROR")


def test_shared_memory(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    usage = namedtuple("usage", "total used free")
    for free, level in ((0.06, "warning"), (8, "ok")):
        found = usage(16 * devices.GIB, 0, free * devices.GIB)
        monkeypatch.setattr(shutil, "disk_usage", lambda path, found=found: found)
        (row,) = devices.shared_memory(tmp_path)
        assert row.level == level
    (row,) = devices.shared_memory(tmp_path / "nowhere")
    assert row.level == "warning"


def test_limits() -> None:
    assert devices.limits_row(-1, -1, True) == Row("limits", "any number of open files, no limit on locked memory")
    assert devices.limits_row(20000, 2**23, False) == Row("limits", "20000 open files, 8 MiB of locked memory")
    assert devices.limits_row(1024, 2**23, True) == Row(
        "limits",
        "1024 open files, 8 MiB of locked memory: ulimit -n 4096 or more, for ranks on many nodes; "
        "ulimit -l unlimited, which InfiniBand needs",
        "warning",
    )
