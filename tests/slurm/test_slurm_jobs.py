"""Jobs on a real cluster: they finish, are warned, requeued, cancelled, killed, lose a node, and lose nothing else."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import cluster
import pytest
from conftest import Job, Site, make_site
from launch import read_metrics, run_many, without_times

pytestmark = [pytest.mark.slurm, pytest.mark.usefixtures("running_cluster")]
TWO_NODES = ("--nodes=2", "--ntasks-per-node=1")
LONG: dict[str, object] = {"schedule.steps": 200, "checkpoint.every": 20, "validation.every": 100}


@pytest.fixture(scope="module")
def uninterrupted(site: Site) -> list[dict[str, object]]:
    """What every run below must write, whatever happens to it: by the `deepspeed` launcher, on two ranks."""
    os.environ["OMP_NUM_THREADS"] = "1"  # as in the site's settings: sums depend on it
    run_many(2, str(site.config("whole", LONG)))
    return without_times(read_metrics(site.run("whole")))


def is_like(run: Path, uninterrupted: list[dict[str, object]]) -> bool:
    return without_times(read_metrics(run)) == uninterrupted


def python_process(variables: set[str]) -> int:
    """The process id of the Python with these variables in its environment."""
    for path in Path("/proc").glob("[0-9]*"):
        try:
            environment = set((path / "environ").read_bytes().decode(errors="replace").split("\0"))
            if variables <= environment and (path / "comm").read_text().startswith("python"):
                return int(path.name)
        except OSError:
            continue
    raise AssertionError(f"no process with {variables}")


def test_two_nodes_by_bare_sbatch_finish_like_the_local_launcher(site: Site, uninterrupted: list) -> None:
    job = site.sbatch(*TWO_NODES, "slurm/pretrain.sh", str(site.config("bare", LONG)))
    job.end()
    assert is_like(site.run("bare"), uninterrupted)
    assert "finished at step 200" in job.log and "200/200" in job.log, "the job's log shows the first rank"
    logs = site.run("bare") / "logs" / f"{job.number}-0"
    assert {path.name for path in logs.glob("rank-*.log")} == {"rank-0.log", "rank-1.log"}
    assert [path.read_text().split()[:2] for path in sorted(logs.glob("*.exit"))] == [["0", "pt1"], ["0", "pt2"]]


def test_a_requeued_job_runs_what_was_submitted_and_loses_nothing(
    tmp_path: Path, tiny_data: Path, uninterrupted: list
) -> None:
    site = make_site(tmp_path, tiny_data)
    config = site.config("requeued", LONG)
    job = site.submit(*TWO_NODES, str(config), "run.resume=never")
    for path in (config, site.folder / "pretrain" / "train.py", site.folder / "slurm" / "pretrain.sh"):
        path.write_text("not what was submitted")
    job.wait(lambda: job.steps("requeued") >= 50)
    assert cluster.ask("scontrol", "requeue", str(job.number)).returncode == 0
    job.wait(lambda: job.restarts == 1 and job.field("JobState") != "PENDING")
    job.end()
    assert is_like(site.run("requeued"), uninterrupted)
    assert "going on from" in job.log and "start 0" in job.log, "the log goes on where it was"


def test_a_time_limit_warns_saves_requeues_and_goes_on(site: Site, uninterrupted: list) -> None:
    options = (*TWO_NODES, "--time=3", "--signal=USR2@90")  # SLURM looks every 30 s: 90 to 120 s after the start
    job = site.sbatch(*options, "slurm/pretrain.sh", str(site.config("limited", LONG)))
    job.wait(lambda: job.steps("limited") >= 20)
    rank = hold(job)
    job.wait(lambda: is_pending(rank, signal.SIGUSR2))
    with suppress(ProcessLookupError):
        os.kill(rank, signal.SIGCONT)
    job.wait(lambda: job.restarts == 1, seconds=90)
    cluster.ask("scontrol", "update", f"JobId={job.number}", "TimeLimit=30")  # this start's steps may be slow as well
    job.end()
    assert "received SIGUSR2 at step" in job.log
    assert is_like(site.run("limited"), uninterrupted)


def hold(job: Job) -> int:
    """Stop a rank's process: the whole run waits for it, and so cannot be done before what is to happen has."""
    process = python_process({f"SLURM_JOB_ID={job.number}", "SLURM_PROCID=1"})
    os.kill(process, signal.SIGSTOP)
    return process


def is_pending(process: int, number: signal.Signals) -> bool:
    """Whether a stopped process has got a signal, or is gone because it had got it already."""
    try:
        status = Path(f"/proc/{process}/status").read_text()
    except FileNotFoundError:
        return True
    pending = next(line for line in status.splitlines() if line.startswith("ShdPnd"))
    return bool(int(pending.split()[1], 16) >> (number - 1) & 1)


