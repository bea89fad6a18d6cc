"""What a ring has beyond the verbs of all endpoints, which test_endpoints.py holds it to."""

import asyncio
import errno
import hashlib
import io
import mmap
import multiprocessing
import os
import pickle
import random
import select
import signal
import subprocess
import sys
import threading
import time
from contextlib import suppress
from pathlib import Path

import pytest
from conftest import PATIENCE, eventually
from hypothesis import given, settings
from hypothesis import strategies as st
from procfs import asleep, stopped_while, wakeups

import ipckit
from ipckit import Ring
from ipckit.ring import memory_size

HEADER = memory_size(1) - 256


@pytest.fixture
def ring():
    with Ring(8192) as made:
        yield made


@pytest.fixture
def many():
    with Ring(8192, many_senders=True, many_receivers=True) as made:
        yield made


@pytest.fixture(params=[False, True], ids=["of two", "of many"])
def either(request):
    with Ring(8192, many_senders=request.param, many_receivers=request.param) as made:
        yield made


# --- sizes ---------------------------------------------------------------------------------------


def test_the_capacity_is_a_power_of_two():
    for asked, made in [(1, 256), (256, 256), (257, 512), (1 << 20, 1 << 20), ((1 << 20) + 1, 1 << 21)]:
        with Ring(asked) as ring:
            assert ring.capacity == ring.stats().capacity == made


@pytest.mark.parametrize("capacity", [0, -1, (1 << 34) + 1])
def test_a_capacity_out_of_range_is_refused(capacity):
    with pytest.raises(ValueError, match=f"not {capacity}"):
        Ring(capacity)


@pytest.mark.parametrize("options", [{"max_message": 0}, {"max_message": 1 << 40}, {"max_messages": -1}])
def test_a_limit_out_of_range_is_refused(options):
    with pytest.raises(ValueError, match=f"{next(iter(options.values()))}"):
        Ring(4096, **options)


def test_sizes_from_nothing_to_beyond_the_ring(either, forked):
    sizes = [*range(40), 4087, 4088, 4089, 8191, 8192, 8193, 100_000, 3, 1_000_001, 0]

    def child(ready):
        for size in sizes:
            either.send(random.Random(size).randbytes(size), timeout=PATIENCE)

    process = forked(child)
    for size in sizes:
        assert either.recv(timeout=PATIENCE) == random.Random(size).randbytes(size)
    assert process.wait() == 0
    assert either.stats().messages == either.stats().used == 0


@settings(max_examples=60)
@given(st.lists(st.one_of(st.none(), st.integers(0, 500)), max_size=60), st.booleans())
def test_like_a_deque(steps, locked):
    expected = []
    with Ring(1024, many_senders=locked, many_receivers=locked) as ring:
        for number, size in enumerate(steps):
            if size is None:
                if expected:
                    assert ring.recv(timeout=0) == expected.pop(0)
                else:
                    with pytest.raises(TimeoutError):
                        ring.recv(timeout=0)
            else:
                data = bytes([number]) * size
                try:
                    ring.send(data, timeout=0)
                    expected.append(data)
                except TimeoutError:
                    assert ring.stats().used + 2 * (size + 16) > 1024  # it may have to skip as much
            assert ring.stats().messages == len(expected)


def test_a_message_beyond_max_message_is_refused_both_ways():
    with ipckit.SharedMemory(memory_size(4096)) as memory:
        ours = Ring.create(memory.buf, max_message=1000)
        theirs = Ring.attach(memory.buf, max_message=10)
        with ours, theirs:
            for send in (lambda: ours.send(bytes(1001)), lambda: ours.send_many([b"", bytes(1001)])):
                with pytest.raises(
                    OSError, match="1001 bytes of at most 1000 bytes, which is max_message"
                ) as caught:
                    send()
                assert caught.value.errno == errno.EMSGSIZE
            ours.send(bytes(11))
            for receive in (theirs.recv, theirs.recv_many, lambda: theirs.recv_into(bytearray(99))):
                with pytest.raises(
                    OSError, match="11 bytes of at most 10 bytes, which is max_message"
                ) as caught:
                    receive()
                assert caught.value.errno == errno.EMSGSIZE
            assert ours.recv(timeout=0) == bytes(11)


