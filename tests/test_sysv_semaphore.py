import contextlib
import copy
import errno
import itertools
import os
import pickle
import re
import signal
import subprocess
import sys
import tempfile
import textwrap
import threading
import time
from pathlib import Path

import pytest
import sysv_ipc
from conftest import PATIENCE, eventually
from procfs import wakeups

from ipckit import Closed, inventory, registry
from ipckit._native import lib
from ipckit.sysv import semaphore as semaphores
from ipckit.sysv.keys import ftok
from ipckit.sysv.semaphore import Semaphore, SemaphoreStat

ROOT = Path(__file__).resolve().parent.parent
PEER = ROOT / "build/peers/sysv_semaphore"
PROOF = os.environ.get("IPCKIT_PROOF") == "1"
NOBODY = 65534
TOLD = semaphores._PATIENCE  # seconds, as the docstring has them
projects = itertools.cycle(range(1, 256))


@pytest.fixture(autouse=True)
def patient(monkeypatch):
    """On a busy machine it takes a maker more than a second to give the value."""
    monkeypatch.setattr(semaphores, "_PATIENCE", PATIENCE)


@pytest.fixture
def key(tmp_path):
    """A (path, project) that no other test has."""
    return tmp_path, next(projects)


@pytest.fixture
def semaphore():
    made = Semaphore()
    yield made
    made.remove()
    made.close()


def peer(verb, key, *words):
    command = [PEER, verb, *map(str, (*key, *words))]
    return int(subprocess.run(command, capture_output=True, text=True, check=True, timeout=PATIENCE).stdout)


def hold(ready, semaphore):
    """A child that acquires, and holds until it is killed."""
    semaphore.acquire(timeout=PATIENCE)
    ready()
    signal.pause()


# --- a semaphore ---------------------------------------------------------------------------------


def test_acquire_and_release(semaphore):
    assert semaphore.value == 1
    assert semaphore.acquire() is True
    assert semaphore.value == 0
    semaphore.release()
    with semaphore as entered:
        assert entered is semaphore and semaphore.value == 0
    assert semaphore.value == 1 and not semaphore.closed


def test_a_value_of_zero_and_of_many():
    for value in (0, 1, 5, 32767):
        made = Semaphore(value=value)
        assert made.value == value
        made.remove()
        made.close()


def test_one_process_waits_for_the_other(key, forked):
    def child(ready):
        found = Semaphore(key, undo=False)
        ready()
        found.acquire(timeout=PATIENCE)
        found.close()

    made = Semaphore(key, 0, create=True, exclusive=True, undo=False)
    waiting = forked(child)
    waiting.wait_ready()
    eventually(lambda: made.waiting == 1)
    made.release()
    assert waiting.wait() == 0
    assert (made.value, made.waiting) == (0, 0)
    made.remove()
    made.close()


def test_the_time_out(semaphore):
    semaphore.acquire()
    for timeout in (0, 0.05):
        start = time.monotonic()
        with pytest.raises(TimeoutError, match=f"acquiring System V semaphore {semaphore.id}") as caught:
            semaphore.acquire(timeout=timeout)
        assert caught.value.errno == errno.ETIMEDOUT
        assert time.monotonic() - start >= timeout
    with pytest.raises(ValueError, match="-1"):
        semaphore.acquire(timeout=-1)


@contextlib.contextmanager
def stormed(handler):
    """A signal each millisecond."""
    former = signal.signal(signal.SIGUSR1, handler)
    parent = os.getpid()
    pid = os.fork()
    if pid == 0:
        while os.getppid() == parent:
            os.kill(parent, signal.SIGUSR1)
            time.sleep(0.001)
        os._exit(0)
    try:
        yield
    finally:
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)
        signal.signal(signal.SIGUSR1, former)


