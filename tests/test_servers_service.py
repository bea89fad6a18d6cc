"""Services of a user's own, in Python, under every model."""

import contextlib
import logging
import os
import signal
import sys

import pytest
from serving import NEVER, connect, exchange, half_close_and_drain

from ipckit.messagelog import MessageLog
from ipckit.servers import MODELS, Service, listen, serve
from ipckit.signals import blocked


class Lines(Service):
    """Greets, answers each whole line in capitals, says how many there were, ends at 'quit'."""

    def started(self):
        self.rest, self.count = b"", 0
        return b"hello %s\n" % self.peer.encode()

    def received(self, piece):
        *lines, self.rest = (self.rest + piece).split(b"\n")
        self.count += len(lines)
        self.closing = b"quit" in lines
        return b"".join(line.upper() + b"\n" for line in lines)

    def finished(self):
        return b"%d lines\n" % self.count


class Raises(Service):
    def received(self, piece):
        raise RuntimeError(f"no use for {piece!r}")


class Leaves(Service):
    """Ends as what the client says tells it to, and answers all else."""

    def received(self, piece):
        if piece == b"exit":
            sys.exit(3)
        for error in (KeyboardInterrupt, GeneratorExit):
            if piece == error.__name__.encode():
                raise error
        return piece


class CannotBegin(Service):
    def __init__(self):
        raise RuntimeError("nothing to begin with")


class Floods(Service):
    def received(self, piece):
        return bytes(2000)


@pytest.fixture(params=list(MODELS))
def serving(request, tmp_path, forked):
    """Starts a service under each model: its address, and the child that serves."""

    def start(service, expected_ends, **options):
        listener = listen()

        def child(ready):
            logging.basicConfig(stream=sys.stderr, force=True)
            with blocked([signal.SIGTERM]), MessageLog(tmp_path / "log") as log:
                ready()
                stats = serve(service, listener, model=request.param, log=log, stop_timeout=NEVER, **options)
                assert stats.ends == expected_ends, stats

        running = forked(child)
        address = listener.getsockname()
        listener.close()
        running.wait_ready()
        running.model = request.param
        return address, running

    return start


def stop(running):
    os.kill(running.pid, signal.SIGTERM)
    assert running.wait() == 0


def test_a_line_service(serving, tmp_path):
    address, running = serving(Lines, {"done": 2})
    with connect(address) as client:
        name = "{}:{}".format(*client.getsockname())
        greeting = f"hello {name}\n".encode()
        assert exchange(client, b"", len(greeting)) == greeting
        assert exchange(client, b"one\ntw", 4) == b"ONE\n"
        assert exchange(client, b"o\n", 4) == b"TWO\n"
        assert half_close_and_drain(client) == b"2 lines\n"
    with connect(address) as client:
        assert exchange(client, b"quit\n", len(greeting) + 5).endswith(b"\nQUIT\n")
        assert client.recv(1) == b"", "the service hung up"
    stop(running)
    assert (tmp_path / "log").read_bytes() == b"one\ntwo\nquit\n"


def test_a_service_that_raises_costs_only_its_own_connection(serving, capfd):
    address, running = serving(Raises, {"service failed": 2})
    for _ in range(2):
        with connect(address) as client:
            assert exchange(client, b"x", 1) == b""
    stop(running)
    assert "RuntimeError: no use for b'x'" in capfd.readouterr().err


def test_a_service_that_wants_to_end_it_all_ends_only_its_own_connection(serving, capfd):
    address, running = serving(Leaves, {"service failed": 3, "done": 1})
    with contextlib.ExitStack() as stack:
        if running.model != "iterative":
            other = stack.enter_context(connect(address))
            assert exchange(other, b"before") == b"before"
        for how in (b"exit", b"KeyboardInterrupt", b"GeneratorExit"):
            with connect(address) as client:
                assert exchange(client, how, 1) == b""
        if running.model == "iterative":
            other = stack.enter_context(connect(address))
        assert exchange(other, b"after") == b"after"
        assert half_close_and_drain(other) == b""
    stop(running)
    printed = capfd.readouterr().err
    for error in ("SystemExit: 3", "KeyboardInterrupt", "GeneratorExit"):
        assert error in printed
    assert printed.count("the service failed") == 3


def test_a_service_that_cannot_be_made(serving, capfd):
    address, running = serving(CannotBegin, {"service failed": 2})
    for _ in range(2):
        with connect(address) as client:
            assert client.recv(1) == b""
    stop(running)
    assert "RuntimeError: nothing to begin with" in capfd.readouterr().err


def test_too_long_an_answer_is_not_sent(serving):
    address, running = serving(Floods, {"too much": 1}, max_output=1999)
    with connect(address) as client:
        assert exchange(client, b"x", 1) == b""
    stop(running)
