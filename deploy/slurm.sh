#!/bin/bash
# One sweep on the nodes of a Slurm job: sbatch deploy/slurm.sh sweeps/num_registers.yaml /shared/runs [more options of `orchestrate sweep`]
# It starts Ray on every node, runs the sweep on the first, and queues itself again when its time is up before the table is there.
#SBATCH --job-name=ablation
#SBATCH --nodes=4
#SBATCH --ntasks-per-node=1
#SBATCH --cpus-per-task=64
#SBATCH --gpus-per-node=8
#SBATCH --time=12:00:00
#SBATCH --signal=B:USR1@120
#SBATCH --requeue
#SBATCH --open-mode=append
set -euo pipefail

if [ "$#" -lt 2 ]; then
    echo "usage: sbatch deploy/slurm.sh SWEEP_FILE STORAGE [OPTIONS]; STORAGE is a folder that all nodes share, or a URI" >&2
    exit 2
fi
sweep_file=$1 storage=$2
shift 2

port=${RAY_PORT:-6379}
state=${ORCHESTRATE_STATE:-/tmp/orchestrate-$USER} # on a local disk, with the same path on every node
export RAY_AUTH_MODE=token # in ~/.ray/auth_token, which all nodes see; made here if there is none
export RAY_USAGE_STATS_ENABLED=0
# A dead node is noticed within 3 x (3 s + 5 s) instead of 5 x (3 s + 10 s).
export RAY_health_check_period_ms=3000 RAY_health_check_timeout_ms=5000 RAY_health_check_failure_threshold=3
python -c 'from orchestrator.ray_token import ray_token; ray_token()'

nodes=$(scontrol show hostnames "$SLURM_JOB_NODELIST")
head=$(echo "$nodes" | head -n 1)
cpus=${SLURM_CPUS_PER_TASK:-1}
gpus=${SLURM_GPUS_PER_NODE:-0}
gpus=${gpus##*:} # "a100:8" is 8
steps=()

end_steps() {
    for step in "${steps[@]}"; do kill -TERM "$step" 2>/dev/null || true; done
    wait "${steps[@]}" 2>/dev/null || true
}
trap end_steps EXIT

start_ray() { # NODE OPTIONS...
    local node=$1
    shift
    srun --nodes=1 --ntasks=1 --nodelist="$node" --cpus-per-task="$cpus" \
        ray start --block --num-cpus="$cpus" --num-gpus="$gpus" --disable-usage-stats "$@" &
    steps+=($!)
}

start_ray "$head" --head --port="$port" --node-ip-address="$head" --include-dashboard=false
for _ in $(seq 60); do
    if ray status --address="$head:$port" >/dev/null 2>&1; then break; fi
    sleep 1
done
for node in $nodes; do
    if [ "$node" != "$head" ]; then start_ray "$node" --address="$head:$port"; fi
done

orchestrate sweep "$sweep_file" --address "$head:$port" --storage "$storage" --state "$state" "$@" &
driver=$!
# Slurm's warning comes to this shell, 120 s before the end; the sweep's trials checkpoint and leave.
trap 'signaled=1; kill -USR1 "$driver" 2>/dev/null || true' USR1
trap 'signaled=1; kill -TERM "$driver" 2>/dev/null || true' TERM

while true; do
    signaled=0 code=0
    wait "$driver" || code=$?
    if [ "$signaled" -eq 0 ]; then break; fi # else it was the signal that ended the wait
done
if [ "$code" -eq 138 ] || [ "$code" -eq 143 ]; then # left by a signal, resumable
    scontrol requeue "$SLURM_JOB_ID"
fi
exit "$code"
