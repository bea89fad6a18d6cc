"""The C programs of bench/c, built by `make cbench`, and a smoke run of bench_server.py."""

import json
import os
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
    return subprocess.run(command, capture_output=True, timeout=PATIENCE * 2, **options)


class Server:
    """build/bench/fork_server on a port of its own, in a session of its own."""

    def __init__(self, log):
        self.log = log
        self.process = subprocess.Popen(
            [PROGRAMS / "fork_server", "0", log], stdout=subprocess.PIPE, start_new_session=True
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
    server = Server(tmp_path / "echomsg.txt")
    yield server
    server.close()


def test_what_the_client_sends_is_echoed_and_logged(server):
    sent = os.urandom(3_000_000)
    done = run("echo_client", "127.0.0.1", server.port, input=sent)
    assert (done.returncode, done.stderr) == (0, b"")
    assert done.stdout == sent
    assert server.stop() == 0
    assert server.log.read_bytes() == sent


def test_an_empty_input(server):
    done = run("echo_client", "localhost", server.port, input=b"")
    assert (done.returncode, done.stdout, done.stderr) == (0, b"", b"")
    assert server.stop() == 0
    assert server.log.read_bytes() == b""


def test_clients_at_once_and_no_zombies(server):
    connections = [server.connect() for _ in range(50)]
    for number, connection in enumerate(connections):
        connection.sendall(b"%04d" % number * 1000)
    for number, connection in enumerate(connections):
        assert connection.recv(4000, socket.MSG_WAITALL) == b"%04d" % number * 1000
        connection.close()
    eventually(lambda: len(server.children()) == 1, PATIENCE)  # the logger
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


@pytest.mark.parametrize(
    "mode, options",
    [
        ("connections", ()),
        ("connections", ("--size", 9000, "--connections", 3)),
        ("echoes", ()),
        ("echoes", ("--size", 1, "--connections", 1)),
        ("echoes", ("--size", 1_048_576, "--connections", 2)),
    ],
)
def test_load_without_errors_is_logged_to_the_byte(server, mode, options):
    done = run("load", mode, "127.0.0.1", server.port, "--seconds", 0.3, *options, text=True)
    assert (done.returncode, done.stderr) == (0, "")
    result = json.loads(done.stdout)
    chosen = {"--size": 64, "--connections": 16, **dict(zip(options[::2], options[1::2], strict=True))}
    assert (result["mode"], result["errors"]) == (mode, 0)
    assert (result["size"], result["connections"]) == (chosen["--size"], chosen["--connections"])
    assert result["count"] > 0 and result["rate"] == pytest.approx(result["count"] / 0.3, abs=0.1)
    assert 0 < result["p50_us"] <= result["p99_us"]
    assert result["bytes"] >= result["count"] * result["size"]
    assert server.stop() == 0
    assert server.log.stat().st_size == result["bytes"]


def liar(ready, listener, change):
    """A server whose answers are not what it got."""
    ready()
    while True:
        connection, _ = listener.accept()
        with connection:
            connection.sendall(change(connection.recv(100)))


@pytest.mark.parametrize("mode", ["connections", "echoes"])
@pytest.mark.parametrize(
    "change, complaint",
    [
        (lambda got: got[:-1] + b"!", "what came back is not what was sent"),
        (lambda got: got + b"x", "more came back than was sent"),
        (lambda got: got[:-1], "the server closed before it had echoed everything"),
    ],
)
def test_load_notices_a_wrong_answer(forked, mode, change, complaint):
    with socket.create_server(("127.0.0.1", 0)) as listener:
        forked(liar, listener, change).wait_ready()
        port = listener.getsockname()[1]
        done = run("load", mode, "127.0.0.1", port, "--connections", 1, "--seconds", 30, text=True)
    assert done.returncode == 1
    assert done.stderr.splitlines()[0] == f"load: recv: {complaint}"
    assert json.loads(done.stdout)["errors"] >= 100, "it gives up before its time is over"


def free_port():
    with socket.create_server(("127.0.0.1", 0)) as listener:
        return listener.getsockname()[1]


def test_nobody_listens():
    port = free_port()
    done = run("load", "connections", "127.0.0.1", port, "--seconds", 30, text=True)
    assert done.returncode == 1
    assert "Connection refused" in done.stderr
    done = run("echo_client", "127.0.0.1", port, input="", text=True)
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
        (["fork_server", ""], "not ''"),
        (["fork_server", "80x"], "not '80x'"),
        (["fork_server", "0", "log", "more"], "usage: fork_server"),
        (["echo_client", "127.0.0.1"], "usage: echo_client HOST PORT"),
        (["echo_client", "127.0.0.1", "no-such-service"], "127.0.0.1 port no-such-service:"),
        (["load"], "usage: load"),
        (["load", "floods", "127.0.0.1", "80"], "usage: load"),
        (["load", "echoes", "127.0.0.1", "80", "--rate", "1"], "usage: load"),
        (["load", "echoes", "192.0.2.1", "80"], "'192.0.2.1' is not a loopback address"),
        (["load", "echoes", "2001:db8::1", "80"], "'2001:db8::1' is not a loopback address"),
        (["load", "echoes", "example.org", "80"], "'example.org' is not a loopback address"),
        (["load", "echoes", "127.0.0.1", "0"], "PORT must be 1 to 65535, not '0'"),
        (["load", "echoes", "::1", "80", "--size", "0"], "--size must be 1 to 1048576, not '0'"),
        (["load", "echoes", "::1", "80", "--seconds", "nan"], "--seconds must be 0.01 to 3600, not 'nan'"),
        (["load", "echoes", "::1", "80", "--connections", "10001"], "must be 1 to 10000, not '10001'"),
    ],
)
def test_bad_arguments_are_refused(arguments, complaint, tmp_path):
    done = run(*arguments, text=True, cwd=tmp_path)
    assert done.returncode == 2
    assert complaint in done.stderr
    assert not list(tmp_path.iterdir())


def test_a_quick_run_of_bench_server_prints_the_table():
    done = subprocess.run(
        [sys.executable, ROOT / "bench" / "bench_server.py", "--quick"], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    rows = {line[:30].strip(): line[30:].split() for line in done.stdout.splitlines()}
    assert rows["C, fork"][1::2][:2] == ["1.00", "1.00"]
    assert rows["C, fork"][-1] == "complete"
    assert float(rows["socketserver.ForkingTCPServer"][3]) > 0
    assert "ipckit, fork" in rows
    for target in ("connections/s: target 0.5 x C", "echoes/s: target 0.95 x C"):
        assert target in done.stdout


def command_of(pid):
    try:
        return Path(f"/proc/{pid}/cmdline").read_bytes()
    except (FileNotFoundError, ProcessLookupError):
        return b""


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
        loads = Path(f"/proc/{bench.pid}/task/{bench.pid}/children")
        eventually(lambda: any(b"bench/load" in command_of(pid) for pid in loads.read_text().split()))
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