def test_a_preempted_job_saves_makes_room_and_goes_on(site: Site, uninterrupted: list) -> None:
    job = site.sbatch(*TWO_NODES, "slurm/pretrain.sh", str(site.config("preempted", LONG)))
    job.wait(lambda: job.steps("preempted") >= 50)
    urgent = site.sbatch("--partition=urgent", "--nodes=3", "--exclusive", "--wrap=sleep 3")
    urgent.end()
    job.end()
    assert job.restarts == 1 and "received SIGTERM at step" in job.log
    assert is_like(site.run("preempted"), uninterrupted)


def test_a_cancelled_job_saves_and_is_not_requeued(site: Site) -> None:
    job = site.sbatch(*TWO_NODES, "slurm/pretrain.sh", str(site.config("cancelled", LONG)))
    job.wait(lambda: job.steps("cancelled") >= 5)
    code, watched = site.script("slurm/watch.sh")
    (row,) = (line.split() for line in watched.splitlines() if line.startswith(f"│ {job.number} "))
    assert code == 0 and row[3:6:2] == ["cancelled", "RUNNING"] and "pt[1-2]" in row, watched
    cluster.ask("scancel", str(job.number))
    job.end("CANCELLED")
    time.sleep(10)  # a requeued job would be waiting or running by now
    assert (job.field("JobState"), job.field("Restarts")) == ("CANCELLED", "0")
    assert "stopped at step" in (site.run("cancelled") / "outcome").read_text()


def test_a_killed_rank_ends_the_start_at_once_and_the_next_one_goes_on(site: Site, uninterrupted: list) -> None:
    job = site.sbatch(*TWO_NODES, "slurm/pretrain.sh", str(site.config("killed", LONG)))
    job.wait(lambda: job.steps("killed") >= 50)
    os.kill(python_process({f"SLURM_JOB_ID={job.number}", "SLURM_PROCID=1"}), signal.SIGKILL)
    job.wait(lambda: job.restarts == 1, seconds=60)
    job.end()
    assert is_like(site.run("killed"), uninterrupted)
    assert "rank 1 on pt2 ended with 137 (SIGKILL)" in (
        site.run("killed") / "jobs" / str(job.number) / "starts.jsonl"
    ).read_text(encoding="utf-8")


@pytest.fixture
def nodes_come_back() -> Iterator[None]:
    yield
    for node in cluster.cut_nodes():
        cluster.mend(node)


@pytest.mark.usefixtures("nodes_come_back")
@pytest.mark.parametrize("lost", [0, 1], ids=["of the batch script", "another"])
def test_a_lost_node_costs_what_came_after_the_last_checkpoint(site: Site, uninterrupted: list, lost: int) -> None:
    name = f"lost_{lost}"
    job = site.sbatch(*TWO_NODES, "slurm/pretrain.sh", str(site.config(name, LONG)))
    job.wait(lambda: job.steps(name) >= 50)
    hold(job)
    nodes = cluster.ask("scontrol", "show", "hostnames", job.field("NodeList")).stdout.split()
    cluster.cut(nodes[lost])
    job.wait(lambda: job.restarts == 1 and job.field("JobState") == "RUNNING")
    left = cluster.ask("scontrol", "show", "hostnames", job.field("NodeList")).stdout.split()
    assert len(left) == 2 and nodes[lost] not in left
    job.end()
    assert is_like(site.run(name), uninterrupted)


@pytest.mark.usefixtures("nodes_come_back")
@pytest.mark.parametrize("lost", [0, 1], ids=["of the batch script", "another"])
def test_a_job_goes_on_with_the_nodes_that_are_left(site: Site, uninterrupted: list, lost: int) -> None:
    name = f"fewer_{lost}"
    cluster.cut("pt3")
    cluster.wait_for("the loss of pt3", lambda: "pt3" in cluster.nodes("down"))
    job = site.sbatch(*TWO_NODES, "slurm/pretrain.sh", str(site.config(name, LONG)))
    job.wait(lambda: job.steps(name) >= 50)
    cluster.cut(("pt1", "pt2")[lost])
    job.end()
    assert job.field("NodeList") == ("pt2", "pt1")[lost]
    assert "1 of 2 nodes are left: the batch fits 1 of them, batch.micro_sequences=4" in job.log
    records = without_times(read_metrics(site.run(name)))
    assert [record["step"] for record in records] == list(range(1, 201))
    for ours, theirs in zip(records, uninterrupted, strict=True):
        assert (ours["tokens"], ours["learning_rate"]) == (theirs["tokens"], theirs["learning_rate"])
        assert ours["loss"] == pytest.approx(theirs["loss"], rel=1e-3), f"step {ours['step']}: other batches"


