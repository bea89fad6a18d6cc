import errno
import gc
import os
import pickle
import signal
import stat
import subprocess
import sys
import threading
import time
from pathlib import Path

import posix_ipc
import pytest
from conftest import PATIENCE, eventually
from procfs import asleep, wakeups
from test_posix_queue import NOBODY, in_thread, peer, python

from ipckit import Closed, registry
from ipckit.posix import Semaphore

NAME = "/ipckit-test"
FILE = Path("/dev/shm/sem.ipckit-test")


@pytest.fixture
def semaphore():
    made = Semaphore(NAME, create=True, exclusive=True)
    yield made
    if not made.closed:
        made.unlink()
    made.close()


def holding(ready, semaphore):
    """A child that takes one and is killed with it."""
    semaphore.acquire()
    ready()
    signal.pause()


def test_taking_and_giving(semaphore):
    assert semaphore.value == 1
    assert semaphore.acquire() is True
    assert semaphore.value == 0
    with pytest.raises(TimeoutError, match="acquire of POSIX semaphore '/ipckit-test'") as caught:
        semaphore.acquire(timeout=0)
    assert caught.value.errno == errno.ETIMEDOUT
    semaphore.release()
    semaphore.release()
    with semaphore, semaphore:
        assert semaphore.value == 0
    assert semaphore.value == 2


def test_the_time_waited(semaphore):
    semaphore.acquire()
    for timeout in (0.05, 0.25):  # shorter and longer than it sleeps at a time
        start, before = time.monotonic(), wakeups(os.getpid())
        with pytest.raises(TimeoutError):
            semaphore.acquire(timeout)
        took = time.monotonic() - start
        assert took >= timeout
        assert wakeups(os.getpid()) - before <= 10 + took / 0.1
    with pytest.raises(ValueError, match="timeout must be None or a number of seconds"):
        semaphore.acquire(-1)


def test_a_waiting_process_gets_it(semaphore, forked):
    def wait(ready):
        ready()
        semaphore.acquire()

    semaphore.acquire()
    child = forked(wait)
    child.wait_ready()
    eventually(lambda: asleep(child.pid, within="futex"))
    semaphore.release()
    assert child.wait() == 0
    assert semaphore.value == 0


def test_signals_neither_end_nor_prolong_a_wait(semaphore):
    seen = []
    former = signal.signal(signal.SIGUSR1, lambda *_: seen.append(1))
    parent = os.getpid()
    pid = os.fork()
    if pid == 0:
        while os.getppid() == parent:
            os.kill(parent, signal.SIGUSR1)
            time.sleep(0.001)
        os._exit(0)
    try:
        semaphore.acquire()
        start = time.monotonic()
        while len(seen) < 10:
            with pytest.raises(TimeoutError):
                semaphore.acquire(timeout=0.1)
            assert time.monotonic() - start >= 0.1
    finally:
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)
        signal.signal(signal.SIGUSR1, former)


def test_a_killed_holder_keeps_it(semaphore, forked):
    """As documented: a POSIX semaphore has no owner."""
    child = forked(holding, semaphore)
    child.wait_ready()
    child.kill()
    child.wait()
    assert semaphore.value == 0
    semaphore.release()  # anybody may


def test_a_killed_waiter_takes_nothing_with_it(semaphore, forked):
    semaphore.acquire()
    children = [forked(holding, semaphore) for _ in range(4)]
    for child in children:
        eventually(lambda: asleep(child.pid, within="futex"))  # noqa: B023
        child.kill()
        child.wait()
    semaphore.release()
    assert semaphore.acquire(timeout=PATIENCE)


# --- opening ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["", "/", "free", "//free", "/a/b", "/a\0b", "/.."])
def test_a_name_that_is_none(name):
    with pytest.raises(ValueError, match="name must be a slash and a word without slashes") as caught:
        Semaphore(name, create=True)
    assert repr(name) in str(caught.value)


def test_the_longest_name():
    with pytest.raises(ValueError, match="at most 251 bytes after the slash, not 252"):
        Semaphore("/" + "x" * 252, create=True)
    longest = Semaphore("/" + "x" * 251, create=True)
    longest.unlink()
    longest.close()


@pytest.mark.parametrize("value", [-1, 1 << 31])
def test_a_value_out_of_range(value):
    with pytest.raises(ValueError, match=f"value must be an integer from 0 to 2147483647, not {value}"):
        Semaphore(NAME, value, create=True)


def test_the_largest_value():
    semaphore = Semaphore(NAME, 2147483647, create=True)
    with pytest.raises(OSError, match="release of POSIX semaphore '/ipckit-test'") as caught:
        semaphore.release()
    assert caught.value.errno == errno.EOVERFLOW
    semaphore.unlink()
    semaphore.close()


