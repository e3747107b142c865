"""Laws of the checkpoint folder: complete or not there, pruned without harm, recovered after a crash."""

from __future__ import annotations

import json
from contextlib import suppress
from pathlib import Path
from tempfile import TemporaryDirectory

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from chatlearn.checkpoint.documents import checksum_of
from chatlearn.checkpoint.durable import REPLACED_PREFIX, STAGING_PREFIX, staging_of
from chatlearn.checkpoint.layout import (
    begin,
    discard,
    latest_complete,
    list_complete,
    point_latest,
    prune,
    publish,
    recover,
)
from chatlearn.checkpoint.manifest import FileRecord, Manifest, read_manifest, verify_checksums, verify_sizes
from chatlearn.checkpoint.run_state import RunState, save_run_state
from chatlearn.errors import CheckpointError


def manifest_of(iteration: int, files: tuple[FileRecord, ...] = ()) -> Manifest:
    return Manifest(
        iteration, episode=iteration, base_model="/m", architecture="A", groupgemm=False, num_ranks=1, files=files
    )


def forge(folder: Path, document: dict[str, object]) -> None:
    """Write a manifest whose checksum is right."""
    (folder / "checkpoint.json").write_text(json.dumps({**document, "checksum": checksum_of(document)}))


def save(root: Path, iteration: int, content: str = "weights", score: float | None = None) -> Path:
    staging = begin(root, iteration)
    if score is not None:
        save_run_state(staging, RunState(iteration, iteration, iteration, 0, 0, 0, evaluation={"eval/x/avg@1": score}))
    (staging / "model").mkdir()
    (staging / "model" / "shard").write_text(content)
    final = publish(root, manifest_of(iteration))
    point_latest(root, iteration)
    return final


def test_a_published_checkpoint_is_complete_and_a_staged_one_is_not_there(tmp_path: Path) -> None:
    final = save(tmp_path, 5)
    begin(tmp_path, 10)
    assert list_complete(tmp_path) == (final,) == (tmp_path / "5",)
    assert latest_complete(tmp_path) == final
    assert (tmp_path / "latest").read_text() == "5\n"
    manifest = verify_sizes(final)
    assert [record.name for record in manifest.files] == ["model/shard"]
    verify_checksums(final, manifest.files)


def test_iterations_are_ordered_as_numbers(tmp_path: Path) -> None:
    for iteration in (200, 5, 30):
        save(tmp_path, iteration)
    assert [folder.name for folder in list_complete(tmp_path)] == ["5", "30", "200"]


def test_an_empty_or_missing_root_has_no_checkpoint(tmp_path: Path) -> None:
    assert latest_complete(tmp_path / "none") is None
    assert list_complete(tmp_path) == ()
    recover(tmp_path / "none")


@pytest.mark.parametrize("damage", ["no manifest", "short file", "missing file", "torn manifest", "renamed folder"])
def test_a_damaged_checkpoint_is_passed_over_for_the_one_before_it(tmp_path: Path, damage: str) -> None:
    good, bad = save(tmp_path, 1), save(tmp_path, 2)
    match damage:
        case "no manifest":
            (bad / "checkpoint.json").unlink()
        case "short file":
            (bad / "model" / "shard").write_text("weigh")
        case "missing file":
            (bad / "model" / "shard").unlink()
        case "torn manifest":
            (bad / "checkpoint.json").write_text((bad / "checkpoint.json").read_text()[:40])
        case _:
            bad = bad.rename(tmp_path / "3")
    assert latest_complete(tmp_path) == good
    if damage != "renamed folder":
        with pytest.raises(CheckpointError, match=r"incomplete|damaged"):
            verify_sizes(bad)


def test_a_flipped_byte_is_found_by_its_checksum(tmp_path: Path) -> None:
    final = save(tmp_path, 1, "weights")
    (final / "model" / "shard").write_text("weightz")
    manifest = verify_sizes(final)
    with pytest.raises(CheckpointError, match=r"model/shard has checksum"):
        verify_checksums(final, manifest.files)


