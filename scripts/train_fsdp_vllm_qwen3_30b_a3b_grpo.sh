#!/usr/bin/env bash
# Qwen3-30B-A3B on MATH-lighteval, on one node with 8 GPUs of 140 GB.
# Further arguments (key=value, --dry-run) are passed on and win over the values below.
source "$(dirname "${BASH_SOURCE[0]}")/base_env.sh"

exp_name=qwen3-grpo-30b-a3b
train \
  runtime_args.device=cuda \
  runtime_args.exp_name="$exp_name" \
  runtime_args.data_path=dataset/MATH-lighteval/train.json \
  runtime_args.eval_data_path=dataset/MATH-lighteval/test.json \
  runtime_args.output_dir="output/$exp_name" \
  runtime_args.num_episode=200 \
  runtime_args.sample_per_episode=512 \
  runtime_args.train_global_batch_size=512 \
  runtime_args.train_micro_batch_size=64 \
  runtime_args.save_episode_interval=5 \
  runtime_args.eval_episode_interval=5 \
  runtime_args.enable_eval_before_training=True \
  runtime_args.log_args_dict.enable_wandb=False \
  runtime_args.log_args_dict.wandb_project=your_wandb_project \
  models.policy_trainer.load=pretrained_models/Qwen3-30B-A3B/ \
  models.policy_trainer.num_gpu="$num_device" \
  models.policy_trainer.ulysses_sequence_parallel_size=1 \
  models.policy_trainer.packing=True \
  models.policy_trainer.max_token_in_packing=20000 \
  models.policy_trainer.meta_init=True \
  models.policy_trainer.groupgemm=True \
  models.policy_trainer.generation_batch_size=64 \
  models.policy_trainer.optimizer.lr=2e-6 \
  models.policy_trainer.pos_clip_ratio=0.2 \
  models.policy_trainer.neg_clip_ratio=0.2 \
  models.policy_trainer.save_hf=True \
  models.ref_policy.generation_batch_size=64 \
  models.policy.generation_batch_size=128 \
  models.policy.enforce_eager=True \
  models.policy.tensor_model_parallel_size=2 \
  models.policy.max_prompt_tokens_length=1024 \
  models.policy.max_response_tokens_length=2048 \
  models.policy.num_inference_per_prompt=32 \
  models.policy.gpu_memory_utilization=0.85 \
  models.policy.enable_thinking=False \
  "$@"
