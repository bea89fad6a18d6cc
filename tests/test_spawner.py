"""The spawner: children that run C only, made by a program of ours. It is killed and stopped at any moment."""

import logging
import os
import re
import shutil
import signal
import socket
import stat
import subprocess
import sys
import threading
from contextlib import suppress
from pathlib import Path

import pytest
from conftest import PATIENCE, children, eventually
from serving import Served, exchange

from ipckit import _spawner
from ipckit._native import ffi, lib
from ipckit._spawner import CONNECTION, Spawner
from ipckit.memory import SharedMemory
from ipckit.messagelog import MessageLog

NATIVE_MODELS = ("fork", "prefork")


@pytest.fixture
def counters():
    with SharedMemory(ffi.sizeof("ik_server_counters")) as memory:
        yield memory


class Echo:
    """A connection whose child lives until the other end is closed."""

    def __init__(self, counters):
        self.client, self.served = socket.socketpair()
        self.client.settimeout(PATIENCE)
        self.job = ffi.new("ik_connection_job *")
        connection = self.job.connection
        connection.socket, connection.end, connection.echoes = self.served.fileno(), lib.IK_END_OPEN, 1
        connection.peer = b"a test"
        self._counters = ffi.from_buffer("ik_server_counters *", counters.buf)
        connection.counters = self._counters
        self.fds = (self.served.fileno(), counters.fileno())

    def start(self, spawner):
        self.child = spawner.start(CONNECTION, self.job, self.fds)
        self.served.close()
        return self.child

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.client.close()
        self.served.close()
        self.child.wait(PATIENCE)
        self.child.close()


def links(pid):
    return {int(fd): os.readlink(f"/proc/{pid}/fd/{fd}") for fd in os.listdir(f"/proc/{pid}/fd")}


def status(pid, field):
    return re.search(rf"^{field}:\s*(\S+)", Path(f"/proc/{pid}/status").read_text(), re.M)[1]


def forks_marks():
    """Mappings of this process that its children would not get, or that a core dump would not."""
    return [
        line
        for line in Path("/proc/self/smaps").read_text().splitlines()
        if line.startswith("VmFlags:") and (" dc" in line or " dd" in line)
    ]


# --- what a child is -------------------------------------------------------------------------------


def test_the_child_is_ours_and_serves(counters):
    spawner = Spawner()
    with Echo(counters) as echo:
        child = echo.start(spawner)
        assert status(child.pid, "PPid") == str(os.getpid())
        assert exchange(echo.client, b"hello") == b"hello"
        assert (
            Path(f"/proc/{child.pid}/cmdline").read_bytes().rstrip(b"\0") == b"ipckit connection from a test"
        )
        assert status(child.pid, "Name") == "ipckit-conn"
    assert child.status.code == lib.IK_END_DONE
    assert ffi.from_buffer("ik_server_counters *", counters.buf).echoes == 1
    spawner.close()


def test_the_child_has_nothing_but_what_it_is_given(counters, tmp_path):
    open_here = os.open(tmp_path, os.O_RDONLY)
    os.set_inheritable(open_here, True)
    former = signal.signal(signal.SIGUSR2, signal.SIG_IGN)
    signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGUSR2])
    try:
        spawner = Spawner()
        with Echo(counters) as echo:
            child = echo.start(spawner)
            assert exchange(echo.client, b"x") == b"x"
            names = links(child.pid)
            assert [names.pop(fd) for fd in (0, 1, 2)] == ["/dev/null"] * 3
            assert [name.split(":")[0] for name in names.values()] == ["socket"]
            assert os.readlink(f"/proc/{child.pid}/cwd") == "/"
            assert int(status(child.pid, "SigBlk"), 16) == 0
            assert not int(status(child.pid, "SigIgn"), 16) >> (signal.SIGUSR2 - 1) & 1
            assert set(links(spawner.pid)) >= {0, 1, 2} and len(links(spawner.pid)) == 5
        spawner.close()
    finally:
        signal.pthread_sigmask(signal.SIG_UNBLOCK, [signal.SIGUSR2])
        signal.signal(signal.SIGUSR2, former)
        os.close(open_here)


def test_nothing_is_done_to_our_memory(counters, tmp_path):
    before = forks_marks()
    spawner = Spawner()
    with MessageLog(tmp_path / "log") as log, Echo(counters) as echo:
        log.append(b"x")
        echo.start(spawner)
        assert forks_marks() == before
    spawner.close()