def test_max_messages_bounds_the_number():
    with Ring(8192, max_messages=3) as ring:
        assert ring.send_many([b"1", b"2", b"3", b"4"], timeout=0) == 3
        with pytest.raises(TimeoutError):
            ring.send(b"4", timeout=0)
        assert ring.recv() == b"1"
        ring.send(b"4", timeout=0)
        assert ring.recv_many() == [b"2", b"3", b"4"]


# --- in place ------------------------------------------------------------------------------------


def test_reserve_and_commit(either):
    view = either.reserve(10)
    assert not view.readonly
    view[:] = b"0123456789"
    with pytest.raises(TimeoutError):
        receive_elsewhere(either)
    either.commit()
    assert either.recv() == b"0123456789"
    either.reserve(10)[:3] = b"abc"
    either.commit(3)
    assert either.recv() == b"abc"


def receive_elsewhere(ring):
    """In another thread, since this one may be inside an end."""
    got = []

    def receive():
        try:
            got.append(ring.recv(timeout=0))
        except Exception as error:
            got.append(error)

    thread = threading.Thread(target=receive)
    thread.start()
    thread.join(PATIENCE)
    if isinstance(got[0], Exception):
        raise got[0]
    return got[0]


def test_a_cancelled_reservation_sends_nothing(either):
    either.reserve(10)
    either.cancel()
    with pytest.raises(TimeoutError):
        either.recv(timeout=0)
    either.send(b"next")
    assert either.recv() == b"next"


def test_peek_and_release(either):
    either.send_many([b"first", b"second"])
    view = either.peek()
    assert view.readonly
    assert bytes(view) == b"first"
    either.keep()
    assert bytes(either.peek()) == b"first"
    either.release()
    assert either.recv() == b"second"


def test_a_view_that_outlives_its_release_is_no_crash():
    np = pytest.importorskip("numpy")
    ring = Ring(1 << 16)
    ring.send(bytes(1000))
    array = np.frombuffer(ring.peek(), dtype=np.uint8)
    ring.release()
    written = np.frombuffer(ring.reserve(1000), dtype=np.uint8)
    ring.commit()
    ring.close()
    written[:] = 7
    assert array.sum() >= 0
    assert int(written.sum()) == 7000


def test_a_released_view_says_so(ring):
    ring.send(b"data")
    view = ring.peek()
    ring.release()
    with pytest.raises(ValueError, match="released memoryview"):
        view[0]


def test_views_are_aligned(ring):
    for size in (1, 3, 8, 9):
        ring.send(bytes(size))
        view = ring.peek()
        with memoryview(view) as again:
            import ctypes

            address = ctypes.addressof(ctypes.c_char.from_buffer(mmap.mmap(-1, 1)))  # a page, to compare with
            assert address % 8 == 0
            assert again.nbytes == size
        ring.release()


def test_in_place_there_is_only_half_the_ring(ring):
    with pytest.raises(
        OSError, match="4089 bytes of at most 4088 bytes, which lie in one piece at a capacity of 8192"
    ) as caught:
        ring.reserve(4089)
    assert caught.value.errno == errno.EMSGSIZE
    ring.send(bytes(5000))
    with pytest.raises(
        OSError, match="5000 bytes of at most 4088 bytes, which lie in one piece at a capacity of 8192"
    ) as caught:
        ring.peek()
    assert caught.value.errno == errno.EMSGSIZE
    assert ring.recv() == bytes(5000)


def test_what_was_not_begun_cant_be_ended(ring):
    for verb, name in [
        (ring.commit, "commit"),
        (ring.cancel, "cancel"),
        (ring.release, "release"),
        (ring.keep, "keep"),
    ]:
        with pytest.raises(RuntimeError, match=f"{name}: this thread has nothing"):
            verb()
    with pytest.raises(ValueError, match="not -1"):
        ring.reserve(-1)
    ring.reserve(10)
    with pytest.raises(ValueError, match="size must be an integer from 0 to 10, not 11"):
        ring.commit(11)
    ring.cancel()


def test_another_thread_cant_commit(either):
    either.reserve(5)
    errors = []

    def commit():
        try:
            either.commit()
        except RuntimeError as error:
            errors.append(error)

    thread = threading.Thread(target=commit)
    thread.start()
    thread.join(PATIENCE)
    assert len(errors) == 1
    either.cancel()


