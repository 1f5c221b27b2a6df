"""Files that are written whole or not at all."""

from __future__ import annotations

import errno
import os
from pathlib import Path

import pytest

from kleinctl import atomic


def test_a_full_disk_leaves_what_was_there(tmp_path, monkeypatch):
    path = tmp_path / "a.json"
    path.write_text("former")

    def full(given: Path, *text: object, **options: object) -> int:
        given.touch()
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(Path, "write_text", full)
    with pytest.raises(OSError, match=os.strerror(errno.ENOSPC)):
        atomic.write_text(path, "new")
    assert path.read_text() == "former" and list(tmp_path.iterdir()) == [path]


def test_a_link_is_followed_and_stays_one(tmp_path):
    (tmp_path / "elsewhere").mkdir()
    link = tmp_path / "a.json"
    link.symlink_to(tmp_path / "elsewhere/real.json")
    atomic.try_writing(link)
    assert not link.exists()
    atomic.write_text(link, "ü")
    assert link.is_symlink() and (tmp_path / "elsewhere/real.json").read_text(encoding="utf-8") == "ü"


@pytest.mark.skipif(os.name == "nt", reason="its devices have no paths")
def test_a_device_stays_what_it_is():
    path = Path(os.devnull)
    atomic.try_writing(path)
    atomic.write_text(path, "text")
    assert path.is_char_device()


def test_a_folder_is_told_before_anything_is_written(tmp_path):
    for way in (atomic.try_writing, lambda path: atomic.write_text(path, "text")):
        with pytest.raises(IsADirectoryError):
            way(tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_a_name_as_long_as_the_file_system_allows(tmp_path):
    path = tmp_path / ("n" * 250)
    atomic.try_writing(path)
    atomic.write_text(path, "text")
    assert [each.name for each in tmp_path.iterdir()] == [path.name]
