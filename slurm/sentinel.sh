#!/usr/bin/env bash
# Sleeps on each node of a job until SLURM ends it:   slurm/sentinel.sh SUBMITTED PER_NODE LOGS
#
# When a node is lost, the batch script may be lost with it. One of these is left, and sees to the job's next start.
set -uo pipefail
submitted=$1 per_node=$2 logs=$3
# shellcheck source=slurm/common.sh
. "$(dirname "$0")/common.sh"
# shellcheck source=slurm/lost_nodes.sh
. "$(dirname "$0")/lost_nodes.sh"
trap '' USR2 # the warning before the time limit is not meant for it
trap 'ask_for_nodes_left "$submitted" "$per_node" >>"$logs/sentinel.log" 2>&1; exit 0' TERM
sleep infinity &
wait
