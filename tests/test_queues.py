"""Queues: the standard library's methods, who takes part, and what a kill leaves."""

import asyncio
import errno
import multiprocessing.connection
import multiprocessing.resource_sharer
import os
import pickle
import queue as standard
import random
import resource
import select
import signal
import stat
import subprocess
import sys
import threading
import time
from collections import Counter
from contextlib import suppress
from pathlib import Path

import pytest
from conftest import ISOLATED, PATIENCE, eventually
from making import NEW_NS, NEW_PID, mount, unshare
from procfs import asleep, state, stopped_while

import ipckit
from ipckit import inventory, registry
from ipckit._native import lib
from ipckit.queues import Ended, JoinableQueue, Queue, ShutDown

root_only = pytest.mark.skipif(
    os.geteuid() != 0 or not ISOLATED, reason="needs root that may make namespaces"
)
TABLE = lib.IK_QUEUE_MEMORY
FOLDER = f"/dev/shm/ipckit-{os.geteuid()}"


@pytest.fixture
def queue():
    with Queue(capacity=4096) as made:
        yield made


@pytest.fixture
def raw():
    """Of bytes, and small."""
    with Queue(capacity=4096, codec="bytes") as made:
        yield made


@pytest.fixture(params=["anonymous", "named"])
def either(request):
    made = (
        Queue(capacity=4096)
        if request.param == "anonymous"
        else Queue.open("either", capacity=4096, codec="pickle")
    )
    with made:
        yield made
        if made.name is not None:
            made.unlink()


@pytest.fixture
def jobs():
    with Queue.open("jobs", capacity=4096, codec="pickle") as made:
        yield made
        if (left := find()) is not None:
            inventory.remove(left)


def fill(queue, obj=b"x" * 100):
    count = 0
    while True:
        try:
            queue.put_nowait(obj)
        except standard.Full:
            return count
        count += 1


def participant(queue, pid):
    """What stats() says of the process, or None."""
    found = [one for one in queue.stats().participants if one.pid == pid]
    return found[0] if found else None


def is_waiting(queue, process, doing):
    one = participant(queue, process.pid)
    return one is not None and one.waiting and one.doing == doing


class Fails:
    """Can't be pickled, or can't be unpickled."""

    def __init__(self, when, error=ArithmeticError):
        self.when, self.error = when, error

    def __reduce__(self):
        if self.when == "dumps":
            raise self.error("in dumps")
        return fail_to_load, (self.error,)


def fail_to_load(error):
    raise error("in loads")


# --- the standard library's methods ----------------------------------------------------------------


def test_objects_come_out_in_order(either):
    objects = [1, None, "text", b"bytes", [1, {"a": (2.5, "b")}], {1, 2}, False, bytes(100_000)]
    got = []
    thread = threading.Thread(target=lambda: got.extend(either.get(timeout=PATIENCE) for _ in objects))
    thread.start()
    for obj in objects:
        assert either.put(obj) is None
    thread.join(PATIENCE)
    assert got == objects


def test_arguments_as_the_standard_library_has_them(queue):
    queue.put(1)
    queue.put(2, True)
    queue.put(3, True, None)
    queue.put(4, False)
    queue.put(5, block=False, timeout=7)
    queue.put(obj=6, timeout=1)
    queue.put_nowait(7)
    got = [queue.get(), queue.get(True), queue.get(True, None), queue.get(False), queue.get(block=False)]
    got += [queue.get(timeout=1), queue.get_nowait()]
    assert got == [1, 2, 3, 4, 5, 6, 7]


@pytest.mark.parametrize(
    "call",
    [
        lambda queue: queue.put(),
        lambda queue: queue.put(1, True, None, 4),
        lambda queue: queue.put(1, wait=True),
        lambda queue: queue.put(1, True, block=True),
        lambda queue: queue.put(1, timeout="soon"),
        lambda queue: queue.get(True, None, 3),
        lambda queue: queue.get(obj=1),
        lambda queue: queue.get_nowait(1),
        lambda queue: queue.put_nowait(),
    ],
)
def test_other_arguments_are_refused(queue, call):
    with pytest.raises(TypeError):
        call(queue)
    assert queue.empty()


@pytest.mark.parametrize("timeout", [0, 0.05, -1])
def test_nothing_comes(queue, timeout):
    for get in (queue.get, queue.get_many):
        start = time.monotonic()
        with pytest.raises(standard.Empty, match="get.* on queue of 4096 bytes"):
            get(timeout=timeout)
        assert time.monotonic() - start >= timeout
        with pytest.raises(standard.Empty):
            get(block=False, timeout=PATIENCE)


@pytest.mark.parametrize("timeout", [0, 0.05, -1])
def test_there_is_no_room(queue, timeout):
    count = fill(queue)
    for put in (queue.put, lambda obj, **kw: queue.put_many([obj], **kw)):
        start = time.monotonic()
        with pytest.raises(standard.Full, match="put.* on queue of 4096 bytes"):
            put(b"x" * 100, timeout=timeout)
        assert time.monotonic() - start >= timeout
        with pytest.raises(standard.Full):
            put(b"x" * 100, block=False, timeout=PATIENCE)
    assert queue.qsize() == count > 30
    fill(queue, 1)
    assert queue.full()


def test_a_timeout_that_is_no_number_is_refused(queue):
    for call in (queue.get, lambda timeout: queue.put(1, timeout=timeout)):
        with pytest.raises(ValueError, match="timeout must be None or a number of seconds, not nan"):
            call(timeout=float("nan"))


def test_maxsize():
    with Queue(2) as queue:
        assert (queue.maxsize, queue.qsize(), queue.empty(), queue.full()) == (2, 0, True, False)
        queue.put(1)
        queue.put(2)
        assert (queue.qsize(), queue.empty(), queue.full()) == (2, False, True)
        with pytest.raises(standard.Full):
            queue.put(3, timeout=0.02)
        assert queue.get() == 1
        queue.put(3)
        assert [queue.get(), queue.get()] == [2, 3]
    with Queue(-1) as queue:
        assert queue.maxsize == 0


def test_many_at_once(either):
    assert either.put_many(range(100)) == 100
    assert either.qsize() == 100
    assert either.get_many(10) == list(range(10))
    assert either.get_many(max_messages_to_get=5) == list(range(10, 15))
    assert either.get_many(timeout=1) == list(range(15, 100))
    assert either.put_many([]) == 0


def test_put_many_puts_what_there_is_room_for(queue):
    count = fill(queue)
    while not queue.empty():
        queue.get()
    assert queue.put_many([b"x" * 100] * (count + 5), timeout=0.02) == count
    assert len(queue.get_many()) == count


