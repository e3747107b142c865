#!/usr/bin/env bash
# Installs ChatLearn, then runs the whole job on the embedded model: prepare data, train with evaluation before and
# after, convert the last checkpoint to Hugging Face format. Needs Python 3.11 or newer and a package index; no GPU.
#
#   bash scripts/quickstart.sh [key=value ...]
#
# Extra arguments override keys of template/quickstart.yaml, for example runtime_args.num_episode=30.
# What scripts/install.sh reads from the environment counts here too.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

readonly PYTHON=.venv/bin/python
readonly MODEL=embedded/tiny_qwen3
readonly DATA=dataset/arithmetic

main() {
    check_arguments "$@"
    bash scripts/install.sh auto
    local out
    out=$(output_dir "$@")

    step "preparing arithmetic problems in $DATA"
    "$PYTHON" chatlearn/data/data_preprocess/arithmetic.py --local_dir "$DATA"

    step "training; everything is written to $out"
    "$PYTHON" chatlearn/entrypoint.py grpo --config-file template/quickstart.yaml runtime_args.output_dir="$out" "$@"

    convert_last "$out"
    tell_where "$out"
}

check_arguments() {
    local argument
    for argument in "$@"; do
        [[ $argument == *=* && $argument != -* ]] || {
            echo "quickstart: '$argument' is not key=value; usage: bash scripts/quickstart.sh [key=value ...]" >&2
            exit 2
        }
    done
}

# The folder that the user names, else the first free number.
output_dir() {
    local argument named="" number=1
    for argument in "$@"; do
        [[ $argument != runtime_args.output_dir=* ]] || named=${argument#*=}
    done
    while [[ -e output/quickstart-$number ]]; do ((number += 1)); done
    echo "${named:-output/quickstart-$number}"
}

step() { printf '\n== %s\n' "$*"; }

convert_last() {
    local last
    last=$(last_checkpoint "$1")
    if [[ -z $last ]]; then
        step "no checkpoint to convert in $1/save_model/policy_trainer"
        return
    fi
    step "converting checkpoint $last to Hugging Face format"
    "$PYTHON" chatlearn/offline_ckpt_converter.py --hf_dir "$MODEL" --ckpt_dir "$1/save_model/policy_trainer" \
        --save_dir "$1/save_model/huggingface" --iter "$last" --groupgemm 0
}

# Checkpoints lie in folders named by their number.
last_checkpoint() {
    local folder
    for folder in "$1"/save_model/policy_trainer/*/; do
        basename "$folder"
    done | { grep -E '^[0-9]+$' || true; } | sort -n | tail -n 1
}

tell_where() {
    step "done"
    cat <<EOF
  $1/metrics.jsonl               every number of every episode
  $1/rollouts/                   every prompt, answer and reward
  $1/save_model/policy_trainer/  sharded checkpoints
  $1/save_model/huggingface/     the trained model, for transformers or vLLM
  $1/config.yaml                 the resolved configuration, itself usable as --config-file
EOF
}

main "$@"
