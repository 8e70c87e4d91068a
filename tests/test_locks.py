"""One writer a folder, whatever becomes of it. The other processes are real."""

import errno
import fcntl
import os
import signal
import socket
import time
from pathlib import Path

import pytest
from torture import context

from experiments import locks
from experiments.config import ExperimentError


def hold_on(folder: Path, fork: bool = False) -> None:
    """Hold the folder's lock until killed; say so, and the process of a worker, by a file beside it."""
    with locks.hold(folder):
        (folder / ".left.partial").touch()
        worker = os.fork() if fork else 0
        if fork and not worker:
            time.sleep(60)
            os._exit(0)
        (folder.parent / "held").write_text(str(worker))
        time.sleep(60)


def hold_for(folder: Path, seconds: float) -> None:
    with locks.hold(folder):
        (folder.parent / "held").touch()
        time.sleep(seconds)


def count(folder: Path, times: int) -> None:
    for _ in range(times):
        with locks.hold(folder, waiting=lambda _: None):
            number = int((folder / "number").read_text() or 0)
            (folder / "number").write_text(str(number + 1))


def wait_for(path: Path) -> None:
    for _ in range(6000):
        if path.exists():
            return
        time.sleep(0.01)
    pytest.fail(f"{path} does not come")


def test_the_second_is_told_who_and_a_dead_owner_holds_nothing(tmp_path: Path) -> None:
    folder = tmp_path / "arm"
    owner = context.Process(target=hold_on, args=(folder,))
    owner.start()
    try:
        wait_for(tmp_path / "held")
        said = (
            rf"arm is being written by process {owner.pid} on {socket.gethostname()} since 20\d\d-.*: let that run end"
        )
        with pytest.raises(locks.BusyError, match=said), locks.hold(folder):
            pytest.fail("held twice")
        assert (folder / ".left.partial").exists()
    finally:
        os.kill(owner.pid or 0, signal.SIGKILL)
        owner.join()
    assert (folder / locks.NAME).exists()  # what a killed owner leaves
    with locks.hold(folder):
        assert [path.name for path in folder.iterdir()] == [locks.NAME]  # and not what it had begun to write
    assert list(folder.iterdir()) == []


def test_the_workers_of_a_dead_owner_hold_nothing(tmp_path: Path) -> None:
    owner = context.Process(target=hold_on, args=(tmp_path / "arm", True))
    owner.start()
    wait_for(tmp_path / "held")
    time.sleep(0.1)
    worker = int((tmp_path / "held").read_text())
    os.kill(owner.pid or 0, signal.SIGKILL)
    owner.join()
    try:
        os.kill(worker, 0)  # it lives
        with locks.hold(tmp_path / "arm"):
            pass
    finally:
        os.kill(worker, signal.SIGKILL)


def test_who_waits_is_told_once_whom_it_waits_for(tmp_path: Path) -> None:
    owner = context.Process(target=hold_for, args=(tmp_path / "arm", 0.5))
    owner.start()
    wait_for(tmp_path / "held")
    said: list[str] = []
    began = time.monotonic()
    with locks.hold(tmp_path / "arm", said.append):
        assert time.monotonic() - began > 0.2
    owner.join()
    assert len(said) == 1 and said[0].startswith(f"process {owner.pid} on ")


def test_eight_that_wait_never_write_at_once(tmp_path: Path) -> None:
    (tmp_path / "number").write_text("0")
    counters = [context.Process(target=count, args=(tmp_path, 40)) for _ in range(8)]
    for counter in counters:
        counter.start()
    for counter in counters:
        counter.join()
        assert counter.exitcode == 0
    assert (tmp_path / "number").read_text() == "320"
    assert [path.name for path in tmp_path.iterdir()] == ["number"]


def test_ctrl_c_ends_the_waiting(tmp_path: Path) -> None:
    owner = context.Process(target=hold_for, args=(tmp_path / "arm", 60))
    owner.start()
    wait_for(tmp_path / "held")
    before = signal.signal(signal.SIGALRM, signal.default_int_handler)  # as Ctrl-C's
    signal.setitimer(signal.ITIMER_REAL, 0.2)
    try:
        with pytest.raises(KeyboardInterrupt), locks.hold(tmp_path / "arm", lambda _: None):
            pytest.fail("held twice")
    finally:
        signal.signal(signal.SIGALRM, before)
        os.kill(owner.pid or 0, signal.SIGKILL)
        owner.join()
    assert not locks._open


def test_a_file_system_without_locks_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def none(*_: object) -> None:
        raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

    monkeypatch.setattr(fcntl, "flock", none)
    with (
        pytest.raises(
            ExperimentError, match=r"The file system of .*arm has no locks \(No locks available\), so that two"
        ),
        locks.hold(tmp_path / "arm"),
    ):
        pytest.fail("held")


def test_a_folder_that_cannot_be_made_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(ExperimentError, match="file/arm cannot be written"), locks.hold(tmp_path / "file" / "arm"):
        pytest.fail("held")


def test_what_a_killed_owner_left_is_removed_and_what_is_held_stays(tmp_path: Path) -> None:
    (tmp_path / locks.NAME).write_text("process 1 on a machine since long ago")
    locks.tidy(tmp_path)
    assert not (tmp_path / locks.NAME).exists()
    with locks.hold(tmp_path):
        locks.tidy(tmp_path)
        assert (tmp_path / locks.NAME).exists()