def test_who_is_inside_cant_enter_again(either):
    either.reserve(5)
    for verb in (lambda: either.send(b"x", timeout=1), lambda: either.reserve(1, timeout=1)):
        with pytest.raises(OSError, match="ring of 8192") as caught:
            verb()
        assert caught.value.errno == errno.EDEADLK
    either.cancel()
    either.send(b"x")
    either.peek()
    with pytest.raises(OSError, match="ring of 8192") as caught:
        either.recv(timeout=1)
    assert caught.value.errno == errno.EDEADLK
    either.release()


# --- deaths --------------------------------------------------------------------------------------


def test_killed_with_a_reservation(many, forked):
    def child(ready):
        many.reserve(100)[:] = b"x" * 100
        ready()
        signal.pause()

    process = forked(child)
    process.wait_ready()
    assert many.stats().sender == process.pid
    with pytest.raises(TimeoutError):
        many.send(b"not yet", timeout=0.01)
    process.kill()
    process.wait()
    many.send(b"after", timeout=PATIENCE)
    assert many.recv(timeout=0) == b"after"
    assert many.stats().recoveries == 1


def test_killed_while_peeking(many, forked):
    def child(ready):
        assert bytes(many.peek()) == b"once"
        ready()
        signal.pause()

    many.send(b"once")
    process = forked(child)
    process.wait_ready()
    assert many.stats().receiver == process.pid
    with pytest.raises(TimeoutError):
        many.recv(timeout=0.01)
    process.kill()
    process.wait()
    assert many.recv(timeout=PATIENCE) == b"once"


def test_a_waiting_receiver_gets_on_when_the_peeker_is_killed(many, forked):
    def peeker(ready):
        many.peek()
        ready()
        signal.pause()

    def receiver(ready):
        ready()
        assert many.recv(timeout=PATIENCE) == b"once"

    many.send(b"once")
    first = forked(peeker)
    first.wait_ready()
    second = forked(receiver)
    second.wait_ready()
    first.kill()
    assert second.wait() == 0


def test_killed_amid_a_long_message(many, forked):
    """The receivers drop the part, and get what the others send."""

    def child(ready):
        many.send(bytes(10_000_000))

    process = forked(child)
    eventually(lambda: many.stats().used == 8192 or many.stats().used > 6000)
    process.kill()
    process.wait()
    many_sender = threading.Thread(target=lambda: many.send(b"whole", timeout=PATIENCE))
    many_sender.start()
    assert many.recv(timeout=PATIENCE) == b"whole"
    many_sender.join(PATIENCE)


def test_a_long_message_is_sent_again_when_its_receiver_is_killed(many, forked):
    """It is stopped before, to be sure that it is amid the message; and it may be too fast for that."""
    data = os.urandom(1_000_000)

    def killed_amid():
        receiver, sender = forked(lambda ready: many.recv()), forked(lambda ready: many.send(data))
        amid = stopped_while(receiver, lambda: many.stats().receiver == receiver.pid and many.stats().used)
        receiver.kill()
        assert receiver.wait() == (-signal.SIGKILL if amid else 0)
        if amid:
            assert many.recv(timeout=PATIENCE) == data
        assert sender.wait() == 0
        return amid

    eventually(killed_amid)
    assert many.stats().recoveries == 1


def test_the_dead_are_survived_by_the_sleeping(many, forked):
    def child(ready):
        ready()
        many.recv()

    for _ in range(5):
        process = forked(child)
        process.wait_ready()
        process.kill()
        process.wait()
    many.send(b"for the living")
    assert many.recv(timeout=PATIENCE) == b"for the living"


# --- timeouts and signals ------------------------------------------------------------------------


def test_a_timeout_bounds_a_long_message_in_its_middle(either):
    start = time.monotonic()
    with pytest.raises(TimeoutError):
        either.send(bytes(1 << 20), timeout=0.1)
    assert time.monotonic() - start >= 0.1
    with pytest.raises(TimeoutError):
        either.recv(timeout=0.05)
    either.send(b"whole")
    assert either.recv(timeout=0) == b"whole"
    assert either.stats().messages == 0


def test_without_waiting_a_long_message_goes_through_too(either, forked):
    data = os.urandom(1 << 20)

    def child(ready):
        while True:
            try:
                return either.send(data, timeout=0)
            except TimeoutError:
                pass

    process = forked(child)
    got = []

    def received():
        with suppress(TimeoutError):
            got.append(either.recv(timeout=0))
        return got

    eventually(received)
    assert got == [data]
    assert process.wait() == 0