def test_the_newest_one_counts_where_a_crash_or_a_full_disk_came_before_its_pointer(tmp_path: Path) -> None:
    for iteration in (5, 10):
        save(tmp_path, iteration)
    (tmp_path / ".latest.writing").mkdir()  # where the next text is written first
    with pytest.raises(CheckpointError, match="cannot be written"):
        save(tmp_path, 15)
    assert (tmp_path / "latest").read_text() == "10\n"
    assert latest_complete(tmp_path) == tmp_path / "15"
    assert prune(tmp_path, keep=2) == (tmp_path / "5",)


def test_one_that_is_given_up_leaves_nothing(tmp_path: Path) -> None:
    (begin(tmp_path, 5) / "half").write_text("...")
    discard(tmp_path, 5)
    discard(tmp_path, 6)
    assert list(tmp_path.iterdir()) == []


def test_publishing_an_iteration_again_replaces_it(tmp_path: Path) -> None:
    save(tmp_path, 5, "old")
    final = save(tmp_path, 5, "new")
    assert (final / "model" / "shard").read_text() == "new"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["5", "latest"]


def test_a_crash_inside_a_replacement_loses_nothing(tmp_path: Path) -> None:
    final = save(tmp_path, 5, "old")
    begin(tmp_path, 5)
    final.rename(tmp_path / f"{REPLACED_PREFIX}5")  # the crash comes before the staged folder takes the name
    recover(tmp_path)
    assert latest_complete(tmp_path) == final
    assert (final / "model" / "shard").read_text() == "old"


def test_an_interrupted_save_leaves_nothing_in_the_way(tmp_path: Path) -> None:
    (begin(tmp_path, 5) / "half").write_text("...")
    assert not (begin(tmp_path, 5) / "half").exists()
    assert save(tmp_path, 5).is_dir()
    assert not staging_of(tmp_path / "5").exists()


def test_what_a_killed_save_left_goes_and_nothing_else(tmp_path: Path) -> None:
    root, elsewhere = tmp_path / "root", tmp_path / "elsewhere"
    final = save(root, 5)
    elsewhere.mkdir()
    kept = [root / f"{STAGING_PREFIX}{end}" for end in ("", "8x", "notes")] + [root / "notes"]
    for folder in kept:
        folder.mkdir()
    (root / f"{STAGING_PREFIX}9").symlink_to(elsewhere)
    (root / f"{STAGING_PREFIX}10").write_text("a file")
    before = sorted(root.iterdir())

    (begin(root, 7) / "model").mkdir()
    assert staging_of(root / "7").is_dir()
    recover(root)
    assert sorted(root.iterdir()) == before
    begin(root, 7)
    assert save(root, 8).is_dir()
    assert sorted(root.iterdir()) == sorted([*before, root / "8"])
    assert list_complete(root) == (final, root / "8")


def test_what_a_killed_exporter_left_is_no_part_of_the_checkpoint(tmp_path: Path) -> None:
    staging = begin(tmp_path, 1)
    for prefix in (STAGING_PREFIX, REPLACED_PREFIX):
        (staging / f"{prefix}huggingface").mkdir()
        (staging / f"{prefix}huggingface" / "model.safetensors").write_text("half of it")
    (staging / "model").write_text("weights")
    final = publish(tmp_path, manifest_of(1))
    assert [record.name for record in verify_sizes(final).files] == ["model"]
    assert sorted(path.name for path in final.iterdir()) == ["checkpoint.json", "model"]


def test_a_foreign_folder_is_refused_and_kept(tmp_path: Path) -> None:
    (tmp_path / "5").mkdir()
    (tmp_path / "5" / "notes.txt").write_text("mine")
    with pytest.raises(CheckpointError, match=r"/5: in the way"):
        begin(tmp_path, 5)
    assert prune(tmp_path, keep=1) == ()
    assert (tmp_path / "5" / "notes.txt").read_text() == "mine"


