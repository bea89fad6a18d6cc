import errno
import os
import pickle
import re
import signal
import subprocess
import sys
import threading
import time
from contextlib import ExitStack
from pathlib import Path

import procfs
import pytest
from conftest import PATIENCE, Forked, eventually

from ipckit import Corrupt, SharedMemory, sync
from ipckit._native import ffi, lib

HERE = Path(__file__).parent
ALL = {
    "Lock": sync.Lock,
    "RLock": sync.RLock,
    "Event": sync.Event,
    "Semaphore": sync.Semaphore,
    "BoundedSemaphore": sync.BoundedSemaphore,
    "Condition": sync.Condition,
    "Barrier": sync.Barrier,
}


def options(cls):
    return {"parties": 2} if cls is sync.Barrier else {}


def asleep(pid):
    """Does the process sleep on a word of shared memory?"""
    return procfs.asleep(pid, within="futex")


def in_thread(call):
    """Run *call* in a thread; the thread, and where its result or exception will be."""
    came = []

    def run():
        try:
            came.append(call())
        except Exception as error:
            came.append(error.with_traceback(None))  # which would keep what the call used

    thread = threading.Thread(target=run)
    thread.start()
    return thread, came


def waiting(forked, call, *args):
    """A child that sleeps in *call*; its code is 0 if the result is true, 7 if it is false."""

    def run(ready):
        ready()
        raise SystemExit(0 if call(*args) else 7)

    child = forked(run)
    child.wait_ready()
    eventually(lambda: asleep(child.pid))
    return child


def killed_while_waiting(forked, call, *args):
    child = waiting(forked, call, *args)
    child.kill()
    assert child.wait() == -signal.SIGKILL


def killed_while_holding(forked, lock, times=1):
    def run(ready):
        for _ in range(times):
            lock.acquire()
        ready()
        signal.pause()

    child = forked(run)
    child.wait_ready()
    assert lock.owner == child.pid
    child.kill()
    assert child.wait() == -signal.SIGKILL


def python(code):
    """What a fresh interpreter that runs *code* prints."""
    run = subprocess.run(
        [sys.executable, "-W", "error", "-c", code], capture_output=True, text=True, timeout=PATIENCE
    )
    assert (run.returncode, run.stderr) == (0, "")
    return run.stdout


# --- locks -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("cls", [sync.Lock, sync.RLock])
def test_a_lock(cls):
    lock = cls()
    assert lock.acquire() is True
    assert lock.locked()
    assert lock.owner == threading.get_native_id()
    assert repr(lock) == f"<{cls.__name__}(owner={lock.owner})>"
    assert lock.release() is None
    assert not lock.locked()
    assert repr(lock) == f"<{cls.__name__}(owner=None)>"
    with lock as taken:
        assert taken is True
        assert lock.locked()
    assert not lock.locked()
    assert (lock.recovered, lock.recoveries) == (False, 0)


def test_another_process_has_to_wait(forked):
    lock = sync.Lock()
    lock.acquire()
    child = waiting(forked, lock.acquire)
    lock.release()
    assert child.wait() == 0


@pytest.mark.parametrize("cls", [sync.Lock, sync.RLock])
def test_time_limits(cls, forked):
    lock = cls()
    lock.acquire()

    def run(ready):
        assert lock.acquire(False) is False
        assert lock.acquire(block=False, timeout=10 * PATIENCE) is False
        assert lock.acquire(True, 0) is False
        assert lock.acquire(timeout=-5) is False
        before = time.monotonic()
        assert lock.acquire(True, 0.12) is False
        assert time.monotonic() - before >= 0.12

    assert forked(run).wait() == 0
    lock.release()


def test_waiting_for_oneself():
    lock = sync.Lock()
    lock.acquire()
    assert lock.acquire(False) is False
    before = time.monotonic()
    assert lock.acquire(timeout=0.06) is False
    assert time.monotonic() - before >= 0.06
    with pytest.raises(RuntimeError, match=r"<Lock\(owner=\d+\)> is held by this very thread"):
        lock.acquire()
    lock.release()


def test_only_the_holder_releases(forked):
    lock = sync.Lock()
    with pytest.raises(RuntimeError, match=rf"<Lock\(owner=None\)> .* by thread {os.getpid()}"):
        lock.release()
    lock.acquire()
    owner = lock.owner
    thread, came = in_thread(lock.release)
    thread.join()
    assert type(came[0]) is RuntimeError
    assert f"<Lock(owner={owner})> can't be released by thread {thread.native_id}" in str(came[0])

    def run(ready):
        with pytest.raises(RuntimeError, match=rf"owner={owner}.* by thread {os.getpid()}"):
            lock.release()

    assert forked(run).wait() == 0
    lock.release()


