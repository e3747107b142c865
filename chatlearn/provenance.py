"""Whether what is to be run now is what was being run when a checkpoint was saved."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Final

from chatlearn.checkpoint.adapters import base_digest
from chatlearn.checkpoint.manifest import Provenance
from chatlearn.checkpoint.run_state import load_config
from chatlearn.checkpoint.selection import Saved
from chatlearn.config.layout import Layout
from chatlearn.config.resumption import VERDICT_OF, Difference, Verdict, differences
from chatlearn.config.schema import GrpoConfig
from chatlearn.data.prompts import PromptSet

DATA: Final = "runtime_args.data_path"
MODEL: Final = "models.policy_trainer.load"
BY_CONTENT: Final = (DATA, MODEL)
# Where one of these differs, it is no wonder that the prompts do.
PROMPTS_FOLLOW_FROM: Final = {DATA, MODEL, "models.policy.max_prompt_tokens_length", "models.policy.enable_thinking"}
OTHER_PROMPTS: Final = Verdict(
    MODEL,
    "data",
    "its tokenizer or chat template is not that of the checkpoint and makes other prompts of the same data, so that "
    "the position in the data would mean other prompts",
)


@dataclass(frozen=True)
class Comparison:
    """What differs: ``harmful`` differences are in the way of a resume, ``harmless`` ones are only told."""

    harmful: tuple[Difference, ...]
    harmless: tuple[Difference, ...]

    @property
    def moves_data(self) -> bool:
        """Whether the saved position in the data means another place now, or none."""
        return any(difference.verdict.kind == "data" for difference in self.harmful)

    @property
    def asks_anew(self) -> bool:
        """Whether answers under way were asked for in another way than now, so that nobody can go on with them."""
        return bool(self.harmful) or any(difference.verdict.kind == "answers" for difference in self.harmless)


def provenance_of(layout: Layout, training: PromptSet) -> Provenance:
    """What the run would be made from; reads of the model only a little."""
    return Provenance(training.content_hash, base_digest(Path(layout.trainer.load)), training.tokens_digest)


def compare(saved: Saved, config: GrpoConfig, provenance: Provenance) -> Comparison | None:
    """Compare key by key; data and model count by content, wherever they lie. ``None`` where nothing was kept."""
    text = load_config(saved.folder)
    if text is None:
        return None
    written = {difference.verdict.key: difference for difference in differences(text, config)}
    contents = _changed_contents(saved, config, provenance)
    harmful = {key: one for key, one in written.items() if one.verdict.kind in ("harmful", "data")}
    if saved.manifest.provenance is not None:  # then contents are known, and a path is only a path
        harmful = {key: one for key, one in harmful.items() if key not in BY_CONTENT} | {
            key: written.get(key, Difference(VERDICT_OF[key], now, now)) for key, now in contents.items()
        }
        if _makes_other_prompts(saved.manifest.provenance, provenance) and not PROMPTS_FOLLOW_FROM & harmful.keys():
            now = config.models.policy_trainer.load
            harmful[MODEL] = replace(written.get(MODEL, Difference(OTHER_PROMPTS, now, now)), verdict=OTHER_PROMPTS)
    harmless = tuple(one for key, one in written.items() if key not in harmful)
    return Comparison(tuple(harmful.values()), harmless)


def _makes_other_prompts(before: Provenance, now: Provenance) -> bool:
    return before.prompts_digest is not None and before.prompts_digest != now.prompts_digest


def _changed_contents(saved: Saved, config: GrpoConfig, provenance: Provenance) -> dict[str, str]:
    """The keys whose paths lead to other content than that of the saved run, with the paths."""
    before = saved.manifest.provenance
    if before is None:
        return {}
    pairs = (
        (DATA, before.data_hash, provenance.data_hash, config.runtime_args.data_path),
        (MODEL, before.base_digest, provenance.base_digest, config.models.policy_trainer.load),
    )
    return {key: path for key, was, now, path in pairs if was != now}


def problems_of(saved: Saved, comparison: Comparison) -> list[str]:
    """One message for every difference that is in the way."""
    return [
        f"{_told(saved, one)}: {one.verdict.reason}; set it back, choose another output_dir, or go on all the same "
        "with runtime_args.resume_anyway=True"
        for one in comparison.harmful
    ]


def remarks_of(saved: Saved, comparison: Comparison) -> list[str]:
    """What the person who resumes should see: what is in the way and was accepted, and everything else that differs."""
    lines = [f"going on although {_told(saved, one)}: {one.verdict.reason}" for one in comparison.harmful]
    if comparison.moves_data:
        epoch = saved.state.epoch + 1
        lines.append(f"the saved position lies in another order of prompts: pass {epoch} over the data begins anew")
    elif comparison.asks_anew and saved.state.open_groups:
        lines.append(
            f"answers that were under way to {len(saved.state.open_groups)} prompts are given up, for they were asked "
            "for in another way; prompts that nothing was learned from yet are asked anew"
        )
    if saved.manifest.provenance is None or saved.manifest.provenance.prompts_digest is None:
        lines.append(
            f"checkpoint {saved.folder.name} does not say which prompts its data made (an older version saved it): "
            "tokenizer and chat template are not compared"
        )
    if comparison.harmless:
        lines.append(f"other than in the run that saved checkpoint {saved.folder.name}:")
        lines += [f"  {one.verdict.key}: {one.saved} -> {one.now}" for one in comparison.harmless]
    return lines


def _told(saved: Saved, difference: Difference) -> str:
    key, now = difference.verdict.key, difference.now
    if key in BY_CONTENT and saved.manifest.provenance is not None:
        where = f"{difference.saved} did" if difference.saved != now else "it did"
        return f"{key}={now} does not hold what {where} when checkpoint {saved.folder.name} was saved"
    return f"{key}={now} was {difference.saved} when checkpoint {saved.folder.name} was saved"
