import asyncio
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

import pytest
from cffi import FFI
from conftest import eventually, open_descriptors

from ipckit._native import ffi
from ipckit.errors import Closed
from ipckit.process import ExitStatus, fork, fork_native, wait_any

PATIENCE = 20.0

libc = FFI()
libc.cdef("int pause(void); int raise(int); void _exit(int);")


def native(name):
    """A function of the C library, as the ``int main(void *)`` that fork_native takes."""
    address = libc.cast("intptr_t", getattr(libc.dlopen(None), name))
    return ffi.cast("int (*)(void *)", int(address))


def script(text, *options, **more):
    """Run *text* in an interpreter of its own; what it printed, and that it had nothing to say on stderr."""
    command = [sys.executable, *options, "-c", text]
    done = subprocess.run(command, capture_output=True, text=True, timeout=PATIENCE * 2, **more)
    assert (done.returncode, done.stderr) == (0, ""), done
    return done.stdout


@pytest.fixture(scope="module", autouse=True)
def a_thread_ran():
    """The C library catches a signal of its own from the first thread on: not what a test left behind."""
    thread = threading.Thread(target=int)
    thread.start()
    thread.join()


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


@pytest.mark.parametrize(("result", "code"), [(None, 0), (0, 0), (3, 3), (True, 1), (255, 255), (-1, 255)])
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
    former = signal.signal(signal.SIGALRM, lambda *_: seen.append(1))
    timer = signal.setitimer(signal.ITIMER_REAL, 0.01, 0.01)
    try:
        with fork(signal.pause) as child:
            with pytest.raises(TimeoutError):
                child.wait(0.1)
            child.kill()
    finally:
        signal.setitimer(signal.ITIMER_REAL, *timer)
        signal.signal(signal.SIGALRM, former)
    assert len(seen) >= 2


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
        subprocess.run([sys.executable, "-c", text], stdout=out, check=True, timeout=PATIENCE)
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
    with pytest.raises(ValueError, match="must be >= 0, not -1"):
        fork(int, keep=[-1])
    with pytest.raises(AttributeError):
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
