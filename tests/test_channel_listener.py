"""Channels over a socket file: who may connect, the handshake, and peers that mean harm."""

import asyncio
import contextlib
import ctypes
import errno
import fcntl
import importlib
import os
import random
import select
import shutil
import signal
import socket
import stat
import struct
import tempfile
import threading
import time
from pathlib import Path

import pytest
from conftest import PATIENCE, eventually, open_descriptors

from ipckit import Closed, Corrupt, PeerDied, SharedMemory, ring, sockets
from ipckit.channel import Listener, connect

room = importlib.import_module("ipckit.channel")  # ipckit.channel is the function
NOBODY = 65534
PACKET = struct.Struct("=8sIIQQ")
HELLO = PACKET.pack(b"ikchan\r\n", 1, 0, 0, 1 << 20)
as_root = pytest.mark.skipif(os.geteuid() != 0, reason="only root can be somebody else")


@pytest.fixture
def path(tmp_path):
    return str(tmp_path / "sock")


@pytest.fixture
def listener(path):
    with Listener(path, capacity=8192) as made:
        yield made


@pytest.fixture
def anywhere():
    """A path that every user reaches."""
    folder = tempfile.mkdtemp()
    os.chmod(folder, 0o755)
    yield f"{folder}/sock"
    shutil.rmtree(folder)


def connected(listener, **options):
    """The listener's end, and the client's, both in this process."""
    made = []
    thread = threading.Thread(target=lambda: made.append(connect(listener.path, timeout=PATIENCE, **options)))
    thread.start()
    end = listener.accept(timeout=PATIENCE)
    thread.join(PATIENCE)
    return end, made[0]


def raw_socket():
    return socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)


def raw_client(listener, *packets):
    sock = raw_socket()
    sock.connect(listener.path)
    for packet in packets:
        sock.send(packet)
    return sock


def is_over(sock, timeout=PATIENCE):
    """The other side has closed."""
    sock.settimeout(timeout)
    with contextlib.suppress(ConnectionResetError):
        return sock.recv(100) == b""
    return True


# --- between strangers ---------------------------------------------------------------------------


def test_between_processes(listener, forked):
    def child(ready):
        listener.close()
        with connect(listener.path, timeout=PATIENCE) as end:
            assert end.peer.pid == os.getppid()
            end.send(b"from %d" % os.getpid())
            assert end.recv(timeout=PATIENCE) == bytes(100_000)

    process = forked(child)
    with listener.accept(timeout=PATIENCE) as end:
        assert end.peer == (process.pid, os.getuid(), os.getgid())
        assert end.recv(timeout=PATIENCE) == b"from %d" % process.pid
        end.send(bytes(100_000), timeout=PATIENCE)
        assert repr(end) == f"<Channel channel of 8192 bytes to a client at {listener.path!r}>"
        with pytest.raises(EOFError) as caught:
            end.recv(timeout=PATIENCE)
        assert type(caught.value) is EOFError
    assert process.wait() == 0
    assert listener.refused == 0
    assert os.path.exists(listener.path)


def test_a_killed_client_is_noticed(listener, forked):
    def child(ready):
        end = connect(listener.path)
        end.send(b"x")
        ready()
        signal.pause()

    process = forked(child)
    with listener.accept(timeout=PATIENCE) as end:
        process.wait_ready()
        process.kill()
        assert end.recv() == b"x"
        with pytest.raises(PeerDied):
            end.recv()


def test_a_killed_listener_is_noticed(path, forked):
    def child(ready):
        listener = Listener(path)
        ready()
        end = listener.accept()
        end.send(b"x")
        signal.pause()

    process = forked(child)
    process.wait_ready()
    with connect(path, timeout=PATIENCE) as end:
        assert end.recv(timeout=PATIENCE) == b"x"
        process.kill()
        with pytest.raises(PeerDied):
            end.recv()
    process.wait()
    with pytest.raises(ConnectionRefusedError, match=path) as caught:
        connect(path)
    assert caught.value.errno == errno.ECONNREFUSED


