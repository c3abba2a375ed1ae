"""Whether every node of a job is fit to train, before the ranks start.

    python -m pretrain.preflight look FOLDER                            on every rank: writes FOLDER/rank-K.json
    python -m pretrain.preflight judge FOLDER --nodes A,B --tasks N     afterwards: names the nodes that are not fit

Limits come from the environment (slurm/site.env.example): PREFLIGHT_COMMAND, PREFLIGHT_MIN_MEMORY_GIB,
PREFLIGHT_MIN_DISK_GIB and PREFLIGHT_MIN_GIB_PER_SECOND.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from statistics import median

MAX_CLOCK_SPREAD_SECONDS = 5.0
SECONDS_TO_WAIT = 90.0
"""How long a rank waits for the others to report before they meet."""


@dataclass
class Report:
    """What one rank saw."""

    rank: int
    node: str
    problems: list[str] = field(default_factory=list)
    """What is wrong with this node by itself."""
    met: bool = False
    """Whether this rank came through the all-reduce of all."""
    clock_offset_seconds: float = 0.0
    """This node's clock minus the median of all, read as all left the same barrier."""
    sum_is_right: bool = True
    gib_per_second: float | None = None
    """Bus bandwidth of the all-reduce: 2·(n − 1)/n of its bytes over its time."""
    needed_gib_per_second: float = 0.0
    """What a link should give, in the environment of this rank."""
    links: dict[str, float] = field(default_factory=dict)
    """Where the all-reduce was slow or wrong, on rank 0: each other node's bandwidth with this one; 0 where wrong."""

    def write(self, folder: Path) -> None:
        """Put it where the judge and the other ranks look; whole or not at all."""
        unfinished = folder / f".rank-{self.rank}.json"
        unfinished.write_text(json.dumps(asdict(self)), encoding="utf-8")
        unfinished.rename(folder / f"rank-{self.rank}.json")


def node_problems(environ: Mapping[str, str]) -> list[str]:
    """What this node lacks: memory, disk, or the approval of the site's own command."""
    import psutil

    problems = []
    memory = psutil.virtual_memory().available / 2**30
    if memory < (least := float(environ.get("PREFLIGHT_MIN_MEMORY_GIB", 4))):
        problems.append(f"{memory:.1f} GiB of memory are free, {least:g} are needed")
    disk = shutil.disk_usage(tempfile.gettempdir()).free / 2**30
    if disk < (least := float(environ.get("PREFLIGHT_MIN_DISK_GIB", 2))):
        problems.append(f"{disk:.1f} GiB are free in {tempfile.gettempdir()}, {least:g} are needed")
    if command := environ.get("PREFLIGHT_COMMAND"):
        result = subprocess.run(["bash", "-c", command], capture_output=True, text=True)
        if result.returncode:
            said = " ".join((result.stdout + result.stderr).split())[-200:]
            problems.append(f"PREFLIGHT_COMMAND ended with {result.returncode}: {said}")
    return problems


def accelerator_problems(local_rank: int) -> list[str]:
    """Whether this rank's accelerator is there, free, and multiplies two matrices as it should."""
    import torch
    from deepspeed.accelerator import get_accelerator

    accelerator = get_accelerator()
    name = f"{accelerator.device_name()} {local_rank}"
    try:
        if accelerator.device_name() != "cpu":
            if local_rank >= accelerator.device_count():
                return [f"{name} is not there: {accelerator.device_count()} are seen"]
            accelerator.set_device(local_rank)
            free, total = accelerator.available_memory(local_rank), accelerator.total_memory(local_rank)
            if free < 0.9 * total:
                return [f"{name} has {free / 2**30:.0f} of {total / 2**30:.0f} GiB free: another program holds it"]
        ones = torch.ones(1024, 1024, device=accelerator.current_device_name())
        if not bool(torch.all(ones @ ones == 1024)):
            return [f"{name} computes a wrong product"]
    except RuntimeError as error:
        return [f"{name} does not answer: {' '.join(str(error).split())[:200]}"]
    return []


def others_are_well(folder: Path, ranks: int) -> bool:
    """Wait for every rank's report; False if one has a problem or does not come, so that nobody waits in vain."""
    deadline = time.monotonic() + SECONDS_TO_WAIT
    while len(reports := read_reports(folder)) < ranks:
        if time.monotonic() > deadline:
            return False
        time.sleep(0.2)
    return not any(report.problems for report in reports)


def meet(report: Report) -> None:
    """Join all ranks; compare clocks; time an all-reduce; where that is poor, look at each node's link to the first."""
    import torch
    import torch.distributed as dist

    from pretrain import distributed

    ranks, device = distributed.start(timeout_minutes=2.0)
    nodes: list[str] = [""] * ranks.world
    dist.all_gather_object(nodes, report.node)
    times = [0.0] * ranks.world
    dist.barrier()
    dist.all_gather_object(times, time.time())
    report.clock_offset_seconds = times[ranks.rank] - median(times)
    values = torch.empty(2**24 if device.type != "cpu" else 2**20, device=device)
    report.gib_per_second, report.sum_is_right = time_all_reduce(values, ranks.rank, list(range(ranks.world)), None)
    default = 0.005 if device.type == "cpu" else 1.0
    report.needed_gib_per_second = float(os.environ.get("PREFLIGHT_MIN_GIB_PER_SECOND", default))
    is_poor = not report.sum_is_right or report.gib_per_second < report.needed_gib_per_second
    poor = torch.tensor(float(is_poor), device=device)
    if distributed.all_reduce_sum(poor) > 0:
        for node in sorted(set(nodes) - {nodes[0]}):
            pair = [0, nodes.index(node)]
            group = dist.new_group(pair)
            if ranks.rank in pair:
                speed, right = time_all_reduce(values, ranks.rank, pair, group)
                report.links[node] = speed if right else 0.0
    report.met = True
    dist.destroy_process_group()