def test_an_rlock_is_released_as_often_as_acquired(forked):
    lock = sync.RLock()
    for _ in range(3):
        assert lock.acquire() is True
    lock.release()
    lock.release()

    def run(ready):
        assert lock.acquire(False) is False  # the child of the holder is another
        with pytest.raises(RuntimeError, match=rf"<RLock\(owner={os.getppid()}\)>"):
            lock.release()

    assert forked(run).wait() == 0
    lock.release()
    with pytest.raises(RuntimeError, match="owner=None"):
        lock.release()


@pytest.mark.parametrize("bad", ["soon", [], 1j])
def test_bad_arguments_of_acquire(bad):
    for lock in (sync.Lock(), sync.Semaphore()):
        with pytest.raises(
            TypeError, match=f"timeout must be None or a number of seconds, not {re.escape(repr(bad))}"
        ):
            lock.acquire(True, bad)
        with pytest.raises(ValueError, match="timeout must be None or a number of seconds, not nan"):
            lock.acquire(timeout=float("nan"))
        with pytest.raises(TypeError, match="unexpected or second argument 'blocking'"):
            lock.acquire(blocking=True)
        with pytest.raises(TypeError, match="unexpected or second argument 'block'"):
            lock.acquire(True, block=True)
        with pytest.raises(TypeError, match="at most 2 arguments, not 3"):
            lock.acquire(True, 1, 2)
        assert lock.acquire(timeout=1e300) is True
        lock.release()


# --- locks of the dead -----------------------------------------------------------------------------


@pytest.mark.parametrize("cls", [sync.Lock, sync.RLock])
def test_the_lock_of_a_killed_holder(cls, forked):
    lock = cls()
    killed_while_holding(forked, lock, times=1 if cls is sync.Lock else 3)
    assert not lock.locked()
    assert lock.acquire() is True
    assert (lock.recovered, lock.recoveries) == (True, 1)
    lock.release()
    assert lock.recovered
    with lock:
        assert (lock.recovered, lock.recoveries) == (False, 1)


def test_who_waits_gets_the_lock_of_a_killed_holder(forked):
    lock = sync.Lock()

    def hold(ready):
        lock.acquire()
        ready()
        signal.pause()

    holder = forked(hold)
    holder.wait_ready()
    child = waiting(forked, lambda: lock.acquire() and lock.recovered)
    holder.kill()
    assert child.wait() == 0


def test_a_thread_that_ends_is_a_death():
    lock = sync.Lock()
    thread, _ = in_thread(lock.acquire)
    thread.join()
    assert lock.acquire(timeout=PATIENCE) is True
    assert lock.recovered
    lock.release()


def test_an_exec_is_a_death(forked):
    lock = sync.Lock()

    def run(ready):
        lock.acquire()
        ready()
        os.execv("/bin/sleep", ["sleep", "1000"])

    child = forked(run)
    child.wait_ready()
    assert lock.acquire(timeout=PATIENCE) is True
    assert lock.recovered
    eventually(lambda: Path(f"/proc/{child.pid}/comm").read_text() == "sleep\n")
    lock.release()


def test_who_dies_repairing_is_followed_by_another_repairer(forked):
    lock = sync.Lock()
    killed_while_holding(forked, lock)
    killed_while_holding(forked, lock)
    with lock:
        assert (lock.recovered, lock.recoveries) == (True, 2)


def test_a_killed_waiter_harms_nobody(forked):
    lock = sync.Lock()
    with lock:
        killed_while_waiting(forked, lock.acquire)
        child = waiting(forked, lock.acquire)
        killed_while_waiting(forked, lock.acquire)
    assert child.wait() == 0


def test_a_dropped_handle_does_not_pull_the_ground_from_under_a_held_lock():
    code = """if 1:
        import gc
        from ipckit import sync
        for _ in range(20):
            lock, other = sync.Lock(), sync.RLock()
            lock.acquire()
            del lock
            gc.collect()
            with other:
                pass
        print("fine")
    """
    assert python(code) == "fine\n"


def test_nobody_is_inside_with_another(forked):
    lock, memory = sync.Lock(), SharedMemory(8)
    cell = memory.buf.cast("q")

    def run(ready):
        for _ in range(3000):
            with lock:
                seen = cell[0]
                cell[0] = seen + 1

    children = [forked(run) for _ in range(4)]
    assert [child.wait() for child in children] == [0] * 4
    assert cell[0] == 12000