@pytest.mark.parametrize("max", [0, -1])
def test_getting_fewer_than_one_is_refused(queue, max):
    with pytest.raises(ValueError, match=f"max must be an integer from 1 to .*, not {max}"):
        queue.get_many(max)


def test_closing(queue):
    queue.put(1)
    queue.close()
    queue.close()
    queue.join_thread()
    queue.cancel_join_thread()
    assert queue.closed
    assert repr(queue) == "<Queue queue of 4096 bytes, closed>"
    calls = [lambda: queue.put(1), queue.get, queue.get_nowait, lambda: queue.put_many([1]), queue.get_many]
    calls += [queue.qsize, queue.empty, queue.full, queue.stats, queue.shutdown, lambda: queue.maxsize]
    calls += [lambda: asyncio.run(queue.aput(1)), lambda: asyncio.run(queue.aget()), queue.fileno, queue.recv]
    calls += [queue.__reduce__]
    for call in calls:
        with pytest.raises(ipckit.Closed, match="queue of 4096 bytes is closed"):
            call()


@pytest.mark.parametrize(
    "options, what",
    [
        ({"capacity": 0}, "capacity must be an integer from 1 to"),
        ({"max_message": 0}, "max_message must be an integer from 1 to"),
        ({"maxsize": 1 << 32}, "maxsize must be an integer from"),
        ({"role": "both"}, "role must be None, 'producer' or 'consumer', not 'both'"),
        ({"codec": "json"}, "codec must be 'bytes', 'pickle' or have dumps.* not 'json'"),
    ],
)
def test_wrong_options_are_refused(options, what):
    with pytest.raises(ValueError, match=what):
        Queue(**options)


def test_closing_while_other_threads_use_it():
    def use(queue, calls):
        with pytest.raises(ipckit.Closed):
            while True:
                for call in calls:
                    with suppress(standard.Empty, standard.Full):
                        call(queue)

    for _ in range(30):
        queue = JoinableQueue(capacity=4096)
        users = [
            [lambda queue: queue.put(b"x" * 50, timeout=0.001)],
            [lambda queue: queue.get(timeout=0.001), lambda queue: queue.get_many(timeout=0.001)],
            [Queue.stats, Queue.qsize, Queue.empty, Queue.full, lambda queue: queue.maxsize],
        ]
        threads = [threading.Thread(target=use, args=(queue, calls)) for calls in users]
        for thread in threads:
            thread.start()
        time.sleep(random.random() / 200)  # where it closes is left to chance
        queue.close()
        for thread in threads:
            thread.join(PATIENCE)
            assert not thread.is_alive()


# --- codecs ----------------------------------------------------------------------------------------


def test_bytes_as_they_are(raw):
    raw.put(bytearray(b"array"))
    raw.put(memoryview(b"a view")[2:])
    raw.send(b"sent")
    assert raw.put_many([b"1", bytearray(b"2")]) == 2
    assert [raw.get(), raw.recv(), raw.get()] == [b"array", b"view", b"sent"]
    assert raw.get_many() == [b"1", b"2"]
    with pytest.raises(TypeError, match="str"):
        raw.put("text")
    assert raw.empty()


def test_a_codec_of_ones_own():
    class Text:
        def dumps(self, obj):
            return obj.encode()

        def loads(self, data):
            return data.decode()

    with Queue(codec=Text()) as queue:
        queue.put("grün")
        queue.put_many(["a", "b"])
        assert queue.recv() == "grün".encode()
        assert [queue.get(), *queue.get_many()] == ["a", "b"]


def test_what_cant_be_pickled_raises_in_put(queue):
    queue.put("before")
    for put in (queue.put, lambda obj: queue.put_many(["not this either", obj])):
        with pytest.raises(ArithmeticError, match="in dumps"):
            put(Fails("dumps"))
    queue.put("after")
    assert queue.get_many() == ["before", "after"]


def test_what_cant_be_unpickled_raises_in_get_and_is_gone(queue):
    queue.put(Fails("loads"))
    queue.put("next")
    with pytest.raises(ArithmeticError, match="in loads"):
        queue.get()
    assert queue.get() == "next"


def test_get_many_stops_before_what_cant_be_unpickled_and_loses_nothing(queue):
    queue.put_many([1, 2, Fails("loads"), 3, Fails("loads"), 4])
    assert queue.get_many() == [1, 2]
    queue.put(5)
    with pytest.raises(ArithmeticError):
        queue.get_many()
    assert queue.get() == 3
    with pytest.raises(ArithmeticError):
        queue.get()
    assert queue.get_many(1) == [4]
    assert queue.get() == 5


def test_a_handler_that_raises_amid_unpickling_takes_nothing(queue):
    queue.put_many([1, Fails("loads", KeyboardInterrupt), 2])
    with pytest.raises(KeyboardInterrupt):
        queue.get_many()
    assert queue.get() == 1
    for _ in range(2):
        with pytest.raises(KeyboardInterrupt):
            queue.get()
    with Queue() as other:
        other.put(Fails("loads", KeyboardInterrupt))
        for _ in range(2):
            with pytest.raises(KeyboardInterrupt):
                other.get()


def test_too_large():
    with Queue(codec="bytes", max_message=1000) as queue:
        queue.put(bytes(1000))
        with pytest.raises(
            OSError, match="put on queue .*1001 bytes of at most 1000 .* max_message"
        ) as caught:
            queue.put(bytes(1001))
        assert caught.value.errno == errno.EMSGSIZE
        assert queue.qsize() == 1


def test_full_says_of_what():
    with Queue(1) as few, Queue(capacity=1024, codec="bytes") as small:
        few.put("first")
        with pytest.raises(standard.Full, match="put on queue .*: 1 of maxsize=1 objects"):
            few.put_nowait("second")
        with pytest.raises(standard.Full, match="put_many on queue .*: 1 of maxsize=1 objects"):
            few.put_many_nowait(["second"])
        small.put_many([bytes(500)] * 2)
        with pytest.raises(standard.Full, match="2 objects, 1024 of capacity=1024 bytes"):
            small.put(bytes(20), timeout=0)


