#!/usr/bin/env bash
# Submit a pretraining job, checked first:   slurm/submit.sh [--dry-run] [sbatch options] CONFIG [section.key=value …]
#
# Refuses a config that does not validate, a partition that does not exist, more tasks than accelerators and a batch
# that does not fit them, before anything is allocated; keeps code and config as they are now in RUN/jobs/ID. The job
# is held until that is done. --dry-run submits nothing: it asks `sbatch --test-only`, and prints what would run.
set -uo pipefail
cd "$(dirname "$0")/.." || exit 2
# shellcheck source=slurm/common.sh
. slurm/common.sh
use_site

options=()
while [ $# -gt 0 ] && [[ $1 != *.yaml && $1 != *.yml ]]; do
  if [ "$1" = --dry-run ]; then DRY_RUN=1; else options+=("$1"); fi
  shift
done
[ $# -gt 0 ] || die "no config (a .yaml file); usage: slurm/submit.sh [sbatch options] CONFIG [section.key=value …]"
"$PYTHON" -m pretrain.config "$@" >/dev/null || exit 2
exclude=$(excluded_nodes)
[ -z "$exclude" ] || options=(--exclude="$exclude" ${options[@]+"${options[@]}"}) # one given by hand wins

submit() { # submit OPTION…: sbatch, with what it has to say against it in one line
  local said
  said=$(sbatch "$@" 2>&1) || die "sbatch refuses: $(paste -sd' ' <<<"$said")"
  echo "$said"
}

estimate=$(submit --test-only ${options[@]+"${options[@]}"} slurm/pretrain.sh "$@") || exit 2
if [ -n "${DRY_RUN:-}" ]; then
  echo "$estimate"
  echo "sbatch $(printf '%q ' ${options[@]+"${options[@]}"} slurm/pretrain.sh "$@")"
  DRY_RUN=1 exec slurm/pretrain.sh "$@"
fi

id=$(submit --parsable --hold ${options[@]+"${options[@]}"} slurm/pretrain.sh "$@") || exit 2
id=${id%%;*} # a federation adds its cluster's name
trap 'scancel "$id"' EXIT
check_accelerators "$id"
job=$("$PYTHON" -m pretrain.jobs.submission "$@" --tasks "$(job_field "$id" NumTasks)" --job "$id") || exit 2
mkdir -p slurm/jobs && ln -s "$(readlink -f "$job")" "slurm/jobs/$id" && scontrol release "$id" || exit 1
trap - EXIT
echo "Submitted batch job $id: $job"