@pytest.mark.proof
def test_kill_loop():
    """Workers move one from a cell to the other under the lock, and are killed at random."""
    lock, memory = sync.RLock(), SharedMemory(24)
    cells = memory.buf.cast("q")

    def repair():
        cells[1] = -cells[0]

    def run(ready):
        ready()
        while True:
            with lock:
                if lock.recovered:
                    repair()
                assert cells[0] + cells[1] == 0
                with lock:
                    cells[0] += 1
                    cells[1] -= 1
                cells[2] += 1

    kills = 2000 if os.environ.get("IPCKIT_PROOF") else 60
    workers = [Forked(run) for _ in range(3)]
    for turn in range(kills):
        victim = workers.pop(0)
        victim.wait_ready()
        before = cells[2]
        eventually(lambda: cells[2] > before)  # noqa: B023
        victim.kill()
        assert victim.wait() == -signal.SIGKILL
        victim.close()
        workers.append(Forked(run))
        if turn % 20 == 0:
            assert lock.acquire(timeout=PATIENCE)
            if lock.recovered:
                repair()
            lock.release()
    for worker in workers:
        worker.close()
    print(f"{kills} kills, {lock.recoveries} while holding")


# --- events ----------------------------------------------------------------------------------------


def test_an_event(forked):
    event = sync.Event()
    assert event.is_set() is False
    assert f"{event!r}".endswith("unset>")
    assert event.wait(0) is False
    assert event.wait(-1) is False
    before = time.monotonic()
    assert event.wait(timeout=0.12) is False
    assert time.monotonic() - before >= 0.12
    children = [waiting(forked, event.wait, PATIENCE) for _ in range(3)]
    event.set()
    assert [child.wait() for child in children] == [0] * 3
    assert event.is_set() is True
    assert f"{event!r}".endswith(" set>")
    assert event.wait() is True
    event.set()
    event.clear()
    assert event.is_set() is False


def test_an_event_set_for_a_moment_wakes_all(forked):
    event = sync.Event()
    children = [waiting(forked, event.wait, PATIENCE) for _ in range(3)]
    for child in children:
        child.kill(signal.SIGSTOP)
    event.set()
    event.clear()
    for child in children:
        child.kill(signal.SIGCONT)
    assert [child.wait() for child in children] == [0] * 3
    assert event.wait(0) is False


def test_killed_waiters_of_an_event(forked):
    event = sync.Event()
    killed_while_waiting(forked, event.wait)
    child = waiting(forked, event.wait)
    killed_while_waiting(forked, event.wait)
    event.set()
    assert child.wait() == 0


# --- semaphores ------------------------------------------------------------------------------------


@pytest.mark.parametrize("cls", [sync.Semaphore, sync.BoundedSemaphore])
def test_a_semaphore(cls, forked):
    semaphore = cls(2)
    assert semaphore.acquire() is True
    assert semaphore.get_value() == 1
    with semaphore as taken:
        assert taken is True
        assert semaphore.locked()
        assert semaphore.acquire(False) is False
        assert semaphore.acquire(True, 0.01) is False
        child = waiting(forked, semaphore.acquire)
        assert semaphore.release() is None
        assert child.wait() == 0
        assert repr(semaphore) == f"<{cls.__name__}(value=0)>"
    assert semaphore.get_value() == 1


def test_each_release_wakes_one(forked):
    semaphore = sync.Semaphore(0)
    children = [waiting(forked, semaphore.acquire) for _ in range(5)]
    for _ in children:
        semaphore.release()
    assert [child.wait() for child in children] == [0] * 5
    assert semaphore.get_value() == 0


def test_too_many_releases():
    bounded = sync.BoundedSemaphore(1)
    with pytest.raises(ValueError, match=r"<BoundedSemaphore\(value=1\)> was released too many times"):
        bounded.release()
    full = sync.Semaphore(2147483647)
    with pytest.raises(ValueError, match=r"<Semaphore\(value=2147483647\)> was released too many"):
        full.release()
    assert (bounded.get_value(), full.get_value()) == (1, 2147483647)


@pytest.mark.parametrize(
    "cls, value", [(sync.Semaphore, -1), (sync.Semaphore, 1 << 31), (sync.BoundedSemaphore, 0)]
)
def test_bad_values(cls, value):
    with pytest.raises(ValueError, match=rf"value must be an integer from \d to 2147483647, not {value}"):
        cls(value)


def test_killed_waiters_of_a_semaphore_take_nothing(forked):
    semaphore = sync.Semaphore(0)
    killed_while_waiting(forked, semaphore.acquire)
    child = waiting(forked, semaphore.acquire)
    killed_while_waiting(forked, semaphore.acquire)
    semaphore.release()
    assert child.wait() == 0
    semaphore.release()
    assert semaphore.get_value() == 1


# --- conditions ------------------------------------------------------------------------------------


def with_lock(condition, call, *args):
    with condition:
        return call(*args)


def test_notified_in_the_order_of_waiting(forked):
    condition = sync.Condition()
    children = [waiting(forked, with_lock, condition, condition.wait) for _ in range(5)]

    def notify(*n):
        with condition:
            condition.notify(*n)

    notify()
    assert children[0].wait() == 0
    notify(2)
    assert [child.wait() for child in children[1:3]] == [0, 0]
    for child in children[3:]:  # they wait again after each slice
        eventually(lambda: asleep(child.pid))  # noqa: B023
    with condition:
        condition.notify_all()
    assert [child.wait() for child in children[3:]] == [0, 0]
    notify(3)
    with condition:
        assert condition.wait(0.06) is False


