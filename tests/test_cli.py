import contextlib
import fcntl
import importlib.util
import json
import os
import re
import resource
import select
import shlex
import shutil
import signal
import socket
import struct
import subprocess
import sys
import termios
import time

import click
import procfs
import psutil
import pytest
from conftest import PATIENCE, eventually
from serving import NEVER, Served, connect, exchange, silent, wait_gone

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


@pytest.mark.parametrize("command", [(), *((name,) for name in commands.group.commands)])
def test_help_reads_well_and_shows_examples(command):
    status, out, _ = run(*command, "--help")
    assert status == 0
    assert "Usage: ipckit" in out
    assert max(map(len, out.splitlines())) <= 100
    assert f"\n  Examples:\n    {' '.join(['ipckit', *command])}" in out


def test_each_example_is_a_command_that_is_understood():
    """All but what it does: a wrong option would be status 2."""
    for command in commands.group.commands.values():
        for line in command.epilog.splitlines()[2:]:
            words = shlex.split(re.split(r"   |\||<|>", line.strip().removeprefix("echo hello | "))[0])
            assert words[:2] == ["ipckit", command.name]
            with contextlib.suppress(click.exceptions.Exit):
                words = [word.replace("upper.py:Upper", "ipckit.servers:EchoService") for word in words]
                command.make_context(command.name, words[2:])


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


@pytest.mark.parametrize(
    "command", [("serve", "--port", "0"), pytest.param(("demo",), marks=pytest.mark.slow)]
)
def test_a_log_in_use_is_one_line(tmp_path, command):
    path = tmp_path / "log"
    with Served(path) as server:
        refused = f"Error: {path}: another process writes this log (process {server.wait_logger()})\n"
        status, out, errors = run(*command, "--log", path)
        assert (status, errors) == (1, refused)
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


@pytest.mark.parametrize(
    ("options", "why"),
    [
        (
            ("--no-log", "--durability", "synced"),
            "--durability says how to log, and --no-log that nothing is logged",
        ),
        (
            ("--no-log", "--durability", "none"),
            "--durability says how to log, and --no-log that nothing is logged",
        ),
        (("--no-log", "--format", "raw"), "--format says how to log, and --no-log that nothing is logged"),
        (("--unix-mode", "660"), "--unix-mode is of the socket files of --unix, and there are none"),
        (("--json", "--live"), "--live needs standard error to be a terminal, without --json"),
        (
            ("--model", "epoll", "--json", "--keyboard"),
            "--keyboard prints what is typed on standard output, which is all JSON with --json",
        ),
    ],
)
def test_options_that_do_not_go_together_are_one_line(tmp_path, options, why):
    status, out, errors = run("serve", *options, cwd=tmp_path)
    if "--json" in options:
        assert (status, [json.loads(line)["text"] for line in out.splitlines()], errors) == (2, [why], "")
    else:
        assert (status, out, errors) == (2, "", f"Error: {why}\n")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(("given", "mode"), [("660", 0o660), ("0o622", 0o622), ("0600", 0o600)])
def test_the_mode_of_socket_files(tmp_path, given, mode):
    paths = [tmp_path / "one", tmp_path / "two"]
    with Served(tmp_path / "log", "--unix", paths[0], "--unix", paths[1], "--unix-mode", given) as server:
        assert [path.stat().st_mode & 0o777 for path in paths] == [mode, mode]
        assert server.stop()[0] == 0
    status, _, errors = run("serve", "--unix", paths[0], "--unix-mode", "rw-rw----")
    assert status == 2
    assert "'rw-rw----' is no mode in octal" in errors


@pytest.mark.parametrize(
    ("options", "why"),
    [
        (("--json",), "--log - and --json both want standard output"),
        (
            ("--durability", "synced"),
            "--durability synced is of a file; nothing is synced through standard output",
        ),
    ],
)
def test_what_standard_output_can_not_be(tmp_path, options, why):
    status, out, errors = run("serve", "--log", "-", *options, cwd=tmp_path)
    assert status == 2 and why in out + errors
    with open(tmp_path / "file", "w") as file:
        done = subprocess.run(
            [*IPCKIT, "serve", "-l", "-"], stdout=file, stderr=subprocess.PIPE, text=True, timeout=PATIENCE
        )
    assert (done.returncode, done.stderr.count("\n")) == (2, 1)
    assert "standard output is a file: name it, by --log FILE" in done.stderr


