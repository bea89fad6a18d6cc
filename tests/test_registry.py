import contextlib
import ctypes
import errno
import os
import random
import resource
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from conftest import PATIENCE, eventually
from procfs import state

import ipckit
from ipckit import posix, registry, sysv

KIND, IDENT = "posix-queue", "/jobs"


def ours(kind=KIND, ident=IDENT):
    return [record for record in registry.records() if (record.kind, record.ident) == (kind, ident)]


def drop_all():
    with registry.cleaning():
        for record in registry.records():
            registry.drop(record)


@pytest.fixture(autouse=True)
def an_empty_registry():
    drop_all()  # of a test before that failed


def enter(created=True, birth="7.7", kind=KIND, ident=IDENT):
    with registry.entering():
        return registry.enter(kind, ident, created=created, birth=birth)


# --- what a record says ----------------------------------------------------------------------------


def test_a_record_says_who_made_what_and_when():
    before = time.time()
    member = enter()
    (record,) = ours()
    assert (record.kind, record.ident, record.birth) == (KIND, IDENT, "7.7")
    assert (record.role, record.left, record.uid) == ("creator", False, os.geteuid())
    assert record.process.pid == os.getpid()
    assert record.process.namespace == os.stat("/proc/self/ns/pid").st_ino
    assert record.process.state() == "alive"
    assert before - 0.01 <= record.time <= time.time() + 0.01
    assert record.command == Path("/proc/self/comm").read_text().strip()
    member.forget()
    assert ours() == []


@pytest.mark.parametrize(
    "ident", ["/ with blanks", "/ünïcode", "/line\nbreak", "/%41", "/" + "x" * 254, "/\udc80"]
)
def test_any_name_comes_back_as_it_was(ident):
    member = enter(ident=ident)
    assert [record.ident for record in registry.records()] == [ident]
    member.forget()


def test_an_unknown_kind_is_refused():
    with pytest.raises(ValueError, match="not 'teapot'"):
        registry.enter("teapot", "1", created=True)


def test_the_folder_is_only_ours_to_write_whatever_the_umask():
    old = os.umask(0)
    try:
        member = enter()
        mode = os.stat(f"/dev/shm/ipckit-{os.geteuid()}").st_mode
    finally:
        os.umask(old)
    assert mode & 0o777 == 0o755
    member.forget()


# --- leaving ---------------------------------------------------------------------------------------


def test_a_user_takes_its_record_along():
    enter(created=False).leave()
    assert ours() == []


def test_the_creator_leaves_word_that_it_left_on_purpose():
    member = enter()
    member.leave()
    member.leave()
    (record,) = ours()
    assert (record.left, record.birth) == (True, "7.7")
    again = enter(created=False)
    again.forget()
    assert ours() == []


def test_the_record_lasts_as_long_as_the_last_handle():
    first, second = enter(created=False), enter(created=False)
    first.leave()
    first.leave()
    assert len(ours()) == 1
    second.leave()
    assert ours() == []


def test_forgetting_takes_the_records_of_all_processes(forked):
    def user(ready):
        member = enter(created=False)
        ready()
        signal.pause()
        member.leave()

    member = enter()
    child = forked(user)
    child.wait_ready()
    assert {record.role for record in ours()} == {"creator", "user"}
    member.forget()
    assert ours() == []


def test_the_records_of_a_removed_object_do_not_take_along_those_of_its_successor():
    first = enter(birth="1.1")
    second = enter(birth="1.2")  # between the unlink() and the forget() of the first
    first.forget()
    assert [record.birth for record in ours()] == ["1.2"]
    first.leave()
    second.leave()
    assert [(record.birth, record.left) for record in ours()] == [("1.2", True)]
    drop_all()


def test_a_lost_record_is_written_again():
    first = enter(created=False)
    drop_all()
    second = enter(created=False)
    assert len(ours()) == 1
    first.leave()
    assert len(ours()) == 1
    second.leave()


def test_a_record_that_can_not_be_written_leaves_nothing(forked):
    def child(ready):
        libc = ctypes.CDLL(None)
        if libc.mount(b"few", b"/dev/shm", b"tmpfs", 0, b"nr_inodes=4"):
            sys.exit(77)
        with pytest.raises(OSError, match="posix-queue@") as caught:
            enter()
        try:
            assert caught.value.errno == errno.ENOSPC
            registry.tidy()
            assert os.listdir("/dev/shm") == []
        finally:
            libc.umount2(b"/dev/shm", 2)

    status = forked(child).wait()
    if status == 77:
        pytest.skip("may not mount")
    assert status == 0