def test_the_smaller_limit_counts(path):
    with Listener(path, capacity=8192, max_message=1000) as listener:
        for asked, agreed in [(500, 500), (5000, 1000)]:
            ours, theirs = connected(listener, max_message=asked)
            with ours, theirs:
                assert ours.max_message == theirs.max_message == agreed
                assert theirs.capacity == 8192


def test_descriptors_and_messages_at_once(listener):
    ours, theirs = connected(listener)
    with ours, theirs:
        theirs.send(b"message")
        theirs.send_fds([0], b"descriptor")
        data, (fd,) = ours.recv_fds(1, timeout=PATIENCE)
        os.close(fd)
        assert data == b"descriptor"
        assert ours.recv(timeout=0) == b"message"


def test_accepting_in_asyncio(listener):
    async def both():
        accepting = asyncio.create_task(listener.aaccept(timeout=PATIENCE))
        await asyncio.sleep(0.01)
        client = await asyncio.to_thread(connect, listener.path)
        with client, await accepting as end:
            await client.asend(b"x")
            assert await end.arecv(timeout=PATIENCE) == b"x"
        with pytest.raises(TimeoutError) as caught:
            await listener.aaccept(timeout=0.02)
        assert caught.value.errno == errno.ETIMEDOUT

    asyncio.run(both())


def test_the_descriptor_is_readable_when_somebody_comes(listener):
    assert not select.select([listener.fileno()], [], [], 0)[0]
    with raw_client(listener):
        assert select.select([listener.fileno()], [], [], PATIENCE)[0]
        with pytest.raises(TimeoutError):
            listener.accept(timeout=0)
        assert not select.select([listener.fileno()], [], [], 0)[0]


def test_a_child_may_accept_too(listener, forked):
    def child(ready):
        with raw_client(listener):  # which the parent deals with
            ready()
            with listener.accept(timeout=PATIENCE) as end:
                end.send(b"%d" % os.getpid())
                with pytest.raises(EOFError):
                    end.recv(timeout=PATIENCE)
            listener.close()
            assert os.path.exists(listener.path)

    with raw_client(listener) as silent:
        with pytest.raises(TimeoutError):
            listener.accept(timeout=0)
        process = forked(child)
        process.wait_ready()
        with connect(listener.path, timeout=PATIENCE) as end:
            assert end.recv(timeout=PATIENCE) == b"%d" % process.pid
        assert process.wait() == 0
        silent.send(HELLO)
        listener.accept(timeout=PATIENCE).close()


def test_accept_times_out(listener):
    for timeout in (0, 0.07):
        start = time.monotonic()
        with pytest.raises(TimeoutError, match=f"accept at '{listener.path}'") as caught:
            listener.accept(timeout=timeout)
        assert caught.value.errno == errno.ETIMEDOUT
        assert time.monotonic() - start >= timeout


def test_two_threads_accept(listener):
    accepted = []
    threads = [
        threading.Thread(target=lambda: accepted.append(listener.accept(timeout=PATIENCE))) for _ in range(2)
    ]
    for thread in threads:
        thread.start()
    with pytest.raises(TimeoutError):
        listener.accept(timeout=0.02)
    clients = [connect(listener.path, timeout=PATIENCE) for _ in range(2)]
    for thread in threads:
        thread.join(PATIENCE)
    for end in accepted + clients:
        end.close()


def test_closed(listener):
    repr(listener)
    caught = []

    def accept():
        try:
            listener.accept()
        except Closed as error:
            caught.append(str(error))

    thread = threading.Thread(target=accept)
    thread.start()
    eventually(listener._turn.locked)
    listener.close()
    listener.close()
    thread.join(PATIENCE)
    assert caught == [f"listener at {listener.path!r} is closed"]
    assert listener.closed
    for verb in (listener.accept, listener.fileno, lambda: asyncio.run(listener.aaccept())):
        with pytest.raises(Closed):
            verb()
    assert repr(listener) == f"<Listener at {listener.path!r}, closed>"


