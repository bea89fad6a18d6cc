"""The load generator on real servers: good ones, and small ones in children that do everything wrong."""

import contextlib
import json
import os
import resource
import select
import signal
import socket
import struct
import subprocess
import sys
import threading
import time
from functools import partial

import pytest
from conftest import PATIENCE, eventually
from serving import NEVER, Served, recv_exact

from ipckit import load as room
from ipckit.errors import Closed
from ipckit.load import Load
from ipckit.messagelog import records

# A busy machine may let more than its defaults pass.
run_load = partial(room.run_load, timeout=PATIENCE, grace=PATIENCE)

HELLO = 1  # the byte with which a long connection is opened


def serve(ready, listener, handle):
    """Each connection in a thread of this child: ``handle(connection, number)``."""

    def run(connection, number):
        with connection:
            handle(connection, number)

    ready()
    number = 0
    while True:
        connection, _ = listener.accept()
        threading.Thread(target=run, args=(connection, number), daemon=True).start()
        number += 1


def echo(connection, _number=0):
    while data := connection.recv(65536):
        connection.sendall(data)


@pytest.fixture
def serving(forked):
    """``address = serving(handle)``: such a server in a child."""

    def start(handle, backlog=128):
        with socket.create_server(("127.0.0.1", 0), backlog=backlog) as listener:
            forked(serve, listener, handle).wait_ready()
            return listener.getsockname()

    return start


def ipckit(*arguments, **options):
    command = [sys.executable, "-m", "ipckit", "load", *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, timeout=PATIENCE, **options)


# --- a good server --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "size, connections, messages",
    [(1, 3, 50), (64, 16, 20), (9000, 5, 5), (65536, 2, 3), (1 << 20, 4, 2), (16 << 20, 2, 1)],
)
def test_every_byte_that_is_echoed_is_in_the_log(tmp_path, size, connections, messages):
    with Served(tmp_path / "log") as server:
        report = run_load(
            server.address, connections=connections, size=size, messages=messages, duration=None
        )
        assert server.stop()[0] == 0
    assert (report.errors, report.first, report.unsent) == ({}, {}, 0)
    assert report.count == connections * messages
    assert report.bytes == connections * (messages * size + HELLO)
    assert (tmp_path / "log").stat().st_size == report.bytes
    assert report.rate == pytest.approx(report.count / report.seconds)
    figures = list(report.latency_us.values())
    assert figures[0] > 0 and figures == sorted(figures)


@pytest.mark.parametrize("size", [1, 64, 200_000])
def test_a_connection_for_each_message(tmp_path, size):
    with Served(tmp_path / "log", "--format", "record") as server:
        report = run_load(server.address, connections=3, size=size, messages=7, duration=None, reconnect=True)
        assert server.stop()[0] == 0
        assert (report.errors, report.count, report.bytes) == ({}, 21, 21 * size)
        peers = {record.peer.rpartition(":")[0] for record in records(tmp_path / "log")}
    assert peers == {f"127.0.0.{last}" for last in range(1, 17)}, "more ports than one address has"


def test_the_duration_ends_it_and_what_is_under_way_is_finished(tmp_path):
    with Served(tmp_path / "log") as server:
        report = run_load(server.address, connections=4, duration=0.3, warm_up=0.1)
        assert server.stop()[0] == 0
    assert report.errors == {}
    assert report.seconds == pytest.approx(0.3, abs=0.01)
    assert (tmp_path / "log").stat().st_size == report.bytes
    assert report.count < (report.bytes - 4) / 64, "neither the warm-up counts nor what ended too late"


def test_ipv6(tmp_path):
    with Served(tmp_path / "log", "--host", "::1") as server:
        report = run_load(server.address, messages=2, duration=None)
        assert server.stop()[0] == 0
    assert (report.errors, report.count) == ({}, 32)
    assert report.target == f"[::1]:{server.address[1]}"


def test_a_unix_socket_with_a_backlog_too_short(forked, tmp_path):
    """There connect() does not wait in line; the load does."""
    path = str(tmp_path / "socket")

    def slowly(connection, number):
        if number == 0:
            select.select([connection], [], [])
        echo(connection)

    with socket.create_server(path, family=socket.AF_UNIX, backlog=1) as listener:
        forked(serve, listener, slowly).wait_ready()
        report = run_load(path, connections=50, messages=2, duration=None, timeout=PATIENCE)
    assert (report.errors, report.count, report.target) == ({}, 100, path)


