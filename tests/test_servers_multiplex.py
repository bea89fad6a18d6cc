"""What is special to the loops: select, poll, epoll and iterative."""

import contextlib
import errno
import logging
import os
import pty
import re
import resource
import shutil
import signal
import socket
import struct
import subprocess
import sys
import time

import pytest
from conftest import eventually
from serving import (
    NEVER,
    Served,
    connect,
    exchange,
    half_close_and_drain,
    recv_exact,
    silent,
    wait_asleep,
    wait_stopped,
)

from ipckit.messagelog import MessageLog
from ipckit.process import fork
from ipckit.servers import EchoService, listen, serve
from ipckit.servers.select import SelectServer
from ipckit.signals import blocked

LOOPS = ["select", "poll", "epoll"]


class Running:
    """A server in a child of the test: its address, and what it says on its standard error and output."""

    def __init__(self, printed, address, child):
        self._printed, self.address, self._child = printed, address, child
        self.pid = child.pid

    @property
    def said(self):
        return self._printed.read_text()

    def connect(self):
        return connect(self.address)

    def says(self, pattern, start=0):
        """Wait until it has said that (from *start* of said on); the match."""
        look = re.compile(pattern)
        eventually(lambda: look.search(self.said, start))
        return look.search(self.said, start)

    def statistics(self):
        """What it answers to SIGUSR1, now."""
        start = len(self.said)
        os.kill(self.pid, signal.SIGUSR1)
        return self.says(r"statistics: .*\n", start)[0]

    def terminate(self):
        os.kill(self.pid, signal.SIGTERM)
        self.wait()

    def wait(self):
        assert self._child.wait() == 0, self.said


def print_to(path):
    """Not by capfd, which loses what is printed while it is read."""
    printed = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(printed, 1)
    os.dup2(printed, 2)
    os.close(printed)
    sys.stdout = open(1, "w", closefd=False)  # noqa: SIM115
    logging.basicConfig(stream=open(2, "w", closefd=False), format="%(message)s", force=True)  # noqa: SIM115


@pytest.fixture
def serving(tmp_path, forked):
    """``serving(model, expected_ends, before=..., **options)`` runs an echo server, and checks how its connections ended."""

    def start(model, ends, *, before=lambda: None, log=None, stop_timeout=NEVER, keep=(), **options):
        listener = listen()
        options.setdefault("idle_timeout", NEVER)

        def child(ready):
            print_to(tmp_path / "printed")
            for name in keep:
                os.close(name)
            with blocked([signal.SIGTERM]), contextlib.ExitStack() as stack:
                before()
                if log is not None:
                    options["log"] = stack.enter_context(MessageLog(tmp_path / "log", **log))
                    print(f"logger {options['log'].logger.pid}", flush=True)
                ready()
                stats = serve(EchoService, listener, model=model, stop_timeout=stop_timeout, **options)
                assert ends in (None, stats.ends), stats

        running = forked(child)
        address = listener.getsockname()
        listener.close()
        running.wait_ready()
        return Running(tmp_path / "printed", address, running)

    return start


# --- the keyboard


@pytest.mark.parametrize("model", [*LOOPS, "iterative"])
def test_a_typed_line_is_printed_and_quit_ends(serving, model):
    reader, writer = os.pipe()
    running = serving(model, {"done": 1}, keyboard=reader, keep=[writer])
    os.close(reader)
    os.write(writer, b"hello from the keyb")
    with running.connect() as client:
        assert exchange(client, b"meanwhile") == b"meanwhile", "half a line keeps nobody waiting"
        os.write(writer, b"oard\nnext\n")
        running.says("hello from the keyboard\nnext\n")
        assert exchange(client, b"still") == b"still"
        assert half_close_and_drain(client) == b""
    os.write(writer, b" quit \nunseen")
    running.wait()
    os.close(writer)


@pytest.mark.parametrize("model", LOOPS)
def test_the_end_of_the_keyboard_ends_only_it(serving, model):
    reader, writer = os.pipe()
    running = serving(model, {"done": 1}, keyboard=reader, keep=[writer])
    os.close(reader)
    os.write(writer, b"no line end")
    os.close(writer)
    running.says("no line end\n")
    wait_asleep(running.pid)  # it does not look at the end of file again and again
    with running.connect() as client:
        assert exchange(client, b"x") == b"x"
    running.terminate()