def test_connect_times_out_where_nobody_accepts(path):
    with Listener(path, backlog=1):
        with pytest.raises(TimeoutError, match=f"connect to '{path}': nobody accepted") as caught:
            connect(path, timeout=0.05)
        assert caught.value.errno == errno.ETIMEDOUT
        waiting = [raw_socket() for _ in range(3)]
        for sock in waiting:
            sock.setblocking(False)
            with contextlib.suppress(BlockingIOError):
                sock.connect(path)
        with pytest.raises(TimeoutError, match=f"connect to '{path}': nobody accepts, ") as caught:
            connect(path, timeout=0.05)
        assert caught.value.errno == errno.ETIMEDOUT
        for sock in waiting:
            sock.close()


# --- the socket file -----------------------------------------------------------------------------


@pytest.mark.parametrize("mode", [0o600, 0o660, 0o666, 0])
@pytest.mark.parametrize("umask", [0, 0o077])
def test_the_mode_whatever_the_umask(path, mode, umask):
    before = os.umask(umask)
    try:
        with Listener(path, mode=mode):
            assert stat.S_IMODE(os.stat(path).st_mode) == mode
    finally:
        os.umask(before)


def test_the_mode_is_there_from_the_beginning(path, tmp_path):
    """What the kernel tells of the folder: the file comes and goes, and nobody changes its mode between."""
    libc = ctypes.CDLL(None, use_errno=True)
    attrib, create, delete = 0x004, 0x100, 0x200
    told = libc.inotify_init1(os.O_CLOEXEC)
    assert libc.inotify_add_watch(told, bytes(tmp_path), attrib | create | delete) >= 0
    before = os.umask(0)
    try:
        Listener(path).close()
    finally:
        os.umask(before)
    head = struct.Struct("=iIII")
    seen, data = [], os.read(told, 4096)
    os.close(told)
    while data:
        _, mask, _, length = head.unpack_from(data)
        seen.append(mask)
        data = data[head.size + length :]
    assert seen == [create, delete]


@pytest.mark.parametrize("options", [{"mode": 0o1600}, {"mode": -1}, {"backlog": 0}, {"capacity": 0}])
def test_bad_numbers_are_refused(path, options):
    with pytest.raises(ValueError, match=next(iter(options))):
        Listener(path, **options)
    assert not os.path.exists(path)


@pytest.mark.parametrize("call", [Listener, connect])
def test_paths_that_are_none(call, tmp_path):
    for name in ("", "\0abstract", b"\0abstract"):
        with pytest.raises(ValueError, match="a socket's path can't be empty, abstract or contain NUL"):
            call(name)
    with pytest.raises(OSError, match=f"'{'x' * 108}' has 108 bytes") as caught:
        call("x" * 108)
    assert caught.value.errno == errno.ENAMETOOLONG
    with pytest.raises(FileNotFoundError) as missing:
        call(tmp_path / "missing" / "sock")
    assert missing.value.errno == errno.ENOENT


