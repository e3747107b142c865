"""Can what an engine returned be an answer at all? An engine that returns garbage is treated as one that died."""

from __future__ import annotations

import numpy as np

from chatlearn.rollout.engine import Finished


def fault_of(finished: Finished, vocabulary: int) -> str | None:
    """What is impossible about an answer, in words; ``None`` where nothing is."""
    completion = finished.completion
    token_ids, num_tokens = completion.token_ids, len(completion.token_ids)
    faults = {
        "no token at all": num_tokens == 0 and completion.finish_reason != "abort",
        f"a token outside the vocabulary of {vocabulary}": bool(((token_ids < 0) | (token_ids >= vocabulary)).any()),
        f"{len(completion.logprobs)} log-probabilities for {num_tokens} tokens": len(completion.logprobs) != num_tokens,
        f"versions that do not add up to its {num_tokens} tokens": sum(run.num_tokens for run in completion.versions)
        != num_tokens,
        "a log-probability that is not finite": not np.isfinite(completion.logprobs).all(),
    }
    return next((fault for fault, is_there in faults.items() if is_there), None)