@pytest.mark.parametrize("model", LOOPS)
@pytest.mark.parametrize("name", ["/dev/null", __file__])
def test_a_keyboard_that_is_none(serving, model, name):
    with open(name) as file:
        running = serving(model, {"done": 1}, keyboard=file)
    with running.connect() as client:
        assert exchange(client, b"x") == b"x"
    running.terminate()


def test_a_server_in_the_background_of_its_terminal_is_not_stopped_by_what_is_typed(forked, tmp_path):
    ours, theirs = pty.openpty()
    name = os.ttyname(theirs)
    listener = listen()

    def shell(ready):
        print_to(tmp_path / "printed")
        os.setsid()
        terminal = os.open(name, os.O_RDWR)  # the controlling one from now on, and we are in its foreground
        job = fork(serve_in_background, terminal, keep=(terminal, listener, 1, 2))
        ready()
        assert job.wait().code == 0

    def serve_in_background(terminal):
        os.setpgid(0, 0)
        with blocked([signal.SIGTERM]):
            print(f"pid {os.getpid()}", flush=True)
            serve(EchoService, listener, model="epoll", keyboard=terminal)

    child = forked(shell)
    server = Running(tmp_path / "printed", listener.getsockname(), child)
    child.wait_ready()
    listener.close()
    pid = int(server.says(r"pid (\d+)")[1])
    os.write(ours, b"for the shell\n")
    with server.connect() as client:
        for _ in range(3):
            assert exchange(client, b"x") == b"x", "not stopped by SIGTTIN"
            assert silent(client)
    os.kill(pid, signal.SIGTERM)
    server.wait()
    assert "for the shell" not in server.said
    os.close(ours)
    os.close(theirs)


# --- a log that makes wait


def stop_logger(running):
    """Stop the logger (as a hanging disk would) when the pipe is empty; its pid."""
    logger = int(running.says(r"logger (\d+)")[1])
    eventually(lambda: "backlog 0," in running.statistics())
    os.kill(logger, signal.SIGSTOP)
    wait_stopped(logger)
    return logger


def send_to(running, client, data):
    """Send, and wait until the server has received it."""
    client.sendall(data)
    ends = [f":{address[1]:04X}" for address in (running.address, client.getsockname())]

    def received():
        with open("/proc/net/tcp") as file:
            rows = [line.split() for line in file]
        mine = [row[4] for row in rows if row[1].endswith(ends[0]) and row[2].endswith(ends[1])]
        return mine == ["00000000:00000000"]  # sent but not acknowledged, received but not read

    eventually(received)


def stays_silent(running, clients):
    """Nothing comes, and waiting for it costs nothing."""
    assert silent(*clients)
    wait_asleep(running.pid)


@pytest.mark.parametrize("model", LOOPS)
def test_a_full_log_stops_nothing_but_the_answers(serving, model, tmp_path):
    running = serving(model, {"done": 6}, log={"capacity": 4096})
    clients = [running.connect() for _ in range(5)]
    for client in clients:
        assert exchange(client, b"-") == b"-"
    logger = stop_logger(running)
    pieces = [bytes([65 + i]) * 4000 for i in range(5)]
    for client, piece in zip(clients, pieces, strict=True):
        send_to(running, client, piece)
    assert recv_exact(clients[0], 4000) == pieces[0], "there was room for one"
    late = running.connect()
    eventually(lambda: "open 6," in running.statistics())
    stays_silent(running, clients[1:])
    os.kill(logger, signal.SIGCONT)
    for client, piece in zip(clients[1:], pieces[1:], strict=True):
        assert recv_exact(client, 4000) == piece
    assert exchange(late, b"late") == b"late"
    for client in (*clients, late):
        client.close()
    eventually(lambda: "done 6" in running.statistics())
    running.terminate()
    assert (tmp_path / "log").read_bytes() == b"-----" + b"".join(pieces) + b"late", "in their order"


@pytest.mark.parametrize("model", [*LOOPS, "iterative"])
def test_with_a_full_log_it_stops_all_the_same(serving, model):
    running = serving(model, {"cut": 1}, log={"capacity": 4096}, stop_timeout=0.2)
    with running.connect() as client:
        assert exchange(client, b"-") == b"-"
        logger = stop_logger(running)
        send_to(running, client, bytes(4096))
        send_to(running, client, bytes(4096))
        assert recv_exact(client, 4096) == bytes(4096)
        os.kill(running.pid, signal.SIGTERM)
        assert recv_exact(client, 1) == b""
    os.kill(logger, signal.SIGCONT)  # or the log could not be closed
    running.wait()


