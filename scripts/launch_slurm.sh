#!/usr/bin/env bash
# Trains on the GPUs of a SLURM allocation; options go to main.py:
#
#   sbatch --nodes 2 --gpus-per-node 8 --ntasks-per-node 8 --time 24:00:00 scripts/launch_slurm.sh --kw_config CONFIG \
#       --data_path IMAGENET --output_dir OUT
#
# Two minutes before the time is up, or when the job is pre-empted, all processes save at the same update, and the job is
# put into the queue again, where it continues. So is one whose machine failed; SLURM does that itself.
#SBATCH --job-name kernelwarehouse
#SBATCH --requeue
#SBATCH --open-mode append
#SBATCH --signal USR1@120
set -uo pipefail
# sbatch runs a copy of this script, in the folder of the one who submitted it
cd "${PROJECT:-${SLURM_SUBMIT_DIR:-.}}" || exit 2
if [ ! -f main.py ]; then
    echo "error: no main.py in $PWD; submit from the project's folder, or set PROJECT to it" >&2
    exit 2
fi
python=python3
[ ! -x .venv/bin/python ] || python=.venv/bin/python
export TORCH_FORCE_WEIGHTS_ONLY_LOAD=1

# scancel --batch and pre-emption tell this script only; the signals of --signal reach the processes themselves
trap 'kill -TERM "$step" 2> /dev/null' TERM
srun --kill-on-bad-exit=1 "$python" main.py "$@" &
step=$!
while :; do
    wait "$step"
    code=$?
    # a signal ends the wait, and not yet the processes
    kill -0 "$step" 2> /dev/null || break
done

if [ "$code" -eq 143 ] && [ -n "${SLURM_JOB_ID:-}" ]; then
    echo "job $SLURM_JOB_ID was asked to stop, and goes into the queue again"
    scontrol requeue "$SLURM_JOB_ID"
fi
exit "$code"
