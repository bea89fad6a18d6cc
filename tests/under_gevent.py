"""What test_unpatched.py runs in a process of its own: ipckit where gevent has changed the standard library.

``python under_gevent.py before|after FOLDER``: patch_all() before ipckit is imported, or after it. Prints a
line for each thing that works.
"""

import importlib
import sys

if sys.argv[1] == "after":
    importlib.import_module("ipckit")
importlib.import_module("gevent.monkey").patch_all()

# ruff: noqa: E402
import os
import signal
import socket
from contextlib import ExitStack

import gevent
import gevent.select

import ipckit
from ipckit import posix, sockets, sysv
from ipckit.servers import MODELS, server
from ipckit.servers.listening import listen, listen_unix
from ipckit.servers.service import EchoService, Service

PATIENCE = 120.0


def exchange(one, other):
    """Both ways, each blocking once, then by descriptor."""
    for sender, receiver in ((one, other), (other, one)):
        child = ipckit.fork(sender.send, b"from a child")
        assert receiver.recv(timeout=PATIENCE) == b"from a child"
        assert child.wait(PATIENCE).code == 0
        child.close()
        number = receiver.fileno()
        assert gevent.select.select([number], [], [], 0)[0] == []
        gevent.spawn(sender.send, b"from a greenlet")
        assert gevent.select.select([number], [], [], PATIENCE)[0] == [number]
        assert receiver.recv(timeout=0) == b"from a greenlet"


def duplex():
    one, other = ipckit.duplex()
    with one, other:
        exchange(one, other)


def channel():
    one, other = ipckit.channel()
    with one, other:
        exchange(one, other)
        with open(os.devnull) as null:
            one.send_fds([null], b"with data")
        data, (fd,) = other.recv_fds(1, timeout=PATIENCE)
        os.close(fd)
        assert data == b"with data"


def pipe():
    reader, writer = ipckit.pipe()
    with reader, writer:
        writer.send_many([b"1", b"2"])
        assert reader.recv_many(2) == [b"1", b"2"]


def listener():
    with ipckit.Listener("listener.sock") as listener:
        child = ipckit.fork(lambda: ipckit.connect("listener.sock", timeout=PATIENCE).send(b"here"))
        with child, listener.accept(timeout=PATIENCE) as client:
            assert client.recv(timeout=PATIENCE) == b"here"
        assert raised(TimeoutError, ipckit.connect, "listener.sock", timeout=0)
        assert raised(TimeoutError, listener.accept, timeout=0)
    assert not os.path.exists("listener.sock")


def raised(kind, call, *args, **named):
    try:
        call(*args, **named)
    except kind:
        return True
    return False


def queue():
    with ipckit.Queue() as queue:
        child = ipckit.fork(lambda: queue.put([1, 2]))
        assert queue.get(timeout=PATIENCE) == [1, 2]
        child.wait(PATIENCE)
        child.close()
        assert raised(ipckit.queues.Empty, queue.get, timeout=0.01)
    with ipckit.Queue.open("gevent") as named:
        named.put(b"named")
        assert named.get() == b"named"
        named.unlink()


def wait_in_a_thread():
    """While a thread of gevent's pool waits, the greenlets go on."""
    with ipckit.Queue() as queue:
        waiting = gevent.get_hub().threadpool.spawn(queue.get)
        gevent.sleep(0.001)
        queue.put("from a greenlet")
        assert waiting.get() == "from a greenlet"


def locks():
    lock, event, condition = ipckit.Lock(), ipckit.Event(), ipckit.Condition()
    barrier, semaphore = ipckit.Barrier(2), ipckit.Semaphore(0)

    def other():
        with lock:
            event.set()
        barrier.wait(PATIENCE)
        with condition:
            condition.notify()
        semaphore.release()

    with condition:
        child = ipckit.fork(other)
        assert event.wait(PATIENCE)
        barrier.wait(PATIENCE)
        assert condition.wait(PATIENCE)
    assert semaphore.acquire(timeout=PATIENCE)
    assert child.wait(PATIENCE).code == 0
    child.close()


def signals():
    with ipckit.SignalQueue([signal.SIGUSR1]) as queue:
        ipckit.sigqueue(os.getpid(), signal.SIGUSR1, 7)
        assert queue.recv(timeout=PATIENCE).value == 7
    seen = []
    with ipckit.sigaction(signal.SIGUSR2, seen.append, info=True):
        ipckit.sigqueue(os.getpid(), signal.SIGUSR2, 8)
        assert [info.value for info in seen] == [8]


def children():
    some = [ipckit.fork(lambda: 4) for _ in range(4)]
    while some:
        child, status = ipckit.wait_any(some, PATIENCE)
        assert status.code == 4
        some.remove(child)
        child.close()


