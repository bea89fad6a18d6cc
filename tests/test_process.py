import asyncio
import contextlib
import errno
import fcntl
import os
import select
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import numpy as np
import pytest
from cffi import FFI
from conftest import ISOLATED, PATIENCE, eventually, open_descriptors
from making import NEW_PID, unshare

from ipckit import signals
from ipckit._native import ffi
from ipckit.errors import Closed
from ipckit.process import ExitStatus, Reaper, die_with_parent, fork, fork_native, wait_any

libc = FFI()
libc.cdef("int pause(void); int raise(int); void _exit(int);")


def native(name):
    """A function of the C library, as the ``int main(void *)`` that fork_native takes."""
    address = libc.cast("intptr_t", getattr(libc.dlopen(None), name))
    return ffi.cast("int (*)(void *)", int(address))


def script(text, *, arguments=()):
    """Run *text* in an interpreter of its own; what it printed, and that it had nothing to say on stderr."""
    command = [sys.executable, "-c", text, *arguments]
    done = subprocess.run(command, capture_output=True, text=True, timeout=PATIENCE)
    assert (done.returncode, done.stderr) == (0, ""), done
    return done.stdout


@pytest.fixture
def pipe():
    reader, writer = os.pipe()
    yield reader, writer
    os.close(reader)
    os.close(writer)


def told(reader, size=1):
    """What a child wrote; a child that never does fails the test by its time limit."""
    return os.read(reader, size)


def tell_and_pause(writer):
    os.write(writer, b".")
    signal.pause()


# --- how it ended ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("result", "code"), [(None, 0), (0, 0), (3, 3), (np.uint8(7), 7), (True, 1), (255, 255), (-1, 255)]
)
def test_the_exit_code_is_what_the_target_returns(result, code):
    with fork(lambda: result) as child:
        status = child.wait(PATIENCE)
    assert (status.exited, status.code, status.signaled, status.signal, status.core) == (
        (True, code, False, None, False)
    )
    assert (True, code, False) == (status.WIFEXITED, status.WEXITSTATUS, status.WIFSIGNALED)
    assert str(status) == f"exited with {code}"


@pytest.mark.parametrize(("code", "expected"), [(None, 0), (4, 4), ("said", 1)])
def test_system_exit_is_honoured(capfd, code, expected):
    with fork(sys.exit, code) as child:
        assert child.wait(PATIENCE).code == expected
    assert capfd.readouterr().err == ("said\n" if code == "said" else "")


def test_an_exception_prints_its_traceback(capfd):
    with fork(lambda: 1 / 0) as child:
        assert child.wait(PATIENCE).code == 1
    assert "ZeroDivisionError: division by zero" in capfd.readouterr().err


def test_any_other_result_is_an_error(capfd):
    with fork(lambda: "text") as child:
        assert child.wait(PATIENCE).code == 1
    assert "must return None or an exit code, not 'text'" in capfd.readouterr().err


@pytest.mark.parametrize("signum", [signal.SIGKILL, signal.SIGTERM, signal.SIGINT, signal.SIGRTMIN + 1])
def test_a_child_killed_by_a_signal(signum):
    with fork(signal.pause) as child:
        child.send_signal(signum)
        status = child.wait(PATIENCE)
    assert (status.exited, status.code, status.signaled, status.signal) == (False, None, True, signum)
    assert (True, signum, False) == (status.WIFSIGNALED, status.WTERMSIG, status.WCOREDUMP)
    assert str(status).startswith("killed by SIG")
    assert status == ExitStatus(signum)


def test_a_core_dump_is_told(tmp_path):
    assert str(ExitStatus(signal.SIGSEGV | 0x80)) == "killed by SIGSEGV (core dumped)"
    assert str(ExitStatus(signal.SIGRTMIN + 1)) == "killed by SIGRTMIN+1"
    with pytest.raises(AttributeError):
        ExitStatus(0).raw = 1


def test_stopping_is_not_ending():
    with fork(signal.pause) as child:
        child.send_signal(signal.SIGSTOP)
        eventually(lambda: Path(f"/proc/{child.pid}/stat").read_text().split()[2] == "T")
        assert child.poll() is None
        child.kill()
        assert child.wait(PATIENCE).signal == signal.SIGKILL


# --- waiting ---------------------------------------------------------------------------------------


def test_poll_wait_and_fileno(pipe):
    reader, writer = pipe
    with fork(os.read, reader, 1) as child:
        assert child.poll() is None
        assert child.status is None
        start = time.monotonic()
        with pytest.raises(TimeoutError, match=f"child {child.pid} still runs") as caught:
            child.wait(0.05)
        assert caught.value.errno == errno.ETIMEDOUT
        assert time.monotonic() - start >= 0.05
        assert select.select([child], [], [], 0)[0] == []
        assert repr(child) == f"<Child {child.pid}: not waited for>"
        os.write(writer, b".")
        assert select.select([child], [], [], PATIENCE)[0] == [child]
        assert child.pidfd == child.fileno()
        assert not os.get_inheritable(child.fileno())
        assert child.poll() is child.wait() is child.status
        assert repr(child) == f"<Child {child.pid}: exited with 1>"  # bytes are no exit code


