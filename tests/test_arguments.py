"""A wrong number, time or buffer gets one answer, whichever room it is given to."""

import asyncio
import ctypes
import errno
import gc
import math
import os
import re
import signal
import socket
import threading
from collections.abc import Callable, Iterator
from contextlib import ExitStack, suppress
from decimal import Decimal
from fractions import Fraction
from queue import Empty
from types import SimpleNamespace
from typing import Any

import numpy as np
import procfs
import pytest
from conftest import eventually
from hypothesis import given
from hypothesis import strategies as some

import ipckit
from ipckit import _arguments, inventory, pipes, posix, sockets, sync, sysv, wait
from ipckit.load import Load
from ipckit.servers import client, listen, server
from ipckit.servers.listening import listen_unix, notify
from ipckit.servers.urgent import UrgentServer

Call = Callable[[Any, Any], object]


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Iterator[SimpleNamespace]:
    """An object of each room, empty and at rest."""
    it = SimpleNamespace()
    with ExitStack() as stack:
        keep = stack.enter_context
        it.folder = tmp_path_factory.mktemp("arguments")
        it.ring = keep(ipckit.Ring(8192))
        it.here, it.there = map(keep, ipckit.channel(8192))
        it.queue, it.objects = (
            keep(ipckit.Queue(capacity=8192, codec="bytes")),
            keep(ipckit.Queue(capacity=8192)),
        )
        it.reader, it.writer = map(keep, ipckit.pipe())
        it.left, it.right = map(keep, ipckit.duplex())
        it.sysv = keep(sysv.MessageQueue())
        stack.callback(it.sysv.remove)
        it.posix = keep(posix.MessageQueue("/ipckit-arguments", create=True))
        stack.callback(it.posix.unlink)
        with suppress(TimeoutError):  # the first wait makes an eventfd, which stays
            it.posix.recv(timeout=1e-9)
        it.sysv_semaphore = sysv.Semaphore(value=0)
        stack.callback(it.sysv_semaphore.close)
        stack.callback(it.sysv_semaphore.remove)
        it.posix_semaphore = posix.Semaphore("/ipckit-arguments", 0, create=True)
        stack.callback(it.posix_semaphore.close)
        stack.callback(it.posix_semaphore.unlink)
        it.memory, it.pages = keep(ipckit.SharedMemory(4096)), keep(ipckit.SharedMemory(1 << 16))
        it.sock, it.peer = map(keep, socket.socketpair())
        it.sock.setblocking(False)
        it.tcp, it.listener = keep(listen()), keep(ipckit.Listener(it.folder / "listener"))
        it.log = keep(ipckit.MessageLog(it.folder / "log"))
        it.signals = keep(ipckit.SignalQueue([signal.SIGUSR2]))
        it.lock, it.event, it.condition = sync.Lock(), sync.Event(), sync.Condition()
        it.semaphore = sync.Semaphore(0)
        it.child = ipckit.fork(signal.pause)
        stack.callback(it.child.close)
        stack.callback(it.child.wait)
        stack.callback(it.child.kill)
        yield it
    vars(it).clear()
    gc.collect()  # errors of the tests hold frames that hold it, and the next module would be blamed for it


def made(thing: Any) -> None:
    """Close what was made just to see that it could be."""
    for each in thing if isinstance(thing, tuple) else (thing,):
        each.close()


def removed(thing: Any) -> None:
    thing.remove()
    thing.close()


def unlinked(thing: Any) -> None:
    thing.unlink()
    thing.close()


def served(model: str, **options: Any) -> None:
    with listen() as listener:
        server(model, listener, **options).loop.close()


def every(period: Any) -> None:
    with listen() as listener:
        loop = server("poll", listener).loop
        loop.every(period, int)
        loop.close()


def urgent(**options: Any) -> None:
    with listen() as listener:
        UrgentServer(listener, **options)


def loaded(**options: Any) -> None:
    Load(("127.0.0.1", options.pop("port", 9)), **({"connections": 1} | options)).close()


def file_of(world: SimpleNamespace) -> Any:
    return open(world.folder / "file", "w+b")


def in_file(world: SimpleNamespace, verb: Call) -> None:
    with file_of(world) as file:
        verb(file, world)


def told(function: Callable[[], object], *kinds: Any) -> "tuple[type[BaseException], str]":
    """The error of a call, and nothing that keeps what was made alive."""
    with pytest.raises(*kinds or [(TypeError, ValueError, BufferError)]) as caught:
        function()
    return type(caught.value), str(caught.value)


# --- integers ------------------------------------------------------------------------------------