def test_prune_deletes_what_the_manifest_lists_and_nothing_else(tmp_path: Path) -> None:
    for iteration in range(1, 5):
        save(tmp_path, iteration)
    (tmp_path / "2" / "model" / "notes.txt").write_text("mine")
    assert prune(tmp_path, keep=0) == ()
    assert [folder.name for folder in prune(tmp_path, keep=1)] == ["1", "2", "3"]
    assert [folder.name for folder in list_complete(tmp_path)] == ["4"]
    assert not (tmp_path / "1").exists()
    assert [path.name for path in (tmp_path / "2").rglob("*") if path.is_file()] == ["notes.txt"]


def test_the_best_one_is_never_pruned_and_of_equal_ones_the_newest_is_the_best(tmp_path: Path) -> None:
    for iteration, score, best, kept in (
        (1, 0.1, "1\n", ["1"]),
        (2, 0.5, "2\n", ["2"]),
        (3, None, "2\n", ["2", "3"]),
        (4, 0.4, "2\n", ["2", "4"]),
        (5, 0.5, "5\n", ["5"]),
        (6, -1.0, "5\n", ["5", "6"]),
    ):
        save(tmp_path, iteration, score=score)
        prune(tmp_path, 1, "eval/x/avg@1")
        assert (tmp_path / "best").read_text() == best
        assert [folder.name for folder in list_complete(tmp_path)] == kept
    prune(tmp_path, 1, "eval/another/avg@1")
    assert not (tmp_path / "best").exists()
    assert [folder.name for folder in list_complete(tmp_path)] == ["6"]


def test_a_number_that_was_not_saved_makes_no_best_one(tmp_path: Path) -> None:
    save(tmp_path, 1, score=0.5)
    state = save(tmp_path, 2, score=0.1) / "run_state.json"
    state.write_text(state.read_text().replace("0.1", "0.9"))
    prune(tmp_path, 0, "eval/x/avg@1")
    assert (tmp_path / "best").read_text() == "1\n"


def test_an_interrupted_deletion_is_finished(tmp_path: Path) -> None:
    folder = save(tmp_path, 1)
    (folder / "checkpoint.json").rename(folder / "checkpoint.deleted.json")
    assert list_complete(tmp_path) == ()
    recover(tmp_path)
    assert not folder.exists()
    folder.mkdir()  # the very last deed of a deletion was missing
    assert begin(tmp_path, 1).is_dir()
    assert not folder.exists()


@settings(max_examples=25, deadline=None, derandomize=True)
@given(iterations=st.lists(st.integers(0, 30), min_size=1, max_size=6, unique=True), keep=st.integers(1, 4))
def test_pruning_never_changes_what_a_resume_takes(iterations: list[int], keep: int) -> None:
    with TemporaryDirectory() as folder:
        root = Path(folder)
        for iteration in iterations:
            save(root, iteration)
        before = latest_complete(root)
        prune(root, keep)
        assert latest_complete(root) == before
        assert [int(folder.name) for folder in list_complete(root)] == sorted(iterations)[-keep:]


@pytest.mark.parametrize("name", ["../../etc/passwd", "/etc/passwd", ""])
def test_a_file_name_that_leads_out_of_the_folder_is_refused(tmp_path: Path, name: str) -> None:
    final = save(tmp_path, 1)
    document = json.loads((final / "checkpoint.json").read_text())
    document["files"][0]["name"] = name
    forge(final, document)
    with pytest.raises(CheckpointError, match="leads out of the folder"):
        read_manifest(final)


@pytest.mark.parametrize(
    ("key", "value"),
    [("schema_version", 3), ("iteration", "5"), ("episode", -1), ("groupgemm", 1), ("base_model", None), ("files", {})],
)
def test_a_manifest_of_the_wrong_form_names_file_and_key(tmp_path: Path, key: str, value: object) -> None:
    final = save(tmp_path, 1)
    document = json.loads((final / "checkpoint.json").read_text())
    document[key] = value
    forge(final, document)
    with pytest.raises(CheckpointError, match=rf"checkpoint\.json.*{key}"):
        read_manifest(final)


