"""Kill a run at every instant that could hurt, start it again, and compare it with a run that was never killed.

    python -m benchmarks.kill_matrix [--kills 108] [--work DIR] [--out docs/results/kill_matrix.md]

Each row of the table is one run on two ranks under ZeRO-3, started by the `deepspeed` launcher, killed several times
at one kind of instant and started again with the same command each time, until a last start reaches its end. Then its
metrics.jsonl must be the reference's to the last digit, times, speed and memory apart, and its weights bit by bit.
Rows that are done are kept in the work folder: the same command goes on after an interruption.
"""

from __future__ import annotations

import argparse
import base64
import json
import os
import random
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field, replace
from datetime import date
from pathlib import Path
from typing import Any

from benchmarks.checkpoint_damage import damage_table
from benchmarks.kill_at import Plan
from benchmarks.machine import machine
from benchmarks.small_run import write_run_config

VICTIM = Path(__file__).with_name("kill_at.py")
RANKS, STEPS, SAVE_EVERY = 2, 24, 3
TOKENS_PER_STEP = 8 * 48
"""As `write_run_config` has it."""

VARYING = ("seconds", "tokens_per_second", "mfu", "memory_peak_bytes")
"""What a metrics line may differ in: keys that are one of these or end in it."""

FIRST, EITHER, ALL = "rank 0", "either rank", "all"


@dataclass(frozen=True)
class Instant:
    """One kind of instant: who dies, before or after which of a function's first `calls` calls."""

    title: str
    who: str
    plan: Plan
    calls: int = 1
    """The call is drawn from 1 … calls, so that each kill meets the run somewhere else."""
    seconds: float = 0.0
    """For plans by the clock: drawn from 0 … seconds."""
    resuming: bool = False
    """Whether it is met by starts alone that go on from a checkpoint."""

    def draw(self, chance: random.Random, note: Path) -> Plan:
        """One kill of this kind."""
        rank = {FIRST: 0, EITHER: chance.randrange(RANKS), ALL: None}[self.who]
        call, seconds = chance.randint(1, self.calls), chance.uniform(0.0, self.seconds)
        return replace(self.plan, call=call, seconds=seconds, rank=rank, note=str(note))


def _renaming(pattern: str, when: str) -> Plan:
    """An instant of a save: every file and folder gets its final name by one rename."""
    return Plan("os:rename", when, argument=pattern)


MANIFESTS = "pretrain.checkpoints.manifest"

INSTANTS = [
    Instant("any time of training, one rank", EITHER, Plan("pretrain.train:optimizer_step", "seconds"), seconds=3.0),
    Instant("any time of training, all", ALL, Plan("pretrain.train:optimizer_step", "seconds"), seconds=3.0),
    Instant("while starting", ALL, Plan("pretrain.distributed:start", "seconds"), seconds=2.0),
    Instant("in forward", EITHER, Plan("pretrain.model:PretrainingModel.forward"), 8),
    Instant("in backward", EITHER, Plan("deepspeed:DeepSpeedEngine.backward"), 8),
    Instant("before the optimizer's update", EITHER, Plan("torch.optim:AdamW.step"), 40),
    Instant("after one rank's update", EITHER, Plan("torch.optim:AdamW.step", "after"), 40),
    Instant("before a line of metrics", FIRST, Plan("pretrain.metrics:Metrics.record"), 8),
    Instant("after a line of metrics", ALL, Plan("pretrain.metrics:Metrics.record", "after"), 8),
    Instant("in validation", EITHER, Plan("pretrain.train:validate", "seconds"), 2, seconds=0.02),
    Instant("saving: before the shards are written", EITHER, Plan("deepspeed:DeepSpeedEngine.save_checkpoint"), 3),
    Instant("saving: half the shards written", EITHER, Plan("torch:save", "after"), 9),
    Instant("saving: before the manifest", FIRST, _renaming("manifest.json", "before"), 3),
    Instant("saving: after the manifest", ALL, _renaming("manifest.json", "after"), 3),
    Instant("saving: before the rename", ALL, _renaming("step_*", "before"), 3),
    Instant("saving: after the rename", FIRST, _renaming("step_*", "after"), 3),
    Instant("saving: before `latest` moves", ALL, _renaming("latest", "before"), 3),
    Instant("saving: after `latest` moved", FIRST, _renaming("latest", "after"), 3),
    Instant("saving: an old one half removed", FIRST, Plan("os:unlink", "after", argument="*_states.pt"), 3),
    Instant("resuming: while checksums are verified", EITHER, Plan(f"{MANIFESTS}:check_file"), 3, resuming=True),
    Instant("resuming: while shards are read", EITHER, Plan("torch:load"), 3, resuming=True),
    Instant("resuming: while data is read", EITHER, Plan("data_pipeline.stream:Stream._read"), 2, resuming=True),
]