# verb: the parameter, a call with a value, a value that will do
INTEGERS: "dict[str, tuple[str, Call, int]]" = {
    "preadv": ("offset", lambda w, n: in_file(w, lambda f, _: ipckit.preadv(f, [bytearray(1)], n)), 1),
    "pwritev": ("offset", lambda w, n: in_file(w, lambda f, _: ipckit.pwritev(f, [b"x"], n)), 1),
    "pwritev flags": ("flags", lambda w, n: in_file(w, lambda f, _: ipckit.pwritev(f, [b"x"], 0, n)), 0),
    "writev": ("fd", lambda w, n: ipckit.writev(n, []), 1),
    "sockets.send": ("sock", lambda w, n: sockets.send(n, b""), -2),
    "sockets.send flags": ("flags", lambda w, n: sockets.send(w.sock, b"", n), 0),
    "sockets.recv": ("size", lambda w, n: sockets.recv(w.sock, n, sockets.MSG_DONTWAIT), 1),
    "sockets.recv_exact": ("size", lambda w, n: sockets.recv_exact(w.sock, n, timeout=0), 1),
    "sockets.recv_fds": ("max_fds", lambda w, n: sockets.recv_fds(w.sock, 1, n, timeout=0), 1),
    "sockets.recv_fds size": ("size", lambda w, n: sockets.recv_fds(w.sock, n, 1, timeout=0), 1),
    "sockets.send_fds": ("fds", lambda w, n: sockets.send_fds(w.sock, b"x", [n], timeout=0), -2),
    "pipe": ("capacity", lambda w, n: made(ipckit.pipe(capacity=n)), 4096),
    "pipe max_message": ("max_message", lambda w, n: made(ipckit.pipe(max_message=n)), 4096),
    "duplex": ("max_inbox", lambda w, n: made(ipckit.duplex(max_inbox=n)), 4096),
    "Reader": ("fd", lambda w, n: pipes.Reader(n), 1 << 30),
    "Writer": ("fd", lambda w, n: pipes.Writer(n), 1 << 30),
    "reader.read": ("size", lambda w, n: w.reader.read(n, timeout=0), 1),
    "reader.recv_many": ("max", lambda w, n: w.reader.recv_many(n, timeout=0), 1),
    "splice": ("count", lambda w, n: ipckit.splice(w.reader, w.left, n, timeout=0), 1),
    "splice from": ("source_offset", lambda w, n: ipckit.splice(0, w.writer, 1, source_offset=n, timeout=0), 1),
    "splice to": ("target_offset", lambda w, n: ipckit.splice(w.reader, 0, 1, target_offset=n, timeout=0), 1),
    "tee": ("flags", lambda w, n: ipckit.tee(w.reader, w.writer, 1, flags=n, timeout=0), 0),
    "sigaction": ("signum", lambda w, n: ipckit.sigaction(n, signal.SIG_DFL).restore(), signal.SIGUSR1),
    "sigaction flags": ("flags", lambda w, n: ipckit.sigaction(signal.SIGUSR1, int, flags=n).restore(), 0),
    "sigqueue": ("target", lambda w, n: ipckit.sigqueue(n, signal.SIGCHLD), os.getpid()),
    "sigqueue value": ("value", lambda w, n: ipckit.sigqueue(w.child, signal.SIGCHLD, n), 5),
    "sigqueue signum": ("signum", lambda w, n: ipckit.sigqueue(w.child, n), signal.SIGCHLD),
    "SignalQueue": ("signum", lambda w, n: made(ipckit.SignalQueue([n])), signal.SIGUSR1),
    "signals.recv_many": ("max", lambda w, n: w.signals.recv_many(n, timeout=0), 1),
    "fork": ("keep", lambda w, n: done(ipckit.fork(int, keep=[n])), 0),
    "fork handlers": ("handlers", lambda w, n: done(ipckit.fork(int, handlers={n: signal.SIG_DFL})), 10),
    "child.send_signal": ("signum", lambda w, n: w.child.send_signal(n), 0),
    "SharedMemory": ("size", lambda w, n: made(ipckit.SharedMemory(n)), 4096),
    "from_fd": ("fd", lambda w, n: ipckit.SharedMemory.from_fd(n), 1 << 30),
    "from_fd size": ("size", lambda w, n: made(ipckit.SharedMemory.from_fd(os.dup(w.memory.fileno()), size=n)), 4096),
    "asarray": ("shape", lambda w, n: w.memory.asarray("u1", n), 10),
    "asarray of two": ("shape", lambda w, n: w.memory.asarray("u1", (2, n)), 10),
    "asarray offset": ("offset", lambda w, n: w.memory.asarray("u1", 1, n), 10),
    "Ring": ("capacity", lambda w, n: made(ipckit.Ring(n)), 4096),
    "Ring max_message": ("max_message", lambda w, n: made(ipckit.Ring(4096, max_message=n)), 4096),
    "Ring max_messages": ("max_messages", lambda w, n: made(ipckit.Ring(4096, max_messages=n)), 4096),
    "ring.recv_many": ("max", lambda w, n: w.ring.recv_many(n, timeout=0), 1),
    "ring.reserve": ("size", lambda w, n: [w.ring.reserve(n), w.ring.cancel()], 1),
    "ring.commit": ("size", lambda w, n: commit(w.ring, n), 1),
    "channel": ("capacity", lambda w, n: made(ipckit.channel(n)), 4096),
    "channel max_message": ("max_message", lambda w, n: made(ipckit.channel(4096, max_message=n)), 4096),
    "channel max_inbox": ("max_inbox", lambda w, n: made(ipckit.channel(4096, max_inbox=n)), 4096),
    "channel.send_fds": ("fds", lambda w, n: w.here.send_fds([n]), -2),
    "channel.recv_fds": ("max_fds", lambda w, n: w.here.recv_fds(n, timeout=0), 1),
    "Listener": ("backlog", lambda w, n: made(ipckit.Listener(w.folder / "l", backlog=n)), 4),
    "Listener mode": ("mode", lambda w, n: made(ipckit.Listener(w.folder / "l", mode=n)), 0o600),
    "Listener peer_uid": ("peer_uid", lambda w, n: made(ipckit.Listener(w.folder / "l", peer_uid=n)), 0),
    "connect": ("peer_uid", lambda w, n: ipckit.connect(w.folder / "none", peer_uid=n), 0),
    "Queue": ("capacity", lambda w, n: made(ipckit.Queue(capacity=n)), 4096),
    "Queue maxsize": ("maxsize", lambda w, n: made(ipckit.Queue(n, capacity=4096)), 4),
    "Queue max_message": ("max_message", lambda w, n: made(ipckit.Queue(capacity=4096, max_message=n)), 4096),
    "Queue.open": ("capacity", lambda w, n: unlinked(ipckit.Queue.open("arguments", capacity=n)), 4096),
    "queue.get_many": ("max", lambda w, n: w.objects.get_many(n, block=False), 1),
    "queue.recv_many": ("max", lambda w, n: w.queue.recv_many(max=n, timeout=0), 1),
    "ftok": ("project", lambda w, n: sysv.ftok("/", n), 5),
    "sysv.MessageQueue": ("key", lambda w, n: removed(sysv.MessageQueue(n, create=True)), 77),
    "sysv.MessageQueue max_bytes": ("max_bytes", lambda w, n: removed(sysv.MessageQueue(max_bytes=n)), 100),
    "sysv.MessageQueue mode": ("mode", lambda w, n: removed(sysv.MessageQueue(mode=n)), 0o600),
    "sysv.MessageQueue.from_id": ("ident", lambda w, n: sysv.MessageQueue.from_id(n), 1 << 30),
    "sysv.send": ("type", lambda w, n: [w.sysv.send(b"", type=n), w.sysv.recv()], 5),
    "sysv.send_many": ("type", lambda w, n: [w.sysv.send_many([b""], type=n), w.sysv.recv()], 5),
    "sysv.recv": ("type", lambda w, n: w.sysv.recv(type=n, timeout=0), 5),
    "sysv.recv_many": ("max", lambda w, n: w.sysv.recv_many(n, timeout=0), 5),
    "sysv.peek": ("index", lambda w, n: w.sysv.peek(n), 5),
    "sysv.set": ("uid", lambda w, n: w.sysv.set(uid=n), os.geteuid()),
    "sysv.SharedMemory": ("size", lambda w, n: removed(sysv.SharedMemory(size=n)), 4096),
    "sysv.SharedMemory.from_id": ("ident", lambda w, n: sysv.SharedMemory.from_id(n), 1 << 30),
    "sysv.Semaphore": ("value", lambda w, n: removed(sysv.Semaphore(value=n)), 5),
    "sysv.Semaphore.from_id": ("ident", lambda w, n: sysv.Semaphore.from_id(n), 1 << 30),
    "sysv.Semaphore.set": ("gid", lambda w, n: w.sysv_semaphore.set(gid=n), os.getegid()),
    "posix.MessageQueue": (
        "max_messages", lambda w, n: unlinked(posix.MessageQueue("/ipckit-n", create=True, max_messages=n)), 5
    ),
    "posix.MessageQueue max_message": (
        "max_message", lambda w, n: unlinked(posix.MessageQueue("/ipckit-n", create=True, max_message=n)), 5
    ),
    "posix.send": ("priority", lambda w, n: [w.posix.send(b"", priority=n), w.posix.recv()], 5),
    "posix.send_many": ("priority", lambda w, n: [w.posix.send_many([b""], priority=n), w.posix.recv()], 5),
    "posix.recv_many": ("max", lambda w, n: w.posix.recv_many(n, timeout=0), 5),
    "posix.Semaphore": ("value", lambda w, n: unlinked(posix.Semaphore("/ipckit-n", n, create=True)), 5),
    "posix.Semaphore owner": ("owner", lambda w, n: posix.Semaphore("/ipckit-none", owner=n), 0),
    "posix.SharedMemory": ("size", lambda w, n: unlinked(posix.SharedMemory("/ipckit-n", n, create=True)), 5),
    "Semaphore": ("value", lambda w, n: sync.Semaphore(n), 5),
    "BoundedSemaphore": ("value", lambda w, n: sync.BoundedSemaphore(n), 5),
    "Barrier": ("parties", lambda w, n: sync.Barrier(n), 5),
    "Lock.create": ("offset", lambda w, n: sync.Lock.create(w.pages.buf, n), 64),
    "notify": ("n", lambda w, n: notified(w.condition, n), 1),
    "MessageLog": ("capacity", lambda w, n: made(ipckit.MessageLog(w.folder / "n", capacity=n)), 4096),
    "log.append": ("connection", lambda w, n: w.log.append(b"x", connection=n), 4096),
    "Load": ("connections", lambda w, n: loaded(connections=n), 4),
    "Load size": ("size", lambda w, n: loaded(size=n), 4),
    "Load messages": ("messages", lambda w, n: loaded(messages=n), 4),
    "Load port": ("port", lambda w, n: loaded(port=n), 9),
    "listen": ("port", lambda w, n: made(listen(port=n)), 0),
    "listen backlog": ("backlog", lambda w, n: made(listen(backlog=n)), 4),
    "listen_unix": ("backlog", lambda w, n: made(listen_unix(w.folder / "u", backlog=n)), 4),
    "Server": ("max_connections", lambda w, n: served("poll", max_connections=n), 4),
    "Server max_output": ("max_output", lambda w, n: served("poll", max_output=n), 4),
    "ForkServer": ("max_children", lambda w, n: served("fork", max_children=n), 4),
    "PreforkServer": ("min_spare", lambda w, n: served("prefork", min_spare=n), 4),
    "PreforkServer max_requests": ("max_requests", lambda w, n: served("prefork", max_requests=n), 4),
    "UrgentServer": ("max_connections", lambda w, n: urgent(max_connections=n), 4),
}  # fmt: skip