@pytest.mark.parametrize(
    "put",
    [
        lambda queue, obj: queue.put(obj),
        lambda queue, obj: queue.put_nowait(obj),
        lambda queue, obj: queue.put_many([1, obj]),
        lambda queue, obj: asyncio.run(queue.aput(obj)),
    ],
    ids=["put", "put_nowait", "put_many", "aput"],
)
def test_a_connection_is_no_number(queue, put):
    """pickle makes it the number of a descriptor, which in the consumer is another file or none."""
    ours, theirs = multiprocessing.Pipe()
    for obj in (theirs, {"reply to": theirs}):
        with pytest.raises(TypeError, match="Connection.* can't be put: .*codec=.*ForkingPickler"):
            put(queue, obj)
    for obj in ("multiprocessing.connection", type(theirs)):
        put(queue, obj)
        assert queue.get_many()[-1] is obj or obj == "multiprocessing.connection"
    assert queue.qsize() == 0
    ours.close()
    theirs.close()


def test_a_codec_that_hands_connections_over(forked):
    ours, theirs = multiprocessing.Pipe()
    with Queue(codec=multiprocessing.reduction.ForkingPickler) as queue:

        def child(ready):
            queue.get().send("the answer")

        process = forked(child)
        queue.put(theirs)
        assert ours.recv() == "the answer"
        assert process.wait() == 0
    multiprocessing.resource_sharer.stop()
    ours.close()
    theirs.close()


# --- at least once, in place -----------------------------------------------------------------------


def test_peek_and_commit(raw):
    raw.put_many([b"one", b"two"])
    assert raw.peek() == b"one"
    raw.keep()
    assert raw.peek() == b"one"
    raw.commit()
    assert raw.get() == b"two"
    with pytest.raises(RuntimeError, match="nothing peeked at"):
        raw.commit()
    raw.reserve(5)[:] = b"three"
    raw.commit(4)
    assert raw.get() == b"thre"


def test_a_pickled_object_is_looked_at_in_place(queue):
    queue.put({"a": 1})
    assert pickle.loads(queue.peek()) == {"a": 1}
    queue.commit()
    assert queue.empty()


# --- shutting down ---------------------------------------------------------------------------------


def test_shutdown_lets_the_rest_out(queue):
    queue.put(1)
    queue.shutdown()
    with pytest.raises(ShutDown, match="put on queue of 4096 bytes"):
        queue.put(2)
    with pytest.raises(ShutDown):
        queue.put_many([2])
    assert queue.get() == 1
    for get in (queue.get, queue.get_nowait, queue.get_many):
        with pytest.raises(ShutDown, match="get"):
            get()
    assert list(queue) == []
    if sys.version_info >= (3, 13):
        assert ShutDown is standard.ShutDown


def test_shutdown_at_once_drops_the_rest(queue):
    queue.put_many([1, 2, 3])
    queue.shutdown(immediate=True)
    assert queue.empty()
    with pytest.raises(ShutDown):
        queue.get()


@pytest.mark.parametrize("verb", ["put", "get"])
def test_shutdown_wakes_who_waits(queue, forked, verb):
    if verb == "put":
        fill(queue)

    def child(ready):
        ready()
        with pytest.raises(ShutDown):
            queue.put(bytes(1000)) if verb == "put" else queue.get()

    process = forked(child)
    eventually(lambda: is_waiting(queue, process, verb))
    queue.shutdown()
    assert process.wait() == 0


@pytest.mark.parametrize("kind", [Queue, JoinableQueue])
def test_tasks(kind):
    with kind() as queue:
        queue.join()
        queue.put_many([1, 2])
        joined = threading.Thread(target=queue.join)
        joined.start()
        for _ in range(2):
            assert joined.is_alive()
            queue.get()
            queue.task_done()
        joined.join(PATIENCE)
        assert not joined.is_alive()
        with pytest.raises(ValueError, match="task_done.. called too many times"):
            queue.task_done()
        queue.put(3)
        queue.shutdown(immediate=True)
        queue.join()


LOGGING = """
import logging.config, logging.handlers, sys
from ipckit import Queue

queue, got = Queue(), []
handler = {"class": "logging.handlers.QueueHandler", "queue": queue}
if (3, 12) <= sys.version_info < (3, 12, 6):  # some of these take queue.Queue and nothing else
    logging.getLogger().addHandler(logging.handlers.QueueHandler(queue))
else:
    logging.config.dictConfig({"version": 1, "handlers": {"it": handler}, "root": {"handlers": ["it"]}})
logging.warning("number %d", 1)
listener = logging.handlers.QueueListener(queue, type("", (), {"level": 0, "handle": got.append}))
listener.start()
queue.join()  # a listener says task_done()
listener.stop()
print(got[0].getMessage())
"""


def test_logging_takes_it(queue):
    """What logging.config asks of a queue: all of these in Python 3.13.0, the first two in later ones."""
    asked = ["put_nowait", "get", "empty", "full", "get_nowait", "put", "join", "qsize", "task_done"]
    assert all(callable(getattr(queue, method)) for method in asked)
    run = subprocess.run(
        [sys.executable, "-W", "error", "-c", LOGGING], capture_output=True, text=True, timeout=PATIENCE
    )
    assert (run.stdout, run.stderr, run.returncode) == ("number 1\n", "", 0)


# --- asyncio, and iterating ------------------------------------------------------------------------


def test_in_asyncio(either, forked):
    def child(ready):
        for number in range(300):
            either.put((number, b"x" * 50))
        either.close()

    process = forked(child)

    async def consume():
        return [number async for number, _ in either]

    assert asyncio.run(consume()) == list(range(300))
    assert process.wait() == 0

    async def both():
        await either.aput("awaited", timeout=PATIENCE)
        return await either.aget(timeout=PATIENCE)

    assert asyncio.run(both()) == "awaited"


def test_readable_when_something_is_there(either, forked):
    fd = either.fileno()
    assert not select.select([fd], [], [], 0)[0]
    process = forked(lambda ready: either.put("from the child"))
    assert select.select([fd], [], [], PATIENCE)[0]
    assert either.get(timeout=PATIENCE) == "from the child"
    assert process.wait() == 0
    assert not select.select([fd], [], [], 0)[0]


def test_iterating_ends_when_the_last_producer_closed(either, forked):
    def child(ready):
        either.put_many(range(10))
        either.close()

    process = forked(child)
    assert list(either) == list(range(10))
    assert process.wait() == 0


# --- who takes part --------------------------------------------------------------------------------


def test_roles_come_with_the_first_use(queue):
    before = time.clock_gettime(6)  # CLOCK_MONOTONIC_COARSE, as the table has it
    assert queue.stats().participants == ()
    queue.put(1)
    (me,) = queue.stats().participants
    assert (me.pid, me.state, me.producer, me.consumer) == (os.getpid(), "alive", True, False)
    assert (me.doing, me.waiting) == ("idle", False)
    assert before <= me.active <= time.monotonic()
    queue.get()
    stats = queue.stats()
    (me,) = stats.participants
    assert (me.producer, me.consumer) == (True, True)
    assert (stats.producers, stats.consumers, stats.sent, stats.received) == (1, 1, 1, 1)
    assert stats.active == me.active