def test_a_list_that_grows_while_a_log_is_open_is_whole_in_every_fork(tmp_path):
    """realloc() moves memory by mremap(2), and marks of madvise(2) with it."""
    script = (
        "import multiprocessing, os, sys\n"
        "from ipckit import MessageLog, fork\n"
        "def look(): sys.exit(0 if sum(items) == len(items) and bytes(large[-3:]) == b'end' else 1)\n"
        "items, large = [1] * 50_000, bytearray(1 << 20)\n"
        "with MessageLog(sys.argv[1]):\n"
        "    for _ in range(3_000_000): items.append(1)\n"
        "    large.extend(bytes(8 << 20) + b'end')\n"
        "    pid = os.fork()\n"
        "    if pid == 0: os._exit(0 if sum(items) == len(items) else 1)\n"
        "    print(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]))\n"
        "    with fork(look) as child: print(child.wait().code)\n"
        "    process = multiprocessing.get_context('fork').Process(target=look)\n"
        "    process.start(); process.join(); print(process.exitcode)\n"
    )
    command = [sys.executable, "-W", "ignore", "-c", script, str(tmp_path / "log")]
    done = subprocess.run(command, capture_output=True, text=True, timeout=PATIENCE)
    assert (done.stdout.split(), done.stderr) == (["0", "0", "0"], "")


def test_the_logger_is_a_program_too(tmp_path):
    with MessageLog(tmp_path / "log") as log:
        pid = log.logger.pid
        eventually(lambda: status(pid, "Name") == "ipckit-logger")
        title = Path(f"/proc/{pid}/cmdline").read_bytes().rstrip(b"\0").decode()
        assert title == f"ipckit logger of {tmp_path}/log"
        assert os.readlink(f"/proc/{pid}/cwd") == "/", "the folder can be unmounted"
        log.append(b"works")
    assert (tmp_path / "log").read_bytes() == b"works"


# --- its death ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("signum", [signal.SIGKILL, signal.SIGSTOP])
def test_a_spawner_that_is_killed_or_stopped_is_replaced(counters, signum):
    spawner = Spawner()
    for _ in range(3):
        with Echo(counters) as echo:
            echo.start(spawner)
            assert exchange(echo.client, b"x") == b"x"
            former = spawner.pid
            os.kill(former, signum)
            with Echo(counters) as another:
                another.start(spawner)
                assert exchange(another.client, b"y") == b"y"
            assert spawner.pid != former
            assert exchange(echo.client, b"still") == b"still"
    spawner.close()


def test_killed_at_any_moment_no_child_is_lost_and_none_is_doubled(counters):
    """The kernel says whether there is a child, not the spawner: each request makes exactly one."""
    spawner = Spawner()
    before = children()
    over = threading.Event()
    killed = 0

    def kill():
        nonlocal killed
        while not over.is_set():
            pid = spawner.pid
            if pid is not None:
                with suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
                    killed += 1
            over.wait(0.0007)

    killer = threading.Thread(target=kill)
    killer.start()
    try:
        for number in range(150):
            with Echo(counters) as echo:
                child = echo.start(spawner)
                assert children() - before - {spawner.pid} == {child.pid}
                assert exchange(echo.client, b"%d" % number) == b"%d" % number
            assert child.status.code == lib.IK_END_DONE
            _spawner._reasons.clear()  # three deaths in a row are a reason to give up, but not here
    finally:
        over.set()
        killer.join()
        spawner.close()
    assert killed > 0
    assert children() == before


@pytest.mark.parametrize("model", NATIVE_MODELS)
def test_a_server_whose_spawner_is_killed_or_stopped_serves_every_client(model, tmp_path):
    options = ("--max-children", "64", "--max-requests", "1") if model == "prefork" else ()
    with Served(tmp_path / "log", *options, model=model) as server:
        for signum in (signal.SIGKILL, signal.SIGSTOP) * 3:
            with server.connect() as connection:
                assert exchange(connection, b"a\n") == b"a\n"
            former = server.spawner()
            os.kill(former, signum)
            for _ in range(8):
                with server.connect() as connection:
                    assert exchange(connection, b"b\n") == b"b\n"
            eventually(lambda former=former: server.spawner() != former)
        code, printed = server.stop()
    assert code == 0
    assert (tmp_path / "log").read_bytes() == (b"a\n" + b"b\n" * 8) * 6
    assert "ordinary forks" not in printed


