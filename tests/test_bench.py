"""The C programs of bench/c, built by `make cbench`, and a smoke run of bench_server.py."""

import contextlib
import csv
import os
import re
import select
import signal
import socket
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import PATIENCE, children, eventually

ROOT = Path(__file__).resolve().parent.parent
PROGRAMS = ROOT / "build" / "bench"


def run(program, *arguments, **options):
    command = [PROGRAMS / program, *map(str, arguments)]
    return subprocess.run(command, capture_output=True, timeout=PATIENCE, **options)


class Server:
    """One of build/bench on a port of its own, in a session of its own."""

    def __init__(self, program, log):
        self.log = log
        self.process = subprocess.Popen(
            [PROGRAMS / program, "0", log], stdout=subprocess.PIPE, start_new_session=True
        )
        line = self.process.stdout.readline()
        assert line.startswith(b"listening on 127.0.0.1:")
        self.port = int(line.rpartition(b":")[2])

    def connect(self):
        return socket.create_connection(("127.0.0.1", self.port), timeout=PATIENCE)

    def children(self):
        task = Path(f"/proc/{self.process.pid}/task/{self.process.pid}/children")
        return [int(pid) for pid in task.read_text().split()]

    def stop(self, signum=signal.SIGTERM):
        """Its exit code; the log is complete then."""
        self.process.send_signal(signum)
        return self.process.wait(PATIENCE)

    def close(self):
        if self.process.returncode is None:
            os.killpg(self.process.pid, signal.SIGKILL)
            self.process.wait()
        self.process.stdout.close()


@pytest.fixture
def server(tmp_path):
    server = Server("fork_server", tmp_path / "echomsg.txt")
    yield server
    server.close()


@pytest.fixture(params=["fork_server", "epoll_server"])
def either_server(request, tmp_path):
    server = Server(request.param, tmp_path / "echomsg.txt")
    yield server
    server.close()


def test_what_the_client_sends_is_echoed_and_logged(either_server):
    server = either_server
    sent = os.urandom(3_000_000)
    done = run("echo_client", "127.0.0.1", server.port, input=sent)
    assert (done.returncode, done.stderr) == (0, b"")
    assert done.stdout == sent
    assert server.stop() == 0
    assert server.log.read_bytes() == sent


def test_an_empty_input(either_server):
    server = either_server
    done = run("echo_client", "localhost", server.port, input=b"")
    assert (done.returncode, done.stdout, done.stderr) == (0, b"", b"")
    assert server.stop() == 0
    assert server.log.read_bytes() == b""


def test_clients_at_once_and_no_zombies(either_server):
    server = either_server
    connections = [server.connect() for _ in range(50)]
    for number, connection in enumerate(connections):
        connection.sendall(b"%04d" % number * 1000)
    for number, connection in enumerate(connections):
        assert connection.recv(4000, socket.MSG_WAITALL) == b"%04d" % number * 1000
        connection.close()
    eventually(lambda: len(server.children()) == 1)  # the logger
    assert server.stop() == 0
    logged = server.log.read_bytes()
    blocks = {logged[start : start + 4000] for start in range(0, len(logged), 4000)}
    assert blocks == {b"%04d" % number * 1000 for number in range(50)}, "no message split by another"


def test_a_killed_worker_harms_nobody_else(server):
    with server.connect() as victim, server.connect() as other:
        victim.sendall(b"one")
        assert victim.recv(10) == b"one"
        other.sendall(b"two")
        assert other.recv(10) == b"two"
        worker = max(server.children())
        os.kill(worker, signal.SIGKILL)
        ends = select.select([victim, other], [], [], PATIENCE)[0]
        assert len(ends) == 1 and ends[0].recv(10) == b""
        (living,) = {victim, other} - {*ends}
        living.sendall(b"three")
        assert living.recv(10) == b"three"
    assert server.stop() == 0
    assert server.log.read_bytes() == b"onetwothree"


