#!/usr/bin/env bash
# Is every node of this job fit to train?   slurm/preflight.sh FOLDER   (inside a job; slurm/pretrain.sh calls it)
#
# Starts one task per accelerator (pretrain/preflight.py), and leaves their reports and `verdict`, one line, in FOLDER.
# Nodes that fail go onto slurm/exclude, with the reason. Exit code 1: not fit.
set -uo pipefail
folder=${1:?usage: slurm/preflight.sh FOLDER}
# shellcheck source=slurm/common.sh
. "$(dirname "$0")/common.sh"
use_site

[ -n "${DRY_RUN:-}" ] || mkdir -p "$folder" || exit 2
# A step's own time limit (minutes) ends ranks that wait for one that will never answer.
launch --output="$folder/rank-%t.log" --kill-on-bad-exit=0 --time="${PREFLIGHT_MINUTES:-5}" -- \
  "$CODE/slurm/task.sh" "$folder" pretrain.preflight look "$folder"
[ -z "${DRY_RUN:-}" ] || exit 0
nodes=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | paste -sd,)
"$PYTHON" -m pretrain.preflight judge "$folder" --nodes "$nodes" --tasks "$SLURM_NTASKS"
code=$?
[ ! -s "$folder/exclude" ] || sed "s/\$/ ($(date -Is), job $SLURM_JOB_ID)/" "$folder/exclude" >>slurm/exclude
exit $code
