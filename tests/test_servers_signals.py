"""The signals of a server: whatever threads there are, whatever a service starts, from the first moment on."""

import contextlib
import fcntl
import os
import pty
import re
import select
import signal
import subprocess
import sys
import termios

import pytest
from conftest import PATIENCE, eventually
from serving import Served, exchange, slow_but, wait_cut

from ipckit.servers.terminal import Terminal

OURS = {signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGUSR1}

UPPER = """
from ipckit.servers import Service

class Upper(Service):
    def received(self, piece):
        return piece.upper()
"""

THREAD = """
import threading
threading.Thread(target=threading.Event().wait, daemon=True).start()
"""

STARTS = """
import subprocess
from ipckit.servers import Service

class Starts(Service):
    def received(self, piece):
        with subprocess.Popen(["sleep", "1000"]) as program:
            status = open(f"/proc/{program.pid}/status").read()
            program.terminate()
        lines = [line for line in status.splitlines() if line.startswith(("SigBlk", "SigIgn"))]
        return "{} {}\\n".format(program.returncode, " ".join(lines)).encode()
"""

FORKS = """
import multiprocessing, signal
from ipckit.servers import Service

class Forks(Service):
    def received(self, piece):
        child = multiprocessing.get_context("fork").Process(target=signal.pause)
        child.start()
        child.terminate()
        child.join()
        return b"%d\\n" % child.exitcode
"""


@pytest.fixture(params=slow_but("fork", "prefork", "thread", "epoll", "asyncio"))
def model(request):
    return request.param


def service(tmp_path, text, name):
    (tmp_path / "service.py").write_text(text)
    return "--service", f"{tmp_path}/service.py:{name}"


def bits(line):
    mask = int(re.search(rf"{line[0]}:\s+([0-9a-f]+)", line[1])[1], 16)
    return {number for number in range(1, 65) if mask >> (number - 1) & 1}


def told(server, event):
    return [fields for name, fields in server.events() if name == event]


# --- whatever threads there are ------------------------------------------------------------------


@pytest.mark.parametrize("threads", ["a thread", "numpy"])
def test_a_thread_that_was_there_before_does_no_harm(tmp_path, model, threads):
    if threads == "numpy":
        pytest.importorskip("numpy")
    options = service(tmp_path, ("import numpy" if threads == "numpy" else THREAD) + UPPER, "Upper")
    many = os.environ | {"OPENBLAS_NUM_THREADS": "4"}
    log = tmp_path / "log"
    with Served(log, "--json", *options, model=model, env=many) as server, server.connect() as client:
        assert exchange(client, b"one") == b"ONE"
        server.process.send_signal(signal.SIGUSR1)
        eventually(lambda: told(server, "statistics"))
        log.rename(tmp_path / "old")
        server.process.send_signal(signal.SIGHUP)
        eventually(lambda: told(server, "log reopened"))
        assert exchange(client, b"two") == b"TWO"
        assert server.stop()[0] == 0
        assert told(server, "stopping") and told(server, "stopped")
        wait_cut(client)
    assert ((tmp_path / "old").read_bytes(), log.read_bytes()) == (b"one", b"two")


def test_a_program_that_a_service_starts_can_be_terminated(tmp_path, model):
    options = service(tmp_path, STARTS, "Starts")
    with Served(tmp_path / "log", *options, model=model) as server, server.connect() as client:
        client.sendall(b"x")
        answer = client.makefile("r").readline()
        assert answer.startswith(f"-{int(signal.SIGTERM)} "), answer
        assert bits(("SigBlk", answer)) == set()
        assert bits(("SigIgn", answer)) & OURS == set()
        assert server.stop()[0] == 0


@pytest.mark.parametrize("model", ["fork", "epoll"])
def test_a_child_that_a_service_forks_can_be_terminated(tmp_path, model):
    options = service(tmp_path, FORKS, "Forks")
    with Served(tmp_path / "log", *options, model=model) as server, server.connect() as client:
        assert exchange(client, b"x", 4) == b"-15\n"
        assert server.stop()[0] == 0


def test_a_thread_that_does_not_end_can_be_ended_by_asking_twice(tmp_path):
    options = service(tmp_path, THREAD.replace("daemon=True", "daemon=False") + UPPER, "Upper")
    with Served(tmp_path / "log", *options, model="epoll") as server:
        server.process.send_signal(signal.SIGTERM)
        eventually(lambda: "served" in server.errors())
        eventually(lambda: server.process.send_signal(signal.SIGTERM) or server.process.poll() is not None)
        assert server.process.returncode == -signal.SIGTERM


# --- from the first moment on --------------------------------------------------------------------


SLOW = """
import subprocess, sys
program = subprocess.Popen(["sleep", "1000"])
print(open(f"/proc/{program.pid}/status").read(), flush=True)
program.kill()
program.wait()
print("loading", flush=True)
sys.stdin.read()
"""
STUBBORN = """
import sys
print("loading", flush=True)
while True:
    try:
        sys.stdin.read()
        break
    except BaseException:
        raised = True
"""


