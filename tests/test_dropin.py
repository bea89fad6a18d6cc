"""What the pages docs/howto/from-*.md claim, where a block of theirs can't show it; tests/test_docs.py runs those.

Each test names the page, and quotes what it is about.
"""

import importlib
import inspect
import multiprocessing
import multiprocessing.connection
import os
import pickle
import queue as standard
import re
import signal
import socket
import subprocess
import sys
import threading
from multiprocessing import shared_memory
from pathlib import Path

import posix_ipc
import pytest
import sysv_ipc
from conftest import PATIENCE, eventually

import ipckit
from ipckit import Ended, Queue, memory, posix, queues, sysv

PAGES = Path(__file__).resolve().parent.parent / "docs" / "howto"


# --- no name is forgotten, and none of ours is invented -------------------------------------------


def rows(page):
    """(what the first column has between backticks, the second column) of each row of its tables."""
    for line in (PAGES / f"from-{page}.md").read_text().splitlines():
        if line.startswith("| ") and not line.startswith("| of "):
            first, second = line.strip("| ").split(" | ")[:2]
            yield re.findall(r"`([^`]+)`", first), second


def named(page):
    return {name.partition("(")[0] for names, _ in rows(page) for name in names}


def public(*things):
    return {name for thing in things for name in dir(thing) if not name.startswith("_")}


def run(code, *arguments):
    """What a program of its own prints."""
    done = subprocess.run(
        [sys.executable, "-c", code, *arguments], capture_output=True, text=True, timeout=PATIENCE
    )
    assert (done.returncode, done.stderr) == (0, "")
    return done.stdout


def faster_fifo_names():
    pytest.importorskip("faster_fifo")
    return {
        name
        for name in run("import faster_fifo; print(*dir(faster_fifo.Queue(1000)))").split()
        if name[0] != "_"
    }


THEIRS = {
    "multiprocessing": lambda: {*multiprocessing.__all__, *public(multiprocessing.connection.Connection)},
    "shared_memory": lambda: (
        {*shared_memory.__all__, *public(shared_memory.ShareableList), "track"}
        | public(shared_memory.SharedMemory)
    ),
    "faster-fifo": faster_fifo_names,
    "posix_ipc": lambda: public(
        posix_ipc, posix_ipc.MessageQueue, posix_ipc.Semaphore, posix_ipc.SharedMemory
    ),
    "sysv_ipc": lambda: public(sysv_ipc, sysv_ipc.MessageQueue, sysv_ipc.Semaphore, sysv_ipc.SharedMemory),
}


@pytest.mark.parametrize("page", THEIRS)
def test_every_public_name_of_theirs_is_on_the_page(page):
    assert THEIRS[page]() - named(page) == set()


def fields_of(kind):
    return inspect.get_annotations(kind)


OURS = re.compile(r"(ipckit|memory|channel|queues|posix|sysv)(\.\w+)+(\(\))?")


@pytest.mark.parametrize("page", THEIRS)
def test_every_name_of_ours_on_the_page_exists(page):
    found = 0
    for names, second in rows(page):
        ours = [name for name in re.findall(r"`([^`]+)`", second) if OURS.fullmatch(name)]
        for name in ours:
            room, *path = name.removesuffix("()").split(".")
            at = importlib.import_module("ipckit" if room == "ipckit" else f"ipckit.{room}")
            for part in path:
                annotated = {field for kind in getattr(at, "__mro__", ()) for field in fields_of(kind)}
                at = None if part in annotated else getattr(at, part)
            assert callable(at) or not name.endswith("()")
            found += 1
        assert second, f"{names} has no answer"
    assert found > 5


# --- from multiprocessing: Queue -------------------------------------------------------------------