def test_signals_run_their_handlers_and_the_wait_goes_on(semaphore):
    """For ever, until the twentieth signal releases; then with a limit."""
    seen = []

    def handler(*_):
        seen.append(1)
        if len(seen) == 20:
            semaphore.release()

    semaphore.acquire()
    with stormed(handler):
        semaphore.acquire()
        assert len(seen) >= 20
        start = time.monotonic()
        with pytest.raises(TimeoutError):
            semaphore.acquire(timeout=0.1)
        assert time.monotonic() - start >= 0.1


@pytest.mark.parametrize("value", [0, 1])
def test_the_maker_gave_the_first_value(value):
    made = Semaphore(value=value)
    found = made.stat()
    assert (found.value, found.last_pid) == (value, os.getpid())
    assert found.operation_time > 0
    made.remove()
    made.close()


@pytest.mark.parametrize("value", [0, 3])
def test_an_orphan_whatever_its_value(value, forked):
    def maker(ready):
        made = Semaphore(value=value)
        tell.write(f"{made.id}")
        tell.flush()
        ready()
        signal.pause()

    with tempfile.TemporaryFile("w+") as tell:
        child = forked(maker)
        child.wait_ready()
        child.kill()
        child.wait()
        tell.seek(0)
        ident = tell.read()
    comm = Path("/proc/self/comm").read_text().strip()
    (found,) = [obj for obj in inventory.objects() if obj.id == f"sysv-semaphore:{ident}"]
    assert (found.verdict, found.why) == ("orphan", f"pid {child.pid} ({comm}) never closed it")
    assert inventory.collect() == [found]


def test_stat(semaphore, forked):
    before = semaphore.stat()
    assert isinstance(before, SemaphoreStat)
    assert (before.value, before.waiting, before.last_pid) == (1, 0, os.getpid())
    assert before.operation_time >= before.change_time > 0
    assert (before.mode, before.key, before.uid, before.creator_gid) == (0o600, 0, os.geteuid(), os.getegid())
    child = forked(lambda ready: semaphore.acquire())
    assert child.wait() == 0
    assert semaphore.stat().last_pid == child.pid


def test_set_changes_mode_and_owner(semaphore):
    semaphore.set(mode=0o640, uid=NOBODY, gid=NOBODY)
    found = semaphore.stat()
    assert (found.mode, found.uid, found.gid, found.creator_uid) == (0o640, NOBODY, NOBODY, os.geteuid())
    with pytest.raises(ValueError, match="0o1777"):
        semaphore.set(mode=0o1777)
    with pytest.raises(ValueError, match="uid must be .* not -5"):
        semaphore.set(uid=-5)


@pytest.mark.skipif(os.geteuid() != 0, reason="needs root, to become somebody else")
def test_only_the_owner_may_set_who_may_read_or_not(semaphore, forked):
    def stranger(ready):
        os.setresgid(NOBODY, NOBODY, NOBODY)
        os.setresuid(NOBODY, NOBODY, NOBODY)
        with pytest.raises(PermissionError, match=f"stat of System V semaphore {semaphore.id}") as caught:
            semaphore.stat()
        assert caught.value.errno == errno.EACCES
        with pytest.raises(PermissionError, match=f"setting System V semaphore {semaphore.id}") as caught:
            semaphore.set(mode=0o666)
        assert caught.value.errno == errno.EPERM

    assert forked(stranger).wait() == 0


def test_umask_has_no_part_in_the_mode():
    former = os.umask(0o077)
    try:
        made = Semaphore(mode=0o666)
        assert made.stat().mode == 0o666
        made.remove()
        made.close()
    finally:
        os.umask(former)


def test_by_id_and_by_pickle(semaphore):
    for make in (
        lambda it: Semaphore.from_id(it.id),
        lambda it: pickle.loads(pickle.dumps(it)),
        copy.copy,
        copy.deepcopy,
    ):
        found = make(semaphore)
        with found:
            assert semaphore.value == 0
        assert found.id == semaphore.id
        found.close()


def birth(semaphore):
    return [
        record.birth
        for record in registry.records()
        if record.kind == "sysv-semaphore" and record.ident == str(semaphore.id) and record.role == "creator"
    ]


