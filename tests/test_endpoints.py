"""One test body for all endpoints: the same verbs, timeouts and errors."""

import array
import asyncio
import errno
import os
import select
import threading
import time

import pytest
from conftest import PATIENCE, eventually

import ipckit
from ipckit import posix, sysv
from ipckit.channel import channel
from ipckit.endpoints import Receiver, Sender
from ipckit.queues import Queue


def a_pipe():
    receiver, sender = ipckit.pipe()
    return sender, receiver, lambda: None


def a_duplex():
    near, far = ipckit.duplex()
    return near, far, lambda: None


def a_posix_queue():
    queue = posix.MessageQueue(f"/endpoints-{os.getpid()}", create=True, exclusive=True)
    again = posix.MessageQueue(queue.name)
    return queue, again, lambda: remove(posix.MessageQueue(queue.name))


def a_system_v_queue():
    queue = sysv.MessageQueue()
    return queue, sysv.MessageQueue.from_id(queue.id), lambda: remove(sysv.MessageQueue.from_id(queue.id))


def a_ring():
    ring = ipckit.Ring(8192)
    return ring, ring, lambda: None


def a_ring_of_many():
    ring = ipckit.Ring(8192, many_senders=True, many_receivers=True)
    return ring, ring, lambda: None


def a_channel():
    near, far = channel(8192)
    return near, far, lambda: None


def a_queue():
    queue = Queue(capacity=8192, codec="bytes")
    return queue, queue, lambda: None


def a_named_queue():
    queue = Queue.open("endpoints", exclusive=True, capacity=8192)
    again = Queue.open("endpoints", create=False)
    return queue, again, lambda: remove(Queue.open("endpoints", create=False))


def remove(queue):
    with queue:
        queue.remove() if isinstance(queue, sysv.MessageQueue) else queue.unlink()


ENDPOINTS = {
    "pipe": a_pipe,
    "duplex": a_duplex,
    "POSIX queue": a_posix_queue,
    "System V queue": a_system_v_queue,
    "ring": a_ring,
    "ring of many": a_ring_of_many,
    "channel": a_channel,
    "queue": a_queue,
    "named queue": a_named_queue,
}


@pytest.fixture(params=ENDPOINTS.values(), ids=ENDPOINTS.keys())
def ends(request):
    sender, receiver, give_up = request.param()
    yield sender, receiver
    sender.close()
    receiver.close()
    give_up()


def fill(sender, data=bytes(1000)):
    """Send until there is no more room; the number of messages."""
    count = 0
    while True:
        try:
            sender.send(data, timeout=0)
        except TimeoutError:
            return count
        count += 1


def room(receiver, size):
    """A buffer for messages of *size*; a POSIX queue insists on room for any that it may hold."""
    return bytearray(receiver.max_message if isinstance(receiver, posix.MessageQueue) else size)


def readable(receiver, timeout=0):
    return bool(select.select([receiver.fileno()], [], [], timeout)[0])


def test_each_has_the_verbs(ends):
    sender, receiver = ends
    assert isinstance(sender, Sender)
    assert isinstance(receiver, Receiver)


@pytest.mark.parametrize(
    "data", [b"x", b"", b"a\0b", bytearray(b"array"), memoryview(b"a view")[2:], array.array("i", [1, 2])]
)
def test_what_is_sent_comes_out(ends, data):
    sender, receiver = ends
    assert sender.send(data) is None
    got = receiver.recv(timeout=PATIENCE)
    assert type(got) is bytes
    assert got == bytes(data)


def test_in_order_one_by_one_and_many(ends):
    sender, receiver = ends
    messages = [b"%d" % number * (number % 7) for number in range(10)]
    for message in messages[:5]:
        sender.send(message)
    assert sender.send_many(iter(messages[5:])) == 5
    got = [receiver.recv(timeout=PATIENCE) for _ in range(3)] + receiver.recv_many(2, timeout=PATIENCE)
    assert len(got) == 5
    while len(got) < 10:
        more = receiver.recv_many(timeout=PATIENCE)
        assert more
        got += more
    assert got == messages


@pytest.mark.parametrize("max", [0, -1])
def test_receiving_fewer_than_one_is_refused(ends, max):
    with pytest.raises(ValueError, match=f"not {max}"):
        ends[1].recv_many(max)


def test_into_a_buffer(ends):
    sender, receiver = ends
    sender.send(b"twelve bytes")
    buffer = room(receiver, 20)
    assert receiver.recv_into(buffer, timeout=PATIENCE) == 12
    assert buffer[:20] == b"twelve bytes" + bytes(8)
    with pytest.raises(TypeError, match="read-only bytes"):
        receiver.recv_into(bytes(20), timeout=0)


def test_a_message_too_large_for_the_buffer_stays(ends):
    sender, receiver = ends
    sender.send(b"twelve bytes")
    with pytest.raises(OSError, match="11 bytes") as caught:
        receiver.recv_into(bytearray(11), timeout=PATIENCE)
    assert caught.value.errno == errno.EMSGSIZE
    assert receiver.recv(timeout=0) == b"twelve bytes"


def test_what_is_no_buffer_is_refused(ends):
    sender, receiver = ends
    for data in ("text", 5, None, [b"x"]):
        with pytest.raises(TypeError, match=type(data).__name__):
            sender.send(data)
    with pytest.raises(TimeoutError):
        receiver.recv(timeout=0)


@pytest.mark.parametrize("timeout", [0, 0.05])
def test_nothing_comes(ends, timeout):
    _, receiver = ends
    for verb in (
        receiver.recv,
        receiver.recv_many,
        lambda timeout: receiver.recv_into(room(receiver, 9), timeout=timeout),
    ):
        start = time.monotonic()
        with pytest.raises(TimeoutError) as caught:
            verb(timeout=timeout)
        assert caught.value.errno == errno.ETIMEDOUT
        assert time.monotonic() - start >= timeout