def test_idle_connections_say_one_byte_and_are_held(serving):
    counts = os.memfd_create("counts")
    os.ftruncate(counts, 10 * 8)

    def count(connection, number):
        while data := connection.recv(65536):
            had = struct.unpack("q", os.pread(counts, 8, number * 8))[0]
            os.pwrite(counts, struct.pack("q", had + len(data)), number * 8)
            connection.sendall(data)

    seen = []
    report = run_load(
        serving(count), connections=2, idle=8, messages=30, duration=None, rate=100, on_progress=seen.append
    )
    got = sorted(struct.unpack("10q", os.pread(counts, 80, 0)))
    os.close(counts)
    assert got == [1] * 8 + [HELLO + 30 * 64] * 2
    assert (report.errors, report.count, report.idle) == ({}, 60, 8)
    assert max(progress.open for progress in seen) == 10


# --- a bad server ---------------------------------------------------------------------------------


def after_hello(answer):
    """Echo the first byte, then one ``answer(connection, message)`` to a whole message of 64."""

    def handle(connection, _number):
        first = recv_exact(connection, HELLO)
        connection.sendall(first)
        if message := recv_exact(connection, 64):
            answer(connection, message)

    return handle


def wrong(connection, message):
    connection.sendall(message[:-1] + bytes([message[-1] ^ 1]))
    connection.recv(1)


def early(connection, message):
    connection.sendall(message[:10])


def too_much(connection, message):
    connection.sendall(message + b"x")
    connection.recv(1)


def silent(connection, message):
    connection.recv(1)


def reset(connection, message):
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))


BAD = [
    (wrong, "wrong byte", "after 64 bytes, within a message: 0x"),
    (early, "closed early", "after 11 bytes, within a message"),
    (too_much, "too much", ", within a message"),
    (silent, "timed out", "after 1 bytes, within a message"),
    (reset, "reset", "after 1 bytes, within a message: Connection reset by peer"),
]


@pytest.mark.parametrize("answer, kind, told", BAD, ids=[kind for _, kind, _ in BAD])
def test_what_a_bad_server_does_is_counted_under_its_kind(serving, answer, kind, told):
    timeout = 0.1 if kind == "timed out" else PATIENCE
    report = run_load(serving(after_hello(answer)), connections=2, messages=2, duration=None, timeout=timeout)
    if kind == "timed out":
        late = report.errors[kind] - 4  # greetings, which a busy machine may not answer in time
        assert late >= 0 and (late or told in report.first[kind])
        report.errors[kind] = 4
    else:
        assert told in report.first[kind]
    assert report.errors == {kind: 4}, report.first
    assert (report.count, report.latency_us) == (0, {})


def without_hello(answer):
    return lambda connection, _number: answer(connection, recv_exact(connection, 64))


@pytest.mark.parametrize("answer, kind, told", BAD, ids=[kind for _, kind, _ in BAD])
def test_also_with_a_connection_for_each_message(serving, answer, kind, told):
    timeout = 0.1 if kind == "timed out" else PATIENCE
    address = serving(without_hello(answer))
    report = run_load(address, connections=2, messages=2, duration=None, timeout=timeout, reconnect=True)
    assert report.errors == {kind: 4}, report.first
    assert report.count == 0


@pytest.fixture
def refusing():
    """An address at which nobody listens, and that nobody else gets."""
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        yield taken.getsockname()


@pytest.mark.parametrize("reconnect", [False, True])
def test_nobody_listens(refusing, reconnect):
    with pytest.raises(ConnectionRefusedError) as refused:
        run_load(refusing, connections=500, duration=NEVER, reconnect=reconnect)
    assert refused.value.filename == "127.0.0.1:{1}".format(*refusing)


def test_no_unix_socket_there(tmp_path):
    with pytest.raises(FileNotFoundError) as missing:
        run_load(str(tmp_path / "none"), duration=NEVER)
    assert missing.value.filename == str(tmp_path / "none")


