"""ChatLearn: reinforcement learning for language models with GRPO, vLLM, FSDP2 and Ray. Imports nothing."""

__version__ = "2.0.0.dev0"
