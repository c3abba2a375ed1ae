#!/usr/bin/env bash
# The unfinished runs of a study as a job array:   python -m pretrain.study FILE --slurm [sbatch options]
#
# calls this with sbatch's arguments. Each task trains and evaluates one run, as one process with at most one
# accelerator; told to stop, it saves and is requeued. DRY_RUN=1 prints what would be submitted. See docs/benchmarks.md.
#
#SBATCH --ntasks=1
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --output=slurm-%A_%a.log
#SBATCH --signal=USR2@300
set -uo pipefail
cd "${SLURM_SUBMIT_DIR:-.}" || exit 2
# shellcheck source=slurm/common.sh
. slurm/common.sh
use_site

if [ -z "${SLURM_ARRAY_TASK_ID:-}" ]; then
  if [ -n "${DRY_RUN:-}" ]; then
    echo "sbatch $(printf '%q ' "$@")"
    exit
  fi
  name=${1#--job-name=}
  # Two processes would write into one run's folder.
  queued=$(squeue --noheader --me --name="$name" --format=%A) || die "no SLURM answers here: squeue failed"
  [ -z "$queued" ] || die "$name is queued or running (job ${queued%%$'\n'*}): wait for its end, or scancel it"
  exec sbatch "$@"
fi

trap : TERM # this shell stays, to requeue the task once the run has saved
# shellcheck disable=SC2016  # in a container it is another Python
launch -- bash -c 'exec "$PYTHON" -m pretrain.study "$@"' study "$@" --number "$SLURM_ARRAY_TASK_ID"
code=$?
# Told to stop, and neither cancelled nor requeued by SLURM already.
if [ "$code" = 75 ] && [ "$(squeue --noheader --jobs="$SLURM_JOB_ID" --format=%T)" = RUNNING ]; then
  scontrol requeue "$SLURM_JOB_ID" && exit 0
fi
exit "$code"
