#!/usr/bin/env bash
exec bash "$(dirname "${BASH_SOURCE[0]}")/../train_fsdp_vllm_qwen3_8b_grpo.sh" "$@"
