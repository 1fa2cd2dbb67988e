# Sourced by the scripts of this folder when bash runs them: becomes torchrun, which runs the same script as Python.
#
# From the environment, each with a default:
#   NPROC              processes on this node: as many as it has GPUs; without one, 2
#   NNODES, NODE_RANK  how many nodes there are (1), and which of them this is; start the script on each
#   MASTER_ADDR        name of the first node, and a port there that is free (29500)
#   MASTER_PORT
#   SHUTDOWN_TIMEOUT   seconds for which a run that is asked to stop may save before it is killed (600)
#   PYTHON             the interpreter: that of torchrun on the path, else that of the repository's .venv
# shellcheck shell=bash
set -euo pipefail

folder=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
script=$folder/$(basename "$0")
if [[ -z ${PYTHON:-} ]]; then
    PYTHON=$(dirname "$(command -v torchrun || echo "$folder/../.venv/bin/torchrun")")/python
fi
if ! command -v "$PYTHON" >/dev/null; then
    echo "megavlm: error: there is no $PYTHON; run \`make setup\`, activate its environment, or set PYTHON" >&2
    exit 2
fi
gpus=$(nvidia-smi --list-gpus 2>/dev/null | grep -c '^GPU' || true)

# Keeps the folder one stands in, and that of the script, off Python's path.
export PYTHONSAFEPATH=1
if ((gpus > 0)); then
    # Without this a process per GPU starts as many threads as the node has cores; 8 feed the decoding of pictures.
    export OMP_NUM_THREADS=${OMP_NUM_THREADS:-8}
    # One queue to the GPU: kernels start in the order of their launch, so that tensor parallelism overlaps its
    # communication with the products that it was launched before.
    export CUDA_DEVICE_MAX_CONNECTIONS=${CUDA_DEVICE_MAX_CONNECTIONS:-1}
else
    export OMP_NUM_THREADS=${OMP_NUM_THREADS:-1}
fi

NNODES=${NNODES:-1}
if ((NNODES > 1)); then
    : "${MASTER_ADDR:?names the first node, and is needed with NNODES=$NNODES}" "${NODE_RANK:?is the number of this node}"
    meeting=(--node-rank "$NODE_RANK" --master-addr "$MASTER_ADDR" --master-port "${MASTER_PORT:-29500}")
else
    meeting=(--standalone)
fi
processes=${NPROC:-$((gpus > 0 ? gpus : 2))}
for word in "$@"; do
    [[ $word == --help || $word == -h ]] && processes=1
done

# torchrun forwards no SIGUSR1 unless it is told to, and by itself kills workers 30 s after the first signal, in the
# middle of a save.
exec "$PYTHON" -m megavlm.torchrun --nnodes "$NNODES" --nproc-per-node "$processes" "${meeting[@]}" \
    --signals-to-handle SIGTERM,SIGINT,SIGHUP,SIGQUIT,SIGUSR1 --shutdown-timeout "${SHUTDOWN_TIMEOUT:-600}" \
    "$script" "$@"
