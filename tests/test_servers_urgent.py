import errno
import fcntl
import logging
import os
import random
import re
import resource
import runpy
import select
import signal
import socket
import struct
import subprocess
import sys
import termios
import time
from contextlib import suppress
from pathlib import Path

import pytest
from conftest import PATIENCE, eventually
from serving import NEVER, silent, wait_asleep, wait_stopped

from ipckit import sockets
from ipckit.servers.listening import listen
from ipckit.servers.urgent import VARIANTS, UrgentServer

STREAM = random.Random(1).randbytes(1 << 20)


class Server:
    """An UrgentServer in a process of its own."""

    def __init__(self, forked, variant, *, descriptors=None, stop_timeout=NEVER, **options):
        options.setdefault("idle_timeout", NEVER)
        self._listener = listen()
        self.address = self._listener.getsockname()

        def serve(ready):
            if descriptors:
                resource.setrlimit(resource.RLIMIT_NOFILE, (descriptors, descriptors))
            server = UrgentServer(self._listener, variant=variant, **options)
            logging.getLogger("ipckit").addHandler(logging.FileHandler("/dev/fd/2"))
            ready()
            server.serve(stop_timeout=stop_timeout)

        self.child = forked(serve)
        self.child.wait_ready()
        self._listener.close()

    def connect(self):
        """A connection that is served."""
        connection = socket.create_connection(self.address, timeout=PATIENCE)
        assert exchange(connection, b"hello") == b"hello"
        return connection

    def stop(self, signum=signal.SIGTERM):
        self.child.kill(signum)
        return self.child.wait()

    def stand_still(self):
        self.child.kill(signal.SIGSTOP)
        wait_stopped(self.child.pid)


@pytest.fixture(params=VARIANTS)
def variant(request):
    return request.param


@pytest.fixture
def server(forked, variant):
    served = Server(forked, variant)
    yield served
    assert served.stop() == 0


def exchange(connection, data):
    connection.sendall(data)
    return sockets.recv_exact(connection, len(data), timeout=PATIENCE)


def until_urgent(connection):
    """Read until the mark: the urgent byte, and what came before."""
    sockets.set_oobinline(connection, True)
    echo = b""
    while True:
        assert select.select([connection], [], [], PATIENCE)[0], "no urgent byte came"
        urgent = sockets.at_mark(connection)
        piece = sockets.recv(connection, 1 if urgent else 4096)
        assert piece, "end of file instead of an urgent byte"
        if urgent:
            return piece, echo
        echo += piece


def is_announced(connection):
    """Whether an urgent byte is here or on its way; without reading anything."""
    try:
        sockets.recv(connection, 1, socket.MSG_OOB | socket.MSG_PEEK | socket.MSG_DONTWAIT)
    except BlockingIOError:
        return True
    except OSError as error:
        assert error.errno == errno.EINVAL
        return False
    return True


def until_sent(connection):
    """Wait until the other side's kernel has all of it."""
    unsent = bytearray(4)
    eventually(lambda: fcntl.ioctl(connection, termios.TIOCOUTQ, unsent, True) == 0 and not any(unsent))


# --- the urgent byte -----------------------------------------------------------------------------


def test_each_urgent_byte_is_answered_and_the_stream_echoed(server):
    """A, B, 1!, C, D, 2!, E, F, by a client that takes each answer."""
    with server.connect() as connection:
        assert exchange(connection, b"AB") == b"AB"
        sockets.send_urgent(connection, b"1")
        assert until_urgent(connection) == (b"1", b"")
        assert exchange(connection, b"CD") == b"CD"
        sockets.send_urgent(connection, b"2")
        connection.sendall(b"EF")
        answer, before = until_urgent(connection)
        assert answer == b"2"
        assert before + sockets.recv_exact(connection, 2 - len(before), timeout=PATIENCE) == b"EF"


def sequence(server, connection, *items):
    """Send *items* so that the server sees them all at once."""
    server.stand_still()
    for item in items:
        if item.endswith(b"!"):
            sockets.send_urgent(connection, item[:1])
        else:
            connection.sendall(item)
    until_sent(connection)
    server.child.kill(signal.SIGCONT)


