#!/usr/bin/env bash
# One rank for each GPU of a Slurm allocation.
#   sbatch --nodes 8 --gpus-per-node 8 examples/launch/slurm.sh examples/long_vita_14b/run.yaml [--stage 3 ...]
#SBATCH --job-name=megatron_vita
#SBATCH --ntasks-per-node=1
#SBATCH --exclusive
set -euo pipefail
head=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)
config=${1:?give the recipe as the first argument}
shift
# A killed or requeued job goes on from its last checkpoint: the command stays the same.
srun torchrun --nnodes "$SLURM_NNODES" --nproc-per-node "${SLURM_GPUS_ON_NODE:-8}" \
  --rdzv-backend c10d --rdzv-id "$SLURM_JOB_ID" --rdzv-endpoint "$head:${PORT:-29500}" \
  pretrain_vita.py --config "$config" "$@"
