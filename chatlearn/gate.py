"""The numerics gate of a run: is what the engine samples what the trainer learns from? Asked at every start."""

from __future__ import annotations

import json
import random
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Final

from chatlearn import device
from chatlearn.checkpoint.architecture import parameter_shapes
from chatlearn.checkpoint.run_state import RunState
from chatlearn.device import DtypeName
from chatlearn.errors import RunError
from chatlearn.models.family import family_of
from chatlearn.models.naming import EMBEDDING
from chatlearn.numerics.bench import Bench, Facts
from chatlearn.numerics.change import Change, Distribution
from chatlearn.numerics.diagnosis import diagnose
from chatlearn.observability.journal import Page
from chatlearn.records import FloatStream, Prompt, Rollout, Sample
from chatlearn.rollout.engine import SamplingPlan
from chatlearn.team import Team

# Enough for every replica, and few enough to be scored again some hundred times when something is wrong.
NUM_ANSWERS = 64
NUM_PROMPTS_AGAIN = 8

# Mean gap in nats. float32: the CPU's engines are 1e-7 to 1e-6 from the trainer, mixtures of experts included.
# bfloat16: two right implementations round apart by 0.005 on a dense model and 0.02 on a mixture, whose routers flip;
# a wrong temperature, template or weight shifts the mean by 0.05 and more.
TOLERANCES: Final[dict[DtypeName, float]] = {"float32": 1e-5, "bfloat16": 0.03}

AskAgain = Callable[[Sequence[Prompt]], Sequence[Sample]]


def check_numerics(
    team: Team, page: Page, state: RunState, rollouts: Sequence[Rollout], samples: Sequence[Sample], ask_again: AskAgain
) -> None:
    """Compare engine and trainer on some of the answers, and name the cause where they disagree.

    Raises ``RunError`` then, before anything is learned, unless the user wants a warning only.
    """
    answers = [sample for sample in samples if sample.loss_mask.any()]
    if team.args.numerics_gate == "off" or not answers:
        return
    if team.asking.plan.reshapes:
        page.say("engine and trainer are not compared: the run samples from another distribution than it trains")
        return
    if state.open_groups:  # Answers of an earlier life of the run are from other weights than today's.
        answers, rollouts = ask_again([rollout.prompt for rollout in rollouts][:NUM_PROMPTS_AGAIN]), ()
    chosen = random.Random(state.episode).sample(answers, min(NUM_ANSWERS, len(answers)))

    def score(asked: Sequence[Sample], change: Change) -> list[FloatStream]:
        with team.trainer.weights_resident():
            return team.trainer.changed_logprobs(asked, change)

    def again() -> Sequence[Sample]:
        team.trainer.forget_changes()  # Engines that share the device need the memory.
        prompts = [rollout.prompt for rollout in rollouts]
        return ask_again(prompts[: max(NUM_PROMPTS_AGAIN, team.layout.policy.num_replicas)])

    verdict = diagnose(Bench(facts_of(team, state, rollouts), chosen, score, again))
    team.trainer.forget_changes()
    if not verdict.agrees and team.args.numerics_gate == "stop":
        raise RunError(f"{verdict}\nnothing was learned; runtime_args.numerics_gate=warn goes on nevertheless")
    page.say(str(verdict))


def facts_of(team: Team, state: RunState, rollouts: Sequence[Rollout]) -> Facts:
    """What is known of both sides before anything is compared."""
    model_dir, dtype = Path(team.layout.trainer.load), device.compute_dtype(team.layout.device_kind)
    shapes = parameter_shapes(model_dir)
    return Facts(
        asked=distribution_of(team.asking.plan),
        dtype=dtype,
        tolerance=TOLERANCES[dtype],
        vocabulary=shapes[EMBEDDING][0],
        known_distributions=(
            ("the plan of evaluation (models.policy.eval_*)", distribution_of(team.evaluation_asking.plan)),
            *generation_distributions(model_dir / "generation_config.json"),
        ),
        special_tokens=special_tokens(model_dir / "tokenizer.json"),
        parameters=tuple(shapes),
        other_versions=other_versions(rollouts, state.policy_version),
        has_moved=state.train_iteration > 0,
        is_mixture=family_of(model_dir).experts is not None,
        replays_routes=team.replays_routes,
        shares_sequences=team.layout.trainer.sequence_parallel_size > 1,
    )


def distribution_of(plan: SamplingPlan) -> Distribution:
    """What a plan samples from; a greedy one reports the numbers of temperature 1."""
    return Distribution(plan.temperature or 1.0, plan.top_p, plan.top_k, plan.min_p)


def generation_distributions(file: Path) -> list[tuple[str, Distribution]]:
    """What the model's directory proposes to sample from, which engines may take for an order."""
    written: dict[str, Any] = json.loads(file.read_text()) if file.is_file() else {}
    nothing: dict[str, Any] = {"temperature": 1.0, "top_p": 1.0, "top_k": 0, "min_p": 0.0}
    asked = {key: written[key] for key in nothing if written.get(key) is not None}
    return [(str(file), Distribution(**(nothing | asked)))] if asked else []


def special_tokens(file: Path) -> tuple[int, ...]:
    """The numbers of the tokens that a template or a tokenizer puts in by itself."""
    written: dict[str, Any] = json.loads(file.read_text()) if file.is_file() else {}
    return tuple(token["id"] for token in written.get("added_tokens", []) if token["special"])


def other_versions(rollouts: Sequence[Rollout], expected: int) -> str:
    """What the engines themselves say of tokens that are not from the weights that were published last."""
    counts: Counter[int] = Counter()
    for rollout in rollouts:
        for completion in rollout.completions:
            counts.update({run.version: run.num_tokens for run in completion.versions})
    strange = {version: count for version, count in sorted(counts.items()) if version != expected}
    if not strange:
        return ""
    told = ", ".join(f"{count} tokens from version {version}" for version, count in strange.items())
    return f"the engines say that they sampled {told}; the trainer has version {expected}"
