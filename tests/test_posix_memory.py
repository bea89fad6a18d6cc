import contextlib
import errno
import os
import pickle
import resource
import signal
import stat
import subprocess
import sys
from pathlib import Path

import numpy as np
import posix_ipc
import pytest
from conftest import PATIENCE
from test_posix_queue import NOBODY, peer, python

import ipckit.posix.memory
from ipckit import Closed, registry
from ipckit.posix import SharedMemory

NAME = "/ipckit-test"
FILE = Path("/dev/shm/ipckit-test")


@pytest.fixture
def shared():
    with SharedMemory(NAME, 10_000, create=True, exclusive=True) as made:
        yield made
        with contextlib.suppress(Closed, FileNotFoundError):
            made.unlink()


def as_nobody():
    os.setgroups([])
    os.setgid(NOBODY)
    os.setuid(NOBODY)


# --- the memory ------------------------------------------------------------------------------------


def test_bytes_and_arrays_of_the_exact_size(shared):
    assert shared.size == len(shared.buf) == FILE.stat().st_size == 10_000
    assert FILE.stat().st_blocks * 512 >= 10_000, "allocated, not only promised"
    shared.buf[9_990:] = b"0123456789"
    with SharedMemory(NAME, 10_000) as other:
        assert bytes(other.buf[9_990:]) == b"0123456789"
        other.asarray(np.float64, (10, 10), offset=800)[3, 4] = 1.5
    assert shared.asarray("f8", 100, offset=800)[34] == 1.5


def test_read_only(shared):
    shared.buf[:5] = b"hello"
    with SharedMemory(NAME, readonly=True) as reader:
        assert bytes(reader.buf[:5]) == b"hello"
        with pytest.raises(TypeError, match="read-only"):
            reader.buf[0] = 1
        assert not reader.asarray("u1").flags.writeable


def test_no_close_while_a_view_lives(shared):
    view = shared.buf
    with pytest.raises(BufferError, match="POSIX memory '/ipckit-test' still has views"):
        shared.close()
    view[0] = 7
    shared.close(defer=True)
    assert view[0] == 7
    with pytest.raises(Closed, match="POSIX memory '/ipckit-test' is closed"):
        shared.buf  # noqa: B018
    with SharedMemory(NAME) as last:
        last.unlink()


def test_a_forked_child_has_it_too(shared, forked):
    def write(ready):
        shared.buf[:5] = b"child"
        shared.close()

    assert forked(write).wait() == 0
    assert bytes(shared.buf[:5]) == b"child"


def test_a_child_killed_while_it_writes(shared, forked):
    def write(ready):
        view = shared.buf
        view[0] = 1
        ready()
        while True:
            view[1:] = bytes(9_999)

    child = forked(write)
    child.wait_ready()
    child.kill()
    assert child.wait() == -signal.SIGKILL
    assert shared.buf[0] == 1
    with SharedMemory(NAME) as other:
        assert other.size == 10_000


# --- opening ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["", "/", "frames", "//frames", "/a/b", "/a\0b", "/.", "/.."])
def test_a_name_that_is_none(name):
    with pytest.raises(ValueError, match="name must be a slash and a word without slashes") as caught:
        SharedMemory(name, 1, create=True)
    assert repr(name) in str(caught.value)


def test_the_longest_name():
    with pytest.raises(ValueError, match="at most 255 bytes after the slash, not 256"):
        SharedMemory("/" + "x" * 256, 1, create=True)
    with SharedMemory("/" + "x" * 255, 1, create=True) as longest:
        longest.unlink()


@pytest.mark.parametrize("size", [0, -1])
def test_no_size(size):
    with pytest.raises(ValueError, match=f"size must be an integer >= 1, not {size}"):
        SharedMemory(NAME, size, create=True)
    assert not FILE.exists()


def test_it_is_not_there_there_or_of_another_size(shared):
    with pytest.raises(FileNotFoundError, match="POSIX memory '/ipckit-none'") as caught:
        SharedMemory("/ipckit-none")
    assert caught.value.errno == errno.ENOENT
    with pytest.raises(FileExistsError, match="POSIX memory '/ipckit-test'") as caught:
        SharedMemory(NAME, 1, create=True, exclusive=True)
    assert caught.value.errno == errno.EEXIST
    with pytest.raises(ValueError, match="POSIX memory '/ipckit-test' has 10000 bytes, not 9999"):
        SharedMemory(NAME, 9_999, create=True)
    with SharedMemory(NAME, 10_000, create=True):
        pass


def test_what_contradicts_itself():
    for arguments, match in (
        ({"exclusive": True}, "needs create=True"),
        ({"create": True, "readonly": True}, "nobody could fill it"),
        ({"create": True, "mode": -1}, "mode must be"),
    ):
        with pytest.raises(ValueError, match=match):
            SharedMemory(NAME, 1, **arguments)


