"""What earlier runs of a user have left, on the quickstart's configuration with a model and data of their own."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path

from chatlearn.beginning import FRESH, beginning, open_journal, state_found
from chatlearn.checkpoint.durable import write_text
from chatlearn.checkpoint.layout import begin, publish
from chatlearn.checkpoint.manifest import Manifest, Provenance
from chatlearn.checkpoint.run_state import RunState, save_config, save_run_state
from chatlearn.config.environment import Environment
from chatlearn.config.layout import Layout, layout_of
from chatlearn.config.read import read_config
from chatlearn.config.schema import GrpoConfig
from chatlearn.config.text import resolved_text
from chatlearn.provenance import provenance_of
from chatlearn.questions import read_questions

ROOT = Path(__file__).resolve().parents[2]


def record(answer: int) -> str:
    question = {"role": "user", "content": f"What is 1 + {answer - 1}?"}
    truth = {"style": "rule", "ground_truth": str(answer)}
    return json.dumps({"data_source": "openai/gsm8k", "prompt": [question], "reward_model": truth}) + "\n"


class Runs:
    """A user's commands on the quickstart's configuration, with a model and data of their own."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        shutil.copytree(ROOT / "embedded" / "tiny_qwen3", folder / "model")
        (folder / "train.json").write_text(record(2) + record(3))

    @property
    def root(self) -> Path:
        return self.folder / "output" / "save_model" / "policy_trainer"

    def words(self, *overrides: str) -> list[str]:
        return [
            f"runtime_args.output_dir={self.folder / 'output'}",
            f"models.policy_trainer.load={self.folder / 'model'}",
            f"runtime_args.data_path={self.folder / 'train.json'}",
            f"runtime_args.eval_data_path={self.folder / 'train.json'}",
            *overrides,
        ]

    def config(self, *overrides: str) -> tuple[GrpoConfig, Layout]:
        config = read_config(ROOT / "template" / "quickstart.yaml", self.words(*overrides))
        return config, layout_of(config, Environment.read())

    def save(self, iteration: int, *overrides: str, state: RunState = FRESH, file: str | None = None) -> Path:
        """What a run with these overrides leaves after as many steps; ``file`` names one more, in a folder."""
        config, layout = self.config(*overrides)
        staging = begin(self.root, iteration)
        save_run_state(staging, replace(state, episode=iteration, train_iteration=iteration))
        save_config(staging, resolved_text(config))
        if file is not None:
            write_text(staging / file, "weights")
        provenance = self.provenance(config, layout)
        return publish(
            self.root, Manifest(iteration, iteration, "base", "A", groupgemm=False, num_ranks=2, provenance=provenance)
        )

    def provenance(self, config: GrpoConfig, layout: Layout) -> Provenance:
        return provenance_of(layout, read_questions(config).training)

    def begin(self, *overrides: str) -> RunState:
        config, layout = self.config(*overrides)
        return beginning(config, layout, self.provenance(config, layout))

    def start(self, *overrides: str) -> RunState:
        """As far as the journal: from there on the run writes."""
        config, layout = self.config(*overrides)
        state = beginning(config, layout, self.provenance(config, layout))
        with open_journal(config, layout, state):
            return state

    def present(self) -> list[str]:
        """The folders of checkpoints, whatever they are called."""
        return sorted((path.name for path in self.root.iterdir() if path.is_dir()), key=lambda name: (len(name), name))

    def rehearse(self, *overrides: str) -> RunState:
        config, layout = self.config(*overrides)
        return state_found(config, layout, self.provenance(config, layout))