BLOCKING = {
    "recv": lambda ring: ring.recv(),
    "recv_into": lambda ring: ring.recv_into(bytearray(10)),
    "recv_many": lambda ring: ring.recv_many(),
    "peek": lambda ring: ring.peek(),
    "iteration": lambda ring: next(iter(ring)),
    "send": lambda ring: ring.send(bytes(4000)),
    "send of a long one": lambda ring: ring.send(bytes(100_000)),
    "send_many": lambda ring: [ring.send_many([bytes(4000)] * 9) for _ in range(9)],
    "reserve": lambda ring: ring.reserve(4000),
}


@pytest.mark.parametrize("verb", BLOCKING)
def test_ctrl_c_ends_every_blocking_call_and_nothing_is_lost(either, forked, verb):
    def child(ready):
        signal.signal(signal.SIGINT, signal.default_int_handler)
        if verb.startswith(("send", "reserve")):
            while True:
                try:
                    either.send(bytes(1000), timeout=0)
                except TimeoutError:
                    break
        ready()
        try:
            BLOCKING[verb](either)
        except KeyboardInterrupt:
            while either.stats().messages:
                either.recv(timeout=0)
            either.send(b"usable", timeout=PATIENCE)
            assert either.recv(timeout=PATIENCE) == b"usable"
            os._exit(5)

    process = forked(child)
    process.wait_ready()
    eventually(lambda: asleep(process.pid, within="futex"))
    process.kill(signal.SIGINT)
    assert process.wait() == 5


def test_close_ends_the_calls_of_other_threads(either):
    errors = []

    def receive():
        try:
            either.recv()
        except ipckit.Closed as error:
            errors.append(error)

    thread = threading.Thread(target=receive)
    thread.start()
    eventually(lambda: asleep(os.getpid(), thread.native_id, within="futex"))
    either.close()
    thread.join(PATIENCE)
    assert len(errors) == 1


def test_a_blocked_receiver_sleeps(ring, forked):
    """It wakes up after slices of 25, 50 and then 100 ms only. What that costs is in bench/."""

    def child(ready):
        start, before = time.monotonic(), wakeups(os.getpid())
        ready()
        with pytest.raises(TimeoutError):
            ring.recv(timeout=0.5)
        assert wakeups(os.getpid()) - before <= 10 + (time.monotonic() - start) / 0.1

    process = forked(child)
    process.wait_ready()
    eventually(lambda: asleep(process.pid, within="futex"))
    assert process.wait() == 0


# --- closing the sides ---------------------------------------------------------------------------


def test_close_write_is_the_end_after_the_rest(either):
    either.send(b"last")
    either.close_write()
    assert list(either) == [b"last"]
    with pytest.raises(EOFError, match="all was received"):
        either.recv()
    with pytest.raises(BrokenPipeError, match="ring of 8192"):
        either.send(b"too late")


def test_close_read_is_a_broken_pipe(either):
    either.close_read()
    for verb in (
        lambda: either.send(b"x"),
        lambda: either.send_many([b"x"]),
        lambda: either.send(bytes(9999)),
    ):
        with pytest.raises(BrokenPipeError) as caught:
            verb()
        assert caught.value.errno == errno.EPIPE


def test_closing_wakes_the_sleeping(either, forked):
    def child(ready):
        ready()
        assert list(either) == []

    process = forked(child)
    process.wait_ready()
    either.close_write()
    assert process.wait() == 0


def test_iteration_ends_in_asyncio(either):
    either.send_many([b"1", b"2"])
    either.close_write()

    async def all_of_it():
        return [message async for message in either]

    assert asyncio.run(all_of_it()) == [b"1", b"2"]


# --- over any memory -----------------------------------------------------------------------------


def test_in_a_mapping_of_ones_own(forked):
    pages = mmap.mmap(-1, 16384)
    with Ring.create(pages) as ring:
        assert ring.capacity == 8192

        def child(ready):
            with Ring.attach(pages) as theirs:
                theirs.send(b"from the child")

        process = forked(child)
        assert ring.recv(timeout=PATIENCE) == b"from the child"
        assert process.wait() == 0
        with pytest.raises(io.UnsupportedOperation, match="without bells"):
            ring.fileno()
        with pytest.raises(TypeError, match="can't be pickled"):
            multiprocessing.reduction.ForkingPickler.dumps(ring)