@pytest.mark.parametrize("mask", [0, 0o077])
def test_the_umask_neither_cuts_nor_widens_the_mode(mask):
    former = os.umask(mask)
    try:
        with SharedMemory(NAME, 1, create=True, mode=0o660) as shared:
            assert stat.S_IMODE(FILE.stat().st_mode) == 0o660
            shared.unlink()
    finally:
        os.umask(former)


def plant(kind, target):
    """The errno that it is refused with."""
    if kind == "symbolic link":
        FILE.symlink_to(target)
        return errno.ELOOP
    if kind == "hard link":
        os.link(target, FILE)
        return errno.EPERM
    if kind == "pipe":
        os.mkfifo(FILE)
        return errno.EINVAL
    FILE.mkdir()
    return errno.EISDIR


@pytest.mark.parametrize("kind", ["symbolic link", "hard link", "pipe", "folder"])
def test_what_somebody_planted_is_refused_and_untouched(kind):
    target = Path("/dev/shm/target")
    target.write_bytes(b"untouched")
    number = plant(kind, target)
    try:
        for arguments in ({}, {"readonly": True}, {"size": 9, "create": True}):
            with pytest.raises(
                OSError, match="POSIX memory '/ipckit-test' (is no file|has 2 names)"
            ) as caught:
                SharedMemory(NAME, **arguments)
            assert caught.value.errno == number
        with pytest.raises(FileExistsError):
            SharedMemory(NAME, 9, create=True, exclusive=True)
        assert target.read_bytes() == b"untouched"
    finally:
        target.unlink()
        FILE.rmdir() if kind == "folder" else FILE.unlink()


def test_empty_memory_of_another_program():
    FILE.touch(0o600)
    with pytest.raises(ValueError, match="POSIX memory '/ipckit-test' is empty"):
        SharedMemory(NAME)
    FILE.unlink()


@pytest.mark.skipif(os.geteuid() != 0, reason="needs root, to become somebody else")
def test_another_users_is_opened_on_purpose_only(shared, forked):
    os.chown(FILE, NOBODY, NOBODY)
    for arguments in ({}, {"create": True, "size": 10_000}):
        with pytest.raises(
            PermissionError, match=f"belongs to user {NOBODY}, not to 0; owner={NOBODY} opens"
        ) as caught:
            SharedMemory(NAME, **arguments)
        assert caught.value.errno == errno.EPERM
    with pytest.raises(PermissionError, match=rf"belongs to user {NOBODY}, not to 7\b"):
        SharedMemory(NAME, owner=7)
    with SharedMemory(NAME, owner=NOBODY) as other:
        assert other.size == 10_000
        with pickle.loads(pickle.dumps(other)) as again:
            assert again.size == 10_000
    os.chown(FILE, 0, 0)

    def nobody(ready):
        as_nobody()
        with pytest.raises(PermissionError, match="POSIX memory '/ipckit-test'") as caught:
            SharedMemory(NAME, owner=0)
        assert caught.value.errno == errno.EACCES

    assert forked(nobody).wait() == 0


def test_one_of_fifty_creators_wins_and_none_sees_a_part(forked):
    start, go = os.pipe()

    def race(ready):
        os.close(go)
        ready()
        os.read(start, 1)
        try:
            SharedMemory(NAME, 300_000, create=True, exclusive=True).close()
        except FileExistsError:
            with SharedMemory(NAME, 300_000, create=True):
                raise SystemExit(3) from None

    children = [forked(race) for _ in range(50)]
    for child in children:
        child.wait_ready()
    os.close(start)
    os.close(go)
    assert sorted(child.wait() for child in children) == [0] + [3] * 49
    with SharedMemory(NAME) as shared:
        shared.unlink()


# --- limits ----------------------------------------------------------------------------------------


@pytest.mark.skipif(os.geteuid() != 0, reason="needs root, to mount")
def test_a_full_file_system_is_an_error_and_no_signal():
    code = f"""if 1:
        import errno, os
        from ipckit import registry
        from ipckit.posix import SharedMemory
        try:
            SharedMemory({NAME!r}, 8 << 20, create=True)
        except OSError as error:
            assert error.errno == errno.ENOSPC, error
            print(error)
        registry.tidy()
        assert os.listdir("/dev/shm") == [], os.listdir("/dev/shm")
        with SharedMemory({NAME!r}, 500_000, create=True) as small:
            small.buf[:] = bytes(500_000)
            small.unlink()
    """
    mount = 'mount -t tmpfs -o size=1M shm /dev/shm && exec "$0" -c "$1"'
    done = subprocess.run(
        ["unshare", "-m", "sh", "-c", mount, sys.executable, code],
        capture_output=True,
        text=True,
        timeout=PATIENCE,
    )
    assert (done.returncode, done.stderr) == (0, "")
    assert "POSIX memory '/ipckit-test' of 8388608 bytes" in done.stdout
    assert "bytes are free" in done.stdout


