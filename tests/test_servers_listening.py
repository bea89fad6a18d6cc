import errno
import fcntl
import logging
import os
import select
import signal
import socket
import stat
import sys
import time
from contextlib import ExitStack

import pytest
from conftest import PATIENCE
from serving import connect

from ipckit import sockets
from ipckit.servers.fork import ForkServer
from ipckit.servers.listening import activated, endpoint, listen, listen_all, listen_unix, notify


def talk(address, data=b"hello"):
    """Connect, send *data*, what comes back."""
    with connect(address) as client:
        client.sendall(data)
        return client.recv(100)


def dead_socket(path):
    with socket.socket(socket.AF_UNIX) as gone:
        gone.bind(str(path))
        gone.listen()


# --- TCP -----------------------------------------------------------------------------------------


def test_tcp_and_how_it_is_printed():
    with listen() as four, listen("::1") as six:
        assert endpoint(four) == f"127.0.0.1:{four.getsockname()[1]}"
        assert endpoint(six) == f"[::1]:{six.getsockname()[1]}"
        for listener in (four, six):
            assert listener.getsockopt(socket.SOL_SOCKET, socket.SO_ACCEPTCONN)
            with pytest.raises(OSError) as caught:
                listen(*listener.getsockname()[:2])
            assert caught.value.errno == errno.EADDRINUSE
    with pytest.raises(socket.gaierror):
        listen("no.such.host.invalid")


def test_all_addresses_of_ipv4_and_of_ipv6():
    """Whoever is first: neither takes those of the other."""
    with listen("0.0.0.0") as four, listen("::", four.getsockname()[1]) as six:
        assert six.getsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY) == 1
        for host, listener in (("127.0.0.1", four), ("::1", six)):
            with connect((host, four.getsockname()[1])), listener.accept()[0]:
                pass
    with listen("::") as six, listen("0.0.0.0", six.getsockname()[1]):
        pass


def test_all_addresses_of_a_name():
    expected = {found[4][0] for found in socket.getaddrinfo("localhost", 0, type=socket.SOCK_STREAM)}
    for port in (0, None):
        if port is None:
            with listen() as free:
                port = free.getsockname()[1]  # noqa: PLW2901
        with ExitStack() as opened:
            listeners = [opened.enter_context(listener) for listener in listen_all("localhost", port)]
            names = [listener.getsockname()[:2] for listener in listeners]
            assert {host for host, _ in names} <= expected
            assert "127.0.0.1" in {host for host, _ in names}
            assert len({port for _, port in names}) == 1, "at one port"
            for listener in listeners:
                assert listener.getsockopt(socket.SOL_SOCKET, socket.SO_ACCEPTCONN)
    with listen_all("127.0.0.1")[0] as listener:
        assert endpoint(listener).startswith("127.0.0.1:")


def test_an_address_of_a_name_that_is_in_use_leaves_nothing_open():
    with listen("127.0.0.1") as taken, pytest.raises(OSError) as caught:
        listen_all("localhost", taken.getsockname()[1])
    assert caught.value.errno == errno.EADDRINUSE


# --- a socket file: its life ---------------------------------------------------------------------


@pytest.mark.parametrize("kind", [str, os.fsencode, lambda path: path])
def test_a_socket_file_comes_and_goes(tmp_path, kind):
    path = tmp_path / "sock"
    with listen_unix(kind(path)) as listener:
        assert endpoint(listener) == f"unix:{path}"
        assert listener.getsockname() == str(path), "what clients and ss(8) are shown"
        client = socket.socket(socket.AF_UNIX)
        client.connect(str(path))
        connection, _ = listener.accept()
        client.sendall(b"x")
        assert connection.recv(1) == b"x"
        assert not os.get_inheritable(listener.fileno())
        connection.close()
        client.close()
        assert path.exists()
    assert not path.exists()
    listener.close()


