#!/usr/bin/env bash
# Export a run, evaluate it and draw its page, once its job has succeeded:
#
#     sbatch --dependency=afterok:JOB [options] slurm/export_eval.sh RUN [option of pretrain.evaluate …]
#
# JOB may be requeued as often as it likes: it has succeeded when the run is finished. If it fails, this is cancelled.
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

run=${1%/}
shift
export=exports/$(basename "$run")
[ $# -gt 0 ] || set -- --suite perplexity,speculative
"$PYTHON" -m pretrain.export "$run" --out "$export" --overwrite
"$PYTHON" -m pretrain.evaluate "$export" --out "$run/evaluation" "$@"
"$PYTHON" -m pretrain.report "$run" --out "$run/report.html"
