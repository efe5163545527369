"""Text from a run and from its export: the same answers, from streams too, and memories that outlive the process."""

from __future__ import annotations

import io
import threading
from pathlib import Path

import pytest

from em_megatron.config import ConfigError, plain_overrides
from em_megatron.evaluation import generation
from em_megatron.evaluation.generation import MegatronText, Sampling, pieces, read_lines
from em_megatron.hf.generation import TransformersText, is_exported, reader_changes
from em_megatron.parallel.process_groups import shutdown
from em_megatron.training.restore import restore
from launch import generate as launch_generate

GREEDY = Sampling(temperature=0)
STREAM = "abc  def\nghi jkl\n?abc\nmno\n" * 3 + "?abc\nend"


@pytest.fixture
def generate(capsys, monkeypatch):
    """launch/generate.py in this process: exit code, output, errors."""

    def call(*arguments: str | Path, stdin: str = "") -> tuple[int, str, str]:
        monkeypatch.setattr("sys.stdin", io.StringIO(stdin))
        length = [] if "--max-new-tokens" in arguments else ["--max-new-tokens", "12"]
        capsys.readouterr()
        code = launch_generate.main([*map(str, arguments), "--temperature", "0", *length])
        return code, *capsys.readouterr()

    return call


@pytest.fixture
def megatron(run_folder):
    run = restore(run_folder, [], 1)
    yield MegatronText(run.model[0], run.vocabulary)
    shutdown()


def answers(model, stream: str, monkeypatch, at_once: int) -> list[str]:
    monkeypatch.setattr(generation, "CHARACTERS_AT_ONCE", at_once)
    found: list[str] = []
    lines = pieces(io.StringIO(stream))
    list(read_lines(model, lines, "?", lambda asked: found.append("".join(asked.write(12, GREEDY)))))
    return [*found, "".join(model.write(12, GREEDY))]


def test_questions_do_not_enter_the_memory_and_streams_can_be_cut_anywhere(megatron, exported, monkeypatch):
    found = answers(megatron, STREAM, monkeypatch, at_once=1)
    assert len(found) == 5
    assert found == answers(TransformersText(exported), STREAM, monkeypatch, at_once=1)
    assert found == answers(TransformersText(exported), STREAM, monkeypatch, at_once=10**6)
    # The last answers again, with everything before them given at once.
    for question, expected in (("abc\n", found[3]), ("end", found[4])):
        whole = TransformersText(exported)
        whole.read("abc  def\nghi jkl\nmno\n" * 3 + question)
        assert "".join(whole.write(12, GREEDY)) == expected


def test_long_lines_come_in_parts(monkeypatch):
    monkeypatch.setattr(generation, "LONGEST_LINE", 5)
    assert list(pieces(io.StringIO("abcdefg\nh\n"))) == ["abcde", "fg\n", "h\n"]


def test_what_is_written_enters_the_memory(exported):
    text, again = TransformersText(exported), TransformersText(exported)
    text.read("abc def")
    first, second = "".join(text.write(7, GREEDY)), "".join(text.write(5, GREEDY))
    again.read("abc def")
    assert "".join(again.write(12, GREEDY)) == first + second


def test_nobody_reads_on(exported):
    text = TransformersText(exported)
    text.read("abc def")
    text.model.generation_config.suppress_tokens = [text.vocabulary.eos_id]
    ids = text.write_ids(100_000, GREEDY)
    next(ids)
    ids.close()  # waits for the thread, which ends at its next token
    assert threading.active_count() < 20
    assert len(text.cache.tokens_read) == 1
    assert text.cache.tokens_read[0] < 1000


def test_sampling_depends_on_the_seed_alone(exported):
    found = []
    for seed in (1, 1, 2):
        text = TransformersText(exported)
        text.read("abc def")
        found.append("".join(text.write(20, Sampling(temperature=1.0, seed=seed))))
    assert found[0] == found[1] != found[2]


def test_command_line_on_run_and_export(generate, run_folder, exported):
    stream = "abc  def\nghi jkl\n?abc\nmno\n?abc\n"
    found = [
        generate(model, "--prompt", "-", "--question", "?", "--memory.slots=4", stdin=stream)
        for model in (run_folder, exported)
    ]
    assert found[0] == found[1] == (0, found[0][1], "")
    assert len(found[0][1].splitlines()) >= 2


def test_a_memory_outlives_the_process(generate, exported, tmp_path):
    (tmp_path / "text.txt").write_text("abc  def\nghi jkl\n" * 9)
    kept = generate(exported, "--prompt-file", tmp_path / "text.txt", "--save-memory", tmp_path / "memory")
    assert kept == (0, "", "")
    asked = generate(exported, "--load-memory", tmp_path / "memory", "--prompt", "mno")
    whole = generate(exported, "--prompt", "abc  def\nghi jkl\n" * 9 + "mno")
    assert asked[0] == 0
    assert whole[1] == "abc  def\nghi jkl\n" * 9 + asked[1]


def test_refusals_on_the_command_line(generate, run_folder, exported, tmp_path):
    (tmp_path / "bytes").write_bytes(b"abc\xff\xfe\n")
    generate(exported, "--prompt", "abc " * 30, "--save-memory", tmp_path / "memory")
    for arguments, words in (
        ((run_folder, "--prompt", "a", "--save-memory", tmp_path / "m"), "call launch/export_hf.py"),
        ((exported, "--prompt", "a", "--load-memory", tmp_path / "none"), "there is no file"),
        (
            (exported, "--load-memory", tmp_path / "memory", "--prompt", "a", "memory.order=20"),
            "too small for order 20",
        ),
        ((exported, "--prompt", "a", "--save-memory", tmp_path / "none/m"), "lies in no folder"),
        ((exported, "--prompt-file", tmp_path / "bytes"), "is not UTF-8"),
        ((run_folder, "--prompt-file", tmp_path / "bytes"), "is not UTF-8"),
        ((exported, "--prompt", "a\udcff"), "which UTF-8 cannot hold"),
        ((exported, "--prompt", "a", "--max-new-tokens", "0"), "must be at least 1"),
        ((exported,), "give one of --prompt and --prompt-file"),
        ((exported, "--prompt-file", tmp_path / "none"), "does not exist"),
        ((tmp_path, "--prompt", "a"), "no complete checkpoint"),
    ):
        code, _, error = generate(*arguments)
        assert code == 2
        assert words in error
        assert len(error.strip().splitlines()) == 1


def test_changes_of_the_reader():
    assert plain_overrides(["--memory.slots=4", "--prompt", "--memory", "memory.order=3"]) == [
        "memory.slots=4", "--prompt", "--memory", "memory.order=3"
    ]  # fmt: skip
    assert reader_changes(["memory.slots=4", "memory.sampler=uniform"]) == {"slots": 4, "sampler": "uniform"}
    assert reader_changes(["memory.sampler_points=[0.1,0.5]"]) == {"points": [0.1, 0.5]}
    for override, words in (
        ("memory.block_length=8", "only memory.order"),
        ("data.path=x", "does not fit a Hugging Face folder"),
        ("memory.slots=many", "no value of the right kind"),
    ):
        with pytest.raises(ConfigError, match=words):
            reader_changes([override])


def test_a_folder_that_cannot_be_used(exported, tmp_path):
    assert is_exported(exported)
    assert not is_exported(tmp_path)
    with pytest.raises(ConfigError, match="cannot be used"):
        TransformersText(tmp_path)
    with pytest.raises(ConfigError, match="at least 1"):
        TransformersText(exported, ["memory.order=0"])