@pytest.mark.parametrize("lock", [None, sync.Lock, sync.RLock])
def test_the_lock_of_a_condition(lock, forked):
    lock = lock and lock()
    condition = sync.Condition(lock)
    assert lock is None or condition.lock is lock
    assert condition.acquire() is True
    assert repr(condition) == f"<Condition({condition.lock!r})>"
    child = waiting(forked, with_lock, condition, lambda: True)
    assert condition.wait(0.06) is False
    assert condition.lock.owner == threading.get_native_id()
    assert child.wait() == 0
    condition.release()
    assert condition.acquire(False) is True
    condition.release()


def test_all_of_an_rlock_is_released_and_acquired_again(forked):
    condition = sync.Condition()

    def notify(ready):
        with condition:
            condition.notify()

    with condition, condition, condition:
        forked(notify)
        assert condition.wait(PATIENCE) is True
    with pytest.raises(RuntimeError, match="owner=None"):
        condition.release()


@pytest.mark.parametrize("verb", ["wait", "notify", "notify_all"])
def test_a_condition_needs_its_lock(verb):
    condition = sync.Condition()
    with pytest.raises(RuntimeError, match=rf"<Condition\(<RLock.*> is not acquired by thread {os.getpid()}"):
        getattr(condition, verb)()


def test_another_lock_for_a_condition():
    for lock in (threading.Lock(), sync.Semaphore()):
        with pytest.raises(TypeError, match="lock must be a Lock or RLock of ipckit, not <"):
            sync.Condition(lock)
    with pytest.raises(RuntimeError, match="Lock was not initialized"):
        sync.Condition(sync.Lock.__new__(sync.Lock))


def test_wait_for(forked):
    condition, memory = sync.Condition(), SharedMemory(1)

    def count(ready):
        for number in range(1, 4):
            with condition:
                memory.buf[0] = number
                condition.notify()

    with condition:
        forked(count)
        assert condition.wait_for(lambda: memory.buf[0] == 3, PATIENCE) is True
        assert condition.wait_for(lambda: memory.buf[0] == 4, timeout=0.06) is False
        assert condition.wait_for(lambda: memory.buf[0] == 4, -1) is False


def test_a_killed_waiter_is_not_notified(forked):
    condition = sync.Condition()
    killed_while_waiting(forked, with_lock, condition, condition.wait)
    child = waiting(forked, with_lock, condition, condition.wait)
    with condition:
        condition.notify()
    assert child.wait() == 0


def test_what_a_waiter_was_told_before_it_was_killed_is_told_the_next(forked):
    condition = sync.Condition()
    first = waiting(forked, with_lock, condition, condition.wait)
    second = waiting(forked, with_lock, condition, condition.wait)
    first.kill(signal.SIGSTOP)
    with condition:
        condition.notify()
    eventually(lambda: asleep(second.pid))
    first.kill()
    assert first.wait() == -signal.SIGKILL
    assert second.wait() == 0


def test_a_waiter_killed_while_it_takes_the_lock_back_passes_on(forked):
    condition = sync.Condition()
    first = waiting(forked, with_lock, condition, condition.wait)
    second = waiting(forked, with_lock, condition, condition.wait)
    with condition:
        condition.notify()
        eventually(lambda: asleep(first.pid))
        first.kill()
        assert first.wait() == -signal.SIGKILL
    assert second.wait() == 0


def test_the_holder_is_killed_while_others_wait(forked):
    condition = sync.Condition()
    child = waiting(forked, with_lock, condition, lambda: condition.wait() and condition.lock.recovered)

    def die(ready):
        condition.acquire()
        condition.notify()
        os.kill(os.getpid(), signal.SIGKILL)

    assert forked(die).wait() == -signal.SIGKILL
    assert child.wait() == 0


@pytest.mark.proof
def test_kill_loop_of_conditions():
    """A bounded buffer whose producers and consumers are killed at random: it never stands still."""
    lock, memory = sync.Lock(), SharedMemory(16)
    not_empty, not_full = sync.Condition(lock), sync.Condition(lock)
    cells = memory.buf.cast("q")

    def work(ready, wait, change, tell):
        def mend():
            if lock.recovered:  # killed between the change and the notify
                not_empty.notify_all()
                not_full.notify_all()

        ready()
        while True:
            with lock:
                mend()
                while cells[0] == (0 if change < 0 else 3):
                    wait.wait()
                    mend()
                cells[0] += change
                cells[1] += 1
                tell.notify()

    kinds = [(not_empty, -1, not_full), (not_full, 1, not_empty)] * 2
    workers = [(kind, Forked(work, *kind)) for kind in kinds]
    kills = 2000 if os.environ.get("IPCKIT_PROOF") else 60
    for _ in range(kills):
        kind, victim = workers.pop(0)
        victim.wait_ready()
        before = cells[1]
        eventually(lambda: cells[1] > before + 20)  # noqa: B023
        victim.kill()
        assert victim.wait() == -signal.SIGKILL
        victim.close()
        workers.append((kind, Forked(work, *kind)))
    for _, worker in workers:
        worker.close()
    print(f"{kills} kills, {lock.recoveries} with the lock")


