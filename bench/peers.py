# SPDX-License-Identifier: MIT
"""How each means of communication is made, used and removed, for bench_engine.py.

A peer is made before the processes are; each opens it for its side; the first process removes it. On
side 1, which is opened first, is who asks or receives; on side 0 are those who answer or send. What
is not installed is None in its place here, and listed in MISSING.
"""

import contextlib
import ctypes
import importlib
import multiprocessing
import os
import queue
import shutil
import socket
import tempfile
from collections.abc import Callable
from importlib import metadata
from pathlib import Path
from typing import Any, ClassVar, NamedTuple

Call = Callable[..., Any]

FOR_EVER = 3600.0  # for what has no "for ever"
DEEPEST = 256  # messages that iceoryx2 keeps: more made it slower
MISSING: dict[str, str] = {}


def optional(name: str) -> Any:
    try:
        return importlib.import_module(name)
    except ImportError as error:
        MISSING[name] = str(error)
        return None


faster_fifo = optional("faster_fifo")
iceoryx2 = optional("iceoryx2")
posix_ipc = optional("posix_ipc")
pynng = optional("pynng")
sysv_ipc = optional("sysv_ipc")
zmq = optional("zmq")
our_channel = optional("ipckit.channel")
our_queues = optional("ipckit.queues")
our_ring = optional("ipckit.ring")


def versions() -> list[str]:
    """What is installed of what we compare with."""
    found = []
    for name in ("faster-fifo", "iceoryx2", "posix_ipc", "pynng", "pyzmq", "sysv_ipc"):
        with contextlib.suppress(metadata.PackageNotFoundError):
            found.append(f"{name} {metadata.version(name)}")
    return found


class End(NamedTuple):
    """What one process has of a peer."""

    send: Call
    recv: Call
    send_many: Call | None = None
    recv_many: Call | None = None


