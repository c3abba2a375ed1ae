"""A real SLURM cluster on one machine, from Debian's packages: `cluster.py up | down | cut NODE | mend NODE`.

Every node is a slurmd of its own in PID, UTS and mount namespaces of its own: it has its own hostname and loopback
address, and whoever kills its first process kills all of it at once, as a power cut does. Nothing outside of FOLDER is
touched, so that it lives beside another SLURM. Needs root, namespaces, and slurm-client, slurmctld, slurmd and munge,
which `up` installs with apt-get where they are missing. One network, one clock, one disk: what it cannot show is speed.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

FOLDER = Path(os.environ.get("PRETRAIN_TEST_CLUSTER", "/tmp/pretrain-test-cluster"))
CONF, MUNGE = FOLDER / "slurm.conf", FOLDER / "munge" / "socket"
NODES = ("pt1", "pt2", "pt3")
PORT, CPUS, GPUS = 27817, 4, 2
ENVIRONMENT = os.environ | {"SLURM_CONF": str(CONF), "PATH": f"{os.environ['PATH']}:/usr/local/sbin:/usr/sbin:/sbin"}
PACKAGES = {"sbatch": "slurm-client", "slurmctld": "slurmctld", "slurmd": "slurmd", "munged": "munge"}
NAMESPACES = ["unshare", "--fork", "--pid", "--kill-child", "--mount-proc", "--uts"]


class NoCluster(Exception):
    """Why there is none, in one line."""


def up() -> None:
    """Start it; NoCluster says why that cannot be."""
    check_machine()
    down()
    for name in ("munge", "state", "spool", "log", "run"):
        (FOLDER / name).mkdir(parents=True, exist_ok=True)
    (FOLDER / "munge").chmod(0o755)
    key = FOLDER / "munge" / "key"
    key.write_bytes(os.urandom(1024))
    key.chmod(0o400)
    hosts = [f"127.0.2.{i} {node}" for i, node in enumerate(NODES, 1)]
    (FOLDER / "hosts").write_text("\n".join(["127.0.0.1 localhost", *hosts, ""]))
    CONF.write_text(configuration())
    # Fake GPUs: SLURM grants them and sets CUDA_VISIBLE_DEVICES; nothing answers there.
    for number in range(GPUS):
        device = FOLDER / f"gpu{number}"
        device.unlink(missing_ok=True)
        device.symlink_to("/dev/null")
    (FOLDER / "gres.conf").write_text(f"Name=gpu File={FOLDER}/gpu[0-{GPUS - 1}]\n")
    (FOLDER / "cgroup.conf").write_text("CgroupPlugin=cgroup/v1\n")

    munged = ["munged", "--foreground", "--force", f"--key-file={key}", f"--socket={MUNGE}"]
    munged += [f"--{name}-file={FOLDER / 'munge' / name}" for name in ("pid", "seed", "log")]
    start("munged", munged)
    wait_for("munged", lambda: ask("munge", "-S", str(MUNGE), "-n").returncode == 0)
    start("slurmctld", ["slurmctld", "-D", "-f", str(CONF)])
    wait_for("slurmctld", lambda: " UP" in ask("scontrol", "ping").stdout)
    for node in NODES:
        start_node(node)
    wait_for("the nodes", lambda: nodes("idle") == set(NODES))


def down() -> None:
    """Stop it, with all its jobs; its logs stay."""
    for name in ("slurmctld", *NODES, "munged"):  # slurmctld first: it is not to requeue what dies next
        kill(name)
    for name in ("state", "spool", "munge"):
        shutil.rmtree(FOLDER / name, ignore_errors=True)


def cut(node: str) -> None:
    """Cut a node's power."""
    kill(node)


def mend(node: str) -> None:
    """Bring a node back."""
    kill(node)  # two slurmd of one name would both be asked, and only the newer one be known here
    ask("scontrol", "update", f"NodeName={node}", "State=DOWN", "Reason=cut")  # what ran on it runs no more
    shutil.rmtree(FOLDER / "spool" / node, ignore_errors=True)
    start_node(node)
    wait_for(node, lambda: node in nodes("idle"))


def ask(*command: str) -> subprocess.CompletedProcess[str]:
    """Run one of SLURM's commands against this cluster."""
    return subprocess.run(command, env=ENVIRONMENT, capture_output=True, text=True, timeout=60)


def nodes(state: str) -> set[str]:
    """The nodes in a state: `idle`, `down`."""
    return set(ask("sinfo", "--noheader", "--Node", f"--states={state}", "--format=%N").stdout.split())


def cut_nodes() -> list[str]:
    """The nodes that have no power."""
    return [node for node in NODES if not (FOLDER / "run" / node).exists()]


def check_machine() -> None:
    """NoCluster unless this machine can have one; installs what is missing where apt-get can."""
    if os.geteuid() != 0:
        raise NoCluster("slurmd needs root")
    probe = [*NAMESPACES, "sh", "-c", "echo probe > /proc/sys/kernel/hostname"]
    if subprocess.run(probe, capture_output=True).returncode:
        raise NoCluster("namespaces are refused here (CAP_SYS_ADMIN is needed)")

    def missing() -> list[str]:
        return [name for command, name in PACKAGES.items() if not shutil.which(command, path=ENVIRONMENT["PATH"])]

    apt = ["apt-get", "-o", "DPkg::Lock::Timeout=60"]
    for arguments in (["install", "-y", "--no-install-recommends"], ["update"], ["install", "-y"]):
        if missing() and shutil.which("apt-get"):
            packages = missing() if arguments[0] == "install" else []
            environment = ENVIRONMENT | {"DEBIAN_FRONTEND": "noninteractive"}
            subprocess.run([*apt, *arguments, *packages], env=environment, capture_output=True, timeout=600)
    if missing():
        raise NoCluster(f"{', '.join(missing())} not installed, and apt-get could not install it")


