#!/usr/bin/env bash
# Train on a SLURM cluster: GPUS (default 8) processes, GPUS_PER_NODE (8), CPUS_PER_TASK (5), SRUN_ARGS.
#   bash detection/slurm_train.sh PARTITION JOB_NAME CONFIG WORK_DIR [OPTION ...]
set -euo pipefail
[ $# -ge 4 ] || { echo "usage: $0 PARTITION JOB_NAME CONFIG WORK_DIR [OPTION ...]" >&2; exit 2; }
# shellcheck disable=SC2086
exec srun -p "$1" --job-name="$2" --gres="gpu:${GPUS_PER_NODE:-8}" --ntasks="${GPUS:-8}" \
    --ntasks-per-node="${GPUS_PER_NODE:-8}" --cpus-per-task="${CPUS_PER_TASK:-5}" --kill-on-bad-exit=1 ${SRUN_ARGS:-} \
    "${PYTHON:-python}" -u "$(dirname "$0")/train.py" "$3" --work-dir "$4" --launcher slurm "${@:5}"