def test_the_record_of_a_semaphore_follows_its_change_time_and_goes_with_it():
    made = Semaphore()
    assert birth(made) == [str(made.stat().change_time)]
    born = made.stat().change_time
    eventually(lambda: time.time() >= born + 1.1)  # the kernel's clock of seconds may lag by a tick
    made.value = 3
    assert made.stat().change_time > born
    assert birth(made) == [str(made.stat().change_time)]
    made.remove()
    assert birth(made) == []
    made.close()


def test_what_can_not_be_recorded_is_not_left_behind(monkeypatch):
    def full(*_, **__):
        raise OSError(errno.ENOSPC, "no inode left")

    monkeypatch.setattr(registry, "enter", full)
    with pytest.raises(OSError, match="no inode left"):
        Semaphore()  # the fixture of every test looks for what is left


# --- bad input -----------------------------------------------------------------------------------


@pytest.mark.parametrize("value", [-1, 32768])
def test_a_value_that_none_can_have(semaphore, value):
    with pytest.raises(ValueError, match=f"0 to 32767, not {value}"):
        Semaphore(value=value)
    with pytest.raises(ValueError, match=f"0 to 32767, not {value}"):
        semaphore.value = value
    assert semaphore.value == 1


def test_arguments_that_make_no_sense(key):
    with pytest.raises(ValueError, match="exclusive=True needs create=True"):
        Semaphore(key, exclusive=True)
    with pytest.raises(ValueError, match="0o10600"):
        Semaphore(key, create=True, mode=0o10600)


def test_not_there_and_there_already(key):
    with pytest.raises(FileNotFoundError, match="System V semaphore .*key 0x") as caught:
        Semaphore(key)
    assert caught.value.errno == errno.ENOENT
    made = Semaphore(key, create=True)
    with pytest.raises(FileExistsError, match="System V semaphore .*key 0x") as caught:
        Semaphore(key, create=True, exclusive=True)
    assert caught.value.errno == errno.EEXIST
    pickled = pickle.dumps(made)
    made.remove()
    with pytest.raises(FileNotFoundError, match=f"System V semaphore {made.id}"):
        pickle.loads(pickled)
    made.close()


def test_removed_while_blocked_and_used_afterwards(forked):
    made = Semaphore(value=0)

    def child(ready):
        ready()
        with pytest.raises(OSError, match=f"acquiring System V semaphore {made.id}") as caught:
            made.acquire(timeout=PATIENCE)
        assert caught.value.errno == errno.EIDRM

    blocked = forked(child)
    blocked.wait_ready()
    eventually(lambda: made.waiting == 1)
    made.remove()
    assert blocked.wait() == 0
    for verb in (made.acquire, made.release, made.stat, made.remove, lambda: made.set(mode=0)):
        with pytest.raises(OSError, match=f"System V semaphore {made.id}") as caught:
            verb()
        assert caught.value.errno == errno.EIDRM
    with pytest.raises(OSError, match="setting the value of") as caught:
        made.value = 1
    assert caught.value.errno == errno.EIDRM
    made.close()


@pytest.mark.skipif(os.geteuid() != 0, reason="needs root, to become somebody else")
def test_no_permission(key, forked):
    number = ftok(*key)

    def child(ready):
        os.setresgid(NOBODY, NOBODY, NOBODY)
        os.setresuid(NOBODY, NOBODY, NOBODY)
        with pytest.raises(PermissionError, match=f"semaphore {made.id}") as caught:
            Semaphore(number)
        assert caught.value.errno == errno.EACCES
        for verb in (made.acquire, made.release, made.stat, lambda: made.set(mode=0o666), made.remove):
            with pytest.raises(PermissionError, match=f"System V semaphore {made.id}"):
                verb()

    made = Semaphore(key, create=True)
    assert forked(child).wait() == 0
    made.remove()
    made.close()