def test_it_ends_with_its_parent_even_while_a_fork_of_that_lives(tmp_path):
    script = (
        "import os, signal, sys\n"
        "from ipckit._spawner import Spawner\n"
        "spawner = Spawner()\n"
        "assert spawner._begin()\n"
        "if os.fork() == 0: signal.pause()\n"
        "print(spawner.pid, flush=True)\n"
        "os.kill(os.getpid(), signal.SIGKILL)\n"
    )
    command = [sys.executable, "-W", "ignore", "-c", script]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, start_new_session=True) as host:
        pid = int(host.stdout.readline())
        eventually(lambda: not Path(f"/proc/{pid}").exists() or status(pid, "State") == "Z")
        os.killpg(host.pid, signal.SIGKILL)


def test_a_fork_of_us_leaves_the_spawner_alone(counters, forked):
    spawner = Spawner()
    with Echo(counters) as echo:
        echo.start(spawner)
        pid = spawner.pid

        def child(_):
            spawner.close()

        assert forked(child).wait() == 0
        assert spawner.pid == pid
    with Echo(counters) as echo:
        echo.start(spawner)
        assert exchange(echo.client, b"x") == b"x"
    assert spawner.pid == pid
    spawner.close()


# --- where it can't be used --------------------------------------------------------------------------


def in_a_child(forked, tell, body):
    """Run ``body()`` in a child, which prints what the logger ipckit.process says."""

    def child(_):
        logging.basicConfig(filename=tell, force=True)
        body()

    assert forked(child).wait() == 0


def unusable(forked, counters, tmp_path, program):
    tell = tmp_path / "told"

    def body():
        _spawner._PROGRAM = str(program)
        spawner = Spawner()
        for _ in range(2):
            with Echo(counters) as echo:
                child = echo.start(spawner)
                assert exchange(echo.client, b"forked") == b"forked"
                assert status(child.pid, "Name") != "ipckit-conn"
        with MessageLog(tmp_path / "log") as log:
            log.append(b"logged")
            log.logger.kill()
            log.append(b" twice")
        spawner.close()

    in_a_child(forked, tell, body)
    assert (tmp_path / "log").read_bytes() == b"logged twice"
    told = tell.read_text()
    assert told.count("children are made by ordinary forks from now on") == 1
    return told


def test_a_folder_mounted_noexec(forked, counters, tmp_path):
    copy = tmp_path / "ipckit-spawner"
    shutil.copy(_spawner._PROGRAM, copy)
    copy.chmod(stat.S_IRUSR | stat.S_IWUSR)
    assert "Permission denied" in unusable(forked, counters, tmp_path, copy)


def test_a_package_without_the_program(forked, counters, tmp_path):
    assert "No such file or directory" in unusable(forked, counters, tmp_path, tmp_path / "no")


def test_a_program_of_another_build(forked, counters, tmp_path):
    copy = tmp_path / "ipckit-spawner"
    data = Path(_spawner._PROGRAM).read_bytes()
    build = ffi.string(lib.ik_spawner_build())
    copy.write_bytes(data.replace(build, build[::-1]))
    copy.chmod(0o700)
    assert "is of another build of ipckit" in unusable(forked, counters, tmp_path, copy)


def test_run_by_hand_it_refuses():
    for arguments in ([], ["spawner"], ["spawner", "x", "3", "4", "5", "6"]):
        assert subprocess.run([_spawner._PROGRAM, *arguments], timeout=PATIENCE).returncode == 125


def test_standard_descriptors_may_be_closed(tmp_path):
    """A daemon that closed 0, 1 and 2: nothing of ours lies there."""
    script = (
        "import os, socket, sys, threading\n"
        "for fd in (0, 1, 2): os.close(fd)\n"
        "from ipckit._native import ffi\n"
        "from ipckit.servers.fork import ForkServer\n"
        "listener = socket.create_server(('127.0.0.1', 0))\n"
        "server = ForkServer(listener)\n"
        "def client():\n"
        "    with socket.create_connection(listener.getsockname()) as connection:\n"
        "        connection.sendall(b'x'); answer.append(connection.recv(1))\n"
        "    os.kill(os.getpid(), 15)\n"
        "answer = []\n"
        "import signal; signal.pthread_sigmask(signal.SIG_BLOCK, [15])\n"
        "thread = threading.Thread(target=client); thread.start()\n"
        "server.serve(); thread.join()\n"
        "sys.exit(answer != [b'x'])\n"
    )
    assert subprocess.run([sys.executable, "-c", script], timeout=PATIENCE).returncode == 0
