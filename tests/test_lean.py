"""Lean forks: what the child has, what it costs nobody else, and who else may fork meanwhile."""

import mmap
import os
import re
import signal
import subprocess
import sys
import threading
from pathlib import Path

import pytest
from conftest import PATIENCE

from ipckit._native import ffi, lib
from ipckit.messagelog import MessageLog
from ipckit.process import NativeMemory, fork_native


def mappings(pid, flag=None):
    """The mappings of a process: (start, end, name); only those with a VmFlag, if one is named."""
    found, head = [], None
    for line in Path(f"/proc/{pid}/smaps").read_text().splitlines():
        if match := re.match(r"([0-9a-f]+)-([0-9a-f]+) (....) \S+ \S+ \S+ *(.*)", line):
            head = (int(match[1], 16), int(match[2], 16), match[4])
        elif line.startswith("VmFlags:") and (flag is None or f" {flag}" in line):
            found.append(head)
    return found


def size(pid):
    return sum(end - start for start, end, _ in mappings(pid))


@pytest.fixture
def log(tmp_path):
    """A log: its logger is a lean child that lives as long as we look at it."""
    with MessageLog(tmp_path / "log") as log:
        yield log


def test_the_child_has_not_our_memory_but_what_it_needs(log):
    large = bytearray(100 << 20)
    log.logger.kill()
    log.logger.wait()
    log.supervise()
    assert size(log.logger.pid) < 16 << 20 < len(large)
    names = {name for _, _, name in mappings(log.logger.pid)}
    assert any("_native" in name for name in names)
    assert "[stack]" in names
    assert not any("libpython" in name or "_cffi_backend" in name for name in names)
    log.append(b"works")


def test_other_forks_of_the_process_have_everything(log, forked):
    assert mappings("self", "dc"), "marked by the fork of the logger"
    data = bytearray(b"all of it" * 100_000)

    def child(ready):
        import json  # allocates, imports, runs

        assert data == b"all of it" * 100_000
        assert json.loads("[1]") == [1]
        assert not mappings("self", "dc")

    assert forked(child).wait() == 0
    assert subprocess.run([sys.executable, "-c", "pass"], timeout=PATIENCE).returncode == 0
    assert subprocess.run(["true"], preexec_fn=lambda: None, timeout=PATIENCE).returncode == 0
    log.append(b"works")


def test_marks_of_others_are_left_alone(forked, tmp_path):
    """Memory that somebody marked MADV_DONTFORK (as drivers do) stays marked after our unmarking."""

    def child(ready):
        import mmap

        theirs = mmap.mmap(-1, 1 << 20, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        theirs.madvise(mmap.MADV_DONTFORK)
        start = int(ffi.cast("uintptr_t", ffi.from_buffer(theirs)))

        def marked():
            return [m for m in mappings("self", "dc") if m[0] <= start < m[1]]

        assert marked()
        with MessageLog(tmp_path / "log"):
            assert len(mappings("self", "dc")) > 1
            if os.fork() == 0:
                os._exit(0)
            os.wait()
            assert marked()
            assert len(mappings("self", "dc")) == 1

    assert forked(child).wait() == 0


def test_from_several_threads_beside_ordinary_forks():
    """In a process of its own: lean forks and Python's forks race, and every child works."""
    script = """
import mmap, os, threading, warnings
from ipckit._native import ffi, lib
from ipckit.process import NativeMemory, fork_native
warnings.simplefilter("ignore")
memory = NativeMemory("ik_log")
echo = ffi.addressof(lib, "ik_connection_child")
bad = []
def lean():
    job = NativeMemory("ik_connection_job")
    shared = mmap.mmap(-1, ffi.sizeof("ik_server_counters"))
    job.argument.connection.counters = ffi.from_buffer("ik_server_counters *", shared)
    for _ in range(40):
        left, right = os.pipe()  # not a socket: the service ends with "reset" at once
        job.argument.connection.socket = left
        with fork_native(echo, job.argument, keep=[left], memory=job) as child:
            if child.wait(120).code != lib.IK_END_RESET: bad.append(child.status)
        os.close(left); os.close(right)
def plain():
    for _ in range(20):
        pid = os.fork()
        if pid == 0:
            os._exit(7 if sum([int(x) for x in "1 2 3".split()]) == 6 else 8)
        if os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) != 7: bad.append("plain")
threads = [threading.Thread(target=t) for t in (lean, lean, plain)]
for t in threads: t.start()
for t in threads: t.join()
assert not bad, bad
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=PATIENCE)
    assert (done.returncode, done.stderr) == (0, "")


def test_the_argument_is_the_child_s_own_copy(log):
    job = NativeMemory("ik_connection_job")
    left, right = os.pipe()
    shared = mmap.mmap(-1, ffi.sizeof("ik_server_counters"))
    job.argument.connection.counters = ffi.from_buffer("ik_server_counters *", shared)
    job.argument.connection.socket = left
    child = fork_native(ffi.addressof(lib, "ik_connection_child"), job.argument, keep=[left], memory=job)
    job.argument.connection.socket = -1
    assert child.wait(PATIENCE).code == lib.IK_END_RESET
    child.close()
    for fd in (left, right):
        os.close(fd)


def test_too_many_descriptors():
    job = NativeMemory("ik_connection_job")
    fds = [os.open("/dev/null", os.O_RDONLY) for _ in range(65)]
    with pytest.raises(ValueError, match="at most 64 descriptors with memory, not 65"):
        fork_native(ffi.addressof(lib, "ik_connection_child"), job.argument, keep=fds, memory=job)
    for fd in fds:
        os.close(fd)


def test_a_thread_s_stack_is_kept_for_its_own_fork(tmp_path):
    script = (
        "import threading, sys\nfrom ipckit.messagelog import MessageLog\n"
        "def work():\n    with MessageLog(sys.argv[1]) as log:\n        log.append(b'from a thread')\n"
        "thread = threading.Thread(target=work)\nthread.start()\nthread.join()\n"
        "work()\n"
    )
    path = tmp_path / "log"
    subprocess.run([sys.executable, "-c", script, str(path)], check=True, timeout=PATIENCE)
    assert path.read_bytes() == b"from a thread" * 2


def test_signals_come_to_a_lean_child_as_to_any(log):
    former = signal.signal(signal.SIGUSR1, lambda *_: None)  # a handler that the child must not inherit
    try:
        log.logger.send_signal(signal.SIGUSR1)
        log.append(b"still here")
        assert log.logger.poll() is None
    finally:
        signal.signal(signal.SIGUSR1, former)
    assert threading.active_count() == 1
