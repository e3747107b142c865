# Sourced by the training scripts: where we are, how many nodes and GPUs there are, and how a run is started.
# Several nodes: set NNODES (or WORLD_SIZE; both count nodes), RANK (or NODE_RANK) and MASTER_ADDR on each, and the same
# RAY_AUTH_TOKEN on all; then start the same script everywhere.

cd "$(dirname "${BASH_SOURCE[0]}")/.." || exit 1
export CHATLEARN=$PWD
export PYTHONPATH=$CHATLEARN${PYTHONPATH:+:$PYTHONPATH}
if [ -x .venv/bin/python ]; then python=$CHATLEARN/.venv/bin/python; else python=python; fi

export NNODES=${NNODES:-${WORLD_SIZE:-1}}
export NODE_RANK=${NODE_RANK:-${RANK:-0}}
export MASTER_ADDR=${MASTER_ADDR:-localhost}
ray_port=${RAY_PORT:-6379} # MASTER_PORT is usually torch's, and lies among the ports that Ray gives to its workers.
if [ -z "${GPUS_PER_NODE:-}" ]; then
  GPUS_PER_NODE=${KUBERNETES_CONTAINER_RESOURCE_GPU:-$(nvidia-smi --list-gpus 2>/dev/null | grep -c '^GPU')}
fi
export GPUS_PER_NODE
if [ "$GPUS_PER_NODE" -lt 1 ]; then
  echo "no GPU found on this machine; to see the plan for another one: GPUS_PER_NODE=8 bash $0 --dry-run" >&2
  exit 2
fi
num_device=$((NNODES * GPUS_PER_NODE))

export CUDA_DEVICE_MAX_CONNECTIONS=1
export NCCL_DEBUG=${NCCL_DEBUG:-WARN}
export RAY_DEDUP_LOGS=1

answers() {
  (exec 3<>"/dev/tcp/$MASTER_ADDR/$ray_port") 2>/dev/null
}

# One Ray cluster over all nodes: node 0 holds its head and runs the training, the others serve until the head is gone.
# Only the Ray that is started here is ended here.
open_cluster() {
  if [ -n "${RAY_AUTH_TOKEN:-}" ]; then
    export RAY_AUTH_MODE=token
  else
    echo "RAY_AUTH_TOKEN is not set: whoever reaches $MASTER_ADDR:$ray_port can run code on these nodes" >&2
  fi
  if [ "$NODE_RANK" -ne 0 ]; then
    until answers; do sleep 2; done
    exec "$python" -m ray.scripts.scripts start --address="$MASTER_ADDR:$ray_port" --num-gpus="$GPUS_PER_NODE" --block
  fi
  "$python" -m ray.scripts.scripts start --head --node-ip-address="$MASTER_ADDR" --port="$ray_port" \
    --num-gpus="$GPUS_PER_NODE" --include-dashboard=false --disable-usage-stats --block >&2 &
  local head=$!
  trap "kill $head 2>/dev/null; wait $head 2>/dev/null" EXIT
  until answers; do
    if ! kill -0 "$head" 2>/dev/null; then
      echo "the head of the Ray cluster did not start on $MASTER_ADDR:$ray_port (is MASTER_ADDR this node's address?)" >&2
      exit 1
    fi
    sleep 2
  done
  export RAY_ADDRESS=$MASTER_ADDR:$ray_port
  "$python" -c "
import ray, time
ray.init(log_to_driver=False)
while sum(node['Alive'] for node in ray.nodes()) < $NNODES:
    time.sleep(2)
" >&2
}

# train KEY=VALUE... : run GRPO with the template and these overrides, keep a log, leave with the run's exit status.
train() {
  local command=("$python" chatlearn/entrypoint.py grpo --config-file template/grpo_fsdp.yaml "$@")
  case " $* " in
    *" --dry-run "* | *" --help "*) exec "${command[@]}" ;;
  esac
  if [ "$NNODES" -gt 1 ]; then open_cluster; fi
  # tee must outlive Ctrl-C, or the run could not say that it saves.
  "${command[@]}" 2>&1 | tee -i "log_${exp_name}.log"
  exit "${PIPESTATUS[0]}"
}
