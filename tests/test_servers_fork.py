import errno
import os
import resource
import select
import shutil
import signal
import socket
import struct
import subprocess
import sys
import time
from pathlib import Path

import pytest
from conftest import PATIENCE, eventually
from serving import (
    BENCH,
    Served,
    connect,
    exchange,
    half_close_and_drain,
    recv_exact,
    silent,
    streams,
    user_of_its_own,
    wait_asleep,
    wait_gone,
    wait_stopped,
)  # fmt: skip

from ipckit.messagelog import MessageLog
from ipckit.servers import listen
from ipckit.servers.fork import ForkServer


def test_it_echoes_logs_and_stops(tmp_path):
    with Served(tmp_path / "log") as server:
        with server.connect() as connection:
            assert exchange(connection, b"hello\n") == b"hello\n"
            assert exchange(connection, b"\0\xff" * 1000) == b"\0\xff" * 1000
            assert half_close_and_drain(connection) == b""
        code, printed = server.stop()
    assert code == 0
    assert (tmp_path / "log").read_bytes() == b"hello\n" + b"\0\xff" * 1000
    assert "1 (1 done)" in printed


def test_the_c_client_gets_its_answer(tmp_path):
    data = os.urandom(500_000)
    with Served(tmp_path / "log") as server:
        client = [BENCH / "echo_client", *map(str, server.address)]
        done = subprocess.run(client, input=data, capture_output=True, timeout=PATIENCE)
        assert (done.returncode, done.stdout) == (0, data)
        assert server.stop()[0] == 0
    assert (tmp_path / "log").read_bytes() == data


def test_half_close_gets_the_whole_answer(tmp_path):
    data = os.urandom(1 << 20)
    with Served(tmp_path / "log") as server, server.connect() as connection:
        sent = 0
        got = bytearray()
        connection.setblocking(False)
        while len(got) < len(data):
            writing = [connection] if sent < len(data) else []
            _, writable, _ = select.select([connection], writing, [], PATIENCE)
            if writable:
                sent += connection.send(data[sent:])
                if sent == len(data):
                    connection.shutdown(socket.SHUT_WR)
            try:
                got += connection.recv(65536)
            except BlockingIOError:
                continue
        assert got == data
        assert server.stop()[0] == 0
    assert (tmp_path / "log").read_bytes() == data


def test_a_client_that_says_nothing_at_all(tmp_path):
    with Served(tmp_path / "log") as server:
        with server.connect() as connection:
            assert half_close_and_drain(connection) == b""
        assert server.stop()[0] == 0
    assert (tmp_path / "log").read_bytes() == b""


def test_resets_end_only_their_own_child(tmp_path):
    with Served(tmp_path / "log") as server:
        before = server.descriptors()
        for _ in range(50):
            connection = server.connect()
            connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            connection.sendall(b"x")
            connection.close()  # RST
        with server.connect() as connection:
            assert exchange(connection, b"still here") == b"still here"
        eventually(lambda: server.descriptors() == before)
        assert server.stop()[0] == 0


def test_max_children_makes_the_next_ones_wait(tmp_path):
    with Served(tmp_path / "log", "--max-children", "2") as server:
        first, second, third = (server.connect() for _ in range(3))
        assert exchange(first, b"1") == b"1"
        assert exchange(second, b"2") == b"2"
        third.sendall(b"3")
        assert silent(third), "served only when there is room"
        eventually(lambda: len(server.children()[0]) == 3)
        first.close()
        assert recv_exact(third, 1) == b"3"
        second.close()
        third.close()
        assert server.stop()[0] == 0


def test_out_of_descriptors_it_waits_without_spinning_and_goes_on(tmp_path):
    with Served(tmp_path / "log") as server:
        held = server.connect()
        assert exchange(held, b"held") == b"held"
        usage = len(os.listdir(f"/proc/{server.pid}/fd"))
        began = time.monotonic()
        resource.prlimit(server.pid, resource.RLIMIT_NOFILE, (usage + 1, 4096))
        waiting = [server.connect() for _ in range(20)]  # in the backlog
        for connection in waiting:
            connection.sendall(b"w")
        eventually(lambda: "new connections wait" in server.errors())
        wait_asleep(server.pid)
        assert exchange(held, b"still") == b"still"
        resource.prlimit(server.pid, resource.RLIMIT_NOFILE, (4096, 4096))
        for connection in waiting:
            assert recv_exact(connection, 1) == b"w"
            connection.close()
        held.close()
        code, printed = server.stop()
        assert code == 0
        lines = printed.count("Too many open files; new connections wait")
        assert 1 <= lines <= 1 + time.monotonic() - began, "a line a second"