def test_a_put_waits_for_room_and_a_timeout_ends_that(forked):
    """It says: "`put()` waits when `capacity` bytes (1 MiB) are full"; "waits for the next consumer"."""
    with Queue() as queue:
        assert queue.capacity == 1 << 20

        def only_consumer(ready):
            queue.get()
            ready()
            signal.pause()

        child = forked(only_consumer)
        queue.put(b"first")
        child.wait_ready()
        child.kill()
        child.wait()
        with pytest.raises(standard.Full, match="capacity=1048576 bytes"):
            queue.put(bytes(4 << 20), timeout=0.1)
        putting = threading.Thread(target=queue.put, args=(bytes(4 << 20),))
        putting.start()
        assert len(queue.get()) == 4 << 20
        putting.join(PATIENCE)
        assert not putting.is_alive()


def test_large_objects():
    """It says: "more than 16 MiB are `OSError` EMSGSIZE": `Queue(max_message=1 << 30)`."""
    with Queue() as queue, Queue(max_message=1 << 30, capacity=64 << 20) as large:
        with pytest.raises(OSError, match="of at most 16777216 bytes, which is max_message"):
            queue.put(bytes(17 << 20))
        large.put(bytes(17 << 20))
        assert len(large.get()) == 17 << 20


def test_put_nowait_beside_another_producer(forked):
    """It says: "`Full` too if another producer is just inside `put()`": `put(obj, timeout=1)`."""
    with Queue() as queue:

        def inside(ready):
            queue.reserve(10)
            ready()
            signal.pause()

        child = forked(inside)
        child.wait_ready()
        with pytest.raises(standard.Full):
            queue.put_nowait(1)
        threading.Timer(0.01, child.kill).start()
        queue.put(1, timeout=PATIENCE)
        assert queue.get() == 1


def test_what_pickle_refuses_raises_in_put_and_what_is_put_stays_as_it_was():
    """It says: "`put()` raises"; "is put as it was"; a lock, a socket, a queue inside a message."""
    with Queue() as queue:
        with socket.socket() as sock, Queue() as other:
            for obj in (lambda: 0, threading.Lock(), multiprocessing.Lock(), other, sock):
                with pytest.raises((pickle.PicklingError, AttributeError, TypeError, RuntimeError)):
                    queue.put(obj)
        assert queue.empty()
        words = ["before"]
        queue.put(words)
        words[0] = "after"
        assert queue.get() == ["before"]


def test_a_queue_is_pickled_by_its_name(forked):
    """It says: "give it a name: `Queue.open("jobs")`"."""
    with Queue.open("jobs", codec="pickle") as jobs, Queue() as queue:
        queue.put(jobs)
        with queue.get() as same:
            same.put("through the other handle")
        assert jobs.get() == "through the other handle"
        with pytest.raises(TypeError, match="give it a name with Queue.open"):
            queue.put(queue)
    jobs.unlink()


def test_closed_is_closed():
    """It says: "then every call is `Closed`, a `ValueError`"."""
    queue = Queue()
    queue.close()
    for call in (queue.get, queue.empty, queue.qsize, lambda: queue.put(1)):
        with pytest.raises(ValueError, match="is closed"):
            call()


def test_what_is_the_same():
    """maxsize, timeouts below 0, and what can't be unpickled raises in get() and is gone."""
    for maxsize in (0, -1):
        with Queue(maxsize) as queue:
            assert queue.maxsize == 0
    with Queue(1) as queue:
        with pytest.raises(standard.Empty):
            queue.get(timeout=-1)
        queue.put(1)
        assert queue.full() and queue.qsize() == 1 and not queue.empty()
        with pytest.raises(standard.Full):
            queue.put(2, timeout=-1)
        queue.get()
        queue.send(b"no pickle")
        with pytest.raises(pickle.UnpicklingError):
            queue.get()
        assert queue.empty()


@pytest.mark.parametrize("how", ["returns", "os._exit", "kill -9"])
def test_the_end_of_a_process_loses_nothing_and_waits_for_nothing(how, forked):
    """It says: "waits for nothing, and nothing is lost"; nobody gets anything until the producer is gone."""
    with Queue() as queue:

        def producer():
            queue.put(bytes(1 << 19))
            queue.join_thread()
            queue.cancel_join_thread()
            if how != "returns":
                os._exit(0) if how == "os._exit" else os.kill(os.getpid(), signal.SIGKILL)

        process = multiprocessing.get_context("fork").Process(target=producer)
        process.start()
        process.join()
        assert len(queue.get()) == 1 << 19
        process.close()