@pytest.mark.parametrize("signum", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_lets_living_connections_end(server, signum):
    with server.connect() as connection:
        connection.sendall(b"before")
        assert connection.recv(10) == b"before"
        os.killpg(server.process.pid, signum)  # as Ctrl-C does

        def refused():
            try:
                server.connect().close()
            except ConnectionResetError:  # it came into the queue just before
                return False
            except ConnectionRefusedError:
                return True

        eventually(refused)
        connection.sendall(b"after")
        assert connection.recv(10) == b"after"
        assert server.process.poll() is None
    assert server.process.wait(PATIENCE) == 0
    assert server.log.read_bytes() == b"beforeafter"


def test_a_port_in_use_and_a_log_that_can_not_be_opened(server, tmp_path):
    done = run("fork_server", server.port, tmp_path / "other", text=True)
    assert (done.returncode, done.stderr) == (1, "bind: Address already in use\n")
    done = run("fork_server", 0, tmp_path, text=True)
    assert (done.returncode, done.stderr) == (1, f"{tmp_path}: Is a directory\n")


def test_nobody_listens():
    with socket.socket() as taken:  # so that no other test gets it meanwhile
        taken.bind(("127.0.0.1", 0))
        done = run("echo_client", "127.0.0.1", taken.getsockname()[1], input="", text=True)
    assert (done.returncode, done.stderr) == (1, "connect: Connection refused\n")


def close_at_once(ready, listener):
    ready()
    connection, _ = listener.accept()
    connection.shutdown(socket.SHUT_WR)
    while connection.recv(65536):
        pass


def test_the_client_reports_a_server_that_closes_early(forked):
    reader, writer = os.pipe()
    with socket.create_server(("127.0.0.1", 0)) as listener:
        forked(close_at_once, listener).wait_ready()
        done = run("echo_client", "127.0.0.1", listener.getsockname()[1], stdin=reader, text=True)
    os.close(reader)
    os.close(writer)
    assert done.returncode == 1
    assert done.stderr == "echo_client: the server closed before it had everything\n"


@pytest.mark.parametrize(
    "arguments, complaint",
    [
        (["fork_server", "65536"], "port must be 0 to 65535, not '65536'"),
        (["fork_server", "-1"], "not '-1'"),
        (["epoll_server", "65536"], "epoll_server: port must be 0 to 65535, not '65536'"),
        (["epoll_server", "0", "log", "more"], "usage: epoll_server"),
        (["fork_server", ""], "not ''"),
        (["fork_server", "80x"], "not '80x'"),
        (["fork_server", "0", "log", "more"], "usage: fork_server"),
        (["echo_client", "127.0.0.1"], "usage: echo_client HOST PORT"),
        (["echo_client", "127.0.0.1", "no-such-service"], "127.0.0.1 port no-such-service:"),
    ],
)
def test_bad_arguments_are_refused(arguments, complaint, tmp_path):
    done = run(*arguments, text=True, cwd=tmp_path)
    assert done.returncode == 2
    assert complaint in done.stderr
    assert not list(tmp_path.iterdir())


def bench_server(*options):
    command = [sys.executable, ROOT / "bench" / "bench_server.py", "--quick", *options]
    return subprocess.run(command, capture_output=True, text=True)


@pytest.mark.slow
@pytest.mark.serial
def test_a_quick_run_of_bench_server_prints_the_table(tmp_path):
    done = bench_server("--csv", tmp_path / "figures.csv")
    assert done.returncode == 0, done.stderr
    rows = {line[:32].strip(): line[32:].split() for line in done.stdout.splitlines()}
    assert rows["C, fork"][1::2][:2] == ["1.00", "1.00"]
    for name, row in rows.items():
        if "uvloop" in name and row[4:5] == ["skipped:"]:
            assert row[5:] == ["uvloop", "is", "not", "installed"]
        elif name.startswith(("ipckit, ", "C, ", "asyncio", "uvloop", "socketserver")) and ":" not in name:
            assert float(row[1]) > 0 and float(row[3]) > 0, name
            assert row[4] in ("complete", "none"), name
    assert {"ipckit, fork", "C, epoll", "asyncio protocol, logged"} < rows.keys()
    assert "ipckit, fork, connections/s: target 0.5 x C, fork, median " in done.stdout
    with (tmp_path / "figures.csv").open() as file:
        figures = {(row["server"], row["mode"]): row for row in csv.DictReader(file)}
    assert float(figures["C, fork", "echoes"]["x_c"]) == 1
    assert int(figures["C, epoll", "connections"]["p50_us"]) > 0


@pytest.mark.slow
@pytest.mark.serial
def test_a_quick_run_of_the_growth_prints_the_table(tmp_path):
    done = bench_server("--growth", "--only", "C, epoll", "--csv", tmp_path / "figures.csv")
    assert done.returncode == 0, done.stderr
    assert "100 held: target at most 1.3 x the time of 10, median " in done.stdout
    # What malloc had before is used first, so few clients may seem to need nothing.
    assert re.search(r"memory of a silent connection: target under 2 KiB, -?\d+\.\d\d: ", done.stdout)
    with (tmp_path / "figures.csv").open() as file:
        assert [row["held"] for row in csv.DictReader(file)] == ["10", "100"]


def test_the_growth_of_a_server_that_is_not_there():
    done = bench_server("--growth", "--only", "nobody")
    assert done.returncode == 1
    assert done.stderr.startswith("there is no server 'nobody'; ours are fork")


def command_of(pid):
    try:
        return Path(f"/proc/{pid}/cmdline").read_bytes()
    except (FileNotFoundError, ProcessLookupError):
        return b""


def sockets_of(pid):
    folder = f"/proc/{pid}/fd"
    found = []
    for name in os.listdir(folder):
        with contextlib.suppress(FileNotFoundError):
            found += [name] * os.readlink(f"{folder}/{name}").startswith("socket:")
    return found


def commands_with(text):
    return [pid for pid in os.listdir("/proc") if pid.isdigit() and text in command_of(pid)]


def test_an_interrupted_bench_server_stops_everything(tmp_path):
    bench = subprocess.Popen(
        [sys.executable, ROOT / "bench" / "bench_server.py", "--seconds", "60"],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "TMPDIR": str(tmp_path)},
    )
    try:
        eventually(lambda: len(sockets_of(bench.pid)) >= 16)
        assert commands_with(bytes(tmp_path)), "a server runs under the load"
        bench.send_signal(signal.SIGINT)
        out, err = bench.communicate(timeout=PATIENCE)
    finally:
        bench.kill()
        bench.wait()
    assert bench.returncode == 0
    assert "interrupted; this is what was measured" in err
    assert "C, fork" in out
    assert not commands_with(bytes(tmp_path))
    assert not list(tmp_path.iterdir())
    assert not children()
