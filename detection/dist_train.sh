#!/usr/bin/env bash
# Train on the GPUs of this host, or of several (NNODES, NODE_RANK, MASTER_ADDR and PORT in the environment).
#   bash detection/dist_train.sh CONFIG GPUS [OPTION ...]
set -euo pipefail
[ $# -ge 2 ] || { echo "usage: $0 CONFIG GPUS [OPTION ...]" >&2; exit 2; }
exec "${PYTHON:-python}" -m torch.distributed.run --nnodes "${NNODES:-1}" --node_rank "${NODE_RANK:-0}" \
    --master_addr "${MASTER_ADDR:-127.0.0.1}" --master_port "${PORT:-29500}" --nproc_per_node "$2" \
    "$(dirname "$0")/train.py" "$1" --launcher pytorch "${@:3}"