def time_all_reduce(values: object, rank: int, members: list[int], group: object) -> tuple[float, bool]:
    """Bus bandwidth in GiB/s, the best of 3, and whether the sum came out right; inf for one rank."""
    import torch
    import torch.distributed as dist
    from deepspeed.accelerator import get_accelerator

    assert isinstance(values, torch.Tensor)
    best, right = float("inf"), True
    for _ in range(3):
        values.fill_(rank + 1)
        get_accelerator().synchronize()
        began = time.perf_counter()
        dist.all_reduce(values, group=group)
        get_accelerator().synchronize()
        best = min(best, time.perf_counter() - began)
        right = right and bool(torch.all(values == sum(members) + len(members)))
    n = len(members)
    return (2 * (n - 1) / n * values.nbytes / 2**30 / best if n > 1 else float("inf")), right


def look(folder: Path) -> None:
    """One rank's part: look at this node, report, and if all are well meet the others and report again."""
    from pretrain import distributed

    ranks = distributed.discover(os.environ)
    report = Report(ranks.rank, os.environ.get("SLURMD_NODENAME") or os.uname().nodename)
    report.problems = node_problems(os.environ) if ranks.local_rank == 0 else []
    report.problems += accelerator_problems(ranks.local_rank)
    report.write(folder)
    if others_are_well(folder, ranks.world):
        meet(report)
        report.write(folder)


def read_reports(folder: Path) -> list[Report]:
    """The reports that are there."""
    return [Report(**json.loads(path.read_text(encoding="utf-8"))) for path in folder.glob("rank-*.json")]


def judge(reports: list[Report], nodes: list[str], tasks: int) -> tuple[str, dict[str, str]]:
    """One line about all, empty if they are fit; and the nodes to leave out, each with its reason.

    Where every one of several nodes fails, none is left out: then it is not the nodes.
    """
    bad: dict[str, str] = {}
    for report in reports:
        if report.problems:
            bad.setdefault(report.node, "; ".join(report.problems))
        elif abs(report.clock_offset_seconds) > MAX_CLOCK_SPREAD_SECONDS:
            bad.setdefault(report.node, f"its clock is off by {report.clock_offset_seconds:.1f} s")
    answers = Counter(report.node for report in reports)
    for node in nodes:
        if not answers[node]:
            bad.setdefault(node, "no rank of it answered")
    links, needed = next(((r.links, r.needed_gib_per_second) for r in reports if r.links), ({}, 0.0))
    slow = {node: speed for node, speed in links.items() if speed < needed}
    if len(slow) > 1 and len(slow) == len(links):
        slow = {nodes[0]: max(slow.values())}  # all links of the first node are poor: the others have only that one
    for node, speed in slow.items():
        bad.setdefault(node, f"all-reduce with it gives {speed:.3g} GiB/s (0: a wrong sum), {needed:g} are needed")
    if bad and len(bad) == len(nodes) > 1:
        return "every node fails: " + "; ".join(f"{node}: {why}" for node, why in bad.items()), {}
    if bad:
        return "; ".join(f"{node}: {why}" for node, why in bad.items()), bad
    if len(reports) < tasks or not all(report.met for report in reports):
        silent = sorted(set(range(tasks)) - {report.rank for report in reports if report.met})
        return f"ranks {silent} did not come through the all-reduce", {}
    if links:
        return f"the all-reduce over all ranks is slow or wrong, and no node's link is: {links}", {}
    return "", {}


def main(argv: list[str] | None = None) -> None:
    """The command line: see the module's docstring."""
    parser = argparse.ArgumentParser(prog="pretrain.preflight", description="Look at the nodes of a job.")
    parser.add_argument("part", choices=["look", "judge"])
    parser.add_argument("folder", type=Path, metavar="FOLDER", help="where the reports go")
    parser.add_argument("--nodes", type=lambda text: text.split(","), default=[], metavar="A,B", help="of the job")
    parser.add_argument("--tasks", type=int, default=1, metavar="N", help="ranks of the job")
    arguments = parser.parse_args(argv)
    if arguments.part == "look":
        look(arguments.folder)
        return
    reports = read_reports(arguments.folder)
    verdict, bad = judge(reports, arguments.nodes, arguments.tasks)
    (arguments.folder / "verdict").write_text((verdict or "fit") + "\n", encoding="utf-8")
    (arguments.folder / "exclude").write_text("".join(f"{n} {why}\n" for n, why in bad.items()), encoding="utf-8")
    speeds = [r.gib_per_second for r in reports if r.gib_per_second is not None]
    print(f"preflight: {verdict or f'{len(arguments.nodes)} nodes are fit, all-reduce {min(speeds):.3g} GiB/s'}")
    sys.exit(bool(verdict))


if __name__ == "__main__":
    main()