def done(child: ipckit.Child) -> None:
    with child:
        assert child.wait(60).code == 0


def commit(ring: ipckit.Ring, size: Any) -> None:
    ring.reserve(10)
    try:
        ring.commit(size)
        ring.recv()
    except BaseException:
        ring.cancel()
        raise


def notified(condition: sync.Condition, n: Any) -> None:
    with condition:
        condition.notify(n)


@pytest.mark.parametrize("verb", INTEGERS)
def test_what_has_an_index_is_an_integer(world, verb):
    _, call, good = INTEGERS[verb]
    outcomes = []
    for value in (int(good), np.int64(good)):
        try:
            call(world, value)
            outcomes.append("done")
        except (OSError, Empty) as error:  # for want of what is asked for
            outcomes.append(repr(error))
    assert outcomes[0] == outcomes[1]


@pytest.mark.parametrize("verb", INTEGERS)
def test_what_is_no_integer_is_told_by_name_and_value(world, verb):
    name, call, _ = INTEGERS[verb]
    for bad in (True, np.True_, 1.5, "3", Decimal(3)):
        with pytest.raises(TypeError, match=re.escape(f"{name} must be an integer, not {bad!r}")):
            call(world, bad)


@pytest.mark.parametrize("verb", INTEGERS)
def test_a_number_beyond_its_type_is_told_by_name_or_is_the_kernel_s_refusal(world, verb):
    name, call, _ = INTEGERS[verb]
    for bad in (10**30, -(10**30)):
        kind, text = told(lambda bad=bad: call(world, bad), (ValueError, OSError))
        if issubclass(kind, OSError):  # so much memory there is not
            assert (name, bad > 0) == ("size", True)
        else:
            assert re.search(
                f"{name} must be |at offset |bytes, not |is not the number of a signal|^signal ", text
            )
            assert f"{bad}" in text or f"{bad:#x}" in text or f"{bad:#o}" in text


