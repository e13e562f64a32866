"""A disk that fills up while several files are written: the error names the file that failed."""

from __future__ import annotations

import resource
from pathlib import Path

import pytest

from qadeploy.files import writing


@pytest.mark.parametrize("large", [0, 1])
@pytest.mark.parametrize("size", [1_000_000, 8_100])  # written at once, and when the buffer is flushed at the end
def test_of_files_that_are_written_together_the_full_one_is_named(tmp_path, large, size):
    places = [tmp_path / "answers.jsonl", tmp_path / "rejected.jsonl"]
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (8_000, before[1]))
    try:
        with pytest.raises(OSError, match="File too large") as raised:
            write(places, large, size)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert raised.value.filename == str(places[large])
    assert not places[large].exists()


def write(places: list[Path], large: int, size: int) -> None:
    with writing(places[0]) as first, writing(places[1]) as second:
        (first, second)[large].write(b"a" * size)
        (first, second)[1 - large].write(b"a")
