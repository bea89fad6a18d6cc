import contextlib
import fcntl
import importlib.util
import os
import re
import select
import shutil
import signal
import socket
import struct
import subprocess
import sys
import termios
import time

import pytest
from conftest import PATIENCE, eventually
from serving import Served, exchange, silent

from ipckit.cli import commands, main, servers  # noqa: F401 - the latter adds to the former
from ipckit.servers import MODELS, server_class

# Set through other options, or for programs only.
NOT_FOR_THE_COMMAND_LINE: "set[str]" = set()

IPCKIT = [sys.executable, "-m", "ipckit"]


def run(*arguments, **options):
    done = subprocess.run(
        [*IPCKIT, *map(str, arguments)], capture_output=True, text=True, timeout=PATIENCE, **options
    )
    return done.returncode, done.stdout, done.stderr


@pytest.mark.parametrize("command", [(), ("serve",), ("client",), ("demo",)])
def test_help_reads_well(command):
    status, out, _ = run(*command, "--help")
    assert status == 0
    assert "Usage: ipckit" in out
    assert max(map(len, out.splitlines())) <= 100


def test_version():
    assert run("--version")[1].startswith("ipckit, version 0.")


@pytest.mark.parametrize(
    "command", ["--help", "--version", "ls", "doctor", "gc", "rm no-such:1", "client 127.0.0.1 1"]
)
@pytest.mark.parametrize("closed", [(1,), (2,), (0, 1, 2)])
def test_without_a_standard_stream(forked, command, closed):
    """As some supervisors start it. The numbers are taken, so that nothing is written into what gets them."""

    def target(ready):
        for fd in closed:
            os.close(fd)
            setattr(sys, ("stdin", "stdout", "stderr")[fd], None)  # as the interpreter does at its start
        sys.argv[:] = ["ipckit", *command.split()]
        with pytest.raises(SystemExit) as ended:
            main()
        for fd in closed:
            assert os.fstat(fd).st_rdev == os.stat(os.devnull).st_rdev
            assert os.get_inheritable(fd)
        assert ended.value.code in ((None, 0) if command[:2] not in ("rm", "cl") else (1,))

    assert forked(target).wait() == 0


@pytest.mark.parametrize("closed", ["1>&-", "0<&- 1>&- 2>&-"])
def test_a_server_without_a_standard_stream(tmp_path, closed):
    command = f"exec {sys.executable} -m ipckit serve --unix s --log log {closed}"
    with subprocess.Popen(["sh", "-c", command], cwd=tmp_path, stderr=subprocess.PIPE) as server:
        eventually((tmp_path / "s").is_socket)
        with socket.socket(socket.AF_UNIX) as client:
            eventually(lambda: client.connect_ex(str(tmp_path / "s")) == 0)
            assert exchange(client, b"to the log only") == b"to the log only"
        server.terminate()
        assert server.wait(PATIENCE) == 0
        assert b"Traceback" not in server.stderr.read()
    assert (tmp_path / "log").read_bytes() == b"to the log only"


def test_a_busy_port_is_one_line_and_status_1(tmp_path):
    with socket.create_server(("127.0.0.1", 0)) as busy:
        port = busy.getsockname()[1]
        status, out, errors = run("serve", "--port", port, "--log", tmp_path / "log")
    assert (status, out) == (1, "")
    assert errors == f"Error: 127.0.0.1:{port}: Address already in use\n"
    assert not (tmp_path / "log").exists()


def test_an_unknown_host_is_one_line(tmp_path):
    status, _, errors = run(
        "serve", "--host", "no.such.host.invalid", "--port", "0", "--log", tmp_path / "log"
    )
    assert status == 1
    assert errors.startswith("Error: no.such.host.invalid:0: ")
    assert errors.count("\n") == 1


@pytest.mark.parametrize(
    ("name", "message"),
    [("missing/log", "No such file or directory"), ("link", "the log must not be a symbolic link"), ("fifo", "the log must be a regular file")],
)  # fmt: skip
def test_a_log_that_can_not_be_written_is_one_line(tmp_path, name, message):
    (tmp_path / "link").symlink_to(tmp_path / "nothing")
    os.mkfifo(tmp_path / "fifo")
    path = tmp_path / name
    assert run("serve", "--port", "0", "--log", path) == (1, "", f"Error: {path}: {message}\n")