def test_waiting_in_asyncio(pipe):
    reader, writer = pipe

    async def both():
        with fork(told_then, reader, 5) as child:
            with pytest.raises(TimeoutError, match=f"child {child.pid} still runs"):
                await child.await_exit(0.01)
            asyncio.get_running_loop().call_later(0.01, os.write, writer, b".")
            return await asyncio.gather(child.await_exit(PATIENCE), child.await_exit())

    first, second = asyncio.run(both())
    assert first is second
    assert first.code == 5


def told_then(reader, code):
    told(reader)
    return code


def test_wait_any_takes_the_first_to_end(pipe):
    reader, _ = pipe
    with fork(told, reader, 0) as ended, fork(told_then, reader, 1) as other:
        assert ended.wait(PATIENCE).code == 1
        assert wait_any([other, ended])[0] is ended
        with pytest.raises(TimeoutError, match="none of 1 children ended") as caught:
            wait_any([other], timeout=0.01)
        assert caught.value.errno == errno.ETIMEDOUT
        other.kill()
        child, status = wait_any(iter([other]), timeout=PATIENCE)
        assert (child, status.signal) == (other, signal.SIGKILL)
    with pytest.raises(ValueError, match="at least one child"):
        wait_any([])


def test_two_threads_that_wait_both_get_the_status(pipe):
    reader, writer = pipe
    got = []
    for _ in range(20):
        with fork(told_then, reader, 9) as child:
            threads = [threading.Thread(target=lambda: got.append(child.wait(PATIENCE))) for _ in range(4)]
            for thread in threads:
                thread.start()
            os.write(writer, b".")
            for thread in threads:
                thread.join()
    assert [status.code for status in got] == [9] * 80


def test_handlers_of_signals_run_while_waiting():
    seen = []

    def handler(*_):
        seen.append(1)
        if len(seen) == 3:
            child.kill()  # only this lets wait() return

    former = signal.signal(signal.SIGALRM, handler)
    try:
        with fork(signal.pause) as child:
            timer = signal.setitimer(signal.ITIMER_REAL, 0.01, 0.01)
            try:
                assert child.wait().signal == signal.SIGKILL
            finally:
                signal.setitimer(signal.ITIMER_REAL, *timer)
    finally:
        signal.signal(signal.SIGALRM, former)
    assert len(seen) >= 3


def test_a_child_reaped_by_somebody_else():
    with pytest.raises(ChildProcessError, match="reaped by somebody else") as caught, fork(int) as child:
        os.waitpid(child.pid, 0)
        with pytest.raises(ProcessLookupError, match=f"signal 15 to child {child.pid}") as signalled:
            child.terminate()
        assert signalled.value.errno == errno.ESRCH
    assert caught.value.errno == errno.ECHILD
    assert f"child {child.pid} " in str(caught.value)


def test_a_child_is_its_parents_only():
    def in_a_sibling(child, parent):
        with pytest.raises(ChildProcessError, match=f"{child.pid} belongs to process {parent}, and this is"):
            child.poll()
        child.kill()  # which anybody may who holds the pidfd

    with fork(signal.pause) as child:
        with fork(in_a_sibling, child, os.getpid()) as sibling:
            assert sibling.wait(PATIENCE).code == 0
        assert child.wait(PATIENCE).signal == signal.SIGKILL


def test_signals_to_a_child():
    with fork(signal.pause) as child:
        with pytest.raises(OSError, match=f"signal 12345 to child {child.pid}") as caught:
            child.send_signal(12345)
        assert caught.value.errno == errno.EINVAL
        child.terminate()
        child.wait(PATIENCE)
        child.terminate()  # nothing, and nobody else


def test_after_close():
    child = fork(int)
    child.wait(PATIENCE)
    child.close()
    child.close()
    assert child.poll().code == 0, "the status stays"
    with pytest.raises(Closed, match=f"child {child.pid} is closed"):
        child.fileno()
    child = fork(int)
    child.close()
    with pytest.raises(Closed):
        child.wait()
    with pytest.raises(Closed):
        child.kill()
    os.waitpid(child.pid, 0)


def test_a_forgotten_child_is_a_warning():
    with pytest.warns(ResourceWarning, match=r"child \d+ was never waited for"):
        os.waitpid(fork(int).pid, 0)


def test_a_with_block_waits_even_after_an_exception(pipe):
    reader, writer = pipe
    with pytest.raises(ZeroDivisionError), fork(told_then, reader, 3) as child:
        os.write(writer, b".")
        raise ZeroDivisionError
    assert child.status.code == 3


# --- what a child starts with ----------------------------------------------------------------------


def test_output_is_flushed_once(tmp_path):
    text = """if 1:
        import sys
        from ipckit.process import fork
        print("before")
        def child():
            print("child")
            sys.stderr.write("")
        for target in child, child:
            with fork(target) as process:
                process.wait()
        print("after")
    """
    with open(tmp_path / "out", "w+") as out:  # a file, so that Python buffers blocks
        buffering = {**os.environ, "PYTHONUNBUFFERED": ""}
        subprocess.run([sys.executable, "-c", text], stdout=out, env=buffering, check=True, timeout=PATIENCE)
        out.seek(0)
        assert out.read() == "before\nchild\nchild\nafter\n"


def test_fork_without_standard_streams():
    script(
        """if 1:
        import sys
        from ipckit.process import fork
        sys.stdout.close()
        sys.stderr = None
        with fork(lambda: 6) as child:
            assert child.wait().code == 6
        """
    )


