"""What a fix changed is written down, and goes back: whole, cut short, damaged, changed since."""

from __future__ import annotations

import hashlib
import json
import os
import threading
from pathlib import Path

import pytest

from kleinctl import journal, store
from kleinctl.home import quarantine_folder
from kleinctl.journal import Damaged, Entry, Moved, Put, Record, Seen, missing_folders
from kleinctl.problem import KleinctlError, Misuse

OLD, NEW = b"the old one", b"the right one"


@pytest.fixture
def place(tmp_path: Path) -> Path:
    """A file that a fix will replace."""
    path = tmp_path / "vae.json"
    path.write_bytes(OLD)
    return path


def put(path: Path, data: bytes = NEW, former: Path | None = None) -> Put:
    """A step that puts `data` at `path`."""
    kept = str(former or journal.spare_file(path.name)) if path.exists() else None
    return Put("put", str(path), hashlib.sha256(data).hexdigest(), kept, None, missing_folders(path), Seen.of(path))


def staged(data: bytes = NEW) -> Path:
    file = journal.spare_file("new")
    file.write_bytes(data)
    return file


def fixed(path: Path, data: bytes = NEW) -> int:
    """A fix that replaces `path`, all of it."""
    record = Record("wrong-vae", ("put the right file there",))
    record.perform(put(path, data), staged(data))
    return record.finish()


def refusal(number: int | None = None) -> str:
    with pytest.raises(KleinctlError) as caught:
        journal.undo(journal.find(number))
    return f"{caught.value.problem.name}: {caught.value.problem.what}. {caught.value.problem.why}"


def test_a_replaced_file_comes_back_with_its_time(place):
    before = Seen.of(place)
    number = fixed(place)
    assert place.read_bytes() == NEW
    entry = journal.undo(journal.find(None))
    assert (entry.number, entry.undone, entry.state) == (number, True, "undone")
    assert place.read_bytes() == OLD and Seen.of(place) == before
    assert [path.name for path in journal.journal_folder().iterdir()] == ["0001.json"]


def test_a_file_that_was_not_there_is_taken_away_and_its_folders_too(tmp_path):
    fixed(tmp_path / "new" / "folder" / "file.txt")
    journal.undo(journal.find(None))
    assert list(tmp_path.iterdir()) == []


def test_undoing_twice_says_so(place):
    number = fixed(place)
    journal.undo(journal.find(number))
    assert refusal(number) == f"undo-impossible: entry {number} was undone already. Nothing is left to undo of it."
    assert refusal() == "undo-impossible: there is nothing to undo. No entry of the journal can be undone."


def test_the_file_was_edited_after_the_fix(place):
    fixed(place)
    place.write_bytes(b"what the user wrote since")
    assert refusal().startswith(
        f"undo-file-changed: {place} was changed since. Left there were 13 bytes; now it has 25"
    )
    assert place.read_bytes() == b"what the user wrote since"


def test_the_file_was_only_touched_after_the_fix(place):
    fixed(place)
    os.utime(place)
    journal.undo(journal.find(None))
    assert place.read_bytes() == OLD


def test_quarantine_was_emptied_after_the_fix(place):
    fixed(place)
    [step] = journal.find(None).steps
    Path(step.former).unlink()
    assert "is gone, and has to go back" in refusal().lower()
    assert place.read_bytes() == NEW


@pytest.mark.parametrize("point", ["written down", "kept", "put"])
def test_a_step_that_was_cut_short(place, point):
    class Cut(Exception):
        pass

    class CutShort(Put):
        def do(self, new, reason=None):
            if point != "written down":
                journal.keep(place, Path(self.former))
            if point == "put":
                store.move(new, place)
            raise Cut

    record = Record("wrong-vae", ("put the right file there",))
    step = CutShort(**vars(put(place)))
    with pytest.raises(Cut):
        record.perform(step, staged())
    entry = journal.find(None)
    assert entry.state == "cut short"
    assert place.read_bytes() == (NEW if point == "put" else OLD)
    journal.undo(entry)
    assert place.read_bytes() == OLD
    assert not Path(step.former).exists()


def test_an_undo_that_was_cut_short_goes_on(place, tmp_path):
    other = tmp_path / "other.json"
    other.write_bytes(OLD)
    record = Record("wrong-vae", ("both",))
    record.perform(put(place), staged())
    record.perform(put(other), staged())
    record.finish()
    entry = journal.find(None)
    entry.steps[1].undo()
    journal.undo(journal.find(None))
    assert (place.read_bytes(), other.read_bytes()) == (OLD, OLD)


