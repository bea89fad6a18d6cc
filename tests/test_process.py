import os
import signal

import pytest
from cffi import FFI

from ipckit._native import ffi
from ipckit.process import Child, ExitStatus, Reaper, fork, fork_native

PATIENCE = 20.0

libc = FFI()
libc.cdef("int pause(void); void _exit(int);")


def native(name):
    """A function of the C library, as the ``int main(void *)`` that fork_native takes."""
    address = libc.cast("intptr_t", getattr(libc.dlopen(None), name))
    return ffi.cast("int (*)(void *)", int(address))


@pytest.mark.parametrize(("result", "code"), [(None, 0), (0, 0), (3, 3), (True, 1), (255, 255)])
def test_the_exit_code_is_what_the_target_returns(result, code):
    with fork(lambda: result) as child:
        status = child.wait(PATIENCE)
    assert (status.exited, status.code, status.signaled, status.signal, status.core) == (
        (True, code, False, None, False)
    )


def test_a_child_killed_by_a_signal():
    with fork(signal.pause) as child:
        child.terminate()
        status = child.wait(PATIENCE)
    assert (status.exited, status.code, status.signaled, status.signal) == (False, None, True, signal.SIGTERM)
    assert str(status) == "killed by SIGTERM"


def test_a_native_child():
    with fork_native(native("_exit"), ffi.cast("void *", 7)) as child:
        assert child.wait(PATIENCE).code == 7


def test_a_native_child_starts_with_signals_blocked():
    with fork_native(native("pause"), ffi.NULL) as child:
        child.terminate()
        with pytest.raises(TimeoutError, match=f"child {child.pid} still runs"):
            child.wait(0.01)
        child.kill()
        assert child.wait(PATIENCE).signal == signal.SIGKILL


def test_a_reaper_of_a_few():
    with Reaper() as reaper:
        children = [reaper.fork(os._exit, code) for code in range(5)]
        reaper.wait(PATIENCE)
        assert len(reaper) == 0
        assert [child.status for child in children] == [ExitStatus(code << 8) for code in range(5)]
        assert all(isinstance(child, Child) for child in children)
