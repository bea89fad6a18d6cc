"""The log never holds the server: disks that do not answer, are full or fail, and loggers that can't be started."""

import contextlib
import errno
import os
import resource
import select
import signal
import time

import pytest
from conftest import PATIENCE, eventually
from serving import (
    A_MOMENT,
    Served,
    connect,
    exchange,
    recv_exact,
    room_for,
    slow_but,
    user_of_its_own,
    wait_asleep,
    wait_gone,
    wait_stopped,
)
from stalling import stalling  # noqa: F401 - a fixture

from ipckit.messagelog import MessageLog
from ipckit.servers import listen
from ipckit.servers.epoll import EpollServer

PIECE = b"z" * 4096


def happened(server, name, times=1):
    """The fields of that event, once it has come so often."""
    found = []

    def have_come():
        found[:] = [fields for event, fields in server.events() if event == name]
        return len(found) >= times

    eventually(have_come)
    return found[-1]


def fill_log(client):
    """Send until nothing comes back for a while; bytes that came back."""
    client.settimeout(10 * A_MOMENT)
    got = 0
    with contextlib.suppress(TimeoutError):
        while True:
            client.sendall(PIECE)
            want = got + len(PIECE)
            while got < want:
                got += len(client.recv(want - got))
    client.settimeout(PATIENCE)
    return got


# --- a file system that does not answer ----------------------------------------------------------


@pytest.mark.parametrize("model", slow_but("epoll"))
def test_a_file_system_that_does_not_answer(model, tmp_path, stalling):  # noqa: F811
    path = tmp_path / "disk" / "log"
    options = ["--stop-timeout", "2", "--json", *room_for(model, 8)]
    with Served(path, *options, model=model) as server, contextlib.ExitStack() as stack:
        clients = [stack.enter_context(server.connect()) for _ in range(1 if model == "iterative" else 3)]
        for client in clients:
            assert exchange(client, b"hello") == b"hello"
        logger = server.wait_logger()
        stalling.tell("stall")
        began, took = time.monotonic(), {}
        for client in clients[:2]:
            assert exchange(client, b"stalled") == b"stalled", "the log has room"
        took["two more echoes"] = time.monotonic() - began
        if model != "iterative":
            with server.connect() as late:
                began = time.monotonic()
                assert exchange(late, b"late") == b"late"
                took["a new client"] = time.monotonic() - began
        echoed = fill_log(clients[-1])
        assert echoed >= 65536, "the pipe takes them"
        wait_asleep(server.pid, *(pid for pid in server.children()[0] if pid != logger))
        began = time.monotonic()
        server.process.send_signal(signal.SIGUSR1)
        told = happened(server, "statistics")
        took["SIGUSR1"] = time.monotonic() - began
        assert told["log"]["backlog"] >= echoed - 65536, "but for what had gone to the disk before"
        assert happened(server, "log waits")["error"] == "its file system or its logger stands still"
        began = time.monotonic()
        server.process.send_signal(signal.SIGTERM)
        assert server.process.wait(PATIENCE) == 1
        took["SIGTERM with a stop timeout of 2 s"] = time.monotonic() - began
        left = happened(server, "log unfinished")
        assert left["unwritten"] >= told["log"]["backlog"]
        assert f"{left['unwritten']} bytes not written" in left["text"]
        print(f"\n{model}:", ", ".join(f"{what} {seconds:.3f} s" for what, seconds in took.items()))
        stalling.tell("")
        wait_gone([logger])
        assert len(path.read_bytes()) + left["unwritten"] >= echoed


def test_kill_9_of_a_server_whose_disk_does_not_answer(tmp_path, stalling):  # noqa: F811
    path = tmp_path / "disk" / "log"
    with Served(path, model="epoll") as server, server.connect() as client:
        assert exchange(client, b"hello") == b"hello"
        logger = server.wait_logger()
        stalling.tell("stall")
        for _ in range(10):
            assert exchange(client, PIECE) == PIECE
        began = time.monotonic()
        server.process.kill()
        server.process.wait(PATIENCE)
        print(f"\nkill -9: ended after {time.monotonic() - began:.3f} s")
        stalling.tell("")
        wait_gone([logger])  # which has written the rest
        assert path.read_bytes() == b"hello" + 10 * PIECE


