"""What the converter refuses before it writes anything, and what it only remarks on."""

from __future__ import annotations

import errno
import json
import os
import shutil
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from conversions import Run, loaded, logits, make_adapted_run, make_run
from safetensors.torch import load_file, save_file

from chatlearn.checkpoint.adapters import base_digest
from chatlearn.checkpoint.architecture import parameter_shapes
from chatlearn.checkpoint.convert import convert
from chatlearn.checkpoint.durable import STAGING_PREFIX, checksum, files_below
from chatlearn.checkpoint.hugging_face import MARKER_NAME, write_hugging_face
from chatlearn.checkpoint.manifest import Provenance, read_manifest, write_manifest
from chatlearn.checkpoint.read_once import ReadOnce
from chatlearn.checkpoint.sole_staging import _is_ours, sole_staging
from chatlearn.errors import CheckpointError, ConfigError, DataError
from chatlearn.models.lora import LoraSpec

pytestmark = pytest.mark.filterwarnings("ignore:torch.distributed is disabled:UserWarning")


@pytest.fixture
def dense(tmp_path: Path) -> Run:
    return make_run(tmp_path, "tied")


def configure(base: Path, **changes: object) -> None:
    """Change keys of a model directory's ``config.json``."""
    path = base / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def test_the_base_model_is_neither_replaced_nor_built_upon(dense: Run, tmp_path: Path) -> None:
    """Not even where it is itself an earlier conversion, which any other one may replace."""
    (dense.base / MARKER_NAME).write_text(json.dumps({"schema_version": 1, "files": files_below(dense.base)}))
    (tmp_path / "link").symlink_to(dense.base)
    copy = shutil.copytree(dense.base, tmp_path / "copy")
    before = checksum(dense.base / "model.safetensors")
    for place in (dense.base, dense.base / "out", tmp_path / "link" / "out", dense.base.parent):
        for base in (dense.base, tmp_path / "link", copy, tmp_path / "absent"):
            with pytest.raises(ConfigError, match=rf"--save_dir {place} \w.* the base model .* must stay as it is"):
                dense.convert(save_dir=place, hf_dir=base)
    assert checksum(dense.base / "model.safetensors") == before
    assert not (dense.base / "out").exists()


def test_a_folder_that_no_other_can_replace_or_without_room_is_refused_at_once(dense: Run) -> None:
    def stream() -> Iterator[tuple[str, torch.Tensor]]:
        pytest.fail("something was read")
        yield "", torch.empty(0)

    with pytest.raises(ConfigError, match=r"/proc: a disk is mounted there.*, such as /proc/NAME"):
        write_hugging_face(stream(), dense.base, Path("/proc"))
    config = json.loads((dense.base / "config.json").read_text())
    (dense.base / "config.json").write_text(json.dumps({**config, "vocab_size": 10**14}))
    with pytest.raises(CheckpointError, match=r"the model needs 3200000\.\d\d GB, and .* are free on that disk"):
        write_hugging_face(stream(), dense.base, dense.save_dir)
    assert not dense.save_dir.exists()


def test_of_two_conversions_into_one_folder_the_second_is_refused_and_spoils_nothing(dense: Run) -> None:
    refused: list[str] = []

    def second(done: int, total: int) -> None:
        if not refused:
            with pytest.raises(ConfigError, match="another process is writing there; wait for its end") as found:
                dense.convert()
            refused.append(str(found.value))

    convert(dense.base, dense.checkpoints, dense.save_dir, 7, False, "float32", second)
    assert refused
    assert torch.allclose(logits(loaded(dense.save_dir)), logits(dense.model), atol=1e-5, rtol=0)
    dense.convert()
    (dense.save_dir.parent / f"{STAGING_PREFIX}huggingface").mkdir()  # left behind by a process that was killed
    dense.convert()
    assert sorted(path.name for path in dense.save_dir.parent.iterdir()) == ["huggingface", "policy_trainer"]


def test_a_lock_on_a_staging_folder_that_was_replaced_meanwhile_counts_for_nothing(tmp_path: Path) -> None:
    with sole_staging(tmp_path / "model") as staging:
        descriptor = os.open(staging, os.O_RDONLY)  # as somebody has who came before the lock was there
        shutil.rmtree(staging)
    staging.mkdir()
    assert not _is_ours(staging, descriptor)
    os.close(descriptor)


def test_a_head_that_was_trained_is_not_lost_in_a_base_that_has_none(tmp_path: Path) -> None:
    run = make_run(tmp_path, "untied")
    configure(run.base, tie_word_embeddings=True)
    with pytest.raises(ConfigError, match=r"ties the output head .* head of its own; .*tie_word_embeddings to false"):
        run.convert()
    assert not run.save_dir.exists()


def test_a_tied_model_may_be_written_as_one_that_is_not(dense: Run) -> None:
    configure(dense.base, tie_word_embeddings=False)
    dense.convert()
    assert "lm_head.weight" in load_file(dense.save_dir / "model.safetensors")
    assert torch.allclose(logits(loaded(dense.save_dir)), logits(dense.model), atol=1e-5, rtol=0)


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"hidden_act": "foo"}, "KeyError: 'foo'"),
        ({"rope_parameters": {"rope_type": "zzz"}}, "KeyError: 'zzz'"),
        ({"num_attention_heads": 0}, "ZeroDivisionError"),
        ({"hidden_size": -16}, "negative dimension"),
        ({"hidden_size": "x"}, "hidden_size"),
        ({"model_type": "foo"}, "model type `foo`"),
    ],
)
def test_a_configuration_that_describes_no_model_is_named(dense: Run, changes: dict[str, object], reason: str) -> None:
    configure(dense.base, **changes)
    with pytest.raises(DataError, match=rf"{dense.base}/config\.json: describes no model .*{reason}") as found:
        parameter_shapes(dense.base)
    assert "\n" not in str(found.value)