def test_a_host_with_several_addresses(serving):
    """localhost is ::1 as well, where nobody listens."""
    _, port = serving(echo)
    with Load(("::1", port), connections=2, messages=3, duration=None) as load:
        load._addresses.append(("127.0.0.1", port))  # whatever this machine's localhost is
        eventually(load.step)
        report = load.report()
    assert (report.target, report.count, report.errors) == (f"127.0.0.1:{port}", 6, {})


def never_answers(connection, _number):
    select.select([], [], [], PATIENCE)


@pytest.mark.parametrize("ending", [{"duration": 0.3, "grace": 0.1}, {"messages": 1, "duration": None}])
def test_a_server_that_never_answers_takes_no_time_limit_for_each(serving, ending):
    one_by_one, timeout = 500, 0.7
    start = time.monotonic()
    report = run_load(serving(never_answers), connections=one_by_one, timeout=timeout, **ending)
    assert set(report.errors) == {"timed out"} and report.count == 0
    assert "while it was opened" in report.first["timed out"]
    assert time.monotonic() - start < PATIENCE < one_by_one * timeout


def test_the_duration_is_the_end_whatever_the_time_limit_is(serving):
    report = run_load(serving(never_answers), connections=3, duration=0.3, timeout=NEVER, grace=0.1)
    assert report.errors == {"timed out": 3}
    address = serving(after_hello(silent))
    for duration in (0.3, 3, PATIENCE):  # the greeting may take longer than the first
        report = run_load(address, connections=3, duration=duration, timeout=NEVER, grace=0.1)
        assert report.errors == {"timed out": 3}
        if "after 1 bytes, within a message" in report.first["timed out"]:
            break
    assert "after 1 bytes, within a message" in report.first["timed out"]


def test_connections_that_are_not_served_do_not_hold_up_those_that_are(serving):
    """As of an iterative server: one after the other."""
    turn = threading.Lock()

    def one_after_the_other(connection, number):
        with turn:
            echo(connection)

    report = run_load(serving(one_after_the_other), connections=2, duration=1.0, timeout=NEVER, grace=1.0)
    assert report.count > 0
    assert set(report.errors) <= {"timed out"}


def dies(limit):
    """Echo so many pieces, then break all connections and refuse new ones."""
    echoed = []

    def handle(connection, _number):
        while data := connection.recv(65536):
            connection.sendall(data)
            echoed.append(data)
            if len(echoed) == limit:
                os._exit(0)

    return handle


def test_a_server_that_dies_ends_a_load_without_a_duration(serving):
    report = run_load(serving(dies(20)), connections=2, messages=10**6, duration=None, timeout=2.0)
    assert "refused" in report.errors
    assert 0 < report.count < 20


def test_one_with_a_duration_goes_on_and_asks_each_tenth_of_a_second(serving):
    began = time.monotonic()
    report = run_load(serving(dies(20)), connections=2, duration=0.5)
    tenths = (time.monotonic() - began) / 0.1
    assert 2 <= report.errors["refused"] <= 2 * (1 + tenths)
    assert report.first["refused"].endswith("while it was opened: Connection refused")


def test_an_error_is_one_error_and_the_rest_goes_on(serving):
    def first_is_bad(connection, number):
        if number == 0:
            after_hello(wrong)(connection, number)
        else:
            echo(connection)

    report = run_load(serving(first_is_bad), connections=3, messages=20, duration=None)
    assert report.errors == {"wrong byte": 1}
    assert report.count == 3 * 20 - 1, "the message that came back wrong is lost, its connection goes on"


def test_a_byte_too_much_after_the_last_message_is_seen(serving):
    def one_more(connection, _number):
        connection.sendall(recv_exact(connection, HELLO))
        connection.sendall(recv_exact(connection, 64))
        assert connection.recv(1) == b""
        connection.sendall(b"x")

    report = run_load(serving(one_more), connections=1, messages=1, duration=None)
    assert report.errors == {"too much": 1}
    assert report.first["too much"].endswith("while it waited for the end of file")
    assert report.count == 1


# --- a service that does not echo -----------------------------------------------------------------


def counting(answer, close=False):
    """For each line *answer*; how many lines came stands in the file ``lines`` in memory."""
    lines = os.memfd_create("lines")
    os.ftruncate(lines, 8)
    lock = threading.Lock()

    def handle(connection, _number):
        with connection.makefile("rb") as requests:
            for _ in requests:
                with lock:
                    (had,) = struct.unpack("q", os.pread(lines, 8, 0))
                    os.pwrite(lines, struct.pack("q", had + 1), 0)
                connection.sendall(answer)
                if close:
                    return

    return handle, lines