def test_every_byte_of_a_manifest_that_means_something_is_guarded(tmp_path: Path) -> None:
    final = save(tmp_path, 1)
    path, manifest = final / "checkpoint.json", read_manifest(final)
    content = path.read_bytes()
    for place in range(len(content)):
        path.write_bytes(content[:place] + bytes([content[place] ^ 1]) + content[place + 1 :])
        with suppress(CheckpointError):
            assert read_manifest(final) == manifest, f"byte {place} of {content!r}"


def test_a_manifest_of_the_first_version_is_read_and_its_checksum_does_not_vanish(tmp_path: Path) -> None:
    final = save(tmp_path, 1)
    document = json.loads((final / "checkpoint.json").read_text())
    without = {key: value for key, value in document.items() if key != "checksum"}
    (final / "checkpoint.json").write_text(json.dumps({**without, "schema_version": 1}))
    assert read_manifest(final).iteration == 1
    (final / "checkpoint.json").write_text(json.dumps(without))
    with pytest.raises(CheckpointError, match="'checksum' is None"):
        read_manifest(final)
    (final / "checkpoint.json").write_text(json.dumps({**document, "schema_version": 1}))
    with pytest.raises(CheckpointError, match="has checksum"):
        read_manifest(final)


@pytest.mark.parametrize("linked", ["model", "model/shard"])
def test_what_lies_behind_a_link_is_neither_read_nor_deleted(tmp_path: Path, linked: str) -> None:
    root, elsewhere = tmp_path / "root", tmp_path / "elsewhere"
    final = save(root, 1)
    (final / linked).rename(elsewhere)
    (final / linked).symlink_to(elsewhere)
    with pytest.raises(CheckpointError, match=rf"{final / linked}: is a link"):
        verify_sizes(final)
    (final / "checkpoint.json").rename(final / "checkpoint.deleted.json")
    recover(root)
    assert (elsewhere / "shard" if linked == "model" else elsewhere).read_text() == "weights"
    assert not (final / "checkpoint.deleted.json").exists()


def test_a_checkpoint_that_lies_elsewhere_behind_a_link_is_read_and_never_deleted(tmp_path: Path) -> None:
    root = tmp_path / "root"
    for iteration in (1, 2, 3):
        save(root, iteration)
    for name in ("1", "3"):
        (root / name).rename(tmp_path / name)
        (root / name).symlink_to(tmp_path / name)
    assert latest_complete(root) == root / "3"
    prune(root, keep=1)
    assert [folder.name for folder in list_complete(root)] == ["1", "3"]
    with pytest.raises(CheckpointError, match="a link; move it away"):
        begin(root, 3)
    verify_sizes(tmp_path / "1")


def test_a_deletion_whose_list_is_damaged_is_left_to_people(tmp_path: Path) -> None:
    folder = save(tmp_path, 1)
    (folder / "checkpoint.json").rename(folder / "checkpoint.deleted.json")
    (folder / "checkpoint.deleted.json").write_text("{")
    recover(tmp_path)
    assert (tmp_path / "1.damaged" / "model" / "shard").read_text() == "weights"


def test_a_rank_on_another_file_system_is_noticed(tmp_path: Path) -> None:
    staging = begin(tmp_path, 1)
    elsewhere = FileRecord("model/__1_0.distcp", 10, "00000000")
    with pytest.raises(CheckpointError, match="share one file system"):
        publish(tmp_path, manifest_of(1, (elsewhere,)))
    (staging / "model").mkdir()
    (staging / elsewhere.name).write_text("short")
    with pytest.raises(CheckpointError, match="has 5 bytes; its rank wrote 10"):
        publish(tmp_path, manifest_of(1, (elsewhere,)))
    assert list_complete(tmp_path) == ()


def test_a_place_that_cannot_be_written_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(CheckpointError, match=rf"{tmp_path}/file/5: cannot be written"):
        begin(tmp_path / "file", 5)