def test_a_log_in_use_is_one_line(tmp_path):
    path = tmp_path / "log"
    with Served(path) as server:
        assert run("serve", "--port", "0", "--log", path) == (
            1,
            "",
            f"Error: {path}: another process writes this log\n",
        )
        status, out, errors = run("demo", "--log", path)
        assert (status, errors) == (1, f"Error: {path}: another process writes this log\n")
        assert "verified" not in out
        assert server.stop()[0] == 0


@pytest.mark.parametrize(
    "options",
    [
        ("--port", "65536"), ("--port", "x"), ("--max-children", "0"), ("--idle-timeout", "0"), ("--idle-timeout", "-1"),
        ("--idle-timeout", "nan"), ("--stop-timeout", "soon"), ("--total-timeout", "-inf"),
        ("--max-connections", "0"), ("--total-timeout", "0"), ("--max-output", "0"), ("--service", "nothing"),
        ("--model", "magic"), ("--format", "xml"), ("--durability", "very"), ("--log", "."), ("--unknown",), ("extra",),
    ],
)  # fmt: skip
def test_a_bad_option_is_status_2_and_names_the_value(tmp_path, options):
    status, out, errors = run("serve", *options, cwd=tmp_path)
    assert (status, out) == (2, "")
    assert options[-1] in errors
    assert "Traceback" not in errors
    assert not list(tmp_path.iterdir())


# --- the options of models -------------------------------------------------------------------------


def test_an_option_that_the_model_lacks_names_both_and_who_has_it(tmp_path):
    for option in (("--keyboard",), ("--no-keyboard",)):
        status, out, errors = run("serve", "--model", "fork", *option, cwd=tmp_path)
        assert (status, out) == (2, "")
        assert "--keyboard is no option of the model fork, only of " in errors
        assert "epoll" in errors.splitlines()[-1]
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("model", MODELS)
def test_each_option_of_a_model_can_be_given(model):
    """What a class takes by keyword and the command line doesn't know would be out of reach."""
    known = {parameter.name for parameter in commands.group.commands["serve"].params}
    assert set(server_class(model).options()) - known <= NOT_FOR_THE_COMMAND_LINE


# --- a service of the user's own -------------------------------------------------------------------

UPPER = """
from ipckit.servers import Service

class Upper(Service):
    def received(self, piece):
        if piece == b"bad":
            raise RuntimeError("no such luck")
        return piece.upper()

a_function = print
"""


@pytest.mark.parametrize("where", ["upper:Upper", "upper.py:Upper", "./upper.py:Upper"])
def test_a_service_of_a_module_or_a_file(tmp_path, where):
    (tmp_path / "upper.py").write_text(UPPER)
    with Served(tmp_path / "log", "--service", where, cwd=tmp_path) as server:
        with server.connect() as client:
            assert exchange(client, b"hello") == b"HELLO"
        assert server.stop()[0] == 0
    assert (tmp_path / "log").read_bytes() == b"hello"


@pytest.mark.parametrize(
    ("where", "why"),
    [
        ("upper", "'upper' is not MODULE:CLASS or FILE.py:CLASS"),
        (":Upper", "':Upper' is not MODULE:CLASS or FILE.py:CLASS"),
        ("upper:Lower", "'upper:Lower' must be a subclass of ipckit.servers.Service, and is nothing"),
        (
            "upper:a_function",
            "must be a subclass of ipckit.servers.Service, and is <built-in function print>",
        ),
        ("no_such:Upper", "'no_such' can't be loaded: ModuleNotFoundError: No module named 'no_such'"),
        ("no_such.py:Upper", "'no_such.py' can't be loaded: FileNotFoundError: "),
        ("broken.py:Upper", "'broken.py' can't be loaded: ZeroDivisionError: division by zero"),
    ],
)
def test_what_is_no_service_is_one_line_and_status_2(tmp_path, where, why):
    (tmp_path / "upper.py").write_text(UPPER)
    (tmp_path / "broken.py").write_text("1 / 0\n")
    status, out, errors = run("serve", "--port", "0", "--service", where, cwd=tmp_path)
    assert (status, out) == (2, "")
    assert why in errors
    assert "Traceback" not in errors
    assert not (tmp_path / "echomsg.txt").exists()