def test_without_a_descriptor_nothing_is_left(forked):
    def child(ready):
        resource.setrlimit(resource.RLIMIT_NOFILE, (0, 100))
        with pytest.raises(OSError, match="lock") as caught:
            enter()
        assert caught.value.errno == errno.EMFILE
        resource.setrlimit(resource.RLIMIT_NOFILE, (100, 100))
        assert os.listdir("/dev/shm") == []

    assert forked(child).wait() == 0


def test_the_lock_can_be_opened_again_whatever_the_umask():
    old = os.umask(0o777)
    try:
        member = enter()
    finally:
        os.umask(old)
    lock = os.stat(f"/dev/shm/ipckit-{os.geteuid()}/lock")
    assert lock.st_mode & 0o777 == 0o600
    member.forget()


def test_a_cleaner_that_forks_does_not_wait_for_itself(forked, monkeypatch):
    monkeypatch.setattr(registry, "_PATIENCE", 10 * PATIENCE)  # or it would wait, and then do without
    member = enter()
    with registry.cleaning():
        assert forked(lambda ready: None).wait() == 0
    member.forget()


def test_a_new_birth_reaches_the_record_of_the_creator(forked):
    def other(ready):
        user = enter(created=False, birth="", kind="sysv-queue")
        user.refresh("8.8")
        user.leave()
        member.leave()  # came with the fork

    member = enter(kind="sysv-queue")
    member.refresh("9.9")
    assert ours("sysv-queue")[0].birth == "9.9"
    assert forked(other).wait() == 0
    assert [record.birth for record in ours("sysv-queue")] == ["8.8"]
    member.forget()


# --- processes -------------------------------------------------------------------------------------


def test_a_killed_process_is_dead_before_and_after_it_is_reaped(forked):
    def user(ready):
        enter(created=False)
        ready()
        signal.pause()

    child = forked(user)
    child.wait_ready()
    (record,) = ours()
    assert record.process.state() == "alive"
    child.kill(signal.SIGSTOP)
    eventually(lambda: state(child.pid) == "T")
    assert record.process.state() == "alive"
    child.kill()
    os.waitid(os.P_PID, child.pid, os.WEXITED | os.WNOWAIT)  # a zombie now
    assert record.process.state() == "dead"
    child.wait()
    assert record.process.state() == "dead"
    drop_all()
    assert ours() == []


def test_a_later_process_of_the_same_number_is_another():
    member = enter()
    myself = ours()[0].process
    assert myself._replace(start=myself.start + 1).state() == "dead"
    member.forget()


def test_a_main_thread_that_ended_first_is_no_dead_process():
    script = """
import ctypes, os, signal, threading
import ipckit
from ipckit import posix, registry, sysv
with registry.entering():
    registry.enter("posix-queue", "/jobs", created=False)
thread = threading.Thread(target=lambda: (os.write(1, b"."), os.read(0, 1), os._exit(0)))
thread.start()
ctypes.CDLL(None).pthread_exit(None)
"""
    with subprocess.Popen(
        [sys.executable, "-c", script], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    ) as child:
        assert child.stdout.read(1) == b"."
        eventually(lambda: state(child.pid) == "Z")
        (record,) = ours()
        assert record.process.state() == "alive"
        child.stdin.close()
    assert record.process.state() == "dead"
    drop_all()


def test_a_process_of_another_pid_namespace_is_unknown():
    script = (
        "from ipckit import registry\n"
        "with registry.entering(): registry.enter('posix-queue', '/jobs', created=True)\n"
    )
    done = subprocess.run(
        ["unshare", "--pid", "--fork", "--mount-proc", sys.executable, "-c", script],
        capture_output=True,
        text=True,
    )
    if "unshare" in done.stderr:
        pytest.skip(done.stderr)
    (record,) = ours()
    assert record.process.pid <= 2
    assert record.process.state() == "unknown"
    drop_all()


def test_nobody_is_judged_by_a_foreign_proc():
    script = (
        "from ipckit import registry\n"
        "with registry.entering(): member = registry.enter('posix-queue', '/jobs', created=True)\n"
        "print(registry.records()[0].process.state())\n"
        "member.forget()\n"
    )
    done = subprocess.run(
        ["unshare", "--pid", "--fork", sys.executable, "-c", script], capture_output=True, text=True
    )
    if "unshare" in done.stderr:
        pytest.skip(done.stderr)
    assert (done.stdout, done.stderr) == ("unknown\n", "")


# --- fork ------------------------------------------------------------------------------------------