def child_of_gevent():
    """The hub works in a child, too."""

    def use():
        gevent.sleep(0.001)
        assert gevent.spawn(lambda: 5).get() == 5
        one, other = socket.socketpair()
        gevent.spawn(one.send, b"x")
        assert other.recv(1) == b"x"

    gevent.sleep(0)
    with ipckit.fork(use) as child:
        assert child.wait(PATIENCE).code == 0


def reaper():
    ended = []
    with ipckit.Reaper(lambda child, status: ended.append(status.code)) as reaper:
        for code in (1, 2, 3):
            reaper.fork(lambda code=code: code)
        reaper.wait(PATIENCE)
    assert sorted(ended) == [1, 2, 3]


def reaper_of_greenlet():
    """Its handler of SIGCHLD is there in whichever greenlet it was entered."""
    ended = []

    def watch():
        with ipckit.Reaper(lambda child, status: ended.append(status.code)) as reaper:
            reaper.fork(lambda: 6)
            reaper.wait(PATIENCE)

    gevent.spawn(watch).get()
    assert ended == [6]


def urgent_watcher():
    with ExitStack() as held:
        listener = held.enter_context(socket.create_server(("127.0.0.1", 0)))
        one = held.enter_context(socket.create_connection(listener.getsockname()))
        other = held.enter_context(listener.accept()[0])
        watcher = held.enter_context(sockets.UrgentWatcher(other))
        sockets.send_urgent(one, b"!")
        watcher.wait(PATIENCE)
        assert sockets.recv_urgent(other, timeout=PATIENCE) == b"!"


def message_log():
    with ipckit.MessageLog("gevent.log", durability="written") as log:
        with ipckit.fork(lambda: log.append(b"from a child\n")):
            pass
        log.append(b"from here\n")
    with open("gevent.log", "rb") as file:
        assert file.read() == b"from a child\nfrom here\n"


def memory():
    with ipckit.SharedMemory(4096) as memory:
        with ipckit.fork(lambda: memory.buf.__setitem__(0, 9)):
            pass
        assert memory.buf[0] == 9


def kernel_objects():
    queue = posix.MessageQueue(f"/gevent-{os.getpid()}", create=True)
    with queue:
        gevent.spawn(queue.send, b"posix")
        assert gevent.select.select([queue.fileno()], [], [], PATIENCE)[0]
        assert queue.recv(timeout=PATIENCE) == b"posix"
        queue.unlink()
    other = sysv.MessageQueue(create=True)
    with other:
        other.send(b"system v")
        assert other.recv(timeout=PATIENCE) == b"system v"
        assert raised(TimeoutError, other.recv, timeout=0.01)
        other.remove()


class Upper(Service):
    def received(self, piece):
        return piece.upper()


def served(model, service, listener, address):
    """A client's answer from a server in a child of its own."""

    def serve():
        with ipckit.MessageLog(f"{model}.log") as log:
            server(model, listener, log, service=service).serve()

    child = ipckit.fork(serve)
    listener.detach() if hasattr(listener, "_file") else listener.close()
    with socket.socket(socket.AF_UNIX if isinstance(address, str) else socket.AF_INET) as client:
        client.settimeout(PATIENCE)
        client.connect(address)
        sockets.send_all(client, b"piece")
        answer = sockets.recv_exact(client, 5, timeout=PATIENCE)
    child.terminate()
    assert child.wait(PATIENCE).code == 0, child
    child.close()
    return answer


def servers():
    for model in MODELS:
        if model == "asyncio":  # whose loop is the other library's business
            continue
        listener = listen()
        address = listener.getsockname()
        assert served(model, EchoService, listener, address) == b"piece"
        if model != "thread":
            assert served(model, Upper, listen_unix(f"{model}.sock"), f"{model}.sock") == b"PIECE"


def thread_server():
    with listen() as listener:
        try:
            server("thread", listener, service=Upper)
        except RuntimeError as error:
            assert "patch_all(thread=False)" in str(error)
        else:
            raise AssertionError("a service in Python without threads")


def close_is_now():
    """Whatever gevent watches, a descriptor of ours is closed when close() returns."""
    reader, writer = ipckit.pipe()
    gevent.spawn(gevent.select.select, [reader.fileno()], [], [], 0)
    gevent.sleep(0)
    number = writer.fileno()
    writer.close()
    assert raised(OSError, os.fstat, number)
    reader.close()


WORKS = [
    duplex, channel, pipe, listener, queue, locks, signals, children, child_of_gevent, reaper,
    reaper_of_greenlet, urgent_watcher, message_log, memory, kernel_objects, servers, thread_server,
    close_is_now, wait_in_a_thread,  # the last, as its thread would take our signals
]  # fmt: skip

if __name__ == "__main__":
    os.chdir(sys.argv[2])
    for work in WORKS:
        work()
        print(work.__name__, flush=True)
    print("all")