def test_when_fork_fails_the_client_waits_and_the_server_goes_on(tmp_path, forked):
    if os.geteuid() != 0:
        pytest.skip("needs root, to become a user whose processes can be limited")
    listener = listen()

    def serve(ready):
        with MessageLog(tmp_path / "log") as log:
            user = user_of_its_own()
            os.setresuid(user, user, user)
            resource.setrlimit(resource.RLIMIT_NPROC, (3, 3))  # ourselves, the spawner, one child
            server = ForkServer(listener, log)
            ready()
            server.serve()
            assert server.stats().ends == {"done": 3}

    child = forked(serve)
    address = listener.getsockname()
    listener.close()
    child.wait_ready()
    clients = [connect(address) for _ in range(3)]
    for client in clients:
        client.sendall(b"hello")
    assert recv_exact(clients[0], 5) == b"hello"
    assert silent(*clients[1:]), "no process for them yet"
    assert exchange(clients[0], b"still") == b"still"
    clients[0].close()
    for client in clients[1:]:
        assert recv_exact(client, 5) == b"hello"
        client.close()
    child.kill(signal.SIGTERM)
    assert child.wait() == 0


def test_a_killed_logger_is_replaced_and_nothing_lost(tmp_path):
    with Served(tmp_path / "log", "--format", "record") as server, server.connect() as connection:
        sent = bytearray()
        for number in range(200):
            data = b"%d\n" % number
            assert exchange(connection, data) == data
            sent += data
            if number % 40 == 20:
                logger = server.wait_logger()
                os.kill(logger, signal.SIGKILL)
                eventually(lambda old=logger: server.logger() not in (None, old))
        connection.close()
        code, printed = server.stop()
    assert code == 0
    assert "logger restarts" in printed
    assert [bytes(data) for data in streams(tmp_path / "log").values()] == [bytes(sent)]


def test_a_killed_child_ends_only_its_connection(tmp_path):
    with Served(tmp_path / "log") as server:
        victim = server.connect()
        assert exchange(victim, b"v") == b"v"
        (child,) = server.workers()
        other = server.connect()
        assert exchange(other, b"o") == b"o"
        os.kill(child, signal.SIGKILL)
        assert recv_exact(victim, 1) == b""
        assert exchange(other, b"o") == b"o"
        victim.close()
        other.close()
        code, printed = server.stop()
    assert code == 0
    assert "1 killed" in printed


def test_ctrl_c_in_the_terminal_reaches_all_and_still_loses_nothing(tmp_path):
    with Served(tmp_path / "log") as server, server.connect() as connection:
        assert exchange(connection, b"before") == b"before"
        children = server.children()[0]
        os.killpg(server.pid, signal.SIGINT)
        assert recv_exact(connection, 1) == b""
        assert server.process.wait(PATIENCE) == 0
        wait_gone(children)
    assert (tmp_path / "log").read_bytes() == b"before"


def test_a_signal_too_early_or_twice_still_ends_it_with_status_0(tmp_path):
    for number in range(2):
        with Served(tmp_path / f"log{number}") as server:
            for _ in range(3):
                server.process.send_signal(signal.SIGTERM)
            assert server.process.wait(PATIENCE) == 0


def test_what_had_come_before_the_stop_is_answered(tmp_path):
    with Served(tmp_path / "log") as server, server.connect() as connection:
        assert exchange(connection, b"a") == b"a"
        (child,) = server.workers()
        os.kill(child, signal.SIGSTOP)
        wait_stopped(child)
        connection.sendall(b"came before the stop")
        server.process.send_signal(signal.SIGTERM)
        eventually(lambda: "000000000000400" in pending(child))
        os.kill(child, signal.SIGCONT)
        assert recv_exact(connection, 100) == b"came before the stop"
        assert server.process.wait(PATIENCE) == 0
    assert (tmp_path / "log").read_bytes() == b"acame before the stop"