@pytest.mark.proof
def test_kill_loop_of_a_barrier():
    """Three walk in step, and one after the other is killed; who is told resets, and all go on."""
    barrier, memory = sync.Barrier(3), SharedMemory(8)
    cells = memory.buf.cast("q")

    def work(ready):
        ready()
        while True:
            try:
                if barrier.wait() == 0:
                    cells[0] += 1
            except sync.BrokenBarrierError:
                barrier.reset()

    kills = 1000 if os.environ.get("IPCKIT_PROOF") else 30
    workers = [Forked(work) for _ in range(3)]
    for _ in range(kills):
        victim = workers.pop(0)
        victim.wait_ready()
        before = cells[0]
        eventually(lambda: cells[0] > before + 10)  # noqa: B023
        victim.kill()
        assert victim.wait() == -signal.SIGKILL
        victim.close()
        workers.append(Forked(work))
    for worker in workers:
        worker.close()


# --- barriers --------------------------------------------------------------------------------------


def through(barrier, timeout=None):
    """1 plus the index, or 0 if it broke."""
    try:
        return 1 + barrier.wait(timeout)
    except sync.BrokenBarrierError:
        return 0


def test_a_barrier(forked):
    barrier = sync.Barrier(3)

    def run(ready):
        ready()
        raise SystemExit(10 + barrier.wait())

    for _ in range(3):
        children = [forked(run) for _ in range(2)]
        eventually(lambda: barrier.n_waiting == 2)
        assert "waiters=2/3>" in repr(barrier)
        assert (barrier.parties, barrier.broken) == (3, False)
        assert barrier.wait() == 2
        assert sorted(child.wait() for child in children) == [10, 11]
    assert barrier.n_waiting == 0


def test_many_rounds(forked):
    barrier, memory = sync.Barrier(4), SharedMemory(8 * 4)
    cells = memory.buf.cast("q")

    def run(ready, number):
        for turn in range(300):
            cells[number] = turn
            barrier.wait()
            assert list(cells) == [turn] * 4
            barrier.wait()

    children = [forked(run, number) for number in range(4)]
    assert [child.wait() for child in children] == [0] * 4


def test_a_party_killed_in_a_barrier_breaks_it(forked):
    barrier = sync.Barrier(3)
    victim = waiting(forked, through, barrier)
    child = waiting(forked, through, barrier)
    eventually(lambda: barrier.n_waiting == 2)
    victim.kill()
    assert child.wait() == 7
    assert barrier.broken
    assert repr(barrier).endswith(": broken>")
    with pytest.raises(threading.BrokenBarrierError, match=r"<Barrier at .*: broken>"):
        barrier.wait()
    barrier.reset()
    assert not barrier.broken


def test_who_comes_after_a_death_is_told(forked):
    barrier = sync.Barrier(2)
    killed_while_waiting(forked, through, barrier)
    assert barrier.n_waiting == 0
    with pytest.raises(sync.BrokenBarrierError):
        barrier.wait()


def test_a_party_killed_on_its_way_out_breaks_nothing(forked):
    barrier = sync.Barrier(2)
    victim = waiting(forked, through, barrier)
    victim.kill(signal.SIGSTOP)
    assert barrier.wait() == 1
    assert barrier.n_waiting == 0
    child = waiting(forked, through, barrier)  # for the former round to leave
    victim.kill()
    assert victim.wait() == -signal.SIGKILL
    eventually(lambda: barrier.n_waiting == 1)
    assert barrier.wait() == 1
    assert child.wait() == 0
    assert not barrier.broken


def test_a_time_out_breaks_a_barrier(forked):
    barrier = sync.Barrier(3, timeout=0.06)
    child = waiting(forked, through, barrier, PATIENCE)
    before = time.monotonic()
    with pytest.raises(sync.BrokenBarrierError):
        barrier.wait()
    assert time.monotonic() - before >= 0.06
    assert child.wait() == 7
    barrier.reset()
    with pytest.raises(sync.BrokenBarrierError):
        barrier.wait(0)


def test_abort_and_reset(forked):
    barrier = sync.Barrier(2)
    child = waiting(forked, through, barrier)
    barrier.abort()
    assert child.wait() == 7
    with pytest.raises(sync.BrokenBarrierError):
        barrier.wait()
    barrier.reset()
    child = waiting(forked, through, barrier)
    barrier.reset()
    assert child.wait() == 7
    child = waiting(forked, through, barrier)
    assert barrier.wait() == 1
    assert child.wait() == 0