@pytest.mark.slow
def test_workers_that_die_again_and_again_are_one_line_and_status_1(tmp_path):
    with Served(tmp_path / "log", model="prefork") as server:
        logger = server.wait_logger()

        def failed():
            for pid in server.children()[0]:
                if pid != logger:
                    with contextlib.suppress(ProcessLookupError):
                        os.kill(pid, signal.SIGKILL)
            return server.process.poll() is not None

        eventually(failed)
        assert server.process.returncode == 1
        last = server.errors().splitlines()[-1]
    assert last == "Error: workers died at once 10 times in a row, and nobody was served"


# --- where it listens ------------------------------------------------------------------------------


@pytest.mark.skipif(importlib.util.find_spec("uvloop") is not None, reason="uvloop is there")
def test_uvloop_that_is_not_there(tmp_path):
    status, _, errors = run(
        "serve", "--model", "asyncio", "--uvloop", "--port", "0", "--log", tmp_path / "log"
    )
    assert status == 2
    assert "Error: No module named 'uvloop'" in errors


def test_values_that_do_not_go_together_are_status_2(tmp_path):
    options = ("--model", "prefork", "--min-spare", "9", "--max-spare", "2", "--port", "0")
    status, _, errors = run("serve", *options, "--log", tmp_path / "log")
    assert status == 2
    assert "Error: max_spare must be an integer from 9 to 2147483647, not 2" in errors


@pytest.mark.parametrize("command", ["serve", "load"])
def test_a_socket_without_a_path_is_status_2(tmp_path, command):
    for path, why in (
        ("", "a socket's path can't be empty"),
        ("x" * 108, "has 108 bytes, a socket's path at most 107"),
    ):
        status, out, errors = run(command, "--unix", path, cwd=tmp_path)
        assert (status, out) == (2, "")
        assert why in errors
        assert "Traceback" not in errors
    assert not list(tmp_path.iterdir())


def test_no_end_of_the_time(tmp_path):
    options = ("--idle-timeout", "inf", "--total-timeout", "1e300", "--stop-timeout", "inf")
    with Served(tmp_path / "log", *options) as server:
        with server.connect() as client:
            assert exchange(client, b"x") == b"x"
        assert server.stop()[0] == 0


def test_no_log(tmp_path):
    with Served(tmp_path / "log", "--no-log") as server:
        with server.connect() as client:
            assert exchange(client, b"unseen") == b"unseen"
        assert server.stop()[0] == 0
    assert not (tmp_path / "log").exists()


def test_a_unix_socket_alone(tmp_path):
    path = tmp_path / "socket"
    with Served(tmp_path / "log", "--unix", path) as server:
        assert server.addresses == [str(path)]
        status, _, errors = run("serve", "--unix", path, "--log", tmp_path / "other")
        assert (status, errors) == (1, f"Error: {path}: Address already in use\n")
        with server.connect() as client:
            assert exchange(client, b"x") == b"x"
        assert server.stop()[0] == 0
    assert not path.exists()


def test_a_path_that_is_no_socket_is_left_alone(tmp_path):
    (tmp_path / "file").write_text("precious")
    status, _, errors = run("serve", "--unix", tmp_path / "file", "--log", tmp_path / "log")
    assert status == 1
    assert errors == f"Error: '{tmp_path}/file' is no socket, but -rw-r--r--: File exists\n"
    assert (tmp_path / "file").read_text() == "precious"


