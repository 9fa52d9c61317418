"""The table of latencies that a user brings."""

import json
from pathlib import Path

import pytest

from bitfold.allocation import read_latencies
from bitfold.errors import DataError


def test_read(tmp_path: Path) -> None:
    file = tmp_path / "table.json"
    entries = [
        {"shape": [8, 4], "bits": 4, "group_size": 2, "seconds": 0.5},
        {"shape": [8, 4], "bits": 16, "group_size": None, "seconds": 2},
        {"shape": [8, 4], "bits": 8, "seconds": 1e-6},
    ]
    file.write_text(json.dumps(entries))
    assert read_latencies(file) == {(8, 4, "4g2"): 0.5, (8, 4, "16"): 2.0, (8, 4, "8"): 1e-6}


@pytest.mark.parametrize(
    "text",
    [
        "{",
        "{}",
        "[3]",
        '[{"shape": [8], "bits": 4, "seconds": 1}]',
        '[{"shape": [8, 4], "bits": 4}]',
        '[{"shape": [8, 4], "bits": 4, "seconds": -1}]',
        '[{"shape": [8, 4], "bits": 4, "seconds": NaN}]',
    ],
)
def test_damaged(text: str, tmp_path: Path) -> None:
    file = tmp_path / "table.json"
    file.write_text(text)
    with pytest.raises(DataError, match=r"table\.json"):
        read_latencies(file)


def test_missing(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="cannot be read"):
        read_latencies(tmp_path / "none.json")