def test_an_action(forked):
    memory = SharedMemory(1)

    def action():
        memory.buf[0] += 1

    barrier = sync.Barrier(2, action)
    child = waiting(forked, lambda: through(barrier) and memory.buf[0] == 1)
    barrier.wait()
    assert child.wait() == 0


def test_an_action_that_raises(forked):
    barrier = sync.Barrier(2, lambda: {}["missing"])
    child = waiting(forked, through, barrier)
    with pytest.raises(KeyError, match="missing"):
        barrier.wait()
    assert child.wait() == 7
    assert barrier.broken


def test_killed_in_the_action(forked):
    barrier = sync.Barrier(2, lambda: os.kill(os.getpid(), signal.SIGKILL))
    child = waiting(forked, through, barrier)
    assert forked(lambda ready: barrier.wait()).wait() == -signal.SIGKILL
    assert child.wait() == 7


@pytest.mark.parametrize("parties", [0, -1, 257])
def test_bad_parties(parties):
    with pytest.raises(ValueError, match=f"parties must be an integer from 1 to 256, not {parties}"):
        sync.Barrier(parties)


# --- signals ---------------------------------------------------------------------------------------


def blocked_on_lock():
    lock, enough = sync.Lock(), sync.Event()

    def hold():
        with lock:
            enough.wait()

    thread, _ = in_thread(hold)
    eventually(lock.locked)

    def free():
        enough.set()
        thread.join()

    return lock.acquire, free, lambda: lock.acquire() and lock.release() is None


def blocked_on_event():
    event = sync.Event()
    return event.wait, event.set, event.wait


def blocked_on_semaphore():
    semaphore = sync.Semaphore(0)
    return semaphore.acquire, semaphore.release, semaphore.acquire


def blocked_on_condition():
    condition = sync.Condition()

    def again():
        with condition:
            condition.notify()
            assert condition.wait(0.01) is False
        return not condition.lock.locked()

    return lambda: with_lock(condition, condition.wait), lambda: None, again


def blocked_on_barrier():
    barrier = sync.Barrier(2)

    def again():
        assert (barrier.n_waiting, barrier.broken) == (0, False)
        thread, came = in_thread(barrier.wait)
        index = barrier.wait()
        thread.join()
        return sorted([index, came[0]]) == [0, 1]

    return barrier.wait, lambda: None, again


BLOCKED = [blocked_on_lock, blocked_on_event, blocked_on_semaphore, blocked_on_condition, blocked_on_barrier]


@pytest.mark.parametrize("make", BLOCKED)
def test_an_interrupt_ends_a_wait_and_spoils_nothing(make, forked):
    def run(ready):
        call, free, again = make()
        ready()
        with pytest.raises(KeyboardInterrupt):
            call()
        ready()
        free()
        assert again()

    child = forked(run)
    child.wait_ready()
    eventually(lambda: asleep(child.pid))
    child.kill(signal.SIGINT)
    child.wait_ready()
    assert child.wait() == 0


@pytest.mark.parametrize("make", BLOCKED)
def test_a_handler_that_returns_ends_no_wait(make, forked):
    def run(ready):
        call, _, _ = make()
        signal.signal(signal.SIGUSR1, lambda *_: ready())
        ready()
        call()

    child = forked(run)
    child.wait_ready()
    for _ in range(3):
        eventually(lambda: asleep(child.pid))
        child.kill(signal.SIGUSR1)
        child.wait_ready()
    eventually(lambda: asleep(child.pid))


def test_time_limits_hold_under_signals():
    event = sync.Event()
    before = signal.signal(signal.SIGUSR1, lambda *_: None)
    stop = threading.Event()

    def shoot():
        while not stop.wait(0.003):
            os.kill(os.getpid(), signal.SIGUSR1)

    thread = threading.Thread(target=shoot)
    thread.start()
    try:
        start = time.monotonic()
        assert event.wait(0.2) is False
        assert time.monotonic() - start >= 0.2
    finally:
        stop.set()
        thread.join()
        signal.signal(signal.SIGUSR1, before)


# --- in somebody's memory, and in other processes ----------------------------------------------------


@pytest.mark.parametrize("cls", ALL.values(), ids=ALL)
def test_in_a_segment(cls, forked):
    with SharedMemory(cls.SIZE + 128, name="sync-test", create=True, exclusive=True) as memory:
        made = cls.create(memory.buf, 64, **options(cls))

        def use(ready):
            with SharedMemory(name="sync-test") as same:
                other = cls.attach(same.buf, offset=64)
                assert type(other) is cls
                if cls is sync.Event:
                    other.set()
                elif cls is sync.Barrier:
                    assert other.wait(PATIENCE) in (0, 1)
                else:
                    assert other.acquire(timeout=PATIENCE)
                ready()

        child = forked(use)
        if cls is sync.Barrier:
            assert made.wait(PATIENCE) in (0, 1)
        assert child.wait() == 0
        if cls is sync.Event:
            assert made.is_set()
        elif issubclass(cls, sync.Semaphore):
            assert made.get_value() == 0
        elif issubclass(cls, sync.Lock):
            assert made.acquire()
            assert made.recovered
            made.release()
        memory.unlink()