@pytest.mark.parametrize("model", LOOPS)
def test_a_client_that_resets_while_it_waits_for_the_log(serving, model, tmp_path):
    running = serving(model, {"reset": 1, "done": 1}, log={"capacity": 4096})
    first, second = running.connect(), running.connect()
    assert exchange(first, b"-") == b"-"
    logger = stop_logger(running)
    assert exchange(second, bytes(4096)) == bytes(4096), "the pipe is full now"
    send_to(running, first, b"gone")
    first.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    first.close()
    stays_silent(running, [second])
    os.kill(logger, signal.SIGCONT)
    assert exchange(second, b"here") == b"here"
    second.close()
    eventually(lambda: re.search("reset 1.*done 1|done 1.*reset 1", running.statistics()))
    running.terminate()
    assert sorted((tmp_path / "log").read_bytes()[4097:]) == sorted(b"gonehere"), "both, in whichever order"


@pytest.mark.parametrize("model", [*LOOPS, "iterative"])
@pytest.mark.parametrize("durability", ["written", "synced"])
def test_an_answer_waits_for_the_file(serving, model, durability, tmp_path):
    running = serving(model, {"done": 1}, log={"durability": durability, "format": "record"})
    with running.connect() as client:
        for i in range(20):
            assert exchange(client, b"%d\n" % i) == b"%d\n" % i
            assert b'"text":"%d\\n"' % i in (tmp_path / "log").read_bytes()
        logger = stop_logger(running)
        client.sendall(b"stopped")
        stays_silent(running, [client])
        os.kill(logger, signal.SIGKILL)
        assert recv_exact(client, 7) == b"stopped", "another logger goes on"
    running.terminate()


# --- select's limit


@pytest.fixture
def many_descriptors():
    """Room for 1,100 clients here and in the servers."""
    before = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (4096, before[1]))
    yield
    resource.setrlimit(resource.RLIMIT_NOFILE, before)


def answered(clients):
    """Those whose echo comes; the others must be closed."""
    for client in clients:
        with contextlib.suppress(BrokenPipeError, ConnectionResetError):
            client.sendall(b"?")
    return [client for client in clients if recv_exact(client, 1)]


def test_select_refuses_descriptors_that_it_has_no_bit_for(serving, many_descriptors):
    began = time.monotonic()
    running = serving("select", None, max_connections=4000, log={})
    with contextlib.ExitStack() as stack:
        clients = [stack.enter_context(running.connect()) for _ in range(1100)]
        served = answered(clients)
        assert 950 < len(served) < 1008
        assert int(running.says(r"descriptor (\d+), too high for select")[1]) in range(1008, 1024)
        assert running.said.count("too high") <= 1 + time.monotonic() - began, "a line a second"
        os.kill(int(running.says(r"logger (\d+)")[1]), signal.SIGKILL)
        running.says("the logger died")
        assert answered(served) == served, "the others go on, and the new logger's descriptor has a bit"
        served[0].close()
        eventually(lambda: f"open {len(served) - 1}," in running.statistics())
        late = stack.enter_context(running.connect())
        assert answered([late]) == [late], "there is a number again"
    assert f"refused {1100 - len(served)}" in running.statistics()
    running.terminate()


def take_the_low_numbers():
    low = os.open("/dev/null", os.O_RDONLY)
    while os.dup(low) < 1100:
        pass


def test_select_says_when_its_own_descriptors_are_too_high(forked, many_descriptors):
    with listen() as listener:

        def child(ready):
            take_the_low_numbers()
            with pytest.raises(OSError, match=r"no descriptor over 1,023, and one is 1,1\d\d") as caught:
                serve(EchoService, listener, model="select")
            assert caught.value.errno == errno.EINVAL

        assert forked(child).wait() == 0


@pytest.mark.parametrize("model", ["poll", "epoll", "iterative"])
def test_the_others_take_any_number(serving, model, many_descriptors):
    running = serving(model, {"done": 1}, before=take_the_low_numbers)
    with running.connect() as client:
        assert exchange(client, b"high") == b"high"
    running.terminate()


# --- no room for another watch