@pytest.mark.parametrize("verb", ["get", "put"])
def test_a_kill_inside_hangs_nobody(verb, forked):
    """It says: "the others go on"."""
    with Queue(1, role="producer") as queue:
        if verb == "put":
            queue.put(0)

        def inside(ready):
            ready()
            queue.get() if verb == "get" else queue.put(1)

        child = forked(inside)
        child.wait_ready()
        eventually(lambda: queue.stats().waiting)
        child.kill()
        child.wait()
        if verb == "get":
            queue.put(0)
        assert queue.get(timeout=PATIENCE) == 0


def test_a_queue_is_something_to_wait_for():
    """It says: "`fileno()` is for select, poll, `connection.wait()` and asyncio"."""
    with Queue() as queue:
        assert multiprocessing.connection.wait([queue], timeout=0) == []
        queue.put(1)
        assert multiprocessing.connection.wait([queue], timeout=PATIENCE) == [queue]


def test_one_class():
    """Of `JoinableQueue`: "the same class: every queue does"; and `SimpleQueue`'s methods."""
    assert ipckit.JoinableQueue is ipckit.Queue
    theirs = multiprocessing.SimpleQueue()
    assert public(theirs) | public(multiprocessing.Queue) <= public(ipckit.Queue)
    theirs.close()


POOL = """
import multiprocessing
from ipckit import Queue

def take(given):
    global put_into
    put_into = given

def put_square(number):
    put_into.put(number * number)

with Queue(role="producer") as results:
    with multiprocessing.get_context("fork").Pool(2, take, (results,)) as pool:
        pool.map(put_square, range(4))
        try:
            pool.apply(put_square, (results,))
        except TypeError as error:
            print(error)
    print(sorted(results.get() for _ in range(4)))
"""


def test_a_pool():
    """It says: "keep it, with queues by `initializer=`"; as an argument of a task only with a name."""
    refused, got = run(POOL).splitlines()
    assert refused.endswith("give it a name with Queue.open()")
    assert got == "[0, 1, 4, 9]"


def test_ended_is_told_apart():
    """It says: "catches `EOFError` before `Empty`"."""
    assert issubclass(Ended, EOFError) and issubclass(Ended, standard.Empty)


MODULE_LEVEL = """
import multiprocessing, sys
from ipckit import Queue
queue = Queue()
def put(given):
    queue.put("of the module")
    given.put("given")
if __name__ == "__main__":
    multiprocessing.set_start_method(sys.argv[1])
    given = Queue()
    process = multiprocessing.Process(target=put, args=(given,))
    process.start()
    process.join()
    print(given.get(), queue.qsize())
"""


@pytest.mark.parametrize("method, found", [("fork", 1), ("spawn", 0), ("forkserver", 0)])
def test_at_the_top_of_a_module(method, found, tmp_path):
    """It says: "is made again in each process that imports it. With `spawn` and `forkserver` pass queues as arguments"."""
    (tmp_path / "program.py").write_text(MODULE_LEVEL)
    done = subprocess.run(
        [sys.executable, tmp_path / "program.py", method], capture_output=True, text=True, timeout=PATIENCE
    )
    assert (done.stdout, done.stderr) == (f"given {found}\n", "")


def test_a_put_of_much_that_nobody_got():
    """It says: "leaves `empty()` False until the next `get()`, with `qsize()` 0": `get_nowait()` until `Empty`."""
    with Queue(capacity=4096) as queue:
        with pytest.raises(standard.Full):
            queue.put(bytes(100_000), timeout=0.05)
        assert queue.qsize() == 0
        with pytest.raises(standard.Empty):
            queue.get_nowait()
        assert queue.empty()


def test_peek_holds_the_getting_end(forked):
    """It says: "They hold the getting end, so that consumers work one after the other"."""
    with Queue() as queue:
        queue.put_many([1, 2])

        def worker(ready):
            queue.peek()
            ready()
            signal.pause()

        child = forked(worker)
        child.wait_ready()
        with pytest.raises(standard.Empty):
            queue.get(timeout=0.05)
        child.kill()
        assert [queue.get(timeout=PATIENCE), queue.get()] == [1, 2]