def test_what_is_no_ring_is_refused():
    pages = mmap.mmap(-1, 16384)
    with pytest.raises(BlockingIOError):
        Ring.attach(pages)
    pages[:8] = b"deadbeef"
    with pytest.raises(ipckit.Corrupt, match="holds no ring"):
        Ring.attach(pages)
    Ring.create(pages).close()
    for at in range(40):
        old = pages[at]
        pages[at] = old ^ 0xFF
        if at < 20:  # magic, capacity, flags
            with pytest.raises(ipckit.Corrupt, match="16384 bytes"):
                Ring.attach(pages)
        pages[at] = old
    Ring.attach(pages).close()


def test_memory_that_wont_do_is_refused():
    pages = mmap.mmap(-1, 16384)
    for buffer, why in [
        (memoryview(pages)[8:], "multiple of 128"),
        (memoryview(pages)[: HEADER + 255], f"needs {HEADER + 256} bytes, not {HEADER + 255}"),
    ]:
        with pytest.raises(ValueError, match=why):
            Ring.create(buffer)
    for make, buffer in ((Ring.create, bytes(16384)), (Ring.attach, memoryview(pages).toreadonly())):
        with pytest.raises(TypeError, match="buffer must be writable, not a read-only"):
            make(buffer)
    with pytest.raises(BufferError, match="buffer must be C-contiguous"):
        Ring.create(memoryview(pages)[::2])


def test_spoilt_memory_is_corrupt_and_no_crash():
    pages = mmap.mmap(-1, 16384)
    with Ring.create(pages) as ring:
        ring.send(b"x")
        pages[HEADER : HEADER + 8] = b"\xff" * 8
        for verb in (ring.recv, ring.recv_many, ring.peek, lambda: ring.recv_into(bytearray(1))):
            with pytest.raises(ipckit.Corrupt, match="recv|peek"):
                verb()


# --- processes -----------------------------------------------------------------------------------


CHILDREN = """
import multiprocessing, sys
import ipckit

def send_one(ring):
    assert ring.fileno() >= 0
    ring.send(b"from the child")

if __name__ == "__main__":
    context = multiprocessing.get_context(sys.argv[1])
    with ipckit.Ring(4096, many_senders=True) as ring:
        children = [context.Process(target=send_one, args=(ring,)) for _ in range(2)]
        for child in children:
            child.start()
        assert [ring.recv() for _ in children] == [b"from the child"] * 2
        for child in children:
            child.join()
            assert child.exitcode == 0
"""


@pytest.mark.parametrize("method", ["fork", "spawn", pytest.param("forkserver", marks=pytest.mark.slow)])
def test_in_children_of_multiprocessing(method, tmp_path):
    """In a process of its own, because multiprocessing leaves its helpers to the end of the program."""
    (tmp_path / "program.py").write_text(CHILDREN)
    subprocess.run([sys.executable, tmp_path / "program.py", method], check=True, timeout=PATIENCE)


def test_many_processes_each_message_once(many, forked):
    def sender(ready, number):
        for i in range(500):
            size = (i * 37 + number) % 3000
            many.send(b"%d %d %d " % (number, i, size) + bytes(size), timeout=PATIENCE)

    def receiver(ready, results):
        got = []
        for message in many:
            number, i, size = message.split(b" ")[:3]
            assert message == b"%s %s %s " % (number, i, size) + bytes(int(size))
            got.append((int(number), int(i)))
        for number in range(3):  # in the order of each sender
            mine = [i for sender, i in got if sender == number]
            assert mine == sorted(mine)
        os.write(results, b"%d\n" % len(got))

    results, write = os.pipe()
    receivers = [forked(receiver, write) for _ in range(3)]
    senders = [forked(sender, number) for number in range(3)]
    assert [process.wait() for process in senders] == [0] * 3
    many.close_write()
    assert [process.wait() for process in receivers] == [0] * 3
    os.close(write)
    with open(results) as lines:
        assert sum(map(int, lines)) == 1500


def test_a_child_forked_while_a_thread_is_inside(either, forked):
    inside, leave = threading.Event(), threading.Event()

    def hold():
        either.reserve(10)
        inside.set()
        leave.wait(PATIENCE)
        either.cancel()

    def child(ready):
        if not either.stats().sender:  # without a lock the child's end is its own
            either.send(b"from the child", timeout=PATIENCE)

    thread = threading.Thread(target=hold)
    thread.start()
    inside.wait(PATIENCE)
    import warnings

    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        process = forked(child)
    assert process.wait() == 0
    leave.set()
    thread.join(PATIENCE)


