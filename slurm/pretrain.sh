#!/usr/bin/env bash
# Pretrain on a SLURM cluster:   sbatch [options] slurm/pretrain.sh CONFIG [section.key=value …]
#
# One task per accelerator, started by srun: no ssh, no torchrun. Before the time limit or on preemption every rank
# gets SIGUSR2 (or SIGTERM), the run saves, and the job requeues itself; so it does after a lost node. Site settings
# (account, partition, modules, PYTHON) go into slurm/site.env, which is sourced here and never committed.
#
#SBATCH --job-name=pretrain
#SBATCH --nodes=1
#SBATCH --ntasks-per-node=8
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --output=slurm-%j.log
#SBATCH --signal=USR2@300
set -uo pipefail

[ $# -ge 1 ] || { echo "error: usage: sbatch [options] slurm/pretrain.sh CONFIG [section.key=value …]" >&2; exit 2; }
cd "${SLURM_SUBMIT_DIR:?submit this with sbatch}" || exit 2
# shellcheck disable=SC1091
[ ! -f slurm/site.env ] || . slurm/site.env
export PYTHON=${PYTHON:-$PWD/.venv/bin/python}
[ -x "$PYTHON" ] || { echo "error: no Python at $PYTHON; run 'make .venv/.ready', or set PYTHON in slurm/site.env" >&2; exit 2; }

run=$("$PYTHON" -m pretrain.config "$@") || exit 2   # the run's folder; a mistake in the config ends the job here
latest() { cat "$run/checkpoints/latest" 2>/dev/null || echo none; }
before=$(latest)
rm -f "$run/outcome"
echo "start ${SLURM_RESTART_COUNT:-0} of job $SLURM_JOB_ID on $SLURM_JOB_NODELIST: $run, from checkpoint $before"

# Ignored until Python has its own handler: importing takes seconds, and the default action would kill the rank.
# --export=ALL: after `sbatch --export=NONE`, srun would drop the environment.
srun --export=ALL --kill-on-bad-exit=1 bash -c 'trap "" USR2; exec "$PYTHON" -m pretrain.train --config "$@"' pretrain "$@"
code=$?

# srun's code is that of whichever rank was last to be killed; the run's own word is in its folder.
outcome=$(cat "$run/outcome" 2>/dev/null || echo "died")
echo "outcome: $outcome (srun: $code)"
case $outcome in
  finished* | paused*) exit 0 ;;
  stopped*) scontrol requeue "$SLURM_JOB_ID" ;;
  *)
    # Requeue what may have died of its node, as long as each start gets further than the one before.
    if [ "$code" -ne 2 ] && [ "$(latest)" != "$before" ]; then scontrol requeue "$SLURM_JOB_ID"; fi
    exit "$(( code == 0 ? 1 : code ))" ;;
esac
