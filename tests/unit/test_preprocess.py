"""The preprocessors: what they accept, what they write, and that they never leave half a result behind."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest

from chatlearn.data.data_preprocess import gsm8k, math_lighteval
from chatlearn.data.data_preprocess.boxed_solution import boxed_answer
from chatlearn.data.data_preprocess.records_file import INSTRUCTION, write_splits
from chatlearn.errors import DataError

REPOSITORY = Path(__file__).resolve().parents[2]

MATH_ROW = {"problem": "What is $1+1$?", "solution": r"It is $\boxed{2}$.", "level": "Level 1", "type": "Algebra"}
GSM8K_ROW = {"question": "How many?", "answer": "1000+234=<<1234>>1234\n#### 1,234"}


def write_lines(path: Path, rows: Sequence[object]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def write_parquet(path: Path, rows: Sequence[dict[str, str]]) -> None:
    import pyarrow
    import pyarrow.parquet

    path.parent.mkdir(parents=True, exist_ok=True)
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(list(rows)), path)


def read_lines(path: Path) -> list[dict[str, object]]:
    return [json.loads(line) for line in path.read_text().split("\n") if line]


def prepare(main: Callable[[Sequence[str]], None], input_dir: Path, local_dir: Path | None = None) -> None:
    main(["--input_dir", str(input_dir), "--local_dir", str(local_dir or input_dir)])


def files_under(folder: Path) -> set[str]:
    return {str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()}


def test_math_record_is_the_documented_one(tmp_path: Path) -> None:
    for split in ("train", "test"):
        write_lines(tmp_path / f"data/{split}-00000-of-00001.json", [MATH_ROW])
    prepare(math_lighteval.main, tmp_path)
    assert list(read_lines(tmp_path / "test.json")[0].items()) == [
        ("level", "Level 1"),
        ("type", "Algebra"),
        ("data_source", "DigitalLearningGmbH/MATH-lighteval"),
        ("prompt", [{"role": "user", "content": "What is $1+1$?" + INSTRUCTION}]),
        ("ability", "math"),
        ("reward_model", {"style": "rule", "ground_truth": "2"}),
        ("extra_info", {"split": "test", "index": 0}),
    ]
    assert INSTRUCTION == r" Let's think step by step and output the final answer within \boxed{}."


def test_gsm8k_record_is_the_documented_one(tmp_path: Path) -> None:
    for split in ("train", "test"):
        write_lines(tmp_path / f"{split}.jsonl", [GSM8K_ROW])
    prepare(gsm8k.main, tmp_path)
    assert list(read_lines(tmp_path / "train.json")[0].items()) == [
        ("data_source", "openai/gsm8k"),
        ("prompt", [{"role": "user", "content": "How many?" + INSTRUCTION}]),
        ("ability", "math"),
        ("reward_model", {"style": "rule", "ground_truth": "1234"}),
        ("extra_info", {"split": "train", "index": 0, **dict(sorted(GSM8K_ROW.items()))}),
    ]


@pytest.mark.parametrize(
    "names",
    [
        ("train.json", "test.json"),
        ("train.jsonl", "test.jsonl"),
        ("train.parquet", "test.parquet"),
        ("data/train-00000-of-00001.parquet", "data/test-00000-of-00001.parquet"),
        ("train/part-0.jsonl", "test/part-0.jsonl"),
        ("default/train/0000.parquet", "default/test/0000.parquet"),
    ],
)
def test_every_layout_works_twice_with_equal_results(tmp_path: Path, names: tuple[str, str]) -> None:
    for name in names:
        (write_parquet if name.endswith("parquet") else write_lines)(tmp_path / name, [MATH_ROW])
    (tmp_path / "README.md").write_text("a card")
    write_lines(tmp_path / ".cache/train.jsonl", [{"not": "data"}])
    write_lines(tmp_path / "trainer_state.json", [{"not": "data"}])
    prepare(math_lighteval.main, tmp_path)
    first = {split: (tmp_path / f"{split}.json").read_bytes() for split in ("train", "test")}
    prepare(math_lighteval.main, tmp_path)
    assert first == {split: (tmp_path / f"{split}.json").read_bytes() for split in ("train", "test")}
    assert len(read_lines(tmp_path / "train.json")) == 1


def test_a_raw_file_in_the_place_of_the_result_is_kept(tmp_path: Path) -> None:
    for split in ("train", "test"):
        write_lines(tmp_path / f"{split}.json", [MATH_ROW])
    prepare(math_lighteval.main, tmp_path)
    assert read_lines(tmp_path / "train.raw.json") == [MATH_ROW]


def test_rows_of_several_files_follow_one_another(tmp_path: Path) -> None:
    write_lines(tmp_path / "data/train-0.jsonl", [MATH_ROW, MATH_ROW])
    write_lines(tmp_path / "data/train-1.jsonl", [{**MATH_ROW, "problem": "last"}])
    write_lines(tmp_path / "data/test-0.jsonl", [MATH_ROW])
    write_lines(tmp_path / "algebra/train-0.jsonl", [MATH_ROW])  # a configuration that repeats rows of data/
    prepare(math_lighteval.main, tmp_path)
    rows = read_lines(tmp_path / "train.json")
    assert [row["extra_info"] for row in rows] == [{"split": "train", "index": index} for index in range(3)]


def test_of_gsm8k_only_main_counts(tmp_path: Path) -> None:
    for split in ("train", "test"):
        write_parquet(tmp_path / f"main/{split}-00000-of-00001.parquet", [GSM8K_ROW])
        write_parquet(tmp_path / f"socratic/{split}-00000-of-00001.parquet", [GSM8K_ROW])
        write_lines(tmp_path / f"{split}_socratic.jsonl", [GSM8K_ROW])
    prepare(gsm8k.main, tmp_path)
    assert len(read_lines(tmp_path / "train.json")) == 1


def test_prepared_files_alone_are_left_as_they_are(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    raw, prepared = tmp_path / "raw", tmp_path / "prepared"
    for split in ("train", "test"):
        write_lines(raw / f"{split}.jsonl", [MATH_ROW])
    prepare(math_lighteval.main, raw, prepared)
    before = {name: (prepared / name).stat().st_mtime_ns for name in files_under(prepared)}
    prepare(math_lighteval.main, prepared)
    assert "prepared already" in capsys.readouterr().err
    assert before == {name: (prepared / name).stat().st_mtime_ns for name in files_under(prepared)}
    with pytest.raises(DataError, match="prepared files only"):
        prepare(math_lighteval.main, prepared, tmp_path / "elsewhere")


NO_BOX = {**MATH_ROW, "solution": "It is 2."}


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (json.dumps(MATH_ROW) + "\n" + json.dumps(NO_BOX), r"test\.jsonl row 2: the solution has no"),
        (json.dumps({**MATH_ROW, "solution": r"\boxed{2"}), r"test\.jsonl row 1: .*never closed"),
        (json.dumps(MATH_ROW) + "\n{", r"test\.jsonl row 2: not valid JSON"),
        (json.dumps({"problem": "?"}), r"test\.jsonl row 1: no column solution; found problem"),
        (json.dumps({**MATH_ROW, "problem": 3}), r"test\.jsonl row 1: problem is int, not text"),
        ("[1]", r"test\.jsonl row 1: a JSON object was expected"),
        ("", r"test\.jsonl is empty"),
        (b"\xff\xfe", r"test\.jsonl is not UTF-8"),
        (None, r"no raw file for test"),
    ],
)
def test_a_fault_is_named_and_nothing_is_written(tmp_path: Path, content: str | bytes | None, message: str) -> None:
    write_lines(tmp_path / "train.jsonl", [MATH_ROW])
    if content is not None:
        (tmp_path / "test.jsonl").write_bytes(content.encode() if isinstance(content, str) else content)
    before = files_under(tmp_path)
    with pytest.raises(DataError, match=message):
        prepare(math_lighteval.main, tmp_path)
    assert files_under(tmp_path) == before


def test_an_unreadable_parquet_file_is_named(tmp_path: Path) -> None:
    write_lines(tmp_path / "train.jsonl", [MATH_ROW])
    (tmp_path / "test.parquet").write_text("not parquet")
    with pytest.raises(DataError, match=r"test\.parquet is not a readable parquet file"):
        prepare(math_lighteval.main, tmp_path)


def test_two_formats_of_one_split_are_refused(tmp_path: Path) -> None:
    write_lines(tmp_path / "train.jsonl", [MATH_ROW])
    write_parquet(tmp_path / "train.parquet", [MATH_ROW])
    with pytest.raises(DataError, match="several formats"):
        prepare(math_lighteval.main, tmp_path)


def test_many_faults_are_counted_not_listed(tmp_path: Path) -> None:
    write_lines(tmp_path / "train.jsonl", [NO_BOX] * 100)
    write_lines(tmp_path / "test.jsonl", [MATH_ROW])
    with pytest.raises(DataError, match="95 more rows") as caught:
        prepare(math_lighteval.main, tmp_path)
    assert len(caught.value.problems) == 6


def test_no_split_is_published_when_one_cannot_be_written(tmp_path: Path) -> None:
    write_splits(tmp_path, {"train": [{"old": 1}], "test": [{"old": 1}]})
    with pytest.raises(TypeError):
        write_splits(tmp_path, {"train": [{"new": 1}], "test": [{"new": object()}]})
    assert files_under(tmp_path) == {"train.json", "test.json"}
    assert read_lines(tmp_path / "train.json") == [{"old": 1}]


def test_a_folder_that_cannot_be_written_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(DataError, match="cannot be written"):
        write_splits(tmp_path / "file", {"train": []})


@pytest.mark.parametrize(
    ("solution", "answer"),
    [
        (r"so $\boxed{\frac{1}{2}}$.", r"\frac{1}{2}"),
        (r"$\boxed{1}$, no, $\boxed{2}$", "2"),
        (r"\boxed 5 done", "5"),
        (r"$\boxed 5$", "5"),
        (r"\boxed {7}", "7"),
        (r"\boxed{\{1, 2\}}", r"\{1, 2\}"),
        (r"\boxed{\left\{ x \right.}", r"\left\{ x \right."),
        (r"\fbox{3}", "3"),
    ],
)
def test_box_of_a_solution(solution: str, answer: str) -> None:
    assert boxed_answer(solution) == answer


@pytest.mark.parametrize("name", ["math_lighteval", "gsm8k"])
def test_the_documented_command_reports_errors_without_a_traceback(tmp_path: Path, name: str) -> None:
    script = f"chatlearn/data/data_preprocess/{name}.py"
    command = [sys.executable, script, "--input_dir", str(tmp_path / "absent"), "--local_dir", str(tmp_path)]
    done = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert "no such directory" in done.stderr
    assert "Traceback" not in done.stderr
    assert len(done.stderr.splitlines()) == 1


def test_the_documented_command_works_as_a_file(tmp_path: Path) -> None:
    for split in ("train", "test"):
        write_lines(tmp_path / f"dataset/MATH-lighteval/{split}.jsonl", [MATH_ROW])
    script = REPOSITORY / "chatlearn/data/data_preprocess/math_lighteval.py"
    folder = "dataset/MATH-lighteval"
    command = [sys.executable, str(script), "--input_dir", folder, "--local_dir", folder]
    for _ in range(2):
        done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
        assert (done.returncode, done.stdout) == (0, "")
        assert "train.json: 1 records" in done.stderr


def test_all_of_gsm8k(tmp_path: Path, gsm8k_dir: Path) -> None:
    prepare(gsm8k.main, gsm8k_dir, tmp_path)
    assert [len(read_lines(tmp_path / f"{split}.json")) for split in ("train", "test")] == [7473, 1319]