def lines_of(file):
    (count,) = struct.unpack("q", os.pread(file, 8, 0))
    os.close(file)
    return count


PONG = b"+PONG " + bytes(range(256)) + b"\n"


def test_a_request_and_its_answer(serving):
    handle, lines = counting(PONG)
    report = run_load(
        serving(handle), send=b"PING\n", expect=PONG, connections=3, idle=2, messages=7, duration=None
    )
    assert (report.errors, report.count) == ({}, 21)
    assert (report.size, report.answer_size) == (5, len(PONG))
    assert lines_of(lines) == 21 + 5, "each connection is opened with one"
    assert report.bytes == (21 + 5) * len(PONG)


@pytest.mark.parametrize("close", [False, True])
def test_a_request_for_each_connection_whoever_closes_it(serving, close):
    handle, lines = counting(PONG, close)
    report = run_load(
        serving(handle), send=b"PING\n", expect=PONG, connections=3, messages=7, duration=None, reconnect=True
    )
    assert (report.errors, report.count, report.bytes) == ({}, 21, 21 * len(PONG))
    assert lines_of(lines) == 21


def test_what_is_sent_is_expected_back_unless_said(tmp_path):
    with Served(tmp_path / "log") as server:
        report = run_load(server.address, send=b"hello\n", connections=2, messages=3, duration=None)
        assert server.stop()[0] == 0
    assert (report.errors, report.count) == ({}, 6)
    assert (tmp_path / "log").read_bytes() == b"hello\n" * (6 + 2)


@pytest.mark.parametrize(
    ("answer", "kind", "told"),
    [
        (PONG[:-1] + b"!", "wrong byte", "after 262 bytes, while it was opened: 0x21 came back, not 0x0a"),
        (PONG + b"x", "too much", "while it was opened"),
        (PONG[:-1], "timed out", "after 262 bytes, while it was opened"),
    ],
)
def test_each_byte_of_an_answer_is_checked(serving, answer, kind, told):
    handle, lines = counting(answer)
    timeout = 0.2 if kind == "timed out" else PATIENCE
    report = run_load(serving(handle), send=b"x\n", expect=PONG, connections=1, duration=0.3, timeout=timeout)
    os.close(lines)
    assert set(report.errors) == {kind}
    assert report.first[kind].endswith(told)
    assert report.count == 0


# --- the schedule ---------------------------------------------------------------------------------


def test_the_rate_is_kept(tmp_path):
    with Served(tmp_path / "log") as server:
        report = run_load(server.address, connections=7, rate=500, duration=0.6)
        many = run_load(server.address, connections=7, rate=500, messages=10, duration=None, reconnect=True)
        assert server.stop()[0] == 0
    assert (report.errors, report.count + report.unsent) == ({}, 300), "all that were due, no other"
    assert report.scheduled_rate == 500
    assert (many.errors, many.count) == ({}, 70)
    assert many.seconds >= 69 / 500


def stalls_once(stall):
    """Echo; at the first byte after a fifth of a second everybody waits."""
    began = []
    over = threading.Event()

    def handle(connection, _number):
        while data := connection.recv(65536):
            if not began:
                began.append(time.monotonic())
            if len(began) == 1 and time.monotonic() - began[0] > 0.2:
                began.append(0)
                time.sleep(stall)
                over.set()
            if len(began) == 2:
                over.wait()
            connection.sendall(data)

    return handle


def test_a_stall_shows_on_a_schedule_and_hides_in_a_closed_loop(serving):
    with Load(serving(stalls_once(0.5)), connections=2, duration=None) as load:
        eventually(lambda: load.step(0.01) or load.report().latency_us.get("max", 0) >= 490_000)
        eventually(lambda: load.step(0.01) or load.progress().count > 100)
        closed = load.report()
    due = run_load(serving(stalls_once(0.5)), connections=2, messages=100, duration=None, rate=200)
    assert (due.errors, due.count, due.unsent) == ({}, 200, 0)
    assert due.latency_us["p90"] >= 200_000, "half of the messages were due during the stall"
    assert closed.latency_us["p90"] < due.latency_us["p90"], "of the others two at the most were under way"