@pytest.mark.parametrize("cls", ALL.values(), ids=ALL)
def test_it_keeps_its_memory(cls):
    memory = SharedMemory(cls.SIZE)
    made = cls.create(memory.buf, **options(cls))
    with pytest.raises(BufferError):
        memory.close()
    del made
    memory.close()


@pytest.mark.parametrize("cls", ALL.values(), ids=ALL)
def test_places_that_will_not_do(cls):
    name, size = cls.__name__, cls.SIZE
    buffer = SharedMemory(size + 64).buf
    for offset in (-64, 65, size + 128):
        with pytest.raises(ValueError, match=f"{name} takes {size} bytes; at offset {offset} there are"):
            cls.create(buffer, offset, **options(cls))
    with pytest.raises(ValueError, match=f"{name} must lie at a multiple of 64, .* offset 8 is not"):
        cls.create(buffer, 8, **options(cls))
    for readonly in (bytes(size), buffer.toreadonly()):
        with pytest.raises(TypeError, match="buffer must be writable, not a read-only"):
            cls.attach(readonly)
    with pytest.raises(BufferError, match="buffer must be C-contiguous"):
        cls.attach(buffer[::2])
    with pytest.raises(TypeError, match="int"):
        cls.attach(5)


@pytest.mark.parametrize("cls", ALL.values(), ids=ALL)
def test_nothing_but_the_right_thing_is_attached_to(cls):
    buffer = SharedMemory(cls.SIZE).buf
    for other in ALL.values():
        if other.SIZE <= cls.SIZE and other._KIND != cls._KIND:
            other.create(buffer, **options(other))
            with pytest.raises(Corrupt, match=f"there is no complete {cls.__name__} at offset 0 of <memory"):
                cls.attach(buffer)
    buffer[:] = bytes(cls.SIZE)
    with pytest.raises(Corrupt, match="no complete"):
        cls.attach(buffer)
    made = cls.create(buffer, **options(cls))
    cls.attach(buffer)
    with pytest.raises(OSError, match=cls.__name__) as caught:
        made._at(buffer, 0, False)
    assert caught.value.errno == errno.EALREADY
    del caught  # which keeps this frame, and so what has a descriptor


@pytest.mark.parametrize("cls, number", [(sync.Semaphore, 12), (sync.Barrier, 12)])
def test_numbers_that_can_not_be(cls, number):
    buffer = SharedMemory(cls.SIZE).buf
    cls.create(buffer, **options(cls))
    buffer[number : number + 4] = b"\xff\xff\xff\xff"
    with pytest.raises(Corrupt, match=f"no complete {cls.__name__}"):
        cls.attach(buffer)


@pytest.mark.parametrize(
    "cls, verb",
    [
        (sync.Lock, lambda lock: lock.acquire()),
        (sync.RLock, lambda lock: lock.acquire(timeout=1)),
        (sync.Condition, lambda condition: with_lock(condition, condition.wait, 1)),
        (sync.Condition, lambda condition: with_lock(condition, condition.notify)),
        (sync.Barrier, lambda barrier: barrier.wait()),
        (sync.Barrier, lambda barrier: barrier.abort()),
        (sync.Barrier, lambda barrier: barrier.n_waiting),
        (sync.Barrier, lambda barrier: barrier.broken),
    ],
)
def test_spoilt_memory(cls, verb):
    buffer = SharedMemory(cls.SIZE).buf
    made = cls.create(buffer, **options(cls))
    buffer[64:128] = b"\xff" * 64
    with pytest.raises(OSError, match=rf"Invalid argument: '{cls.__name__} at 0x") as caught:
        verb(made)
    assert caught.value.errno == errno.EINVAL
    del caught  # which keeps this frame, and so what has a descriptor


def test_more_waiters_than_seats():
    buffer = SharedMemory(sync.Condition.SIZE).buf
    condition = sync.Condition.create(buffer)
    same = ffi.cast("ik_sync_condition *", ffi.from_buffer(buffer))
    with ExitStack() as seated:  # a seat that this thread kept would outlive the memory, in its list of locks
        for _ in range(256):
            seated.callback(lib.ik_sync_condition_leave, same, lib.ik_sync_condition_enter(same), 0)
        with condition, pytest.raises(OSError, match="Too many users: 'Condition at 0x") as caught:
            condition.wait()
    assert caught.value.errno == errno.EUSERS
    del caught  # which keeps this frame, and so what has a descriptor
    with condition:
        assert condition.wait(0) is False