def test_an_older_urgent_byte_falls_into_the_stream(server):
    with server.connect() as connection:
        sequence(server, connection, b"A", b"B", b"1!", b"C", b"D", b"2!", b"E", b"F")
        answer, before = until_urgent(connection)
        assert answer == b"2"
        assert before + sockets.recv_exact(connection, 7 - len(before), timeout=PATIENCE) == b"AB1CDEF"
        assert exchange(connection, b"end") == b"end"


def test_the_answer_comes_before_all_of_the_echo_that_is_still_to_be_given(server):
    """Told of the urgent byte, the server echoes nothing of what it reads on the way to it."""
    with server.connect() as connection:
        sequence(server, connection, STREAM[:60_000], b"?!")
        assert until_urgent(connection) == (b"?", b"")
        assert sockets.recv_exact(connection, 60_000, timeout=PATIENCE) == STREAM[:60_000]


def test_also_if_nothing_stands_before_it(server):
    with server.connect() as connection:
        sequence(server, connection, b"1!", b"2!")
        answer, before = until_urgent(connection)
        assert answer == b"2"
        connection.sendall(b"end")
        assert before + sockets.recv_exact(connection, 4 - len(before), timeout=PATIENCE) == b"1end"


def test_the_answer_comes_before_a_stream_that_nobody_reads(server):
    with server.connect() as connection:
        connection.sendall(STREAM)
        until_sent(connection)  # and the echo fills all that is between the server and us
        sockets.send_urgent(connection, b"?")
        eventually(lambda: is_announced(connection))  # not a byte of the echo has been read
        answer, before = until_urgent(connection)
        assert answer == b"?"
        assert len(before) < len(STREAM) / 4
        assert before + sockets.recv_exact(connection, len(STREAM) - len(before), timeout=PATIENCE) == STREAM


def test_one_that_came_before_it_was_accepted(forked, variant):
    """Before F_SETOWN, so without a signal."""
    server = Server(forked, variant)
    server.stand_still()
    with socket.create_connection(server.address, timeout=PATIENCE) as connection:
        sockets.send_urgent(connection, b"!")
        until_sent(connection)
        server.child.kill(signal.SIGCONT)
        assert until_urgent(connection) == (b"!", b"")
        assert exchange(connection, b"end") == b"end"
    assert server.stop() == 0


def converse(connection, seed, rounds):
    """Data and urgent bytes at random, of the same bytes: nothing is taken for the other, nothing lost."""
    randomly = random.Random(seed)
    echo, sent = b"", b""
    for _ in range(rounds):
        for size in (randomly.choice((0, 0, 1, 2, 5000)), -1, randomly.choice((0, 0, 1, 3))):
            data = b"!" * randomly.randrange(size + 1) if size > 1 else b"!" * size
            if size < 0:
                sockets.send_urgent(connection, b"!")
            elif data:
                connection.sendall(data)
                sent += data
        answer, before = until_urgent(connection)
        assert answer == b"!"
        echo += before
        assert len(echo) <= len(sent)
    echo += sockets.recv_exact(connection, len(sent) - len(echo), timeout=PATIENCE)
    assert echo == sent
    connection.shutdown(socket.SHUT_WR)
    assert connection.recv(1) == b""


@pytest.mark.parametrize("rounds", [200, pytest.param(1500, marks=pytest.mark.slow)])
def test_urgent_bytes_and_data_are_never_mistaken(server, rounds):
    with server.connect() as connection:
        converse(connection, seed=3, rounds=rounds)


@pytest.mark.parametrize("count", [15, pytest.param(50, marks=pytest.mark.slow)])
def test_many_connections_at_once(server, forked, count):
    def client(ready, seed):
        with server.connect() as connection:
            ready()
            os.read(gate, 1)
            converse(connection, seed, rounds=20)

    gate, opener = os.pipe()
    clients = [forked(client, seed) for seed in range(count)]
    for child in clients:
        child.wait_ready()  # all connected and served
    os.write(opener, b"." * len(clients))
    assert [child.wait() for child in clients] == [0] * len(clients)
    os.close(gate)
    os.close(opener)