def test_what_a_queue_takes():
    """It says: "its capacity and 32 KiB of memory, and three descriptors (before Python 3.13 four)"."""
    before = len(os.listdir("/proc/self/fd"))
    with Queue() as queue:
        assert len(os.listdir("/proc/self/fd")) - before == (3 if sys.version_info >= (3, 13) else 4)
        assert queue._memory.size - (1 << 20) < 34 << 10


# --- from multiprocessing: locks, and pipes --------------------------------------------------------


def test_locks_are_what_the_page_says(forked):
    """The table of "Lock, Event and the others", beside what its block shows."""
    with pytest.raises(AssertionError):
        multiprocessing.RLock().release()
    with pytest.raises(ValueError):
        multiprocessing.Lock().release()
    with pytest.raises(TypeError, match="lock must be a Lock or RLock of ipckit"):
        ipckit.Condition(multiprocessing.Lock())
    with pytest.raises(ValueError, match="parties must be an integer from 1 to 256"):
        ipckit.Barrier(257)
    with pytest.raises(TypeError):
        pickle.dumps(ipckit.Lock())
    lock, theirs, instead = ipckit.Lock(), multiprocessing.Lock(), ipckit.Semaphore(1)
    for taken in (lock, theirs, instead):
        taken.acquire()

    def another(ready):
        theirs.release()
        instead.release()
        with pytest.raises(RuntimeError, match=f"can't be released by thread {os.getpid()}"):
            lock.release()

    assert forked(another).wait() == 0
    lock.release()

    def dies(ready):
        lock.acquire()
        os.kill(os.getpid(), signal.SIGKILL)

    forked(dies).wait()
    assert lock.acquire(timeout=PATIENCE) and lock.recovered
    lock.release()


@pytest.mark.parametrize("method", ["fork", "spawn"])
def test_a_channel_in_place_of_a_pipe(method):
    """`poll` is `recv(timeout=)`; `recv_bytes_into` with an offset; a killed peer is `PeerDied`."""
    here, there = ipckit.channel()
    process = multiprocessing.get_context(method).Process(target=send_and_die, args=(there,))
    process.start()
    with here.claim() as end:
        buffer = bytearray(10)
        assert end.recv_into(memoryview(buffer)[3:], timeout=PATIENCE) == 5
        assert buffer == b"\0\0\0hello\0\0"
        with pytest.raises(ipckit.PeerDied):
            end.recv(timeout=PATIENCE)
    process.join()
    process.close()
    here, there = ipckit.channel()
    with here, there, pytest.raises(TimeoutError):
        here.recv(timeout=0)
    shut_down_helpers(method)


def send_and_die(end):
    end.send(b"hello")
    os.kill(os.getpid(), signal.SIGKILL)


def shut_down_helpers(method):
    if method == "spawn":
        from multiprocessing import resource_tracker

        resource_tracker._resource_tracker._stop()


# --- from shared_memory ----------------------------------------------------------------------------


def test_shared_memory_is_what_the_page_says():
    """No name, `exclusive`, sizes, views."""
    with ipckit.SharedMemory(10) as plain:
        assert plain.name is None
        with pytest.raises(ValueError, match="has no name to unlink"):
            plain.unlink()
        view = plain.buf
        with pytest.raises(BufferError):
            plain.close()
        plain.close(defer=True)
        assert view[0] == 0
    with ipckit.SharedMemory(10, name="frames", create=True) as made:
        with ipckit.SharedMemory(10, name="frames", create=True) as same:
            same.buf[0] = 1
        assert made.buf[0] == 1
        with pytest.raises(FileExistsError):
            ipckit.SharedMemory(10, name="frames", create=True, exclusive=True)
        assert os.path.exists(f"/dev/shm/ipckit-{os.geteuid()}/memory.frames")
    made.unlink()


# --- from faster-fifo ------------------------------------------------------------------------------


