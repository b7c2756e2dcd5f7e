"""No text is a file name that leads out of the folder."""

import os
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fixer.base.file_name import FileName


@pytest.mark.parametrize("text", ["a.json", "E=8,N=64,block_shape=[128, 128].json", "...", ".hidden", "é" * 127])
def test_names_of_files(tmp_path: Path, text: str) -> None:
    (tmp_path / FileName(text)).write_text("x")
    assert os.listdir(tmp_path) == [text]
    assert str(FileName(text)) == text


@pytest.mark.parametrize(
    "text", ["", ".", "..", "a/b", "/etc/x", "../x", "a\\b", "a\0b", "a\nb", "a\x1bb", "\ud800", "x" * 256, "é" * 128]
)
def test_what_is_no_name_of_a_file(text: str) -> None:
    with pytest.raises(ValueError, match="is no file name"):
        FileName(text)


@given(st.text())
def test_whatever_is_a_name_stays_in_its_folder(text: str) -> None:
    try:
        name = FileName(text)
    except ValueError:
        return
    assert os.path.normpath(Path("/folder") / name) == f"/folder/{text}"
    with pytest.raises(AttributeError):
        name.text = "/etc/x"  # type: ignore[misc]