@pytest.mark.parametrize("verb", ["send", "send_many", "put_many", "reserve", "asend"])
def test_each_way_to_put_makes_a_producer(raw, verb):
    {
        "send": lambda: raw.send(b"x"),
        "send_many": lambda: raw.send_many([b"x"]),
        "put_many": lambda: raw.put_many([b"x"]),
        "reserve": lambda: (raw.reserve(1), raw.commit()),
        "asend": lambda: asyncio.run(raw.asend(b"x")),
    }[verb]()
    (me,) = raw.stats().participants
    assert (me.producer, me.consumer) == (True, False)


@pytest.mark.parametrize("verb", ["recv", "recv_into", "recv_many", "get_many", "peek", "arecv"])
def test_each_way_to_get_makes_a_consumer(raw, forked, verb):
    assert forked(lambda ready: raw.put(b"x")).wait() == 0
    {
        "recv": raw.recv,
        "recv_into": lambda: raw.recv_into(bytearray(5)),
        "recv_many": raw.recv_many,
        "get_many": raw.get_many,
        "peek": lambda: (raw.peek(), raw.release()),
        "arecv": lambda: asyncio.run(raw.arecv()),
    }[verb]()
    me = participant(raw, os.getpid())
    assert (me.producer, me.consumer) == (False, True)


def test_the_locks_holders_are_told(raw):
    raw.put(b"x")
    assert (raw.stats().sender, raw.stats().receiver) == (None, None)
    raw.reserve(8)
    raw.peek()
    stats = raw.stats()
    assert stats.sender == stats.receiver == (os.getpid(), threading.get_native_id())
    assert stats.participants[0].doing == "put"
    raw.cancel()
    assert raw.stats().participants[0].doing == "get"
    raw.release()


def test_a_child_takes_part_by_itself(queue, forked):
    queue.put("parent's")

    def child(ready):
        assert participant(queue, os.getpid()) is None
        assert queue.get() == "parent's"
        ready()
        signal.pause()

    process = forked(child)
    process.wait_ready()
    assert participant(queue, process.pid).consumer
    assert participant(queue, os.getpid()).producer
    assert queue.stats().consumers == 1


def test_who_closes_leaves_the_table(queue, forked):
    def child(ready):
        queue.put(1)
        queue.close()

    process = forked(child)
    assert process.wait() == 0
    assert queue.stats().participants == ()
    assert queue.stats().deaths == 0


def test_a_dropped_handle_leaves_the_table():
    with Queue.open("dropped") as queue:
        Queue.open("dropped", role="producer")
        assert queue.stats().participants == ()
        queue.unlink()


def test_a_role_from_the_beginning_keeps_it_from_its_end(forked):
    with Queue(role="producer") as queue:
        assert (queue.stats().producers, queue.stats().consumers) == (1, 0)
        assert forked(lambda ready: (queue.put(1), queue.close())).wait() == 0
        assert queue.get() == 1
        with pytest.raises(standard.Empty) as caught:
            queue.get(timeout=0.1)
        assert not isinstance(caught.value, EOFError)


def test_before_there_ever_was_a_producer_there_is_no_end(queue):
    with pytest.raises(standard.Empty) as caught:
        queue.get(timeout=0.2)
    assert not isinstance(caught.value, EOFError)


def test_whose_only_process_is_both_is_not_at_its_end(queue):
    queue.put(1)
    queue.get()
    with pytest.raises(standard.Empty) as caught:
        queue.get(timeout=0.4)
    assert not isinstance(caught.value, EOFError)


GETS = {
    "get": lambda queue: queue.get(),
    "get_many": lambda queue: queue.get_many(),
    "recv": lambda queue: queue.recv(),
    "recv with a timeout": lambda queue: queue.recv(timeout=10 * PATIENCE),
    "recv_many": lambda queue: queue.recv_many(),
    "peek": lambda queue: queue.peek(),
    "arecv": lambda queue: asyncio.run(queue.arecv()),
}


@pytest.mark.parametrize("how", ["close", "exit", "SIGKILL"])
@pytest.mark.parametrize("verb", GETS)
def test_the_last_producers_end_is_the_end_after_the_rest(queue, forked, verb, how):
    def producer(ready):
        queue.put("the rest")
        ready()
        os.read(go, 1)
        if how == "close":
            queue.close()
        if how == "SIGKILL":
            os.kill(os.getpid(), signal.SIGKILL)

    def consumer(ready):
        assert queue.get() == "the rest"
        with pytest.raises(EOFError, match="the last producer is gone, and all was received"):
            GETS[verb](queue)
        queue.close()

    go, started = os.pipe()
    first = forked(producer)
    first.wait_ready()
    second = forked(consumer)
    # asyncio waits in select, of which the table knows nothing
    eventually(lambda: queue.stats().received == 1 if verb == "arecv" else is_waiting(queue, second, "get"))
    os.write(started, b".")
    assert second.wait() == 0  # the first is a zombie, which is dead
    assert first.wait() == (-signal.SIGKILL if how == "SIGKILL" else 0)
    assert queue.stats().deaths == (how != "close")
    for fd in (go, started):
        os.close(fd)


def test_a_timed_get_waits_to_its_end_and_then_says_so(queue, forked):
    assert forked(lambda ready: (queue.put(1), queue.close())).wait() == 0
    assert queue.get() == 1
    start = time.monotonic()
    with pytest.raises(Ended) as caught:
        queue.get(timeout=0.3)
    assert time.monotonic() - start >= 0.3
    assert isinstance(caught.value, standard.Empty)
    assert isinstance(caught.value, EOFError)
    with pytest.raises(Ended):
        queue.get_nowait()


def test_one_of_two_producers_is_not_the_last(queue, forked):
    def producer(ready):
        queue.put(os.getpid())
        ready()
        signal.pause()

    first, second = forked(producer), forked(producer)
    first.wait_ready()
    second.wait_ready()
    assert {queue.get(), queue.get()} == {first.pid, second.pid}
    first.kill()
    first.wait()
    with pytest.raises(standard.Empty) as caught:
        queue.get(timeout=0.4)
    assert not isinstance(caught.value, EOFError)
    second.kill()
    with pytest.raises(Ended):
        queue.get()


