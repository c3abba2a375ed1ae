#!/usr/bin/env bash
# Pretrain on a SLURM cluster:
#
#     slurm/submit.sh [sbatch options] CONFIG [section.key=value …]             checked and kept when it is submitted
#     sbatch [options] slurm/pretrain.sh CONFIG [section.key=value …]           checked and kept when it first starts
#
# One task per accelerator, started by srun: no ssh, no torchrun. Before the time limit or on preemption every rank
# gets SIGUSR2 (or SIGTERM), the run saves, and the job requeues itself; so it does after a lost node or a rank's death,
# as long as its starts get further, on fewer nodes if no more are left. DRY_RUN=1 slurm/pretrain.sh CONFIG … prints what
# would run. See docs/slurm.md.
#
#SBATCH --job-name=pretrain
#SBATCH --nodes=1
#SBATCH --ntasks-per-node=8
#SBATCH --wait-all-nodes=1
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --output=slurm-%j.log
#SBATCH --signal=USR2@300
set -uo pipefail

[ $# -ge 1 ] || { echo "error: no config; usage: sbatch [options] slurm/pretrain.sh CONFIG [section.key=value …]" >&2; exit 2; }
if [ -n "${DRY_RUN:-}" ]; then
  export SLURM_JOB_ID=${SLURM_JOB_ID:-JOB} SLURM_SUBMIT_DIR=${SLURM_SUBMIT_DIR:-$PWD} SLURM_JOB_NODELIST=NODES
fi
cd "${SLURM_SUBMIT_DIR:?submit this with slurm/submit.sh or sbatch}" || exit 2
link=slurm/jobs/$SLURM_JOB_ID # → the job's folder in the run's, which holds the code and the config that it runs

if [ -e "$link" ] && ! [ "$0" -ef "$link/code/slurm/pretrain.sh" ]; then
  exec "$link/code/slurm/pretrain.sh" "$@"
fi
# shellcheck source=slurm/common.sh
. "$([ -e "$link" ] && echo "$link/code" || echo .)/slurm/common.sh" || exit 2
use_site
# shellcheck source=slurm/lost_nodes.sh
. "$CODE/slurm/lost_nodes.sh"

if [ -n "${DRY_RUN:-}" ]; then
  run=$("$PYTHON" -m pretrain.config "$@") || exit 2
  job=$run/jobs/$SLURM_JOB_ID
elif [ -e "$link" ]; then
  job=$(readlink -f "$link") run=${job%/jobs/*}
else
  check_accelerators "$(job_name)"
  job=$("$PYTHON" -m pretrain.jobs.submission "$@" --tasks "$SLURM_NTASKS" --job "$SLURM_JOB_ID") || exit 2
  mkdir -p slurm/jobs && ln -s "$(readlink -f "$job")" "$link" || exit 2
  exec "$link/code/slurm/pretrain.sh" "$@"
fi

start=${SLURM_RESTART_COUNT:-0}
logs=$run/logs/$SLURM_JOB_ID-$start
# What the first start was given is what later ones ask for. SLURM_NTASKS stays as submitted, whatever the job becomes.
if [ -z "${DRY_RUN:-}" ]; then
  per_node=${SLURM_NTASKS_PER_NODE:-$SLURM_NTASKS}
  [ "$per_node" -le "$SLURM_NTASKS" ] || per_node=$((SLURM_NTASKS / SLURM_JOB_NUM_NODES))
  [ -e "$job/shape" ] || echo "$SLURM_JOB_NUM_NODES $per_node" >"$job/shape"
  read -r submitted per_node <"$job/shape"
  export SLURM_NTASKS=$((SLURM_JOB_NUM_NODES * per_node))
fi
judge() { # judge begin | judge end --code CODE
  "$PYTHON" -m pretrain.jobs.restarts "$1" "$job" --start "$start" --nodes "$SLURM_JOB_NODELIST" --logs "$logs" \
    --cap "${MAX_FRUITLESS_STARTS:-5}" "${@:2}"
}

requeue() {
  # SLURM sends TERM to every process of this script as soon as it is asked: ignore it until all is said.
  trap '' TERM
  local id exclude
  id=$(job_name)
  # A job that is being cancelled, or requeued by SLURM already, is not ours to requeue.
  [ "$(squeue --noheader --jobs="$id" --format=%T)" = RUNNING ] || exit 0
  exclude=$(printf '%s\n%s\n' "$(job_field "$id" ExcNodeList)" "$(excluded_nodes)" | grep . | paste -sd,)
  scontrol requeue "$id" || exit 1
  [ -z "$exclude" ] || scontrol update JobId="$id" ExcNodeList="$exclude"
  ask_for_nodes_left "$submitted" "$per_node"
  exit 0
}

options=(--output="$logs/rank-%t.log" --open-mode=append) overrides=()
[ "$start" = 0 ] || overrides=(run.resume=auto) # what else it says is meant for the first start
train() {
  launch "${options[@]}" -- "$CODE/slurm/task.sh" "$logs" pretrain.train --config "$job/config.yaml" \
    ${overrides[@]+"${overrides[@]}"}
}

use_what_fits() { # on fewer nodes than submitted, the batch may fit fewer still, or in smaller parts alone
  local nodes micro all=$SLURM_JOB_NUM_NODES
  read -r nodes micro < <("$PYTHON" -m pretrain.jobs.fit "$job/config.yaml" --nodes "$all" --per-node "$per_node") || return 1
  echo "$all of $submitted nodes are left: the batch fits $nodes of them, batch.micro_sequences=$micro"
  options+=(--nodes="$nodes" --ntasks=$((nodes * per_node)))
  options+=(--nodelist="$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n "$nodes" | paste -sd,)")
  overrides+=(batch.micro_sequences="$micro")
}

# Containers have no scontrol: the ranks are told where to meet. The port follows from the job and its restarts.
[ -n "${DRY_RUN:-}" ] || export MASTER_ADDR=${MASTER_ADDR:-$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)}
preflight() { "$CODE/slurm/preflight.sh" "$logs/preflight"; }
with_preflight=${PREFLIGHT:-$((${SLURM_JOB_NUM_NODES:-2} > 1))} # what one node has to say, the run says as well

if [ -n "${DRY_RUN:-}" ]; then
  [ "$with_preflight" = 0 ] || preflight
  train
  exit
fi

judge begin || exit 1
listed=$(comm -12 <(scontrol show hostnames "$SLURM_JOB_NODELIST" | sort) <(excluded_nodes | tr , '\n'))
[ -z "$listed" ] || { echo "slurm/exclude names $(paste -sd, <<<"$listed"): starting again without" && requeue; }
echo "start $start of job $SLURM_JOB_ID on $SLURM_JOB_NODELIST: $run"
trap 'ask_for_nodes_left "$submitted" "$per_node"; exit 143' TERM # requeued by SLURM, or cancelled
if [ "$SLURM_JOB_NUM_NODES" -gt 1 ]; then
  # They outlive a lost node, and take nothing that the ranks have.
  srun --export=ALL --overlap --no-kill --ntasks="$SLURM_JOB_NUM_NODES" --ntasks-per-node=1 --cpu-bind=none \
    "$CODE/slurm/sentinel.sh" "$submitted" "$per_node" "$logs" 2>/dev/null &
  sentinels=$!
fi
if [ "$with_preflight" != 0 ] && ! preflight; then
  [ "$(judge end --code 1 --why "preflight: $(cat "$logs/preflight/verdict")")" = restart ] || exit 1
  requeue
fi

if [ "$SLURM_JOB_NUM_NODES" -lt "$submitted" ] && ! use_what_fits; then
  judge end --code 2 --why "the batch fits no number of nodes up to $SLURM_JOB_NUM_NODES"
  exit 1
fi
train &
ranks=$!
# The job's log shows the first rank; those of all are in the run's folder.
tail --lines=+1 --retry --follow=name --pid=$ranks "$logs/rank-0.log" 2>/dev/null &
wait $ranks
code=$?
[ -z "${sentinels:-}" ] || kill "$sentinels"
wait
verdict=$(judge end --code "$code")
echo "start $start of job $SLURM_JOB_ID: $(cat "$run/outcome" 2>/dev/null || echo died) (srun: $code), $verdict"
case $verdict in
  finished) exit 0 ;;
  restart) requeue ;;
  *) exit "$((code == 0 ? 1 : code))" ;;
esac
