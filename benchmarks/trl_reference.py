"""The loss and the gradients that another project computes for a batch: python benchmarks/trl_reference.py.

It asks TRL's own ``GRPOTrainer`` for the loss of a fixed batch on the embedded models, lets torch differentiate it,
and writes batch, loss and gradients to ``tests/references/trl``; a test holds our trainer to those figures. TRL need
not stay: ``pip install --no-deps --target FOLDER trl==1.16.0``, then run this with ``PYTHONPATH=FOLDER``.

What both call by other names: ``dapo`` divides by the loss tokens of the whole batch, as we do. ``delta`` is our dual
clip: both bound the ratio of tokens with a negative advantage. The sequence-level ratio has the value and the gradient
of our GSPO as long as the advantage is one number per sequence. By default TRL weighs the KL estimate of each token
with the token's ratio, which is an objective of its own (arXiv:2512.02556); it is switched off here. What cannot be
made equal are bounds that only we have: on a log-ratio beyond ``max_log_ratio`` and on a KL estimate beyond 10. The
batch stays far from both, and from the edges of clipping, where a rounding error would decide between a gradient and
none.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import tempfile
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from importlib import import_module, metadata
from pathlib import Path
from typing import Any, Final

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel
from transformers.utils import logging

from chatlearn.algorithm.advantage import group_normalised
from chatlearn.algorithm.loss import ClipRange

ROOT: Final = Path(__file__).parents[1]
FOLDER: Final = ROOT / "tests" / "references" / "trl"
CLIP: Final = ClipRange(low=0.2, high=0.28, max_log_ratio=10.0, dual=3.0)
NUM_GROUPS = 2
REWARDS: Final = (1.0, 0.7, 0.2, -0.3)  # of a group; none is the mean, so each answer has an advantage
GROUP_SIZE = len(REWARDS)
VOCABULARY = 320  # The ids beyond are special tokens.
# Ratios of new to old: within the clip range and beyond either edge of it, none closer than 0.1 to an edge.
RATIOS: Final = (0.6, 0.92, 1.0, 1.1, 1.5)
RATIO_BEYOND_DUAL: Final = 4.0
NUM_PROJECTIONS = 8
SAMPLING_TEMPERATURE = 1.5


@dataclass(frozen=True)
class Case:
    """What is asked: an embedded model and an objective."""

    model: str
    loss: str
    kl_coef: float
    entropy_coef: float
    temperature: float
    seed: int

    @property
    def name(self) -> str:
        """What the case's file is called."""
        return f"{self.model}-{self.loss}-kl{self.kl_coef:g}-t{self.temperature:g}"


# On the seeds: in float32 every implementation, transformers' own too, is 3e-6 to 1.3e-5 from the exact gradients of
# these trained models, depending on how much of them cancels. These batches are among the better half of ten each.
CASES: Final = (
    Case("tiny_qwen3", "grpo", kl_coef=0.0, entropy_coef=0.0, temperature=1.0, seed=4),
    Case("tiny_qwen3", "grpo", kl_coef=0.1, entropy_coef=0.02, temperature=1.3, seed=3),
    Case("tiny_qwen3", "gspo", kl_coef=0.1, entropy_coef=0.0, temperature=0.8, seed=9),
    Case("tiny_qwen3_moe", "grpo", kl_coef=0.1, entropy_coef=0.0, temperature=1.3, seed=1),
    Case("tiny_qwen3_moe", "gspo", kl_coef=0.0, entropy_coef=0.02, temperature=1.0, seed=2),
)


@dataclass(frozen=True)
class Answer:
    """One sample; ``old_logprobs`` and ``ref_logprobs`` have one number for each token after the prompt."""

    token_ids: list[int]
    num_prompt_tokens: int
    advantage: float
    old_logprobs: list[float]
    ref_logprobs: list[float] | None


@dataclass(frozen=True)
class Reference:
    """A case with its batch and what came out: of each gradient the L2 norm and, after it, its projections."""

    case: Case
    answers: tuple[Answer, ...]
    loss: float
    grad_norm: float
    gradients: dict[str, list[float]]
    versions: dict[str, str]
    made_by: str = "python benchmarks/trl_reference.py"


def read_reference(path: Path) -> Reference:
    """A recorded file."""
    record: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    case, answers = Case(**record.pop("case")), tuple(Answer(**answer) for answer in record.pop("answers"))
    return Reference(case=case, answers=answers, **record)


def described(name: str, gradient: torch.Tensor) -> list[float]:
    """Norm and projections of a gradient, in float64.

    A projection is the product with as many random signs, so the mean square of the projections of a difference is the
    square of its norm. The signs follow from the parameter's name alone, on every machine.
    """
    flat = gradient.double().flatten().numpy()
    return [float(np.linalg.norm(flat)), *(random_signs(name, len(flat)) @ flat).tolist()]


