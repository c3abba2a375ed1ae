"""Job arrays on a real cluster: data in parts, sweeps, and what follows a run."""

from __future__ import annotations

import hashlib
import os
import signal
from pathlib import Path

import cluster
import pytest
from conftest import Job, Site
from launch import read_metrics
from test_slurm_jobs import python_process

from data_pipeline.prepare import prepare

pytestmark = [pytest.mark.slurm, pytest.mark.usefixtures("running_cluster")]


def files(folder: Path) -> dict[str, str]:
    return {
        str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(folder.rglob("*"))
        if path.is_file() and ".preparing" not in path.parts
    }


def test_data_in_four_parts_one_killed_is_what_one_process_makes(site: Site) -> None:
    options = ["--source", "stdlib", "--tokenizer", "bytes", "--limit", "400", "--shard-bytes", "50000"]
    job = site.sbatch("--array=1-4", "slurm/prepare_data.sh", *options, "--workers", "1", "--out", "data/all")
    tasks = [Job(number, site) for number in range(job.number, job.number + 4)]
    records = site.folder / "data" / "all.parts" / "2" / ".preparing"
    victims = {f"SLURM_ARRAY_JOB_ID={job.number}", "SLURM_ARRAY_TASK_ID=2"}
    job.wait(lambda: records.exists() and any(records.iterdir()))
    os.kill(python_process(victims), signal.SIGKILL)
    job.wait(lambda: any(task.restarts == 1 for task in tasks))
    for task in tasks:
        task.end()
    assert "killed (137): starting again" in job.log
    assert "data/all: merged from 4 parts, and verified" in job.log
    alone = site.folder / "data" / "alone"
    prepare("stdlib", "bytes", alone, limit=400, shard_bytes=50_000, workers=2)
    assert files(site.folder / "data" / "all") == files(alone)
    assert not (site.folder / "data" / "all.parts").exists()


def test_a_sweep_makes_a_run_for_each_combination_and_evaluation_follows_success(site: Site) -> None:
    config = str(site.config("swept"))
    code, output = site.script("slurm/sweep.sh", "--ntasks-per-node=1", config, "run.seed=3,4", "schedule.steps=20")
    job = site.job(code, output)
    after = [f"--dependency=afterok:{job.number}", "slurm/export_eval.sh"]
    follower = site.sbatch(*after, "runs/swept-seed_3", "--suite", "perplexity", "--data", str(site.data))
    for task in (Job(job.number, site), Job(job.number + 1, site)):
        task.end()
    losses = [read_metrics(site.run(f"swept-seed_{seed}"))[-1]["loss"] for seed in (3, 4)]
    assert losses[0] != losses[1]
    follower.end()
    assert (site.run("swept-seed_3") / "report.html").exists()


def test_each_task_of_an_array_is_requeued_alone_the_last_one_too(site: Site) -> None:
    config = str(site.config("warned", {"schedule.steps": 60}))
    code, output = site.script("slurm/sweep.sh", "--ntasks-per-node=1", config, "run.seed=3,4")
    array = site.job(code, output)
    held = []
    for number in (0, 1):
        array.wait(lambda n=number: array.steps(f"warned-seed_{3 + n}") >= 2)
        task = {f"SLURM_ARRAY_JOB_ID={array.number}", f"SLURM_ARRAY_TASK_ID={number}", "SLURM_STEP_ID=0"}
        held.append(python_process(task))
        os.kill(held[-1], signal.SIGSTOP)  # so that it is not done before the other is told
    # By its number alone the last one would stand for the whole array.
    cluster.ask("scancel", "--signal=USR2", f"{array.number}_1")
    os.kill(held[1], signal.SIGCONT)
    array.wait(lambda: restarts(array, 1) == 1)
    assert restarts(array, 0) == 0
    os.kill(held[0], signal.SIGCONT)
    for task_job in (Job(array.number, site), Job(array.number + 1, site)):
        task_job.end()
    assert (restarts(array, 0), restarts(array, 1)) == (0, 1)


def restarts(array: Job, number: int) -> int:
    """How often one task of an array was restarted."""
    shown = cluster.ask("scontrol", "show", "job", "--oneliner", f"{array.number}_{number}").stdout
    return int(shown.partition("Restarts=")[2].split()[0])


def test_evaluation_is_cancelled_if_its_job_fails(site: Site) -> None:
    job = site.sbatch("--hold", "--ntasks-per-node=1", "slurm/pretrain.sh", "nothing.yaml")
    follower = site.sbatch(f"--dependency=afterok:{job.number}", "slurm/export_eval.sh", "runs/none")
    cluster.ask("scontrol", "release", str(job.number))
    job.end("FAILED")
    follower.end("CANCELLED")
