"""A repository of its own for each test, and jobs on a real cluster. Slow: they run where RUN_SLURM=1 asks for it."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import cluster
import pytest

from benchmarks.small_run import write_run_config

REPOSITORY = Path(__file__).parents[2]
SITE = f"""
PYTHON={sys.executable}
DS_ACCELERATOR=cpu
OMP_NUM_THREADS=1
CPU_BIND=none
PREFLIGHT=0
"""


@pytest.fixture(scope="session")
def running_cluster() -> Iterator[None]:
    if os.environ.get("RUN_SLURM") != "1":
        pytest.skip("minutes on a real SLURM cluster: RUN_SLURM=1 runs it")
    try:
        cluster.up()
    except cluster.NoCluster as error:
        pytest.skip(f"no SLURM cluster here: {error}")
    yield
    cluster.down()


@dataclass
class Site:
    """A copy of the repository's code, to submit from, and to change."""

    folder: Path
    data: Path

    def config(self, name: str, changes: dict[str, object] | None = None) -> Path:
        return write_run_config(self.folder, self.data, name, changes or {})

    def run(self, name: str) -> Path:
        return self.folder / "runs" / name

    def script(self, *command: str, **environment: str) -> tuple[int, str]:
        """Run a script of this copy as a user does: exit code and output."""
        full = cluster.ENVIRONMENT | environment
        full = {key: value for key, value in full.items() if key != "DS_ACCELERATOR" or key in environment}
        result = subprocess.run(command, cwd=self.folder, env=full, capture_output=True, text=True, timeout=120)
        return result.returncode, result.stdout + result.stderr

    def sbatch(self, *arguments: str, **environment: str) -> Job:
        code, output = self.script("sbatch", *arguments, **environment)
        return self.job(code, output)

    def submit(self, *arguments: str) -> Job:
        code, output = self.script("slurm/submit.sh", *arguments)
        return self.job(code, output)

    def job(self, code: int, output: str) -> Job:
        number = re.search(r"Submitted batch job (\d+)", output)
        assert code == 0 and number, output
        return Job(int(number.group(1)), self)


@dataclass
class Job:
    """A job on the cluster."""

    number: int
    site: Site

    def field(self, name: str) -> str:
        shown = cluster.ask("scontrol", "show", "job", "--oneliner", str(self.number)).stdout
        found = re.search(rf"\b{name}=(\S*)", shown)
        return found.group(1) if found else ""

    @property
    def restarts(self) -> int:
        return int(self.field("Restarts") or 0)

    @property
    def log(self) -> str:
        paths = sorted(self.site.folder.glob(f"slurm-{self.number}*.log"))
        return "\n".join(path.read_text(errors="replace") for path in paths)

    def wait(self, holds: Callable[[], Any], seconds: float = 300.0) -> None:
        """Until something holds; fails with the job's log if it does not come."""
        deadline = time.monotonic() + seconds
        while not holds():
            state = cluster.ask("scontrol", "show", "job", str(self.number)).stdout
            assert time.monotonic() < deadline, f"{state}\n{self.log}"
            time.sleep(0.3)

    def end(self, state: str = "COMPLETED", seconds: float = 300.0) -> None:
        """Wait for the job's end in this state."""
        ends = {"COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "NODE_FAIL"}
        self.wait(lambda: self.field("JobState") in ends, seconds)
        assert self.field("JobState") == state, self.log

    def steps(self, name: str) -> int:
        """How many steps the run has written down."""
        path = self.site.run(name) / "metrics.jsonl"
        return path.read_text().count("\n") if path.exists() else 0  # the last line may be half written


@pytest.fixture(scope="session")
def site(tmp_path_factory: pytest.TempPathFactory, tiny_data: Path) -> Site:
    """One copy of the code for the whole session."""
    return make_site(tmp_path_factory.mktemp("site"), tiny_data)


def make_site(folder: Path, data: Path) -> Site:
    for name in ("pretrain", "data_pipeline", "slurm", "configs"):
        ignore = shutil.ignore_patterns("__pycache__", "site.env", "exclude", "jobs") if name == "slurm" else None
        shutil.copytree(REPOSITORY / name, folder / name, ignore=ignore)
    (folder / "slurm" / "site.env").write_text(SITE)
    return Site(folder, data)