def test_it_is_not_there_and_it_is_there(semaphore):
    with pytest.raises(FileNotFoundError, match="POSIX semaphore '/ipckit-none'") as caught:
        Semaphore("/ipckit-none")
    assert caught.value.errno == errno.ENOENT
    with pytest.raises(FileExistsError, match="POSIX semaphore '/ipckit-test'") as caught:
        Semaphore(NAME, create=True, exclusive=True)
    assert caught.value.errno == errno.EEXIST
    with pytest.raises(ValueError, match="needs create=True"):
        Semaphore(NAME, exclusive=True)
    again = Semaphore(NAME, 5, create=True)
    assert again.value == 1, "it was opened, not made"
    again.close()


@pytest.mark.parametrize("mask", [0, 0o077])
def test_the_umask_neither_cuts_nor_widens_the_mode(mask):
    former = os.umask(mask)
    try:
        semaphore = Semaphore(NAME, create=True, mode=0o660)
        assert stat.S_IMODE(FILE.stat().st_mode) == 0o660
        semaphore.unlink()
        semaphore.close()
    finally:
        os.umask(former)
    with pytest.raises(ValueError, match="0o4600"):
        Semaphore(NAME, create=True, mode=0o4600)


def test_one_of_fifty_creators_wins_and_all_see_the_value(forked):
    start, go = os.pipe()

    def race(ready):
        os.close(go)
        ready()
        os.read(start, 1)
        try:
            Semaphore(NAME, 7, create=True, exclusive=True).close()
        except FileExistsError:
            semaphore = Semaphore(NAME, 9, create=True)
            assert semaphore.value == 7
            semaphore.close()
            raise SystemExit(3) from None

    children = [forked(race) for _ in range(50)]
    for child in children:
        child.wait_ready()
    os.close(start)
    os.close(go)
    assert sorted(child.wait() for child in children) == [0] + [3] * 49
    semaphore = Semaphore(NAME)
    semaphore.unlink()
    semaphore.close()


def plant(kind, target):
    if kind == "link":
        FILE.symlink_to(target)
        return errno.ELOOP
    if kind == "pipe":
        os.mkfifo(FILE)
        return errno.EINVAL
    if kind == "folder":
        FILE.mkdir()
        return errno.EISDIR
    FILE.write_bytes(b"some other file")
    return errno.EINVAL


@pytest.mark.parametrize("kind", ["link", "pipe", "folder", "file"])
def test_what_somebody_planted_is_refused_and_untouched(kind, tmp_path):
    target = tmp_path / "target"
    target.write_bytes(bytes(32))
    number = plant(kind, target)
    try:
        for create in (False, True):
            with pytest.raises(OSError, match="POSIX semaphore '/ipckit-test' is no") as caught:
                Semaphore(NAME, create=create)
            assert caught.value.errno == number
        assert target.read_bytes() == bytes(32)
    finally:
        FILE.rmdir() if kind == "folder" else FILE.unlink()


@pytest.mark.skipif(os.geteuid() != 0, reason="needs root, to become somebody else")
def test_another_users_is_opened_on_purpose_only(forked):
    semaphore = Semaphore(NAME, create=True, mode=0o666)
    os.chown(FILE, NOBODY, NOBODY)
    with pytest.raises(
        PermissionError, match=f"belongs to user {NOBODY}, not to 0; owner={NOBODY} opens"
    ) as caught:
        Semaphore(NAME)
    assert caught.value.errno == errno.EPERM
    other = Semaphore(NAME, owner=NOBODY)
    assert other.value == 1
    other.close()
    os.chown(FILE, 0, 0)
    os.chmod(FILE, 0o600)

    def nobody(ready):
        os.setgroups([])
        os.setgid(NOBODY)
        os.setuid(NOBODY)
        with pytest.raises(PermissionError, match="POSIX semaphore '/ipckit-test'") as caught:
            Semaphore(NAME, owner=0)
        assert caught.value.errno == errno.EACCES

    assert forked(nobody).wait() == 0
    semaphore.unlink()
    semaphore.close()


# --- with others -----------------------------------------------------------------------------------


def test_with_a_c_program_both_ways(semaphore):
    peer("semaphore-wait", NAME)
    assert semaphore.value == 0
    peer("semaphore-post", NAME)
    assert semaphore.acquire(timeout=PATIENCE)


def test_a_semaphore_that_a_c_program_made():
    peer("semaphore-create", NAME, 3)
    semaphore = Semaphore(NAME)
    assert semaphore.value == 3
    semaphore.unlink()
    semaphore.close()