def test_a_server_that_can_not_keep_up(serving):
    def slowly(connection, _number):
        while data := connection.recv(64):
            time.sleep(0.01)
            connection.sendall(data)

    address = serving(slowly)
    report = run_load(address, connections=1, duration=0.2, rate=1000)
    assert report.unsent >= 150, "there is time for 20"
    assert report.count + report.unsent == 200
    report = run_load(address, connections=1, messages=20, duration=None, rate=1000)
    assert report.latency_us["max"] >= 180_000, "the last one was due after 20 ms, and had its turn after 200"


def test_percentiles_are_within_a_percent(serving):
    """Four quick messages, then four that are each held for longer than the slowest of those: so that
    one is the median, and known exactly, because it was the worst while the others were held."""
    (arrived, has_arrived), (told, tell) = os.pipe(), os.pipe()

    def handle(connection, _number):
        connection.sendall(recv_exact(connection, HELLO))
        for number in range(8):
            data = recv_exact(connection, 64)
            if number >= 4:
                os.write(has_arrived, b".")
                os.read(told, 1)
            connection.sendall(data)

    with Load(serving(handle), connections=1, messages=8, duration=None) as load:
        eventually(lambda: load.step(0.01) or load.progress().count == 4)
        slowest = load.report().latency_us["max"]
        for _ in range(4):
            eventually(lambda: load.step(0.001) or select.select([arrived], [], [], 0)[0])
            os.read(arrived, 1)
            time.sleep(2 * slowest / 1e6)
            os.write(tell, b".")
        eventually(lambda: load.step(0.01))
        found = load.report().latency_us
    for fd in (arrived, has_arrived, told, tell):
        os.close(fd)
    assert slowest <= found["p50"] <= 1.01 * slowest
    assert 2 * slowest <= found["p90"] <= found["p99"] <= found["max"]


# --- limits, options ------------------------------------------------------------------------------


def limited(ready, address, soft, hard, told):
    resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
    ready()
    try:
        report = run_load(address, connections=1, idle=200, messages=1, duration=None)
        what = f"{report.errors} {report.count}"
    except OSError as error:
        what = f"{type(error).__name__} {error}"
    os.write(told, f"{what} {resource.getrlimit(resource.RLIMIT_NOFILE)}".encode())


@pytest.mark.parametrize(
    "limits, result",
    [
        ((64, 4096), "{} 1 (64, 4096)"),
        ((64, 100), "OSError [Errno 24] 201 connections need 2"),
    ],
)
def test_the_limit_of_descriptors_is_raised_or_named(forked, serving, limits, result):
    address = serving(echo)
    reader, writer = os.pipe()
    child = forked(limited, address, *limits, writer)
    assert child.wait() == 0
    told = os.read(reader, 1000).decode()
    os.close(reader)
    os.close(writer)
    assert told.startswith(result)
    assert told.endswith(str(limits)), "as it was before"
    if limits == (64, 100):
        assert "RLIMIT_NOFILE allows 100; raise it with: ulimit -Hn 2" in told


@pytest.mark.parametrize(
    "options, complaint",
    [
        ({"size": 0}, "size must be an integer from 1 to 16777216, not 0"),
        ({"size": (16 << 20) + 1}, "not 16777217"),
        ({"connections": 0}, "connections must be an integer from 1"),
        ({"messages": 0}, "messages must be an integer from 1"),
        ({"idle": -1}, "idle must be an integer from 0 to"),
        ({"duration": float("nan")}, "duration must be None or a number of seconds >= 0, not nan"),
        ({"rate": -1.0}, "rate must be"),
        ({"timeout": 0.0}, "timeout must be"),
        ({"grace": -1.0}, "grace must be"),
        ({"send": b""}, "send must be of 1 to 16777216 bytes, not 0"),
        ({"send": b"x", "expect": b""}, "expect must be of 1 to 16777216 bytes, not 0"),
        ({"expect": b"x"}, "expect must be the answer to send, which is missing"),
        ({"send": b"x", "size": 3}, "size must be left out with send, which has its own"),
    ],
)
def test_a_bad_option_is_named(options, complaint):
    with pytest.raises(ValueError, match="must be") as raised:
        Load(("127.0.0.1", 9), **options)
    assert complaint in str(raised.value)