def test_a_stopped_producer_lives(queue, forked):
    def producer(ready):
        queue.put(1)
        ready()
        signal.pause()

    process = forked(producer)
    process.wait_ready()
    assert queue.get() == 1
    process.kill(signal.SIGSTOP)
    eventually(lambda: state(process.pid) == "T")
    with pytest.raises(standard.Empty) as caught:
        queue.get(timeout=0.4)
    assert not isinstance(caught.value, EOFError)
    assert participant(queue, process.pid).state == "alive"
    assert queue.stats().deaths == 0


@root_only
def test_who_is_in_another_pid_namespace_is_never_dead(queue, forked):
    def outside(ready):
        unshare(NEW_PID | NEW_NS)
        if os.fork() == 0:
            mount(b"proc", b"/proc", b"proc")
            queue.put("from process 1")
            os._exit(0)
        os.wait()

    assert forked(outside).wait() == 0
    assert queue.get() == "from process 1"
    assert participant(queue, 1).state == "unknown"
    with pytest.raises(standard.Empty) as caught:
        queue.get(timeout=0.4)
    assert not isinstance(caught.value, EOFError)
    assert queue.stats().deaths == 0


def test_a_full_table(queue, forked):
    for _ in range(lib.IK_QUEUE_PLACES):
        queue._locked(lib.ik_queue_join, *registry.myself(), 0)
    with pytest.raises(OSError, match="table of queue of 4096 bytes") as caught:
        queue.put(1)
    assert caught.value.errno == errno.EUSERS
    assert queue.empty()


def test_the_dead_make_room_in_the_table(queue, forked):
    def child(ready):
        for _ in range(lib.IK_QUEUE_PLACES):
            queue._locked(lib.ik_queue_join, *registry.myself(), 0)

    assert forked(child).wait() == 0
    queue.put(1)
    stats = queue.stats()
    assert stats.deaths == lib.IK_QUEUE_PLACES
    assert (stats.producers, len(stats.participants)) == (1, lib.IK_QUEUE_PLACES)


# --- killed: the others go on, and it is told ------------------------------------------------------


def test_killed_while_it_holds_the_getting_lock(raw, forked):
    raw.put_many([b"one", b"two"])

    def child(ready):
        raw.peek()
        ready()
        signal.pause()

    process = forked(child)
    process.wait_ready()
    assert raw.stats().receiver == (process.pid, process.pid)
    with pytest.raises(standard.Empty):
        raw.get(timeout=0.1)
    process.kill()
    process.wait()
    assert raw.get(timeout=PATIENCE) == b"one"  # it had not received it
    assert raw.get(timeout=PATIENCE) == b"two"
    stats = raw.stats()
    assert (stats.deaths, stats.recoveries, stats.messages) == (1, 1, 0)
    dead = participant(raw, process.pid)
    assert (dead.state, dead.doing, dead.consumer) == ("dead", "get", True)


def test_killed_while_it_holds_the_putting_lock(raw, forked):
    def child(ready):
        raw.reserve(10)[:] = b"never sent"
        ready()
        signal.pause()

    process = forked(child)
    process.wait_ready()
    assert raw.stats().sender == (process.pid, process.pid)
    with pytest.raises(standard.Full):
        raw.put(b"x", timeout=0.1)
    process.kill()
    process.wait()
    raw.put(b"sent", timeout=PATIENCE)
    assert raw.get_many() == [b"sent"]
    stats = raw.stats()
    assert (stats.deaths, stats.recoveries) == (1, 1)
    assert participant(raw, process.pid).doing == "put"


def test_killed_while_it_sleeps_in_get(queue, forked):
    sleeper = forked(lambda ready: queue.get())
    other = forked(lambda ready: queue.get(timeout=PATIENCE) == "for the living" or os._exit(3))
    eventually(lambda: is_waiting(queue, sleeper, "get") and is_waiting(queue, other, "get"))
    assert queue.stats().waiting == 2
    sleeper.kill()
    sleeper.wait()
    queue.put("for the living")
    assert other.wait() == 0
    assert queue.stats().deaths == 2  # the other ended by os._exit()
    assert queue.stats().waiting == 0
    dead = participant(queue, sleeper.pid)
    assert (dead.state, dead.doing, dead.waiting) == ("dead", "get", True)


def test_killed_while_it_sleeps_in_put(queue, forked):
    count = fill(queue)
    sleeper = forked(lambda ready: queue.put(b"y" * 100))
    eventually(lambda: is_waiting(queue, sleeper, "put"))
    sleeper.kill()
    sleeper.wait()
    assert participant(queue, sleeper.pid).state == "dead"
    assert [queue.get(timeout=PATIENCE) for _ in range(count)] == [b"x" * 100] * count
    queue.put("after")
    assert queue.get_many() == ["after"]
    stats = queue.stats()
    assert (stats.deaths, stats.participants[1].doing, stats.messages) == (1, "put", 0)


def test_killed_inside_put_of_a_long_message(raw, forked):
    """Half of it is in the ring."""
    process = forked(lambda ready: raw.put(b"y" * 100_000))
    eventually(lambda: raw.stats().used > 2000 and asleep(process.pid, within="futex"))
    process.kill()
    process.wait()
    raw.put(b"whole", timeout=PATIENCE)
    assert raw.get(timeout=PATIENCE) == b"whole"
    assert raw.qsize() == 0
    stats = raw.stats()
    assert (stats.deaths, stats.recoveries) == (1, 1)
    assert participant(raw, process.pid).doing == "put"


def test_killed_inside_get_of_a_long_message(forked):
    """It is stopped before, to be sure that it is amid the message; and it may be too fast for that."""
    data = random.Random(1).randbytes(1_000_000)

    def killed_amid():
        consumer, producer = forked(lambda ready: raw.get()), forked(lambda ready: raw.put(data))
        inside = consumer.pid, consumer.pid
        amid = stopped_while(consumer, lambda: raw.stats().receiver == inside and raw.stats().used)
        consumer.kill()
        assert consumer.wait() == (-signal.SIGKILL if amid else 0)
        if amid:
            assert raw.get(timeout=PATIENCE) == data
            assert participant(raw, consumer.pid).doing == "get"
        assert producer.wait() == 0
        return amid

    # A producer itself, or at a second try the consumer would find that the last one has gone.
    with Queue(capacity=4096, codec="bytes", role="producer") as raw:
        eventually(killed_amid)
        assert raw.qsize() == 0
        assert raw.stats().recoveries == 1


