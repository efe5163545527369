"""Several processes on one folder: killed ones, living ones, claims, a disk that is full, texts of any length."""

import json
import os
import resource
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

from em_megatron.data.manifest import MANIFEST_NAME, DataError, Manifest
from em_megatron.data.shards import ShardReader
from tests.tokenizer.small_corpus import files_of, run_encode, write_texts
from tests.tokenizer.test_encode import wait_until
from tokenizer.encoding import claims, folder, shards
from tokenizer.encoding.claims import Claims

SHARDS = ["--shard-bytes", "1", "--quiet"]  # a shard per document, so it takes a while
TWO_WORKERS = (
    "import sys; from tokenizer import encode; encode.BYTES_PER_WORKER = 1; sys.exit(encode.main(sys.argv[1:]))"
)
HOLDER = (
    "import sys, pathlib; from tokenizer.encoding.claims import Claims\n"
    "with Claims(pathlib.Path(sys.argv[1])) as claims:\n"
    "    print([claims.acquire(unit) for unit in sys.argv[2:]], flush=True); sys.stdin.read()"
)


@pytest.fixture(scope="module")
def many(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_texts(tmp_path_factory.mktemp("many"), files=250, words=30)


@pytest.fixture(scope="module")
def undisturbed(model: Path, many: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    out = tmp_path_factory.mktemp("undisturbed") / "out"
    assert run_encode(model, many, out, *SHARDS, "--workers", "1") == 0
    return files_of(out)


def start(model: Path, texts: Path, out: Path, workers: int, *options: str) -> subprocess.Popen[str]:
    """The command in a process of its own."""
    words = [
        "--tokenizer",
        str(model),
        "--input",
        str(texts),
        "--output",
        str(out),
        "--workers",
        str(workers),
        *options,
    ]
    return subprocess.Popen(
        [sys.executable, "-c", TWO_WORKERS, *words], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )


def work_of(out: Path) -> Path:
    """The folder of an unfinished encoding; one that is not there before it is begun."""
    return next(iter(out.glob(".encode-*")), out / "none")


def records(out: Path) -> dict[str, int]:
    """The finished shards of an unfinished folder, and when their tars were written."""
    names = [path.stem for path in (work_of(out) / "shards").glob("*.tar.json")]
    return {name: (work_of(out) / "made" / name).stat().st_mtime_ns for name in names}


def assert_goes_on(model: Path, texts: Path, out: Path, undisturbed: dict[str, bytes]) -> None:
    """The same command ends with the undisturbed bytes, and leaves shards that were finished as they are."""
    before = records(out)
    assert not (out / MANIFEST_NAME).exists()
    with pytest.raises(DataError, match="is missing; run tokenizer"):
        ShardReader(out, "train")
    assert run_encode(model, texts, out, *SHARDS) == 0
    assert files_of(out) == undisturbed
    assert before == {name: (out / name).stat().st_mtime_ns for name in before}


@pytest.mark.parametrize("workers", [1, 2])
def test_the_command_is_killed(
    workers: int, model: Path, many: Path, undisturbed: dict[str, bytes], tmp_path: Path
) -> None:
    process = start(model, many, tmp_path / "out", workers, *SHARDS)
    try:
        wait_until(lambda: len(records(tmp_path / "out")) > 5)
        children = psutil.Process(process.pid).children(recursive=True)
        assert process.poll() is None, "it ended before it could be killed"
    finally:
        process.kill()
        process.communicate()
    psutil.wait_procs(children, 30)
    assert_goes_on(model, many, tmp_path / "out", undisturbed)


def test_a_worker_is_killed(model: Path, many: Path, undisturbed: dict[str, bytes], tmp_path: Path) -> None:
    out = tmp_path / "out"
    process = start(model, many, out, 2, *SHARDS)
    wait_until(lambda: len(records(out)) > 5)
    writers = {int(path.name.split("-")[-1].split(".")[0]) for path in out.rglob("*.tar.*.partial")}
    workers = [c.pid for c in psutil.Process(process.pid).children() if "spawn_main" in " ".join(c.cmdline())]
    os.kill(next(iter(writers & set(workers)), workers[0]), signal.SIGKILL)
    said = process.communicate(timeout=60)[1]
    assert process.returncode == 2
    assert "a worker process was ended from outside" in said
    assert len(said.splitlines()) == 1
    assert_goes_on(model, many, out, undisturbed)


def test_a_signal_ends_the_command_and_its_claims(
    model: Path, many: Path, undisturbed: dict[str, bytes], tmp_path: Path
) -> None:
    out = tmp_path / "out"
    process = start(model, many, out, 1, *SHARDS)
    wait_until(lambda: len(records(out)) > 5)
    process.terminate()
    assert "run the same command again to go on" in process.communicate(timeout=60)[1]
    assert process.returncode == 128 + signal.SIGTERM
    assert list((work_of(out) / "claims").iterdir()) == []
    assert_goes_on(model, many, out, undisturbed)


def test_commands_at_once_share_the_work(
    model: Path, many: Path, undisturbed: dict[str, bytes], tmp_path: Path
) -> None:
    processes = [start(model, many, tmp_path / "out", workers, *SHARDS) for workers in (1, 2, 1)]
    said = [process.communicate(timeout=120) for process in processes]
    assert [process.returncode for process in processes] == [0, 0, 0], said
    assert all("train: 2" in out for out, _ in said)
    assert files_of(tmp_path / "out") == undisturbed


@pytest.fixture
def unfinished(model: Path, tmp_path: Path) -> tuple[Path, Path]:
    """Texts, and an output folder that lacks the one shard that is larger than a file may be."""
    texts, out = write_texts(tmp_path / "texts", files=6, words=50), tmp_path / "out"
    (texts / "long.txt").write_text("some long text " * 9000)
    words = ["--tokenizer", str(model), "--input", str(texts), "--output", str(out), *SHARDS]
    done = subprocess.run(
        [sys.executable, "-m", "tokenizer.encode", *words],
        capture_output=True,
        text=True,
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (60_000, 60_000)),
    )
    assert done.returncode == 2
    assert "cannot be written to" in done.stderr
    assert "File too large); mend that, and run the same command again to go on" in done.stderr
    assert len(done.stderr.splitlines()) == 1
    return texts, out


def test_a_full_disk(model: Path, unfinished: tuple[Path, Path], tmp_path: Path) -> None:
    texts, out = unfinished
    assert not list(out.rglob("*.tar*partial"))
    assert list((work_of(out) / "claims").iterdir()) == []
    assert run_encode(model, texts, out, *SHARDS) == 0
    assert run_encode(model, texts, tmp_path / "fresh", *SHARDS) == 0
    assert files_of(out) == files_of(tmp_path / "fresh")


@pytest.fixture
def holder(unfinished: tuple[Path, Path]) -> Iterator[subprocess.Popen[str]]:
    """Another process that has claimed the shards that are left."""
    _, out = unfinished
    plan = json.loads((work_of(out) / "plan" / "plan.json").read_bytes())
    left = [shard[0] for shard in plan["shards"] if shard[0] not in records(out)]
    command = [sys.executable, "-c", HOLDER, str(work_of(out) / "claims"), *left]
    process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    assert process.stdout
    assert process.stdout.readline() == f"{[True] * len(left)}\n"
    yield process
    process.kill()
    process.communicate()


def test_the_rest_is_waited_for_and_taken_over(
    model: Path,
    unfinished: tuple[Path, Path],
    holder: subprocess.Popen[str],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    texts, out = unfinished
    process = start(model, texts, out, 1, *SHARDS)
    assert process.stderr
    assert "waiting for 1 other processes that encode" in process.stderr.readline()
    assert not (out / MANIFEST_NAME).exists()
    for options in ([], ["--overwrite"]):
        assert run_encode(model, texts, out, "--shard-bytes", "9", *options) == 2
        assert "1 processes write a corpus of other texts, options" in capsys.readouterr().err
    holder.kill()
    holder.wait()
    assert process.wait(60) == 0
    assert len(Manifest.load(out).shards("train")) == 5


def test_a_corpus_that_is_replaced_stays_until_the_new_one_is_whole(
    model: Path, many: Path, undisturbed: dict[str, bytes], tmp_path: Path
) -> None:
    texts, out = write_texts(tmp_path / "texts", files=6, words=50), tmp_path / "out"
    assert run_encode(model, texts, out, *SHARDS) == 0
    before = files_of(out)
    process = start(model, many, out, 1, *SHARDS, "--overwrite")
    wait_until(lambda: len(records(out)) > 5)
    process.kill()
    process.communicate()
    assert {name: (out / name).read_bytes() for name in before} == before
    assert run_encode(model, texts, out, *SHARDS) == 0  # it is still there
    assert run_encode(model, many, out, *SHARDS, "--overwrite") == 0
    assert files_of(out) == undisturbed


@pytest.mark.parametrize("at", ["unlink", "replace"])
def test_killed_while_finishing(
    at: str, model: Path, texts: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In the middle of replacing a corpus: the same command ends as if nothing had happened."""
    out = tmp_path / "out"
    assert run_encode(model, texts, out, "--shard-bytes", "3000") == 0
    calls, real = [], getattr(folder.os, at)

    def killed(*arguments: object, **options: object) -> None:
        if Path(str(arguments[-1])).parent == out and "train-" in str(arguments[-1]):
            calls.append(1)
            if len(calls) == 3:
                raise KeyboardInterrupt
        real(*arguments, **options)

    words = ["--shard-bytes", "9000", "--overwrite"]
    with monkeypatch.context() as patch:
        patch.setattr(folder.os, at, killed)
        with pytest.raises(KeyboardInterrupt):
            run_encode(model, texts, out, *words)
    assert not (out / MANIFEST_NAME).exists()
    assert run_encode(model, texts, out, *words) == 0
    assert run_encode(model, texts, tmp_path / "fresh", "--shard-bytes", "9000") == 0
    assert files_of(out) == files_of(tmp_path / "fresh")


def test_nothing_of_others_is_removed(
    model: Path, texts: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    (out / "work").mkdir(parents=True)
    (out / "work" / "thesis.tex").touch()
    for name in ("train-000000.tar", "tokenizer.json"):
        (out / name).write_text("mine")
        assert run_encode(model, texts, out, "--overwrite") == 2
        assert f"holds {name}, which belongs to no corpus there" in capsys.readouterr().err
        assert (out / name).read_text() == "mine"
        (out / name).unlink()
    own = out / "tokenizer.model"  # the tokenizer may lie where the corpus will
    own.write_bytes(model.read_bytes())
    assert run_encode(own, texts, out) == 0
    assert run_encode(own, texts, out, "--shard-bytes", "3000", "--overwrite") == 0
    assert own.read_bytes() == model.read_bytes()
    assert (out / "work" / "thesis.tex").exists()


def test_an_input_that_changes_while_it_is_read(
    model: Path, texts: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    own = write_texts(tmp_path / "own", files=4, words=50)
    real = shards.encode_document

    def slow(vocabulary: object, identifier: str, text: str, dtype: str) -> object:
        if identifier == "text0002.txt":
            (own / identifier).write_text(text[::-1])
        return real(vocabulary, identifier, text, dtype)

    monkeypatch.setattr(shards, "encode_document", slow)
    assert run_encode(model, own, tmp_path / "out", *SHARDS, "--workers", "1") == 2
    assert "text0002.txt was changed while it was being encoded" in capsys.readouterr().err


def test_other_times_of_the_inputs_do_not_matter(
    model: Path, unfinished: tuple[Path, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Machines may have copies of their own."""
    texts, out = unfinished
    kept = records(out)
    for path in texts.iterdir():
        os.utime(path, (1, 1))
    assert run_encode(model, texts, out, *SHARDS) == 0
    assert kept == {name: (out / name).stat().st_mtime_ns for name in kept}


def test_a_claim_put_back_too_late_does_not_stay(tmp_path: Path) -> None:
    first, second = Claims(tmp_path), Claims(tmp_path)
    assert first.acquire("unit")
    assert not second.acquire("unit")
    os.rename(tmp_path / "unit", tmp_path / "aside")
    first.release("unit")
    os.link(tmp_path / "aside", tmp_path / "unit")
    assert first.acquire("unit")
    os.utime(tmp_path / "unit", (1, 1))
    assert second.acquire("unit")  # nobody touches it


def test_an_unfinished_folder_of_other_options_is_refused(
    model: Path, unfinished: tuple[Path, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    texts, out = unfinished
    assert run_encode(model, texts, out, "--shard-bytes", "900") == 2
    assert "holds an unfinished corpus made from other texts, options" in capsys.readouterr().err
    assert run_encode(model, texts, out, "--shard-bytes", "900", "--overwrite") == 0
    assert run_encode(model, texts, tmp_path / "fresh", "--shard-bytes", "900") == 0
    assert files_of(out) == files_of(tmp_path / "fresh")


def test_claims_of_this_machine_and_others(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(claims, "BEAT_SECONDS", 0.01)
    mine = Claims(tmp_path)
    foreign = json.dumps(["elsewhere pid:[1]", os.getpid(), "1", "nonce"])
    gone = json.dumps([claims.machine_name(), os.getpid(), "not its start", "nonce"])
    for name, content, age in (("a", foreign, 60), ("b", foreign, 180), ("c", gone, 0), ("d", "", 60), ("e", "", 180)):
        (tmp_path / name).write_text(content)
        now = (tmp_path / name).stat().st_mtime
        os.utime(tmp_path / name, (now - age, now - age))
    assert set(mine.owners()) == {"a", "d"}
    with mine:
        assert [unit for unit in "abcdef" if mine.acquire(unit)] == ["b", "c", "e", "f"]
        assert not Claims(tmp_path).acquire("f")
        os.utime(tmp_path / "f", (1, 1))
        wait_until(lambda: (tmp_path / "f").stat().st_mtime > 1)  # touched while it is held
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a", "d"]


def test_a_claim_that_was_renewed_meanwhile_is_put_back(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two processes find a stale claim; the slower one puts aside what the faster one has made."""
    (tmp_path / "unit").write_text(json.dumps([claims.machine_name(), os.getpid(), "not its start", "nonce"]))
    slow, fast = Claims(tmp_path), Claims(tmp_path)
    real, calls = os.rename, []

    def rename(source: Path, target: Path) -> None:
        if not calls:
            calls.append(1)
            assert fast.acquire("unit")
        real(source, target)

    monkeypatch.setattr(claims.os, "rename", rename)
    assert not slow.acquire("unit")
    assert [path.name for path in tmp_path.iterdir()] == ["unit"]


def peak_memory(*words: str) -> int:
    """Bytes of the largest process that a command needed."""
    script = f"import resource, sys; from tokenizer import encode; assert encode.main({list(words)!r}) == 0; print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return 1024 * int(done.stdout.splitlines()[-1])


def test_a_document_of_fifty_million_tokens(model: Path, texts: Path, tmp_path: Path) -> None:
    """Memory for it is a few times its text: the text, the ids, and their copies on the way to the shard."""
    text = "".join(path.read_text() for path in sorted(texts.iterdir()))
    (tmp_path / "long.txt").write_text(text * (82_000_000 // len(text) + 1))
    size = (tmp_path / "long.txt").stat().st_size
    words = ["--tokenizer", str(model), "--validation-fraction", "0", "--quiet", "--input"]
    small = peak_memory(*words, str(texts), "--output", str(tmp_path / "small"))
    large = peak_memory(*words, str(tmp_path / "long.txt"), "--output", str(tmp_path / "large"))
    assert Manifest.load(tmp_path / "large").tokens("train") > 50_000_000
    assert large - small < 10 * size