def dispositions():
    """The mask, and what is ignored and caught, as the kernel has them."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return {
        line[:6]: int(line.split()[1], 16)
        for line in lines
        if line.startswith(("SigBlk", "SigIgn", "SigCgt"))
    }


def bit(signum):
    return 1 << (signum - 1)


def test_the_parents_handlers_do_not_run_in_the_child(pipe):
    reader, writer = pipe

    def child(mask):
        now = dispositions()
        assert now["SigBlk"] == mask
        assert not now["SigCgt"] & (bit(signal.SIGUSR1) | bit(signal.SIGINT) | bit(signal.SIGALRM))
        assert now["SigIgn"] & bit(signal.SIGUSR2)
        assert now["SigCgt"] & bit(signal.SIGTERM)
        assert signal.getsignal(signal.SIGUSR1) is signal.SIG_DFL
        os.write(writer, b".")
        signal.pause()

    seen = []
    former = signal.signal(signal.SIGUSR1, lambda *_: seen.append(1))
    former2 = signal.signal(signal.SIGUSR2, signal.SIG_IGN)
    signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGWINCH])
    try:
        before = dispositions()
        with fork(child, before["SigBlk"], handlers={signal.SIGTERM: lambda *_: os._exit(8)}) as forked:
            assert dispositions() == before
            told(reader)
            forked.terminate()
            assert forked.wait(PATIENCE).code == 8
    finally:
        signal.pthread_sigmask(signal.SIG_UNBLOCK, [signal.SIGWINCH])
        signal.signal(signal.SIGUSR1, former)
        signal.signal(signal.SIGUSR2, former2)
    assert not seen


@pytest.mark.parametrize(
    ("handler", "code", "signum"),
    [(signal.default_int_handler, 1, None), (signal.SIG_IGN, 0, None), (signal.SIG_DFL, None, signal.SIGINT)],
)
def test_given_handlers_are_there_before_the_first_signal(capfd, handler, code, signum):
    with fork(signal.raise_signal, signal.SIGINT, handlers={signal.SIGINT: handler}) as child:
        status = child.wait(PATIENCE)
    assert (status.code, status.signal) == (code, signum)


def test_bad_handlers_and_descriptors():
    with pytest.raises(ValueError, match="signal 9 can't have a handler"):
        fork(int, handlers={signal.SIGKILL: signal.SIG_IGN})
    with pytest.raises(ValueError, match="signal 1000"):
        fork(int, handlers={1000: signal.SIG_IGN})
    with pytest.raises(TypeError, match="handler of signal 15 must be callable"):
        fork(int, handlers={signal.SIGTERM: "no"})
    with pytest.raises(ValueError, match="keep must be an integer >= 0, not -1"):
        fork(int, keep=[-1])
    with pytest.raises(TypeError, match="keep must be an integer, not 'no'"):
        fork_native(native("pause"), ffi.NULL, keep=["no"])
    with pytest.raises(TypeError):
        fork_native(len, ffi.NULL)


def test_the_wakeup_descriptor_stays_the_parents(pipe):
    reader, writer = pipe
    os.set_blocking(writer, False)
    os.set_blocking(reader, False)
    former = signal.set_wakeup_fd(writer)
    try:
        with fork(signal.raise_signal, signal.SIGTERM, handlers={signal.SIGTERM: lambda *_: None}) as child:
            assert child.wait(PATIENCE).code == 0
        with pytest.raises(BlockingIOError):
            os.read(reader, 1)
    finally:
        signal.set_wakeup_fd(former)


def released(number):
    return fcntl.fcntl(number, fcntl.F_GETFL) & os.O_PATH


def test_keep_releases_all_other_descriptors(pipe, tmp_path):
    reader, writer = pipe

    def child(file):
        with pytest.raises(OSError) as caught:
            os.read(reader, 1)
        assert caught.value.errno == errno.EBADF
        usable = {number for number in open_descriptors() if number > 2 and not released(number)}
        standard = {sys.stdout.fileno(), sys.stderr.fileno()} - {1, 2}  # pytest's
        assert usable == {writer} | standard
        with open(tmp_path / "other", "w") as other:  # a new file gets a number that nobody owns
            file.close()
            other.write("whole")
        os.write(writer, b".")

    with open(tmp_path / "file", "w") as file, fork(child, file, keep=[writer]) as process:
        assert process.wait(PATIENCE).code == 0
        file.write("the parent's still works")
    assert (tmp_path / "other").read_text() == "whole"
    assert told(reader) == b"."


def test_keep_takes_objects_and_none_keeps_all(pipe):
    reader, writer = pipe
    with open(writer, "wb", buffering=0, closefd=False) as file:
        for keep in (None, [file], {writer, 0}):
            with fork(os.write, writer, b"x", keep=keep) as child:
                child.wait(PATIENCE)
            assert told(reader) == b"x"


# --- native children -------------------------------------------------------------------------------


def test_a_native_child_exits_with_what_main_returns():
    with fork_native(native("_exit"), ffi.cast("void *", 7)) as child:
        assert child.wait(PATIENCE).code == 7
    with fork_native(native("raise"), ffi.cast("void *", int(signal.SIGKILL))) as child:
        assert str(child.wait(PATIENCE)) == "killed by SIGKILL"


def test_a_native_child_starts_with_signals_blocked_and_little_open(pipe):
    _, writer = pipe
    with fork_native(native("pause"), ffi.NULL, keep=[writer, writer, 1]) as child:
        eventually(lambda: {int(n) for n in os.listdir(f"/proc/{child.pid}/fd")} <= {0, 1, 2, writer})
        child.terminate()
        with pytest.raises(TimeoutError, match=f"child {child.pid} still runs"):
            child.wait(0.01)
        child.kill()
        assert child.wait(PATIENCE).signal == signal.SIGKILL


def test_native_children_of_a_threaded_process():
    stop = threading.Event()
    threads = [threading.Thread(target=lambda: [bytes(1000) for _ in iter(stop.is_set, True)])]
    for thread in threads:
        thread.start()
    try:
        for code in range(10):
            with fork_native(native("_exit"), ffi.cast("void *", code)) as child:
                assert child.wait(PATIENCE).code == code
    finally:
        stop.set()
        for thread in threads:
            thread.join()


# --- signals that come early, parents that go ------------------------------------------------------


@pytest.mark.parametrize("handler", [None, lambda *_: os._exit(0)])
def test_a_signal_right_after_the_fork_is_not_lost(handler):
    """gunicorn #1910: between the fork and the child's handlers a SIGTERM met the parent's handler."""
    seen = []
    former = signal.signal(signal.SIGTERM, lambda *_: seen.append(1))
    handlers = {signal.SIGTERM: handler} if handler else None
    try:
        for attempt in range(60):
            with fork(pause_for_ever, handlers=handlers) as child:
                busy_for(attempt * 80e-6)  # 0 to 5 ms after the fork
                child.terminate()
                status = child.wait(PATIENCE)
            assert (status.code, status.signal) == ((0, None) if handler else (None, signal.SIGTERM))
    finally:
        signal.signal(signal.SIGTERM, former)
    assert not seen