@dataclass
class Row:
    """What one kind of instant did to one run."""

    title: str
    who: str
    kills: int = 0
    resumes: int = 0
    """Starts that went on from a checkpoint."""
    recomputed: int = 0
    """Steps whose lines were written and then cut off, because the checkpoint was older."""
    tokens_wrong: int = 0
    """Tokens lost or doubled."""
    digits_wrong: int = 0
    """Values of metrics.jsonl that differ from the reference's."""
    weights_wrong: int = 0
    """Parameters whose last weights differ from the reference's in any bit."""
    slowest_end: float = 0.0
    """Most seconds from a kill until no process of the run was left."""
    unexpected: list[str] = field(default_factory=list)
    """Starts that failed without having been killed, and words that no log should hold."""


# ---- one start


def start(config: Path, log: Path, plan: Plan | None = None) -> tuple[int, float]:
    """One start of the run to its end or its death: the launcher's exit code, and seconds since the kill, if any."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    # The part of `deepspeed` that starts and watches a machine's ranks; what comes before it only finds machines.
    world = base64.urlsafe_b64encode(json.dumps({"localhost": list(range(RANKS))}).encode()).decode()
    command = [sys.executable, "-m", "deepspeed.launcher.launch", f"--world_info={world}", f"--master_port={port}"]
    command += ["--log_level=error", str(VICTIM), "--config", str(config)]
    root = str(VICTIM.parent.parent)
    environment = os.environ | {"DS_ACCELERATOR": "cpu", "PYTHONPATH": root} | (plan.as_environment() if plan else {})
    with log.open("ab") as output:
        process = subprocess.Popen(command, env=environment, stdout=output, stderr=output, start_new_session=True)
        code = process.wait(timeout=300)
        while _group_lives(process.pid):
            time.sleep(0.02)
    killed = Path(plan.note).stat().st_mtime if plan and Path(plan.note).exists() else None
    return code, 0.0 if killed is None else time.time() - killed


def _group_lives(group: int) -> bool:
    try:
        os.killpg(group, 0)
    except ProcessLookupError:
        return False
    return True


# ---- one run


def kill_and_compare(instants: list[Instant], kills: int, work: Path, reference: Path, seed: int) -> Row:
    """Kill one run `kills` times, at the instants in turn, let it finish, and compare it with the reference."""
    row = Row(" · ".join(one.title for one in instants), instants[0].who)
    chance = random.Random(seed)
    name = f"run_{seed}"
    shutil.rmtree(work / "runs" / name, ignore_errors=True)
    config, log = write_config(work, name), work / f"{name}.log"
    log.unlink(missing_ok=True)
    run, note = work / "runs" / name, work / f"{name}.killed"
    for number in range(4 * kills):  # a start may end without having met its instant
        if row.kills == kills:
            break
        note.unlink(missing_ok=True)
        step = checkpoint_step(run)
        row.resumes += step > 0
        instant = instants[number % len(instants)]
        if instant.resuming and step == 0:  # there must be a checkpoint first
            start(config, log, replace(_renaming("latest", "after"), note=str(note)))
            continue
        code, seconds = start(config, log, instant.draw(chance, note))
        if note.exists():
            row.kills += 1
            row.slowest_end = max(row.slowest_end, seconds)
            row.recomputed += max(0, lines(run) - checkpoint_step(run))
        elif code != 0:
            row.unexpected.append(f"start {number + 1} ended with {code} unkilled")
        elif checkpoint_step(run) == STEPS:  # it came to its end too early: these kills go on with a fresh one
            compare(row, run, reference)
            shutil.rmtree(run)
    row.resumes += checkpoint_step(run) > 0
    code, _ = start(config, log)
    if code != 0:
        row.unexpected.append(f"the last start ended with {code}")
    if "terminate called" in log.read_text(errors="replace"):
        row.unexpected.append("a rank was aborted: see its log")
    compare(row, run, reference)
    return row


def compare(row: Row, run: Path, reference: Path) -> None:
    """Add to the row in what a finished run differs from the reference."""
    from pretrain.checkpoints import open_checkpoint

    ours, theirs = read_metrics(run), read_metrics(reference)
    seen = [record["step"] for record in ours]
    row.tokens_wrong += sum(abs(seen.count(step) - 1) for step in range(1, STEPS + 1)) * TOKENS_PER_STEP
    row.tokens_wrong += sum(abs(record["tokens"] - record["step"] * TOKENS_PER_STEP) for record in ours)
    for mine, other in zip(ours, theirs, strict=False):
        keys = [key for key in {**mine, **other} if not key.endswith(VARYING)]
        row.digits_wrong += sum(mine.get(key) != other.get(key) for key in keys)
    sharded, whole = open_checkpoint(run), open_checkpoint(reference)
    row.weights_wrong += sum(not bool((sharded.weight(n) == whole.weight(n)).all()) for n in whole.weight_names)


def read_metrics(run: Path) -> list[dict[str, Any]]:
    """A run's metrics.jsonl."""
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]


