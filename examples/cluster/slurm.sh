#!/bin/bash
#SBATCH --job-name=sta
#SBATCH --nodes=4
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=64
#SBATCH --time=24:00:00
#SBATCH --requeue
#SBATCH --open-mode=append

# One task a node starts one process a GPU. A job that is requeued goes on from its last checkpoint.
# Usage: sbatch slurm.sh --model ID --data FILE --out FOLDER ...  (everything after the script goes to sta-adapter train)
set -euo pipefail
CONFIG=${CONFIG:-examples/cluster/ddp.yaml}
GPUS_PER_NODE=${SLURM_GPUS_ON_NODE:-8}
MAIN_NODE=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)
export MAIN_NODE CONFIG GPUS_PER_NODE
srun --kill-on-bad-exit=1 bash -c 'accelerate launch \
    --config_file "$CONFIG" \
    --num_machines "$SLURM_NNODES" \
    --num_processes "$((SLURM_NNODES * GPUS_PER_NODE))" \
    --machine_rank "$SLURM_NODEID" \
    --main_process_ip "$MAIN_NODE" \
    --main_process_port 29500 \
    --no_python \
    sta-adapter train "$@"' train "$@"
