# shellcheck shell=bash
# What a job does about nodes that it has lost: it starts again on those that are left.
#
# SLURM requeues such a job in the size it had; where the cluster has fewer nodes left, it would wait until one is
# mended. The size of a waiting job can be changed, but only while somebody is there to do it: the processes of its
# last start are, for KillWait seconds (30) after SIGTERM. Ranks notice a lost node sooner than SLURM (SlurmdTimeout),
# but srun waits for those on it until SLURM knows; so nothing is requeued too early, to ask for the lost node again.

nodes_left() { # nodes_left EXCLUDED: nodes of the job's partition that work and are not among the excluded (a,b[1-2])
  comm -23 <(sinfo --noheader --Node --partition="$SLURM_JOB_PARTITION" --format='%N %T' |
    grep -vE ' (down|drain|fail|error|inval|unk|future|maint)|\*$' | cut -d' ' -f1 | sort -u) \
    <([ -z "$1" ] || scontrol show hostnames "$1" | sort)
}

ask_for_nodes_left() { # ask_for_nodes_left SUBMITTED PER_NODE: if this job waits to start again, on what it then will
  local id left nodes tasks
  id=$(job_name)
  [ "$(job_field "$id" Restarts)" -gt "${SLURM_RESTART_COUNT:-0}" ] || return 0
  left=$(nodes_left "$(job_field "$id" ExcNodeList)" | wc -l)
  nodes=$((left < $1 ? left : $1))
  [ "$nodes" -ge "${MIN_NODES:-1}" ] || nodes=$1 # so it waits until there are
  [ "$nodes" != "$SLURM_JOB_NUM_NODES" ] || return 0
  tasks=$((nodes * $2))
  scontrol update JobId="$id" NumNodes="$nodes-$nodes" NumTasks=$tasks NumCPUs=$((tasks * ${SLURM_CPUS_PER_TASK:-1})) &&
    echo "job $id, submitted for $1 nodes, asks for $nodes now; working nodes: $left"
}