@given(value=some.integers(), ends=some.tuples(some.integers(), some.integers()))
def test_an_integer_is_one_within_its_range(value, ends):
    least, most = sorted(ends)
    if least <= value <= most:
        assert _arguments.integer(value, "n", least, most) == value
    else:
        with pytest.raises(ValueError, match="n must be an integer from"):
            _arguments.integer(value, "n", least, most)


def test_a_number_too_long_to_be_shown_is_told_all_the_same():
    with pytest.raises(ValueError, match=r"n must be an integer >= 0, not "):
        _arguments.integer(-(10**9999), "n", 0)
    with pytest.raises(ValueError, match=r"timeout must be None or a number of seconds >= 0, not "):
        wait.deadline(-(10**9999))


# --- seconds -------------------------------------------------------------------------------------


def ran(coroutine: Any) -> Any:
    return asyncio.run(coroutine)


def read_slowly(world: SimpleNamespace, timeout: Any) -> None:
    fd = os.dup(world.reader.fileno())
    try:
        ipckit.readv_exact(fd, [bytearray(1)], timeout=timeout)
    finally:
        os.close(fd)


def closed_log(world: SimpleNamespace, timeout: Any) -> None:
    with ipckit.MessageLog(world.folder / "other") as log:
        log.close(timeout=timeout)