def random_signs(name: str, count: int) -> NDArray[np.float64]:
    """Plus and minus ones, [NUM_PROJECTIONS, count]."""
    num_bytes = -(-NUM_PROJECTIONS * count // 8)
    bits = np.unpackbits(np.frombuffer(hashlib.shake_256(name.encode()).digest(num_bytes), dtype=np.uint8))
    return bits[: NUM_PROJECTIONS * count].reshape(NUM_PROJECTIONS, count).astype(np.float64) * 2 - 1


# --- with TRL ---------------------------------------------------------------------------------------------------------


def recorded(case: Case) -> Reference:
    """Ask TRL."""
    torch.manual_seed(0)
    trainer = trl_trainer(case)
    model: PreTrainedModel = trainer.model
    model.train()
    generator = np.random.default_rng(case.seed)
    drafts = [draft for _ in range(NUM_GROUPS) for draft in group_without_memory(trainer, generator)]
    with torch.no_grad():
        current = trl_logprobs(trainer, drafts)
    answers = [remembering(case, draft, now, generator) for draft, now in zip(drafts, current, strict=True)]
    loss: torch.Tensor = trainer.compute_loss(model, padded(answers))
    loss.backward()
    gradients = stored_gradients(model)
    total = float(np.sqrt(sum(gradient.double().square().sum().item() for gradient in gradients.values())))
    return Reference(
        case=case,
        answers=tuple(answers),
        loss=loss.item(),
        grad_norm=total,
        gradients={
            name: [float(f"{number:.10g}") for number in described(name, gradient)]
            for name, gradient in sorted(gradients.items())
        },
        versions={name: metadata.version(name) for name in ("trl", "transformers", "torch")},
    )


def trl_trainer(case: Case) -> Any:
    """TRL's trainer of this objective; untyped, because TRL need not be installed where this file is checked."""
    trl = import_module("trl")
    datasets = import_module("datasets")
    model_dir = ROOT / "embedded" / case.model
    settings = trl.GRPOConfig(
        output_dir=tempfile.mkdtemp(),
        use_cpu=True,
        bf16=False,
        report_to=[],
        disable_tqdm=True,
        gradient_checkpointing=False,
        per_device_train_batch_size=NUM_GROUPS * GROUP_SIZE,
        num_generations=GROUP_SIZE,
        steps_per_generation=1,
        loss_type="dapo",
        importance_sampling_level={"grpo": "token", "gspo": "sequence"}[case.loss],
        epsilon=CLIP.low,
        epsilon_high=CLIP.high,
        delta=CLIP.dual,
        beta=case.kl_coef,
        use_bias_correction_kl=False,
        entropy_coef=case.entropy_coef,
        temperature=case.temperature,
        router_aux_loss_coef=0.0,
    )
    trainer = trl.GRPOTrainer(
        model=AutoModelForCausalLM.from_pretrained(model_dir, dtype=torch.float32, attn_implementation="eager"),
        reward_funcs=no_reward,
        args=settings,
        train_dataset=datasets.Dataset.from_dict({"prompt": ["a question"] * GROUP_SIZE}),
        processing_class=AutoTokenizer.from_pretrained(model_dir),
    )
    trainer.current_gradient_accumulation_steps = 1  # otherwise set when training begins
    return trainer


def no_reward(completions: Sequence[str], **_columns: object) -> list[float]:
    """TRL asks for a reward function; nothing is sampled, so nobody calls it."""
    return [0.0] * len(completions)


def group_without_memory(trainer: Any, generator: np.random.Generator) -> list[Answer]:
    """Answers of 2 to 24 tokens to one sum of two numbers of two digits, with advantages of both signs."""
    first, second = generator.integers(10, 100, 2)
    question = [{"role": "user", "content": f"What is {first}+{second}?"}]
    prompt = trainer.processing_class.apply_chat_template(question, add_generation_prompt=True, return_dict=False)
    advantages = group_normalised(generator.permutation(REWARDS).tolist())
    lengths = generator.integers(2, 25, GROUP_SIZE)
    completions = [sampled(trainer.model, prompt, int(length), generator) for length in lengths]
    return [
        Answer([*prompt, *completion], len(prompt), advantage, [0.0] * len(completion), None)
        for completion, advantage in zip(completions, advantages, strict=True)
    ]


@torch.no_grad()
def sampled(model: PreTrainedModel, prompt: list[int], length: int, generator: np.random.Generator) -> list[int]:
    """Tokens as a policy samples them, but warmer: after tokens it never says, its gradients are mostly rounding."""
    token_ids = list(prompt)
    for _ in range(length):
        logits = model(input_ids=torch.tensor([token_ids])).logits[0, -1, :VOCABULARY]
        chances = (logits.double() / SAMPLING_TEMPERATURE).softmax(-1).numpy()
        token_ids.append(int(generator.choice(VOCABULARY, p=chances)))
    return token_ids[len(prompt) :]


def remembering(case: Case, draft: Answer, current: NDArray[np.float32], generator: np.random.Generator) -> Answer:
    """The answer with old and reference log-probabilities at a chosen distance from the ``current`` ones."""
    choices = [*RATIOS, RATIO_BEYOND_DUAL] if draft.advantage < 0 else RATIOS
    if case.loss == "gspo":  # one ratio for the sequence, around which its tokens scatter
        scatter = generator.normal(0, 0.2, len(current))
        log_ratio = np.log(generator.choice(choices)) + scatter - scatter.mean()
    else:
        log_ratio = np.log(generator.choice(choices, len(current)))
    reference = current + generator.normal(0, 0.5, len(current))
    return Answer(
        token_ids=draft.token_ids,
        num_prompt_tokens=draft.num_prompt_tokens,
        advantage=draft.advantage,
        old_logprobs=(current - log_ratio).astype(np.float32).tolist(),
        ref_logprobs=reference.astype(np.float32).tolist() if case.kl_coef else None,
    )


def padded(answers: Sequence[Answer]) -> dict[str, torch.Tensor]:
    """The batch as TRL wants it: prompts in one block and completions, padded on the right, in another.

    Prompts are of one length: padding on the left would move positions, and with them rounding errors.
    """
    prompts = [answer.token_ids[: answer.num_prompt_tokens] for answer in answers]
    completions = [answer.token_ids[answer.num_prompt_tokens :] for answer in answers]
    room = max(map(len, completions))

    def right(rows: Sequence[Sequence[float]], dtype: torch.dtype) -> torch.Tensor:
        return torch.tensor([[*row, *[0] * (room - len(row))] for row in rows], dtype=dtype)

    batch = {
        "prompt_ids": torch.tensor(prompts),
        "prompt_mask": torch.ones(len(prompts), len(prompts[0]), dtype=torch.int64),
        "completion_ids": right(completions, torch.int64),
        "completion_mask": right([[1] * len(row) for row in completions], torch.int64),
        "advantages": torch.tensor([answer.advantage for answer in answers], dtype=torch.float32),
        "old_per_token_logps": right([answer.old_logprobs for answer in answers], torch.float32),
        "num_items_in_batch": torch.tensor(sum(map(len, completions))),
    }
    references = [answer.ref_logprobs for answer in answers if answer.ref_logprobs is not None]
    return {**batch, "ref_per_token_logps": right(references, torch.float32)} if references else batch


def trl_logprobs(trainer: Any, answers: Sequence[Answer]) -> list[NDArray[np.float32]]:
    """What TRL's trainer finds for the completion tokens of each answer."""
    batch = padded(answers)
    logprobs, _, _ = trainer._get_per_token_logps_and_entropies(  # it has no public name
        trainer.model,
        torch.cat([batch["prompt_ids"], batch["completion_ids"]], dim=1),
        torch.cat([batch["prompt_mask"], batch["completion_mask"]], dim=1),
        batch["completion_ids"].size(1),
    )
    return [row[: len(answer.old_logprobs)].numpy() for row, answer in zip(logprobs, answers, strict=True)]


def stored_gradients(model: PreTrainedModel) -> Mapping[str, torch.Tensor]:
    """Gradients under the names and in the shapes of the checkpoint, as transformers itself would save such weights."""
    with torch.no_grad():
        for parameter in model.parameters():
            assert parameter.grad is not None, "every parameter takes part"
            parameter.copy_(parameter.grad)
    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(folder)
        return load_file(Path(folder) / "model.safetensors")


def main() -> None:
    """Write one file per case."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=FOLDER, help="where the files go")
    folder: Path = parser.parse_args().output
    logging.disable_progress_bar()
    warnings.simplefilter("ignore")  # TRL warns of things that its generation would need
    folder.mkdir(parents=True, exist_ok=True)
    for case in CASES:
        reference = recorded(case)
        text = json.dumps(asdict(reference), separators=(",", ":")).replace('],"', '],\n"').replace("},{", "},\n{")
        (folder / f"{case.name}.json").write_text(text + "\n", encoding="utf-8")
        print(f"{case.name}: loss {reference.loss:.6f}, gradient norm {reference.grad_norm:.6f}")


if __name__ == "__main__":
    main()