def test_too_many_for_the_kernel():
    script = """
        from ipckit.sysv.semaphore import Semaphore
        made = []
        try:
            for _ in range(5):
                made.append(Semaphore())
        except OSError as error:
            print(len(made), error.errno, error)
        for one in made:
            one.remove()
            one.close()
    """
    shell = 'echo "32000 1024000000 500 3" > /proc/sys/kernel/sem; exec "$@"'
    command = ["unshare", "--ipc", "sh", "-ec", shell, "sh", sys.executable, "-c", textwrap.dedent(script)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=PATIENCE)
    if done.returncode and "unshare" in done.stderr:
        pytest.skip(f"no namespace of one's own here: {done.stderr}")
    made, number, message = done.stdout.strip().split(" ", 2)
    assert (int(made), int(number), done.stderr) == (3, errno.ENOSPC, "")
    assert re.search('semmni is 3; .*kernel.sem="32000 1024000000 500 6"', message), message


def test_beyond_the_largest_value(semaphore):
    full = Semaphore.from_id(semaphore.id, undo=False)
    full.value = 32767
    with pytest.raises(OSError, match=f"releasing System V semaphore {semaphore.id}") as caught:
        full.release()
    assert caught.value.errno == errno.ERANGE
    full.close()


def test_a_closed_handle(semaphore):
    found = Semaphore.from_id(semaphore.id)
    found.close()
    found.close()
    assert found.closed and repr(found).endswith("closed>")
    for verb in (
        found.acquire,
        found.release,
        found.stat,
        found.set,
        lambda: found.value,
        lambda: setattr(found, "value", 1),
        lambda: pickle.dumps(found),
    ):
        with pytest.raises(Closed, match=f"System V semaphore {semaphore.id} .* is closed"):
            verb()


def test_remove_after_close():
    made = Semaphore()
    made.close()
    made.remove()
    assert not registry.records()
    with pytest.raises(OSError, match=f"removing System V semaphore {made.id}") as caught:
        made.remove()
    assert caught.value.errno == errno.EIDRM


@pytest.mark.parametrize("timeout", [None, 10 * PATIENCE])
def test_a_close_by_another_thread_ends_the_wait(semaphore, timeout):
    found = Semaphore.from_id(semaphore.id)
    semaphore.acquire()
    ended = []

    def wait():
        with pytest.raises(Closed):
            found.acquire(timeout=timeout)
        ended.append(True)

    thread = threading.Thread(target=wait)
    thread.start()
    eventually(lambda: semaphore.waiting == 1)
    found.close()
    thread.join(PATIENCE)
    assert ended and semaphore.waiting == 0


def test_a_wait_beside_other_threads_is_as_long(semaphore):
    """Which then looks ten times a second whether the handle was closed, and sleeps between."""
    semaphore.acquire()
    done = threading.Event()
    other = threading.Thread(target=done.wait)
    other.start()
    start, before = time.monotonic(), wakeups(os.getpid())
    with pytest.raises(TimeoutError):
        semaphore.acquire(timeout=0.35)
    took = time.monotonic() - start
    assert took >= 0.35
    assert wakeups(os.getpid()) - before <= 10 + took / 0.1
    releaser = threading.Thread(target=lambda: (eventually(lambda: semaphore.waiting), semaphore.release()))
    releaser.start()
    semaphore.acquire()
    done.set()
    other.join()
    releaser.join()


# --- creation ------------------------------------------------------------------------------------


def race(ready, go, key, value, results):
    os.read(go, 1)
    made = Semaphore(key, value, create=True)
    os.write(results, made.value.to_bytes(2, "little"))
    made.close()