# verb: a call that has nothing to wait for but the time
SECONDS: "dict[str, Call]" = {
    "wait.until_ready": lambda w, t: wait.until_ready(w.reader.fileno(), wait.READ, wait.deadline(t)),
    "readv_exact": read_slowly,
    "sockets.recv": lambda w, t: sockets.recv(w.sock, 1, timeout=t),
    "sockets.recv_into": lambda w, t: sockets.recv_into(w.sock, bytearray(1), timeout=t),
    "sockets.recv_exact": lambda w, t: sockets.recv_exact(w.sock, 1, timeout=t),
    "sockets.recv_fds": lambda w, t: sockets.recv_fds(w.sock, 1, 1, timeout=t),
    "reader.recv": lambda w, t: w.reader.recv(timeout=t),
    "reader.recv_into": lambda w, t: w.reader.recv_into(bytearray(1), timeout=t),
    "reader.read": lambda w, t: w.reader.read(1, timeout=t),
    "duplex.recv_many": lambda w, t: w.left.recv_many(timeout=t),
    "splice": lambda w, t: ipckit.splice(w.reader, w.left, 1, timeout=t),
    "signals.recv": lambda w, t: w.signals.recv(timeout=t),
    "child.wait": lambda w, t: w.child.wait(t),
    "wait_any": lambda w, t: ipckit.wait_any([w.child], t),
    "ring.recv": lambda w, t: w.ring.recv(timeout=t),
    "ring.recv_into": lambda w, t: w.ring.recv_into(bytearray(1), timeout=t),
    "ring.recv_many": lambda w, t: w.ring.recv_many(timeout=t),
    "ring.peek": lambda w, t: w.ring.peek(timeout=t),
    "channel.recv": lambda w, t: w.here.recv(timeout=t),
    "channel.recv_fds": lambda w, t: w.here.recv_fds(1, timeout=t),
    "listener.accept": lambda w, t: w.listener.accept(timeout=t),
    "queue.recv": lambda w, t: w.queue.recv(timeout=t),
    "sysv.recv": lambda w, t: w.sysv.recv(timeout=t),
    "sysv.recv_many": lambda w, t: w.sysv.recv_many(timeout=t),
    "sysv.acquire": lambda w, t: w.sysv_semaphore.acquire(t),
    "posix.recv": lambda w, t: w.posix.recv(timeout=t),
    "posix.recv_many": lambda w, t: w.posix.recv_many(timeout=t),
    "posix.acquire": lambda w, t: w.posix_semaphore.acquire(t),
}
ASYNC: "dict[str, Call]" = {
    "reader.arecv": lambda w, t: ran(w.reader.arecv(timeout=t)),
    "ring.arecv": lambda w, t: ran(w.ring.arecv(timeout=t)),
    "channel.arecv": lambda w, t: ran(w.here.arecv(timeout=t)),
    "queue.aget": lambda w, t: ran(w.objects.aget(timeout=t)),
    "posix.arecv": lambda w, t: ran(w.posix.arecv(timeout=t)),
    "signals.arecv": lambda w, t: ran(w.signals.arecv(timeout=t)),
    "await_exit": lambda w, t: ran(w.child.await_exit(t)),
}
# What does something else than wait, where it can; None: 0 won't do.
OTHERS: "dict[str, Call]" = {
    "writer.send": lambda w, t: [w.writer.send(b"", timeout=t), w.reader.recv()],
    "ring.send": lambda w, t: [w.ring.send(b"", timeout=t), w.ring.recv()],
    "ring.send_many": lambda w, t: [w.ring.send_many([b""], timeout=t), w.ring.recv()],
    "ring.reserve": lambda w, t: [w.ring.reserve(1, timeout=t), w.ring.cancel()],
    "sysv.send": lambda w, t: [w.sysv.send(b"", timeout=t), w.sysv.recv()],
    "posix.send": lambda w, t: [w.posix.send(b"", timeout=t), w.posix.recv()],
    "posix.send_many": lambda w, t: [w.posix.send_many([b""], timeout=t), w.posix.recv()],
    "duplex.exchange": lambda w, t: exchanged(w.left, w.right, t),
    "sockets.send": lambda w, t: sockets.send(w.sock, b"", timeout=t),
    "log.append": lambda w, t: w.log.append(b"", timeout=t),
    "log.reopen": lambda w, t: w.log.reopen(timeout=t),
    "inventory.collect": lambda w, t: inventory.collect(dry_run=True, timeout=t),
    "notify": lambda w, t: notify("READY=1", timeout=t),
    "log.close": closed_log,
}
# What may take some time, and none is asked for with 0.
DURATIONS: "dict[str, tuple[str, Call]]" = {
    "Server idle": ("idle_timeout", lambda w, t: served("poll", idle_timeout=t)),
    "Server total": ("total_timeout", lambda w, t: served("asyncio", uvloop=False, total_timeout=t)),
    "UrgentServer": ("idle_timeout", lambda w, t: urgent(idle_timeout=t)),
    "Load": ("duration", lambda w, t: loaded(duration=t)),
    "Load timeout": ("timeout", lambda w, t: loaded(timeout=t)),
    "loop.every": ("seconds", lambda w, t: every(t)),
}
# Where multiprocessing's own are stood in for; what each gives when the time is over.
STAND_INS: "dict[str, Call]" = {
    "queue.get": lambda w, t: w.objects.get(timeout=t),
    "queue.get_many": lambda w, t: w.objects.get_many(timeout=t),
    "lock.acquire": lambda w, t: held_elsewhere(w.lock, t),
    "event.wait": lambda w, t: w.event.wait(t),
    "semaphore.acquire": lambda w, t: w.semaphore.acquire(timeout=t),
    "acquire without blocking": lambda w, t: held_elsewhere(w.lock, t, False),
    "Barrier": lambda w, t: barred(sync.Barrier(2, timeout=t)),
    "condition.wait": lambda w, t: waited(w.condition, t),
    "condition.wait_for": lambda w, t: waited_for(w.condition, t),
}


def exchanged(one: pipes.Duplex, other: pipes.Duplex, timeout: Any) -> None:
    other.send(b"there")
    try:
        assert one.exchange(b"back", timeout=timeout) == b"there"
        assert other.recv() == b"back"
    except BaseException:
        one.recv()
        raise


def barred(barrier: sync.Barrier) -> bool:
    with suppress(sync.BrokenBarrierError):
        barrier.wait()
    return False


def held_elsewhere(lock: sync.Lock, timeout: Any, block: bool = True) -> bool:
    """Acquire it while another thread has it."""
    has, may_end = threading.Event(), threading.Event()

    def hold() -> None:
        with lock:
            has.set()
            may_end.wait()

    holder = threading.Thread(target=hold)
    holder.start()
    has.wait()
    try:
        return lock.acquire(block, timeout)
    finally:
        may_end.set()
        holder.join()


def waited(condition: sync.Condition, timeout: Any) -> bool:
    with condition:
        return condition.wait(timeout)


def waited_for(condition: sync.Condition, timeout: Any) -> bool:
    with condition:
        return condition.wait_for(lambda: False, timeout)


NEGATIVE = [-1, -0.5, -(2**63), -(10**20), -(10**400), -math.inf, Decimal("-1e500"), Fraction(-1, 10**400), np.float32(-1), np.int8(-1)]  # fmt: skip
NO_NUMBERS = [math.nan, Decimal("nan"), Decimal("sNaN"), np.float64("nan")]
NO_SECONDS = ["1", b"1", [], 1j, object()]
FOR_EVER = [math.inf, 10**400, 1e300, Decimal("inf"), Fraction(10**400), np.float64("inf")]


