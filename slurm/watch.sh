#!/usr/bin/env bash
# Look at the jobs submitted from this repository:   slurm/watch.sh [SECONDS]   (again every SECONDS; once without)
set -uo pipefail
cd "$(dirname "$0")/.." || exit 2
# shellcheck source=slurm/common.sh
. slurm/common.sh
use_site
exec "$PYTHON" -m pretrain.jobs.watch "$@"