@contextlib.contextmanager
def loading(tmp_path, text):
    """A server whose service is being loaded, until its standard input ends; what that has said so far."""
    options = service(tmp_path, text + UPPER, "Upper")
    command = [sys.executable, "-m", "ipckit", "serve", "--port", "0", "--log", str(tmp_path / "log")]
    with subprocess.Popen(
        [*command, "--verbose", "--no-keyboard", "--model", "epoll", *options],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    ) as process:
        try:
            said = ""
            while "loading" not in said:
                said += process.stdout.readline()
                assert process.poll() is None
            yield process, said
        finally:
            process.kill()


@pytest.mark.parametrize("text", [SLOW, STUBBORN])
@pytest.mark.parametrize("signum", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_during_the_start_ends_it_in_order(tmp_path, signum, text):
    with loading(tmp_path, text) as (process, _):
        process.send_signal(signum)
        if text is STUBBORN:
            process.stdin.close()
        assert process.wait(PATIENCE) == 0
        assert process.stderr.read() == ""
    assert not (tmp_path / "log").exists()


def test_a_program_that_is_started_while_the_service_is_loaded_inherits_nothing(tmp_path):
    with loading(tmp_path, SLOW) as (process, said):
        assert bits(("SigBlk", said)) == set()
        assert bits(("SigIgn", said)) & OURS == set()
        process.send_signal(signal.SIGTERM)
        assert process.wait(PATIENCE) == 0


def test_what_else_comes_during_the_start_is_done_after_it(tmp_path):
    with loading(tmp_path, SLOW) as (process, _):
        process.send_signal(signal.SIGUSR1)
        process.send_signal(signal.SIGHUP)
        process.stdin.close()
        said = ""
        while "statistics" not in said or "is open again" not in said:
            said += process.stderr.readline()
            assert process.poll() is None, said
        process.terminate()
        assert process.wait(PATIENCE) == 0


# --- what was there before -----------------------------------------------------------------------


PROGRAM = """if 1:
    import faulthandler, os, signal, sys, threading, time
    from ipckit import signals
    from ipckit.servers import listen, server

    NUMBERS = [signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGUSR1]

    def now():
        kernel = {number: signals._kernel_action(number) for number in NUMBERS}
        return {
            number: (signal.getsignal(number), kernel[number].handler, kernel[number].mask, kernel[number].flags)
            for number in NUMBERS
        }, signal.pthread_sigmask(signal.SIG_BLOCK, ())

    def stop_soon(server):
        while server.loop.handlers == {}:
            time.sleep(0.001)
        server.stop()
"""


def run(text):
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM + text], capture_output=True, text=True, timeout=PATIENCE
    )
    assert (done.returncode, done.stderr) == (0, ""), done
    return done.stdout


def test_serve_puts_back_exactly_what_was_there():
    run("""
    signal.signal(signal.SIGTERM, lambda *_: None)
    signals.sigaction(signal.SIGHUP, print, mask=[signal.SIGUSR2], flags=signals.SA_RESTART, info=True)
    faulthandler.register(signal.SIGUSR1)
    signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGHUP])
    before = now()
    for model in ("epoll", "fork"):
        served = server(model, listen())
        threading.Thread(target=stop_soon, args=[served]).start()
        served.serve()
        assert now() == before
    """)


def test_a_signal_blocked_by_the_caller_ends_it():
    """What the examples do: none comes between their start and serve()."""
    run("""
    with signals.blocked([signal.SIGTERM]):
        os.kill(os.getpid(), signal.SIGTERM)
        served = server("epoll", listen())
        served.serve()
    """)


def test_in_another_thread_it_takes_no_signals_and_stop_ends_it():
    run("""
    before = now()
    for model in ("epoll", "fork", "asyncio", "thread"):
        served = server(model, listen())
        thread = threading.Thread(target=served.serve)
        thread.start()
        stop_soon(served)
        assert now() == before
        thread.join()
    """)


# --- a terminal ----------------------------------------------------------------------------------


SERVE = "{python} -m ipckit serve --port 0 --no-keyboard --model epoll --json --log {path}/log"
INTO = " >{path}/events 2>{path}/errors </dev/null"


class Bash:
    """An interactive bash on a terminal of its own."""

    def __init__(self, path, options=()):
        self.path = path
        self.pid, self.fd = pty.fork()
        if self.pid == 0:
            os.environ["PS1"] = "ready$ "
            os.execvp("bash", ["bash", "--norc", "--noprofile", *options, "-i"])
        self.closed = False

    def say(self, line):
        os.write(self.fd, line.encode() + b"\n")

    def serve(self, how):
        """Start a server; its process, when it serves."""
        self.say(how.format(serve=SERVE, into=INTO).format(python=sys.executable, path=self.path))
        events = self.path / "events"
        eventually(lambda: events.exists() and '"listening"' in self._drained(events))
        return int(re.search(r'"pid": (\d+)', events.read_text())[1])

    def _drained(self, file):
        with contextlib.suppress(OSError):  # EIO: nobody has it open now, but it is still theirs
            while select.select([self.fd], [], [], 0)[0]:
                os.read(self.fd, 65536)
        return file.read_text()

    def close(self):
        if not self.closed:
            self.closed = True
            os.close(self.fd)

    def __enter__(self):
        return self

    def __exit__(self, *exc):
        self.close()
        with contextlib.suppress(ProcessLookupError):
            os.kill(self.pid, signal.SIGKILL)
        os.waitpid(self.pid, 0)