@pytest.mark.parametrize("verb", SECONDS | ASYNC | OTHERS)
def test_seconds_get_one_answer(world, verb):
    call = (SECONDS | ASYNC | OTHERS)[verb]
    for kind, bads in ((ValueError, NEGATIVE + NO_NUMBERS), (TypeError, NO_SECONDS)):
        for bad in bads:
            answer = told(lambda bad=bad: wait.deadline(bad))
            assert answer[0] is kind
            assert answer[1].startswith("timeout must be None or a number of seconds >= 0, not ")
            assert told(lambda bad=bad: call(world, bad)) == answer


@pytest.mark.parametrize("verb", DURATIONS)
def test_a_duration_is_seconds_too(world, verb):
    name, call = DURATIONS[verb]
    for bad in NEGATIVE + NO_NUMBERS + NO_SECONDS:
        answer = told(lambda bad=bad: _arguments.seconds(bad, name))
        assert told(lambda bad=bad: call(world, bad)) == answer
    with pytest.raises(ValueError, match=rf"{name} must be .*more than 0 seconds, not 0$"):
        call(world, 0)
    for good in [*FOR_EVER, None, 1, 1e-9, Decimal("0.5"), Fraction(1, 3), np.float32(2)]:
        call(world, good)


@pytest.mark.parametrize("verb", SECONDS | ASYNC)
def test_any_kind_of_number_runs_out(world, verb):
    for good in (0, 0.0, 1e-9, Decimal("0.0001"), Fraction(1, 10_000), np.float32(1e-4), np.int64(0)):
        with pytest.raises(TimeoutError):
            (SECONDS | ASYNC)[verb](world, good)


class Stop(Exception):
    pass


@pytest.fixture
def stopped() -> Iterator[Callable[[Callable[[], object]], None]]:
    """A function that runs one which must wait, until a signal ends it."""

    def stop(*_: object) -> None:
        raise Stop

    former = signal.signal(signal.SIGUSR1, stop)

    def run(function: Callable[[], object]) -> None:
        main = threading.main_thread().ident
        timer = threading.Timer(0.01, signal.pthread_kill, (main, signal.SIGUSR1))
        waited = True
        with pytest.raises(Stop):
            timer.start()
            function()
            waited = False
            timer.join()
        timer.join()
        assert waited

    yield run
    signal.signal(signal.SIGUSR1, former)


# These wait for a child of this process, and can be left by an exception of a handler. In the others, and in
# what this file puts around them, it may come between any two steps and leave something taken.
FOR_A_CHILD = {"child.wait", "wait_any"}


def waits(forked: Callable[..., Any], function: Callable[[], object]) -> None:
    """See it sleep, in a process of its own."""
    child = forked(lambda ready: (ready(), function()))
    child.wait_ready()
    eventually(lambda: procfs.asleep(child.pid))
    child.kill()
    assert child.wait() == -signal.SIGKILL


@pytest.mark.parametrize("verb", [verb for verb in SECONDS | STAND_INS if verb != "acquire without blocking"])
def test_more_than_any_time_is_for_ever(world, stopped, forked, verb):
    call = (SECONDS | STAND_INS)[verb]
    for value in FOR_EVER[:2]:
        if verb in FOR_A_CHILD:
            stopped(lambda value=value: call(world, value))
        else:
            waits(forked, lambda value=value: call(world, value))


@pytest.mark.parametrize("verb", OTHERS)
def test_what_need_not_wait_takes_any_time(world, verb):
    for value in [*FOR_EVER, None, 60, Decimal(60), Fraction(60), np.float64(60)]:
        OTHERS[verb](world, value)


@pytest.mark.parametrize("verb", STAND_INS)
def test_below_0_is_0_where_multiprocessing_is_stood_in_for(world, verb):
    call = STAND_INS[verb]
    for value in [0, *NEGATIVE]:
        try:
            assert call(world, value) is False
        except Empty:
            assert verb.startswith("queue.")
    for bad in NO_NUMBERS + NO_SECONDS:
        answer = told(lambda bad=bad: _arguments.seconds_left(bad))
        assert told(lambda bad=bad: call(world, bad)) == answer


@given(some.floats() | some.integers() | some.fractions() | some.decimals())
def test_seconds_are_what_their_number_is(value):
    try:
        number = float(value)
    except OverflowError:
        number = math.inf if value > 0 else -math.inf
    except ValueError:  # a signalling NaN
        number = math.nan
    if math.isnan(number) or value < 0:
        with pytest.raises(ValueError, match="timeout must be None or a number of seconds >= 0, not "):
            _arguments.seconds(value)
    else:
        assert _arguments.seconds(value) == (number if number < 3.2e9 else math.inf)
    if not math.isnan(number):
        assert _arguments.seconds_left(value) == (0 if value < 0 else _arguments.seconds(value))


# --- buffers -------------------------------------------------------------------------------------