def test_close_of_a_log_whose_disk_does_not_answer(tmp_path, stalling):  # noqa: F811
    log = MessageLog(tmp_path / "disk" / "log")
    log.append(b"before\n")
    eventually(lambda: log.stats().backlog == 0)
    stalling.tell("stall")
    for _ in range(3):
        log.append(b"x" * 1000)
    log.append(b"y" * 100_000)
    assert log.stats().backlog == 103_000
    logger = log.logger.pid
    with pytest.raises(TimeoutError, match="stands still; 103000 bytes not written"):
        log.close(timeout=0.1)
    assert (log.unwritten, log.closed) == (103_000, True)
    stalling.tell("")
    os.waitpid(logger, 0)


# --- disks that refuse ---------------------------------------------------------------------------


def test_an_input_output_error_is_told_and_passes(tmp_path, stalling):  # noqa: F811
    path = tmp_path / "disk" / "log"
    with Served(path, "--json", model="epoll") as server, server.connect() as client:
        stalling.tell(f"WRITE {errno.EIO}")
        assert exchange(client, b"hello") == b"hello"
        told = happened(server, "log waits", times=2)
        assert (told["errno"], told["error"], told["backlog"]) == (errno.EIO, os.strerror(errno.EIO), 5)
        stalling.tell("")
        happened(server, "log goes on")
        server.stop()
        assert path.read_bytes() == b"hello"


def test_a_failed_fdatasync_is_told_once(tmp_path, stalling):  # noqa: F811
    path = tmp_path / "disk" / "log"
    options = ["--json", "--durability", "synced"]
    with Served(path, *options, model="epoll") as server:
        with server.connect() as client:
            assert exchange(client, b"hello") == b"hello"
            stalling.tell(f"FSYNC {errno.EIO}")
            client.sendall(b"lost?")
            assert recv_exact(client, 5) == b"", "it is not promised, so not answered"
        told = happened(server, "log not synced")
        assert (told["errno"], told["error"]) == (errno.EIO, os.strerror(errno.EIO))
        server.process.send_signal(signal.SIGUSR1)
        assert happened(server, "statistics")["log"]["sync_error"] == errno.EIO
        assert [name for name, _ in server.events()].count("log not synced") == 1


@pytest.mark.parametrize("model", slow_but("epoll", models=["fork", "epoll", "asyncio"]))
def test_a_full_disk_is_told_once_a_second_and_when_it_is_over(model, tmp_path):
    """RLIMIT_FSIZE stands for it."""
    with Served(tmp_path / "log", "--json", model=model) as server, server.connect() as client:
        assert exchange(client, b"x" * 100) == b"x" * 100
        logger, unlimited = server.wait_logger(), (resource.RLIM_INFINITY, resource.RLIM_INFINITY)
        resource.prlimit(logger, resource.RLIMIT_FSIZE, (1000, resource.RLIM_INFINITY))
        assert exchange(client, b"y" * 2000) == b"y" * 2000
        told = happened(server, "log waits", times=2)
        assert (told["errno"], told["level"], told["backlog"]) == (errno.EFBIG, "warning", 1100)
        assert told["text"] == "the log waits: File too large; 1100 bytes are not in its file"
        resource.prlimit(logger, resource.RLIMIT_FSIZE, unlimited)
        happened(server, "log goes on")
        assert exchange(client, b"z") == b"z"
        client.close()
        assert server.stop()[0] == 0
    assert (tmp_path / "log").read_bytes() == b"x" * 100 + b"y" * 2000 + b"z"


# --- loggers -------------------------------------------------------------------------------------


