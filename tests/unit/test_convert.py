"""From shards to a Hugging Face directory, in one process: what comes out, what is refused, what is left alone."""

from __future__ import annotations

import json
import threading
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from conversions import (
    ADAPTED,
    COMPANIONS,
    CONFIGS,
    EMBEDDED,
    SIZES,
    Run,
    loaded,
    logits,
    make_adapted_run,
    make_run,
)
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from chatlearn.checkpoint.convert import convert, export
from chatlearn.checkpoint.documents import CHECKSUM, checksum_of
from chatlearn.checkpoint.hugging_face import write_hugging_face
from chatlearn.checkpoint.layout import begin, publish
from chatlearn.checkpoint.manifest import Manifest, read_manifest, record_file, write_manifest
from chatlearn.checkpoint.saved_tensors import SavedTensors, open_shards
from chatlearn.checkpoint.sharded import save_shards
from chatlearn.errors import CheckpointError, ConfigError, DataError
from chatlearn.models.lora import LoraSpec

# torch remarks on every save that one process without a group saves alone; here that is the point.
pytestmark = pytest.mark.filterwarnings("ignore:torch.distributed is disabled:UserWarning")


@pytest.fixture
def dense(tmp_path: Path) -> Run:
    return make_run(tmp_path, "tied")


@pytest.mark.parametrize("kind", list(CONFIGS))
def test_transformers_loads_what_was_converted(tmp_path: Path, kind: str) -> None:
    run = make_run(tmp_path, kind)
    report = run.convert()
    assert torch.allclose(logits(loaded(run.save_dir)), logits(run.model), atol=1e-5, rtol=0)
    assert not torch.allclose(logits(loaded(run.base)), logits(run.model), atol=1e-2)
    stored = load_file(run.save_dir / "model.safetensors")
    assert set(stored) == set(load_file(run.base / "model.safetensors"))
    assert (report.files, report.num_tensors, report.notes) == (("model.safetensors",), len(stored), ())
    for name in COMPANIONS:
        assert (run.save_dir / name).read_bytes() == (EMBEDDED / name).read_bytes()


@pytest.mark.parametrize("kind", list(ADAPTED))
def test_an_adapter_is_merged_into_its_base(tmp_path: Path, kind: str) -> None:
    run = make_adapted_run(tmp_path, kind, LoraSpec(rank=2, alpha=6.0))
    steps: list[tuple[int, int]] = []
    arguments = (run.base, run.checkpoints, run.save_dir, 7, False, "float32")
    report = convert(*arguments, progress=lambda done, total: steps.append((done, total)))
    assert torch.allclose(logits(loaded(run.save_dir)), logits(run.model), atol=1e-5, rtol=0)
    assert not torch.allclose(logits(loaded(run.base)), logits(run.model), atol=1e-2)
    stored = load_file(run.save_dir / "model.safetensors")
    assert set(stored) == set(load_file(run.base / "model.safetensors"))
    assert report.num_tensors == len(stored)
    assert steps[-1][0] == steps[-1][1] == sum(tensor.numel() for tensor in stored.values())


def cut_in_files(base: Path) -> list[Path]:
    """Let the weights of a base model lie in several files; returns them, without the index."""
    AutoModelForCausalLM.from_pretrained(base).save_pretrained(base, max_shard_size="4KB")
    (base / "model.safetensors").unlink(missing_ok=True)
    return sorted(base.glob("model-*.safetensors"))


@pytest.mark.parametrize("index", ["there", "missing"])
def test_an_adapter_is_merged_into_a_base_of_several_files(tmp_path: Path, index: str) -> None:
    run = make_adapted_run(tmp_path, "biases", LoraSpec(rank=2, alpha=6.0))
    assert len(cut_in_files(run.base)) > 2
    if index == "missing":
        (run.base / "model.safetensors.index.json").unlink()
    run.convert()
    assert torch.allclose(logits(loaded(run.save_dir)), logits(run.model), atol=1e-5, rtol=0)