def test_with_posix_ipc_both_ways(semaphore):
    assert python("s = posix_ipc.Semaphore(sys.argv[1]); s.acquire(5); print(s.value)", NAME) == "0\n"
    thread, came = in_thread(lambda: semaphore.acquire(timeout=PATIENCE))
    eventually(lambda: asleep(os.getpid(), thread.native_id, within="futex"))
    python("posix_ipc.Semaphore(sys.argv[1]).release()", NAME)
    thread.join(PATIENCE)
    assert came == [True]


# --- closing and removing --------------------------------------------------------------------------


def test_close_ends_the_waits_of_other_threads(semaphore):
    def wait():
        with pytest.raises(Closed, match="POSIX semaphore '/ipckit-test' is closed"):
            semaphore.acquire()
        ended.append(True)

    ended = []
    semaphore.acquire()
    threads = [threading.Thread(target=wait) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        eventually(lambda: asleep(os.getpid(), thread.native_id, within="futex"))  # noqa: B023
    semaphore.unlink()
    semaphore.close()
    for thread in threads:
        thread.join(PATIENCE)
    assert ended == [True] * 3
    gc.collect()  # tracebacks hold the handle
    assert "ipckit-test" not in Path("/proc/self/maps").read_text()


def test_closed_is_closed(semaphore):
    semaphore.unlink()
    semaphore.close()
    semaphore.close()
    assert "closed" in repr(semaphore)
    for call in (
        semaphore.acquire,
        lambda: semaphore.acquire(0),
        semaphore.release,
        lambda: semaphore.value,
        semaphore.__enter__,
        lambda: pickle.dumps(semaphore),
    ):
        with pytest.raises(Closed, match="POSIX semaphore '/ipckit-test' is closed"):
            call()


def test_close_then_unlink(semaphore):
    semaphore.close()
    semaphore.unlink()
    assert not registry.records()
    later = Semaphore(NAME, create=True)
    later.close()
    with pytest.raises(FileNotFoundError, match="whose name is that of a later semaphore now"):
        semaphore.unlink()
    later.unlink()
    with pytest.raises(FileNotFoundError, match="POSIX semaphore '/ipckit-test'"):
        later.unlink()


def test_removed_while_in_use(semaphore, forked):
    def wait(ready):
        ready()
        semaphore.acquire()

    semaphore.acquire()
    child = forked(wait)
    child.wait_ready()
    semaphore.unlink()
    with pytest.raises(FileNotFoundError, match=NAME) as caught:
        semaphore.unlink()
    assert caught.value.errno == errno.ENOENT
    semaphore.release()
    assert child.wait() == 0
    semaphore.close()


def test_a_later_semaphore_of_the_same_name_is_not_ours_to_remove(semaphore):
    semaphore.unlink()
    data = pickle.dumps(semaphore)
    later = Semaphore(NAME, create=True, exclusive=True)
    for verb in (semaphore.unlink, lambda: pickle.loads(data)):
        with pytest.raises(FileNotFoundError, match="name is that of a later semaphore"):
            verb()
    later.unlink()
    later.close()
    semaphore.close()


def test_it_pickles_by_name(semaphore):
    other = pickle.loads(pickle.dumps(semaphore))
    other.acquire()
    other.close()
    assert semaphore.value == 0


def test_fork_while_another_thread_waits():
    code = f"""if 1:
        import os, threading, time
        from ipckit.posix import Semaphore
        semaphore = Semaphore({NAME!r}, 0, create=True)
        thread = threading.Thread(target=semaphore.acquire)
        thread.start()
        while "futex" not in open(f"/proc/self/task/{{thread.native_id}}/wchan").read():
            time.sleep(0.001)
        pid = os.fork()
        if pid == 0:
            semaphore.release()
            semaphore.close()
            os._exit(0)
        assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0
        thread.join()
        semaphore.unlink()
        semaphore.close()
    """
    subprocess.run(
        [sys.executable, "-W", "ignore::DeprecationWarning", "-c", code], check=True, timeout=PATIENCE
    )


def test_it_is_recorded(semaphore):
    def roles():
        return {(found.role, found.left) for found in registry.records() if found.ident == NAME}

    assert roles() == {("creator", False)}
    semaphore.close()
    assert roles() == {("creator", True)}
    last = Semaphore(NAME)
    last.unlink()
    assert roles() == set()
    last.close()


def test_what_could_not_be_recorded_is_not_made(forked):
    def unrecorded(ready):
        def refuse(*_, **__):
            raise OSError(errno.ENOSPC, "no inode left")

        registry.enter = refuse
        with pytest.raises(OSError, match="no inode left"):
            Semaphore(NAME, create=True)
        with pytest.raises(posix_ipc.ExistentialError):
            posix_ipc.Semaphore(NAME)

    assert forked(unrecorded).wait() == 0