def offered_while_it_stands(server):
    """Stop the logger, rename its file and send SIGHUP; the logger, once the new file is offered to it."""
    logger = server.wait_logger()
    os.kill(logger, signal.SIGSTOP)
    wait_stopped(logger)
    server.path.rename(server.path.with_name("log.1"))
    server.process.send_signal(signal.SIGHUP)
    eventually(server.path.exists)
    return logger


def test_without_a_process_for_a_logger_the_server_goes_on(tmp_path, forked):
    if os.geteuid() != 0:
        pytest.skip("needs root, to become a user whose processes can be limited")
    listener, (told, tell), (held, go) = listen(), os.pipe(), os.pipe()
    limit, most = resource.getrlimit(resource.RLIMIT_NPROC)

    def look():
        if select.select([held], [], [], 0)[0]:
            resource.setrlimit(resource.RLIMIT_NPROC, (limit, most))

    def serve(ready):
        with MessageLog(tmp_path / "log") as log:
            user = user_of_its_own()
            os.setresuid(user, user, user)
            resource.setrlimit(resource.RLIMIT_NPROC, (1, most))
            os.write(tell, b"%d" % log.logger.pid)
            server = EpollServer(listener, log)
            server.loop.every(0.1, look)
            ready()
            server.serve()
            assert log.restarts == 1

    child = forked(serve)
    address = listener.getsockname()
    listener.close()
    child.wait_ready()
    logger = int(os.read(told, 20))
    with connect(address) as client:
        assert exchange(client, b"one\n") == b"one\n"
        os.kill(logger, signal.SIGKILL)
        for _ in range(10):
            assert exchange(client, b"two\n") == b"two\n"
        with connect(address) as late:
            assert exchange(late, b"late\n") == b"late\n"
        echoed = fill_log(client)
        wait_asleep(child.pid, seconds=A_MOMENT / 2)
        os.write(go, b".")
        assert recv_exact(client, len(PIECE)) == PIECE, "the one that had to wait"
    child.kill(signal.SIGTERM)
    assert child.wait() == 0
    assert (tmp_path / "log").read_bytes() == b"one\n" + b"two\n" * 10 + b"late\n" + b"z" * (
        echoed + len(PIECE)
    )
    for fd in (told, tell, held, go):
        os.close(fd)


@pytest.mark.parametrize("model", ["fork", "epoll", "asyncio"])
def test_reopening_holds_nobody_up(model, tmp_path):
    """The logger stands still, so nothing ends it but the time."""
    path = tmp_path / "log"
    with Served(path, "--json", model=model) as server, server.connect() as client:
        assert exchange(client, b"old\n") == b"old\n"
        logger = offered_while_it_stands(server)
        assert exchange(client, b"meanwhile\n") == b"meanwhile\n"
        assert "log kept" not in server.errors(), "the echo did not wait for the end of it"
        assert "did not go over in time" in happened(server, "log kept")["text"]
        os.kill(logger, signal.SIGCONT)
        server.process.send_signal(signal.SIGHUP)
        happened(server, "log reopened")
        assert exchange(client, b"new\n") == b"new\n"
        client.close()
        assert server.stop()[0] == 0
    assert (tmp_path / "log.1").read_bytes() == b"old\nmeanwhile\n"
    assert path.read_bytes() == b"new\n"


def test_a_logger_killed_while_it_goes_over_is_followed_by_one_that_does(tmp_path):
    path = tmp_path / "log"
    with Served(path, "--json", model="epoll") as server, server.connect() as client:
        assert exchange(client, b"old\n") == b"old\n"
        logger = offered_while_it_stands(server)
        os.kill(logger, signal.SIGKILL)
        eventually(lambda: {"log reopened", "log kept"} & {name for name, _ in server.events()})
        if "log kept" in [name for name, _ in server.events()]:  # slower than the time limit
            server.process.send_signal(signal.SIGHUP)
            happened(server, "log reopened")
        assert exchange(client, b"new\n") == b"new\n"
        client.close()
        assert server.stop()[0] == 0
    assert (tmp_path / "log.1").read_bytes() == b"old\n"
    assert path.read_bytes() == b"new\n"