def configuration() -> str:
    """slurm.conf: as on a real cluster, but for the waits."""
    lines = [
        "ClusterName=pretrain-test",
        f"SlurmctldHost={socket.gethostname().partition('.')[0]}(127.0.0.1)",
        f"SlurmctldPort={PORT}",
        "SlurmUser=root",
        "SlurmdUser=root",
        "AuthType=auth/munge",
        "CredType=cred/munge",
        # A requeued job begins as soon as the credentials of its last start are void: 120 s, were it not said here.
        f"AuthInfo=socket={MUNGE},cred_expire=5",
        "MpiDefault=none",
        "ProctrackType=proctrack/linuxproc",
        "TaskPlugin=task/none",
        "SelectType=select/cons_tres",
        "SelectTypeParameters=CR_Core",
        "SlurmdParameters=config_overrides",
        "ReturnToService=2",
        "SlurmdTimeout=15",
        "KillWait=15",
        "MinJobAge=86400",
        "SchedulerParameters=bf_interval=2,sched_interval=2,batch_sched_delay=1",
        f"StateSaveLocation={FOLDER}/state",
        f"SlurmdSpoolDir={FOLDER}/spool/%n",
        f"SlurmctldPidFile={FOLDER}/run/slurmctld.self",
        f"SlurmdPidFile={FOLDER}/run/%n.self",
        f"SlurmctldLogFile={FOLDER}/log/slurmctld.log",
        f"SlurmdLogFile={FOLDER}/log/%n.log",
        "AccountingStorageType=accounting_storage/none",
        "JobAcctGatherType=jobacct_gather/none",
        "GresTypes=gpu",
    ]
    for i, node in enumerate(NODES, 1):
        shape = f"CPUs={CPUS} CoresPerSocket={CPUS} RealMemory=100000 Gres=gpu:{GPUS} State=UNKNOWN"
        lines.append(f"NodeName={node} NodeAddr=127.0.2.{i} Port={PORT + i} {shape}")
    lines += [
        "PreemptType=preempt/partition_prio",
        "PreemptMode=REQUEUE",
        "PartitionName=test Nodes=ALL Default=YES MaxTime=INFINITE State=UP PriorityTier=1 GraceTime=60",
        "PartitionName=urgent Nodes=ALL MaxTime=INFINITE State=UP PriorityTier=2",
    ]
    return "\n".join(lines) + "\n"


def start(name: str, command: list[str]) -> None:
    """Start a daemon, detached; its process id goes into run/NAME."""
    # Whatever the caller's job is, the daemons are not part of it.
    environment = {k: v for k, v in ENVIRONMENT.items() if not k.startswith(("SLURM_", "SBATCH_")) or k == "SLURM_CONF"}
    with (FOLDER / "log" / f"{name}.out").open("a") as log:
        process = subprocess.Popen(
            command, stdin=subprocess.DEVNULL, stdout=log, stderr=log, env=environment, start_new_session=True, cwd="/"
        )
    (FOLDER / "run" / name).write_text(str(process.pid))


def start_node(node: str) -> None:
    """One slurmd in namespaces of its own, where /etc/hosts knows all nodes."""
    inside = (
        f"echo {node} > /proc/sys/kernel/hostname && mount --bind {FOLDER}/hosts /etc/hosts && "
        f"{{ slurmd -D -N {node} -f {CONF} & wait; }}"
    )
    start(node, [*NAMESPACES, "bash", "-c", inside])


def kill(name: str) -> None:
    """Kill what `start` started under this name, and of a node all that lives in it."""
    path = FOLDER / "run" / name
    if not path.exists():
        return
    pid = int(path.read_text())
    path.unlink()
    if not is_ours(pid):
        return
    children = Path(f"/proc/{pid}/task/{pid}/children")
    first = [int(child) for child in children.read_text().split()] if name in NODES else []
    for victim in first or [pid]:  # a node's first process is its PID 1: the kernel takes the rest along
        os.kill(victim, signal.SIGKILL)
    wait_for(f"the end of {name}", lambda: not is_ours(pid))


def is_ours(pid: int) -> bool:
    """Whether this is a living process of the cluster: process ids are used again."""
    with contextlib.suppress(ChildProcessError):
        os.waitpid(pid, os.WNOHANG)  # a child of this very process would stay behind as a zombie
    try:
        return str(FOLDER).encode() in Path(f"/proc/{pid}/cmdline").read_bytes()
    except OSError:
        return False


def wait_for(what: str, holds: object, seconds: float = 60.0) -> None:
    """Wait until `holds()`; NoCluster if it does not come."""
    assert callable(holds)
    deadline = time.monotonic() + seconds
    while not holds():
        if time.monotonic() > deadline:
            raise NoCluster(f"{what} did not come up in {seconds:.0f} s; see {FOLDER}/log")
        time.sleep(0.2)


def main() -> None:
    """The command line: see the module's docstring."""
    actions = {"up": up, "down": down, "cut": cut, "mend": mend}
    try:
        actions[sys.argv[1]](*sys.argv[2:])  # type: ignore[operator]
    except NoCluster as error:
        sys.exit(f"error: {error}")
    except (KeyError, IndexError, TypeError):
        sys.exit(f"usage: cluster.py up | down | cut NODE | mend NODE   (nodes: {', '.join(NODES)})")
    if sys.argv[1] == "up":
        print(f"up: export SLURM_CONF={CONF}")


if __name__ == "__main__":
    main()