def test_a_base_that_is_incomplete_or_names_other_folders_is_refused(tmp_path: Path) -> None:
    run = make_adapted_run(tmp_path, "biases", LoraSpec(rank=2, alpha=6.0))
    files, index = cut_in_files(run.base), run.base / "model.safetensors.index.json"
    weight_map = json.loads(index.read_text())["weight_map"]
    foreign = {name: f"../{run.base.name}/{file}" for name, file in weight_map.items()}
    index.write_text(json.dumps({"weight_map": foreign}))
    with pytest.raises(DataError, match=r"\.\./biases/model-\S+', which leads out of the folder"):
        run.convert()
    index.unlink()
    files[1].unlink()
    with pytest.raises(DataError, match=rf"index\.json is missing, and so are some of the {len(files)} files"):
        run.convert()
    assert not run.save_dir.exists()


def test_an_adapter_of_another_shape_or_base_is_not_merged(tmp_path: Path) -> None:
    run = make_adapted_run(tmp_path, "biases", LoraSpec(rank=3, alpha=6.0))
    with pytest.raises(CheckpointError, match=r"lora_A\.default\.weight' has shape \(2, 16\); .* \(3, 16\)"):
        run.convert()
    other = make_adapted_run(tmp_path / "other", "moe", LoraSpec(rank=2, alpha=6.0))
    stored = load_file(other.base / "model.safetensors")
    stored["model.norm.weight"] += 1
    save_file(stored, other.base / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ConfigError, match=rf"--hf_dir {other.base}: its weights are not those that the adapter"):
        other.convert()
    assert not run.save_dir.exists()
    assert not other.save_dir.exists()


@pytest.mark.parametrize("kind", ["tied", "moe", "biases"])
def test_a_checkpoint_that_is_still_being_made_gets_its_model_directory(tmp_path: Path, kind: str) -> None:
    """Shards in a staging folder, no manifest: what saving has in its hands before it publishes."""
    adapted = kind in ADAPTED and kind not in CONFIGS
    run = make_adapted_run(tmp_path, kind, LoraSpec(rank=2, alpha=6.0)) if adapted else make_run(tmp_path, kind)
    adapter = read_manifest(run.checkpoints / "7").adapter
    folder = begin(run.checkpoints, 8)
    (run.checkpoints / "7" / "model").rename(folder / "model")
    written = export(folder, run.base, folder / "huggingface", adapter, "float32")
    assert written.directory == folder / "huggingface"
    assert sorted(path.name for path in folder.iterdir()) == ["huggingface", "model"]
    assert torch.allclose(logits(loaded(written.directory)), logits(run.model), atol=1e-5, rtol=0)


def test_the_default_is_bfloat16_in_weights_and_configuration(dense: Run) -> None:
    convert(dense.base, dense.checkpoints, dense.save_dir, iteration=7, groupgemm=False)
    config = json.loads((dense.save_dir / "config.json").read_text())
    assert config["dtype"] == "bfloat16"
    assert {tensor.dtype for tensor in load_file(dense.save_dir / "model.safetensors").values()} == {torch.bfloat16}
    assert AutoModelForCausalLM.from_pretrained(dense.save_dir).dtype == torch.bfloat16
    expected = {name: tensor.bfloat16().float() for name, tensor in dense.model.state_dict().items()}
    assert all(torch.equal(tensor, expected[name]) for name, tensor in loaded(dense.save_dir).state_dict().items())


def test_the_form_of_the_base_model_does_not_matter(dense: Run) -> None:
    """Sharded without an index, weights of another kind, folders in it: configuration and tokenizer are what counts."""
    (dense.base / "model.safetensors").rename(dense.base / "model-00001-of-00002.safetensors")
    (dense.base / "pytorch_model.bin").write_text("old weights")
    (dense.base / "pytorch_model.bin.index.json").write_text("{}")
    for folder in ("original", "additional_chat_templates", ".git"):
        (dense.base / folder).mkdir()
        (dense.base / folder / "file.jinja").write_text(folder)
    config = json.loads((dense.base / "config.json").read_text())
    (dense.base / "config.json").write_text(json.dumps({**config, "torch_dtype": "bfloat16"}))
    dense.convert()
    assert torch.allclose(logits(loaded(dense.save_dir)), logits(dense.model), atol=1e-5, rtol=0)
    written = {path.relative_to(dense.save_dir).as_posix() for path in dense.save_dir.rglob("*") if path.is_file()}
    assert written == {
        "config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json", "chat_template.jinja",
        "generation_config.json", "additional_chat_templates/file.jinja", "chatlearn_conversion.json",
    }  # fmt: skip
    assert json.loads((dense.save_dir / "config.json").read_text())["torch_dtype"] == "float32"


