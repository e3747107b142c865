"""docs/config.md says what the code does; extension points are found by name."""

from __future__ import annotations

from pathlib import Path

import pytest

from chatlearn.config.describe import document, main
from chatlearn.config.fates import FATES
from chatlearn.config.resolve import resolve
from chatlearn.config.sections import SCHEMA_KEYS
from chatlearn.errors import ConfigError

PAGE = Path(__file__).resolve().parents[2] / "docs" / "config.md"


def test_the_page_is_current() -> None:
    assert main(["--check", str(PAGE)]) == 0


def test_a_page_that_has_fallen_behind_is_noticed_and_mended(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    stale = tmp_path / "config.md"
    stale.write_text(document().replace("Decoupled weight decay.", "Speed."))
    assert main(["--check", str(stale)]) == 1
    assert "Speed." in capsys.readouterr().err
    assert main(["--write", str(stale)]) == 0
    assert main(["--check", str(stale)]) == 0
    assert main(["--check", str(tmp_path / "absent.md")]) == 1


def test_every_key_has_a_line_and_every_key_of_the_schema_a_meaning() -> None:
    lines = [line for line in document().splitlines() if line.startswith("| `")]
    assert len(lines) == len(FATES)
    for key, item in SCHEMA_KEYS.items():
        assert item.field.description, key


def test_a_name_is_found_in_the_table_or_by_its_path() -> None:
    table = {"sum": sum}
    assert resolve(table, "sum", "key") is sum
    assert resolve(table, "math:fsum", "key").__name__ == "fsum"


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("smu", "key=smu is unknown; did you mean sum?"),
        ("product", "key=product is unknown; use sum or package.module:function"),
        ("math:fsumm", "key=math:fsumm: math has no fsumm; did you mean fsum?"),
        ("no_such_module:f", "cannot import no_such_module"),
        ("math:", "math has no name after the colon"),
    ],
)
def test_a_name_that_is_not_there_is_explained(name: str, message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        resolve({"sum": sum}, name, "key")
    assert message in str(caught.value)
