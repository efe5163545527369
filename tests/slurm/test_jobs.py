"""Jobs of a real Slurm end with the same weights as a run that nothing disturbs, whatever happens to them."""

from __future__ import annotations

import os
import re
import signal
import time
from pathlib import Path

import psutil
import pytest

from tests.slurm.box import ENDED, SlurmBox
from tests.slurm.jobs import (
    STEPS,
    assert_same,
    environment,
    losses,
    overrides,
    rows,
    submit,
    wait_for_step,
)
from tests.tokenizer.small_corpus import files_of, train_model, write_texts
from tokenizer import encode

pytestmark = [pytest.mark.slurm, pytest.mark.timeout(900)]


def ranks_of(run: str) -> list[psutil.Process]:
    """The training processes of a run, on whatever node."""
    found = []
    for process in psutil.process_iter(["cmdline"]):
        words = process.info["cmdline"] or []
        if f"name={run}" in words and "launch/pretrain.py" in words and "torch.distributed.run" not in words:
            found.append(process)
    return [one for one in found if one.parent() is None or one.parent() not in found]


def test_a_job_on_two_nodes_checks_them_and_runs_to_the_end(box: SlurmBox, corpus, undisturbed, tmp_path):
    output = tmp_path / "job.out"
    arguments = overrides(corpus, tmp_path, "whole", STEPS)
    number = submit(box, output, "pretrain_1b.sh", *arguments, **environment(check=True))
    assert box.wait(number)["JobState"] == "COMPLETED", output.read_text()
    text = output.read_text()
    assert all(re.search(rf"^{name} ", text, re.MULTILINE) for name in box.names)  # the table of the health check
    assert "layout  2 ranks on cpu: tensor 1, pipeline 1, context 1, data 2" in text
    assert f"launch ended: finished at step {STEPS}" in text
    assert_same(tmp_path / "whole", undisturbed, tmp_path)


@pytest.mark.slow  # the preempted job goes the same way
def test_usr1_saves_queues_again_and_resumes_exactly(box: SlurmBox, corpus, undisturbed, tmp_path):
    output, run = tmp_path / "job.out", tmp_path / "asked"
    number = submit(box, output, "pretrain_1b.sh", *overrides(corpus, tmp_path, "asked", STEPS, save_interval=1000))
    wait_for_step(box, number, run, 8)
    box.command("scancel", "--signal=USR1", "--batch", number)
    box.rerun_now(number)
    stopped = max(row["step"] for row in rows(run))
    assert 8 <= stopped < STEPS
    assert (run / "checkpoints" / f"step_{stopped:08d}").is_dir()  # where it stood, not at an interval
    job = box.wait(number)
    text = output.read_text()
    assert job["JobState"] == "COMPLETED", text
    assert job["Restarts"] == "1"
    assert "asking all ranks to save" in text
    assert f"launch ended: stopped at step {stopped}" in text
    assert text.count("job " + str(number)) == 2  # one file for both starts
    assert_same(run, undisturbed, tmp_path)


@pytest.mark.slow
def test_slurm_itself_sends_the_signal_before_the_time_limit(box: SlurmBox, corpus, tmp_path):
    """With a limit of two minutes and a signal one minute before: some 36 seconds after the start, as Slurm rounds."""
    output, run, steps = tmp_path / "job.out", tmp_path / "limited", 2400
    arguments = overrides(corpus, tmp_path, "limited", steps, save_interval=1000)
    options = ["--nodes=2", "--gpus-per-node=0", "--time=2", "--signal=B:USR1@60", f"--output={output}"]
    number = box.sbatch(*options, "slurm/pretrain_1b.sh", *arguments, "validation.interval=0", **environment())
    for _ in range(8):
        if box.wait(number, (*ENDED, "PENDING"), seconds=200)["JobState"] != "PENDING":
            break
        box.rerun_now(number)
        box.wait(number, ("RUNNING",))
    job = box.job(number)
    assert job["JobState"] == "COMPLETED", output.read_text()
    assert int(job["Restarts"]) >= 1
    assert [row["step"] for row in rows(run)] == list(range(1, steps + 1))


def test_a_job_that_is_always_ended_too_early_gives_up(box: SlurmBox, corpus, tmp_path):
    """The signal comes while the ranks are still importing: nothing is there to go on from."""
    output = tmp_path / "job.out"
    number = submit(box, output, "pretrain_1b.sh", *overrides(corpus, tmp_path, "early", 5), EM_MAX_IDLE="0")
    box.wait(number, ("RUNNING",))
    time.sleep(3)
    box.command("scancel", "--signal=USR1", "--batch", number)
    assert box.wait(number)["JobState"] == "FAILED"
    assert "was asked to end 1 times before it had anything new to go on from" in output.read_text()