def test_progress_counts_every_weight(dense: Run) -> None:
    steps: list[tuple[int, int]] = []

    def watch(done: int, total: int) -> None:
        steps.append((done, total))

    convert(dense.base, dense.checkpoints, dense.save_dir, 7, groupgemm=False, progress=watch)
    total = sum(parameter.numel() for parameter in dense.model.parameters())
    assert steps[-1] == (total, total)
    assert [done for done, _ in steps] == sorted({done for done, _ in steps})


def test_a_missing_hf_dir_gives_way_to_the_base_model_of_the_run(dense: Run, tmp_path: Path) -> None:
    absent = tmp_path / "Qwen3-8B"
    report = dense.convert(hf_dir=absent)
    assert report.base_dir == dense.base
    assert report.notes == (f"{absent} does not exist; taking the run's base model {dense.base} instead",)

    moved = dense.base.rename(tmp_path / "moved")
    with pytest.raises(ConfigError, match=rf"--hf_dir {absent}: no such folder.*{dense.base}"):
        dense.convert(hf_dir=absent)
    (dense.output / "manifest.json").write_text(json.dumps({"model_path": str(moved)}))
    assert dense.convert(hf_dir=absent).base_dir == moved


def test_converting_again_replaces_the_earlier_conversion(dense: Run) -> None:
    dense.convert()
    (dense.save_dir / "config.json").write_text("{}")
    dense.convert()
    assert loaded(dense.save_dir).config.vocab_size == SIZES["vocab_size"]
    assert sorted(path.name for path in dense.save_dir.parent.iterdir()) == ["huggingface", "policy_trainer"]


def test_an_empty_save_dir_is_used(dense: Run) -> None:
    dense.save_dir.mkdir()
    assert dense.convert().save_dir == dense.save_dir


def test_a_save_dir_with_other_things_is_left_alone(dense: Run) -> None:
    mine = dense.output / "mine"
    mine.mkdir()
    (mine / "thesis.txt").write_text("mine")
    with pytest.raises(ConfigError, match="not an earlier conversion"):
        dense.convert(save_dir=mine)
    with pytest.raises(ConfigError, match="is a file"):
        dense.convert(save_dir=mine / "thesis.txt")
    with pytest.raises(CheckpointError, match=r"thesis\.txt/here: cannot be written"):
        dense.convert(save_dir=mine / "thesis.txt" / "here")
    dense.convert()
    (dense.save_dir / "notes.txt").write_text("mine")
    with pytest.raises(ConfigError, match=r"holds notes\.txt"):
        dense.convert()
    assert (dense.save_dir / "notes.txt").read_text() == "mine"


def test_an_unknown_iteration_lists_those_that_exist(dense: Run) -> None:
    for iteration in (200, 10**300):
        with pytest.raises(ConfigError, match=rf"no checkpoint of iteration {iteration}; complete ones: 7$"):
            convert(dense.base, dense.checkpoints, dense.save_dir, iteration, groupgemm=False)
    with pytest.raises(ConfigError, match=r"complete ones: none"):
        convert(dense.base, dense.base, dense.save_dir, iteration=7, groupgemm=False)
    with pytest.raises(ConfigError, match=r"give the run's save_model/policy_trainer"):
        convert(dense.base, dense.output / "nowhere", dense.save_dir, iteration=7, groupgemm=False)


def test_a_checkpoint_folder_that_is_nearly_right_is_told(dense: Run, tmp_path: Path) -> None:
    for given in (dense.checkpoints / "7", dense.output, dense.checkpoints.parent):
        with pytest.raises(ConfigError, match=rf"{given}: no checkpoints in it; --ckpt_dir {dense.checkpoints} has"):
            convert(dense.base, given, tmp_path / "out", iteration=7, groupgemm=False)