def lines(run: Path) -> int:
    """Whole lines in a run's metrics.jsonl, which may not exist yet."""
    path = run / "metrics.jsonl"
    return path.read_bytes().count(b"\n") if path.exists() else 0


def checkpoint_step(run: Path) -> int:
    """The step of the newest checkpoint; 0 where there is none."""
    return max((int(path.name[5:]) for path in (run / "checkpoints").glob("step_*")), default=0)


def write_config(work: Path, name: str) -> Path:
    """The run that is killed."""
    changes = {
        "schedule": {"name": "wsd", "steps": STEPS, "warmup_steps": 4, "decay_steps": 8},
        "checkpoint": {"every": SAVE_EVERY, "keep": 2},
        "validation.every": 6,
    }
    return write_run_config(work, work / "data", name, changes)


def make_reference(work: Path) -> Path:
    """The run that is never killed; its folder. Made once in a work folder."""
    from data_pipeline.prepare import main as prepare

    reference = work / "runs" / "reference"
    if checkpoint_step(reference) != STEPS:
        if not (work / "data").exists():
            source = work / "source"
            source.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(os.__file__, source / "os.txt")
            shutil.copyfile(argparse.__file__, source / "argparse.txt")
            shutil.copyfile(subprocess.__file__, source / "subprocess.txt")
            prepare(["--source", str(source), "--tokenizer", "bytes", "--validation", "0.4", "--out", f"{work}/data"])
        code, _ = start(write_config(work, "reference"), work / "reference.log")
        if code != 0:
            raise RuntimeError(f"the reference run failed: see {work / 'reference.log'}")
    return reference


# ---- the table