@pytest.mark.parametrize("host", ["192.0.2.1", "2001:db8::1", "0.0.0.0"])
def test_only_loopback_unless_it_is_yours(host):
    with pytest.raises(ValueError, match="which is not this machine's loopback") as raised:
        Load((host, 9))
    assert repr(host) in str(raised.value)
    Load((host, 9), i_own_this_host=True).close()  # nothing is sent before the first step
    done = ipckit(host, 9)
    assert (done.returncode, done.stdout) == (2, "")
    assert "--i-own-this-host" in done.stderr.replace("\n", " ")


def test_a_path_too_long():
    with pytest.raises(OSError, match=r"File name too long.*xxx") as raised:
        Load("/tmp/" + "x" * 200)
    assert raised.value.errno == 36


def test_in_steps(serving):
    with Load(serving(echo), connections=2, duration=None) as load:
        assert load.progress().phase == "opening"
        eventually(lambda: load.step(0.01) or load.progress().count > 100)
        progress = load.progress()
        assert (progress.phase, progress.open, progress.errors) == ("running", 2, 0)
        assert progress.seconds > 0 and progress.bytes >= progress.count * 64
        assert "running" in repr(load)
        load.stop()
        eventually(lambda: load.step(0.01))
        report = load.report()
        assert load.progress().phase == "done" and load.progress().open == 0
    assert report.count >= progress.count and report.errors == {}
    assert "closed" in repr(load)
    load.close()
    for use in (load.step, load.stop, load.progress, load.report):
        with pytest.raises(Closed, match=r"the load on 127\.0\.0\.1:\d+ is closed"):
            use()


def test_a_load_thrown_away_closes_its_connections(serving):
    load = Load(serving(echo), connections=3)
    load.step(0.05)
    del load  # the fixture looks for descriptors


# --- the command ----------------------------------------------------------------------------------


def test_json_is_one_object_and_nothing_else(serving):
    host, port = serving(echo)
    done = ipckit(host, port, "--messages", 5, "--connections", 2, "--json")
    assert (done.returncode, done.stderr) == (0, "")
    report = json.loads(done.stdout)
    assert (report["count"], report["bytes"], report["errors"]) == (10, 10 * 64 + 2 * HELLO, {})
    assert list(report["latency_us"]) == ["p50", "p90", "p99", "p99.9", "max"]
    assert report["scheduled_rate"] is None


def test_the_table_says_which_loop_it_was(serving):
    host, port = serving(echo)
    done = ipckit(host, port, "--messages", 5)
    assert done.returncode == 0
    assert "closed loop" in done.stdout and "latency, p99.9" in done.stdout
    done = ipckit(host, port, "--duration", 0.1, "--rate", 100, "--reconnect", "--idle", 3)
    assert "100 due per second" in done.stdout and "16 and 3 idle" in done.stdout
    assert "connections/s" in done.stdout


def test_errors_are_status_1_and_told(serving):
    host, port = serving(after_hello(wrong))
    done = ipckit(host, port, "--messages", 1, "--connections", 1)
    assert done.returncode == 1
    assert "errors: wrong byte" in done.stdout
    assert done.stderr.startswith("first wrong byte: connection 0 after 64 bytes, within a message: 0x")


def test_a_unix_socket_by_option(forked, tmp_path):
    path = str(tmp_path / "socket")
    with socket.create_server(path, family=socket.AF_UNIX) as listener:
        forked(serve, listener, echo).wait_ready()
        done = ipckit("--unix", path, "--messages", 1, "--json")
    assert (done.returncode, json.loads(done.stdout)["target"]) == (0, path)