def test_a_preempted_job_saves_in_its_grace_time_and_is_run_again(box: SlurmBox, corpus, undisturbed, tmp_path):
    output, run = tmp_path / "job.out", tmp_path / "preempted"
    number = submit(box, output, "pretrain_1b.sh", *overrides(corpus, tmp_path, "preempted", STEPS, save_interval=1000))
    wait_for_step(box, number, run, 8)
    urgent = tmp_path / "urgent.sh"
    urgent.write_text("#!/bin/bash\ntrue\n")
    other = box.sbatch("--partition=urgent", "--nodes=2", "--exclusive", f"--output={tmp_path}/urgent.out", urgent)
    box.rerun_now(number)
    assert box.wait(other)["JobState"] == "COMPLETED"
    stopped = max(row["step"] for row in rows(run))
    assert (run / "checkpoints" / f"step_{stopped:08d}").is_dir()
    job = box.wait(number)
    assert job["JobState"] == "COMPLETED", output.read_text()
    assert job["Restarts"] == "1"
    assert f"launch ended: stopped at step {stopped}" in output.read_text()
    assert_same(run, undisturbed, tmp_path)


def test_a_killed_rank_and_a_node_that_dies(box: SlurmBox, corpus, undisturbed, tmp_path):
    """The rank's launch is started again within the job; for the node's Slurm queues the job again."""
    output, run = tmp_path / "job.out", tmp_path / "struck"
    number = submit(box, output, "pretrain_1b.sh", *overrides(corpus, tmp_path, "struck", STEPS, save_interval=5))
    wait_for_step(box, number, run, 12)
    ranks_of("struck")[-1].send_signal(signal.SIGKILL)
    wait_for_step(box, number, run, 25)
    assert "starting again" in output.read_text()
    box.crash(box.names[1])
    box.command(
        "scontrol", "update", f"NodeName={box.names[1]}", "State=DOWN", "Reason=crashed"
    )  # not after SlurmdTimeout
    box.boot(box.names[1])
    box.rerun_now(number)
    job = box.wait(number)
    assert job["JobState"] == "COMPLETED", output.read_text()
    assert job["Restarts"] == "1"
    assert len(re.findall("resumed from", output.read_text())) >= 2
    assert_same(run, undisturbed, tmp_path)


@pytest.mark.slow
def test_a_cancelled_job_saves_and_goes_on_with_another_number_of_nodes(box: SlurmBox, corpus, undisturbed, tmp_path):
    output, run = tmp_path / "job.out", tmp_path / "moved"
    arguments = overrides(corpus, tmp_path, "moved", STEPS, save_interval=1000)
    number = submit(box, output, "pretrain_1b.sh", *arguments)
    wait_for_step(box, number, run, 8)
    box.command("scancel", number)
    assert box.wait(number)["JobState"] == "CANCELLED"
    stopped = max(row["step"] for row in rows(run))
    assert (run / "checkpoints" / f"step_{stopped:08d}").is_dir()
    number = submit(box, output, "pretrain_1b.sh", *arguments, nodes=1)
    assert box.wait(number)["JobState"] == "COMPLETED", output.read_text()
    assert "1 ranks on cpu" in output.read_text()
    expected, actual = losses(undisturbed), losses(run)
    assert [row[:2] for row in actual] == [row[:2] for row in expected]
    assert [row[2] for row in actual] == pytest.approx([row[2] for row in expected], rel=1e-4)


@pytest.mark.slow
def test_an_array_compares_variants(box: SlurmBox, corpus, tmp_path):
    """The last task, whose number also stands for the whole array, is queued again alone."""
    variants = tmp_path / "variants.txt"
    variants.write_text("# two memories\n\nsmall memory.order=8\nlarge memory.order=24 memory.slots=12\n")
    arguments = [*overrides(corpus, tmp_path, "unnamed", STEPS, save_interval=1000), "validation.interval=0"]
    options = ["--array=1-2", "--nodes=1", "--gpus-per-node=0", "--time=10", f"--output={tmp_path}/%a.out"]
    recipe = "launch/recipes/pretrain_1b.yaml"
    number = box.sbatch(*options, "slurm/compare.sh", recipe, variants, *arguments, **environment())
    last = f"{number}_2"
    wait_for_step(box, last, tmp_path / "large", 3)
    box.command("scancel", "--signal=USR1", "--batch", last)
    box.rerun_now(last)
    for task, name, restarts in ((1, "small", "0"), (2, "large", "1")):
        job, text = box.wait(f"{number}_{task}"), (tmp_path / f"{task}.out").read_text()
        assert (job["JobState"], job["Restarts"]) == ("COMPLETED", restarts), text
        assert (tmp_path / name / "evaluation").is_dir()
        assert [row["step"] for row in rows(tmp_path / name)] == list(range(1, STEPS + 1))
    assert "order: 24" in (tmp_path / "large" / "config.yaml").read_text()
    assert not (tmp_path / "unnamed").exists()


