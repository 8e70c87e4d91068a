"""Files are complete or absent, and a folder has one writer, whatever becomes of it. The other processes are real."""

import errno
import fcntl
import os
import signal
import socket
import time
from pathlib import Path
from unittest.mock import MagicMock

import pytest
from loops import wait_for
from torture import context

from experiments import files
from experiments.config import ExperimentError


def failing(number: int) -> MagicMock:
    """Return a function that fails as the system call does."""
    return MagicMock(side_effect=OSError(number, os.strerror(number)))


@pytest.mark.parametrize("call", ["fsync", "replace"])
def test_a_full_disk_leaves_the_previous_file(tmp_path, monkeypatch, call):
    files.write(tmp_path / "a", b"before")
    monkeypatch.setattr(files.os, call, failing(errno.ENOSPC))
    with pytest.raises(ExperimentError, match=r"a cannot be written \(No space left on device\): make room"):
        files.write(tmp_path / "a", b"after")
    assert [path.name for path in tmp_path.iterdir()] == ["a"]
    assert (tmp_path / "a").read_bytes() == b"before"


def test_folders_are_made_and_a_file_in_their_place_is_refused(tmp_path):
    files.write(tmp_path / "new" / "a", b"1")
    assert (tmp_path / "new" / "a").read_bytes() == b"1"
    assert list(files.writable(tmp_path / "other", "").iterdir()) == []
    (tmp_path / "file").touch()
    with pytest.raises(ExperimentError, match="cannot be written"):
        files.write(tmp_path / "file" / "a", b"")
    with pytest.raises(ExperimentError, match=r"The folder .*file cannot be written \(.*\): choose another\."):
        files.writable(tmp_path / "file", "choose another")
    with pytest.raises(ExperimentError, match="file/arm cannot be locked"), files.hold(tmp_path / "file" / "arm"):
        pytest.fail("held")


def test_a_held_folder_is_refused_and_left_clean(tmp_path):
    with files.hold(tmp_path / "arm"):
        (tmp_path / "arm" / ".left.partial").touch()
        said = f"arm is being written by process {os.getpid()} on {socket.gethostname()}: let that run end"
        with pytest.raises(files.BusyError, match=said), files.hold(tmp_path / "arm"):
            pytest.fail("held twice")
        files.remove_stale_lock(tmp_path / "arm")
        assert (tmp_path / "arm" / files.LOCK).exists()
    (tmp_path / "arm" / files.LOCK).write_text("process 1 on a machine")
    files.remove_stale_lock(tmp_path / "arm")
    assert list((tmp_path / "arm").iterdir()) == []  # the next owner has removed what the first has not finished


@pytest.mark.parametrize("number", [errno.ENOLCK, errno.ENOSYS])
def test_a_file_system_without_locks_is_named(tmp_path, monkeypatch, number):
    monkeypatch.setattr(fcntl, "flock", failing(number))
    said = rf"The folder .*arm cannot be locked \({os.strerror(number)}\)"
    with pytest.raises(ExperimentError, match=said), files.hold(tmp_path / "arm"):
        pytest.fail("held")


# -- with other processes -----------------------------------------------------------------------------------------


def hold_with_worker(folder: Path) -> None:
    """Hold the folder's lock, and name a worker that is forked meanwhile in a file beside the folder."""
    with files.hold(folder):
        if worker := os.fork():
            (folder.parent / "worker").write_text(str(worker))
        time.sleep(60)


def count(folder: Path, times: int) -> None:
    for _ in range(times):
        with files.hold(folder, lambda owner: None):
            number = int((folder / "number").read_text() or 0)
            (folder / "number").write_text(str(number + 1))


@pytest.mark.system
def test_a_killed_owner_and_its_workers_hold_nothing(tmp_path):
    owner = context.Process(target=hold_with_worker, args=(tmp_path / "arm",))
    owner.start()
    wait_for(tmp_path / "worker")
    time.sleep(0.1)
    with pytest.raises(files.BusyError, match=f"process {owner.pid} on "), files.hold(tmp_path / "arm"):
        pytest.fail("held twice")
    worker = int((tmp_path / "worker").read_text())
    os.kill(owner.pid or 0, signal.SIGKILL)
    owner.join()
    try:
        os.kill(worker, 0)  # it lives
        with files.hold(tmp_path / "arm"):
            pass
    finally:
        os.kill(worker, signal.SIGKILL)


@pytest.mark.system
def test_processes_that_wait_never_write_at_once(tmp_path):
    (tmp_path / "number").write_text("0")
    counters = [context.Process(target=count, args=(tmp_path, 20)) for _ in range(4)]
    for counter in counters:
        counter.start()
    for counter in counters:
        counter.join()
        assert counter.exitcode == 0
    assert (tmp_path / "number").read_text() == "80"
    assert [path.name for path in tmp_path.iterdir()] == ["number"]