@pytest.mark.proof
@pytest.mark.parametrize("time", range(20 if PROOF else 2))
def test_fifty_creators_and_one_value(key, forked, time):
    """All give the same value, and a sum of two of them would show."""
    go, start = os.pipe()
    results, tell = os.pipe()
    children = [forked(race, go, key, 3, tell) for _ in range(50)]
    os.write(start, bytes(50))
    assert [child.wait() for child in children] == [0] * 50
    assert os.read(results, 1000) == (3).to_bytes(2, "little") * 50
    found = Semaphore(key)
    found.remove()
    found.close()
    for fd in (go, start, results, tell):
        os.close(fd)


def exclusive_race(ready, go, key, value, results):
    os.read(go, 1)
    try:
        Semaphore(key, value, create=True, exclusive=True).close()
    except FileExistsError:
        found = Semaphore(key)
        os.write(results, b"%5d" % found.value)
        found.close()
    else:
        os.write(results, b"%5d" % -value)


@pytest.mark.proof
@pytest.mark.parametrize("time", range(20 if PROOF else 2))
def test_fifty_creators_and_one_wins(key, forked, time):
    go, start = os.pipe()
    results, tell = os.pipe()
    children = [forked(exclusive_race, go, key, i, tell) for i in range(1, 51)]
    os.write(start, bytes(50))
    assert [child.wait() for child in children] == [0] * 50
    values = sorted(map(int, os.read(results, 1000).split()))
    winner = -values[0]
    assert 1 <= winner <= 50 and values[1:] == [winner] * 49
    found = Semaphore(key)
    assert found.value == winner
    found.remove()
    found.close()
    for fd in (go, start, results, tell):
        os.close(fd)


@pytest.fixture
def unfinished(key, forked):
    """The id of what a creator made that was killed before it gave the value."""

    def create(ready):
        lib.ik_sysv_semaphore_create(ftok(*key), 0o600)
        ready()
        signal.pause()

    creator = forked(create)
    creator.wait_ready()
    creator.kill()
    creator.wait()
    return lib.ik_sysv_semaphore_find(ftok(*key))


def test_who_comes_after_a_killed_creator_gives_the_value(key, forked, unfinished):
    go, start = os.pipe()
    results, tell = os.pipe()
    children = [forked(race, go, key, 4, tell) for _ in range(10)]
    os.write(start, bytes(10))
    assert [child.wait() for child in children] == [0] * 10
    assert os.read(results, 1000) == (4).to_bytes(2, "little") * 10
    assert lib.ik_sysv_semaphore_start(unfinished, 4) == -errno.EAGAIN, "nor can a creator that was only slow"
    found = Semaphore(key)
    assert (found.id, found.value) == (unfinished, 4)
    found.remove()
    found.close()
    for fd in (go, start, results, tell):
        os.close(fd)


def test_who_can_not_give_the_value_waits_for_it(key, forked, unfinished):

    def opener(ready):
        ready()
        found = Semaphore(key)
        assert found.value == 2
        found.close()

    waiting = forked(opener)
    waiting.wait_ready()
    assert lib.ik_sysv_semaphore_start(unfinished, 2) == 0
    assert waiting.wait() == 0
    found = Semaphore(key)
    found.remove()
    found.close()


def never(ident, key, create, monkeypatch):
    assert TOLD == 1
    monkeypatch.setattr(semaphores, "_PATIENCE", 0.1)
    with pytest.raises(TimeoutError, match=f"System V semaphore {ident} .* never gave a value") as caught:
        Semaphore(key, create=create)
    assert caught.value.errno == errno.ETIMEDOUT
    lib.ik_sysv_semaphore_remove(ident)


def test_a_value_that_never_comes_is_a_time_out(key, unfinished, monkeypatch):
    never(unfinished, key, False, monkeypatch)


def test_of_a_c_program_nobody_can_know_whether_it_is_dead_or_slow(key, monkeypatch):
    never(peer("unfinished", key), key, True, monkeypatch)


# --- undo ----------------------------------------------------------------------------------------