def all_rows(work: Path, kills: int) -> Iterator[Row]:
    """A row for each kind of instant, the kills shared out evenly; from the work folder where it was done before."""
    reference = make_reference(work)
    for number, instant in enumerate(INSTANTS):
        each = kills // len(INSTANTS) + (number < kills % len(INSTANTS))
        done = work / f"row_{number}_{each}.json"
        if not done.exists():
            row = kill_and_compare([instant], each, work, reference, seed=number)
            done.write_text(json.dumps(asdict(row)), encoding="utf-8")
        yield Row(**json.loads(done.read_text(encoding="utf-8")))


def table(rows: list[Row]) -> str:
    """The rows and their sum in Markdown."""
    head = "| killed | who | kills | resumed from a checkpoint | steps recomputed | tokens lost or doubled "
    head += "| digits that differ | weights that differ | slowest end, s |\n|---|---|" + "---:|" * 7
    total = Row("**all**", "")
    for row in rows:
        for key in ("kills", "resumes", "recomputed", "tokens_wrong", "digits_wrong", "weights_wrong"):
            setattr(total, key, getattr(total, key) + getattr(row, key))
        total.slowest_end = max(total.slowest_end, row.slowest_end)
    text = [head]
    for row in [*rows, total]:
        text.append(
            f"| {row.title} | {row.who} | {row.kills} | {row.resumes} | {row.recomputed} | {row.tokens_wrong} "
            f"| {row.digits_wrong} | {row.weights_wrong} | {row.slowest_end:.1f} |"
        )
    text += ["", *(f"Unexpected, {row.title}: {words}." for row in rows for words in row.unexpected)]
    return "\n".join(text).rstrip() + "\n"


def report(rows: list[Row], damages: str) -> str:
    """The page, with the table of damage to a checkpoint."""
    return (
        "# Killed and started again\n\n"
        f"`python -m benchmarks.kill_matrix --out docs/results/kill_matrix.md`, {date.today()}, {machine()}.\n\n"
        "A run of "
        f"{STEPS} steps on {RANKS} ranks under ZeRO-3, saved every {SAVE_EVERY} steps, is killed by SIGKILL at the "
        "instant of each row and started again with the same command, several times over, until it ends. Compared "
        "with a run that was never killed: every value of metrics.jsonl but times, speed and memory, and every bit of "
        "the last weights. *Steps recomputed* were done, and not yet in a checkpoint. *Slowest end*: from the kill "
        "until the launcher had ended the other rank.\n\n"
        + table(rows)
        + "\n## Damaged checkpoints\n\nThe newest checkpoint of the run that was never killed, damaged one file and "
        "one way at a time, in places drawn by chance, and how often that was found: the checkpoint was left with the "
        "file named, and the one before it taken.\n\n" + damages
    )


def main(argv: list[str] | None = None) -> None:
    """The command line: see the module's docstring."""
    parser = argparse.ArgumentParser(prog="benchmarks.kill_matrix", description="Kill a run at every instant.")
    parser.add_argument("--kills", type=int, default=110, metavar="N", help="kills, over all kinds (default: 110)")
    parser.add_argument("--work", type=Path, default=Path(".cache/kill_matrix"), metavar="DIR", help="working folder")
    parser.add_argument("--out", type=Path, metavar="FILE", help="write the page here as well")
    arguments = parser.parse_args(argv)
    arguments.work.mkdir(parents=True, exist_ok=True)
    work = arguments.work.resolve()
    rows: list[Row] = []
    for row in all_rows(work, arguments.kills):
        rows.append(row)
        print(f"{row.title} ({row.who}): {row.kills} kills, {row.digits_wrong} digits differ", flush=True)
    damages, all_found = damage_table(work / "runs" / "reference", work / "damaged")
    page = report(rows, damages)
    print(page)
    if arguments.out:
        arguments.out.write_text(page, encoding="utf-8")
    if not all_found:
        sys.exit("damage to a checkpoint was not found")
    wrong = [row.title for row in rows if row.tokens_wrong or row.digits_wrong or row.weights_wrong or row.unexpected]
    if wrong:
        sys.exit(f"not the same run after: {', '.join(wrong)}")


if __name__ == "__main__":
    main()
