#!/usr/bin/env bash
# Trains with several processes and starts them again where one is lost; options go to main.py:
#
#   PROCESSES=8 bash scripts/launch.sh --kw_config CONFIG --data_path IMAGENET --output_dir OUT
#
# On several machines run it on each, with an output folder that all of them share:
#
#   NODES=2 HEAD=node1:29400 PROCESSES=8 bash scripts/launch.sh ...
#
# PROCESSES: of this machine (default: one per GPU, or 1). NODES: number of machines, or MIN:MAX: then the run goes on
# with fewer machines where one is lost, and with more where one comes back. HEAD: address of one of them, where all meet;
# the run ends with it. RUN: a name that differs between runs that meet at one address. RESTARTS: how often processes are
# started again (default: 10). TORCHRUN: further options of torchrun.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
python=python3
[ ! -x .venv/bin/python ] || python=.venv/bin/python

# Otherwise the processes meet in a store of the launcher that ends with the first of them, and restarts fail
# (pytorch/pytorch#135712).
export TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1
# No file runs code, whatever a library asks for.
export TORCH_FORCE_WEIGHTS_ONLY_LOAD=1

if [ -z "${PROCESSES:-}" ]; then
    PROCESSES=$("$python" -c "import torch; print(max(1, torch.cuda.device_count()))")
fi
# shellcheck disable=SC2086
exec "$python" -m torch.distributed.run \
    --nnodes "${NODES:-1}" --nproc-per-node "$PROCESSES" \
    --rdzv-backend c10d --rdzv-endpoint "${HEAD:-127.0.0.1:0}" --rdzv-id "${RUN:-run}" \
    --max-restarts "${RESTARTS:-10}" --monitor-interval "${INTERVAL:-1}" ${TORCHRUN:-} \
    main.py "$@"
