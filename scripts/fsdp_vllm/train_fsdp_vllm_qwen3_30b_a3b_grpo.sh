#!/usr/bin/env bash
exec bash "$(dirname "${BASH_SOURCE[0]}")/../train_fsdp_vllm_qwen3_30b_a3b_grpo.sh" "$@"