def test_preflight_names_a_bad_node_excludes_it_and_requeues_without_it(tmp_path: Path, tiny_data: Path) -> None:
    site = make_site(tmp_path, tiny_data)
    with (site.folder / "slurm" / "site.env").open("a") as settings:
        settings.write("PREFLIGHT=1\nPREFLIGHT_COMMAND='test $(hostname) != pt2 || { echo its fan is loud; false; }'\n")
    job = site.submit(*TWO_NODES, str(site.config("examined")))
    job.end()
    assert "preflight: pt2: PREFLIGHT_COMMAND ended with 1: its fan is loud" in job.log
    assert "preflight: 2 nodes are fit" in job.log
    assert (job.field("Restarts"), job.field("ExcNodeList"), job.field("NodeList")) == ("1", "pt2", "pt[1,3]")
    assert (site.folder / "slurm" / "exclude").read_text().startswith("pt2 ")
    following = site.submit("--hold", *TWO_NODES, str(site.config("next")))
    assert following.field("ExcNodeList") == "pt2"
    cluster.ask("scancel", str(following.number))
    unaware = site.sbatch(*TWO_NODES, "slurm/pretrain.sh", str(site.config("unaware")))
    unaware.end()
    assert "slurm/exclude names pt2: starting again without" in unaware.log
    assert (unaware.field("Restarts"), unaware.field("NodeList")) == ("1", "pt[1,3]")


def test_a_job_that_gets_no_further_ends_with_a_page_that_says_why(site: Site) -> None:
    config = site.config("fruitless", {"optimizer.learning_rate": 1e30, "optimizer.gradient_clip": None})
    job = site.sbatch(*TWO_NODES, "slurm/pretrain.sh", str(config))
    job.end("FAILED")
    page = (site.run("fruitless") / "failure.md").read_text()
    for part in ("reason: step ", "the step was not applied", "node: pt", "last step saved: 0", "| 0 | pt["):
        assert part in page, page
    assert job.field("Restarts") == "0", "the same batch would give the same again"


def jobs() -> set[str]:
    """The jobs in the queue."""
    return set(cluster.ask("squeue", "--noheader", "--format=%i").stdout.split())


@pytest.mark.parametrize(
    ("options", "arguments", "message"),
    [
        ((), (), "no config"),
        ((), ("model.widht=3",), "unknown key model.widht=3; did you mean model.width?"),
        ((), ("data.path=/nowhere",), "/nowhere"),
        (("--partition=nope",), (), "invalid partition specified: nope"),
        (("--nodes=4",), ("batch.micro_sequences=1",), "Requested node configuration is not available"),
        ((), ("batch.global_sequences=9", "batch.micro_sequences=3"), "is not a multiple of 2 ranks"),
    ],
)
def test_mistakes_are_refused_at_submission(
    site: Site, options: tuple[str, ...], arguments: tuple[str, ...], message: str
) -> None:
    config = [] if message == "no config" else [str(site.config("refused"))]
    before = jobs()
    code, output = site.script("slurm/submit.sh", *TWO_NODES, *options, *config, *arguments)
    errors = [line for line in output.splitlines() if line.startswith("error: ")]
    assert code == 2 and len(errors) == 1 and message in errors[0], output
    assert jobs() <= before
    assert not site.run("refused").exists()


def test_a_dry_run_asks_slurm_and_submits_nothing(site: Site) -> None:
    before = jobs()
    code, output = site.script("slurm/submit.sh", "--dry-run", *TWO_NODES, str(site.config("dry")), "run.seed=3")
    assert code == 0 and "to start at" in output, output
    assert any(line.startswith("sbatch ") and "run.seed=3" in line for line in output.splitlines())
    assert any(line.startswith("srun ") and "pretrain.train" in line for line in output.splitlines())
    assert jobs() <= before and not site.run("dry").exists()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--gpus-per-node=1", "--ntasks-per-node=2"), "4 tasks on 2 nodes of 1 accelerators"),
        (("--ntasks-per-node=1",), "no accelerators asked for: add --gpus-per-node=N"),
    ],
)
def test_more_tasks_than_accelerators_are_refused(
    tmp_path: Path, tiny_data: Path, options: tuple[str, ...], message: str
) -> None:
    site = make_site(tmp_path, tiny_data)
    settings = site.folder / "slurm" / "site.env"
    settings.write_text(settings.read_text().replace("DS_ACCELERATOR=cpu", ""))
    before = jobs()
    code, output = site.script("slurm/submit.sh", "--nodes=2", *options, str(site.config("greedy")))
    assert code == 2 and message in output, output
    assert jobs() <= before
    assert not site.run("greedy").exists()
