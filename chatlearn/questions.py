"""What a run asks: prompts, read and tokenised before anything starts, for bad data should cost nobody a cluster."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from chatlearn.config.schema import GrpoConfig
from chatlearn.data.prompts import ChatFormat, PromptSet, read_prompts
from chatlearn.errors import ConfigError
from chatlearn.models.pretrained import read_tokenizer
from chatlearn.observability.describe import grades
from chatlearn.reward.grade import require_rewards


@dataclass(frozen=True)
class Questions:
    """Prompts to train on, and prompts to evaluate with (none where nothing is evaluated)."""

    training: PromptSet
    evaluation: PromptSet | None

    @property
    def sources(self) -> set[str]:
        """Every data source that will have to be graded."""
        evaluation = self.evaluation.prompts if self.evaluation else ()
        return {prompt.source for prompt in (*self.training.prompts, *evaluation)}


def read_questions(config: GrpoConfig) -> Questions:
    """Read the data with the model's own tokenizer; every data source must have a reward function."""
    policy, trainer = config.models.policy, config.models.policy_trainer
    tokenizer = read_tokenizer(
        "models.policy_trainer.load", Path(trainer.load), trust_remote_code=trainer.trust_remote_code
    )
    chat = ChatFormat(tokenizer, policy.enable_thinking)
    limit = policy.max_prompt_tokens_length
    evaluation = config.runtime_args.eval_data_path
    questions = Questions(
        training=read_prompts(config.runtime_args.data_path, chat, limit),
        evaluation=None if evaluation is None else read_prompts(evaluation, chat, limit),
    )
    require_rewards(questions.sources, config.models.reward.function)
    _require_measured(config, questions)
    return questions


def _require_measured(config: GrpoConfig, questions: Questions) -> None:
    """The number that decides which checkpoint is the best must be one that an evaluation will have."""
    asked, prompts = config.runtime_args.keep_best, questions.evaluation.prompts if questions.evaluation else ()
    num_samples = config.runtime_args.eval_samples_per_prompt
    names = [name for source in sorted({prompt.source for prompt in prompts}) for name in grades(source, num_samples)]
    if asked is not None and asked not in names:
        raise ConfigError(
            f"runtime_args.keep_best={asked} is no number that this run's evaluation has; use one of {', '.join(names)}"
        )