def pause_for_ever():
    while True:  # not pause(): a signal just before it would have its handler wait for the next one
        time.sleep(0.05)


def busy_for(seconds):
    end = time.perf_counter() + seconds
    while time.perf_counter() < end:
        pass


def alive(pids):
    return [pid for pid in pids if Path(f"/proc/{pid}").exists() and state(pid) not in "ZX"]


def state(pid):
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0]
    except (FileNotFoundError, ProcessLookupError):
        return "X"


def hold(writer):
    """Keep *writer* open until killed, whatever comes: its end of file is the proof of the end."""
    for signum in (signal.SIGTERM, signal.SIGHUP, signal.SIGINT):
        signal.signal(signum, signal.SIG_IGN)
    os.write(writer, b".")
    pause_for_ever()


def test_children_die_with_a_parent_that_is_killed(pipe):
    reader, writer = pipe

    def parent():
        children = [fork(hold, writer, die_with_parent=True) for _ in range(10)]
        children += [fork_native(native("pause"), ffi.NULL, keep=[writer]) for _ in range(10)]
        wait_any(children)

    with fork(parent) as child:
        for _ in range(10):
            told(reader)
        eventually(lambda: len(children_of(child.pid)) == 20)
        orphans = children_of(child.pid)
        child.kill()
        eventually(lambda: not alive(orphans))