def test_activated_by_a_service_manager_and_telling_it(tmp_path):
    with (
        socket.create_server(("127.0.0.1", 0)) as given,
        socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as manager,
    ):
        manager.bind(str(tmp_path / "manager"))
        manager.settimeout(PATIENCE)
        told = os.environ | {"NOTIFY_SOCKET": str(tmp_path / "manager")}
        with Served(tmp_path / "log", listener=given, env=told) as server:
            assert server.addresses == [given.getsockname()]
            assert manager.recv(100) == b"READY=1"
            with server.connect() as client:
                assert exchange(client, b"x") == b"x"
            server.process.send_signal(signal.SIGHUP)
            assert manager.recv(100).startswith(b"RELOADING=1\nMONOTONIC_USEC=")
            assert manager.recv(100) == b"READY=1"
            assert server.stop()[0] == 0
            assert manager.recv(100) == b"STOPPING=1"


def test_activated_without_a_service_manager_is_one_line(tmp_path):
    assert run("serve", "--activated", "--log", tmp_path / "log") == (
        1,
        "",
        "Error: --activated: there are no sockets of a service manager (LISTEN_FDS)\n",
    )


# --- what it tells ---------------------------------------------------------------------------------


def test_events_as_lines_with_the_time(tmp_path):
    with Served(tmp_path / "log", "--verbose") as server:
        with server.connect() as client:
            name = "{}:{}".format(*client.getsockname())
            assert exchange(client, b"x") == b"x"
        code, printed = server.stop()
    assert code == 0
    assert re.search(rf"^\d\d:\d\d:\d\d\.\d\d\d connection 1 from {name}$", printed, re.M)
    assert re.search(rf"^\d\d:\d\d:\d\d\.\d\d\d connection 1 from {name} ended: done$", printed, re.M)


def test_a_failing_service_s_traceback_is_part_of_its_json_line(tmp_path):
    (tmp_path / "upper.py").write_text(UPPER)
    with Served(tmp_path / "log", "--json", "--service", "upper:Upper", cwd=tmp_path) as server:
        with server.connect() as client:
            assert exchange(client, b"bad") == b""
        assert server.stop()[0] == 0
        (failure,) = [fields for event, fields in server.events() if event == "message"]
    assert failure["level"] == "error"
    assert "RuntimeError: no such luck" in failure["traceback"]


def test_without_either_it_prints_only_the_figures(tmp_path):
    with Served(tmp_path / "log") as server:
        with server.connect() as client:
            assert exchange(client, b"x") == b"x"
        assert server.stop()[0] == 0
        assert server.errors().startswith("served ")


# --- at a terminal ---------------------------------------------------------------------------------


@contextlib.contextmanager
def at_a_terminal(path, *options, columns=80, **popen):
    """A server with a terminal of its own: what it is, and the other end of the terminal."""
    ours, theirs = os.openpty()
    with open(ours, "r+b", buffering=0) as terminal:
        fcntl.ioctl(ours, termios.TIOCSWINSZ, struct.pack("4H", 30, columns, 0, 0))

        def take_it():
            fcntl.ioctl(theirs, termios.TIOCSCTTY, 0)

        popen |= {"stdin": theirs, "stderr": theirs, "pass_fds": [theirs]}
        with Served(path, *options, preexec_fn=take_it, **popen) as server:
            os.close(theirs)
            yield server, terminal


def shown(terminal, *patterns):
    """All that is shown until each of *patterns* is there."""
    seen, end = b"", time.monotonic() + PATIENCE
    while not all(re.search(pattern, seen) for pattern in patterns):
        assert select.select([terminal], [], [], max(0, end - time.monotonic()))[0], seen
        seen += terminal.read(65536)
    return seen.decode()


@pytest.mark.parametrize("columns", [80, 120])
def test_live_figures(tmp_path, columns):
    with at_a_terminal(tmp_path / "log", "--live", "--verbose", columns=columns) as (server, terminal):
        with server.connect() as client:
            assert exchange(client, b"hello") == b"hello"
            text = shown(
                terminal, rb"connection 1 from 127\.0\.0\.1:", rb"connections .* 1 .* 1 ", rb"0 replaced"
            )
            assert f"process {server.pid}" in text
        server.process.send_signal(signal.SIGTERM)
        assert "1 (1 done)" in shown(terminal, b"logger restarts")
        assert server.process.wait(PATIENCE) == 0


