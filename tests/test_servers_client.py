import contextlib
import errno
import fcntl
import os
import pty
import select
import signal
import socket
import struct
import subprocess
import sys
import termios

import procfs
import pytest
from conftest import PATIENCE, eventually
from serving import BENCH, Served, wait_gone, wait_stopped

from ipckit.servers import client

CLIENT = [sys.executable, "-m", "ipckit", "client"]


def run_client(address, text):
    """The client with *text* on standard input: status, output, errors."""
    done = subprocess.run(
        [*CLIENT, address[0], str(address[1])], input=text, capture_output=True, timeout=PATIENCE
    )
    return done.returncode, done.stdout, done.stderr.decode()


@pytest.fixture
def server(tmp_path):
    with Served(tmp_path / "log") as served:
        yield served


def test_input_from_a_file_comes_back_whole(server, tmp_path):
    text = b"".join(b"line %d\n" % number for number in range(20_000))
    (tmp_path / "input").write_bytes(text)
    with open(tmp_path / "input", "rb") as file:
        done = subprocess.run(
            [*CLIENT, *map(str, server.address)], stdin=file, capture_output=True, timeout=PATIENCE
        )
    assert (done.returncode, done.stderr) == (0, b"")
    assert done.stdout == text


def test_binary_input_and_a_last_line_without_its_end(server):
    text = os.urandom(300_000).replace(b"\n", b"x") + b"\n\0\xff\nend"
    assert run_client(server.address, text) == (0, text, "")


@pytest.mark.parametrize("quit", [b"q\nnever sent\n", b"Q\nnever sent\n", b" Q\r\nnever sent\n", b"q"])
def test_q_ends_the_sending_and_the_answer_still_comes(server, quit):
    assert run_client(server.address, b"one\ntwo\n" + quit) == (0, b"one\ntwo\n", "")


