"""Rank and world from each launcher's variables, and the network between a job's nodes."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from data_pipeline import UserError
from pretrain import distributed
from pretrain.distributed import Ranks, discover, interface_to_another_node, slurm_hosts

DEEPSPEED = {
    "RANK": "9",
    "LOCAL_RANK": "1",
    "WORLD_SIZE": "16",
    "LOCAL_SIZE": "8",
    "CROSS_RANK": "1",
    "CROSS_SIZE": "2",
}
TORCHRUN = {"RANK": "9", "LOCAL_RANK": "1", "WORLD_SIZE": "16", "LOCAL_WORLD_SIZE": "8", "GROUP_RANK": "1"}
SRUN = {
    "SLURM_JOB_ID": "7", "SLURM_STEP_ID": "0", "SLURM_PROCID": "9", "SLURM_LOCALID": "1", "SLURM_NTASKS": "16",
    "SLURM_NNODES": "2", "SLURM_JOB_NODELIST": "node[1-2]", "SLURMD_NODENAME": "node2",
}  # fmt: skip


@pytest.mark.parametrize(
    ("environ", "ranks"),
    [
        (DEEPSPEED, Ranks(9, 16, 1, 8)),
        (TORCHRUN, Ranks(9, 16, 1, 8)),
        (SRUN, Ranks(9, 16, 1, 8)),
        (SRUN | TORCHRUN | {"RANK": "3"}, Ranks(3, 16, 1, 8)),  # torchrun inside a job: its own word counts
        ({}, Ranks(0, 1, 0, 1)),
        ({"SLURM_JOB_ID": "7", "SLURM_PROCID": "0"}, Ranks(0, 1, 0, 1)),  # in a batch script, not started by srun
    ],
    ids=["deepspeed", "torchrun", "srun", "torchrun in a job", "python", "batch script"],
)
def test_each_launchers_variables_give_the_rank(environ: dict[str, str], ranks: Ranks) -> None:
    assert discover(environ) == ranks


@pytest.mark.parametrize("environ", [DEEPSPEED, SRUN])
@pytest.mark.parametrize("fault", ["missing", "no number"])
def test_an_incomplete_environment_is_one_line(environ: dict[str, str], fault: str) -> None:
    name = "WORLD_SIZE" if "RANK" in environ else "SLURM_NTASKS"
    broken = {key: value for key, value in environ.items() if key != name} | ({name: "x"} if fault != "missing" else {})
    with pytest.raises(UserError, match="the launcher's environment is incomplete"):
        discover(broken)


@pytest.fixture
def scontrol(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Answers as SLURM's own does, with hosts that resolve here."""
    program = tmp_path / "scontrol"
    program.write_text("#!/bin/sh\nprintf 'localhost\\nnode2\\n'\n")
    program.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")


@pytest.mark.usefixtures("scontrol")
def test_the_interface_is_that_of_the_route_to_another_node() -> None:
    assert interface_to_another_node(SRUN) == "lo"
    assert interface_to_another_node(SRUN | {"SLURM_NNODES": "1"}) is None
    assert interface_to_another_node({}) is None


def test_a_container_without_scontrol_knows_the_master_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "/nowhere")
    container = SRUN | {"MASTER_ADDR": "localhost"}
    assert slurm_hosts(container) == ["localhost"]
    assert interface_to_another_node(container) == "lo"
    assert interface_to_another_node(container | {"SLURMD_NODENAME": "localhost"}) is None
    with pytest.raises(UserError, match="set MASTER_ADDR"):
        slurm_hosts(SRUN)


def test_ranks_of_a_job_meet_on_a_port_of_its_own_and_on_another_after_a_requeue(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    ports = []
    for job, restarts in (("7", "0"), ("7", "1"), ("8", "0")):
        monkeypatch.setenv("SLURM_JOB_ID", job)
        monkeypatch.setenv("SLURM_RESTART_COUNT", restarts)
        ports.append(int(distributed._slurm_port()))
    assert len(set(ports)) == 3 and all(20_000 <= port < 40_000 for port in ports)
    monkeypatch.setenv("SLURM_JOB_ID", "7")
    monkeypatch.delenv("SLURM_RESTART_COUNT")  # as in the first start
    assert int(distributed._slurm_port()) == ports[0]