def test_a_child_is_recorded_when_fork_returns(forked):
    def child(ready):
        assert {record.process.pid for record in ours()} == {os.getpid(), os.getppid()}
        assert {record.role for record in ours()} == {"creator", "user"}
        member.leave()
        assert [record.process.pid for record in ours()] == [os.getppid()]

    member = enter()
    assert forked(child).wait() == 0
    assert [(record.role, record.left) for record in ours()] == [("creator", False)]
    member.forget()


def test_a_handle_dropped_without_close_is_not_passed_on_but_stays_on_record(forked):
    member = enter()
    del member
    assert forked(lambda ready: sys.exit(len(ours()))).wait() == 1
    again = enter(created=False)
    assert [record.role for record in ours()] == ["creator"]
    again.forget()


def test_no_cleaner_comes_between_fork_and_the_record_of_the_child():
    script = """
import os, signal
os.register_at_fork(after_in_child=lambda: os.kill(os.getpid(), signal.SIGSTOP))
import ipckit
from ipckit import posix, registry, sysv
with registry.entering():
    member = registry.enter("posix-queue", "/jobs", created=True)
child = os.fork()
if child == 0:
    signal.pause()
os.waitid(os.P_PID, child, os.WSTOPPED)
os.write(1, b"%d\\n" % child)
os.kill(os.getpid(), signal.SIGKILL)
"""
    with subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.PIPE) as parent:
        child = int(parent.stdout.readline())
        parent.wait()
    try:
        (record,) = ours()
        assert record.process.state() == "dead"  # the only one on record, and yet the object is in use
        with pytest.raises(TimeoutError) as caught, registry.cleaning(timeout=0.1):
            pass
        assert caught.value.errno == errno.ETIMEDOUT
        assert f"lock of /dev/shm/ipckit-{os.geteuid()}" in str(caught.value)
        os.kill(child, signal.SIGCONT)
        with registry.cleaning():
            assert "alive" in [record.process.state() for record in ours() if record.process.pid == child]
    finally:
        os.kill(child, signal.SIGKILL)
        drop_all()


# --- the lock and the folder -------------------------------------------------------------------------


def test_a_cleaner_waits_for_those_who_enter_and_they_for_it(forked):
    def inside(ready, lock):
        with lock():
            ready()
            signal.pause()

    child = forked(inside, registry.entering)
    child.wait_ready()
    with registry.entering():
        pass
    with pytest.raises(TimeoutError), registry.cleaning(timeout=0.05):
        pass
    child.kill()
    child.wait()
    cleaner = forked(inside, registry.cleaning)
    cleaner.wait_ready()
    with pytest.raises(TimeoutError), registry.cleaning(timeout=0.05):
        pass
    cleaner.kill()
    cleaner.wait()
    with registry.cleaning():
        pass


def test_what_a_kill_in_the_middle_leaves_is_swept():
    member = enter()
    place = os.path.dirname(ours()[0].path)
    dead = subprocess.Popen(["true"])
    start = Path(f"/proc/{dead.pid}/stat").read_text().rpartition(")")[2].split()[19]
    dead.wait()
    name = f"{dead.pid}.{start}.{os.stat('/proc/self/ns/pid').st_ino}.140"
    os.symlink("half", f"{place}/{name}")
    os.mkdir(os.path.join(os.path.dirname(place), "posix-queue@0123456789abcdef"))
    with registry.cleaning():
        assert name not in os.listdir(place)
        assert len(ours()) == 1
    member.leave()
    drop_all()


def test_kills_at_any_moment_leave_nothing_that_a_cleaner_cannot_clean(forked):
    def busy(ready):
        ready()
        while True:
            user, maker = enter(created=False, ident="/shared"), enter(ident=f"/{os.getpid()}")
            maker.leave()
            user.leave()
            enter(created=False, ident=f"/{os.getpid()}").forget()

    for _ in range(10):
        children = [forked(busy) for _ in range(3)]
        for child in children:
            child.wait_ready()
        time.sleep(random.uniform(0, 0.01))  # the moment of the kill, not a wait for anything
        for child in children:
            child.kill()
            child.wait()
    with registry.cleaning():
        for record in registry.records():
            assert record.process.state() == "dead"
            registry.drop(record)
    assert not os.path.exists(f"/dev/shm/ipckit-{os.geteuid()}")


