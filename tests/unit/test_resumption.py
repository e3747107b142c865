"""Every key of the schema has a verdict on what its change does to a resume, and every change is seen."""

from __future__ import annotations

import re
from collections import Counter
from pathlib import Path

import pytest
from minimal import MINIMAL
from omegaconf import OmegaConf

from chatlearn.config.read import config_of
from chatlearn.config.resumption import VERDICT_OF, VERDICTS, differences
from chatlearn.config.sections import SCHEMA_KEYS
from chatlearn.config.text import resolved_text
from chatlearn.config.tree import flatten, nest

HARMFUL = {
    "runtime_args.data_path",
    "runtime_args.seed",
    "runtime_args.data_shuffle",
    "runtime_args.sample_per_episode",
    "runtime_args.num_training_epoch",
    "runtime_args.train_global_batch_size",
    "models.policy.num_inference_per_prompt",
    "models.policy.max_prompt_tokens_length",
    "models.policy.enable_thinking",
    "models.policy_trainer.load",
    "models.policy_trainer.lora.rank",
    "models.policy_trainer.lora.alpha",
}
# What decides which answers an engine gives, how many tokens they may have, and what they are worth.
ANSWERS = {
    "runtime_args.schedule",
    "runtime_args.over_sampling_ratio",
    "runtime_args.use_partial_rollout",
    "runtime_args.rollout_backend",
    "models.partial_rollout_manager.max_rollout_round",
    "models.partial_rollout_manager.rollout_ratio",
    "models.policy.max_response_tokens_length",
    "models.policy.temperature",
    "models.policy.top_p",
    "models.policy.top_k",
    "models.policy.min_p",
    "models.policy.presence_penalty",
    "models.policy.frequency_penalty",
    "models.policy.repetition_penalty",
    "models.policy_trainer.router_replay",
    "models.reward.function",
}


def test_every_key_of_the_schema_has_one_verdict_with_a_reason() -> None:
    assert sorted(SCHEMA_KEYS) == sorted(VERDICT_OF)
    assert [key for key, times in Counter(verdict.key for verdict in VERDICTS).items() if times > 1] == []
    assert [verdict.key for verdict in VERDICTS if len(verdict.reason) < 15] == []
    assert {verdict.key for verdict in VERDICTS if verdict.kind in ("harmful", "data")} == HARMFUL
    assert {verdict.key for verdict in VERDICTS if verdict.kind == "answers"} == ANSWERS


@pytest.mark.parametrize(
    ("heading", "keys"), [("why", HARMFUL), ("why nobody goes on with answers under way", ANSWERS)]
)
def test_the_page_names_every_harmful_key_and_no_other(heading: str, keys: set[str]) -> None:
    page = (Path(__file__).parents[2] / "docs" / "checkpoints.md").read_text()
    (table,) = re.findall(rf"^\| key \| {heading} \|\n\|[- |]+\|\n((?:\|.*\n)+)", page, re.MULTILINE)
    assert set(re.findall(r"`([\w.]+)`", table)) == keys


def other(value: object) -> object:
    """Another value of the same kind."""
    match value:
        case bool():
            return not value
        case int():
            return value + 1
        case float():
            return value / 2 + 0.125
        case list():
            return [*value, "more"]
        case _:
            return f"{value}-other"


def test_a_change_of_any_key_is_seen_and_of_no_other() -> None:
    config = config_of(MINIMAL, {})
    leaves = flatten(config.model_dump(mode="json"))
    assert set(leaves) == set(SCHEMA_KEYS)
    for key, value in leaves.items():
        saved = OmegaConf.to_yaml(OmegaConf.create(nest(leaves | {key: other(value)})))
        found = [difference.verdict.key for difference in differences(saved, config)]
        assert found == ([] if VERDICT_OF[key].kind == "start" else [key])


def test_what_is_written_otherwise_and_means_the_same_is_no_difference() -> None:
    name = "runtime_args.data_checkpoint_path"
    config = config_of({**MINIMAL, name: "${runtime_args.output_dir}/data"}, {})
    assert "${runtime_args.output_dir}" in resolved_text(config)
    assert differences(resolved_text(config), config_of({**MINIMAL, name: "output/data"}, {})) == ()
    moved = config_of({**MINIMAL, name: "${runtime_args.output_dir}/data"}, {"runtime_args.output_dir": "moved"})
    (output, below) = differences(resolved_text(config), moved)
    assert (output.verdict.key, output.saved, output.now) == ("runtime_args.output_dir", "output", "moved")
    assert (below.saved, below.now) == ("output/data", "moved/data")


def test_a_key_that_was_not_saved_meant_its_default_and_one_that_is_gone_is_left_out() -> None:
    saved = "runtime_args: {seed: 7, gone: 3}\n"
    (found,) = [one for one in differences(saved, config_of(MINIMAL, {})) if one.verdict.key == "runtime_args.seed"]
    assert (found.saved, found.now) == ("7", "1234")
    assert "runtime_args.keep_checkpoints" not in {
        one.verdict.key for one in differences(saved, config_of(MINIMAL, {}))
    }