def test_more_than_a_file_may_have(forked):
    def limited(ready):
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (1000, 1000))
        with pytest.raises(OSError, match="POSIX memory '/ipckit-test' of 2000 bytes") as caught:
            SharedMemory(NAME, 2000, create=True)
        assert caught.value.errno == errno.EFBIG
        assert not FILE.exists()

    assert forked(limited).wait() == 0


# --- with others -----------------------------------------------------------------------------------


def test_with_a_c_program_both_ways(shared):
    shared.buf[:6] = b"from u"
    assert peer("memory-read", NAME) == "10000 from u\n"
    peer("memory-write", NAME, "from C")
    assert bytes(shared.buf[:7]) == b"from C\0"


def test_memory_that_a_c_program_made():
    peer("memory-create", NAME, 777, "made by C")
    with SharedMemory(NAME) as shared:
        assert shared.size == 777
        assert bytes(shared.buf[:9]) == b"made by C"
        shared.unlink()


def test_with_posix_ipc_both_ways(shared):
    shared.buf[:7] = b"from us"
    code = """if 1:
        import mmap
        memory = posix_ipc.SharedMemory(sys.argv[1])
        view = mmap.mmap(memory.fd, memory.size)
        print(memory.size, view[:7])
        view[:7] = b"from it"
    """.replace("if 1:\n", "")
    assert python("\n".join(line.strip() for line in code.splitlines()), NAME) == "10000 b'from us'\n"
    assert bytes(shared.buf[:7]) == b"from it"


# --- closing and removing --------------------------------------------------------------------------


def test_closed_is_closed(shared):
    shared.unlink()
    shared.close()
    shared.close()
    assert shared.closed
    for call in (
        lambda: shared.buf,
        lambda: shared.asarray("u1"),
        shared.fileno,
        lambda: pickle.dumps(shared),
    ):
        with pytest.raises(Closed, match="POSIX memory '/ipckit-test' is closed"):
            call()


def test_close_then_unlink(shared):
    shared.close()
    shared.unlink()
    assert not registry.records()
    later = SharedMemory(NAME, 8, create=True)
    later.close()
    with pytest.raises(FileNotFoundError, match="whose name is that of later memory now"):
        shared.unlink()
    later.unlink()
    with pytest.raises(FileNotFoundError, match="POSIX memory '/ipckit-test'"):
        later.unlink()


def test_removed_while_in_use(shared, forked):
    def use(ready):
        ready()
        while shared.buf[0] == 0:
            pass
        shared.buf[1] = 1

    child = forked(use)
    child.wait_ready()
    shared.unlink()
    with pytest.raises(FileNotFoundError, match=NAME) as caught:
        shared.unlink()
    assert caught.value.errno == errno.ENOENT
    shared.buf[0] = 1
    assert child.wait() == 0
    assert shared.buf[1] == 1


def test_later_memory_of_the_same_name_is_not_ours_to_remove(shared):
    shared.unlink()
    data = pickle.dumps(shared)
    with SharedMemory(NAME, 5, create=True, exclusive=True) as later:
        for verb in (shared.unlink, lambda: pickle.loads(data)):
            with pytest.raises(FileNotFoundError, match="name is that of later memory"):
                verb()
        later.unlink()


def test_it_pickles_by_name(shared):
    with pickle.loads(pickle.dumps(shared)) as other:
        other.buf[0] = 9
    assert shared.buf[0] == 9
    with SharedMemory(NAME, readonly=True) as reader, pickle.loads(pickle.dumps(reader)) as other:
        assert other.readonly


def test_it_is_recorded(shared):
    def roles():
        return {(found.role, found.left) for found in registry.records() if found.ident == NAME}

    assert roles() == {("creator", False)}
    shared.close()
    assert roles() == {("creator", True)}
    with SharedMemory(NAME) as last:
        last.unlink()
    assert roles() == set()


@pytest.mark.parametrize("what", ["enter", "Mapping"])
def test_what_could_not_be_recorded_or_mapped_is_not_made(forked, what):
    def refused(ready):
        def refuse(*_, **__):
            raise OSError(errno.ENOMEM, "nothing left")

        if what == "enter":
            registry.enter = refuse
        else:
            ipckit.posix.memory.Mapping.__init__ = refuse
        fds = os.listdir("/proc/self/fd")
        with pytest.raises(OSError, match="nothing left"):
            SharedMemory(NAME, 100, create=True)
        assert os.listdir("/proc/self/fd") == fds
        with pytest.raises(posix_ipc.ExistentialError):
            posix_ipc.SharedMemory(NAME)

    assert forked(refused).wait() == 0


def test_a_creator_killed_in_the_middle_leaves_nothing(forked):
    def create(ready):
        ready()
        while True:
            with SharedMemory(NAME, 8 << 20, create=True) as made:
                made.unlink()

    for _ in range(5):
        child = forked(create)
        child.wait_ready()
        child.kill()
        child.wait()
        with contextlib.suppress(FileNotFoundError), SharedMemory(NAME) as whole:
            assert whole.size == 8 << 20
            whole.unlink()
    with registry.cleaning():
        for record in registry.records():
            registry.drop(record)
