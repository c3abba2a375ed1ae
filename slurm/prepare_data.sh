#!/usr/bin/env bash
# Text to tokens on many nodes:   sbatch --array=1-N [options] slurm/prepare_data.sh --source SRC --tokenizer TOK --out DIR …
#
# Task k makes part k of N in DIR.parts/k; whichever ends last merges them into DIR and verifies every byte. A task that
# is killed, or loses its node, starts again and keeps its finished shards; the same command again repeats only what is
# missing. The result is byte for byte what one machine makes.
#
#SBATCH --job-name=prepare_data
#SBATCH --ntasks=1
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --output=slurm-%A_%a.log
set -uo pipefail
cd "${SLURM_SUBMIT_DIR:?submit this with sbatch --array=1-N}" || exit 2
# shellcheck source=slurm/common.sh
. slurm/common.sh
use_site

part=${SLURM_ARRAY_TASK_ID:-} parts=${SLURM_ARRAY_TASK_COUNT:-}
[[ -n $part && $part -ge 1 && $part -le $parts ]] || die "submit with sbatch --array=1-N: N tasks, numbered from 1"
out=''
for ((i = 1; i <= $#; i++)); do
  case ${!i} in
    --out) next=$((i + 1)) out=${!next:-} ;;
    --out=*) out=${!i#--out=} ;;
  esac
done
[ -n "$out" ] || die "no --out DIR; the options are those of python -m data_pipeline.prepare"
[ ! -e "$out/manifest.json" ] || { echo "$out: prepared already" && exit 0; }

# The last --out counts, so the part's goes behind the user's.
"$PYTHON" -m data_pipeline.prepare "$@" --part "$part/$parts" --out "$out.parts/$part"
code=$?
if [ $code -gt 128 ] && [ "${SLURM_RESTART_COUNT:-0}" -lt 3 ]; then
  echo "killed ($code): starting again"
  scontrol requeue "$(job_name)"
fi
[ $code = 0 ] || exit $code

# One at a time, so that exactly one task finds all parts there and no data set yet.
exec 9>"$out.parts/lock" && flock 9 || exit 1
folders=()
for ((k = 1; k <= parts; k++)); do
  [ ! -e "$out.parts/$k/part.json" ] || folders+=("$out.parts/$k")
done
if [ ${#folders[@]} -lt "$parts" ] || [ -e "$out/manifest.json" ]; then
  echo "part $part of $parts is done; ${#folders[@]} are"
  exit 0
fi
"$PYTHON" -m data_pipeline.merge "${folders[@]}" --out "$out" && "$PYTHON" -m data_pipeline.verify "$out" || exit 1
rm -rf "$out.parts"
echo "$out: merged from $parts parts, and verified"
