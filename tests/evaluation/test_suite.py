"""launch/evaluate.py --suite: the report, a call that is ended and goes on, what is left out, what is refused."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from em_megatron.config import ConfigError
from em_megatron.evaluation.long_ppl import Constants
from em_megatron.evaluation.options import PARTS, parts_of, settings_of
from em_megatron.evaluation.report import evaluate_subject
from em_megatron.evaluation.subject import Subject, open_subject
from em_megatron.evaluation.suite import Interrupted, Settings, Suite
from em_megatron.parallel.process_groups import shutdown
from em_megatron.training.stopping import StopRequest
from launch import evaluate
from tests.evaluation.conftest import trained_run
from tests.training import corpora

QUICK = ("--texts", "2", "--context", "16", "--stride", "8", "--lengths", "300", "--depths", "0,1", "--trials", "2",
         "--digits", "3", "--samples", "4")  # fmt: skip
PICTURES = ("positions", "recall_passkey", "recall_single", "recall_multi_key", "recall_multi_value", "corruption",
            "sweep", "noise")  # fmt: skip


def start(path: Path, *arguments: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "launch/evaluate.py", str(path), *arguments],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
    )


def call(path: Path, *arguments: str) -> tuple[int, str, str]:
    process = start(path, *arguments)
    out, errors = process.communicate(timeout=280)
    return process.returncode, out, errors


@pytest.fixture(scope="module")
def whole(run_folder, tmp_path_factory) -> tuple[Path, str]:
    """The report of an undisturbed call, and what it printed."""
    folder = tmp_path_factory.mktemp("whole")
    code, out, errors = call(run_folder, "--suite", "all", *QUICK, "--output", str(folder))
    assert code == 0, errors
    return folder, out


@contextmanager
def opened(path: Path, *overrides: str) -> Iterator[Subject]:
    try:
        yield open_subject(path, overrides, world_size=1)
    finally:
        shutdown()


def test_everything_is_reported(whole, run_folder):
    folder, out = whole
    found = json.loads((folder / "evaluation.json").read_text())
    assert found["checkpoint"].startswith(str(run_folder))
    assert (found["step"], found["sequence_length"], found["memory"]["order"]) == (8, 80, 16)
    assert found["loss"] > 0
    assert set(PARTS) - {"perplexity"} <= set(found)
    assert "skipped" not in found
    assert found["long_ppl"]["constants"] == {"context": 16, "stride": 8, "lsd": 2.0, "lcl": -2.0}
    assert found["long_ppl"]["texts"] == 2
    assert [len(task["cells"]) for task in found["recall"]["tasks"].values()] == [2] * 4
    assert found["recall"]["tasks"]["multi_value"]["chance_exact"] == pytest.approx(1e-6)
    assert [row["share"] for row in found["corruption"]["shares"]] == [0, 0.1, 0.25, 0.5, 0.75]
    assert found["sweep"]["readers"][0]["changes"] == ""
    assert found["sweep"]["readers"][0]["loss"] == found["loss"]
    assert len({row["loss"] for row in found["sweep"]["readers"]}) > 5
    assert {row["tokens"] for row in found["noise"]["rows"]} == {10, 20, 40, 80}
    page = (folder / "report.md").read_text()
    for name in PICTURES:
        assert (folder / f"{name}.png").read_bytes().startswith(b"\x89PNG")
        assert f"({name}.png)" in page
    assert len(list(folder.glob("*.png"))) == len(PICTURES)
    for words in ("## Held-out text", "## LongPPL", "passkey, 3 digits", "## Corrupted block", "white noise"):
        assert words in page
    for words in ("recall, multi_key of 3 digits", "LongPPL ", "other readers", f"report in {folder}"):
        assert words in out


def test_a_call_that_is_ended_goes_on_to_the_same_report(whole, run_folder, tmp_path):
    arguments = ("--suite", "all", *QUICK, "--output", str(tmp_path))
    process, cells = start(run_folder, *arguments), tmp_path / "parts/recall.json"
    while process.poll() is None and not cells.exists():
        time.sleep(0.005)
    process.send_signal(signal.SIGTERM)
    _, errors = process.communicate(timeout=120)
    assert process.returncode == 0, errors
    assert errors.strip().endswith("stopped: the same command goes on from here")
    assert not (tmp_path / "evaluation.json").exists()
    first = json.loads(cells.read_text())
    assert not first["complete"]
    assert 1 <= len(first["units"]) < 8
    # A finished unit is marked; the mark is still there in the end, so it was not done again.
    name = next(iter(first["units"]))
    first["units"][name]["example"]["mark"] = "kept"
    cells.write_text(json.dumps(first))
    perplexity = (tmp_path / "parts/perplexity.json").read_text()
    code, _, errors = call(run_folder, *arguments)
    assert code == 0, errors
    found = json.loads((tmp_path / "evaluation.json").read_text())
    kept = [cell["example"].pop("mark", "") for task in found["recall"]["tasks"].values() for cell in task["cells"]]
    assert kept == ["kept"] + 7 * [""]
    assert found == json.loads((whole[0] / "evaluation.json").read_text())
    assert (tmp_path / "parts/perplexity.json").read_text() == perplexity
    assert (tmp_path / "report.md").read_text() == (whole[0] / "report.md").read_text()


class Counting:
    """A subject whose calls are counted."""

    def __init__(self, subject: Subject) -> None:
        self.subject, self.calls = subject, Counter()

    def __getattr__(self, name: str) -> Any:
        found = getattr(self.subject, name)
        if name not in ("perplexity", "token_losses", "new_text"):
            return found

        def counted(*arguments: Any) -> Any:
            self.calls[name] += 1
            return found(*arguments)

        return counted


SETTINGS = Settings(
    texts=2, long_ppl=Constants(16, 8), tasks=("passkey",), lengths=(200,), depths=(0.0, 0.5), trials=2, digits=3,
    sweep=("", "memory.order=4"), samples=2,
)  # fmt: skip


def changed(**changes: Any) -> Settings:
    return replace(SETTINGS, **changes)


CHEAP = ("perplexity", "long_ppl", "recall", "corruption", "sweep")
CALLS = Counter(perplexity=1 + 2, token_losses=2 * 3 + 5 * 2, new_text=1 + 4)


def test_finished_units_are_not_done_again_and_other_settings_begin_anew(run_folder, tmp_path):
    def run(parts=CHEAP, settings=SETTINGS, folder=tmp_path / "a", stops_at=10**9) -> tuple[Counter, Any]:
        asked = iter(range(10**9))
        suite = Suite(counting, settings, folder, None, lambda: next(asked) >= stops_at, writes=True)
        counting.calls.clear()
        try:
            found = suite.run(parts)
        except Interrupted:
            found = None
        return Counter(counting.calls), found

    with opened(run_folder) as subject:
        counting = Counting(subject)
        calls, expected = run()
        assert calls == CALLS
        assert run() == (Counter(new_text=1), expected)  # one to see that there is text at all
        done, calls, found, stops = Counter(), None, None, 0
        while found is None:  # ended again and again, always later
            calls, found = run(folder=tmp_path / "b", stops_at=stops % 5)
            done, stops = done + calls, stops + 1
        assert stops > 4
        assert found == expected
        assert done["token_losses"] == CALLS["token_losses"]
        assert done["new_text"] - stops == 4
        more = changed(depths=(0.0, 0.5, 0.504))
        assert run(("recall",), more)[0] == Counter(new_text=1 + 2)  # the new depth alone
        for part, change in (
            ("perplexity", {"samples": 3}),
            ("long_ppl", {"long_ppl": Constants(17, 8)}),
            ("recall", {"trials": 1}),
            ("corruption", {"seed": 1}),
            ("sweep", {"samples": 3}),
        ):
            calls, other = run((part,), changed(**change))
            assert calls["perplexity"] + calls["token_losses"] + calls["new_text"] > (part == "recall")
            assert other[part] != expected[part]
        subject.use_reader(["memory.slots=3"])
        assert run(("corruption",))[0]["token_losses"] == 10
        (tmp_path / "a/parts/corruption.json").write_text('{"identity": ')  # a damaged file is as none
        assert run(("corruption",))[0]["token_losses"] == 10


def report(subject: Subject, folder: Path, *parts: str, settings: Settings = SETTINGS) -> dict[str, Any]:
    evaluate_subject(subject, settings, parts, False, folder, StopRequest(), writes=True)
    return json.loads((folder / "evaluation.json").read_text())


def test_parts_of_earlier_calls_stay_in_the_report(run_folder, tmp_path):
    with opened(run_folder) as subject:
        first = report(subject, tmp_path, "perplexity")
        second = report(subject, tmp_path, "noise", "corruption")
        assert second["loss"] == first["loss"]
        assert {"noise", "corruption"} <= set(second)
        assert "![Held-out text](positions.png)" in (tmp_path / "report.md").read_text()
        subject.use_reader(["memory.order=4"])
        assert "loss" not in report(subject, tmp_path, "noise")  # of another reader
        subject.use_reader([])
    with opened(run_folder, "data.sequence_length=160") as subject:
        third = report(subject, tmp_path, "noise")
        assert third["sequence_length"] == 160
        assert not {"loss", "corruption"} & set(third)  # of other samples


def test_what_a_memory_cannot_do_is_left_out_with_the_reason(kind_run, tmp_path):
    with opened(kind_run("block_local")) as subject:
        found = report(subject, tmp_path, "all")
    assert found["skipped"] == {
        "sweep": "a memory of kind block_local has no reader to exchange",
        "noise": "a memory of kind block_local has no coefficients",
    }
    assert {"loss", "long_ppl", "recall", "corruption"} <= set(found)
    assert "sweep: left out, a memory of kind block_local has no reader" in (tmp_path / "report.md").read_text()
    assert not (tmp_path / "sweep.png").exists()


def test_what_a_corpus_or_a_short_sample_cannot_do_is_left_out(run_folder, tmp_path):
    usual = changed(lengths=())
    with opened(run_folder, "data.sequence_length=480") as subject:
        found = report(subject, tmp_path / "long", "all", settings=usual)
        assert set(found["skipped"]) == {"long_ppl", "corruption"}
        assert "no held-out document fills a sample of 480 tokens" in found["skipped"]["corruption"]
        tokens = {cell["tokens"] for cell in found["recall"]["tasks"]["passkey"]["cells"]}
        assert {192, 384} <= tokens <= {96, 192, 384}
        with pytest.raises(ConfigError, match=r"fills a sample of 480 tokens: give a shorter data\.sequence_length"):
            report(subject, tmp_path / "long", "corruption")
    short = changed(lengths=(), tasks=("multi_key",), digits=7)
    with opened(run_folder, "data.sequence_length=16") as subject:
        assert set(report(subject, tmp_path / "short", "all", settings=short)["skipped"]) == {"recall"}
        with pytest.raises(ConfigError, match=r"16 tokens is too short for the task multi_key: give --lengths"):
            report(subject, tmp_path / "short", "recall", settings=short)


@pytest.mark.slow
def test_a_folder_through_the_same_command(exported, whole, tmp_path):
    code, out, errors = call(exported, "--suite", "perplexity,long_ppl,recall,sweep", *QUICK, "--output", str(tmp_path))
    assert code == 0, errors
    found, run = (json.loads((folder / "evaluation.json").read_text()) for folder in (tmp_path, whole[0]))
    assert found["checkpoint"] == str(exported)
    assert found["loss"] == pytest.approx(run["loss"], abs=1e-5)
    assert found["long_ppl"]["perplexity"] == pytest.approx(run["long_ppl"]["perplexity"], rel=1e-5)
    for name, task in run["recall"]["tasks"].items():
        for cell, other in zip(task["cells"], found["recall"]["tasks"][name]["cells"], strict=True):
            assert cell["example"]["asked"] == other["example"]["asked"]
            assert cell["digits"] == pytest.approx(other["digits"])
    for row, other in zip(run["sweep"]["readers"], found["sweep"]["readers"], strict=True):
        assert (row["changes"], row["loss"]) == (other["changes"], pytest.approx(other["loss"], abs=2e-5))
    assert f"report in {tmp_path}" in out


def test_key_tokens_of_an_evaluator(run_folder, exported, kind_run, tmp_path):
    """Another run, and the exported folder, say which tokens are key; one of another tokenizer cannot."""
    judge = kind_run("full")

    constants = Constants(16, 8, lsd=0.05, lcl=-30)

    def figures(subject: Subject, evaluator: Path | str) -> Any:
        settings = changed(evaluator=str(evaluator), long_ppl=constants)
        return report(subject, tmp_path / Path(evaluator).parent.name, "long_ppl", settings=settings)["long_ppl"]

    with opened(judge) as subject:
        own = figures(subject, "")
    with opened(run_folder) as subject:
        found, alone = figures(subject, judge), figures(subject, exported)
    assert found["evaluator"].startswith(str(judge))
    assert found["evaluator_kind"] == "full"
    assert found["key_tokens"] == own["key_tokens"] > 3
    assert found["evaluator_long_ppl"] == pytest.approx(own["long_ppl"], rel=1e-6)
    assert found["long_ppl"] != pytest.approx(own["long_ppl"])
    assert alone["evaluator"] == str(exported)
    assert alone["long_ppl"] == pytest.approx(alone["evaluator_long_ppl"], rel=1e-4)  # the same weights


def test_an_evaluator_of_another_tokenizer_is_refused(run_folder, tmp_path):
    from tests.tokenizer.small_corpus import train_model, write_texts

    model = train_model(write_texts(tmp_path / "texts", files=22, words=300), tmp_path / "tokenizer.model")
    documents = {split: [corpora.chain_document(seed, 90) for seed in range(8)] for split in ("train", "validation")}
    other = trained_run(corpora.write_ids(tmp_path / "corpus", model, documents), tmp_path / "runs")
    settings = changed(evaluator=str(other))
    with opened(run_folder) as subject:
        for parts in (("perplexity", "long_ppl"), ("all",)):
            with pytest.raises(ConfigError, match=r"has another tokenizer: LongPPL needs the same ids of both models"):
                report(subject, tmp_path / "out", *parts, settings=settings)
    assert not (tmp_path / "out/parts").exists()  # refused before anything was done


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--suite", "perplexity,speed"), "--suite: part 'speed' is unknown: choose from perplexity, long_ppl, recall"),
        (("--suite", ""), "--suite: part '' is unknown"),
        (("--tasks", "passkey,needle"), "--tasks: 'needle' is unknown: choose from passkey, single, multi_key"),
        (("--lengths", "100;200"), "--lengths '100;200' is not a list of numbers with commas"),
        (("--lengths", "100,-3"), "--lengths must be at least 1"),
        (("--depths", "half"), "--depths 'half' is not a list of numbers with commas"),
        (("--depths", "0,1.5"), "--depths lie between 0 and 1"),
        (("--depths", "nan"), "--depths lie between 0 and 1"),
        (("--depths", ""), "--depths lie between 0 and 1"),
        (("--trials", "0"), "--trials must be at least 1"),
        (("--texts", "0"), "--texts must be at least 1"),
        (("--stride", "0"), "--stride must be at least 1"),
        (("--seed", "-1"), "--seed must be at least 0"),
        (("--samples", "3", "--reference-models"), "scored on the whole held-out split: leave --samples out"),
        (("--suite", "noise", "--reference-models"), "--reference-models stand beside perplexity: add it to --suite"),
    ],
)
def test_options_that_cannot_be_are_refused(arguments, message, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["evaluate.py", "somewhere", *arguments])
    parsed = evaluate.parse()
    with pytest.raises(ConfigError) as found:
        (settings_of(parsed), parts_of(parsed))
    assert message in str(found.value)


def test_options_become_settings(monkeypatch):
    readers = ("--reader", "memory.order=4 memory.slots=2", "--reader", "memory.top_k=0")
    monkeypatch.setattr(
        sys, "argv", ["evaluate.py", "run", "--suite", "noise,recall", *QUICK, *readers, "--memory.order=3"]
    )
    parsed = evaluate.parse()
    assert parts_of(parsed) == ["recall", "noise"]
    assert parsed.overrides == ["memory.order=3"]
    assert settings_of(parsed) == Settings(
        samples=4, texts=2, long_ppl=Constants(16, 8), lengths=(300,), depths=(0.0, 1.0), trials=2, digits=3,
        sweep=("memory.order=4 memory.slots=2", "memory.top_k=0"),
    )  # fmt: skip


@pytest.mark.parametrize(
    ("parts", "change", "message"),
    [
        (("perplexity", "recall"), {"lengths": (300, 20)}, "20 tokens are too few for the task passkey with 3 digits"),
        (
            ("perplexity", "sweep"),
            {"sweep": ("", "memory.pairs=3")},
            "'memory.pairs=3' has no place in a memory of kind",
        ),
        (("perplexity", "sweep"), {"sweep": ("memory.order",)}, "'memory.order' is not of the form section.key=value"),
        (("perplexity", "sweep"), {"sweep": ("memory.kind=full",)}, "'memory.kind=full' is no reader of a memory"),
        (("perplexity", "sweep"), {"sweep": ("order=3",)}, "'order=3' is no reader of a memory"),
    ],
)
def test_parts_are_checked_before_the_first_takes_its_time(parts, change, message, run_folder, tmp_path):
    with opened(run_folder) as subject, pytest.raises(ConfigError) as found:
        report(subject, tmp_path, *parts, settings=changed(**change))
    assert message in str(found.value)
    assert not (tmp_path / "parts").exists()


def test_a_refusal_is_one_sentence(run_folder, tmp_path):
    code, _, errors = call(
        run_folder, "--suite", "sweep", "--reader", "memory.block_length=8", "--output", str(tmp_path)
    )
    assert code == 2
    assert "error: 'memory.block_length=8' is no reader of a memory" in errors
    assert "Traceback" not in errors