def children_of(pid):
    return [int(word) for word in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


@pytest.mark.proof
def test_children_die_with_a_parent_killed_just_after_the_fork():
    """The parent ends before, while and after the child asks the kernel for its signal."""
    rounds = 1000 if os.environ.get("IPCKIT_PROOF") == "1" else 60
    for attempt in range(rounds):
        reader, writer = os.pipe()

        def parent(writer=writer, native_child=attempt % 2):
            if native_child:
                fork_native(native("pause"), ffi.NULL, keep=[writer])
            else:
                fork(hold, writer, keep=[writer], die_with_parent=True)
            os.kill(os.getpid(), signal.SIGKILL)

        with fork(parent) as child:
            os.close(writer)
            assert child.wait(PATIENCE).signal == signal.SIGKILL
            while select.select([reader], [], [], PATIENCE)[0] and os.read(reader, 1):
                pass
            assert select.select([reader], [], [], 0)[0], "an orphan still holds the pipe"
        os.close(reader)


def test_die_with_parent_by_hand(pipe):
    reader, writer = pipe

    def child(parent):
        die_with_parent(signal.SIGTERM, parent)
        tell_and_pause(writer)

    def parent():
        fork(child, os.getpid())
        pause_for_ever()

    with fork(parent) as process:
        told(reader)
        orphans = children_of(process.pid)
        process.kill()
        process.wait(PATIENCE)
        eventually(lambda: not alive(orphans))
    with fork(child, os.getppid()) as orphan:  # its parent is not the one it saw: gone
        assert orphan.wait(PATIENCE).signal == signal.SIGTERM
    with pytest.raises(OSError, match="die_with_parent by signal 1000") as caught:
        die_with_parent(1000)
    assert caught.value.errno == errno.EINVAL


# --- forks that fail, and SIGCHLD ignored ----------------------------------------------------------


LIMITED = """if 1:
    import errno, os, resource, signal
    from ipckit._native import ffi, lib
    from ipckit.process import Reaper, fork, fork_native
    def state():
        status = open("/proc/self/status").read()
        masks = [line for line in status.splitlines() if line.startswith(("SigB", "SigI", "SigC"))]
        return masks, sorted(os.listdir("/proc/self/fd"))
    def refused(call, error, text):
        before = state()
        limit()
        try:
            call()
        except error as caught:
            assert text in str(caught), caught
            number = caught.errno
        else:
            raise AssertionError("not refused")
        unlimit()
        assert state() == before
        try:
            os.waitpid(-1, os.WNOHANG)
        except ChildProcessError:
            return number
        raise AssertionError("a child is left")
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)
    calls = [lambda: fork(int), lambda: fork_native(ffi.NULL, ffi.NULL)]
"""


def test_no_room_for_another_process():
    script(
        LIMITED
        + """
    def limit(): resource.setrlimit(resource.RLIMIT_NPROC, (0, 0))
    def unlimit(): pass
    if os.getuid() == 0:  # who is exempt
        os.setgroups([]), os.setgid(65534), os.setuid(65534)
    for call in calls:
        assert refused(call, BlockingIOError, "the limit of processes is reached") == errno.EAGAIN
    """
    )


def test_no_descriptor_for_the_pidfd():
    script(
        LIMITED
        + """
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    def limit(): resource.setrlimit(resource.RLIMIT_NOFILE, (3, hard))
    def unlimit(): resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
    for call in calls:
        assert refused(call, OSError, "no descriptor left for the pidfd") == errno.EMFILE
    def limit(): pass
    os.register_at_fork(after_in_parent=lambda: resource.setrlimit(resource.RLIMIT_NOFILE, (3, hard)))
    assert refused(calls[0], OSError, "no descriptor left for the pidfd") == errno.EMFILE
    """
    )


def test_an_exception_just_before_the_fork():
    script(
        LIMITED
        + """
    import sys
    forbidden = False
    def audit(event, _):
        if forbidden and event == "os.fork":
            raise PermissionError(errno.EPERM, "forbidden here")
    sys.addaudithook(audit)
    def limit(): global forbidden; forbidden = True
    def unlimit(): global forbidden; forbidden = False
    assert refused(calls[0], PermissionError, "forbidden here") == errno.EPERM
    """
    )


def test_an_exception_of_a_handler_just_after_the_fork_leaves_no_child():
    """The signal comes when the child is there, and its handler runs before fork() could return."""
    text = """if 1:
        import os, signal, time
        from ipckit.process import fork
        class Raised(Exception): pass
        def handler(*_): raise Raised
        signal.signal(signal.SIGUSR1, handler)
        os.register_at_fork(after_in_parent=lambda: os.kill(os.getpid(), signal.SIGUSR1))
        before = os.listdir("/proc/self/fd")
        try: fork(time.sleep, 1000)
        except Raised: pass
        else: raise AssertionError("not raised")
        assert os.listdir("/proc/self/fd") == before
        try: os.waitpid(-1, os.WNOHANG)
        except ChildProcessError: pass
        else: raise AssertionError("a child is left")
    """
    script(text)


def test_an_exception_of_a_handler_leaves_no_native_child():
    """So many signals that some come when the child is there."""
    text = """if 1:
        import os, signal
        from ipckit._native import ffi, lib
        from ipckit.process import fork_native
        class Raised(Exception): pass
        def handler(_, frame):
            global to_raise
            if to_raise and frame.f_code.co_name in ("_child", "<lambda>"):
                to_raise = False
                raise Raised
        main = ffi.addressof(lib, "ik_process_unblock")
        main = ffi.cast("int (*)(void *)", int(ffi.cast("intptr_t", main)))
        signal.signal(signal.SIGALRM, handler)
        signal.setitimer(signal.ITIMER_REAL, 0.0005, 0.0005)
        for _ in range(50):
            to_raise = True
            while to_raise:
                try: child = fork_native(main, ffi.NULL)
                except Raised: continue
                child.wait()
                child.close()
        signal.setitimer(signal.ITIMER_REAL, 0)
        try: os.waitpid(-1, os.WNOHANG)
        except ChildProcessError: pass
        else: raise AssertionError("a child is left")
    """
    script(text)


def test_sigchld_ignored_on_entry_loses_no_status():
    text = """if 1:
        import os, signal, sys
        if "again" not in sys.argv:  # as a parent that ignores it would start us; not every shell can
            signal.signal(signal.SIGCHLD, signal.SIG_IGN)
            os.execv(sys.executable, [*sys.orig_argv, "again"])
        from ipckit.process import Reaper
        assert signal.getsignal(signal.SIGCHLD) == signal.SIG_IGN
        with Reaper() as reaper:
            children = [reaper.fork(lambda: 5) for _ in range(20)]
            reaper.wait(120)
        assert [child.status.code for child in children] == [5] * 20
    """
    script(text)


def test_fork_in_a_threaded_process_with_warnings_as_errors():
    """Nothing raises where the child is there already, as the warning of os.fork() does from 3.15 on."""
    text = """if 1:
        import threading
        from ipckit.process import fork
        stop = threading.Event()
        threads = [threading.Thread(target=stop.wait) for _ in range(8)]
        for thread in threads: thread.start()
        for code in range(20):
            with fork(lambda: code) as child:
                assert child.wait(120).code == code
        def from_a_thread():
            with fork(lambda: 3, handlers={}, keep=[]) as child:
                assert child.wait(120).code == 3
            ended.append(True)
        ended = []
        thread = threading.Thread(target=from_a_thread)
        thread.start()
        thread.join()
        assert ended
        stop.set()
    """
    for option in ("-Werror", "-Wignore"):
        done = subprocess.run([sys.executable, option, "-c", text], stderr=subprocess.PIPE, timeout=PATIENCE)
        assert done.returncode == 0, done


# --- many children ---------------------------------------------------------------------------------


HUNDREDS = pytest.mark.parametrize("count", [100, pytest.param(1000, marks=pytest.mark.slow)])


@HUNDREDS
def test_many_exits_at_once_beside_a_popen_of_somebody_else(count):
    text = """if 1:
        import os, select, signal, subprocess, sys
        count = int(sys.argv[1])
        from ipckit.errors import Closed
        from ipckit.process import Reaper
        foreign = subprocess.Popen(["sh", "-c", "exit 33"])
        reader, writer = os.pipe()
        def ends(code):
            os.read(reader, 1)
            return code
        signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGCHLD])
        with Reaper() as reaper:
            children = [reaper.fork(ends, n % 256) for n in range(count)]
            assert len(reaper) == count
            assert select.select([reaper], [], [], 0)[0] == []
            os.write(writer, bytes(count))
            for child in children:  # all are zombies now, and one SIGCHLD at most is pending
                poll = select.poll()
                poll.register(child, select.POLLIN)
                assert poll.poll(120_000)
            ended = reaper.reap()
            assert sorted(child.pid for child, _ in ended) == sorted(child.pid for child in children)
            assert all(child.status is status for child, status in ended)
            assert (len(reaper), list(reaper)) == (0, [])
            assert [child.status.code for child in children] == [n % 256 for n in range(count)]
            try:
                children[0].fileno()
            except Closed:
                print("closed")
        assert foreign.wait(120) == 33
    """
    assert script(text, arguments=[str(count)]) == "closed\n"


@HUNDREDS
def test_on_exit_is_called_once_for_each_of_many(count):
    text = """if 1:
        import os, subprocess, sys, time
        from collections import Counter
        from ipckit.process import Reaper
        foreign = subprocess.Popen(["sh", "-c", "exit 33"])
        ended = Counter()
        with Reaper(lambda child, status: ended.update([(child.pid, status.code)])) as reaper:
            children = [reaper.fork(os._exit, n % 256) for n in range(int(sys.argv[1]))]
            reaper.wait(120)
        assert ended == Counter((child.pid, n % 256) for n, child in enumerate(children))
        assert foreign.wait(120) == 33
    """
    script(text, arguments=[str(count)])


def test_a_reaper_reports_what_ended(pipe):
    reader, _ = pipe
    with Reaper() as reaper:
        assert reaper.reap() == []
        first, second = (reaper.fork(told_then, reader, code) for code in (1, 1))
        assert list(reaper) == [first, second]
        assert reaper.reap() == []
        with pytest.raises(TimeoutError, match="2 children still run") as caught:
            reaper.wait(0.01)
        assert caught.value.errno == errno.ETIMEDOUT
        first.kill()
        assert select.select([reaper], [], [], PATIENCE)[0] == [reaper]
        [(child, status)] = reaper.reap()
        assert (child, status, status.signal) == (first, first.status, signal.SIGKILL)
        assert select.select([reaper], [], [], 0)[0] == []
        with pytest.raises(ValueError, match=f"child {second.pid} is in this reaper already"):
            reaper.add(second)
        reaper.send_signal(signal.SIGTERM)
        reaper.wait(PATIENCE)
        assert second.status.signal == signal.SIGTERM
        native_child = reaper.fork_native(native("_exit"), ffi.cast("void *", 4))
        reaper.wait(PATIENCE)
        assert native_child.status.code == 4


def test_a_reaper_lets_go_of_the_living(pipe):
    with Reaper() as reaper:
        child = reaper.fork(told, pipe[0])
    with pytest.raises(Closed, match="the reaper is closed"):
        reaper.reap()
    with pytest.raises(Closed):
        reaper.fork(int)
    with child:
        assert child.poll() is None
        child.kill()


def test_a_reaper_is_for_the_process_that_made_it(pipe):
    """The epoll set is shared after fork: a child that reaped would take its parent's children."""

    def misuse(reaper, parent):
        for call in (reaper.reap, reaper.wait, lambda: reaper.fork(int)):
            with pytest.raises(ChildProcessError, match=f"belongs to process {parent}") as caught:
                call()
            assert caught.value.errno == errno.ECHILD
        reaper.close()

    with Reaper() as reaper:
        child = reaper.fork(told_then, pipe[0], 3)
        with fork(misuse, reaper, os.getpid()) as other:
            assert other.wait(PATIENCE).code == 0
        os.write(pipe[1], b".")
        reaper.wait(PATIENCE)
        assert child.status.code == 3


def test_a_child_that_somebody_else_reaped_is_dropped():
    with Reaper() as reaper:
        child = reaper.fork(int)
        os.waitpid(child.pid, 0)
        with pytest.raises(ChildProcessError, match=f"child {child.pid} was reaped by somebody else"):
            reaper.reap()
        assert len(reaper) == 0
        assert reaper.reap() == []


def test_on_exit_is_called_by_the_handler_while_the_main_thread_blocks(pipe):
    reader, writer = pipe
    ended = {}

    def on_exit(child, status):
        ended[child.pid] = status.code
        if len(ended) == 3:
            os.write(writer, b"!")

    with Reaper(on_exit) as reaper:
        children = [reaper.fork(os._exit, code) for code in (1, 2, 3)]
        assert told(reader) == b"!"  # blocks until the handler wrote
        assert ended == {child.pid: code for child, code in zip(children, (1, 2, 3), strict=True)}
        assert len(reaper) == 0


def test_the_handler_chains_and_is_put_back():
    seen = []
    former = signal.signal(signal.SIGCHLD, lambda signum, _: seen.append(signum))
    try:
        before = signal.getsignal(signal.SIGCHLD)
        with Reaper(lambda *_: seen.append("reaped")) as reaper:
            reaper.fork(int)
            reaper.wait(PATIENCE)
            eventually(lambda: signal.SIGCHLD in seen)
        assert signal.getsignal(signal.SIGCHLD) is before
        assert "reaped" in seen
        with signals.sigaction(signal.SIGCHLD, seen.append, info=True), Reaper(lambda *_: None) as reaper:
            child = reaper.fork(os._exit, 7)
            eventually(lambda: isinstance(seen[-1], signals.SigInfo))
            assert (seen[-1].pid, seen[-1].status) == (child.pid, 7)
        with Reaper():
            assert signal.getsignal(signal.SIGCHLD) is before, "nothing to call, nothing to install"
    finally:
        signal.signal(signal.SIGCHLD, former)


def test_stopped_children_do_not_run_the_handler():
    calls = []
    former = signal.signal(signal.SIGCHLD, lambda *_: calls.append(1))
    try:
        with Reaper(lambda *_: None) as reaper:
            child = reaper.fork(pause_for_ever)
            child.send_signal(signal.SIGSTOP)
            eventually(lambda: state(child.pid) == "T")
            assert not calls
            child.kill()
            reaper.wait(PATIENCE)
    finally:
        signal.signal(signal.SIGCHLD, former)


def test_a_child_that_ended_before_add_is_not_forgotten():
    ended = []
    child = fork(int)
    select.select([child], [], [], PATIENCE)
    with Reaper(lambda *_: ended.append(1)) as reaper:
        reaper.add(child)
        assert ended == [1]


@pytest.mark.serial  # beside others there is a thread that would take the signal blocked here
def test_an_exception_of_on_exit_leaves_the_rest_for_the_next_call(pipe):
    reader, writer = pipe
    seen = []

    def on_exit(child, status):
        seen.append(status.code)
        if len(seen) == 1:
            raise ZeroDivisionError

    signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGCHLD])
    try:
        with Reaper(on_exit) as reaper:
            children = [reaper.fork(told_then, reader, code) for code in range(3)]
            os.write(writer, b"...")
            for child in children:
                select.select([child], [], [], PATIENCE)
            with pytest.raises(ZeroDivisionError):
                reaper.reap()
            assert len(reaper) == 2
            assert len(reaper.reap()) == 2
            assert sorted(seen) == [0, 1, 2]
            signal.pthread_sigmask(signal.SIG_UNBLOCK, [signal.SIGCHLD])
    finally:
        signal.pthread_sigmask(signal.SIG_UNBLOCK, [signal.SIGCHLD])