def test_against_the_c_server(tmp_path):
    command = [BENCH / "fork_server", "0", tmp_path / "log"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        host, port = process.stdout.readline().split()[-1].split(":")
        text = b"one\n" + os.urandom(100_000).replace(b"\n", b"x") + b"\n"
        assert run_client((host, port), text + b"q\n") == (0, text, "")
        process.terminate()
    assert (tmp_path / "log").read_bytes() == text


def test_no_input_at_all(server):
    assert run_client(server.address, b"") == (0, b"", "")


def test_typed_at_a_terminal_each_line_comes_back_at_once(server):
    keyboard, terminal = pty.openpty()
    client = subprocess.Popen([*CLIENT, *map(str, server.address)], stdin=terminal, stdout=subprocess.PIPE)
    os.close(terminal)
    try:
        for line in (b"hello\n", b"again\n"):
            os.write(keyboard, line)
            assert select.select([client.stdout], [], [], PATIENCE)[0], "nothing came back"
            assert os.read(client.stdout.fileno(), 100) == line
        os.write(keyboard, b"q\n")
        assert client.wait(PATIENCE) == 0
    finally:
        client.kill()
        client.wait()
        client.stdout.close()
        os.close(keyboard)


def server_with(behaviour):
    """A listener, and in a forked child one connection handled by *behaviour*."""
    listener = socket.create_server(("127.0.0.1", 0))

    def serve(ready):
        ready()
        connection, _ = listener.accept()
        with connection:
            behaviour(connection)

    return listener, serve


def test_when_the_server_closes_first_the_keyboard_process_goes_too(forked):
    listener, serve = server_with(lambda connection: connection.sendall(b"bye\n"))
    forked(serve).wait_ready()
    keyboard, held = os.pipe()  # nothing is ever typed
    client = subprocess.Popen(
        [*CLIENT, *map(str, listener.getsockname())],
        stdin=keyboard,
        stdout=subprocess.PIPE,
        start_new_session=True,
    )
    out, _ = client.communicate(timeout=PATIENCE)
    assert (client.returncode, out) == (0, b"bye\n")
    eventually(lambda: subprocess.run(["pgrep", "-s", str(client.pid)], capture_output=True).stdout == b"")
    for fd in (keyboard, held):
        os.close(fd)
    listener.close()


def test_the_answer_after_the_half_close_still_comes(forked):
    def answer_late(connection):
        got = b""
        while block := connection.recv(100):
            got += block
        connection.sendall(got[::-1])

    listener, serve = server_with(answer_late)
    forked(serve).wait_ready()
    assert run_client(listener.getsockname(), b"abc\nq\n") == (0, b"\ncba", "")
    listener.close()


def test_a_reset_is_one_line(forked):
    def reset(connection):
        connection.recv(1)
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\1\0\0\0\0\0\0\0")

    listener, serve = server_with(reset)
    forked(serve).wait_ready()
    status, out, errors = run_client(listener.getsockname(), b"x\n")
    listener.close()
    host, port = listener_name(errors)
    assert (status, out) == (1, b"")
    assert errors == f"Error: {host}:{port}: Connection reset by peer\n"


def listener_name(errors):
    return errors.split(": ")[1].rsplit(":", 1)


@pytest.mark.parametrize(
    ("text", "answer", "came_back"),
    [
        (b"one\ntwo\n", b"", "0 of 2"),
        (b"one\ntwo\n", b"on", "1 of 2"),
        (b"one\ntwo\n", b"one\n", "1 of 2"),
        (b"one\ntwo", b"one\n", "1 of 2"),
        (b"one", b"", "0 of 1"),
        (b"one\n", b"one\n", None),
        (b"GET a long key\nGET another one\n", b"1\n2\n", None),
        (b"first of\nits lines\n", b"the only line of an answer, but a longer one\n", None),
        (b"", b"", None),
    ],
)
def test_a_server_that_closes_before_it_has_answered(forked, text, answer, came_back):
    def cut(connection):
        got = b""
        while len(got) < len(text):
            got += connection.recv(100)
        connection.sendall(answer)

    listener, serve = server_with(cut)
    forked(serve).wait_ready()
    status, out, errors = run_client(listener.getsockname(), text)
    host, port = listener.getsockname()
    listener.close()
    assert out == answer
    if came_back is None:
        assert (status, errors) == (0, "")
    else:
        assert (status, errors) == (
            1,
            f"Error: {host}:{port}: closed by the server when {came_back} lines had come back\n",
        )


def keyboard_process(client):
    (child,) = subprocess.check_output(["pgrep", "-P", str(client.pid)]).split()
    return int(child)


def unread(pipe):
    """Bytes in a pipe."""
    return struct.unpack("i", fcntl.ioctl(pipe, termios.FIONREAD, b"1234"))[0]


@pytest.mark.parametrize("before", [b"", b"x\n"])
def test_a_server_that_is_killed_is_one_line_and_status_1(server, before):
    keyboard, held = os.pipe()
    client = subprocess.Popen(
        [*CLIENT, *map(str, server.address)], stdin=keyboard, stdout=subprocess.PIPE, stderr=subprocess.PIPE
    )
    if before:
        os.write(held, before)
        assert client.stdout.readline() == before
    eventually(server.workers)
    (worker,) = server.workers()
    os.kill(worker, signal.SIGSTOP)
    wait_stopped(worker)
    os.write(held, b"never answered\n")
    eventually(lambda: unread(keyboard) == 0 and procfs.asleep(keyboard_process(client)))
    os.kill(worker, signal.SIGKILL)
    _, errors = client.communicate(timeout=PATIENCE)
    assert client.returncode == 1
    assert errors.count(b"\n") == 1 and errors.startswith(b"Error: 127.0.0.1:")
    for fd in (keyboard, held):
        os.close(fd)


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM])
def test_no_keyboard_process_is_left_by_a_client_that_is_killed(server, number):
    keyboard, held = os.pipe()
    client = subprocess.Popen([*CLIENT, *map(str, server.address)], stdin=keyboard, stdout=subprocess.PIPE)
    os.write(held, b"x\n")
    assert client.stdout.readline() == b"x\n"
    child = keyboard_process(client)
    client.send_signal(number)
    assert client.wait(PATIENCE) == -number
    wait_gone([child])
    client.stdout.close()
    for fd in (keyboard, held):
        os.close(fd)


