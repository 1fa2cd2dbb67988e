# Sourced by the batch scripts of this folder, which have said what to run, and on how many nodes.
#
# One task a node is a launcher (srun -> bash -> torchrun), which starts a process for each GPU. 300 s before the time
# limit Slurm sends SIGUSR1 to this script alone (--signal=B:USR1@300); it goes on to all nodes, whose processes agree on
# a step, save behind it and end; then the job is put back into the queue and goes on from there when it is its turn.
# `scancel --signal=USR1 --batch JOB` does the same at any time, and so does `scancel --signal=USR1 JOB`, which reaches
# the nodes without this script. A job that fails by itself is not started again.
#
# One job at a time trains into a --save: a second one ends with a line that names the first. To have it wait, give both
# a name for that folder: `sbatch --job-name NAME --dependency=singleton ...`. The scripts don't ask for that themselves,
# for under their own names jobs of other models and folders would wait for each other, too. A job that was put back
# takes its folder over at once, by SLURM_JOB_ID and SLURM_RESTART_COUNT.
#
# From the environment: MEGAVLM, the repository (where sbatch was called); PYTHON, NPROC and SHUTDOWN_TIMEOUT as in
# examples/launch.sh. The repository, data, weights and --save have to lie where all nodes see them.
# shellcheck shell=bash
set -uo pipefail
cd "${MEGAVLM:-$SLURM_SUBMIT_DIR}" || exit 2

# Where the processes of all nodes meet: at the address by which Slurm itself reaches the first node of the job, and a
# port that follows from the job's number, so that two jobs on one node do not take the same; below those that Linux
# gives to connections (32768 and up), one of which might hold it.
first=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)
MASTER_ADDR=$(scontrol show node "$first" | sed -n 's/.*NodeAddr=\([^ ]*\).*/\1/p')
MASTER_PORT=$((10000 + SLURM_JOB_ID % 20000))
export NNODES=$SLURM_JOB_NUM_NODES MASTER_ADDR MASTER_PORT

# NCCL. What it finds out by itself (InfiniBand, NVLink, trees and rings) is left to it; set NCCL_IB_HCA or
# NCCL_SOCKET_IFNAME where a cluster has several networks and it takes the wrong one (NCCL_DEBUG=INFO says which).
# An error or a lost node ends the processes instead of leaving the others waiting for it.
export TORCH_NCCL_ASYNC_ERROR_HANDLING=${TORCH_NCCL_ASYNC_ERROR_HANDLING:-1}
# Buffers for user tensors are freed without waiting for other streams, which keeps memory from growing under overlap.
export TORCH_NCCL_AVOID_RECORD_STREAMS=${TORCH_NCCL_AVOID_RECORD_STREAMS:-1}
# In-network reduction needs switches with SHARP and otherwise only warns.
export NCCL_COLLNET_ENABLE=${NCCL_COLLNET_ENABLE:-0}
# Threads: each process gets 8 for the decoding of pictures (launch.sh); the rest of --cpus-per-task goes to the data
# loader's own threads (--num-workers) and to NCCL's. Since Slurm 22.05 srun takes no number from sbatch by itself, and
# a task of one CPU would hold all processes of its node.
export SRUN_CPUS_PER_TASK=${SRUN_CPUS_PER_TASK:-${SLURM_CPUS_PER_TASK:-1}}
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-8}
# Fragments of freed memory are given back to other sizes: rows of many tiles come and go.
export PYTORCH_CUDA_ALLOC_CONF=${PYTORCH_CUDA_ALLOC_CONF:-expandable_segments:True}

forward() {
    echo "SIGUSR1: the run saves, and the job is put back into the queue"
    kill -USR1 "$step" 2>/dev/null
}
trap forward USR1

# A node that ends gives the others 660 s for a save of theirs. The number of a node is known on the node alone.
# shellcheck disable=SC2016
srun --nodes="$NNODES" --ntasks="$NNODES" --ntasks-per-node=1 --kill-on-bad-exit=0 --wait=660 \
    bash -c 'export NODE_RANK=$SLURM_NODEID; exec bash "$@"' launch "$@" &
step=$!
# `wait` returns early when a signal comes, with its number and not with what the step ended with.
while kill -0 "$step" 2>/dev/null; do
    wait "$step"
done
wait "$step"
code=$?

# 75: the run was stopped, and all its processes have saved. 138: SIGUSR1 came before a launcher listened. All else is a
# crash or a mistake, with a signal or without, and a job that was started again after it would end so again.
if ((code == 75 || code == 138)); then
    scontrol requeue "$SLURM_JOB_ID"
    exit 0
fi
exit "$code"
