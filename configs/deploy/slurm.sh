#!/bin/bash
# Pretraining on a Slurm allocation: sbatch --nodes=4 configs/deploy/slurm.sh /shared/run.toml
#
# One Ray node per Slurm node; prepare, pretrain and export on them. run.storage must be a folder that all nodes share. A job
# that was requeued or is submitted again continues from the last commit.
#
# NOT RUN under Slurm: it is checked by `bash -n`, and its commands and settings by tests/unit/cluster/test_deploy.py.
#SBATCH --job-name=siloweave
#SBATCH --exclusive
#SBATCH --ntasks-per-node=1
#SBATCH --cpus-per-task=8
#SBATCH --time=24:00:00
#SBATCH --requeue
# On GPUs: #SBATCH --gpus-per-node=4, and cluster.device = "gpu" in the settings.
set -euo pipefail

config=${1:?"give the run's settings: sbatch --nodes=N $0 RUN.toml"}
port=6379
export RAY_USAGE_STATS_ENABLED=0 OMP_NUM_THREADS=1

head=$(hostname) # this script runs on the first node of the allocation
address=$(hostname --ip-address | awk '{print $1}'):$port
pids=()
trap '((${#pids[@]} == 0)) || kill "${pids[@]}" 2>/dev/null || true' EXIT

node() { # starts a Ray node on each of $1 Slurm nodes, which srun's option $2 chooses; the rest are ray's options
  local nodes=$1 choice=$2
  shift 2
  srun --overlap --nodes="$nodes" --ntasks="$nodes" "$choice" \
    ray start "$@" --num-cpus="$SLURM_CPUS_PER_TASK" --disable-usage-stats --block &
  pids+=($!)
}

node 1 --nodelist="$head" --head --port="$port" --include-dashboard=false
for _ in $(seq 60); do
  if ray health-check --address "$address" 2>/dev/null; then break; fi
  sleep 2
done
ray health-check --address "$address"
if ((SLURM_JOB_NUM_NODES > 1)); then
  node $((SLURM_JOB_NUM_NODES - 1)) --exclude="$head" --address="$address"
fi

# The gang waits for its places as long as cluster.placement_timeout_s says, so nodes may still be joining.
export RAY_ADDRESS=$address
siloweave prepare -c "$config"
siloweave pretrain -c "$config"
siloweave export -c "$config"
siloweave status -c "$config"