def piped(command, folder):
    """A command with nothing to read, whose output is read meanwhile."""
    streams = {"stdin": subprocess.DEVNULL, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    return subprocess.Popen(command, cwd=folder, text=True, **streams)


@pytest.mark.parametrize("durability", ["none", "written"])
def test_a_log_on_standard_output(tmp_path, durability):
    """Nothing else is there; a rotation is refused, and changes nothing."""
    command = [*IPCKIT, "serve", "-u", "s", "-l", "-", "--durability", durability, "-v"]
    with piped(command, tmp_path) as server:
        while "logging to standard output" not in server.stderr.readline():
            pass
        with connect(str(tmp_path / "s")) as client:
            assert exchange(client, b"one\n") == b"one\n"
            server.send_signal(signal.SIGHUP)
            while "the log can't be reopened" not in server.stderr.readline():
                pass
            assert exchange(client, b"two\n") == b"two\n"
        server.terminate()
        out, _ = server.communicate(timeout=PATIENCE)
        assert (server.returncode, out) == (0, "one\ntwo\n")


# --- what it takes from the machine -----------------------------------------------------------------


def limited_to(soft, hard):
    return lambda: resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


@pytest.mark.parametrize("model", MODELS)
def test_there_is_a_descriptor_for_each_connection(tmp_path, model):
    many = 300
    room = {"fork": ("--max-children", many), "prefork": ("--max-children", many)}
    options = () if model == "iterative" else ("--max-connections", many, *room.get(model, ()))
    with Served(tmp_path / "log", *options, model=model, preexec_fn=limited_to(200, 4096)) as server:
        soft, hard = psutil.Process(server.pid).rlimit(psutil.RLIMIT_NOFILE)
        assert hard == 4096
        assert soft == 200 if model == "iterative" else many < soft < many + 100
        assert server.stop() == (0, server.errors())
        assert server.errors().startswith("served ")


@pytest.mark.parametrize("as_json", [False, True])
def test_too_few_are_told_at_the_start(tmp_path, as_json):
    options = ("--model", "epoll", "--max-connections", 500, *(["--json"] if as_json else []))
    with Served(tmp_path / "log", *options, preexec_fn=limited_to(100, 300)) as server:
        assert psutil.Process(server.pid).rlimit(psutil.RLIMIT_NOFILE) == (300, 300)
        assert server.stop()[0] == 0
        told = r"500 connections need 5\d\d descriptors, and the hard RLIMIT_NOFILE is 300: further ones wait; raise"
        if as_json:
            (event,) = [fields for name, fields in server.events() if name == "limited"]
            assert (event["level"], event["allowed"]) == ("warning", 300)
            assert 500 < event["needed"] < 600
            assert re.match(told, event["text"])
        else:
            assert re.match(f"ipckit: {told}", server.errors())


def test_what_it_has_is_not_lowered(tmp_path):
    with Served(tmp_path / "log", preexec_fn=limited_to(4000, 4096)) as server:
        assert psutil.Process(server.pid).rlimit(psutil.RLIMIT_NOFILE) == (4000, 4096)
        assert server.stop()[0] == 0


def test_supervisor_and_workers_have_names_of_their_own(tmp_path):
    (tmp_path / "upper.py").write_text(UPPER)
    options = ("--service", "upper:Upper", "--no-log", "--model", "prefork")
    with Served(tmp_path / "log", *options, cwd=tmp_path) as server:
        assert psutil.Process(server.pid).name() == "ipckit-serve"
        eventually(lambda: {psutil.Process(pid).name() for pid in server.children()[0]} == {"ipckit-worker"})
        assert server.stop()[0] == 0


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


def objects(lines):
    return [json.loads(line) for line in lines.splitlines()]


def test_json_is_all_there_is_on_one_stream(tmp_path):
    (tmp_path / "warns.py").write_text("import warnings\nwarnings.warn('old', UserWarning)\n" + UPPER)
    command = [
        *IPCKIT,
        "serve",
        "-p",
        "0",
        "-l",
        tmp_path / "log",
        "--json",
        "-s",
        "warns:Upper",
        "-m",
        "epoll",
    ]
    with piped(command, tmp_path) as server:
        told = []

        def until(name):
            while not told or told[-1]["event"] != name:
                told.append(json.loads(server.stdout.readline()))
            return told[-1]

        host, port = until("listening")["at"].split(":")
        with socket.create_connection((host, int(port))) as client:
            assert exchange(client, b"bad") == b""
        server.send_signal(signal.SIGUSR1)
        until("statistics")
        (tmp_path / "log").rename(tmp_path / "log.1")
        server.send_signal(signal.SIGHUP)
        until("log reopened")
        server.terminate()
        out, errors = server.communicate(timeout=PATIENCE)
        assert (server.returncode, errors) == (0, "")
    told += objects(out)
    assert told[-1]["event"] == "served"
    assert any("UserWarning: old" in event["text"] for event in told), "of the module, when it is loaded"
    assert any("no such luck" in event.get("traceback", "") for event in told)
    (logging,) = [event for event in told if event["event"] == "logging"]
    assert logging["log"] == str(tmp_path / "log")


@pytest.mark.parametrize(
    ("options", "status", "text"),
    [
        (("--port", "x"), 2, "Invalid value for '-p' / '--port': 'x' is not a valid integer range."),
        (("--unknown",), 2, "No such option '--unknown'."),
        (("--service", "no_such:Upper"), 2, "can't be loaded: ModuleNotFoundError"),
        (("--model", "fork", "--no-keyboard"), 2, "--keyboard is no option of the model fork"),
        (("--model", "prefork", "--min-spare", "9", "--max-spare", "2"), 2, "max_spare must be an integer"),
        (("--log", "missing/log"), 1, "missing/log: No such file or directory"),
        (("--activated",), 1, "there are no sockets of a service manager"),
        (("--host", "192.0.2.1"), 1, "192.0.2.1:0: Cannot assign requested address"),
    ],
)
def test_json_errors_at_the_start_too(tmp_path, options, status, text):
    code, out, errors = run("serve", "--json", "--port", "0", *options, cwd=tmp_path)
    assert (code, errors) == (status, "")
    last = objects(out)[-1]
    assert (last["event"], last["level"]) == ("failed", "error")
    assert text in last["text"]


@pytest.mark.parametrize("options", [("--json",), ("--verbose",)])
def test_who_reads_the_events_may_go_away(tmp_path, options):
    reader, writer = os.pipe()
    command = [*IPCKIT, "serve", "--unix", "s", "--log", "log", *options]
    stream = "stdout" if "--json" in options else "stderr"
    other = {"stdout": "stderr", "stderr": "stdout"}[stream]
    with subprocess.Popen(
        command, cwd=tmp_path, stdin=subprocess.DEVNULL, **{stream: writer, other: subprocess.PIPE}
    ) as server:
        os.close(writer)
        eventually((tmp_path / "s").is_socket)
        os.close(reader)
        for _ in range(2):
            with socket.socket(socket.AF_UNIX) as client:
                eventually(lambda c=client: c.connect_ex(str(tmp_path / "s")) == 0)
                assert exchange(client, b"x") == b"x"
        server.terminate()
        out, errors = server.communicate(timeout=PATIENCE)
        assert server.returncode == 0
        assert b"Traceback" not in (out or b"") + (errors or b"")


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


def plain(text):
    """Without what moves the cursor, or colours."""
    return re.sub(r"\x1b\[[0-9;?]*[a-zA-Z]", "", text)


@pytest.mark.parametrize("columns", [60, 80, 120])
def test_live_figures(tmp_path, columns):
    with at_a_terminal(tmp_path / "log", "--live", "--verbose", columns=columns) as (server, terminal):
        with server.connect() as client:
            assert exchange(client, b"hello") == b"hello"
            text = shown(
                terminal, rb"connection 1 from 127\.0\.0\.1:", rb"connections .* 1 .* 1 ", rb"0 replaced"
            )
            assert f"process {server.pid}" in text
            assert max(map(len, plain(text).replace("\r", "\n").splitlines())) <= columns
            assert "…" not in text, "nothing is cut off"
        server.process.send_signal(signal.SIGTERM)
        assert "1 (1 done)" in shown(terminal, b"logger restarts")
        assert server.process.wait(PATIENCE) == 0


@pytest.mark.parametrize("exported", [None, "80"])
def test_live_figures_in_a_terminal_that_gets_narrower(tmp_path, exported):
    environment = {name: value for name, value in os.environ.items() if name not in ("COLUMNS", "LINES")}
    environment |= {"COLUMNS": exported, "LINES": exported} if exported else {}
    with at_a_terminal(tmp_path / "log", "--live", columns=120, env=environment) as (server, terminal):
        shown(terminal, rb"0 replaced")
        fcntl.ioctl(terminal, termios.TIOCSWINSZ, struct.pack("4H", 30, 60, 0, 0))
        text = shown(terminal, rb"(?s)\x1b\[2J.*0 replaced")  # what was there is cleared away
        after = plain(text.partition("\x1b[2J")[2])
        assert max(map(len, after.replace("\r", "\n").splitlines())) <= 60
        with server.connect() as client:
            assert exchange(client, b"x") == b"x"
        server.process.send_signal(signal.SIGTERM)
        shown(terminal, b"logger restarts")
        assert server.process.wait(PATIENCE) == 0


def test_live_lines_where_there_is_no_cursor(tmp_path):
    environment = os.environ | {"TERM": "dumb"}
    with at_a_terminal(tmp_path / "log", "--live", env=environment) as (server, terminal):
        text = shown(terminal, rb"fork, process \d+, \d+ s: 0 connections, 0 echoes, 0 bytes\r\n")
        server.process.send_signal(signal.SIGTERM)
        text += shown(terminal, b"logger restarts")
        assert server.process.wait(PATIENCE) == 0
    assert "\x1b" not in text


@contextlib.contextmanager
def at_a_shell(folder):
    """An interactive bash with a terminal of its own: the other end of that."""
    ours, theirs = os.openpty()
    with open(ours, "r+b", buffering=0) as terminal:
        fcntl.ioctl(ours, termios.TIOCSWINSZ, struct.pack("4H", 30, 100, 0, 0))
        environment = {"PATH": os.environ["PATH"], "TERM": "xterm", "PS1": "ready$ "}

        def take_it():
            fcntl.ioctl(0, termios.TIOCSCTTY, 0)

        options = {"stdin": theirs, "stdout": theirs, "stderr": theirs, "cwd": folder, "env": environment}
        options |= {"start_new_session": True, "preexec_fn": take_it}
        shell = subprocess.Popen(["bash", "--norc", "--noprofile", "-i"], **options)
        os.close(theirs)
        try:
            yield terminal
        finally:
            jobs = psutil.Process(shell.pid).children(recursive=True)
            for process in jobs:
                with contextlib.suppress(psutil.NoSuchProcess):
                    process.kill()
            shell.kill()
            shell.wait()
            wait_gone([process.pid for process in jobs])


def test_live_figures_and_job_control(tmp_path):
    """Ctrl-Z gives the terminal back as it was, fg takes it again, and the background draws nothing."""
    with at_a_shell(tmp_path) as terminal:
        shown(terminal, rb"ready\$ ")
        terminal.write(f"{sys.executable} -m ipckit serve -u s --live -l log -m epoll\n".encode())
        text = shown(terminal, rb"process (\d+)", rb"0 replaced")
        pid = int(re.search(r"process (\d+)", text)[1])

        def served():
            with connect(str(tmp_path / "s")) as client:
                return exchange(client, b"x") == b"x"

        assert served()
        terminal.write(b"\x1a")
        text = shown(terminal, rb"(?s)Stopped.*ready\$ ")
        assert procfs.state(pid) == "T"
        assert re.findall(r"\x1b\[\?25([hl])", text)[-1] == "h", "the cursor is visible"
        terminal.write(b"fg\n")
        text = shown(terminal, rb"(?s)process \d+, .*0 replaced")
        assert f"process {pid}" in text
        assert served()
        terminal.write(b"\x1a")
        shown(terminal, rb"(?s)Stopped.*ready\$ ")
        terminal.write(b"bg\n")
        shown(terminal, rb"ready\$ ")
        assert served()
        os.kill(pid, signal.SIGUSR1)
        text = shown(terminal, rb"(?s)statistics: .*\n")
        assert "replaced 0" in text and "0 replaced" not in text and "\x1b[?25l" not in text
        terminal.write(b"fg\n")
        shown(terminal, rb"(?s)process \d+, .*0 replaced")
        terminal.write(b"\x03")
        shown(terminal, rb"(?s)logger restarts.*ready\$ ")
        terminal.write(b"echo status $?\n")
        shown(terminal, rb"status 0\r\n")


def test_a_load_and_job_control(tmp_path):
    with Served(tmp_path / "log", model="epoll") as server, at_a_shell(tmp_path) as terminal:
        host, port = server.address
        shown(terminal, rb"ready\$ ")
        terminal.write(f"{sys.executable} -m ipckit load {host}:{port} -d inf -t {NEVER}\n".encode())
        shown(terminal, rb"running .* 16 open, [1-9]")
        terminal.write(b"\x1a")
        text = shown(terminal, rb"(?s)Stopped.*ready\$ ")
        assert re.findall(r"\x1b\[\?25([hl])", text)[-1] == "h", "the cursor is visible"
        terminal.write(b"fg\n")
        shown(terminal, rb"running .* 16 open, [1-9]")
        terminal.write(b"\x03")
        shown(terminal, rb"(?s)latency, max.*ready\$ ")
        terminal.write(b"echo status $?\n")
        shown(terminal, rb"status 0\r\n")
        assert server.stop()[0] == 0


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
