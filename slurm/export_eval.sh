#!/usr/bin/env bash
# Export a run, evaluate it and draw its page, once its job has succeeded; or on the way, so many minutes after its start:
#
#     sbatch --dependency=afterok:JOB [options] slurm/export_eval.sh RUN [option of pretrain.evaluate …]
#     sbatch --dependency=after:JOB+MINUTES [options] slurm/export_eval.sh RUN_OR_CHECKPOINT [option …]
#
# JOB may be requeued as often as it likes: it has succeeded when the run is finished. If it fails, this is cancelled.
# Of a run its newest checkpoint is evaluated, into RUN/evaluation; one checkpoint into RUN/evaluation/step_….
#
#SBATCH --job-name=export_eval
#SBATCH --ntasks=1
#SBATCH --kill-on-invalid-dep=yes
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --output=slurm-%j.log
set -euo pipefail
[ $# -ge 1 ] || { echo "error: no run; usage: sbatch --dependency=afterok:JOB slurm/export_eval.sh RUN …" >&2; exit 2; }
cd "${SLURM_SUBMIT_DIR:?submit this with sbatch}"
# shellcheck source=slurm/common.sh
. slurm/common.sh
use_site

source=${1%/} run=${1%/} step=
shift
case $(basename "$source") in step_*)
  run=$(dirname "$(dirname "$source")") step=$(basename "$source") ;;
esac
export=exports/$(basename "$run")${step:+-$step}
[ $# -gt 0 ] || set -- --suite perplexity,speculative
"$PYTHON" -m pretrain.export "$source" --out "$export" --overwrite
"$PYTHON" -m pretrain.evaluate "$export" --out "$run/evaluation${step:+/$step}" "$@"
"$PYTHON" -m pretrain.report "$run" --out "$run/report.html"
