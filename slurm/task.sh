#!/usr/bin/env bash
# One rank, as srun starts it:   slurm/task.sh LOGS MODULE [ARGUMENT…]
set -uo pipefail
logs=$1
shift
# A warning must not kill this shell, nor Python before its first lines, which hold signals back until it can heed them.
trap '' USR2
# SLURM signals every process of a step. This shell stays, to note how Python ended.
trap : TERM INT

# On the node's own disk. A compilation that was killed leaves a lock that would hang the next start, so extensions
# are kept for one start; Triton's cache has no locks and is kept.
base=${NODE_LOCAL_DIR:-/tmp}/$(id -un)-pretrain
here=$base/$SLURM_JOB_ID-${SLURM_RESTART_COUNT:-0}
export TRITON_CACHE_DIR=${TRITON_CACHE_DIR:-$base/triton}
export TORCH_EXTENSIONS_DIR=$here/extensions TMPDIR=$here/tmp
mkdir -p "$TRITON_CACHE_DIR" "$TORCH_EXTENSIONS_DIR" "$TMPDIR" || exit 1
[ -z "${SLURM_CPUS_PER_TASK:-}" ] || export OMP_NUM_THREADS=${OMP_NUM_THREADS:-$SLURM_CPUS_PER_TASK}

"$PYTHON" -m "$@"
code=$?
echo "$code ${SLURMD_NODENAME:-$(hostname)} $(date +%s.%N)" >"$logs/rank-$SLURM_PROCID.exit"
# 75 is an end like any other, and word of it is left above: as a failure it would make srun kill the other ranks.
[ "$code" != 75 ] || code=0
exit "$code"
