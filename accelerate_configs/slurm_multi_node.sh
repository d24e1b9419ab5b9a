#!/bin/bash
# Train on several nodes. From the root of the repository:
#   sbatch [--nodes N] accelerate_configs/slurm_multi_node.sh RECIPE.py CONFIG.yaml [--key value …]
#SBATCH --job-name=training
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=1 # the launcher, which starts a process for each GPU
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=96
#SBATCH --exclusive
#SBATCH --mem=0 # all there is
#SBATCH --time=24:00:00
#SBATCH --signal=B:USR1@300
#SBATCH --output=%x-%j.log
set -euo pipefail

recipe=$1
export PATH="$PWD/.venv/bin:$PATH"
export OMP_NUM_THREADS=$((SLURM_CPUS_PER_TASK / SLURM_GPUS_ON_NODE))
export TORCH_ELASTIC_SHUTDOWN_TIMEOUT=300 # seconds; with 30 a large checkpoint is cut off

# Five minutes before the time is up Slurm sends USR1 to this script. The launcher must not get it:
# it would die and leave its processes behind (and SIGTERM makes it end with status 1). So it goes
# to the processes that run the recipe, `python -u RECIPE.py …`: they write a checkpoint and exit.
stop() {
    srun --overlap pkill -USR1 -f "^[^ ]+ -u $recipe" || true
    wait "$launchers"
    exit
}
trap stop USR1

srun --kill-on-bad-exit=1 --cpus-per-task="$SLURM_CPUS_PER_TASK" \
    bash -c 'exec accelerate launch --machine_rank "$SLURM_NODEID" "$@"' launch \
    --config_file accelerate_configs/zero3_multi_node.yaml \
    --num_machines "$SLURM_NNODES" \
    --num_processes $((SLURM_NNODES * SLURM_GPUS_ON_NODE)) \
    --main_process_ip "$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)" \
    --main_process_port $((20000 + SLURM_JOB_ID % 10000)) \
    "$@" &
launchers=$!
wait "$launchers"
