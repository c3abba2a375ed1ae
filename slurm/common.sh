# shellcheck shell=bash
# What the scripts of this folder share. They run with the working directory at the repository, so that the relative
# paths of a config mean the same as there, and with the code of the folder that this file lies in.

CODE=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)

die() {
  echo "error: $*" >&2
  exit 2
}

use_site() { # site settings, and a Python that takes its modules from $CODE and not from the working directory
  [ -d slurm ] || die "no slurm/ in $PWD; submit from the repository"
  set -a # what site.env sets, the ranks see
  # shellcheck disable=SC1091
  [ ! -f slurm/site.env ] || . slurm/site.env
  set +a
  export PYTHON=${PYTHON:-$PWD/.venv/bin/python}
  [ -x "$PYTHON" ] || die "no Python at $PYTHON; run 'make .venv/.ready', or set PYTHON in slurm/site.env"
  export PYTHONPATH=$CODE${PYTHONPATH:+:$PYTHONPATH} PYTHONSAFEPATH=1
}

launch() { # launch SRUN_OPTION… -- COMMAND…: one task per accelerator, in the site's container if it has one
  # --export=ALL: after `sbatch --export=NONE`, srun would drop the environment.
  local options=(--export=ALL --kill-on-bad-exit=1 --cpu-bind="${CPU_BIND:-cores}") inside=()
  # srun takes everything but this from sbatch (SLURM 22.05 and newer).
  [ -z "${SLURM_CPUS_PER_TASK:-}" ] || options+=(--cpus-per-task="$SLURM_CPUS_PER_TASK")
  while [ "$1" != -- ]; do options+=("$1") && shift; done
  shift
  local mounts=$PWD:$PWD${CONTAINER_MOUNTS:+,$CONTAINER_MOUNTS}
  case ${CONTAINER_RUNTIME:-none} in
    none) ;;
    pyxis) options+=(--container-image="$CONTAINER_IMAGE" --container-mounts="$mounts" --container-workdir="$PWD") ;;
    apptainer) inside=(apptainer exec --nv --bind "$mounts" --pwd "$PWD" "$CONTAINER_IMAGE") ;;
    *) die "CONTAINER_RUNTIME=$CONTAINER_RUNTIME is neither none, pyxis nor apptainer" ;;
  esac
  [ "${CONTAINER_RUNTIME:-none}" = none ] || local -x PYTHON=${CONTAINER_PYTHON:-python3}
  if [ -n "${DRY_RUN:-}" ]; then
    echo "srun $(printf '%q ' "${options[@]}" ${inside[@]+"${inside[@]}"} "$@")"
  else
    # Ignored from here on, so that whatever stands between srun and Python outlives the warning.
    (trap '' USR2 && exec srun "${options[@]}" ${inside[@]+"${inside[@]}"} "$@")
  fi
}

excluded_nodes() { # what preflight has put on the list, and the person who keeps it has not taken off: a,b,c
  [ ! -s slurm/exclude ] || cut -d' ' -f1 slurm/exclude | sort -u | paste -sd,
}

job_name() { # this job, as scontrol means it: the last task of an array has the array's id, which there names all tasks
  echo "${SLURM_ARRAY_JOB_ID:+${SLURM_ARRAY_JOB_ID}_}${SLURM_ARRAY_TASK_ID:-$SLURM_JOB_ID}"
}

job_field() { # job_field ID NAME: one field of `scontrol show job`; empty if SLURM has no value for it
  scontrol show job --oneliner "$1" | tr ' ' '\n' | sed -n "s/^$2=//p" | grep -vx '(null)' | head -n 1
}

check_accelerators() { # check_accelerators ID: no more tasks on a node than it has accelerators for the job
  [ "${DS_ACCELERATOR:-}" != cpu ] || return 0
  local tasks nodes accelerators
  tasks=$(job_field "$1" NumTasks) nodes=$(job_field "$1" NumNodes)
  accelerators=$(job_field "$1" TresPerNode | grep -oE 'gpu[^,]*' | grep -oE '[0-9]+$')
  accelerators=${ACCELERATORS_PER_NODE:-${accelerators:-0}}
  nodes=${nodes%%-*} # a range of nodes must do with the fewest
  [ "$accelerators" -gt 0 ] || die "no accelerators asked for: add --gpus-per-node=N (or set DS_ACCELERATOR=cpu)"
  [ "$tasks" -le $((nodes * accelerators)) ] ||
    die "$tasks tasks on $nodes nodes of $accelerators accelerators: one task per accelerator, --ntasks-per-node=$accelerators"
}
