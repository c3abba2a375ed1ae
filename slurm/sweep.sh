#!/usr/bin/env bash
# A job array over every combination of values:   slurm/sweep.sh [sbatch options] CONFIG key=a,b,c … [key=value …]
#
#     slurm/sweep.sh --gpus-per-node=8 configs/quickstart.yaml run.seed=0,1,2 optimizer.learning_rate=1e-3,3e-4
#
# Each combination is a run of its own, named after it, and a job like those of slurm/pretrain.sh: saved, requeued and
# judged alone. All are checked before the array is submitted.
#
#SBATCH --job-name=sweep
#SBATCH --nodes=1
#SBATCH --ntasks-per-node=8
#SBATCH --wait-all-nodes=1
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --output=slurm-%A_%a.log
#SBATCH --signal=USR2@300
set -uo pipefail
if [ -z "${SLURM_ARRAY_TASK_ID:-}" ]; then
  cd "$(dirname "$0")/.." || exit 2
else
  cd "$SLURM_SUBMIT_DIR" || exit 2
  # Later starts run what the first one kept, whatever has become of the repository.
  [ ! -e "slurm/jobs/$SLURM_JOB_ID" ] || exec "slurm/jobs/$SLURM_JOB_ID/code/slurm/pretrain.sh" kept
fi
# shellcheck source=slurm/common.sh
. slurm/common.sh
use_site

options=()
while [ $# -gt 0 ] && [[ $1 != *.yaml && $1 != *.yml ]]; do options+=("$1") && shift; done
[ $# -gt 0 ] || die "no config (a .yaml file); usage: slurm/sweep.sh [sbatch options] CONFIG key=a,b,c …"
if [ -n "${SLURM_ARRAY_TASK_ID:-}" ]; then
  mapfile -t overrides < <("$PYTHON" -m pretrain.jobs.sweep "$@" --number "$SLURM_ARRAY_TASK_ID")
  exec slurm/pretrain.sh "$1" "${overrides[@]}"
fi
runs=$("$PYTHON" -m pretrain.jobs.sweep "$@") || exit 2
echo "$runs"
[ -n "${DRY_RUN:-}" ] || sbatch --array="0-$(($(wc -l <<<"$runs") - 1))" ${options[@]+"${options[@]}"} slurm/sweep.sh "$@"