def test_qsize_is_exact_after_kills(raw, forked):
    def worker(ready):
        chance = random.Random(os.getpid())
        raw.put(b"first")
        ready()
        while True:
            raw.put(bytes(chance.randrange(200)))
            raw.put_many([b"a", b"b"])
            for _ in range(3 - len(raw.get_many(2))):  # as many as were put, or it fills up
                raw.get()

    for _ in range(8):
        workers = [forked(worker) for _ in range(3)]
        for one in workers:
            one.wait_ready()
        time.sleep(random.random() / 100)  # where it is killed is left to chance
        for one in workers:
            one.kill()
            one.wait()
        left = raw.qsize()
        got = 0
        while not raw.empty():
            raw.get(timeout=PATIENCE)
            got += 1
        assert got == left
    assert raw.stats().deaths == 24


def test_a_childs_call_ends_where_a_thread_held_the_lock_at_the_fork():
    """In a process of its own, since pytest's may not fork with threads."""
    program = """
import os, queue as standard, threading
from ipckit.queues import Queue

queue = Queue(codec="bytes")
queue.put(b"x")
holds, go = threading.Event(), threading.Event()

def hold():
    queue.peek()
    queue.reserve(5)
    holds.set()
    go.wait()
    queue.cancel()
    queue.release()

thread = threading.Thread(target=hold)
thread.start()
holds.wait()
pid = os.fork()
if pid == 0:
    for call, error in ((queue.get, standard.Empty), (lambda timeout: queue.put(b"y", timeout=timeout), standard.Full)):
        try:
            call(timeout=0.2)
        except error:
            continue
        os._exit(1)
    os._exit(0)
assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0
pid = os.fork()
if pid == 0:
    queue.put(b"z")  # when the parent's thread lets go
    os._exit(0)
go.set()
thread.join()
assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0
assert queue.get() == b"z"
"""
    subprocess.run([sys.executable, "-c", program], check=True, timeout=PATIENCE)


# --- Ctrl-C ----------------------------------------------------------------------------------------

BLOCKING = {
    **{name: ("get", call) for name, call in GETS.items() if name != "arecv"},
    "iteration": ("get", lambda queue: next(iter(queue))),
    "timed get": ("get", lambda queue: queue.get(timeout=10 * PATIENCE)),
    "put": ("put", lambda queue: queue.put(b"x" * 100)),
    "a long put": ("put", lambda queue: queue.put(bytes(100_000))),
    "put_many": ("put", lambda queue: queue.put_many([b"x" * 100] * 99)),
    "reserve": ("put", lambda queue: queue.reserve(100)),
}


@pytest.mark.parametrize("verb", BLOCKING)
def test_ctrl_c_ends_every_blocking_call(either, forked, verb):
    doing, call = BLOCKING[verb]

    def child(ready):
        if doing == "put":
            fill(either)
        ready()
        try:
            call(either)
        except KeyboardInterrupt:
            while not either.empty():
                either.get(timeout=PATIENCE)
            either.put("usable", timeout=PATIENCE)
            assert either.get(timeout=PATIENCE) == "usable"
            os._exit(5)

    process = forked(child)
    process.wait_ready()
    eventually(lambda: is_waiting(either, process, doing))
    process.kill(signal.SIGINT)
    assert process.wait() == 5


def test_ctrl_c_ends_join(forked):
    with JoinableQueue() as queue:
        queue.put(1)

        def child(ready):
            ready()
            try:
                queue.join()
            except KeyboardInterrupt:
                queue.get()
                queue.task_done()
                queue.join()
                os._exit(5)

        process = forked(child)
        process.wait_ready()
        eventually(lambda: asleep(process.pid, within="futex"))
        process.kill(signal.SIGINT)
        assert process.wait() == 5


# --- many ------------------------------------------------------------------------------------------


def message(producer, number):
    """Sizes from the least to beyond the ring, that say what they are."""
    chance = random.Random(producer << 20 | number)
    size = chance.choice([0, 1, 50, 500, 3000, 9000 if number % 50 == 0 else 10])
    return b"%d.%d." % (producer, number) + chance.randbytes(size)


@pytest.mark.parametrize("each", [60, pytest.param(250, marks=pytest.mark.slow)])
def test_eight_producers_and_eight_consumers_exactly_once(raw, forked, each):
    def produce(ready, producer):
        os.close(start)
        for number in range(each):  # without a time limit: the queue is not fair to its producers
            raw.put(message(producer, number))
        ready()
        os.read(go, 1)  # none is the last producer before all have begun
        raw.close()

    def consume(ready, tell):
        latest = {}
        for data in raw:
            producer, number = map(int, data.split(b".", 2)[:2])
            assert data == message(producer, number)
            assert latest.get(producer, -1) < number
            latest[producer] = number
            os.write(tell, b"%d.%d\n" % (producer, number))

    told, tell = os.pipe()
    consumers = [forked(consume, tell) for _ in range(8)]
    go, start = os.pipe()
    producers = [forked(produce, producer) for producer in range(8)]
    for producer in producers:
        producer.wait_ready()
    for fd in (tell, go, start):
        os.close(fd)
    text = b""
    while part := os.read(told, 65536):
        text += part
        if text.count(b"\n") == 8 * each:
            break
    assert [process.wait() for process in producers + consumers] == [0] * 16
    os.close(told)
    expected = [b"%d.%d" % (producer, number) for producer in range(8) for number in range(each)]
    assert Counter(text.split()) == Counter(expected)
    assert raw.qsize() == 0


# --- other programs --------------------------------------------------------------------------------


def run(program, *arguments):
    return subprocess.run(
        [sys.executable, *map(str, (program, *arguments))],
        cwd=Path(__file__).parent,
        capture_output=True,
        text=True,
        timeout=PATIENCE * 3,
    )


CHILDREN = """
import multiprocessing
import os
import sys

from ipckit.queues import JoinableQueue, Queue


def work(tasks, results, named):
    results.put([tasks.get()])
    named.put(os.getpid())


if __name__ == "__main__":
    context = multiprocessing.get_context(sys.argv[1])
    with Queue() as tasks, JoinableQueue() as results, Queue.open("mp", codec="pickle") as named:
        children = [context.Process(target=work, args=(tasks, results, named)) for _ in range(2)]
        for child in children:
            child.start()
        tasks.put_many([1, 2])
        assert sorted([results.get(timeout=600), results.get(timeout=600)]) == [[1], [2]]
        for child in children:
            child.join()
            assert child.exitcode == 0
        assert sorted(named) == sorted(child.pid for child in children)
        assert [one.consumer for one in results.stats().participants] == [True], "the children left"
        assert results.stats().deaths == named.stats().deaths == 0
        named.unlink()
"""


