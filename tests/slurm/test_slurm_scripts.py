"""The scripts themselves, where there is no cluster."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import Site, make_site


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory, tiny_data: Path) -> Site:
    return make_site(tmp_path_factory.mktemp("scripts"), tiny_data)


def test_shellcheck_finds_nothing(site: Site) -> None:
    shellcheck = Path(sys.executable).with_name("shellcheck")
    scripts = sorted((site.folder / "slurm").glob("*.sh"))
    command = [str(shellcheck), "--external-sources", *map(str, scripts)]
    result = subprocess.run(command, cwd=site.folder, capture_output=True, text=True)
    assert result.returncode == 0 and len(scripts) >= 8, result.stdout


def test_a_dry_run_prints_the_commands_and_leaves_nothing(tmp_path: Path, tiny_data: Path) -> None:
    site = make_site(tmp_path, tiny_data)
    settings = site.folder / "slurm" / "site.env"
    settings.write_text(settings.read_text().replace("PREFLIGHT=0", ""))
    site.config("dry")
    code, output = site.script("slurm/pretrain.sh", "dry.yaml", "run.seed=3", DRY_RUN="1")
    assert code == 0, output
    preflight, training = (line for line in output.splitlines() if line.startswith("srun "))
    assert "pretrain.preflight look" in preflight
    assert "--kill-on-bad-exit=1" in training and "pretrain.train --config" in training
    assert not site.run("dry").exists()


@pytest.mark.parametrize(
    ("settings", "parts"),
    [
        (
            "CONTAINER_RUNTIME=pyxis\nCONTAINER_IMAGE=image\nCONTAINER_MOUNTS=/data:/data",
            ["--container-image=image", ",/data:/data"],
        ),
        ("CONTAINER_RUNTIME=apptainer\nCONTAINER_IMAGE=image.sif", ["apptainer exec --nv", "image.sif"]),
        ("CPU_BIND=sockets", ["--cpu-bind=sockets"]),
    ],
)
def test_the_sites_settings_reach_srun(tmp_path: Path, tiny_data: Path, settings: str, parts: list[str]) -> None:
    site = make_site(tmp_path, tiny_data)
    with (site.folder / "slurm" / "site.env").open("a") as file:
        file.write(settings + "\n")
    site.config("dry")
    code, output = site.script("slurm/pretrain.sh", "dry.yaml", DRY_RUN="1")
    assert code == 0 and all(part in output for part in parts), output


@pytest.mark.parametrize(
    ("command", "message"),
    [
        (("slurm/pretrain.sh",), "error: no config"),
        (("slurm/submit.sh", "--nodes=1"), "error: no config"),
        (("slurm/sweep.sh", "--nodes=1"), "error: no config"),
        (("slurm/export_eval.sh",), "error: no run"),
        (("slurm/submit.sh", "nowhere.yaml"), "nowhere.yaml: cannot read the config"),
    ],
)
def test_a_command_without_what_it_needs_says_so_in_one_line(
    site: Site, command: tuple[str, ...], message: str
) -> None:
    code, output = site.script(*command)
    assert code == 2 and message in output and output.count("\n") == 1


@pytest.mark.parametrize(
    ("source", "export", "evaluation"),
    [
        ("runs/mine/", "exports/mine", "runs/mine/evaluation"),
        ("runs/mine/checkpoints/step_00000006", "exports/mine-step_00000006", "runs/mine/evaluation/step_00000006"),
    ],
)
def test_suites_and_their_options_pass_through_to_the_evaluation(
    tmp_path: Path, tiny_data: Path, source: str, export: str, evaluation: str
) -> None:
    site = make_site(tmp_path, tiny_data)
    (site.folder / "slurm" / "site.env").write_text("PYTHON=/bin/echo\n")
    asked = ["--suite", "perplexity,lm_eval:paper,latent", "--few-shot", "2", "--tasks-folder", "my tasks"]
    submitted = {"SLURM_SUBMIT_DIR": str(site.folder)}
    code, output = site.script("slurm/export_eval.sh", source, *asked, **submitted)
    assert code == 0 and output.splitlines() == [
        f"-m pretrain.export {source.rstrip('/')} --out {export} --overwrite",
        f"-m pretrain.evaluate {export} --out {evaluation} {' '.join(asked)}",
        "-m pretrain.report runs/mine --out runs/mine/report.html",
    ]
    code, output = site.script("slurm/export_eval.sh", source, **submitted)
    assert code == 0 and "--suite perplexity,speculative" in output.splitlines()[1]


def test_a_task_notes_how_it_ended_and_outlives_an_early_warning(tmp_path: Path) -> None:
    (tmp_path / "program.py").write_text(
        "import os, signal, sys\nos.kill(os.getpid(), signal.SIGUSR2)\n"
        "print(os.environ['TMPDIR'], os.environ['TRITON_CACHE_DIR'])\nsys.exit(int(sys.argv[1]))\n"
    )
    task = Path(__file__).parents[2] / "slurm" / "task.sh"
    variables = {"SLURM_JOB_ID": "7", "SLURM_PROCID": "3", "SLURMD_NODENAME": "node1", "NODE_LOCAL_DIR": str(tmp_path)}
    environment = os.environ | variables | {"PYTHON": sys.executable, "PYTHONPATH": str(tmp_path)}
    for code, seen in ((0, 0), (2, 2), (76, 76), (75, 0)):  # 75 is an end that must not make srun kill the others
        command = [str(task), str(tmp_path), "program", str(code)]
        result = subprocess.run(command, env=environment, capture_output=True, text=True)
        assert result.returncode == seen, result.stderr
        assert (tmp_path / "rank-3.exit").read_text().startswith(f"{code} node1 ")
        assert all(path.startswith(str(tmp_path)) for path in result.stdout.split())


FAKE_SCONTROL = """#!/bin/sh
case "$1 $2" in
  "show job") echo "JobId=$4 Restarts=$RESTARTS ExcNodeList=$EXCLUDED" ;;
  "show hostnames") echo "$3" | tr , '\\n' ;;
  update*) echo "$@" ;;