def test_a_model_is_not_written_among_the_checkpoints(dense: Run, tmp_path: Path) -> None:
    (tmp_path / "link").symlink_to(dense.checkpoints)
    for place in (dense.checkpoints, dense.checkpoints / "8", dense.checkpoints / "7" / "hf", tmp_path / "link" / "8"):
        with pytest.raises(ConfigError, match=r"--save_dir \S+ lies in --ckpt_dir .* such as .*save_model/huggingface"):
            dense.convert(save_dir=place)
    assert [path.name for path in dense.checkpoints.iterdir() if path.is_dir()] == ["7"]


def test_shards_and_manifests_cannot_name_files_outside_their_folder(dense: Run) -> None:
    manifest = dense.checkpoints / "7" / "checkpoint.json"
    content = manifest.read_text()
    hostile = json.loads(content.replace("model/__0_0.distcp", "../secret"))
    manifest.write_text(json.dumps(hostile | {CHECKSUM: checksum_of(hostile)}))
    with pytest.raises(CheckpointError, match=r"'\.\./secret' leads out of the folder"):
        dense.convert()
    manifest.write_text(content)
    metadata = dense.checkpoints / "7" / "model" / ".metadata"
    metadata.write_bytes(metadata.read_bytes().replace(b"__0_0.distcp", b"../../../etc"))
    with pytest.raises(CheckpointError, match=r"model/\.metadata has checksum .* is damaged"):
        dense.convert()
    publish_as_it_is(dense)
    with pytest.raises(CheckpointError, match=r"'\.\./\.\./\.\./etc' leads out of the folder"):
        dense.convert()


def test_a_part_that_no_shard_holds_is_not_filled_with_noise(dense: Run) -> None:
    tensors = open_shards(dense.checkpoints / "7" / "model")
    name, shape = "model.embed_tokens.weight", (51, 16)
    partly = SavedTensors(dense.checkpoints, {name: shape}, {name: tensors._shards[name]})
    with pytest.raises(CheckpointError, match=rf"a part of '{name}' is in no file"):
        partly.read(name, torch.float32)


def publish_as_it_is(run: Run) -> None:
    """Whoever changes a shard on purpose changes its checksum too."""
    folder = run.checkpoints / "7"
    manifest = read_manifest(folder)
    write_manifest(folder, replace(manifest, files=tuple(record_file(folder, file.name) for file in manifest.files)))


@pytest.mark.parametrize("damage", ["flipped byte", "short shard", "no manifest", "no metadata"])
def test_a_damaged_checkpoint_is_refused_and_the_earlier_conversion_stays(dense: Run, damage: str) -> None:
    dense.convert()
    folder = dense.checkpoints / "7"
    shard = folder / "model" / "__0_0.distcp"
    match damage:
        case "flipped byte":
            content = bytearray(shard.read_bytes())
            content[-5000] ^= 4
            shard.write_bytes(content)
        case "short shard":
            shard.write_bytes(shard.read_bytes()[:-100])
        case "no manifest":
            (folder / "checkpoint.json").unlink()
        case _:
            (folder / "model" / ".metadata").unlink()
    with pytest.raises(CheckpointError, match=rf"{folder}: .*(damaged|incomplete)"):
        dense.convert()
    assert loaded(dense.save_dir).config.vocab_size == SIZES["vocab_size"]


def test_numbers_that_are_not_finite_are_refused(tmp_path: Path) -> None:
    run = make_run(tmp_path, "untied")
    with torch.no_grad():
        run.model.lm_head.weight[3, 3] = torch.inf
    files = save_shards(begin(run.checkpoints, 7), run.model, torch.optim.AdamW(run.model.parameters()))
    publish(run.checkpoints, Manifest(7, 7, "", "Qwen3ForCausalLM", groupgemm=False, num_ranks=1, files=files))
    with pytest.raises(CheckpointError, match=r"lm_head\.weight.*not finite") as found:
        run.convert()
    assert not run.save_dir.exists()
    names = [thread.name for thread in threading.enumerate()]
    assert not [name for name in names if name.startswith("ThreadPool")], f"still reading after {found.value}"