@pytest.mark.parametrize("method", ["fork", "spawn", "forkserver"])
def test_in_children_of_multiprocessing(method, tmp_path):
    """A program of its own, because multiprocessing leaves its helpers to the end of the program."""
    (tmp_path / "program.py").write_text(CHILDREN)
    assert run(tmp_path / "program.py", method).stderr == ""


@pytest.mark.parametrize(
    "method", ["fork", *(pytest.param(other, marks=pytest.mark.slow) for other in ("spawn", "forkserver"))]
)
def test_cpythons_own_tests(method):
    pytest.importorskip("test._test_multiprocessing", reason="this Python came without its tests")
    done = run("cpython_queues.py", method)
    assert done.returncode == 0, done.stderr
    assert "test_put (" in done.stderr
    assert done.stderr.count("... ok") >= 8


def test_a_faster_fifo_program_with_only_its_import_changed(queue):
    """Its calls and the names of its arguments, as its page shows them."""
    queue = Queue(1000 * 1000)
    obj = {"a": 42, "b": (1, 2, 3), "c": [4, 5], "d": "text", "e": b"bytes"}
    queue.put(obj)
    assert queue.qsize() == 1
    assert queue.get() == obj
    assert queue.empty()
    for _ in range(100):
        queue.put(obj, timeout=0.1)
    received = 0
    while received < 100:
        messages = queue.get_many(max_messages_to_get=100)
        assert all(one == obj for one in messages)
        received += len(messages)
    queue.put_many([obj] * 10, block=True, timeout=0.1)
    assert len(queue.get_many(block=True, timeout=0.1, max_messages_to_get=7)) == 7
    queue.get_many(block=False)
    with pytest.raises(standard.Empty):
        queue.get(timeout=0.05)
    with pytest.raises(standard.Empty):
        queue.get_nowait()
    queue.close()


# --- with a name -----------------------------------------------------------------------------------


def files(*kinds):
    with suppress(FileNotFoundError):  # the folder goes with the last that is in it
        return [name for name in os.listdir(FOLDER) if name.split(".")[0] in kinds]
    return []


def find(name="jobs"):
    found = [obj for obj in inventory.objects() if obj.id == f"queue:{name}"]
    return found[0] if found else None


def test_two_programs(jobs):
    program = """
from ipckit.queues import Queue
with Queue.open("jobs", create=False, codec="pickle", role="producer") as queue:
    queue.put_many(["from", "another", "program"])
"""
    assert run("-c", program).stderr == ""
    assert list(jobs) == ["from", "another", "program"]


def test_what_is_left_in_it_stays():
    with Queue.open("kept", maxsize=7) as queue:
        queue.put(b"kept")
    with Queue.open("kept", create=False) as queue:
        assert (queue.maxsize, queue.qsize()) == (7, 1)
        assert queue.get() == b"kept"
        queue.unlink()


def test_only_this_user_may_open_it(jobs):
    before = os.umask(0)
    try:
        with Queue.open("open") as queue:
            modes = {name: os.lstat(f"{FOLDER}/{name}").st_mode for name in os.listdir(FOLDER)}
            queue.unlink()
    finally:
        os.umask(before)
    assert stat.S_IMODE(modes["queue.open"]) == 0o600
    bells = [mode for name, mode in modes.items() if name.startswith("bell.")]
    assert len(bells) == 4
    assert all(stat.S_ISFIFO(mode) and stat.S_IMODE(mode) == 0o600 for mode in bells)


def test_made_or_opened(jobs):
    with pytest.raises(FileExistsError, match="queue 'jobs'"):
        Queue.open("jobs", exclusive=True)
    with pytest.raises(FileNotFoundError, match="queue 'none'"):
        Queue.open("none", create=False)
    assert sorted(files("queue")) == ["queue.jobs"]


@pytest.mark.parametrize(
    "name, options, what",
    [
        ("a/b", {}, "name must be 1 to 200 letters, digits and ._-, not 'a/b'"),
        ("", {}, "name must be"),
        ("x", {"role": "both"}, "role must be None, 'producer' or 'consumer', not 'both'"),
        ("x", {"exclusive": True, "create": False}, "exclusive .* needs create=True"),
        ("x", {"codec": None}, "codec must be .* not None"),
        ("x", {"capacity": -5}, "capacity must be .* not -5"),
        ("x", {"maxsize": 1 << 32}, "maxsize must be .* not 4294967296"),
    ],
)
def test_wrong_names_and_options_are_refused(name, options, what):
    with pytest.raises(ValueError, match=what):
        Queue.open(name, **options)
    assert find("x") is None


def test_an_open_role(jobs):
    with Queue.open("jobs", role="consumer") as consumer, Queue.open("jobs", role="producer"):
        assert (consumer.stats().producers, consumer.stats().consumers) == (1, 1)
    assert jobs.stats().participants == ()


def test_unlinking(jobs):
    jobs.put("kept by who has it")
    jobs.unlink()
    assert not files("queue", "bell")
    with pytest.raises(FileNotFoundError, match="queue 'jobs'"):
        jobs.unlink()
    assert jobs.get() == "kept by who has it"
    with Queue.open("jobs") as later:
        with pytest.raises(FileNotFoundError, match="queue 'jobs'"):
            jobs.unlink()
        with pytest.raises(FileNotFoundError, match="queue 'jobs' that was pickled"):
            pickle.loads(pickle.dumps(jobs))
        later.unlink()


def test_close_then_unlink():
    with Queue.open("jobs") as jobs:
        jobs.put(b"lost")
    jobs.unlink()
    assert not files("queue", "bell") and not registry.records()
    with Queue.open("jobs") as later:
        with pytest.raises(FileNotFoundError, match="'jobs', whose name is that of a later one now"):
            jobs.unlink()
        assert later.qsize() == 0
    later.unlink()
    with pytest.raises(FileNotFoundError, match="queue 'jobs'"):
        later.unlink()


def test_what_has_no_name_cant_be_unlinked_nor_pickled_elsewhere(queue):
    with pytest.raises(ValueError, match="queue of 4096 bytes has no name"):
        queue.unlink()
    with pytest.raises(TypeError, match="queue of 4096 bytes can be pickled only for a process of multiproc"):
        pickle.dumps(queue)


def test_a_pickled_handle_is_opened_anew(jobs):
    with pickle.loads(pickle.dumps(jobs)) as again:
        again.put({"a": 1})
        assert jobs.get() == {"a": 1}


