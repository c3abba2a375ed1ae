# shellcheck shell=bash
# What a job does about nodes that it has lost: it starts again on those that are left.
#
# SLURM requeues such a job in the size it had; where the cluster has fewer nodes left, it would wait until one is
# mended. The size of a waiting job can be changed, but only while somebody is there to do it: the processes of its
# last start are, for KillWait seconds (30) after SIGTERM.

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

wait_for_word_of_lost_nodes() { # wait_for_word_of_lost_nodes LOGS: until SLURM knows of every node that is lost
  # Ranks notice sooner than SLURM, after its SlurmdTimeout, and a job requeued meanwhile would ask for the lost node.
  local node deadline
  deadline=$((SECONDS + 60 + $(scontrol show config | sed -n 's/^SlurmdTimeout *= \([0-9]*\) sec.*/\1/p')))
  for node in $(comm -23 <(scontrol show hostnames "$SLURM_JOB_NODELIST" | sort) \
    <(cut -d' ' -f2 "$1"/rank-*.exit 2>/dev/null | sort -u)); do
    echo "no rank on $node left word of its end: waiting until $node answers, or SLURM finds it lost"
    while [ $SECONDS -lt $deadline ]; do
      # In the background, since bash heeds a signal (SLURM's requeue) only between commands, or in wait.
      timeout 20 srun --overlap --nodes=1 --ntasks=1 --nodelist="$node" true 2>/dev/null &
      ! wait $! || break
      sleep 2 &
      wait $!
    done
  done
}