esac
"""
FOUR_OF_SIX = "n1 allocated\nn2 idle\nn3 down*\nn4 draining\nna down\nnb failing\nn5 mixed\nn6 idle\n"


@pytest.mark.parametrize(
    ("nodes", "environment", "asked"),
    [
        (FOUR_OF_SIX, {}, 4),
        (FOUR_OF_SIX, {"EXCLUDED": "n1,n6"}, 2),
        (FOUR_OF_SIX, {"SLURM_CPUS_PER_TASK": "6"}, 4),
        (FOUR_OF_SIX + "n7 idle\n", {}, None),
        (FOUR_OF_SIX + "n7 idle\nn8 idle\n", {}, None),
        (FOUR_OF_SIX + "n7 idle\n", {"SLURM_JOB_NUM_NODES": "3"}, 5),
        (FOUR_OF_SIX, {"MIN_NODES": "5"}, None),
        (FOUR_OF_SIX, {"RESTARTS": "1"}, None),
    ],
    ids=["fewer", "excluded", "cpus", "as many", "more", "a node is mended", "too few", "told to end alone"],
)
def test_a_job_to_be_restarted_asks_for_the_nodes_left(
    tmp_path: Path, nodes: str, environment: dict[str, str], asked: int | None
) -> None:
    """A job of 5 nodes, 2 ranks on each, whose start 1 is ending."""
    for name, text in (("scontrol", FAKE_SCONTROL), ("sinfo", f"#!/bin/sh\nprintf '{nodes}'\n")):
        (tmp_path / name).write_text(text)
        (tmp_path / name).chmod(0o755)
    job = {"SLURM_JOB_ID": "7", "SLURM_JOB_NUM_NODES": "5", "SLURM_JOB_PARTITION": "p", "SLURM_RESTART_COUNT": "1"}
    variables = job | {"RESTARTS": "2", "EXCLUDED": "(null)", "PATH": f"{tmp_path}:{os.environ['PATH']}"} | environment
    scripts = Path(__file__).parents[2] / "slurm"
    command = f". {scripts}/common.sh && . {scripts}/lost_nodes.sh && ask_for_nodes_left 5 2"
    result = subprocess.run(["bash", "-c", command], env=variables, capture_output=True, text=True)
    assert result.stderr == ""
    updates = [line for line in result.stdout.splitlines() if line.startswith("update ")]
    cpus = 2 * int(environment.get("SLURM_CPUS_PER_TASK", 1))
    expected = f"update JobId=7 NumNodes={asked}-{asked} NumTasks={2 * (asked or 0)} NumCPUs={cpus * (asked or 0)}"
    assert updates == ([expected] if asked else [])