def test_the_handler_leaves_the_children_of_others_alone():
    foreign = subprocess.Popen(["sh", "-c", "exit 33"])
    ended = []
    with Reaper(lambda child, status: ended.append(status.code)) as reaper:
        reaper.fork(int)
        assert foreign.wait(PATIENCE) == 33
        reaper.wait(PATIENCE)
    assert ended == [0]


def test_a_reaper_in_another_thread_works_by_its_descriptor():
    ended = []

    def run():
        with Reaper(lambda child, status: ended.append(status.code)) as reaper:
            for code in range(10):
                reaper.fork_native(native("_exit"), ffi.cast("void *", code))
            while len(reaper):
                select.select([reaper], [], [], PATIENCE)
                reaper.reap()

    thread = threading.Thread(target=run)
    thread.start()
    thread.join()
    assert sorted(ended) == list(range(10))


def test_a_reaper_in_asyncio():
    async def run():
        loop = asyncio.get_running_loop()
        gone = loop.create_future()

        def reap():
            ended.extend(status.code for _, status in reaper.reap())
            if len(ended) == 10:
                gone.set_result(None)

        loop.add_reader(reaper, reap)
        for code in range(10):
            reaper.fork_native(native("_exit"), ffi.cast("void *", code))
        await asyncio.wait_for(gone, PATIENCE)
        loop.remove_reader(reaper)

    ended = []
    with Reaper() as reaper:
        asyncio.run(run())
    assert sorted(ended) == list(range(10))