FAILS = r"""
#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <stdlib.h>
#include <sys/epoll.h>
#include <unistd.h>

int epoll_ctl(int epoll, int operation, int fd, struct epoll_event *event) {
    int (*real)(int, int, int, struct epoll_event *);
    *(void **)&real = dlsym(RTLD_NEXT, "epoll_ctl");
    if (operation == EPOLL_CTL_ADD && access(getenv("EPOLL_IS_FULL"), F_OK) == 0) {
        errno = ENOSPC;
        return -1;
    }
    return real(epoll, operation, fd, event);
}
"""


@pytest.fixture
def epoll_that_fails(tmp_path):
    """An environment, and the file whose being there makes that no descriptor can be watched any more.

    As at the limit of fs.epoll.max_user_watches, which is one for the whole machine."""
    if not shutil.which("cc"):
        pytest.skip("no C compiler")
    library, full = tmp_path / "fails.so", tmp_path / "full"
    command = ["cc", "-shared", "-fPIC", "-o", library, "-x", "c", "-", "-ldl"]
    subprocess.run(command, input=FAILS.encode(), check=True)
    return os.environ | {"LD_PRELOAD": str(library), "EPOLL_IS_FULL": str(full)}, full


# fork: the child of that client; libuv aborts its process.
@pytest.mark.parametrize(
    ("model", "end"), [("epoll", "no memory"), ("asyncio", "no memory"), ("fork", "killed")]
)
def test_a_client_that_can_not_be_watched_ends_alone(tmp_path, epoll_that_fails, model, end):
    environment, full = epoll_that_fails
    options = ["--no-uvloop"] if model == "asyncio" else []
    with Served(tmp_path / "log", "--json", *options, model=model, env=environment) as server:
        with server.connect() as first:
            assert exchange(first, b"first") == b"first"
            wait_asleep(server.pid)  # it watches that client, or its child
            full.touch()
            with server.connect() as refused:
                assert recv_exact(refused, 1) == b""
            eventually(lambda: "shortage" in dict(server.events()))
            assert "No space left on device" in dict(server.events())["shortage"]["error"]
            assert exchange(first, b"goes on") == b"goes on"
            full.unlink()
            with server.connect() as second:
                assert exchange(second, b"second") == b"second"
                assert half_close_and_drain(second) == b""
            assert half_close_and_drain(first) == b""
        code, _ = server.stop()
        ends = dict(server.events())["served"]["ends"]
    assert (code, ends) == (0, {"done": 2, end: 1})


def test_a_warning_hides_no_other(caplog):
    """Each is told once a second at the most, for itself."""
    with listen() as listener:
        server = SelectServer(listener)
        for _ in range(2):
            server._warn("refused", "no bit")
            server._warn("shortage", "no memory")
        server.loop.close()
    assert caplog.messages == ["no bit", "no memory"]


# --- turns


@pytest.mark.parametrize("model", LOOPS)
def test_at_max_connections_the_next_ones_wait(serving, model):
    running = serving(model, {"done": 5}, max_connections=2)
    clients = [running.connect() for _ in range(5)]
    clients[4].sendall(b"4")
    assert exchange(clients[0], b"0") == b"0"
    assert exchange(clients[1], b"1") == b"1"
    stays_silent(running, clients[2:])
    for client in clients[:3]:
        client.close()
    assert recv_exact(clients[4], 1) == b"4"
    for client in clients[3:]:
        client.close()
    eventually(lambda: "done 5" in running.statistics())
    running.terminate()


@pytest.mark.parametrize("model", LOOPS)
def test_one_that_sends_without_end_has_only_its_turns(serving, model):
    running = serving(model, {"done": 1, "reset": 1})
    with running.connect() as greedy, running.connect() as modest:
        assert exchange(greedy, b"x") == b"x"
        greedy.setblocking(False)
        for i in range(50):
            with contextlib.suppress(BlockingIOError):
                while greedy.send(bytes(65536)):
                    pass
            with contextlib.suppress(BlockingIOError):
                greedy.recv(1 << 20)
            assert exchange(modest, b"%03d" % i) == b"%03d" % i
    eventually(lambda: "open 0," in running.statistics())
    running.terminate()


def test_iterative_serves_one_after_the_other_yet_sees_to_the_rest(serving):
    running = serving("iterative", {"done": 2})
    first, second = running.connect(), running.connect()
    second.sendall(b"second")
    assert exchange(first, b"first") == b"first"
    stays_silent(running, [second])
    assert "open 1," in running.statistics(), "signals are seen to while it serves"
    first.close()
    assert recv_exact(second, 6) == b"second"
    second.close()
    eventually(lambda: "done 2" in running.statistics())
    running.terminate()