def test_an_attention_that_is_not_installed_and_quantized_weights_of_the_base_do_not_matter(dense: Run) -> None:
    packed = {"quant_method": "fp8", "weight_block_size": [128, 128]}
    configure(dense.base, _attn_implementation="flash_attention_2", quantization_config=packed)
    (note,) = dense.convert().notes
    assert note.startswith(f"'quantization_config' in {dense.base}/config.json is left out")
    assert "quantization_config" not in json.loads((dense.save_dir / "config.json").read_text())
    configure(dense.save_dir, _attn_implementation="eager")
    assert torch.allclose(logits(loaded(dense.save_dir)), logits(dense.model), atol=1e-5, rtol=0)


def test_an_adapter_is_not_merged_into_quantized_weights(tmp_path: Path) -> None:
    run = make_adapted_run(tmp_path, "biases", LoraSpec(rank=2, alpha=6.0))
    weights, name = load_file(run.base / "model.safetensors"), "model.layers.0.self_attn.q_proj.weight"
    weights[name] = weights[name].to(torch.float8_e4m3fn)
    save_file(weights, run.base / "model.safetensors", metadata={"format": "pt"})
    manifest = read_manifest(run.checkpoints / "7")
    assert manifest.adapter is not None
    adapter = replace(manifest.adapter, base_digest=base_digest(run.base))
    write_manifest(run.checkpoints / "7", replace(manifest, adapter=adapter))
    with pytest.raises(DataError, match=rf"has no tensor '{name}' of a kind that .* give the model that is not quant"):
        run.convert()
    weights[f"{name}_packed"] = weights.pop(name).half()
    save_file(weights, run.base / "model.safetensors", metadata={"format": "pt"})
    adapter = replace(manifest.adapter, base_digest=base_digest(run.base))
    write_manifest(run.checkpoints / "7", replace(manifest, adapter=adapter))
    with pytest.raises(DataError, match=rf"among its weights, has no '{name}'"):
        run.convert()


def test_a_base_with_other_weights_is_remarked_on_and_one_without_weights_is_not(dense: Run) -> None:
    folder = dense.checkpoints / "7"
    write_manifest(folder, replace(read_manifest(folder), provenance=Provenance("", base_digest(dense.base))))
    assert dense.convert().notes == ()
    weights = load_file(dense.base / "model.safetensors")
    weights["model.norm.weight"] += 1
    save_file(weights, dense.base / "model.safetensors", metadata={"format": "pt"})
    (note,) = dense.convert().notes
    assert note.startswith(f"the weights in {dense.base} are not those that training started from")
    (dense.base / "model.safetensors").unlink()
    assert dense.convert().notes == ()


def test_a_damaged_description_of_the_run_is_not_needed_while_the_checkpoint_names_a_base(dense: Run) -> None:
    (dense.output / "manifest.json").write_text("{")
    assert dense.convert(hf_dir=dense.output / "absent").base_dir == dense.base
    dense.base.rename(dense.base.with_name("moved"))
    with pytest.raises(ConfigError, match=rf"absent: no such folder, and the base model .* not at {dense.base} either"):
        dense.convert(hf_dir=dense.output / "absent")
    with pytest.raises(ConfigError, match=r"--hf_dir .*config\.json: is a file; give the folder"):
        dense.convert(hf_dir=dense.base.with_name("moved") / "config.json")


def test_a_list_of_earlier_files_that_is_no_list_of_names_is_refused(dense: Run) -> None:
    dense.save_dir.mkdir()
    (dense.save_dir / MARKER_NAME).write_text(json.dumps({"schema_version": 1, "files": [{"a": 1}]}))
    with pytest.raises(CheckpointError, match=rf"{MARKER_NAME}: 'files' is .*expected text"):
        dense.convert()


@pytest.mark.parametrize("files", [1, None, ""])
def test_an_index_that_names_no_files_is_refused(tmp_path: Path, files: object) -> None:
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"a": files}}))
    with pytest.raises(DataError, match=r"index\.json: does not name a file for every tensor"):
        base_digest(tmp_path)


def test_every_flipped_bit_in_the_description_of_the_shards_is_damage(dense: Run) -> None:
    """Before anything of it is believed: some ask for gigabytes."""
    path = dense.checkpoints / "7" / "model" / ".metadata"
    content = path.read_bytes()
    for position in range(0, len(content), len(content) // 7):
        path.write_bytes(content[:position] + bytes([content[position] ^ 8]) + content[position + 1 :])
        with pytest.raises(CheckpointError, match=r"7: model/\.metadata has checksum .* the checkpoint is damaged"):
            dense.convert()


def test_a_full_disk_is_told_without_reading_the_whole_checkpoint(dense: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    full = OSError(errno.ENOSPC, "No space left on device")

    def refuse(*_: object) -> None:
        raise full

    monkeypatch.setattr("chatlearn.checkpoint.hugging_face.WeightWriter.write", refuse)
    monkeypatch.setattr(ReadOnce, "require", lambda *_: pytest.fail("the checkpoint was read through"))
    with pytest.raises(CheckpointError, match=r"cannot be written: .*No space left on device"):
        dense.convert()