@pytest.mark.parametrize("timeout", [0, 0.05])
def test_there_is_no_room(ends, timeout):
    sender, receiver = ends
    count = fill(sender)
    assert count > 0
    start = time.monotonic()
    with pytest.raises(TimeoutError) as caught:
        sender.send(bytes(1000), timeout=timeout)
    assert caught.value.errno == errno.ETIMEDOUT
    assert time.monotonic() - start >= timeout
    for _ in range(count):
        assert receiver.recv(timeout=PATIENCE) == bytes(1000)
    with pytest.raises(TimeoutError):  # the one that was not sent never will be
        receiver.recv(timeout=0)


@pytest.mark.parametrize("timeout", [-1, float("nan")])
def test_a_bad_timeout_is_refused(ends, timeout):
    sender, receiver = ends
    for verb in (lambda: sender.send(b"x", timeout=timeout), lambda: receiver.recv(timeout=timeout)):
        with pytest.raises(ValueError, match="timeout must be None or a number of seconds"):
            verb()


def test_a_blocked_call_ends_with_the_message(ends, forked):
    sender, receiver = ends

    def child(ready):
        ready()
        sender.send(b"from the child")

    waiting = threading.Event()
    got = []

    def receive():
        waiting.set()
        got.append(receiver.recv(timeout=PATIENCE))

    process = forked(child)
    thread = threading.Thread(target=receive)
    thread.start()
    process.wait_ready()
    thread.join(PATIENCE)
    assert got == [b"from the child"]


def test_readable_when_a_receive_would_not_block(ends):
    sender, receiver = ends
    assert not readable(receiver)
    sender.send(b"one")
    sender.send(b"two")
    eventually(lambda: readable(receiver))
    receiver.recv(timeout=0)
    assert readable(receiver, PATIENCE)
    receiver.recv(timeout=0)
    assert not readable(receiver)
    sender.send(b"three")
    eventually(lambda: readable(receiver))
    assert receiver.recv(timeout=0) == b"three"


def test_closed_is_closed(ends):
    sender, receiver = ends
    assert not sender.closed
    assert not receiver.closed
    for end in ends:
        with end:
            pass
        end.close()
        assert end.closed
    verbs = [
        lambda: sender.send(b"x"),
        lambda: sender.send_many([b"x"]),
        receiver.recv,
        lambda: receiver.recv(timeout=0),
        lambda: receiver.recv_into(bytearray(9000)),
        receiver.recv_many,
        receiver.fileno,
        sender.fileno,
        lambda: asyncio.run(sender.asend(b"x")),
        lambda: asyncio.run(receiver.arecv()),
        lambda: next(iter(receiver)),
    ]
    for verb in verbs:
        with pytest.raises(ipckit.Closed):
            verb()


def test_in_asyncio(ends):
    sender, receiver = ends

    async def both():
        receiving = asyncio.create_task(receiver.arecv(timeout=PATIENCE))
        await asyncio.sleep(0)
        await sender.asend(b"awaited", timeout=PATIENCE)
        assert await receiving == b"awaited"
        with pytest.raises(TimeoutError):
            await receiver.arecv(timeout=0.02)
        cancelled = asyncio.create_task(receiver.arecv())
        await asyncio.sleep(0.01)
        cancelled.cancel()
        with pytest.raises(asyncio.CancelledError):
            await cancelled
        await sender.asend(b"after the cancelled")
        async for message in receiver:
            return message

    assert asyncio.run(both()) == b"after the cancelled"


def test_asend_waits_for_room_without_blocking_the_loop(ends):
    sender, receiver = ends

    async def both():
        count = fill(sender)
        sending = asyncio.create_task(sender.asend(b"L" * 1000, timeout=PATIENCE))
        done, _ = await asyncio.wait([sending], timeout=0.05)
        assert not done
        for _ in range(count):
            await receiver.arecv(timeout=PATIENCE)
        await sending
        return await receiver.arecv(timeout=PATIENCE)

    assert asyncio.run(both()) == b"L" * 1000


def test_a_cancelled_asend_sent_nothing(ends):
    sender, receiver = ends

    async def cancel():
        count = fill(sender)
        sending = asyncio.create_task(sender.asend(bytes(1000)))
        await asyncio.wait([sending], timeout=0.05)
        sending.cancel()
        with pytest.raises(asyncio.CancelledError):
            await sending
        return count

    for _ in range(asyncio.run(cancel())):
        assert receiver.recv(timeout=PATIENCE) == bytes(1000)
    with pytest.raises(TimeoutError):
        receiver.recv(timeout=0.05)


def test_a_child_has_both_ends_too(ends, forked):
    sender, receiver = ends

    def child(ready):
        assert receiver.recv(timeout=PATIENCE) == b"to the child"
        sender.send(b"%d" % os.getpid())

    process = forked(child)
    sender.send(b"to the child")
    assert process.wait() == 0
    assert receiver.recv(timeout=PATIENCE) == b"%d" % process.pid


def test_threads_share_an_end(ends):
    sender, receiver = ends
    got = []

    def receive():
        got.extend(receiver.recv(timeout=PATIENCE) for _ in range(200))

    threads = [threading.Thread(target=receive) for _ in range(2)]
    threads += [
        threading.Thread(
            target=lambda n=n: [sender.send(b"%d.%d" % (n, i), timeout=PATIENCE) for i in range(200)]
        )
        for n in range(2)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(PATIENCE)
    assert sorted(got) == sorted(b"%d.%d" % (n, i) for n in range(2) for i in range(200))
