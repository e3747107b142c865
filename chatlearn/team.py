"""Who takes part in a run: prompts, engines, trainer, reference, graders, and what they are told."""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

from chatlearn import specs
from chatlearn.algorithm.advantage import ADVANTAGES, AdvantageFn
from chatlearn.checkpoint.manifest import Provenance
from chatlearn.checkpoint.run_state import RunState
from chatlearn.cluster.archive import Archive
from chatlearn.cluster.cluster import Cluster, ClusterSpec
from chatlearn.cluster.crew import open_crew
from chatlearn.cluster.groups import ReferenceGroup, TrainerGroup
from chatlearn.cluster.lookout import Station, looking_out
from chatlearn.cluster.pipeline import Asking, Pipeline
from chatlearn.cluster.placement import Demand
from chatlearn.cluster.policy_group import PolicyGroup
from chatlearn.cluster.reward_group import RewardGroup
from chatlearn.config.environment import Environment
from chatlearn.config.layout import Layout
from chatlearn.config.resolve import resolve
from chatlearn.config.schema import GrpoConfig, RuntimeArgs
from chatlearn.config.text import resolved_text
from chatlearn.data.stream import PromptStream, StreamPosition
from chatlearn.disk_room import size_of_checkpoint
from chatlearn.models.lora import LoraSpec
from chatlearn.observability.journal import Journal
from chatlearn.provenance import provenance_of
from chatlearn.questions import Questions
from chatlearn.recipe import lora_spec
from chatlearn.records import Prompt, Sample
from chatlearn.reward.gold_check import gold_check
from chatlearn.reward.grade import gold_prompts
from chatlearn.rollout.dispatch import SamplingPurpose, engine_seed
from chatlearn.rollout.partial import Rounds

GOLD_LEDGER = "gold_checks.json"
STUCK_REPORT = "stuck_report.txt"


@dataclass(frozen=True)
class Team:
    """Everything the loop speaks to. ``reference`` is absent when ``kl_coef`` is zero.

    ``first_episode`` is the first that this process runs, of a new run or after a resume. ``rounds`` are those of
    partial rollout, where that is asked for.
    """

    args: RuntimeArgs
    layout: Layout
    first_episode: int
    prompts: PromptStream
    evaluation_prompts: Sequence[Prompt]
    pipeline: Pipeline
    policy: PolicyGroup
    trainer: TrainerGroup
    reference: ReferenceGroup | None
    graders: RewardGroup
    archive: Archive
    advantage: AdvantageFn
    asking: Asking
    evaluation_asking: Asking
    rounds: Rounds | None
    saves_hugging_face: bool
    replays_routes: bool
    config_text: str
    lora: LoraSpec | None
    provenance: Provenance
    checkpoint_bytes: int

    def seeds(self, episode: int, purpose: SamplingPurpose) -> list[int]:
        """One seed for each engine: training and evaluation never share a random stream."""
        replicas = range(self.layout.policy.num_replicas)
        return [engine_seed(self.args.seed, episode, replica, purpose) for replica in replicas]

    def batches(self, samples: Sequence[Sample], episode: int) -> Iterator[list[Sample]]:
        """The episode's samples, one list for every optimizer step."""
        return self.layout.batches(samples, seed=self.args.seed + episode)

    def care_numbers(self) -> dict[str, float]:
        """How long the engines were busy and what was saved since this was asked before; processes replaced so far."""
        return self.archive.take_numbers() | {
            "rollout/engine_busy_s": self.policy.take_busy_s(),
            "rollout/replaced_engines": float(self.policy.num_replaced),
            "rule_reward/replaced_graders": float(self.graders.num_replaced),
        }


@contextmanager
def gather(
    config: GrpoConfig,
    layout: Layout,
    questions: Questions,
    state: RunState,
    journal: Journal,
    heartbeat: Callable[[], None],
) -> Generator[Team]:
    """Open the cluster and start everybody; inside, the team is ready, and after it nobody is left."""
    journal.say(questions.training.summary)
    policy = config.models.policy
    address = Environment.read().ray_address
    spec = ClusterSpec(
        address=address,
        demand=Demand(layout.arrangement.blocks, layout.device_kind == "cuda", config.models.reward.num_cpu),
        output_dir=layout.folders.output,
    )
    with Cluster.open(spec, heartbeat) as cluster, looking_out(_station(cluster, config, journal)):
        journal.say("starting engines and trainer")
        crew = open_crew(cluster, specs.blueprint(config, layout, one_host=address is None), journal.say)
        check = gold_check(
            gold_prompts(questions.training.prompts, config.models.reward.function),
            crew.graders.grade_gold,
            layout.folders.output / GOLD_LEDGER,
            questions.training.content_hash,
            config.runtime_args.seed,
        )
        journal.say("; ".join([check.summary, *check.examples]))
        position = StreamPosition(state.epoch, state.offset, state.deferred)
        yield Team(
            args=config.runtime_args,
            layout=layout,
            first_episode=state.episode + 1,
            prompts=PromptStream(
                questions.training.prompts, config.runtime_args.seed, config.runtime_args.data_shuffle, position
            ),
            evaluation_prompts=questions.evaluation.prompts if questions.evaluation else (),
            pipeline=crew.pipeline,
            policy=crew.policy,
            trainer=crew.trainer,
            reference=crew.reference,
            graders=crew.graders,
            archive=crew.archive,
            advantage=resolve(ADVANTAGES, config.runtime_args.advantage, "runtime_args.advantage"),
            asking=Asking(policy.num_inference_per_prompt, specs.sampling_plan(config)),
            evaluation_asking=Asking(config.runtime_args.eval_samples_per_prompt, specs.evaluation_plan(config)),
            rounds=specs.partial_rounds(config),
            saves_hugging_face=config.models.policy_trainer.save_hf,
            replays_routes=config.models.policy_trainer.router_replay is True,
            config_text=resolved_text(config),
            lora=lora_spec(config),
            provenance=provenance_of(layout, questions.training),
            checkpoint_bytes=size_of_checkpoint(config, layout).total,
        )


def _station(cluster: Cluster, config: GrpoConfig, journal: Journal) -> Station:
    """What the lookout is told."""
    report_path = cluster.spec.output_dir / STUCK_REPORT
    return Station(config.runtime_args.progress_timeout_s, cluster.members, report_path, journal.say)