@contextlib.contextmanager
def at_bash(tmp_path, how, *options):
    with Bash(tmp_path, options) as terminal:
        pid = terminal.serve(how)
        pidfd = os.pidfd_open(pid)
        try:
            yield terminal, pid
        finally:
            with contextlib.suppress(ProcessLookupError):
                signal.pidfd_send_signal(pidfd, signal.SIGKILL)
            select.select([pidfd], [], [], PATIENCE)
            os.close(pidfd)


def has(tmp_path, event):
    return [line for line in (tmp_path / "events").read_text().splitlines() if f'"event": "{event}"' in line]


@pytest.mark.parametrize(
    "how", ["{serve}{into}", "{serve}{into} &", "({serve}{into}) &", "exec {serve}{into}"]
)
def test_a_terminal_that_closes_ends_what_was_started_there(tmp_path, how):
    with at_bash(tmp_path, how) as (terminal, _):
        terminal.close()
        eventually(lambda: has(tmp_path, "stopped"))
        eventually(lambda: has(tmp_path, "served"))


@pytest.mark.parametrize("how", ["nohup {serve}{into} &", "setsid {serve}{into} &"])
def test_not_what_was_told_to_go_on(tmp_path, how):
    with at_bash(tmp_path, how) as (terminal, pid):
        terminal.close()
        wait_shell(terminal)
        os.kill(pid, signal.SIGHUP)
        if how.startswith("setsid"):
            eventually(lambda: has(tmp_path, "log reopened"))
        os.kill(pid, signal.SIGUSR1)
        eventually(lambda: has(tmp_path, "statistics"))
        assert bool(has(tmp_path, "log reopened")) == how.startswith("setsid")
        assert not has(tmp_path, "stopping")
        os.kill(pid, signal.SIGTERM)
        eventually(lambda: has(tmp_path, "stopped"))


def wait_shell(terminal):
    """Until bash has ended, with all that it tells its jobs."""
    pidfd = os.pidfd_open(terminal.pid)
    assert select.select([pidfd], [], [], PATIENCE)[0]
    os.close(pidfd)


@pytest.mark.parametrize("how", ["{serve}{into}", "{serve}{into} &"])
def test_while_the_terminal_is_there_sighup_is_about_the_log(tmp_path, how):
    with at_bash(tmp_path, how) as (terminal, pid):
        for count in (1, 2):
            os.kill(pid, signal.SIGHUP)
            eventually(lambda count=count: len(has(tmp_path, "log reopened")) == count)
        os.kill(pid, signal.SIGUSR1)
        eventually(lambda: has(tmp_path, "statistics"))
        assert not has(tmp_path, "stopping")
        terminal.close()
        eventually(lambda: has(tmp_path, "stopped"))


def test_a_shell_that_was_killed_takes_what_ran_in_front_with_it(tmp_path):
    """The kernel's SIGHUP comes before the terminal is taken away, which itself lives on."""
    with at_bash(tmp_path, "{serve}{into}") as (terminal, _):
        os.kill(terminal.pid, signal.SIGKILL)
        eventually(lambda: has(tmp_path, "stopped"))


def test_a_shell_that_sends_its_jobs_nothing_leaves_the_server_be(tmp_path):
    with at_bash(tmp_path, "{serve}{into} & disown") as (terminal, pid):
        terminal.close()
        wait_shell(terminal)
        os.kill(pid, signal.SIGUSR1)
        eventually(lambda: has(tmp_path, "statistics"))
        assert not has(tmp_path, "stopping")
        os.kill(pid, signal.SIGTERM)
        eventually(lambda: has(tmp_path, "stopped"))


def test_who_outlives_its_terminal_without_a_sighup_is_a_daemon(forked):
    def target(ready):
        ours, theirs = os.openpty()
        os.setsid()
        signal.signal(signal.SIGHUP, signal.SIG_IGN)
        before = Terminal()
        assert not before.was_there and not before.is_lost()
        fcntl.ioctl(theirs, termios.TIOCSCTTY, 0)
        terminal = Terminal()
        terminal.look()
        assert terminal.was_there and not terminal.is_lost()
        os.close(ours)
        assert terminal.is_lost()
        terminal.look()
        assert terminal.is_lost(), "a SIGHUP may be on its way"
        terminal.look()
        assert not terminal.is_lost()

    assert forked(target).wait() == 0