# --- what any server promises --------------------------------------------------------------------


def test_half_close_gets_the_whole_answer(server):
    with server.connect() as connection:
        connection.sendall(STREAM)
        sockets.send_urgent(connection, b"?")
        connection.shutdown(socket.SHUT_WR)
        answer, before = until_urgent(connection)
        rest = sockets.recv_exact(connection, len(STREAM) - len(before), timeout=PATIENCE)
        assert (answer, before + rest) == (b"?", STREAM)
        assert connection.recv(1) == b""


def test_a_reset_costs_only_itself(server):
    with server.connect() as other:
        before = len(os.listdir(f"/proc/{server.child.pid}/fd"))
        for _ in range(20):
            connection = server.connect()
            connection.sendall(STREAM[:200_000])
            sockets.send_urgent(connection, b"?")
            connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            connection.close()
        assert exchange(other, b"still here") == b"still here"
        eventually(lambda: len(os.listdir(f"/proc/{server.child.pid}/fd")) == before)


def test_only_so_much_is_held_for_a_client_that_reads_nothing(server):
    """More than the server holds and the kernel's buffers take: the client has to wait; nothing is lost."""
    with server.connect() as connection:
        sent = bytearray()
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 65536)
        before = resident_kib(server.child.pid)
        connection.setblocking(False)
        while select.select([], [connection], [], 0)[1]:
            with suppress(BlockingIOError):
                sent += STREAM[: connection.send(STREAM)]
            if not select.select([], [connection], [], 0)[1]:
                wait_asleep(server.child.pid, seconds=0.01)  # it reads no more
            assert len(sent) < 64 << 20
        assert resident_kib(server.child.pid) - before < 48 << 10
        connection.settimeout(PATIENCE)
        assert sockets.recv_exact(connection, len(sent), timeout=PATIENCE) == sent
        assert exchange(connection, b"end") == b"end"


def resident_kib(pid):
    return int(re.search(r"VmRSS:\s+(\d+) kB", Path(f"/proc/{pid}/status").read_text())[1])


def test_silent_and_unreading_clients_are_closed_in_time(forked, variant):
    server = Server(forked, variant, idle_timeout=0.3)
    with server.connect() as silent, server.connect() as unreading:
        unreading.setblocking(False)
        with pytest.raises((ConnectionResetError, BrokenPipeError)):
            while True:
                select.select([], [unreading], [], PATIENCE)
                unreading.send(STREAM)
        assert silent.recv(1) == b"", "closed by the server"
    assert server.stop() == 0


def test_beyond_max_connections_the_next_one_waits(forked, variant):
    server = Server(forked, variant, max_connections=2)
    first, second = server.connect(), server.connect()
    with socket.create_connection(server.address, timeout=PATIENCE) as third:
        third.sendall(b"3")
        assert silent(third)
        first.close()
        assert third.recv(1) == b"3"
    second.close()
    assert server.stop() == 0


def test_out_of_descriptors_the_others_are_served(forked, variant, capfd):
    began = time.monotonic()
    server = Server(forked, variant, descriptors=40)
    clients = [socket.create_connection(server.address, timeout=PATIENCE) for _ in range(60)]
    for client in clients:
        client.sendall(b"x")
    served = select.select(clients, [], [], PATIENCE)[0]
    assert exchange(served[0], b"y")[-1:] in (b"x", b"y")
    assert silent(clients[-1]), "it waits"
    wait_asleep(server.child.pid)  # and nobody spins
    for client in clients[:-1]:
        client.close()
    assert clients[-1].recv(1) == b"x"
    clients[-1].close()
    assert server.stop() == 0
    said = [line for line in capfd.readouterr().err.splitlines() if "accept" in line]
    assert set(said) == {"accept: Too many open files; new connections wait"}
    assert len(said) <= 60 + time.monotonic() - began, "one for each that ended, one a second"