SENDING: "dict[str, tuple[str, Call]]" = {
    "writev": ("buffers", lambda w, x: ipckit.writev(1, [x])),
    "writev_all": ("buffers", lambda w, x: ipckit.writev_all(w.writer, [x])),
    "pwritev": ("buffers", lambda w, x: in_file(w, lambda f, _: ipckit.pwritev(f, [x], 0))),
    "sockets.send": ("data", lambda w, x: sockets.send(w.sock, x)),
    "sockets.send_all": ("data", lambda w, x: sockets.send_all(w.sock, x)),
    "sockets.send_urgent": ("byte", lambda w, x: sockets.send_urgent(w.sock, x)),
    "sockets.send_fds": ("data", lambda w, x: sockets.send_fds(w.sock, x, [0])),
    "writer.send": ("data", lambda w, x: w.writer.send(x)),
    "writer.asend": ("data", lambda w, x: ran(w.writer.asend(x))),
    "writer.send_many": ("messages", lambda w, x: w.writer.send_many([b"", x])),
    "writer.write": ("data", lambda w, x: w.writer.write(x)),
    "duplex.exchange": ("data", lambda w, x: w.left.exchange(x)),
    "ring.send": ("data", lambda w, x: w.ring.send(x)),
    "ring.asend": ("data", lambda w, x: ran(w.ring.asend(x))),
    "ring.send_many": ("messages", lambda w, x: w.ring.send_many([b"", x])),
    "channel.send": ("data", lambda w, x: w.here.send(x)),
    "channel.send_fds": ("data", lambda w, x: w.here.send_fds([0], x)),
    "queue.send": ("data", lambda w, x: w.queue.send(x)),
    "queue.put": ("obj", lambda w, x: w.queue.put(x)),
    "queue.put_nowait": ("obj", lambda w, x: w.queue.put_nowait(x)),
    "queue.put_many": ("messages", lambda w, x: w.queue.put_many([x])),
    "queue.aput": ("data", lambda w, x: ran(w.queue.aput(x))),
    "sysv.send": ("data", lambda w, x: w.sysv.send(x)),
    "sysv.asend": ("data", lambda w, x: ran(w.sysv.asend(x))),
    "sysv.send_many": ("messages", lambda w, x: w.sysv.send_many([x])),
    "posix.send": ("data", lambda w, x: w.posix.send(x)),
    "posix.asend": ("data", lambda w, x: ran(w.posix.asend(x))),
    "posix.send_many": ("messages", lambda w, x: w.posix.send_many([x])),
    "log.append": ("data", lambda w, x: w.log.append(x)),
    "log.begin": ("data", lambda w, x: w.log.begin(x)),
}
TARGETS: "dict[str, tuple[str, Call]]" = {
    "readv": ("buffers", lambda w, x: ipckit.readv(w.reader, [x])),
    "readv_exact": ("buffers", lambda w, x: ipckit.readv_exact(w.reader, [x])),
    "preadv": ("buffers", lambda w, x: in_file(w, lambda f, _: ipckit.preadv(f, [x], 0))),
    "sockets.recv_into": ("buffer", lambda w, x: sockets.recv_into(w.sock, x)),
    "reader.recv_into": ("buffer", lambda w, x: w.reader.recv_into(x)),
    "duplex.recv_into": ("buffer", lambda w, x: w.left.recv_into(x)),
    "ring.recv_into": ("buffer", lambda w, x: w.ring.recv_into(x)),
    "channel.recv_into": ("buffer", lambda w, x: w.here.recv_into(x)),
    "queue.recv_into": ("buffer", lambda w, x: w.queue.recv_into(x)),
    "sysv.recv_into": ("buffer", lambda w, x: w.sysv.recv_into(x)),
    "posix.recv_into": ("buffer", lambda w, x: w.posix.recv_into(x)),
    "Ring.create": ("buffer", lambda w, x: ipckit.Ring.create(x)),
    "Ring.attach": ("buffer", lambda w, x: ipckit.Ring.attach(x)),
    "Lock.create": ("buffer", lambda w, x: sync.Lock.create(x)),
    "Condition.attach": ("buffer", lambda w, x: sync.Condition.attach(x)),
}

OBJECTS = [
    np.array([1, "a"], object),
    np.zeros(3, [("Odd", "i4"), ("it", object)]),
    np.zeros(3, [("when", "M8[s]"), ("it", object)]),  # its format can't be told
    (ctypes.py_object * 2)(),
]
GAPS = [memoryview(bytearray(6))[::2], np.zeros((4, 4))[:, 1], np.zeros((4, 4)).T, np.zeros(4, "M8[s]")[::2]]
NO_BUFFERS = ["text", 5, None, [b"x"]]
READ_ONLY = [b"bytes", memoryview(bytearray(4)).toreadonly(), np.broadcast_to(np.zeros(4), (4,))]


@pytest.mark.parametrize("verb", SENDING)
def test_what_can_not_be_sent(world, verb):
    name, call = SENDING[verb]
    for bad in OBJECTS + GAPS + NO_BUFFERS:
        answer = told(lambda bad=bad: _arguments.check_buffer(bad, name))
        assert told(lambda bad=bad: call(world, bad)) == answer


@pytest.mark.parametrize("verb", TARGETS)
def test_what_can_not_be_received_into(world, verb):
    name, call = TARGETS[verb]
    for bad in OBJECTS + GAPS + NO_BUFFERS + READ_ONLY:
        answer = told(lambda bad=bad: _arguments.check_buffer(bad, name, True))
        assert told(lambda bad=bad: call(world, bad)) == answer


def test_the_classes_of_what_is_wrong_with_a_buffer():
    for bad in OBJECTS:
        with pytest.raises(TypeError, match=r"data must be plain bytes, and this .* holds Python objects"):
            _arguments.check_buffer(bad)
    for bad in GAPS:
        with pytest.raises(BufferError, match=r"data must be C-contiguous, and this .* is not"):
            _arguments.check_buffer(bad)
    for bad in NO_BUFFERS:
        with pytest.raises(TypeError, match=f"data must be bytes-like, not {type(bad).__name__}"):
            _arguments.check_buffer(bad)
    for bad in READ_ONLY:
        with pytest.raises(TypeError, match=f"data must be writable, not a read-only .*{type(bad).__name__}"):
            _arguments.check_buffer(bad, "data", True)
    released = memoryview(b"x")
    released.release()
    with pytest.raises(ValueError, match="released memoryview"):
        _arguments.check_buffer(released)