def test_a_condition_and_its_lock_in_a_segment(forked):
    buffer = SharedMemory(sync.Condition.SIZE + sync.Lock.SIZE).buf
    lock = sync.Lock.create(buffer, sync.Condition.SIZE)
    condition = sync.Condition.create(buffer, lock=lock)
    with pytest.raises(Corrupt, match="there is no complete RLock at offset"):
        sync.Condition.attach(buffer)

    def notify(ready):
        same = sync.Condition.attach(buffer, lock=sync.Lock.attach(buffer, sync.Condition.SIZE))
        with same:
            same.notify()

    with condition:
        child = forked(notify)
        assert condition.wait(PATIENCE)
    assert child.wait() == 0


@pytest.mark.parametrize("cls", ALL.values(), ids=ALL)
def test_what_was_never_made(cls):
    verb = {sync.Event: "is_set", sync.Barrier: "abort", sync.Condition: "notify"}.get(cls, "release")
    with pytest.raises(RuntimeError, match=rf"this {cls.__name__} was not initialized"):
        getattr(cls.__new__(cls), verb)()


@pytest.mark.parametrize("cls", ALL.values(), ids=ALL)
def test_pickling_needs_a_process_that_starts(cls):
    with pytest.raises(TypeError, match="can be pickled only for a process of multiprocessing"):
        pickle.dumps(cls(**options(cls)))
    made = cls.create(SharedMemory(cls.SIZE).buf, **options(cls))
    with pytest.raises(TypeError, match=rf"<{cls.__name__}.* lies in a buffer: .* attach\(\) to it"):
        pickle.dumps(made)


STARTED = """
import multiprocessing, sys
from ipckit import sync

def work(lock, rlock, event, semaphore, bounded, condition, other, barrier):
    with lock, rlock, bounded, other:
        assert other.lock.owner == lock.owner != None
    semaphore.release()
    event.set()
    with condition:
        condition.notify()
    assert barrier.wait() in (0, 1)

if __name__ == "__main__":
    lock = sync.Lock()
    things = [lock, sync.RLock(), sync.Event(), sync.Semaphore(0), sync.BoundedSemaphore(1),
              sync.Condition(), sync.Condition(sync.Lock()), sync.Barrier(2, timeout=600)]
    context = multiprocessing.get_context(sys.argv[1])
    condition = things[5]
    with condition:
        process = context.Process(target=work, args=things)
        process.start()
        assert condition.wait()
    assert things[2].wait()
    assert things[7].wait() in (0, 1)
    process.join()
    assert process.exitcode == 0
    assert things[3].get_value() == 1
    print("fine")
"""


@pytest.mark.parametrize("method", ["fork", "spawn", pytest.param("forkserver", marks=pytest.mark.slow)])
def test_in_processes_of_multiprocessing(method, tmp_path):
    script = tmp_path / "started.py"
    script.write_text(STARTED)
    run = subprocess.run(
        [sys.executable, script, method], capture_output=True, text=True, timeout=2 * PATIENCE
    )
    assert (run.returncode, run.stdout, run.stderr) == (0, "fine\n", "")


# --- CPython's own tests -----------------------------------------------------------------------------


QUICK = ["TestLock", "TestSemaphore", "TestEvent", "TestCondition.test_notify", "TestBarrier.test_reset"]


@pytest.mark.parametrize("chosen", [QUICK, pytest.param([], marks=pytest.mark.slow)], ids=["some", "all"])
def test_the_tests_of_cpython(chosen):
    pytest.importorskip("test._test_multiprocessing")
    command = [sys.executable, "-W", "ignore", HERE / "cpython_sync.py", *chosen]
    run = subprocess.run(command, capture_output=True, text=True, timeout=PATIENCE)
    assert run.returncode == 0, run.stderr
    assert "OK" in run.stderr
    print(run.stderr)


def test_the_example():
    example = HERE.parent / "examples" / "robust_lock.py"
    run = subprocess.run([sys.executable, example], capture_output=True, text=True, timeout=PATIENCE)
    assert (run.returncode, run.stderr) == (0, "")
    assert run.stdout == "the worker was killed between the two accounts: 70 + 50\nrepaired: 70 + 30\n"


@pytest.mark.proof
@pytest.mark.skipif(not os.environ.get("IPCKIT_PROOF"), reason="make ctest runs a slice")
def test_killed_at_every_instruction():
    print(
        subprocess.run(
            [HERE.parent / "build/tests/test_sync"], check=True, stdout=subprocess.PIPE, text=True
        ).stdout
    )


def test_a_quick_run_of_the_bench():
    bench = HERE.parent / "bench" / "bench_sync.py"
    run = subprocess.run([sys.executable, bench, "--quick"], capture_output=True, text=True, timeout=PATIENCE)
    assert (run.returncode, run.stderr) == (0, "")
    assert run.stdout.count("x multiprocessing") == 9
