"""The page as a whole: this environment is fit, broken ones are not, and nothing brings the doctor down."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

from em_megatron.environment import diagnosis
from em_megatron.environment.report import Report, Row, Section, attempt
from launch import doctor
from tests.environment.fake_packages import write_packages

REPOSITORY = Path(doctor.__file__).parents[1]


def rows_of(page: dict[str, Any]) -> dict[str, dict[str, str]]:
    return {row["name"]: row for row in page["rows"]}


def doctor_with(folder: Path) -> tuple[int, dict[str, Any]]:
    """Exit code and JSON of a doctor that finds `folder` on its import path."""
    environment = {**os.environ, "PYTHONPATH": str(folder)}
    done = subprocess.run(
        [sys.executable, "launch/doctor.py", "--json"], cwd=REPOSITORY, env=environment, capture_output=True, text=True
    )
    assert done.stderr == ""
    return done.returncode, json.loads(done.stdout)


def test_this_environment_is_fit_and_json_holds_the_same_rows(capsys: pytest.CaptureFixture[str]) -> None:
    assert doctor.main(["--json"]) == 0
    page = json.loads(capsys.readouterr().out)
    assert doctor.main([]) == 0
    text = capsys.readouterr().out.splitlines()
    gpus = torch.cuda.device_count()
    assert page["fit"] is True
    assert (
        text[-1]
        == page["verdict"]
        == (f"fit to train on {gpus} GPU{'s' * (gpus > 1)}" if gpus else "fit to train on CPU processes")
    )
    marked = [line.split()[:2] for line in text if line[2:9].strip() and line.startswith("  ")]
    assert marked == [[row["level"], row["name"].split()[0]] for row in page["rows"]]
    assert [line for line in text[:-1] if not line.startswith(" ")] == list(
        dict.fromkeys(row["section"] for row in page["rows"])
    )
    words = " ".join(" ".join(text).split())
    for row in page["rows"]:
        if "unused" not in row["text"] and "free" not in row["text"]:  # these figures move on
            assert " ".join(row["text"].split()) in words


def test_the_page_leaves_no_process_group(capsys: pytest.CaptureFixture[str]) -> None:
    doctor.main(["--json"])
    page = rows_of(json.loads(capsys.readouterr().out))
    assert page["gloo"]["text"] == "available, an all-reduce of one rank works"
    assert not dist.is_initialized()


def test_a_folder_named_apex_makes_it_unfit(tmp_path: Path) -> None:
    code, page = doctor_with(write_packages(tmp_path, {"apex": None}))
    assert code == 1
    assert page["verdict"] == "not fit: 1 error"
    row = rows_of(page)["apex"]
    assert row["level"] == "ERROR"
    assert row["text"] == (
        f"{tmp_path}/apex is a bare folder, not NVIDIA's apex with its compiled module amp_C, but Megatron-Core's bare "
        "`import apex` takes it for that and selects a fused layer norm that then fails: remove or rename it"
    )


def test_a_broken_torch_becomes_lines(tmp_path: Path) -> None:
    broken = write_packages(tmp_path, {"torch/__init__.py": "raise OSError('libcudart.so.13: cannot open')"})
    code, page = doctor_with(broken)
    rows = rows_of(page)
    assert code == 1
    assert page["verdict"] == f"not fit: {page['errors']} errors"
    for name in ("torch", "CUDA", "GPU", "optimizer", "memory and attention", "gloo", "NCCL"):
        assert rows[name]["level"] == "ERROR"
        assert rows[name]["text"] == "could not be examined: OSError: libcudart.so.13: cannot open"
    assert rows["python"]["level"] == rows["numpy"]["level"] == "ok"


def test_what_a_probe_found_before_it_failed_is_kept() -> None:
    def probe() -> Any:
        yield Row("first", "found")
        raise SystemExit("no such\nthing")

    assert list(attempt("second", probe, "warning")) == [
        Row("first", "found"),
        Row("second", "could not be examined: SystemExit: no such thing", "warning"),
    ]


def test_only_some_sections(capsys: pytest.CaptureFixture[str]) -> None:
    assert tuple(diagnosis.SECTIONS) == doctor.TITLES
    assert doctor.main(["--only", "communication", "--json"]) == 0
    page = json.loads(capsys.readouterr().out)
    assert {row["section"] for row in page["rows"]} == {"communication"}
    assert {"gloo", "interfaces", "InfiniBand", "hostname", "Slurm"} <= set(rows_of(page))
    assert page["verdict"] == "no error in: communication"


def test_only_errors_make_unfit() -> None:
    good = Section("one", (Row("a", "x"), Row("b", "x", "note"), Row("c", "x", "warning")))
    bad = Section("two", (Row("d", "x", "ERROR"),))
    assert Report((good,), gpus=0).verdict == "fit to train on CPU processes"
    assert Report((good,), gpus=1).verdict == "fit to train on 1 GPU"
    assert Report((good,), gpus=8).verdict == "fit to train on 8 GPUs"
    assert Report((good, bad), gpus=8).verdict == "not fit: 1 error"
    assert Report((good, bad, bad), gpus=8).verdict == "not fit: 2 errors"