@pytest.mark.proof
def test_killed_holders_give_back(semaphore):
    for _ in range(1000 if PROOF else 100):
        holds, tell = os.pipe()
        pid = os.fork()
        if pid == 0:
            semaphore.acquire(timeout=PATIENCE)
            os.write(tell, b".")
            signal.pause()
        os.close(tell)
        assert os.read(holds, 1) == b"."
        assert semaphore.value == 0, "killed while it holds"
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)
        assert semaphore.value == 1
        os.close(holds)


def test_a_waiter_gets_what_a_killed_holder_had(semaphore, forked):
    holder = forked(hold, semaphore)
    holder.wait_ready()
    waiter = forked(hold, semaphore)
    eventually(lambda: semaphore.waiting == 1)
    holder.kill()
    waiter.wait_ready()
    assert semaphore.value == 0
    waiter.kill()
    waiter.wait()
    assert semaphore.value == 1


def test_without_undo_a_killed_holder_keeps_it(semaphore, forked):
    plain = Semaphore.from_id(semaphore.id, undo=False)
    holder = forked(hold, plain)
    holder.wait_ready()
    holder.kill()
    holder.wait()
    assert semaphore.value == 0
    plain.close()


def test_setting_the_value_makes_the_kernel_forget_undo(semaphore, forked):
    holder = forked(hold, semaphore)
    holder.wait_ready()
    semaphore.value = 5
    holder.kill()
    holder.wait()
    assert semaphore.value == 5


def test_undo_stops_at_zero(semaphore, forked):
    """Who released with undo takes it back at its end, but never below 0."""
    assert forked(lambda ready: semaphore.release()).wait() == 0
    assert semaphore.value == 1, "taken back"

    def child(ready):
        semaphore.release()
        ready()
        signal.pause()

    giver = forked(child)
    giver.wait_ready()
    assert semaphore.value == 2
    semaphore.acquire()
    semaphore.acquire()
    giver.kill()
    giver.wait()
    assert semaphore.value == 0, "not -1"


def test_a_child_does_not_undo_what_its_parent_holds(semaphore, forked):
    semaphore.acquire()
    assert forked(lambda ready: None).wait() == 0
    assert semaphore.value == 0


# --- interoperation ------------------------------------------------------------------------------


def test_with_a_c_program_both_ways(key):
    ident = peer("create", key, 3)
    found = Semaphore(key)
    assert (found.id, found.value) == (ident, 3)
    with found:
        assert peer("value", key) == 2
    found.remove()
    found.close()

    made = Semaphore(key, create=True, exclusive=True)
    assert peer("value", key) == 1
    with subprocess.Popen([PEER, "hold", key[0], str(key[1])], stdin=-1, stdout=-1) as holder:
        assert holder.stdout.readline() == b"held\n"
        with pytest.raises(TimeoutError):
            made.acquire(timeout=0)
        holder.stdin.close()
        made.acquire(timeout=PATIENCE)
    assert holder.returncode == 0
    with subprocess.Popen([PEER, "hold", key[0], str(key[1])], stdin=-1, stdout=-1) as holder:
        eventually(lambda: made.waiting == 1)
        made.release()
        assert holder.stdout.readline() == b"held\n"
        holder.kill()
    assert made.value == 1
    made.remove()
    made.close()


@pytest.mark.parametrize("value", [0, 2])
def test_with_the_sysv_ipc_package_both_ways(key, forked, value):
    """It sets the value without a semop, so its semaphores have no time of one."""
    number = ftok(*key)

    def ours(ready):
        found = Semaphore(key, 7, create=True, undo=False)
        assert (found.value, found.stat().operation_time) == (value, 0)
        found.release()
        found.close()

    def theirs(ready):
        found = sysv_ipc.Semaphore(number)
        assert found.value == value
        found.release()

    other = sysv_ipc.Semaphore(number, sysv_ipc.IPC_CREX, initial_value=value)
    assert forked(ours).wait() == 0
    assert other.value == value + 1
    other.remove()
    made = Semaphore(key, value, create=True, undo=False)
    assert forked(theirs).wait() == 0
    assert made.value == value + 1
    made.remove()
    made.close()