@contextlib.contextmanager
def running(*arguments):
    """The command, and when all of its connections are there."""
    command = [sys.executable, "-m", "ipckit", "load", *map(str, arguments), "--json"]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    try:
        descriptors = f"/proc/{process.pid}/fd"
        eventually(lambda: len(os.listdir(descriptors)) >= 16 + 3)
        yield process
    finally:
        process.kill()
        process.communicate()


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_ends_it_with_a_report(serving, number):
    host, port = serving(echo)
    with running(f"{host}:{port}", "--duration", NEVER, "--grace", NEVER) as process:
        process.send_signal(number)
        out, err = process.communicate(timeout=PATIENCE)
    assert (process.returncode, err) == (0, "")
    assert json.loads(out)["errors"] == {}


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_and_a_silent_server_does_not_keep_it(serving, number):
    host, port = serving(never_answers)
    with running(host, port, "--duration", NEVER, "--timeout", NEVER, "--grace", 0.1) as process:
        process.send_signal(number)
        out, err = process.communicate(timeout=PATIENCE)
    assert (process.returncode, err) == (1, "")
    assert json.loads(out)["errors"] == {"timed out": 16}


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_the_second_signal_ends_it_at_once_with_a_report_too(serving, number):
    host, port = serving(never_answers)
    with running(host, port, "--duration", NEVER, "--timeout", NEVER, "--grace", NEVER) as process:

        def again():
            process.send_signal(number)
            return process.poll() is not None

        eventually(again)
        out, err = process.communicate(timeout=PATIENCE)
    assert (process.returncode, err) == (128 + number, "")
    assert json.loads(out)["count"] == 0


def test_nobody_listens_is_one_line_and_status_1(refusing, tmp_path):
    host, port = refusing
    done = ipckit(f"{host}:{port}", "--duration", NEVER)
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr == f"Error: {host}:{port}: Connection refused\n"
    done = ipckit("--unix", tmp_path / "none", "--duration", NEVER)
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr == f"Error: {tmp_path}/none: No such file or directory\n"


def test_a_request_with_escapes(serving):
    def handle(connection, _number):
        while got := recv_exact(connection, 8):
            connection.sendall({b"\0\r\n\\A\t'\xff": "über\n".encode()}.get(got, got))

    host, port = serving(handle)
    text = ("--send", r"\0\r\n\\\x41\t\'\377", "--expect", r"über\n")
    done = ipckit(host, port, *text, "-n", 3, "-c", 2, "--json")
    assert (done.returncode, done.stderr) == (0, "")
    report = json.loads(done.stdout)
    assert (report["count"], report["size"], report["answer_size"]) == (6, 8, 6)
    done = ipckit(host, port, *text, "-n", 3)
    assert "bytes of an answer" in done.stdout


@pytest.mark.parametrize(
    "arguments, complaint",
    [
        ((), "or by --unix PATH; not nothing"),
        (("127.0.0.1",), "name the server as HOST:PORT"),
        (("::1:9",), "name the server as HOST:PORT"),
        (("127.0.0.1", "9", "x"), "or by --unix PATH; not 127.0.0.1 9 x"),
        (("127.0.0.1", "9", "--unix", "x"), "or by --unix PATH; not 127.0.0.1 9 --unix x"),
        (("127.0.0.1", "0"), "with a port from 1 to 65535"),
        (("127.0.0.1:65536",), "with a port from 1 to 65535"),
        (("127.0.0.1:9", "--send", r"\q"), r"\q is no escape"),
        (("127.0.0.1:9", "--expect", "x"), "expect must be the answer to send"),
        (("127.0.0.1:9", "--send", "x", "--size", "1"), "size must be left out with send"),
        (("127.0.0.1", "9", "--size", "0"), "'--size'"),
        (("127.0.0.1", "9", "--rate", "0"), "'--rate'"),
        (("127.0.0.1", "9", "--duration", "x"), "'--duration'"),
    ],
)
def test_bad_arguments_are_status_2(arguments, complaint):
    done = ipckit(*arguments)
    assert (done.returncode, done.stdout) == (2, "")
    assert complaint in done.stderr


def test_an_unknown_host_is_one_line():
    done = ipckit("no.such.host.invalid", 9)
    assert done.returncode == 1
    assert done.stderr.startswith("Error: no.such.host.invalid:9: ") and done.stderr.count("\n") == 1


def test_what_the_room_says_of_its_limits_is_true():
    assert (room.LARGEST, room.MOST_CONNECTIONS) == (16 << 20, 1_000_000)


@pytest.mark.parametrize("where", ["{0}:{1}", "{0} {1}", "localhost:{1}"])
def test_the_ways_to_name_a_server(serving, where):
    done = ipckit(*where.format(*serving(echo)).split(), "-n", 1)
    assert (done.returncode, done.stderr) == (0, "")


def test_help_reads_well():
    done = ipckit("--help")
    assert done.returncode == 0
    assert max(map(len, done.stdout.splitlines())) <= 100
    assert "[default: 5, or as long as" in " ".join(done.stdout.split())