def test_faster_fifo_is_what_the_page_says():
    """Its time limit, the order of arguments, and what was put when there is not enough room."""
    pytest.importorskip("faster_fifo")
    printed = run(
        "import faster_fifo\n"
        "theirs = faster_fifo.Queue(1000)\n"
        "theirs.put_many([1, 2, 3])\n"
        "print(faster_fifo.DEFAULT_TIMEOUT, theirs.get_many(True, 1.0, 2), theirs.join_thread())\n"
        "import multiprocessing\n"
        "print(b'resource_sharer' in theirs.dumps(multiprocessing.Pipe()[0]))\n"
    )
    assert printed == "10.0 [1, 2] None\nTrue\n"
    with Queue(2) as queue:
        assert queue.put_many_nowait([1, 2, 3]) == 2
        with pytest.raises(standard.Full):
            queue.put_many_nowait([3])
        assert queue.get_many(1) == [1] and queue.get_many_nowait(max_messages_to_get=5) == [2]
        with pytest.raises(standard.Empty):
            queue.get_many_nowait()
        queue.shutdown()
        with pytest.raises(queues.ShutDown):
            queue.put(1)


# --- from posix_ipc, from sysv_ipc -----------------------------------------------------------------


def test_posix_ipc_is_what_the_page_says():
    """unlink after close, the umask, limits that are ValueErrors, and errors for BusyError and the others."""
    theirs = posix_ipc.Semaphore("/theirs", posix_ipc.O_CREX, initial_value=1)
    ours = posix.Semaphore("/theirs")
    with theirs:
        assert ours.value == 0
    with ours:
        assert theirs.value == 0
    ours.close()
    theirs.close()
    with pytest.raises(posix_ipc.ExistentialError):
        theirs.unlink()
    posix.Semaphore("/theirs").unlink()
    before = os.umask(0o077)
    memory_of = posix_ipc.SharedMemory("/theirs", posix_ipc.O_CREX, mode=0o644, size=0)
    os.umask(before)
    assert os.fstat(memory_of.fd).st_mode & 0o777 == 0o600
    with pytest.raises(ValueError, match="is empty"):
        posix.SharedMemory("/theirs")
    memory_of.close_fd()
    memory_of.unlink()
    with posix.MessageQueue("/ours", create=True) as queue:
        with pytest.raises(TimeoutError):
            queue.recv(timeout=0)
        with pytest.raises(FileExistsError):
            posix.MessageQueue("/ours", create=True, exclusive=True)
        with pytest.raises(ValueError, match="priority"):
            queue.send(b"x", priority=posix_ipc.QUEUE_PRIORITY_MAX + 1)
        queue.send(b"x", priority=32767)
    queue.unlink()
    with pytest.raises(FileNotFoundError):
        posix.MessageQueue("/ours")
    with pytest.raises(ValueError, match="value must be"):
        posix.Semaphore("/ours", posix_ipc.SEMAPHORE_VALUE_MAX + 1, create=True)


def test_sysv_ipc_is_what_the_page_says(forked):
    """Keys at random, messages of any size, undo, and the error of what was removed."""
    theirs = sysv_ipc.MessageQueue(None, sysv_ipc.IPC_CREX)
    assert theirs.key != 0
    with sysv.MessageQueue.from_id(theirs.id) as ours:
        ours.send(bytes(5000))
        with pytest.raises(OSError, match="too long"):
            theirs.receive()
        assert len(ours.recv(timeout=0)) == 5000
        with pytest.raises(TimeoutError):
            ours.recv(timeout=0)
        theirs.remove()
        with pytest.raises(OSError, match="removed"):
            ours.recv(timeout=0)
    with sysv.MessageQueue() as private:
        assert private.key is None
    private.remove()
    made = sysv.Semaphore()
    child = forked(lambda ready: made.acquire(timeout=0))
    assert child.wait() == 0
    assert made.value == 1, "given back at the child's end"
    made.close()
    made.remove()


def test_memory_has_the_methods_of_the_pages():
    """What is said of `memory.SharedMemory` holds for all three rooms' memory."""
    for kind in (memory.SharedMemory, posix.SharedMemory, sysv.SharedMemory):
        assert {"buf", "asarray", "close", "closed"} <= public(kind)