def test_an_empty_one_that_nobody_has_is_as_new():
    with Queue.open("again") as queue:
        queue.put(b"x")
        queue.get()
    with Queue.open("again") as queue:  # its former producer is past
        with pytest.raises(standard.Empty) as caught:
            queue.get(timeout=0.1)
        assert not isinstance(caught.value, EOFError)
        queue.put(b"the rest")
    with Queue.open("again") as queue:
        assert queue.get() == b"the rest"
        with pytest.raises(Ended):
            queue.get()
        queue.shutdown()
    with Queue.open("again") as queue:
        queue.put(b"opened again")
        queue.unlink()


def plant(kind, path):
    if kind == "symbolic link":
        os.symlink("/etc/passwd", path)
    elif kind == "folder":
        os.mkdir(path)
    elif kind == "pipe":
        os.mkfifo(path)
    elif kind == "hard link":
        Path(f"{path}.other").touch(0o600)
        os.link(f"{path}.other", path)
    elif kind == "open to others":
        Path(path).touch()
        os.chmod(path, 0o666)


@pytest.mark.parametrize(
    "kind, number, what",
    [
        ("symbolic link", errno.ELOOP, "is no file, but l"),
        ("folder", errno.EISDIR, "is no file, but d"),
        ("pipe", errno.EINVAL, "is no file, but p"),
        ("hard link", errno.EPERM, "has 2 names"),
        ("open to others", errno.EPERM, "may be written by others"),
    ],
)
def test_what_is_not_ours_is_refused(jobs, kind, number, what):
    plant(kind, f"{FOLDER}/queue.planted")
    try:
        with pytest.raises(OSError, match=f"queue 'planted' {what}") as caught:
            Queue.open("planted")
        assert caught.value.errno == number
    finally:
        for name in os.listdir(FOLDER):
            if name.startswith("queue.planted"):
                os.rmdir(f"{FOLDER}/{name}") if kind == "folder" else os.unlink(f"{FOLDER}/{name}")


def test_a_bell_that_is_none_is_refused(jobs):
    inode = os.stat(f"{FOLDER}/queue.jobs").st_ino
    os.rename(f"{FOLDER}/bell.{inode}.room", f"{FOLDER}/bell.{inode}.moved")
    Path(f"{FOLDER}/bell.{inode}.room").touch()
    with pytest.raises(ipckit.Corrupt, match=f"queue 'jobs': bell.{inode}.room beside it is no pipe"):
        Queue.open("jobs")
    os.rename(f"{FOLDER}/bell.{inode}.moved", f"{FOLDER}/bell.{inode}.room")


@pytest.mark.parametrize("size", [1, 100, TABLE, TABLE + 512 + 255])
def test_too_small_a_file_is_corrupt(jobs, size):
    Path(f"{FOLDER}/queue.short").touch(0o600)
    os.truncate(f"{FOLDER}/queue.short", size)
    try:
        with pytest.raises(ipckit.Corrupt, match=f"queue 'short' has {size} bytes"):
            Queue.open("short")
    finally:
        os.unlink(f"{FOLDER}/queue.short")


def test_every_byte_of_the_header_damaged_is_corrupt_or_harmless():
    with Queue.open("damaged", capacity=4096) as queue:
        queue.put(b"x")
    path = f"{FOLDER}/queue.damaged"
    whole = Path(path).read_bytes()
    refused = 0
    for place in [*range(24), *range(TABLE, TABLE + 64), *range(TABLE + 128, TABLE + 384)]:
        with open(path, "r+b") as file:
            file.seek(place)
            file.write(bytes([whole[place] ^ 0xFF]))
        try:
            with Queue.open("damaged") as queue:
                queue.get(timeout=0)
        except ipckit.Corrupt as error:
            assert "queue 'damaged'" in str(error)
            refused += 1
        except (standard.Empty, ShutDown, OSError):
            pass
        Path(path).write_bytes(whole)
    assert refused > 30
    with Queue.open("damaged") as queue:
        assert queue.get() == b"x"
        queue.unlink()


def test_many_make_it_at_once_and_one_does(forked):
    def child(ready):
        ready()
        os.read(go, 1)
        with Queue.open("race", codec="pickle") as queue:
            queue.put(os.getpid())

    go, start = os.pipe()
    children = [forked(child) for _ in range(20)]
    for process in children:
        process.wait_ready()
    os.write(start, b"." * 20)
    assert [process.wait() for process in children] == [0] * 20
    with Queue.open("race", create=False, codec="pickle") as queue:
        assert sorted(queue.get_many()) == sorted(process.pid for process in children)
        assert len(files("bell")) == 2
        queue.unlink()
    for fd in (go, start):
        os.close(fd)


def test_the_inventory_lists_it_and_never_removes_a_live_one(jobs, forked):
    assert find().verdict == "live"
    assert inventory.collect(dead=True) == []
    process = forked(lambda ready: (ready(), signal.pause()))
    process.wait_ready()
    jobs.close()
    assert find().verdict == "live"
    assert inventory.collect(dead=True) == []
    process.kill()
    process.wait()
    assert find().verdict != "live"


def test_what_the_killed_left_is_collected(forked):
    def child(ready):
        with Queue.open("orphan") as queue:
            queue.put(b"x")
            ready()
            signal.pause()

    process = forked(child)
    process.wait_ready()
    process.kill()
    process.wait()
    assert find("orphan").verdict == "orphan"
    assert [obj.id for obj in inventory.collect()] == ["queue:orphan"]
    assert not files("queue", "bell")


def test_what_was_left_on_purpose_stays_and_can_be_removed():
    Queue.open("left").close()
    assert inventory.collect() == []
    inventory.remove(find("left"))
    assert find("left") is None
    assert not files("bell")


def test_bells_of_a_queue_that_was_never_made_are_collected(jobs):
    os.mkfifo(f"{FOLDER}/bell.1.data", 0o600)
    inventory.collect()
    left = set(files("bell"))
    assert left == {f"bell.{os.stat(f'{FOLDER}/queue.jobs').st_ino}.{which}" for which in ("data", "room")}


def test_no_room_for_it_leaves_nothing(forked):
    def child(ready):
        resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 20, 1 << 20))
        with pytest.raises(OSError, match="queue 'large' of .* bytes") as caught:
            Queue.open("large", capacity=2 << 20)
        assert caught.value.errno == errno.EFBIG
        assert files("queue", "bell") == []

    assert forked(child).wait() == 0


def test_the_example():
    done = run(Path(__file__).parent.parent / "examples/work_queue.py")
    assert (done.stderr, done.stdout.splitlines()) == (
        "",
        ["[(0, 0), (1, 1), (2, 4), (3, 9), (4, 16), (5, 25)]", "1 worker died; 0 tasks are left"],
    )
