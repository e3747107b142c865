"""The least that a configuration says."""

from __future__ import annotations

MINIMAL: dict[str, object] = {
    "runtime_args.output_dir": "output",
    "runtime_args.data_path": "train.json",
    "runtime_args.num_episode": 2,
    "runtime_args.sample_per_episode": 64,
    "runtime_args.train_global_batch_size": 64,
    "runtime_args.save_episode_interval": 1,
    "models.policy_trainer.num_gpu": 2,
    "models.policy_trainer.load": "model",
    "models.policy.num_gpu": 2,
}