@pytest.mark.slow
def test_a_sigterm_that_slurm_does_not_follow_up(box: SlurmBox, corpus, tmp_path):
    """As in a grace time that is longer than anyone waits: the job is not taken for done."""
    output, run = tmp_path / "job.out", tmp_path / "left"
    arguments = overrides(corpus, tmp_path, "left", STEPS, save_interval=1000)
    number = submit(box, output, "pretrain_1b.sh", *arguments, nodes=1, EM_GRACE_SECONDS="1")
    wait_for_step(box, number, run, 3)
    box.command("scancel", "--signal=TERM", number)
    box.rerun_now(number)
    job = box.wait(number)
    assert (job["JobState"], job["Restarts"]) == ("COMPLETED", "1"), output.read_text()
    assert [row["step"] for row in rows(run) if row["kind"] == "train"] == list(range(1, STEPS + 1))


def test_texts_are_encoded_by_the_tasks_of_an_array(box: SlurmBox, tmp_path):
    """Three tasks on two nodes, so that one of them starts later; then the same again as one task, which finds all done."""
    texts = write_texts(tmp_path / "texts", files=90, words=50)
    model = train_model(texts, tmp_path / "tokenizer.model")
    words = ["--tokenizer", str(model), "--input", str(texts), "--shard-bytes", "1"]
    options = ["--gpus-per-node=0", "--time=10", f"--output={tmp_path}/%a.out"]
    script = ["slurm/tokenize.sh", *words, "--output", str(tmp_path / "shards")]
    number = box.sbatch(*options, "--array=0-2", *script, **environment())
    for task in range(3):
        ended = box.wait(f"{number}_{task}")["JobState"]
        assert ended == "COMPLETED", (tmp_path / f"{task}.out").read_text()
    assert encode.main([*words, "--output", str(tmp_path / "local"), "--quiet"]) == 0
    assert files_of(tmp_path / "shards") == files_of(tmp_path / "local")
    again = submit(box, tmp_path / "again.out", "tokenize.sh", *script[1:], nodes=1)
    assert box.wait(again)["JobState"] == "COMPLETED"
    assert "already holds this corpus" in (tmp_path / "again.out").read_text()


@pytest.mark.slow
def test_a_first_look_at_a_cluster(box: SlurmBox, tmp_path):
    output = tmp_path / "job.out"
    number = submit(box, output, "debug_multinode.sh", EM_HEALTH_CHECK="1")
    assert box.wait(number)["JobState"] == "COMPLETED", output.read_text()
    text = output.read_text()
    assert text.count("fit to train on CPU processes") == 2  # the doctor on each node
    assert "fit to train: 2 nodes, 2 ranks, 0 GPUs" in text  # and the health check over both


def test_a_head_node_that_cannot_be_resolved_ends_the_job_at_once(box: SlurmBox, corpus, tmp_path):
    output = tmp_path / "job.out"
    started = time.monotonic()
    box.hosts(known=False)
    try:
        arguments = overrides(corpus, tmp_path, "lost", 5)
        number = submit(box, output, "pretrain_1b.sh", *arguments, EM_MAX_RESTARTS="0")
        assert box.wait(number)["JobState"] == "FAILED"
    finally:
        box.hosts(known=True)
    assert f"the name of the head node, {box.names[0]}, cannot be resolved here" in output.read_text()
    assert time.monotonic() - started < 30
    assert not (tmp_path / "lost").exists()


def test_a_head_node_that_resolves_to_this_machine_is_refused(box: SlurmBox, corpus, tmp_path):
    output = tmp_path / "job.out"
    arguments = overrides(corpus, tmp_path, "lost", 5)
    number = submit(box, output, "pretrain_1b.sh", *arguments, EM_MAX_RESTARTS="0", EM_ONE_MACHINE="0")
    assert box.wait(number)["JobState"] == "FAILED"
    first, second = box.names
    assert f"error ({second}): the head node {first} resolves to 127.0.1.1 here" in output.read_text()


def test_a_recipe_that_cannot_work_is_not_started_again(box: SlurmBox, corpus, tmp_path):
    output = tmp_path / "job.out"
    number = submit(box, output, "pretrain_1b.sh", *overrides(corpus, tmp_path, "wrong", 5), "memory.ordr=3")
    job = box.wait(number)
    assert (job["JobState"], job["ExitCode"]) == ("FAILED", "2:0")
    text = output.read_text()
    assert text.count("error: unknown config key 'memory.ordr': did you mean 'memory.order'?") == 1
    assert "launch ended: refused" in text
    assert "starting again" not in text


def test_every_script_is_accepted(slurm_packages, tmp_path):
    scripts = sorted(Path("slurm").glob("*.sh"))
    batch = [path for path in scripts if "#SBATCH --job-name" in path.read_text()]
    assert len(batch) == 9
    with SlurmBox(tmp_path, nodes=32, prefix=f"big{os.getpid()}-", gpus=8) as many:
        for path in batch:
            assert "to start at" in many.command("sbatch", "--test-only", path, "argument")
        assert "not available" in many.command(
            "sbatch", "--test-only", "--nodes=33", "slurm/pretrain_7b.sh", check=False
        )