def pending(pid):
    text = Path(f"/proc/{pid}/status").read_text()
    return next(line for line in text.splitlines() if line.startswith("ShdPnd"))


def test_a_child_that_does_not_end_is_killed_at_the_deadline(tmp_path):
    with Served(tmp_path / "log", "--stop-timeout", "0.1") as server, server.connect() as connection:
        assert exchange(connection, b"x") == b"x"
        (child,) = server.workers()
        os.kill(child, signal.SIGSTOP)
        wait_stopped(child)
        code, printed = server.stop()
        wait_gone([child])
    assert code == 0
    assert "1 killed" in printed


def test_sigchld_ignored_on_entry(tmp_path):
    ignore = "import os, signal, sys; signal.signal(signal.SIGCHLD, signal.SIG_IGN); os.execv(sys.argv[1], sys.argv[1:])"
    prefix = (sys.executable, "-c", ignore)  # not a shell's trap: some shells don't pass it on
    with Served(tmp_path / "log", prefix=prefix) as server:
        for _ in range(3):
            with server.connect() as connection:
                assert exchange(connection, b"x") == b"x"
        eventually(lambda: server.children() == ([server.logger()], []))
        code, printed = server.stop()
    assert code == 0
    assert "3 (3 done)" in printed


@pytest.mark.parametrize("durability", ["none", "written", "synced"])
def test_each_durability(tmp_path, durability):
    with Served(tmp_path / "log", "--durability", durability, "--format", "record") as server:
        with server.connect() as connection:
            for number in range(20):
                assert exchange(connection, b"%d\n" % number) == b"%d\n" % number
                if durability != "none":
                    assert b"".join(map(bytes, streams(tmp_path / "log").values())).endswith(b"%d\n" % number)
        assert server.stop()[0] == 0


def test_ipv6(tmp_path):
    if not socket.has_ipv6 or not _binds("::1"):
        pytest.skip("no IPv6 here")
    with Served(tmp_path / "log", "--host", "::1", "--format", "record") as server:
        with server.connect() as connection:
            assert exchange(connection, b"six") == b"six"
            port = connection.getsockname()[1]
        assert server.stop()[0] == 0
    assert f'"peer":"[::1]:{port}"' in (tmp_path / "log").read_text()


def _binds(host):
    with socket.socket(socket.AF_INET6) as probe:
        try:
            probe.bind((host, 0))
        except OSError:
            return False
    return True


def test_errors_of_accept_that_concern_one_connection_are_passed_over(tmp_path):
    strace = shutil.which("strace")
    if not strace:
        pytest.skip("strace injects the errors")
    prefix = (
        strace,
        "-f",
        "-o",
        "/dev/null",
        "-e",
        "trace=accept4",
        "-e",
        "inject=accept4:error=EPROTO:when=1+2",
    )
    with Served(tmp_path / "log", prefix=prefix) as server:
        for _ in range(5):
            with server.connect() as connection:
                assert exchange(connection, b"x") == b"x"
        os.kill(int(subprocess.check_output(["pgrep", "-P", str(server.pid)]).split()[0]), signal.SIGTERM)
        assert server.process.wait(PATIENCE) == 0


def test_bad_options_name_the_value():
    with listen() as listener:
        with pytest.raises(ValueError, match="max_children must be an integer from 1 to .*, not 0"):
            ForkServer(listener, None, max_children=0)
        with pytest.raises(ValueError, match="idle_timeout must be None or a number of seconds >= 0, not -1"):
            ForkServer(listener, None, idle_timeout=-1)
        with pytest.raises(OSError, match="in use") as caught:
            listen(*listener.getsockname())
        assert caught.value.errno == errno.EADDRINUSE


def test_the_example(tmp_path):
    script = Path(__file__).parent.parent / "examples" / "echo_server.py"
    with subprocess.Popen(
        [sys.executable, script, "0", "log"], cwd=tmp_path, stdout=subprocess.PIPE, text=True
    ) as server:
        port = int(server.stdout.readline().rsplit(":", 1)[1])
        with connect(("127.0.0.1", port)) as connection:
            assert exchange(connection, b"hello\n") == b"hello\n"
        eventually(lambda: (tmp_path / "log").read_bytes() == b"hello\n")
        server.terminate()
        assert server.wait(PATIENCE) == 0
        assert "connections=1, open=0, echoes=1, bytes=6" in server.stdout.read()