def test_a_relative_path_is_removed_wherever_the_process_is_by_then(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with listen_unix("sock"):
        assert (tmp_path / "sock").exists()
        monkeypatch.chdir("/")
    assert os.listdir(tmp_path) == []


def test_the_mode_is_as_given_whatever_the_umask(tmp_path):
    former = os.umask(0o077)
    try:
        with listen_unix(tmp_path / "sock", mode=0o666):
            assert stat.S_IMODE((tmp_path / "sock").stat().st_mode) == 0o666
    finally:
        os.umask(former)


def test_close_leaves_what_somebody_else_put_there(tmp_path):
    path = tmp_path / "sock"
    listener = listen_unix(path)
    path.rename(tmp_path / "moved")
    dead_socket(path)
    listener.close()
    assert path.exists()
    assert (tmp_path / "moved").exists()


def test_a_child_that_closes_its_copy_does_not_remove_the_file(tmp_path, forked):
    path = tmp_path / "sock"

    def close(ready):
        listener.close()
        ready()

    with listen_unix(path) as listener:
        child = forked(close)
        child.wait_ready()
        assert child.wait() == 0
        assert path.exists()
        copy = listener.dup()
        copy.close()
        assert path.exists()
        with socket.socket(socket.AF_UNIX) as client:
            client.connect(str(path))
    assert not path.exists()


def test_a_detached_descriptor_keeps_the_file(tmp_path):
    path = tmp_path / "sock"
    with listen_unix(path) as listener:
        fd = listener.detach()
    with socket.socket(fileno=fd), socket.socket(socket.AF_UNIX) as client:
        client.connect(str(path))
    assert path.exists()


def test_a_server_on_a_socket_file(tmp_path, forked):
    path = str(tmp_path / "sock")
    listener = listen_unix(path)

    def serve(ready):
        with listen_unix(path + "2") as own:
            ready()
            ForkServer(own, None).serve()

    child = forked(serve)
    child.wait_ready()
    assert talk(path + "2") == b"hello"
    child.kill(signal.SIGTERM)
    assert child.wait() == 0
    assert os.listdir(tmp_path) == ["sock"], "closed by the server, so removed"
    listener.close()


# --- a socket file: what is there already --------------------------------------------------------


def test_what_a_killed_server_left_is_replaced(tmp_path, forked):
    path = tmp_path / "sock"

    def serve(ready):
        with listen_unix(path):
            ready()
            signal.pause()

    child = forked(serve)
    child.wait_ready()
    child.kill()
    child.wait()
    with listen_unix(path), socket.socket(socket.AF_UNIX) as client:
        client.connect(str(path))


def test_a_living_one_is_not_and_does_not_notice(tmp_path):
    path = tmp_path / "sock"
    with listen_unix(path, backlog=0) as listener:
        with pytest.raises(OSError, match=str(path)) as caught:
            listen_unix(path)
        assert caught.value.errno == errno.EADDRINUSE
        assert select.select([listener], [], [], 0) == ([], [], []), "no connection was made to find out"
        assert path.exists()


def test_anything_else_is_refused_and_untouched(tmp_path):
    """Everything that may be there: tests/test_sockets.py."""
    path = tmp_path / "sock"
    path.write_text("mine")
    with pytest.raises(FileExistsError, match=f"'{path}' is no socket, but -rw"):
        listen_unix(path)
    assert path.read_text() == "mine"


def test_paths_that_can_not_be(tmp_path):
    for name in ("", "\0abstract", "in\0side"):
        with pytest.raises(ValueError, match="can't be empty, abstract or contain NUL"):
            listen_unix(name)
    long = f"{tmp_path}/{'x' * 200}"[:108]
    with pytest.raises(OSError, match=f"'{long}' has 108 bytes, a socket's path at most 107") as caught:
        listen_unix(long)
    assert caught.value.errno == errno.ENAMETOOLONG
    with pytest.raises(FileNotFoundError, match="nowhere/sock"):
        listen_unix(tmp_path / "nowhere" / "sock")
    with pytest.raises(ValueError, match="mode must be permission bits from 0 to 0o777, not 0o1600"):
        listen_unix(tmp_path / "sock", mode=0o1600)
    assert os.listdir(tmp_path) == []


def test_the_longest_path(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with listen_unix("x" * 107) as listener:
        assert endpoint(listener) == "unix:" + "x" * 107


def test_a_lock_is_not_waited_for_for_ever(tmp_path, monkeypatch):
    assert sockets.bind_unix.__kwdefaults__["timeout"] == 5
    monkeypatch.setitem(sockets.bind_unix.__kwdefaults__, "timeout", 0.05)
    dead_socket(tmp_path / "sock")
    lock = os.open(tmp_path / ".sock.lock", os.O_RDWR | os.O_CREAT)
    fcntl.flock(lock, fcntl.LOCK_EX)
    with pytest.raises(TimeoutError, match=f"lock of '{tmp_path}/.sock.lock'") as caught:
        listen_unix(tmp_path / "sock")
    assert caught.value.errno == errno.ETIMEDOUT
    os.close(lock)


# --- activation ----------------------------------------------------------------------------------

ACTIVATED = """
import os, sys
from ipckit.servers.listening import activated, endpoint
try:
    found = activated()
except (OSError, ValueError) as error:
    print(type(error).__name__, error)
    sys.exit(3)
left = [name for name in os.environ if name.startswith("LISTEN_")]
print(*map(endpoint, found), left, [os.get_inheritable(s.fileno()) for s in found], activated(), flush=True)
for sock in found:
    connection, _ = sock.accept()
    connection.sendall(connection.recv(100))
    connection.close()
"""


def activate(forked, fds, read_fd, write_fd, **environment):
    """Execute a program that finds *fds* at 3, 4, ..., as a service manager does it."""

    def run(_ready):
        moved = [os.dup2(fd, 50 + number) for number, fd in enumerate(fds)]
        os.dup2(write_fd, 1)
        for number, fd in enumerate(moved):
            os.dup2(fd, 3 + number)
        os.closerange(3 + len(fds), 100)
        given = {"LISTEN_PID": str(os.getpid()), "LISTEN_FDS": str(len(fds)), **environment}
        os.execve(sys.executable, [sys.executable, "-c", ACTIVATED], {**os.environ, **given})

    child = forked(run)
    os.close(write_fd)
    with open(read_fd) as pipe:
        return child, pipe.readline().strip()


def test_sockets_of_a_service_manager(tmp_path, forked):
    path = str(tmp_path / "sock")
    with listen() as tcp, listen_unix(path) as unix:
        unix.setblocking(False)
        child, line = activate(forked, [tcp.fileno(), unix.fileno()], *os.pipe(), LISTEN_FDNAMES="a:b")
        assert line == f"{endpoint(tcp)} unix:{path} [] [False, False] []"
        assert talk(tcp.getsockname()) == b"hello"
        assert talk(path) == b"hello"
        assert child.wait() == 0
        assert os.path.exists(path), "the manager's file, not the server's"


def test_meant_for_somebody_else_or_nobody(monkeypatch, forked):
    assert activated() == []
    monkeypatch.setenv("LISTEN_PID", str(os.getppid()))
    monkeypatch.setenv("LISTEN_FDS", "1")
    assert activated() == []
    assert "LISTEN_PID" not in os.environ
    assert "LISTEN_FDS" not in os.environ
    with listen() as listener:
        child, line = activate(forked, [listener.fileno()], *os.pipe(), LISTEN_FDS="0")
        assert (line, child.wait()) == ("[] [] []", 0)


def refused(forked, fd, error, **environment):
    child, line = activate(forked, [fd], *os.pipe(), **environment)
    assert child.wait() == 3
    assert line == error


def test_what_is_no_listening_stream_is_named(tmp_path, forked):
    path = str(tmp_path / "log")
    left, right = socket.socketpair()
    datagram = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
    with left, right, datagram, open(path, "w") as file:
        for fd, number, what in (
            (file.fileno(), errno.ENOTSOCK, path),
            (datagram.fileno(), errno.EPROTOTYPE, "SOCK_DGRAM, not a stream"),
            (left.fileno(), errno.EINVAL, "a stream socket that does not listen"),
        ):
            why = f"[Errno {number}] {os.strerror(number)}: 'descriptor 3 of LISTEN_FDS: {what}'"
            refused(forked, fd, f"OSError {why}")
        with listen() as good:
            refused(
                forked,
                good.fileno(),
                "OSError [Errno 9] Bad file descriptor: 'descriptor 4 of LISTEN_FDS'",
                LISTEN_FDS="2",
            )


@pytest.mark.parametrize("name", ["LISTEN_PID", "LISTEN_FDS"])
@pytest.mark.parametrize("value", ["-1", "x", "1 ", "1_0"])
def test_variables_that_are_no_numbers(forked, name, value):
    with listen() as listener:
        refused(
            forked,
            listener.fileno(),
            f"ValueError {name} must be a number, not {value!r}",
            **{name: value},
        )


# --- notify --------------------------------------------------------------------------------------


@pytest.fixture(params=["path", "abstract"])
def manager(request, tmp_path, monkeypatch):
    name = str(tmp_path / "notify") if request.param == "path" else f"@ipckit-test-{os.getpid()}"
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as sock:
        sock.bind(name.replace("@", "\0", 1))
        sock.settimeout(PATIENCE)
        monkeypatch.setenv("NOTIFY_SOCKET", name)
        yield sock


def test_the_service_manager_is_told(manager):
    assert notify("READY=1\nSTATUS=3 connections") is True
    assert manager.recv(1000) == b"READY=1\nSTATUS=3 connections"
    assert notify("STATUS=äh") is True
    assert manager.recv(1000) == "STATUS=äh".encode()
    before = time.monotonic_ns() // 1000
    assert notify("RELOADING=1") is True
    first, second = manager.recv(1000).decode().split("\n")
    assert first == "RELOADING=1"
    name, value = second.split("=")
    assert name == "MONOTONIC_USEC"
    assert before <= int(value) <= time.monotonic_ns() // 1000


def test_a_manager_that_does_not_read_holds_nobody_for_long(manager, caplog):
    while notify("STATUS=again", timeout=0.01):
        pass
    assert "was not told 'STATUS=again': timed out" in caplog.text


def test_nobody_to_be_told(monkeypatch, caplog, tmp_path):
    monkeypatch.delenv("NOTIFY_SOCKET", raising=False)
    assert notify("READY=1") is False
    assert caplog.text == ""
    with caplog.at_level(logging.WARNING):
        for name, why in (
            (str(tmp_path / "gone"), "No such file or directory"),
            ("@nobody-here", "Connection refused"),
            ("relative", "neither a path nor an abstract name"),
            ("vsock:2:1234", "neither a path nor an abstract name"),
            ("/" + "x" * 200, "too long"),
        ):
            monkeypatch.setenv("NOTIFY_SOCKET", name)
            assert notify("READY=1") is False
            assert f"{name}: the service manager was not told 'READY=1': " in caplog.messages[-1]
            assert why in caplog.messages[-1]


def test_names_that_are_not_text(tmp_path):
    path = os.fsencode(tmp_path) + b"/\xff"
    with listen_unix(path) as listener:
        assert endpoint(listener) == f"unix:{tmp_path}/\\xff"
    with socket.socket(socket.AF_UNIX) as abstract:
        abstract.bind("\0ipckit-test-abstract")
        assert endpoint(abstract) == "unix:@ipckit-test-abstract"