def test_a_link_becomes_a_link_again(tmp_path):
    blob, path = tmp_path / "blob", tmp_path / "vae.json"
    blob.write_bytes(OLD)
    path.symlink_to("blob")
    step = Put("put", str(path), hashlib.sha256(NEW).hexdigest(), None, "blob", (), Seen.of(path))
    record = Record("wrong-vae", ("put a file there",))
    record.perform(step, staged())
    record.finish()
    assert not path.is_symlink() and path.read_bytes() == NEW and blob.read_bytes() == OLD
    journal.undo(journal.find(None))
    assert path.readlink() == Path("blob") and path.read_bytes() == OLD


def test_what_took_long_to_fetch_is_kept_where_an_install_finds_it(place):
    large = os.urandom(store.LINK_FROM)
    fixed(place, large)
    journal.undo(journal.find(None))
    [kept] = quarantine_folder().iterdir()
    assert kept.read_bytes() == large
    assert store.Stamps().having(hashlib.sha256(large).hexdigest()) == [kept]


def moved(source: Path, target: Path) -> int:
    record = Record("file-in-wrong-folder", ("move it",))
    record.perform(
        Moved("moved", str(source), str(target), missing_folders(target)), {"schema": "kleinctl.quarantine/1"}
    )
    return record.finish()


def test_a_moved_file_goes_back_and_the_new_folder_goes(place, tmp_path):
    target = tmp_path / "text_encoders" / "a.json"
    moved(place, target)
    assert target.read_bytes() == OLD and not place.exists()
    target.with_name("a.json.json").unlink()
    journal.undo(journal.find(None))
    assert place.read_bytes() == OLD and not target.parent.exists()


def test_something_else_lies_where_the_moved_file_was(place, tmp_path):
    moved(place, tmp_path / "b" / "a.json")
    place.write_bytes(b"another")
    assert "now something is, which would be overwritten" in refusal()
    assert place.read_bytes() == b"another"


def test_the_moved_file_was_changed_or_is_gone(place, tmp_path):
    target = tmp_path / "a.json"
    moved(place, target)
    target.write_bytes(b"edited")
    assert "undo-file-changed" in refusal()
    target.unlink()
    assert "It is gone, and has to go back." in refusal()


def test_the_reason_in_quarantine_goes_with_the_file(place):
    target = quarantine_folder() / "flux1-vae-1.json"
    moved(place, target)
    assert store.read_json(target.with_name("flux1-vae-1.json.json"))["schema"] == "kleinctl.quarantine/1"
    journal.undo(journal.find(None))
    assert not quarantine_folder().exists()


@pytest.mark.parametrize(
    "text",
    [
        "",
        "{",
        "[]",
        "[" * 100_000,
        '{"number": 1}',
        '{"number": -1, "time": 3, "kleinctl": [], "problem": null, "sentences": {}}',
        " " * (journal.MAX_BYTES + 1),
    ],
)
def test_a_damaged_entry_is_one_line_and_the_others_still_work(place, text):
    fixed(place)
    (journal.journal_folder() / "0002.json").write_text(text)
    (journal.journal_folder() / "notes.json").write_text("not ours")
    damaged, whole = journal.entries()
    assert isinstance(damaged, Damaged) and damaged.number == 2 and damaged.why and "\n" not in damaged.why
    assert isinstance(whole, Entry)
    assert refusal(2).startswith("undo-impossible: entry 2 cannot be read")
    assert fixed(place, b"another") == 3
    journal.undo(journal.find(3))
    journal.undo(journal.find(1))
    assert place.read_bytes() == OLD


def test_a_step_of_an_unknown_kind_is_damage(place):
    fixed(place)
    file = journal.journal_folder() / "0001.json"
    document = json.loads(file.read_text())
    document["steps"] = [{"kind": "run", "command": "rm"}]
    file.write_text(json.dumps(document))
    assert isinstance(journal.entries()[0], Damaged)


def test_there_is_no_such_entry(place):
    fixed(place)
    with pytest.raises(Misuse) as caught:
        journal.find(7)
    assert (caught.value.problem.what, caught.value.problem.why) == ("there is no entry 7", "The newest are 1.")


def test_a_fix_that_changed_nothing_leaves_no_entry():
    Record("wrong-vae", ("fetch it",))
    assert journal.entries() == []


def test_entries_are_read_up_to_a_bound():
    for _ in range(journal.MAX_ENTRIES + 5):
        Record("disk-full", ("delete",), "gone").finish()
    assert [each.number for each in journal.entries()] == list(range(journal.MAX_ENTRIES + 5, 5, -1))
    assert refusal(7) == "undo-impossible: entry 7 cannot be undone. gone"


def test_one_fix_at_a_time():
    said: list[str] = []
    with journal.locked(said.append):
        other = threading.Thread(target=lambda: journal.locked(said.append).__enter__(), daemon=True)
        other.start()
        other.join(1)
    other.join(5)
    assert said == ["waiting for another kleinctl to finish its fix"]
