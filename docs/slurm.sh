#!/bin/bash
# Navigator, pairs, pretraining and probes on 2 nodes with 4 GPUs each:
#
#     sbatch docs/slurm.sh PRESET
#
# The same line again goes on where the job before stopped. Partition, account and time are your cluster's.

#SBATCH --job-name=copgen
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=1        # one torchrun a node; it starts a process for each GPU
#SBATCH --gpus-per-node=4
#SBATCH --cpus-per-task=32         # of all 4 processes: loader threads, encoders of images, latents
#SBATCH --time=24:00:00
#SBATCH --signal=TERM@180          # three minutes before the time is up: the run saves and stops
#SBATCH --requeue                  # starts again by itself after a node failed, and goes on
#SBATCH --open-mode=append         # in the same log
#SBATCH --output=%x-%j.log

set -euo pipefail

PRESET=${1:?usage: sbatch docs/slurm.sh PRESET}
# On a disk that all nodes see: rank 0 writes there, all processes read checkpoints and pairs.
OUT=${OUT:-$SLURM_SUBMIT_DIR/runs/$PRESET}

# Where the processes meet: the first node, and a port that another job is unlikely to have.
HEAD=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)
PORT=$((20000 + SLURM_JOB_ID % 20000))

# Threads of each of the 4 processes. More than cores only get in each other's way.
export OMP_NUM_THREADS=$((SLURM_CPUS_PER_TASK / 4))

# Where nodes have several networks, say which one to use (`ip -br addr` lists them); NCCL finds InfiniBand by itself.
# export NCCL_SOCKET_IFNAME=eth0 GLOO_SOCKET_IFNAME=eth0

torchrun_options=(
    --nnodes="$SLURM_NNODES"
    --nproc-per-node=4
    --rdzv-backend=c10d                  # how the nodes find each other, at the start and after a failure
    --rdzv-endpoint="$HEAD:$PORT"
    --rdzv-id="$SLURM_JOB_ID"
    --max-restarts=3                     # a process that dies is started again with all others, from the last checkpoint
)
# Seconds that a stop may take: all finish their --log-every steps, rank 0 saves. torch 2.11's torchrun lacks the option.
if [[ $(torchrun --help) == *--shutdown-timeout* ]]; then
    torchrun_options+=(--shutdown-timeout=120)
fi
train_options=(
    --out "$OUT"
    --bn sync                            # the same results on any number of GPUs; per-rank: the reference's DataParallel
    --timeout 300                        # seconds until the others give up on a process that hangs, and name it
)

# The preset's batches are those of all 8 GPUs together: 8 must divide them.
# exec, so that signals reach srun, which passes them on to torchrun, and that to the processes.
exec srun --kill-on-bad-exit=1 torchrun "${torchrun_options[@]}" -m copgen_fast.train "$PRESET" "${train_options[@]}"