@pytest.mark.parametrize("waits", ["reaper", "child"])
@pytest.mark.parametrize("in_a_thread", [False, True])
def test_waiting_while_the_handler_reaps_ends(waits, in_a_thread):
    """The handler takes the last child from under wait(), in the same thread or in another."""
    for code in range(20):
        with Reaper(lambda *_: None) as reaper:
            child = reaper.fork_native(native("_exit"), ffi.cast("void *", code))
            waiting = {"reaper": reaper, "child": child}[waits]
            if in_a_thread:
                thread = threading.Thread(target=waiting.wait, args=(PATIENCE,))
                thread.start()
                thread.join()
            waiting.wait(PATIENCE)
            assert child.status.code == code
            reaper.wait(PATIENCE)


@pytest.mark.skipif(os.geteuid() != 0 or not ISOLATED, reason="needs root that may make namespaces")
def test_process_1_reaps_its_own_children_and_leaves_the_orphans_that_it_adopts():
    def leaves_an_orphan():
        orphan = os.fork()
        if orphan == 0:
            os._exit(7)
        os.waitid(os.P_PID, orphan, os.WEXITED | os.WNOWAIT)
        return 5

    def init():
        assert os.getpid() == 1
        seen = []
        with Reaper(lambda child, status: seen.append((child, status.code))) as reaper:
            children = [reaper.fork(leaves_an_orphan, die_with_parent=True) for _ in range(20)]
            reaper.wait(PATIENCE)
        assert sorted(seen, key=lambda each: each[0].pid) == [(child, 5) for child in children]
        assert [os.waitstatus_to_exitcode(os.wait()[1]) for _ in range(20)] == [7] * 20

    def outside():
        unshare(NEW_PID)
        with fork(init) as first:
            return first.wait(PATIENCE).code

    with fork(outside) as child:
        assert child.wait(PATIENCE).code == 0