# --- from multiprocessing: what its own column says ------------------------------------------------

# Each is a program, since multiprocessing's threads, semaphores and helpers stay with the process.
BEGIN = """if True:
    import contextlib, io, multiprocessing as mp, os, queue, signal, socket, sys, threading, time
    mp.set_start_method("fork")
    q = mp.Queue()

    def child(target, *args):
        process = mp.Process(target=target, args=args)
        process.start()
        return process

    def told(error, call, *args, **more):
        try:
            return call(*args, **more)
        except error as raised:
            return type(raised).__name__
"""

OF_MULTIPROCESSING = {
    "the last producer is gone: `get()` waits on": (
        """
    child(q.put, 1).join()
    print(q.get(), told(queue.Empty, q.get, timeout=0.1))
    """,
        "1 Empty",
    ),
    "nobody gets, the only consumer was killed, large objects: `put()` returns": (
        """
    for _ in range(3):
        q.put(bytes(20 << 20))
    print("returned")
    q.cancel_join_thread()
    """,
        "returned",
    ),
    "`put_nowait()`: `Full` if `maxsize` objects are there": (
        """
    small = mp.Queue(1)
    small.put(1)
    print(told(queue.Full, small.put_nowait, 2), small.get())
    """,
        "Full 1",
    ),
    "what pickle refuses: a traceback on stderr, and `put()` returned": (
        """
    sys.stderr = io.StringIO()
    q.put(lambda: None)
    q.close()
    q.join_thread()
    print("Traceback" in sys.stderr.getvalue())
    """,
        "True",
    ),
    "an object changed after `put()` may be changed in the queue, too": (
        """
    class Late(list):
        def __reduce__(self):  # the feeder thread is here: long after put() returned
            changed.wait()
            return list, (list(self),)

    changed, late = threading.Event(), Late([1])
    q.put(late)
    late.append(2)
    changed.set()
    print(q.get())
    """,
        "[1, 2]",
    ),
    "sockets, connections: handed over": (
        """
    ours, theirs = mp.Pipe()
    a, b = socket.socketpair()
    answer = lambda: (q.get().send("conn"), q.get().sendall(b"sock"))
    process = child(answer)
    q.put(theirs), q.put(b)
    print(ours.recv(), a.recv(4).decode())
    process.join()
    """,
        "conn sock",
    ),
    "a queue inside a message: `RuntimeError`": (
        """
    import pickle
    print(told(RuntimeError, pickle.dumps, q))
    """,
        "RuntimeError",
    ),
    "`close()`: `put()` and `get()` are `ValueError`; `empty()` of one that was not used still answers": (
        """
    q.close()
    print(told(ValueError, q.put, 2), told(ValueError, q.get), q.empty())
    """,
        "ValueError ValueError True",
    ),
    "the end of a process that put waits until its feeder thread has written all": (
        """
    def put(done):
        q.put(bytes(1 << 20))

    process = child(put, None)
    process.join(0.2)
    print(process.exitcode, len(q.get()))
    process.join()
    """,
        "None 1048576",
    ),
    "`os._exit()` after `put()`: what the feeder thread still had is lost": (
        """
    def put():
        class Slow:
            def __reduce__(self):
                time.sleep(1000)

        q.put(Slow())
        os._exit(0)

    child(put).join()
    print(told(queue.Empty, q.get, timeout=0.1))
    """,
        "Empty",
    ),
    "`kill -9` inside `get()`: the others may hang for ever": (
        """
    victim = child(q.get)
    while q._rlock.acquire(False):  # until the victim has it
        q._rlock.release()
    os.kill(victim.pid, signal.SIGKILL)
    victim.join()
    q.put(1)
    print(told(queue.Empty, q.get, timeout=0.5))
    q.cancel_join_thread()
    """,
        "Empty",
    ),
}


@pytest.mark.parametrize("claim", OF_MULTIPROCESSING)
def test_what_the_page_says_of_multiprocessing(claim):
    code, printed = OF_MULTIPROCESSING[claim]
    assert run(BEGIN + code).strip() == printed