@pytest.mark.parametrize("signum", [signal.SIGTERM, signal.SIGINT])
def test_at_the_stop_what_has_come_is_answered(forked, variant, signum):
    server = Server(forked, variant)
    with server.connect() as connection, server.connect():
        sequence(server, connection, STREAM[:60_000], b"?!")
        server.child.kill(signum)
        answer, before = until_urgent(connection)
        rest = sockets.recv_exact(connection, 60_000 - len(before), timeout=PATIENCE)
        assert (answer, before + rest) == (b"?", STREAM[:60_000])
        assert connection.recv(1) == b""
        assert server.child.wait() == 0


def test_the_stop_waits_for_nobody_who_reads_nothing_longer_than_that(forked, variant):
    server = Server(forked, variant, stop_timeout=0.2)
    with server.connect() as connection:
        connection.sendall(STREAM)
        assert server.stop() == 0


def test_a_wait_costs_no_processor(server):
    with server.connect() as connection, server.connect():
        connection.sendall(STREAM)  # and the echo isn't read
        sockets.send_urgent(connection, b"?")
        eventually(lambda: is_announced(connection))
        wait_asleep(server.child.pid)


def test_its_signals_are_those_of_every_server(forked, variant, capfd):
    server = Server(forked, variant)
    said = ""

    def statistics():
        nonlocal said
        said += capfd.readouterr().err
        return re.search(
            r"statistics: model urgent, connections 2, open 1, echoes 3, bytes 11, .*done 1", said
        )

    with server.connect(), server.connect() as connection:
        sockets.send_urgent(connection, b"!")
        assert until_urgent(connection) == (b"!", b"")
        connection.shutdown(socket.SHUT_WR)
        assert connection.recv(1) == b""
        server.child.kill(signal.SIGHUP)  # there is no log to open again
        server.child.kill(signal.SIGUSR1)
        eventually(statistics)
    assert server.stop() == 0


def test_several_listeners(forked, variant):
    with listen() as one, listen() as other:
        child = forked(lambda ready: (ready(), UrgentServer([one, other], variant=variant).serve()))
        child.wait_ready()
        for listener in (one, other):
            with socket.create_connection(listener.getsockname(), timeout=PATIENCE) as connection:
                sockets.send_urgent(connection, b"!")
                assert until_urgent(connection) == (b"!", b"")
        child.kill(signal.SIGTERM)
        assert child.wait() == 0


# --- running it ----------------------------------------------------------------------------------


def test_options_out_of_range():
    with listen() as listener:
        with pytest.raises(ValueError, match="variant must be one of sigurg, pollpri, not 'poll'"):
            UrgentServer(listener, variant="poll")
        with pytest.raises(ValueError, match="max_connections must be an integer from 1 to .*, not 0"):
            UrgentServer(listener, max_connections=0)
        with pytest.raises(ValueError, match="idle_timeout must be None or more than 0 seconds, not 0"):
            UrgentServer(listener, idle_timeout=0)


def test_as_a_program(variant):
    command = [sys.executable, "-m", "ipckit.servers.urgent", "--variant", variant, "--port", "0"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        host, port = process.stdout.readline().split()[-1].split(":")
        with socket.create_connection((host, port), timeout=PATIENCE) as connection:
            assert exchange(connection, b"hello") == b"hello"
            sockets.send_urgent(connection, b"!")
            assert until_urgent(connection) == (b"!", b"")
        process.terminate()
        assert process.wait(PATIENCE) == 0


def test_the_example(capfd):
    runpy.run_path(str(Path(__file__).parents[1] / "examples" / "urgent_server.py"), run_name="__main__")
    assert capfd.readouterr().out.splitlines() == [
        line.format(variant)
        for variant in VARIANTS
        for line in (
            "{}: the answer is announced, and nothing of the echo is read",
            "{}: it is b'?', in the first quarter: True",
            "{}: then the rest of the 1048576 bytes",
            "{}: exited with 0",
        )
    ]