def test_many_processes_enter_and_leave_and_the_folder_goes_with_the_last(forked):
    def busy(ready, number):
        for turn in range(100):
            user, maker = enter(created=False, ident="/shared"), enter(ident=f"/{number}.{turn}")
            assert any(record.process.pid == os.getpid() for record in ours(ident="/shared"))
            maker.forget()
            user.leave()

    children = [forked(busy, number) for number in range(4)]
    assert [child.wait() for child in children] == [0] * 4
    registry.tidy()
    assert not os.path.exists(f"/dev/shm/ipckit-{os.geteuid()}")


def test_the_folder_goes_when_the_last_process_ends():
    script = (
        "from ipckit import registry\n"
        "with registry.entering(): member = registry.enter('posix-queue', '/jobs', created=True)\n"
        "member.forget()\n"
    )
    subprocess.run([sys.executable, "-c", script], check=True)
    assert os.listdir("/dev/shm") == []


@pytest.mark.skipif(os.geteuid() != 0, reason="needs root to become somebody else")
def test_a_folder_that_somebody_else_made_is_refused(forked):
    def child(ready):
        os.setresuid(65534, 65534, 65534)
        with pytest.raises(PermissionError) as caught:
            enter()
        assert caught.value.errno == errno.EPERM
        assert "/dev/shm/ipckit-65534 belongs to user 0, mode drwxr-xr-x" in str(caught.value)
        assert ours() == []

    os.mkdir("/dev/shm/ipckit-65534", 0o755)
    try:
        os.symlink("1 creator 0 1 0 - /jobs x", "/dev/shm/ipckit-65534/1.1.1")
        assert forked(child).wait() == 0
        assert registry.records() == []
    finally:
        os.unlink("/dev/shm/ipckit-65534/1.1.1")
        os.rmdir("/dev/shm/ipckit-65534")


@pytest.mark.skipif(os.geteuid() != 0, reason="needs root to make a file of another user")
def test_a_link_at_the_place_of_the_folder_is_refused(tmp_path):
    path = f"/dev/shm/ipckit-{os.geteuid()}"
    os.symlink(tmp_path, path)
    try:
        with pytest.raises(NotADirectoryError, match="ipckit"):
            enter()
        assert os.listdir(tmp_path) == []
    finally:
        os.unlink(path)


@pytest.mark.skipif(os.geteuid() != 0, reason="needs root to become somebody else")
def test_records_of_other_users_can_be_read_but_not_dropped(forked):
    def user(ready):
        os.setresuid(65534, 65534, 65534)
        member = enter(created=False)
        ready()
        signal.pause()
        member.leave()

    def reader(ready):
        os.setresuid(65533, 65533, 65533)
        (record,) = ours()
        assert (record.uid, record.process.state()) == (65534, "alive")
        with pytest.raises(PermissionError):
            registry.drop(record)

    child = forked(user)
    child.wait_ready()
    try:
        assert forked(reader).wait() == 0
    finally:
        child.kill()
        child.wait()
        for record in ours():
            registry.drop(record)
        with contextlib.suppress(OSError):
            os.unlink("/dev/shm/ipckit-65534/lock")
            os.rmdir("/dev/shm/ipckit-65534")


NAME = "locked-out"
OPENING = {
    f"memory segment '{NAME}'": lambda: ipckit.SharedMemory(100, name=NAME, create=True),
    f"queue '{NAME}'": lambda: ipckit.Queue.open(NAME),
    f"POSIX queue '/{NAME}'": lambda: posix.MessageQueue(f"/{NAME}", create=True),
    f"POSIX memory '/{NAME}'": lambda: posix.SharedMemory(f"/{NAME}", 100, create=True),
    f"POSIX semaphore '/{NAME}'": lambda: posix.Semaphore(f"/{NAME}", create=True),
    "System V queue (key 0x00000011)": lambda: sysv.MessageQueue(0x11, create=True),
    "System V segment (key 0x00000011)": lambda: sysv.SharedMemory(0x11, 100, create=True),
    "System V semaphore (key 0x00000011)": lambda: sysv.Semaphore(0x11, create=True),
    "System V queue 7": lambda: sysv.MessageQueue.from_id(7),
    "System V segment 7": lambda: sysv.SharedMemory.from_id(7),
    "System V semaphore 7": lambda: sysv.Semaphore.from_id(7),
}


@pytest.mark.parametrize("what", OPENING)
def test_who_is_locked_out_is_told_of_what(what, monkeypatch):
    monkeypatch.setattr(registry, "_PATIENCE", 0.01)
    with registry.cleaning(), pytest.raises(TimeoutError) as caught:
        OPENING[what]()
    assert caught.value.errno == errno.ETIMEDOUT
    assert caught.value.filename == (
        f"{what}: lock of /dev/shm/ipckit-{os.geteuid()}, which another process holds"
    )
