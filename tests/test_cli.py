import os
import shutil
import socket
import subprocess
import sys

import pytest
from conftest import eventually
from serving import Served, exchange

IPCKIT = [sys.executable, "-m", "ipckit"]


def run(*arguments, **options):
    done = subprocess.run(
        [*IPCKIT, *map(str, arguments)], capture_output=True, text=True, timeout=50, **options
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
        ("--model", "magic"), ("--format", "xml"), ("--durability", "very"), ("--log", "."), ("--unknown",), ("extra",),
    ],
)  # fmt: skip
def test_a_bad_option_is_status_2_and_names_the_value(tmp_path, options):
    status, out, errors = run("serve", *options, cwd=tmp_path)
    assert (status, out) == (2, "")
    assert options[-1] in errors
    assert "Traceback" not in errors
    assert not list(tmp_path.iterdir())


def test_the_demo_verifies_its_log_and_keeps_what_was_there(tmp_path):
    path = tmp_path / "echomsg.txt"
    path.write_text("kept\n")
    status, out, errors = run("demo", "--clients", "5", "--messages", "40", cwd=tmp_path)
    assert (status, errors) == (0, "")
    assert "clients found whole and in order in echomsg.txt: 5 of 5" in out
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
        [sys.executable, "-c", cut, str(tmp_path / "log")], capture_output=True, text=True, timeout=50
    )
    assert done.returncode == 1
    assert "NOT verified" in done.stdout


def test_a_stranger_s_clients_are_served_too(tmp_path):
    with Served(tmp_path / "log") as server:
        host, port = server.address
        if nc := shutil.which("nc"):
            done = subprocess.run(
                [nc, "-N", host, str(port)], input=b"from nc\n", capture_output=True, timeout=30
            )
            assert done.stdout == b"from nc\n"
        with socket.create_connection(server.address) as connection:
            assert exchange(connection, b"from Python\n") == b"from Python\n"
        eventually(lambda: b"from Python\n" in (tmp_path / "log").read_bytes())
        assert server.stop()[0] == 0


def test_without_click_it_says_what_to_install():
    script = (
        "import sys; sys.modules['click'] = None; sys.argv = ['ipckit']; import ipckit.cli as c; c.main()"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=30)
    assert done.returncode == 1
    assert done.stderr == "the command line needs click: install ipckit-unix[cli]\n"