@pytest.mark.parametrize(
    "data", [np.arange(4.0), np.zeros(2, "M8[s]"), np.zeros(0), np.zeros(2, [("Of", "i4")])]
)
def test_an_array_is_its_bytes_in_every_room(world, data):
    for sender, receiver in (
        (world.writer, world.reader),
        (world.left, world.right),
        (world.ring, world.ring),
        (world.here, world.there),
        (world.queue, world.queue),
        (world.sysv, world.sysv),
        (world.posix, world.posix),
    ):
        sender.send(data)
        assert sender.send_many([b"x", data]) == 2
        assert [receiver.recv(timeout=5) for _ in range(3)] == [data.tobytes(), b"x", data.tobytes()]
    sockets.send_fds(world.sock, bytes(data.tobytes()) + b"x", [0])
    received, fds = sockets.recv_fds(world.peer, 4096, 1)
    os.close(fds[0])
    assert received == data.tobytes() + b"x"


# --- limits --------------------------------------------------------------------------------------


def test_a_limit_that_refuses_is_named_with_its_value(world):
    """Each error names what lifts it."""
    big = bytes(20_000)
    with ExitStack() as stack:
        keep = stack.enter_context
        ring, queue = (
            keep(ipckit.Ring(4096, max_message=99)),
            keep(ipckit.Queue(capacity=4096, max_message=99)),
        )
        left, _ = map(keep, ipckit.channel(4096, max_message=99))
        _, writer = map(keep, ipckit.pipe(max_message=99))
        world.posix.send(b"")
        for call, limit in (
            (lambda: ring.send(big), "20000 bytes of at most 99 bytes, which is max_message"),
            (lambda: ring.send_many([b"", big]), "20000 bytes of at most 99 bytes, which is max_message"),
            (lambda: ring.reserve(100), "100 bytes of at most 99 bytes, which is max_message"),
            (lambda: ran(ring.asend(big)), "20000 bytes of at most 99 bytes, which is max_message"),
            (lambda: queue.put(big), "bytes of at most 99 bytes, which is max_message"),
            (lambda: queue.send(big), "bytes of at most 99 bytes, which is max_message"),
            (lambda: left.send(big), "20000 bytes of at most 99 bytes, which is max_message"),
            (
                lambda: left.send_fds([0], bytes(70_000)),
                "70000 bytes of at most 65536 bytes, which go beside descriptors",
            ),
            (lambda: writer.send(big), "20000 bytes exceeds max_message, 99 bytes"),
            (
                lambda: world.ring.reserve(5000),
                "5000 bytes of at most 4088 bytes, which lie in one piece at a capacity of 8192",
            ),
            (lambda: world.posix.send(big), "20000 bytes to .* whose max_message is 8192"),
            (
                lambda: world.posix.recv_into(bytearray(1)),
                "a buffer of 1 bytes for .* whose max_message is 8192",
            ),
            (lambda: world.sysv.send(bytes(1 << 20)), "1048576 bytes .*kernel.msgmax is 8192"),
        ):
            with pytest.raises(OSError, match=limit) as caught:
                call()
            assert caught.value.errno == errno.EMSGSIZE
        assert world.posix.recv(timeout=0) == b""


def test_a_full_queue_names_what_makes_it_larger():
    with ipckit.Queue(1, capacity=4096) as queue:
        queue.put(1)
        for call in (
            lambda: queue.put_nowait(2),
            lambda: queue.put(2, timeout=0),
            lambda: queue.put_many([2], False),
        ):
            with pytest.raises(
                Exception, match="1 of maxsize=1 objects, .* of capacity=4096 bytes are in it"
            ):
                call()


def test_the_buffer_that_is_too_small_is_named(world):
    for sender, receiver, what in (
        (world.writer, world.reader, "a message of 5 bytes exceeds the buffer, 4 bytes"),
        (world.ring, world.ring, "5 bytes of at most 4 bytes, which is the buffer"),
        (world.here, world.there, "5 bytes of at most 4 bytes, which is the buffer"),
        (world.sysv, world.sysv, "message of 5 bytes does not fit into the buffer of 4 bytes"),
    ):
        sender.send(b"12345")
        with pytest.raises(OSError, match=what) as caught:
            receiver.recv_into(bytearray(4), timeout=5)
        assert caught.value.errno == errno.EMSGSIZE
        assert receiver.recv(timeout=5) == b"12345"


# --- a server that runs --------------------------------------------------------------------------


@pytest.mark.parametrize("model", ["fork", "prefork", "thread", "poll", "epoll", "asyncio"])
def test_a_server_without_end(model):
    """Time limits beyond any clock are none: it answers, and ends when it is told to."""
    with listen() as listener:
        limits: dict[str, Any] = {"idle_timeout": math.inf, "total_timeout": 10**400}
        child = ipckit.fork(lambda: server(model, listener, **limits).serve(stop_timeout=math.inf))
        address = listener.getsockname()
    with child:
        with socket.create_connection(address, timeout=60) as connection:
            connection.sendall(b"x")
            assert connection.recv(1) == b"x"
        child.terminate()
        assert child.wait(60).code == 0


def test_the_client_s_time_and_port():
    with pytest.raises(TypeError, match="port must be an integer, not '7007'"):
        client.run("127.0.0.1", "7007")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="timeout must be None or a number of seconds >= 0, not nan"):
        client.run("127.0.0.1", 1, timeout=math.nan)