class Peer:
    """Messages of *size* bytes through buffers of about *capacity* bytes for each way."""

    needs: ClassVar[Any] = multiprocessing  # the module that it is of, None if that is missing

    def __init__(self, size: int, capacity: int) -> None:
        self.size = size
        self.depth = max(2, capacity // size)

    @classmethod
    def largest(cls) -> float:
        """Bytes of the largest message that it takes."""
        return float("inf")

    def open(self, side: int) -> End:
        raise NotImplementedError

    def use(self, side: int) -> End:
        """Open it for the life of this process: some drop what they sent when they are closed."""
        self.used = self.open(side)
        return self.used

    def remove(self) -> None:
        pass


class Ways(Peer):
    """A peer of two objects, one for each way."""

    def __init__(self, size: int, capacity: int) -> None:
        super().__init__(size, capacity)
        self.ways = [self.make() for _ in range(2)]

    def make(self) -> Any:
        raise NotImplementedError

    def end(self, there: Any, back: Any) -> End:
        raise NotImplementedError

    def open(self, side: int) -> End:
        return self.end(self.ways[side], self.ways[1 - side])


def polled(attempt: Call, nothing: type[BaseException]) -> Call:
    """Call again and again, until that does not raise *nothing*."""

    def receive() -> Any:
        while True:
            try:
                return attempt()
            except nothing:
                pass

    return receive


# --- the standard library's


class MpPipe(Peer):
    def __init__(self, size: int, capacity: int) -> None:
        super().__init__(size, capacity)
        self.ends = multiprocessing.Pipe()

    def open(self, side: int) -> End:
        return End(self.ends[side].send_bytes, self.ends[side].recv_bytes)

    def remove(self) -> None:
        for end in self.ends:
            end.close()


class MpPipePolled(MpPipe):
    def open(self, side: int) -> End:
        end = self.ends[side]

        def receive() -> bytes:
            while not end.poll():
                pass
            return end.recv_bytes()

        return End(end.send_bytes, receive)


class MpQueue(Ways):
    def make(self) -> Any:
        return multiprocessing.Queue()

    def end(self, there: Any, back: Any) -> End:
        return End(there.put, back.get)

    def remove(self) -> None:
        for way in self.ways:
            way.close()


class MpQueuePolled(MpQueue):
    def end(self, there: Any, back: Any) -> End:
        return End(there.put, polled(back.get_nowait, queue.Empty))


class MpSimpleQueue(MpQueue):
    def make(self) -> Any:
        return multiprocessing.SimpleQueue()


class MpSimpleQueuePolled(MpSimpleQueue):
    def end(self, there: Any, back: Any) -> End:
        def receive() -> Any:
            while back.empty():
                pass
            return back.get()

        return End(there.put, receive)


class SocketPair(Peer):
    """A stream without frames: the receiver knows the size."""

    def __init__(self, size: int, capacity: int) -> None:
        super().__init__(size, capacity)
        self.ends = socket.socketpair()

    def open(self, side: int) -> End:
        end, size = self.ends[side], self.size
        return End(end.sendall, lambda: end.recv(size, socket.MSG_WAITALL))

    def remove(self) -> None:
        for end in self.ends:
            end.close()


class SocketPairPolled(SocketPair):
    def open(self, side: int) -> End:
        end, size = self.ends[side], self.size
        return End(end.sendall, polled(lambda: end.recv(size, socket.MSG_DONTWAIT), BlockingIOError))


# --- the kernel's queues


def limit(name: str) -> int:
    return int(Path("/proc/sys", name).read_text())


class PosixQueue(Ways):
    needs = posix_ipc

    @classmethod
    def largest(cls) -> float:
        return limit("fs/mqueue/msgsize_max")

    def make(self) -> Any:
        name = f"/ipckit-bench-{os.getpid()}"
        made = posix_ipc.MessageQueue(name, posix_ipc.O_CREX, max_message_size=self.size)
        made.unlink()
        return made

    def end(self, there: Any, back: Any) -> End:
        return End(there.send, back.receive)

    def remove(self) -> None:
        for way in self.ways:
            way.close()


class PosixQueuePolled(PosixQueue):
    def end(self, there: Any, back: Any) -> End:
        return End(there.send, polled(lambda: back.receive(0), posix_ipc.BusyError))


class SystemVQueue(Ways):
    needs = sysv_ipc

    @classmethod
    def largest(cls) -> float:
        return limit("kernel/msgmax")

    def make(self) -> Any:
        return sysv_ipc.MessageQueue(None, sysv_ipc.IPC_CREX, max_message_size=self.size)

    def end(self, there: Any, back: Any) -> End:
        return End(there.send, back.receive)

    def remove(self) -> None:
        for way in self.ways:
            way.remove()


class SystemVQueuePolled(SystemVQueue):
    def end(self, there: Any, back: Any) -> End:
        return End(there.send, polled(lambda: back.receive(False), sysv_ipc.BusyError))


# --- libraries


class FasterFifo(Ways):
    """With bytes as they are: its own default is to pickle them."""

    needs = faster_fifo

    def make(self) -> Any:
        return faster_fifo.Queue(self.depth * (self.size + 16), loads=bytes, dumps=bytes)

    def end(self, there: Any, back: Any) -> End:
        return End(
            lambda data: there.put(data, True, FOR_EVER),
            lambda: back.get(True, FOR_EVER),
            lambda messages: there.put_many(messages, True, FOR_EVER),
            lambda most: back.get_many(True, FOR_EVER, most),
        )


class FasterFifoPolled(FasterFifo):
    def end(self, there: Any, back: Any) -> End:
        return super().end(there, back)._replace(recv=polled(back.get_nowait, queue.Empty))


class InFolder(Peer):
    """A peer with files."""

    def __init__(self, size: int, capacity: int) -> None:
        super().__init__(size, capacity)
        self.folder = tempfile.mkdtemp(prefix="ipckit-bench-")

    def remove(self) -> None:
        shutil.rmtree(self.folder, ignore_errors=True)


class Zmq(InFolder):
    needs = zmq
    sockets = ("PAIR", "PAIR")
    flags: ClassVar[dict[str, Any]] = {}

    def open(self, side: int) -> End:
        end = zmq.Context().socket(getattr(zmq, self.sockets[side]))
        end.set_hwm(self.depth)
        (end.connect, end.bind)[side](f"ipc://{self.folder}/socket")
        return self.end(end)

    def end(self, end: Any) -> End:
        return End(end.send, end.recv)


class ZmqPolled(Zmq):
    def end(self, end: Any) -> End:
        return End(end.send, polled(lambda: end.recv(zmq.NOBLOCK), zmq.Again))


class ZmqPush(Zmq):
    sockets = ("PUSH", "PULL")


class ZmqPushNoCopy(ZmqPush):
    """Its own zero-copy mode: the receiver gets a frame that holds the message."""

    def end(self, end: Any) -> End:
        return End(lambda data: end.send(data, copy=False), lambda: end.recv(copy=False).buffer)


class Nng(InFolder):
    needs = pynng
    sockets = ("Pair0", "Pair0")

    def open(self, side: int) -> End:
        end = getattr(pynng, self.sockets[side])(recv_max_size=0)
        with contextlib.suppress(pynng.NotSupported):  # a buffer that this kind does not have
            end.send_buffer_size = min(self.depth, 8192)
        with contextlib.suppress(pynng.NotSupported):
            end.recv_buffer_size = min(self.depth, 8192)
        address = f"ipc://{self.folder}/socket"
        end.listen(address) if side else end.dial(address, block=True)
        return self.end(end)

    def end(self, end: Any) -> End:
        return End(end.send, end.recv)


class NngPolled(Nng):
    def end(self, end: Any) -> End:
        return End(end.send, polled(lambda: end.recv(block=False), pynng.TryAgain))


class NngPush(Nng):
    sockets = ("Push0", "Pull0")


class Iceoryx(InFolder):
    """Publish and subscribe, by polling: the samples are copied in and out.

    A full buffer of a subscriber that has received nothing yet drops what is sent, against the
    chosen strategy, and says so: it is sent again.
    """

    needs = iceoryx2
    events = False

    def __init__(self, size: int, capacity: int) -> None:
        super().__init__(size, capacity)
        self.prefix = Path(self.folder).name

    def open(self, side: int) -> End:
        iceoryx2.set_log_level(iceoryx2.LogLevel.Fatal)
        config = iceoryx2.config.global_config()
        config.global_cfg.prefix = iceoryx2.FileName.new(self.prefix)
        config.global_cfg.root_path = iceoryx2.Path.new(self.folder)
        quiet = iceoryx2.NodeBuilder.new().signal_handling_mode(iceoryx2.SignalHandlingMode.Disabled)
        self.node = quiet.config(config).create(iceoryx2.ServiceType.Ipc)
        return self.end(side)

    def builder(self, name: str) -> Any:
        return self.node.service_builder(iceoryx2.ServiceName.new(name))

    def samples(self, way: int) -> Any:
        samples = self.builder(f"samples {way}").publish_subscribe(iceoryx2.Slice[ctypes.c_uint8])
        samples = samples.enable_safe_overflow(False).history_size(0)
        samples = samples.max_publishers(8).max_subscribers(8)
        return samples.subscriber_max_buffer_size(min(self.depth, DEEPEST)).open_or_create()

    def publisher(self, way: int) -> Any:
        ports = self.samples(way).publisher_builder().initial_max_slice_len(self.size)
        return ports.backpressure_strategy(iceoryx2.BackpressureStrategy.RetryUntilDelivered).create()

    def subscriber(self, way: int) -> Any:
        return self.samples(way).subscriber_builder().create()

    def end(self, side: int) -> End:
        return End(self.sender(side, lambda: None), self.receiver(1 - side, lambda: None))

    def sender(self, way: int, wake: Call) -> Call:
        publish = self.publish(way)

        def send(data: bytes) -> None:
            while not publish(data):
                wake()
            wake()

        return send

    def publish(self, way: int) -> Call:
        loan, size, copy = self.publisher(way).loan_slice_uninit, self.size, ctypes.memmove

        def publish(data: bytes) -> int:
            sample = loan(size)
            copy(sample.payload_ptr, data, size)
            return int(sample.assume_init().send())

        return publish

    def receiver(self, way: int, wait: Call) -> Call:
        receive, size, copy = self.subscriber(way).receive, self.size, ctypes.string_at

        def recv() -> bytes:
            while (sample := receive()) is None:
                wait()
            return copy(sample.payload_ptr, size)

        return recv

    def remove(self) -> None:
        super().remove()
        for left in Path("/dev/shm").glob(f"{self.prefix}*"):
            left.unlink()


class IceoryxEvents(Iceoryx):
    """The same with an event for each sample, for which the receiver sleeps."""

    def event(self, way: int) -> Any:
        return self.builder(f"event {way}").event().open_or_create()

    def end(self, side: int) -> End:
        notify = self.event(side).notifier_builder().create().notify
        wait = self.event(1 - side).listener_builder().create().blocking_wait
        return End(self.sender(side, notify), self.receiver(1 - side, wait))


class IceoryxLoaned(Iceoryx):
    """In place: nothing is copied, first and last byte are written and read."""

    def bytes_at(self) -> Call:
        return (ctypes.c_uint8 * self.size).from_address

    def publish(self, way: int) -> Call:
        loan, size, at = self.publisher(way).loan_slice_uninit, self.size, self.bytes_at()

        def publish(data: bytes) -> int:
            sample = loan(size)
            view = at(sample.payload_ptr)
            view[0] = view[-1] = 1
            return int(sample.assume_init().send())

        return publish

    def receiver(self, way: int, wait: Call) -> Call:
        receive, at = self.subscriber(way).receive, self.bytes_at()

        def recv() -> int:
            while (sample := receive()) is None:
                wait()
            view = at(sample.payload_ptr)
            return int(view[0] + view[-1])

        return recv


class IceoryxLoanedEvents(IceoryxLoaned, IceoryxEvents):
    pass


# --- ours


class Ring(Ways):
    needs = our_ring
    options: ClassVar[dict[str, Any]] = {}

    def __init__(self, size: int, capacity: int) -> None:
        self.capacity = capacity
        super().__init__(size, capacity)

    def make(self) -> Any:
        return our_ring.Ring(self.capacity, max_message=max(self.size, 1 << 20), **self.options)

    def end(self, there: Any, back: Any) -> End:
        return End(there.send, back.recv, there.send_many, back.recv_many)

    def remove(self) -> None:
        for way in self.ways:
            way.close()


class RingInto(Ring):
    """Received into a buffer that the receiver has."""

    def end(self, there: Any, back: Any) -> End:
        buffer, recv_into = bytearray(self.size), back.recv_into
        return End(there.send, lambda: recv_into(buffer))


class RingLocked(Ring):
    """For any number of senders."""

    options: ClassVar[dict[str, Any]] = {"many_senders": True}

    def reserve(self) -> None:
        self.ways[0].reserve(self.size)


class RingLoaned(Ring):
    """In place: nothing is copied, first and last byte are written and read."""

    def end(self, there: Any, back: Any) -> End:
        size, reserve, commit, peek, release = self.size, there.reserve, there.commit, back.peek, back.release

        def send(data: bytes) -> None:
            view = reserve(size)
            view[0] = view[-1] = 1
            commit()

        def recv() -> int:
            view = peek()
            seen = view[0] + view[-1]
            release()
            return int(seen)

        return End(send, recv)


class Channel(Peer):
    needs = our_channel

    def __init__(self, size: int, capacity: int) -> None:
        super().__init__(size, capacity)
        self.ends = our_channel.channel(capacity)

    def open(self, side: int) -> End:
        end = self.ends[side].claim()
        return End(end.send, end.recv, end.send_many, end.recv_many)

    def remove(self) -> None:
        for end in self.ends:
            end.close()


class Queue(Ring):
    """The verbs of all endpoints, for bytes."""

    needs = our_queues

    def make(self) -> Any:
        return our_queues.Queue(capacity=self.capacity, codec="bytes")


class QueuePut(Queue):
    """As multiprocessing.Queue is used: pickled."""

    def make(self) -> Any:
        return our_queues.Queue(capacity=self.capacity)

    def end(self, there: Any, back: Any) -> End:
        return End(there.put, back.get, there.put_many, back.get_many)