def test_a_hash_through_a_small_ring(forked):
    with Ring(65536, max_message=1 << 30) as ring:
        data = os.urandom(20_000_001)

        def child(ready):
            ring.send(data)

        forked(child)
        assert hashlib.sha256(ring.recv(timeout=PATIENCE)).digest() == hashlib.sha256(data).digest()


# --- asyncio -------------------------------------------------------------------------------------


def test_long_messages_in_asyncio(either):
    data = [os.urandom(300_000) for _ in range(3)]

    async def all_of_them():
        sending = [asyncio.create_task(either.asend(message, timeout=PATIENCE)) for message in data]
        receiving = [asyncio.create_task(either.arecv(timeout=PATIENCE)) for _ in data]
        got = await asyncio.gather(*receiving)
        await asyncio.gather(*sending)
        return got

    assert sorted(asyncio.run(all_of_them())) == sorted(data)


def test_a_cancelled_long_receive_loses_nothing(either):
    data = os.urandom(300_000)

    async def cancel_and_receive():
        sending = asyncio.create_task(either.asend(data, timeout=PATIENCE))
        receiving = asyncio.create_task(either.arecv())
        for _ in range(20):
            await asyncio.sleep(0)
        receiving.cancel()
        with pytest.raises(asyncio.CancelledError):
            await receiving
        got = await either.arecv(timeout=PATIENCE)
        await sending
        return got

    assert asyncio.run(cancel_and_receive()) == data


def test_a_cancelled_long_send_was_not_sent(either):
    async def cancel():
        sending = asyncio.create_task(either.asend(bytes(300_000)))
        for _ in range(5):
            await asyncio.sleep(0)
        sending.cancel()
        with pytest.raises(asyncio.CancelledError):
            await sending

    asyncio.run(cancel())
    with pytest.raises(TimeoutError):
        either.recv(timeout=0.05)
    either.send(b"next")
    assert either.recv(timeout=0) == b"next"


def test_readable_across_processes(either, forked):
    def child(ready):
        ready()
        either.send(b"rung")

    fd = either.fileno()
    assert not select.select([fd], [], [], 0)[0]
    process = forked(child)
    assert select.select([fd], [], [], PATIENCE)[0]
    assert either.recv(timeout=0) == b"rung"
    assert not select.select([fd], [], [], 0)[0]
    assert process.wait() == 0


def test_the_example_runs():
    example = Path(__file__).parent.parent / "examples" / "ring_frames.py"
    done = subprocess.run([sys.executable, example], capture_output=True, text=True, timeout=PATIENCE)
    assert done.stdout.startswith(
        "30 frames of 307200 bytes, then b'still in order'; camera killed by SIGKILL"
    )


def test_closed_by_another_thread_while_this_one_reserves(either):
    view = either.reserve(100)
    thread = threading.Thread(target=either.close)
    thread.start()
    thread.join(PATIENCE)
    view[:] = bytes(100)
    either.commit()
    with pytest.raises(ipckit.Closed):
        either.stats()


@pytest.mark.parametrize("verb", ["reserve", "peek"])
def test_dropped_while_another_thread_is_inside_it_stays_mapped(verb):
    """Or the thread's next lock would be put into a list that goes through what is no longer there."""
    program = f"""
import threading
from ipckit import Ring, sync

for _ in range(20):
    rings = [Ring(4096, many_senders=True, many_receivers=True)]
    inside, dropped = threading.Event(), threading.Event()

    def use_other_locks():
        rings[0].send(b"x")
        rings[0].{verb}({"5" if verb == "reserve" else ""})
        inside.set()
        dropped.wait()
        for _ in range(10):
            with sync.Lock():
                pass

    thread = threading.Thread(target=use_other_locks)
    thread.start()
    inside.wait()
    rings.clear()
    dropped.set()
    thread.join()
"""
    subprocess.run([sys.executable, "-c", program], check=True, timeout=PATIENCE)


def test_pickled_elsewhere_it_says_why():
    with Ring(4096) as ring, pytest.raises(TypeError, match="ring of 4096 bytes can be pickled only"):
        pickle.dumps(ring)
    assert threading.active_count() == 1


def test_numbers_while_another_thread_closes():
    for _ in range(200):
        ring = Ring(256)
        thread = threading.Thread(target=ring.close)
        thread.start()
        with suppress(ipckit.Closed):
            while True:
                ring.stats()
        thread.join(PATIENCE)