def test_a_relative_path_and_a_path_object(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in ("sock", Path("sock"), b"sock"):
        with Listener(name) as listener:
            assert listener.path == "sock"
            monkeypatch.chdir("/")
        monkeypatch.chdir(tmp_path)
    assert os.listdir(tmp_path) == []


def test_two_listeners_at_one_path(listener):
    with pytest.raises(OSError, match=listener.path) as caught:
        Listener(listener.path)
    assert caught.value.errno == errno.EADDRINUSE
    ours, theirs = connected(listener)
    ours.close()
    theirs.close()


def test_a_socket_that_is_left_is_replaced(path, forked):
    def child(ready):
        kept = Listener(path)
        os._exit(kept.closed)

    assert forked(child).wait() == 0
    assert stat.S_ISSOCK(os.stat(path).st_mode)
    with Listener(path) as listener:
        ours, theirs = connected(listener)
        ours.close()
        theirs.close()


def has_ended(pid):
    return os.waitid(os.P_PID, pid, os.WEXITED | os.WNOHANG | os.WNOWAIT) is not None


def test_of_racing_listeners_one_wins(path, forked):
    for _ in range(2):
        if not os.path.exists(path):
            with raw_socket() as stale:
                stale.bind(path)
        gate, opened = os.pipe()

        def child(ready, gate=gate):
            ready()
            os.read(gate, 1)
            with contextlib.suppress(OSError), Listener(path):
                signal.pause()
            os._exit(7)

        children = [forked(child) for _ in range(6)]
        for process in children:
            process.wait_ready()
        os.write(opened, b"......")
        eventually(lambda alive=children: sum(has_ended(each.pid) for each in alive) == 5)
        with pytest.raises(TimeoutError):
            connect(path, timeout=0.02)
        os.close(gate)
        os.close(opened)
        for process in children:
            process.kill()
            process.wait()


def foreign_file(path):
    Path(path).write_text("precious")


def link_to_a_socket(path):
    with raw_socket() as stale:
        stale.bind(path + ".target")
    os.symlink(path + ".target", path)


def stale_socket_of_two_names(path):
    with raw_socket() as stale:
        stale.bind(path)
    os.link(path, path + ".other")


def stream_in_use(path):
    sock = socket.socket(socket.AF_UNIX)
    sock.bind(path)
    sock.listen()
    return sock


@pytest.mark.parametrize(
    ("plant", "number"),
    [
        (foreign_file, errno.EEXIST),
        (os.mkdir, errno.EEXIST),
        (os.mkfifo, errno.EEXIST),
        (link_to_a_socket, errno.EEXIST),
        (stale_socket_of_two_names, errno.EEXIST),
        (stream_in_use, errno.EADDRINUSE),
    ],
)
def test_what_is_not_ours_is_left_alone(path, tmp_path, plant, number):
    kept = plant(path)
    before = {name: os.lstat(tmp_path / name) for name in os.listdir(tmp_path)}
    with pytest.raises(OSError, match=path) as caught:
        Listener(path)
    assert caught.value.errno == number
    assert {name: os.lstat(tmp_path / name) for name in os.listdir(tmp_path)} == before
    if kept:
        with kept, pytest.raises(OSError, match=path) as caught:
            connect(path)
        assert caught.value.errno == errno.EPROTOTYPE


@as_root
def test_a_stale_socket_of_another_user_is_left_alone(path):
    with raw_socket() as stale:
        stale.bind(path)
    os.chown(path, NOBODY, -1)
    with pytest.raises(PermissionError, match=f"belongs to user {NOBODY}, not to 0") as caught:
        Listener(path)
    assert caught.value.errno == errno.EPERM
    assert os.path.exists(path)


def test_a_socket_that_does_not_listen_yet_is_left_alone(path):
    with raw_socket() as bound:
        bound.bind(path)
        with pytest.raises(OSError, match=path) as caught:
            Listener(path)
        assert caught.value.errno == errno.EADDRINUSE
        bound.listen()
        with raw_socket() as client:
            client.connect(path)


def test_nobody_is_connected_to_in_order_to_find_out(listener):
    with pytest.raises(OSError, match=listener.path):
        Listener(listener.path)
    assert select.select([listener], [], [], 0) == ([], [], [])


def test_close_leaves_what_took_the_place(path):
    listener = Listener(path)
    os.unlink(path)
    foreign_file(path)
    listener.close()
    assert Path(path).read_text() == "precious"
    os.unlink(path)
    listener = Listener(path)
    os.unlink(path)
    with Listener(path) as second:
        listener.close()
        ours, theirs = connected(second)
        ours.close()
        theirs.close()


def test_a_lock_is_waited_for_5_s(path, tmp_path, monkeypatch):
    assert sockets.bind_unix.__kwdefaults__["timeout"] == 5
    monkeypatch.setitem(sockets.bind_unix.__kwdefaults__, "timeout", 0.1)
    with raw_socket() as stale:
        stale.bind(path)
    lock = os.open(f"{os.path.dirname(path)}/.{os.path.basename(path)}.lock", os.O_RDWR | os.O_CREAT)
    fcntl.flock(lock, fcntl.LOCK_EX)
    with pytest.raises(TimeoutError, match=str(tmp_path)) as caught:
        Listener(path)
    assert caught.value.errno == errno.ETIMEDOUT
    Listener(tmp_path / "free").close()  # nothing to be replaced, no lock
    os.close(lock)
    Listener(path).close()


# --- other users ---------------------------------------------------------------------------------


def as_nobody(work):
    def child(ready):
        os.setgroups([])
        os.setresgid(NOBODY, NOBODY, NOBODY)
        os.setresuid(NOBODY, NOBODY, NOBODY)
        work(ready)

    return child


@as_root
def test_the_mode_keeps_others_out(anywhere, forked):
    with Listener(anywhere):

        @as_nobody
        def child(ready):
            with pytest.raises(PermissionError) as caught:
                connect(anywhere, peer_uid=0)
            assert caught.value.errno == errno.EACCES

        assert forked(child).wait() == 0


@as_root
def test_others_are_turned_away_before_they_are_heard(anywhere, forked):
    with Listener(anywhere, mode=0o666) as listener:

        @as_nobody
        def child(ready):
            with pytest.raises(ConnectionRefusedError, match="turned us away") as caught:
                connect(anywhere, peer_uid=0, timeout=PATIENCE)
            assert caught.value.errno == errno.ECONNREFUSED
            with pytest.raises(PermissionError, match="user 0 listens there") as denied:
                connect(anywhere)
            assert denied.value.errno == errno.EPERM

        process = forked(child)
        while listener.refused < 2:
            with pytest.raises(TimeoutError):
                listener.accept(timeout=0.01)
        assert process.wait() == 0


@as_root
def test_others_that_are_allowed(anywhere, forked):
    with Listener(anywhere, mode=0o666, peer_uid=NOBODY) as listener:

        @as_nobody
        def child(ready):
            with connect(anywhere, peer_uid=0, timeout=PATIENCE) as end:
                end.send(end.recv(timeout=PATIENCE))
                assert end.peer.uid == 0

        process = forked(child)
        with listener.accept(timeout=PATIENCE) as end:
            assert end.peer == (process.pid, NOBODY, NOBODY)
            end.send(bytes(100_000), timeout=PATIENCE)
            assert end.recv(timeout=PATIENCE) == bytes(100_000)
        assert process.wait() == 0
        with pytest.raises(PermissionError, match="user 0 listens there"):
            connect(anywhere, peer_uid=NOBODY)
        with pytest.raises(TimeoutError):
            listener.accept(timeout=0)


# --- clients that don't keep to the handshake ----------------------------------------------------


def test_a_silent_client_keeps_nobody_waiting(listener, monkeypatch):
    """Who waited for the silent one would run out of time."""
    monkeypatch.setattr(room, "HANDSHAKE_TIME", 2 * PATIENCE)
    with raw_client(listener):
        for _ in range(3):
            ours, theirs = connected(listener)
            ours.close()
            theirs.close()
        assert listener.refused == 0


def test_a_client_that_stays_silent_is_turned_away(listener, monkeypatch):
    assert room.HANDSHAKE_TIME == 5
    monkeypatch.setattr(room, "HANDSHAKE_TIME", 0.1)
    start = time.monotonic()
    with raw_client(listener) as silent, raw_client(listener, b"") as empty:
        while listener.refused < 2:
            with pytest.raises(TimeoutError):
                listener.accept(timeout=0.01)
        assert time.monotonic() - start >= 0.1
        assert is_over(silent)
        assert is_over(empty)


@pytest.mark.parametrize(
    "packet",
    [
        b"GET / HTTP/1.0\r\n\r\n",
        HELLO[:5],
        HELLO[:20],
        HELLO + b"x",
        HELLO + bytes(1000),
        bytes(100_000),
        PACKET.pack(b"ikchan\r\n", 1, 0, 0, 0),
        PACKET.pack(b"ikchan\r\n", 1, 0, 0, 1 << 63),
    ],
)
def test_a_babbling_client_is_turned_away(listener, packet):
    before = open_descriptors()
    with raw_client(listener, packet) as babbling:
        with pytest.raises(TimeoutError):
            listener.accept(timeout=0.05)
        assert is_over(babbling)
    assert listener.refused == 1
    assert open_descriptors() == before


def test_a_client_of_another_version_is_told_ours(listener):
    with raw_client(listener, PACKET.pack(b"ikchan\r\n", 2, 0, 0, 1)) as other:
        with pytest.raises(TimeoutError):
            listener.accept(timeout=0.05)
        assert PACKET.unpack(other.recv(100))[:2] == (b"ikchan\r\n", 1)
        assert is_over(other)


def test_descriptors_in_a_hello_are_closed(listener):
    before = open_descriptors()
    for _ in range(20):
        with raw_client(listener) as sock:
            sockets.send_fds(sock, HELLO, [0] * 253)
            with pytest.raises(TimeoutError):
                listener.accept(timeout=0.01)
    assert open_descriptors() == before
    assert listener.refused == 20


def test_a_client_that_goes_amid_the_handshake(listener):
    raw_client(listener).close()
    raw_client(listener, HELLO).close()
    ours, theirs = connected(listener)
    ours.close()
    theirs.close()
    with pytest.raises(TimeoutError):
        while True:
            listener.accept(timeout=0.05).close()  # one may have been accepted before it went


def test_only_so_many_may_be_silent(path):
    with Listener(path, backlog=3) as listener, contextlib.ExitStack() as silent:
        for _ in range(10):
            silent.enter_context(raw_client(listener))
            with pytest.raises(TimeoutError):
                listener.accept(timeout=0)
        assert listener.refused == 7


def test_without_descriptors_the_silent_go_first(listener):
    import resource

    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    clients = [raw_client(listener) for _ in range(5)]
    with pytest.raises(TimeoutError):
        listener.accept(timeout=0)
    clients.append(raw_client(listener))
    spare = os.dup(0)
    os.close(spare)
    resource.setrlimit(resource.RLIMIT_NOFILE, (spare, hard))
    try:
        with pytest.raises(TimeoutError):
            listener.accept(timeout=0)
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
    assert listener.refused == 1
    for client in clients:
        client.close()
    with pytest.raises(TimeoutError):
        listener.accept(timeout=0)
    client = raw_client(listener, HELLO)
    spare = os.dup(0)
    os.close(spare)
    resource.setrlimit(resource.RLIMIT_NOFILE, (spare, hard))
    try:
        with pytest.raises(OSError, match=listener.path) as caught:
            listener.accept(timeout=0)
        assert caught.value.errno == errno.EMFILE
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
    listener.accept(timeout=PATIENCE).close()
    client.close()


# --- listeners that mean harm --------------------------------------------------------------------


def answered(path, packet, fds, *, hear=True):
    """What connect() makes of a listener that answers so."""
    with raw_socket() as listening:
        listening.bind(path)
        listening.listen()

        def answer():
            sock, _ = listening.accept()
            with sock:
                if hear:
                    sock.recv(100)
                if packet is not None:
                    sockets.send_fds(sock, packet, fds)

        thread = threading.Thread(target=answer)
        thread.start()
        try:
            return connect(path, timeout=PATIENCE)
        finally:
            thread.join(PATIENCE)


def memfd(size, seals=True):
    fd = os.memfd_create("test", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
    os.ftruncate(fd, size)
    if seals:
        import fcntl

        fcntl.fcntl(fd, fcntl.F_ADD_SEALS, fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW)
    return fd


def welcome(capacity=8192, version=1, max_message=1 << 20):
    return PACKET.pack(b"ikchan\r\n", version, 0, capacity, max_message)


SIZE = 2 * (8192 + 512)


def rings(flags=(False, False)):
    memory = SharedMemory(SIZE)
    for start in (0, SIZE // 2):
        ring.make(memory.buf[start : start + SIZE // 2], *flags)
    return memory


def test_a_listener_that_says_nothing_good(path, tmp_path):
    for number, (packet, error, told) in enumerate(
        [
            (None, ConnectionRefusedError, "the listener turned us away"),
            (b"hello", Corrupt, "5 bytes that begin no handshake"),
            (welcome(version=7), OSError, "version 7, not 1"),
            (welcome(), Corrupt, "0 descriptors, not 5"),
            (welcome() + b"x", Corrupt, "33 bytes, not 32"),
            (welcome() + bytes(100), Corrupt, "more came than a handshake"),
            (welcome(max_message=0), Corrupt, "max_message 0"),
        ]
    ):
        with pytest.raises(error, match=told) as caught:
            answered(f"{path}{number}", packet, [])
        if error is OSError:
            assert caught.value.errno == errno.EPROTONOSUPPORT
    with pytest.raises(ConnectionRefusedError):
        answered(path, None, [], hear=False)


@pytest.mark.parametrize(
    ("kind", "told"),
    [
        ("unsealed", "not sealed against shrinking and growing"),
        ("short", f"has {SIZE - 1} bytes, not {SIZE}"),
        ("file", "not sealed against shrinking and growing"),
        ("pipe", "is no memory, but p"),
        ("zeros", "the memory holds no ring"),
        ("noise", "the memory holds no ring, or a damaged one"),
        ("locks", "the rings have locks"),
    ],
)
def test_memory_that_is_none(path, tmp_path, kind, told):
    before = open_descriptors()
    if kind == "unsealed":
        fd = memfd(SIZE, seals=False)
    elif kind in ("short", "zeros", "noise"):
        fd = memfd(SIZE - (kind == "short"))
        if kind == "noise":
            os.write(fd, random.Random(1).randbytes(SIZE))
    elif kind == "file":
        fd = os.open(tmp_path / "file", os.O_RDWR | os.O_CREAT)
        os.ftruncate(fd, SIZE)
    elif kind == "pipe":
        fd, other = os.pipe()
        os.close(other)
    else:
        with rings((True, True)) as memory:
            fd = os.dup(memory.fileno())
    bells = room._new_bells()
    with pytest.raises(Corrupt, match=told):
        answered(path, welcome(), [fd, *bells])
    for number in (fd, *bells):
        os.close(number)
    assert open_descriptors() == before


@pytest.mark.parametrize("capacity", [0, 8191, 1 << 40, (1 << 64) - 1, 4096, 16384])
def test_a_capacity_that_is_none(path, capacity):
    bells = room._new_bells()
    with rings() as memory, pytest.raises(Corrupt, match=f"{capacity}|bytes, not"):
        answered(path, welcome(capacity), [memory.fileno(), *bells])
    for number in bells:
        os.close(number)


def test_bells_that_are_none(path):
    with contextlib.ExitStack() as opened:
        memory = opened.enter_context(rings())
        stream, _ = (opened.enter_context(sock) for sock in socket.socketpair())
        zero = opened.enter_context(open("/dev/zero", "rb"))
        inet = opened.enter_context(socket.socket(socket.AF_INET, socket.SOCK_DGRAM))
        for number, bell in enumerate([stream, zero, memory, inet]):
            with pytest.raises(Corrupt, match="is no bell"):
                answered(f"{path}{number}", welcome(), [memory, bell, bell, bell, bell])


def test_more_descriptors_than_agreed_are_closed(path):
    before = open_descriptors()
    with rings() as memory, pytest.raises(Corrupt, match="more came than a handshake"):
        answered(path, welcome(), [memory] * 253)
    assert open_descriptors() == before


def test_a_listener_that_never_answers(path):
    with raw_socket() as listening:
        listening.bind(path)
        listening.listen()
        with pytest.raises(TimeoutError) as caught:
            connect(path, timeout=0.05)
        assert caught.value.errno == errno.ETIMEDOUT


# --- peers that mean harm ------------------------------------------------------------------------

TAIL, DATA = 128, 512  # where they are in a ring
RING = SIZE // 2


def ring_all(end):
    """The bells, without a pause."""
    bells = [socket.socket(fileno=os.dup(bell)) for bell in end._bells]
    while True:
        for bell in bells:
            with contextlib.suppress(BlockingIOError):
                bell.send(bytes(8), socket.MSG_DONTWAIT)


def break_bells(end):
    for bell in end._bells:
        with socket.socket(fileno=os.dup(bell)) as sock:
            sock.setblocking(True)
            sock.shutdown(socket.SHUT_RDWR)


def peek(end):
    bytes(end.peek(timeout=0.03))
    end.release()


def hostile(ready, path, kind):
    """A client that becomes a peer of tests/c/peer_channel.c, or does the like with the bells."""
    end = connect(path, timeout=PATIENCE)
    ready()
    if kind == "ring_all":
        ring_all(end)
    elif kind == "break_bells":
        break_bells(end)
        signal.pause()
    os.set_inheritable(end._life, True)
    os.set_inheritable(end._memory.fileno(), True)
    program = Path(__file__).parent.parent / "build" / "peers" / "channel"
    os.execv(program, [program, str(end._memory.fileno()), kind])


KINDS = ["send_crumbs", "toggle", "begin_again", "ask_again", "keep_waiting", "write_noise"]


@pytest.mark.proof
@pytest.mark.parametrize("kind", [*KINDS, "write_noise", "ring_all", "break_bells"])
def test_a_peer_that_writes_into_the_memory(listener, forked, kind):
    """Each call ends; what it says is one of a few things."""
    process = forked(hostile, listener.path, kind)
    with listener.accept(timeout=PATIENCE) as end:
        process.wait_ready()
        calls = [
            lambda: end.recv(timeout=0.03),
            lambda: end.send(b"x" * 100, timeout=0.03),
            lambda: end.send(bytes(100_000), timeout=0.03),
            lambda: end.recv_many(timeout=0.03),
            lambda: end.send_many([b"y"] * 100, timeout=0.03),
            lambda: peek(end),
            lambda: end.recv_into(bytearray(100_000), timeout=0.03),
            lambda: asyncio.run(end.arecv(timeout=0.03)),
            lambda: asyncio.run(end.asend(bytes(20_000), timeout=0.03)),
            end.stats,
        ]
        until = time.monotonic() + (30 if os.environ.get("IPCKIT_PROOF") else 0.5)
        while time.monotonic() < until:
            for call in calls:
                with contextlib.suppress(TimeoutError, Corrupt, EOFError, BrokenPipeError):
                    try:
                        call()
                    except OSError as error:
                        if error.errno != errno.EMSGSIZE:
                            raise
        process.kill()
        process.wait()
        with pytest.raises((EOFError, Corrupt, OSError)):
            for _ in range(100_000):
                end.recv(timeout=PATIENCE)


@pytest.mark.parametrize("kind", KINDS)
def test_a_signal_is_heard_whatever_the_peer_writes(listener, forked, kind):
    class Heard(Exception):
        pass

    def handler(*_):
        raise Heard

    process = forked(hostile, listener.path, kind)
    timer = threading.Timer(0.05, os.kill, [os.getpid(), signal.SIGUSR1])
    before = signal.signal(signal.SIGUSR1, handler)
    try:
        with listener.accept(timeout=PATIENCE) as end, pytest.raises(Heard):
            process.wait_ready()
            timer.start()
            while True:
                with contextlib.suppress(Corrupt, EOFError, OSError):
                    end.send(bytes(1 << 20)) if kind in ("ask_again", "keep_waiting") else end.recv()
    finally:
        timer.cancel()
        signal.signal(signal.SIGUSR1, before)
    timer.join()


def test_a_length_bomb_is_refused_before_anything_is_allocated(listener):
    ours, theirs = connected(listener)
    with ours, theirs:
        buf = theirs._memory.buf
        for length in (ours.max_message + 1, 1 << 39, (1 << 64) - 1):
            at = RING + DATA + struct.unpack_from("=Q", buf, RING + TAIL)[0] % 8192
            struct.pack_into("=QQ", buf, at, 3 << 40 | 2 << 48 | 2048, length)
            struct.pack_into("=Q", buf, RING + TAIL, 2056)
            with pytest.raises(
                OSError, match=f"{length} bytes of at most {ours.max_message} bytes, which is max_message"
            ) as caught:
                ours.recv(timeout=1)
            assert caught.value.errno == errno.EMSGSIZE
            struct.pack_into("=Q", buf, RING + TAIL, 0)
        buf.release()


def test_what_no_channel_sends_beside_the_messages(listener):
    with raw_client(listener, HELLO) as client, listener.accept(timeout=PATIENCE) as end:
        _, fds = sockets.recv_fds(client, 100, 5)
        for fd in fds:
            os.close(fd)
        before = open_descriptors()
        sockets.send_fds(client, b"?", [0])
        with pytest.raises(Corrupt, match="1 bytes that no channel sends"):
            end.recv_fds(1)
        assert open_descriptors() == before