def test_live_figures_need_a_terminal(tmp_path):
    status, _, errors = run("serve", "--live", "--log", tmp_path / "log")
    assert status == 2
    assert "--live needs standard error to be a terminal" in errors


def test_the_keyboard_ends_it(tmp_path):
    with at_a_terminal(tmp_path / "log", "--model", "epoll") as (server, terminal):
        terminal.write(b"quit\n")
        assert server.process.wait(PATIENCE) == 0


def test_no_keyboard(tmp_path):
    with at_a_terminal(tmp_path / "log", "--model", "epoll", "--no-keyboard") as (server, terminal):
        terminal.write(b"quit\n")
        with server.connect() as client:
            assert exchange(client, b"x") == b"x"
            assert silent(client), "it goes on"
        assert server.stop()[0] == 0


@pytest.mark.parametrize("options", [(), ("--verbose", "--live"), ("--model", "epoll")])
def test_a_terminal_that_closes_ends_it(tmp_path, options):
    with at_a_terminal(tmp_path / "log", *options) as (server, terminal), server.connect() as client:
        assert exchange(client, b"x") == b"x"
        terminal.close()
        assert client.recv(1) == b""
        assert server.process.wait(PATIENCE) == 0
    assert (tmp_path / "log").read_bytes() == b"x"


def test_unless_it_is_told_to_go_on(tmp_path):
    nohup = (
        sys.executable,
        "-c",
        "import os, signal, sys; signal.signal(1, signal.SIG_IGN); os.execv(sys.argv[1], sys.argv[1:])",
    )
    with at_a_terminal(tmp_path / "log", "--json", prefix=nohup) as (server, terminal):
        terminal.close()
        for _ in range(2):
            with server.connect() as client:
                assert exchange(client, b"x") == b"x"
        assert server.stop()[0] == 0


# --- demo ------------------------------------------------------------------------------------------


def test_the_demo_verifies_its_log_and_keeps_what_was_there(tmp_path):
    path = tmp_path / "echomsg.txt"
    path.write_text("kept\n")
    status, out, errors = run("demo", "--clients", "5", "--messages", "40", cwd=tmp_path)
    assert (status, errors) == (0, "")
    assert "clients whose messages stand in echomsg.txt, each once and in order: 5 of 5" in out
    assert "message 1: hello through the pipe" in out  # the first of whichever client was first
    lines = path.read_text().splitlines()
    assert lines[0] == "kept"
    assert len(lines) == 1 + 5 * 40


def test_the_demo_fails_when_the_log_lacks_something(tmp_path):
    """The check itself: a demo whose log is cut while it runs must not say "verified"."""
    cut = (
        "import ipckit.cli.demo as demo, sys; read = demo._logged;\n"
        "demo._logged = lambda *a: {k: v[:-1] for k, v in read(*a).items()}\n"
        "sys.exit(demo.run(2, 5, sys.argv[1]))"
    )
    done = subprocess.run(
        [sys.executable, "-c", cut, str(tmp_path / "log")], capture_output=True, text=True, timeout=PATIENCE
    )
    assert done.returncode == 1
    assert "NOT verified" in done.stdout


def test_a_stranger_s_clients_are_served_too(tmp_path):
    with Served(tmp_path / "log") as server:
        host, port = server.address
        if nc := shutil.which("nc"):
            done = subprocess.run(
                [nc, "-N", host, str(port)], input=b"from nc\n", capture_output=True, timeout=PATIENCE
            )
            assert done.stdout == b"from nc\n"
        with server.connect() as connection:
            assert exchange(connection, b"from Python\n") == b"from Python\n"
        eventually(lambda: b"from Python\n" in (tmp_path / "log").read_bytes())
        assert server.stop()[0] == 0


def test_without_click_it_says_what_to_install():
    script = (
        "import sys; sys.modules['click'] = None; sys.argv = ['ipckit']; import ipckit.cli as c; c.main()"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=PATIENCE)
    assert done.returncode == 1
    assert (
        done.stderr
        == "the command line needs click, which comes with the extra cli: pip install '.[cli]' in a clone of ipckit\n"
    )