# --- stopping -------------------------------------------------------------------------------------


def stubborn(writer):
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    os.write(writer, b".")
    pause_for_ever()


def test_stop_ends_all_in_order_if_they_obey(pipe):
    reader, writer = pipe

    def obeys():
        os.write(writer, b".")
        pause_for_ever()

    with Reaper() as reaper:
        ended = reaper.fork(int)
        select.select([ended], [], [], PATIENCE)
        killed = reaper.fork(pause_for_ever)
        exits = reaper.fork(obeys, handlers={signal.SIGTERM: lambda *_: sys.exit(3)})
        assert told(reader) == b"."
        assert reaper.stop(PATIENCE) == [(child, child.status) for child in (ended, killed, exits)]
        assert (ended.status.code, killed.status.signal, exits.status.code) == (0, signal.SIGTERM, 3)
        assert len(reaper) == 0 and reaper.stop() == []
        reaper.fork(int)  # it can be used again
        reaper.wait(PATIENCE)


def test_stop_kills_those_that_do_not_obey(pipe):
    reader, writer = pipe
    with Reaper() as reaper:
        ignores, stopped = reaper.fork(stubborn, writer), reaper.fork(pause_for_ever)
        stopped.send_signal(signal.SIGSTOP)
        eventually(lambda: state(stopped.pid) == "T")
        assert told(reader) == b"."
        statuses = dict(reaper.stop(0.05))
        assert statuses[ignores].signal == statuses[stopped].signal == signal.SIGKILL
        assert not any(Path(f"/proc/{child.pid}").exists() for child in statuses)


def test_stop_waits_for_an_orderly_end_as_long_as_it_may(pipe):
    reader, writer = pipe

    def slow():
        signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGTERM])
        os.write(writer, b".")
        signal.sigwait([signal.SIGTERM])
        os.read(going, 1)
        return 5

    going, go = os.pipe()
    with Reaper() as reaper:
        child = reaper.fork(slow)
        assert told(reader) == b"."
        thread = threading.Timer(0.05, os.write, (go, b"!"))
        thread.start()
        assert reaper.stop(None) == [(child, child.status)]
        assert child.status.code == 5
        thread.join()
    os.close(going)
    os.close(go)


@pytest.mark.parametrize("use_handler", [False, True])
def test_stop_leaves_nobody_whatever_on_exit_does(use_handler):
    seen = []

    def on_exit(child, status):
        seen.append(child)
        if len(seen) == 1:
            with pytest.raises(Closed, match="the reaper is stopping"):
                reaper.fork(pause_for_ever)
            raise ZeroDivisionError

    reaper = Reaper(on_exit)
    with reaper if use_handler else contextlib.closing(reaper):
        children = [reaper.fork(pause_for_ever) for _ in range(5)]
        with pytest.raises(ZeroDivisionError):
            reaper.stop(PATIENCE)
        assert len(reaper) == 0
    assert sorted(child.pid for child in seen) == sorted(child.pid for child in children)
    assert all(child.status.signal == signal.SIGTERM for child in children)


def test_ctrl_c_during_stop_kills_the_rest_at_once(pipe):
    reader, writer = pipe
    with Reaper() as reaper:
        child = reaper.fork(stubborn, writer)
        assert told(reader) == b"."
        thread = threading.Timer(0.05, os.kill, (os.getpid(), signal.SIGINT))
        thread.start()
        with pytest.raises(KeyboardInterrupt):
            reaper.stop(None)
        thread.join()
        assert len(reaper) == 0 and child.status.signal == signal.SIGKILL


def test_stop_tells_of_a_child_that_somebody_else_reaped_when_the_others_have_ended():
    with Reaper() as reaper:
        lost, other = reaper.fork(int), reaper.fork(pause_for_ever)
        os.waitpid(lost.pid, 0)
        with pytest.raises(ChildProcessError, match=f"child {lost.pid} was reaped by somebody else"):
            reaper.stop(PATIENCE)
        assert len(reaper) == 0 and other.status.signal == signal.SIGTERM


# --- the example -----------------------------------------------------------------------------------


def test_the_example_runs():
    path = Path(__file__).parent.parent / "examples" / "workers.py"
    lines = script(path.read_text()).splitlines()
    assert lines[0] == "worker 0 killed by SIGKILL"
    assert sorted(lines[1:3]) == ["worker 1 exited with 1", "worker 2 exited with 2"]
    assert lines[3] == "no child is left"
