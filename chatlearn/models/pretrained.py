"""Opens what transformers reads from a model directory; its many kinds of errors become one that names key and file."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Final

from huggingface_hub.errors import StrictDataclassError
from transformers import AutoConfig, AutoTokenizer

from chatlearn.errors import DataError

if TYPE_CHECKING:
    from pathlib import Path

    from transformers import PreTrainedConfig

# What a file that is cut off, or of another kind, makes transformers stumble over. The last three come from Python code
# that lies in the model directory.
FAULTS: Final = (
    OSError,
    ValueError,
    LookupError,
    TypeError,
    AttributeError,
    RuntimeError,
    StrictDataclassError,
    ImportError,
    NameError,
    SyntaxError,
)


def read_configuration(key: str, model_dir: Path, *, trust_remote_code: bool) -> PreTrainedConfig:
    """The model's ``config.json`` as transformers understands it; ``key`` is what named the directory."""
    try:
        return AutoConfig.from_pretrained(model_dir, trust_remote_code=trust_remote_code)
    except FAULTS as error:
        raise DataError(
            f"{key}: {model_dir / 'config.json'} describes no model that transformers can build ({_reason(error)}); "
            "copy the model again, or use one that this version knows"
        ) from error


def cache_bytes_per_token(configuration: PreTrainedConfig) -> int:
    """Bytes of keys and values that one token of one sequence occupies in float32, over all layers."""
    known = configuration.to_dict()  # Not every family declares a head's size or its number of key-value heads.
    head_dim = known.get("head_dim") or known["hidden_size"] // known["num_attention_heads"]
    num_heads = known.get("num_key_value_heads") or known["num_attention_heads"]
    return 2 * 4 * known["num_hidden_layers"] * num_heads * head_dim


def read_tokenizer(key: str, model_dir: Path, *, trust_remote_code: bool) -> Any:
    """The model's tokenizer, whose class only the directory knows; ``key`` is what named the directory."""
    try:
        return AutoTokenizer.from_pretrained(model_dir, trust_remote_code=trust_remote_code)
    except FAULTS as error:
        raise DataError(
            f"{key}: the tokenizer in {model_dir} (tokenizer.json, tokenizer_config.json) cannot be read "
            f"({_reason(error)}); copy the model again"
        ) from error


def _reason(error: Exception) -> str:
    """Kind and first sentence: transformers goes on with advice about itself."""
    text = " ".join(str(error).split())
    return f"{type(error).__name__}: {text.split('. ')[0]}"