def test_groupgemm_is_refused_for_a_dense_model_and_noted_for_a_mixture(dense: Run, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"--groupgemm 1 is for mixtures of experts; Qwen3ForCausalLM is dense"):
        dense.convert(groupgemm=True)
    mixture = make_run(tmp_path / "moe", "moe", groupgemm=True)
    assert mixture.convert(groupgemm=True).notes == ()
    grouped = load_file(mixture.save_dir / "model.safetensors")
    report = mixture.convert(groupgemm=False)
    assert report.notes[0].startswith("--groupgemm 0 although training ran with 1")
    plain = load_file(mixture.save_dir / "model.safetensors")
    assert grouped.keys() == plain.keys()
    assert all(torch.equal(grouped[name], plain[name]) for name in plain)


def test_a_base_model_of_another_kind_or_size_is_refused(dense: Run, tmp_path: Path) -> None:
    other = make_run(tmp_path / "other", "moe")
    with pytest.raises(ConfigError, match="is a Qwen3MoeForCausalLM, but the checkpoint holds a Qwen3ForCausalLM"):
        dense.convert(hf_dir=other.base)
    config = json.loads((dense.base / "config.json").read_text())
    (dense.base / "config.json").write_text(json.dumps({**config, "vocab_size": 60}))
    with pytest.raises(ConfigError, match=r"embed_tokens.*\(50, 16\).*\(60, 16\).*/config\.json\); give the model"):
        dense.convert()
    (dense.base / "config.json").write_text(json.dumps({**config, "num_hidden_layers": 3}))
    with pytest.raises(DataError, match=r"config\.json: describes no model .*layer_types"):
        dense.convert()
    deeper = {"num_hidden_layers": 3, "layer_types": ["full_attention"] * 3}
    (dense.base / "config.json").write_text(json.dumps({**config, **deeper}))
    with pytest.raises(ConfigError, match=r"has no 'model\.layers\.2"):
        dense.convert()
    flatter = {"num_hidden_layers": 1, "layer_types": ["full_attention"]}
    (dense.base / "config.json").write_text(json.dumps({**config, **flatter}))
    with pytest.raises(ConfigError, match=r"holds 'model\.layers\.1\.\S+' and 10 more, .* does not ask for"):
        dense.convert()
    (dense.base / "config.json").write_text(json.dumps({**config, "model_type": "llama"}))
    with pytest.raises(ConfigError, match=r"holds 'model\.layers\.0\.self_attn\.k_norm\.weight' and 3 more"):
        dense.convert()
    assert not dense.save_dir.exists()
    (dense.base / "config.json").unlink()
    with pytest.raises(DataError, match=r"no config\.json"):
        dense.convert()


def test_a_stream_is_written_in_files_of_bounded_size_with_an_index(dense: Run) -> None:
    stream = [(name, weight) for name, weight in dense.model.named_parameters()]
    written = write_hugging_face(stream, dense.base, dense.save_dir, "float32", max_file_bytes=4000)
    assert len(written.files) > 2
    assert written.files[0] == f"model-00001-of-{len(written.files):05d}.safetensors"
    weight_map = json.loads((dense.save_dir / "model.safetensors.index.json").read_text())["weight_map"]
    assert set(weight_map) == {name for name, _ in stream}
    largest = max(weight.nbytes for _, weight in stream)
    for file in written.files:
        assert sum(tensor.nbytes for tensor in load_file(dense.save_dir / file).values()) <= max(4000, largest)
    assert torch.allclose(logits(loaded(dense.save_dir)), logits(dense.model), atol=1e-5, rtol=0)


def test_a_stream_that_lacks_repeats_or_invents_a_tensor_is_refused(dense: Run) -> None:
    stream = list(dense.model.named_parameters())
    norm = "model.norm.weight"
    lacking = [(name, weight) for name, weight in stream if name != norm]
    for tensors, fault in (
        (lacking, f"1 tensors of the model did not come, the first is '{norm}'"),
        ([*stream, stream[0]], "came twice"),
        ([*stream, ("lm_head.weight", torch.zeros(50, 16))], "'lm_head.weight' is not a tensor of this model"),
        ([*lacking, (norm, torch.zeros(3))], r"'model.norm.weight' has shape \(3,\)"),
    ):
        with pytest.raises(CheckpointError, match=fault):
            write_hugging_face(tensors, dense.base, dense.save_dir)
        assert not dense.save_dir.exists()