def test_a_unix_socket(tmp_path):
    path = tmp_path / "socket"
    with Served(tmp_path / "log", "--unix", path):
        done = subprocess.run([*CLIENT, "--unix", path], input=b"x\n", capture_output=True, timeout=PATIENCE)
        assert (done.returncode, done.stdout, done.stderr) == (0, b"x\n", b"")
    done = subprocess.run(
        [*CLIENT, "-u", tmp_path / "no"], input=b"x\n", capture_output=True, timeout=PATIENCE
    )
    told = f"Error: {tmp_path}/no: No such file or directory\n".encode()
    assert (done.returncode, done.stdout, done.stderr) == (1, b"", told)


@pytest.mark.parametrize("where", ["{0}:{1}", "{0} {1}", "localhost:{1}", "localhost {1}"])
def test_the_ways_to_name_a_server(server, where):
    words = where.format(*server.address).split()
    done = subprocess.run([*CLIENT, *words], input=b"x\n", capture_output=True, timeout=PATIENCE)
    assert (done.returncode, done.stdout, done.stderr) == (0, b"x\n", b"")


@pytest.mark.parametrize(
    "where", [(), ("127.0.0.1",), ("127.0.0.1:0",), ("127.0.0.1", "1", "2"), ("127.0.0.1:1", "-u", "x")]
)
def test_what_names_no_server_is_one_line_and_status_2(where):
    done = subprocess.run([*CLIENT, *where], input="", capture_output=True, text=True, timeout=PATIENCE)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith("Error: name the server as HOST:PORT") and done.stderr.count("\n") == 1


def test_nobody_there_is_one_line():
    with socket.socket() as taken:  # so that no other test gets it meanwhile; but nobody listens
        taken.bind(("127.0.0.1", 0))
        port = taken.getsockname()[1]
        refused = f"Error: 127.0.0.1:{port}: Connection refused\n"
        assert run_client(("127.0.0.1", port), b"x\n") == (1, b"", refused)


def test_ctrl_c_ends_both_processes(server):
    keyboard, held = os.pipe()
    client = subprocess.Popen(
        [*CLIENT, *map(str, server.address)],
        stdin=keyboard, stdout=subprocess.PIPE, stderr=subprocess.PIPE, start_new_session=True,
    )  # fmt: skip
    os.write(held, b"x\n")
    assert client.stdout.readline() == b"x\n"
    os.killpg(client.pid, signal.SIGINT)
    out, errors = client.communicate(timeout=PATIENCE)
    assert (client.returncode, out, errors) == (130, b"", b"")
    for fd in (keyboard, held):
        os.close(fd)


def test_a_reader_that_goes_away_is_one_line(server):
    client = subprocess.Popen(
        [*CLIENT, *map(str, server.address)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )
    client.stdout.close()
    client.stdin.write(b"x\n")
    client.stdin.flush()
    assert client.wait(PATIENCE) == 1
    assert client.stderr.read().decode().count("\n") == 1
    client.stdin.close()
    client.stderr.close()


def test_killing_the_keyboard_process_half_closes(server):
    keyboard, held = os.pipe()
    client = subprocess.Popen([*CLIENT, *map(str, server.address)], stdin=keyboard, stdout=subprocess.PIPE)
    os.write(held, b"x\n")
    assert client.stdout.readline() == b"x\n"
    os.kill(keyboard_process(client), signal.SIGKILL)
    assert client.wait(PATIENCE) == 0
    client.stdout.close()
    for fd in (keyboard, held):
        os.close(fd)


def test_a_server_that_takes_no_connection_is_named():
    with socket.socket() as listener, contextlib.ExitStack() as held:
        listener.bind(("127.0.0.1", 0))
        listener.listen(0)
        host, port = listener.getsockname()
        for _ in range(3):  # more than the backlog holds
            waiting = held.enter_context(socket.socket())
            waiting.setblocking(False)
            waiting.connect_ex((host, port))
        with pytest.raises(TimeoutError, match=f"connect to {host}:{port}") as caught:
            client.run(host, port, timeout=0.05)
        assert caught.value.errno == errno.ETIMEDOUT
