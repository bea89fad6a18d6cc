import copy
import ctypes
import errno
import fcntl
import gc
import mmap
import os
import pickle
import re
import resource
import shutil
import signal
import socket
import stat
import subprocess
import sys
import threading
from pathlib import Path

import numpy as np
import pytest
from conftest import PATIENCE, eventually
from hypothesis import given, settings
from hypothesis import strategies as st
from procfs import state

from ipckit import memory, registry, sockets
from ipckit.errors import Closed
from ipckit.memory import Mapping, SharedMemory

ROOT = Path(__file__).resolve().parent.parent
PEER = ROOT / "build/peers/memory"
NOBODY = 65534
SEALED = fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW | fcntl.F_SEAL_SEAL

as_root = pytest.mark.skipif(os.geteuid() != 0, reason="needs root")


@pytest.fixture
def shared():
    with SharedMemory(1000) as made:
        yield made


@pytest.fixture
def name():
    yield "frames"
    with registry.cleaning():
        for record in registry.records():
            registry.drop(record)
        at = registry.folder()
        for left in os.listdir(at):
            if left.startswith("memory."):
                os.unlink(left, dir_fd=at) if left.count(".") == 1 else os.rmdir(left, dir_fd=at)
        os.close(at)


def folder():
    return Path(f"/dev/shm/ipckit-{os.geteuid()}")


def run(code, *, prefix=(), **more):
    """A Python program in a process of its own; what it printed, on both streams."""
    command = [*prefix, sys.executable, "-W", "error", "-c", code]
    done = subprocess.run(command, capture_output=True, text=True, timeout=PATIENCE * 2, **more)
    return done.returncode, done.stdout + done.stderr


def mappings():
    """Those that something still needs; what an earlier test left in cycles is none."""
    gc.collect()
    return Path("/proc/self/maps").read_text().count("memfd:ipckit")


# --- memory without a name -------------------------------------------------------------------------


@pytest.mark.parametrize("size", [1, 4095, 4096, 4097, 1_000_003])
def test_new_memory_has_the_exact_size_and_holds_zeros(size):
    with SharedMemory(size) as shared:
        assert shared.size == len(shared.buf) == os.fstat(shared.fileno()).st_size == size
        assert shared.buf.tobytes() == bytes(size)
        shared.buf[:] = b"\xa5" * size
        assert bytes(shared.buf[-1:]) == b"\xa5"
        assert (shared.name, shared.readonly, shared.buf.readonly) == (None, False, False)


def test_new_memory_is_sealed_private_allocated_and_not_inherited_by_exec(shared):
    fd = shared.fileno()
    assert fcntl.fcntl(fd, fcntl.F_GET_SEALS) & SEALED == SEALED
    assert fcntl.fcntl(fd, fcntl.F_GETFD) & fcntl.FD_CLOEXEC
    found = os.fstat(fd)
    assert stat.S_IMODE(found.st_mode) == 0o600
    assert found.st_blocks > 0
    assert repr(shared) == f"<SharedMemory anonymous memory of 1000 bytes, descriptor {fd}>"


@pytest.mark.parametrize("size", [0, -1, -(1 << 70)])
def test_no_memory_of_no_size(size, name):
    with pytest.raises(ValueError, match=f"size must be an integer >= 1, not {size}"):
        SharedMemory(size)
    with pytest.raises(ValueError, match=f"size must be an integer >= 1, not {size}"):
        SharedMemory(size, name=name, create=True)


@pytest.mark.parametrize("size", [1 << 50, 1 << 70])
def test_more_than_the_machine_has_is_refused_at_once(size, name):
    for more in ({}, {"name": name, "create": True}):
        with pytest.raises(OSError, match=rf"{size} bytes: \d+ bytes of memory are available") as caught:
            SharedMemory(size, **more)
        assert caught.value.errno == errno.ENOMEM


@pytest.mark.parametrize(
    "arguments, complaint",
    [
        ({}, "memory without a name needs a size"),
        ({"name": "frames", "create": True}, "memory segment 'frames' can't be made without a size"),
        ({"size": 1, "readonly": True}, "new memory can't be readonly"),
        ({"size": 1, "name": "frames", "create": True, "readonly": True}, "new memory can't be readonly"),
        ({"size": 1, "name": "frames", "exclusive": True}, "exclusive is for memory to be made"),
    ],
)
def test_arguments_that_make_no_sense_together(arguments, complaint, name):
    with pytest.raises(ValueError, match=complaint):
        SharedMemory(**arguments)


def test_limits_of_the_process_are_named(forked):
    def limited(ready):
        resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 20, 1 << 20))
        with pytest.raises(OSError, match="anonymous memory of 2000000 bytes") as caught:
            SharedMemory(2_000_000)
        assert caught.value.errno == errno.EFBIG
        taken = os.open("/dev/null", os.O_RDONLY)
        resource.setrlimit(resource.RLIMIT_NOFILE, (taken + 1, taken + 1))
        with pytest.raises(OSError, match="anonymous memory of 5 bytes") as caught:
            SharedMemory(5)
        assert caught.value.errno == errno.EMFILE

    assert forked(limited).wait() == 0


def test_no_address_space_is_named_and_leaves_no_descriptor(forked):
    def limited(ready):
        before = os.listdir("/proc/self/fd")
        used = int(Path("/proc/self/statm").read_text().split()[0]) * mmap.PAGESIZE
        resource.setrlimit(resource.RLIMIT_AS, (used + (8 << 20), used + (8 << 20)))
        with pytest.raises(OSError, match="mapping anonymous memory of 33554432 bytes") as caught:
            SharedMemory(32 << 20)
        assert caught.value.errno == errno.ENOMEM
        assert os.listdir("/proc/self/fd") == before

    assert forked(limited).wait() == 0


def test_a_fast_timer_does_not_keep_it_from_being_made(forked):
    def timed(ready):
        ticks = []
        signal.signal(signal.SIGALRM, lambda *_: ticks.append(1))
        signal.setitimer(signal.ITIMER_REAL, 0.001, 0.001)
        with SharedMemory(128 << 20):  # much longer than a tick
            signal.setitimer(signal.ITIMER_REAL, 0)
        assert ticks

    assert forked(timed).wait() == 0


def test_a_signal_handler_may_give_it_up(name):
    def give_up(*_):
        raise TimeoutError("enough")

    former = signal.signal(signal.SIGPROF, give_up)
    try:
        for more in ({}, {"name": name, "create": True}):
            with pytest.raises(TimeoutError, match="enough"):
                signal.setitimer(signal.ITIMER_PROF, 0.01)  # of processor time; it takes ten times as long
                SharedMemory(512 << 20, **more)
        assert os.listdir(folder()) == ["lock"]
    finally:
        signal.signal(signal.SIGPROF, former)


# --- views ---------------------------------------------------------------------------------------


VIEWS = {
    "buf": lambda shared: shared.buf,
    "slice": lambda shared: shared.buf[3:7],
    "cast": lambda shared: shared.buf.cast("Q"),
    "array": lambda shared: shared.asarray("u1"),
    "part of an array": lambda shared: shared.asarray("i4", (25, 10))[3:, 1],
    "ctypes": lambda shared: ctypes.c_int.from_buffer(shared.buf),
}


@pytest.mark.parametrize("view", VIEWS)
def test_no_close_while_a_view_lives(shared, view):
    kept = VIEWS[view](shared)
    for _ in range(2):
        with pytest.raises(BufferError, match="anonymous memory of 1000 bytes still has views"):
            shared.close()
    assert not shared.closed
    shared.buf[5] = 7
    assert os.fstat(shared.fileno()).st_size == 1000
    del kept
    gc.collect()  # ctypes objects are in cycles
    shared.close()
    assert shared.closed
    shared.close()


@pytest.mark.parametrize("view", VIEWS)
def test_a_deferred_close_leaves_the_mapping_to_the_last_view(shared, view):
    before = mappings()
    shared.buf[:] = bytes(range(250)) * 4
    kept = VIEWS[view](shared)
    expected = bytes(memoryview(kept))
    number = shared.fileno()
    shared.close(defer=True)
    assert shared.closed
    with pytest.raises(Closed, match="anonymous memory of 1000 bytes is closed"):
        shared.fileno()
    assert mappings() == before
    assert bytes(memoryview(kept)) == expected
    with pytest.raises(OSError):
        os.fstat(number)
    del kept
    assert mappings() == before - 1


def test_the_end_of_a_with_block_leaves_views_alone():
    with SharedMemory(100) as shared:
        view, array = shared.buf, shared.asarray("u1")
        array[:] = 9
    assert shared.closed
    assert view[99] == 9
    with pytest.raises(KeyError), SharedMemory(1) as shared:
        view = shared.buf
        raise KeyError


def test_a_closed_handle_says_so(shared):
    shared.close()
    assert repr(shared) == "<SharedMemory anonymous memory of 1000 bytes, closed>"
    for use in (
        lambda: shared.buf,
        lambda: shared.asarray("u1"),
        shared.fileno,
        shared.readonly_fd,
        lambda: pickle.dumps(shared),
    ):
        with pytest.raises(Closed, match="anonymous memory of 1000 bytes is closed"):
            use()


def test_handles_and_views_go_in_any_order_without_a_word():
    code = """if True:
        import gc
        from ipckit.memory import SharedMemory
        shared = SharedMemory(5000)
        view, array = shared.buf[1:], shared.asarray("u2")
        del shared
        gc.collect()
        array += 1
        assert view[0] == 0 and view[1] == 1
        again = SharedMemory(100)
        again.me = again, again.buf, again.asarray("u1")
        del again
        gc.collect()
        kept = SharedMemory(100), SharedMemory(10).buf
        try:
            SharedMemory(-1)
        except ValueError:
            pass
    """
    assert run(code) == (0, "")


ORDERS = 1000 if os.environ.get("IPCKIT_PROOF") else 100


@pytest.mark.proof
@settings(max_examples=ORDERS)
@given(
    steps=st.lists(
        st.tuples(
            st.sampled_from(
                ["view", "slice", "array", "part", "close", "defer", "delete", "drop", "read", "write"]
            ),
            st.integers(min_value=0, max_value=99),
        ),
        max_size=40,
    )
)
def test_any_order_of_view_slice_close_delete_and_read(steps):
    shared = SharedMemory(100)
    content = bytearray(100)
    views = []  # (view or array, first byte)
    for verb, number in steps:
        view, start = views[number % len(views)] if views else (None, 0)
        usable = shared is not None and not shared.closed
        if verb == "view" and usable:
            views.append((shared.buf, 0))
        elif verb == "array" and usable:
            views.append((shared.asarray("u1", 100 - number, number), number))
        elif verb in ("slice", "part") and view is not None:
            views.append((view[number:], start + number))
        elif verb == "close" and shared is not None:
            if views and usable:
                del view
                with pytest.raises(BufferError):
                    shared.close()
            else:
                shared.close()
        elif verb == "defer" and shared is not None:
            shared.close(defer=True)
        elif verb == "delete":
            shared = None
        elif verb == "drop" and views:
            del views[number % len(views)]
        elif verb == "write" and view is not None and len(view) > number:
            view[number] = content[start + number] = (number * 7) % 256
        for kept, first in views:
            assert bytes(kept) == content[first:]
        view = kept = None


def test_threads_that_read_while_one_closes():
    for _ in range(100):
        shared = SharedMemory(4096)
        start = threading.Barrier(3)

        def read(shared=shared, start=start):
            start.wait()
            try:
                while True:
                    assert shared.buf[4095] == 0
            except Closed:
                return

        readers = [threading.Thread(target=read) for _ in range(2)]
        for reader in readers:
            reader.start()
        start.wait()
        while not shared.closed:
            try:
                shared.close()
            except BufferError:
                continue
        for reader in readers:
            reader.join()


# --- arrays --------------------------------------------------------------------------------------


def test_arrays_share_the_memory(shared):
    everything = shared.asarray("float64")
    table = shared.asarray(np.int32, (2, 3), offset=64)
    record = shared.asarray([("key", "<u4"), ("value", "<f8")], 3, offset=192)
    assert (everything.shape, table.shape, record.shape) == ((125,), (2, 3), (3,))
    everything[:] = 0
    table[1, 2] = -5
    record["value"][2] = 1.5
    assert np.frombuffer(shared.buf, np.int32)[16 + 5] == -5
    assert everything[8 + 2].view("i8") >> 32 == -5
    assert shared.buf[192 + 2 * 12 + 4 :][:8].cast("d")[0] == 1.5
    for array in (everything, table, record):
        assert array.ctypes.data % 64 == 0
        assert array.flags.writeable
    assert shared.asarray("u1", ()).shape == ()
    assert shared.asarray("i2", (-1, 4)).shape == (125, 4)
    assert shared.asarray("u1", (0, 5)).size == 0


def test_an_array_made_without_us_pins_the_memory_too():
    np = pytest.importorskip("numpy")
    shared = SharedMemory(1000)
    array = np.ndarray(10, "u1", shared.buf)  # numpy keeps the object, and not the view of it
    with pytest.raises(BufferError, match="anonymous memory of 1000 bytes"):
        shared.close()
    shared.close(defer=True)
    array[9] = 7
    assert array[9] == 7


@pytest.mark.parametrize(
    "dtype, shape, offset, complaint",
    [
        ("float64", 126, 0, r"float64 126 at 0 of anonymous memory of 1000 bytes: buffer is smaller"),
        ("float64", (5, 26), 0, r"float64 \(5, 26\) at 0 of"),
        ("float64", None, 4, r"at 4 of .*: the offset must be a multiple of 8"),
        ("float64", None, -8, r"at -8 of .*: the offset must be a multiple of 8"),
        ("u1", None, 1001, r"at 1001 of"),
        ("S3", None, 0, r"to the end at 0 of .*: buffer size must be a multiple"),
        ("u1", (3, -1), 0, r"\(3, -1\) at 0 of"),
        ("u1", (-1, -1), 0, r"\(-1, -1\) at 0 of"),
        ("u1", (1 << 40, 1 << 40), 0, r"\(1099511627776, 1099511627776\) at 0 of"),
        ("O", None, 0, r"object to the end .*: only plain values"),
        ("S", None, 0, r"only plain values of a fixed size"),
    ],
)
def test_arrays_that_do_not_fit(shared, dtype, shape, offset, complaint):
    with pytest.raises(ValueError, match=complaint):
        shared.asarray(dtype, shape, offset)
    shared.close()


def test_without_numpy_it_is_told_what_to_install():
    code = """if True:
        import sys
        sys.modules["numpy"] = None
        from ipckit.memory import SharedMemory
        with SharedMemory(10) as shared:
            shared.buf[0] = 1
            shared.asarray("u1")
    """
    status, printed = run(code)
    assert status == 1
    assert "ImportError: asarray() needs numpy: pip install numpy" in printed


# --- other processes -----------------------------------------------------------------------------


def test_a_forked_child_has_it_too(shared, forked):
    def child(ready):
        shared.buf[0] = 1
        view = shared.buf
        shared.close(defer=True)
        view[1] = 2
        del view

    assert forked(child).wait() == 0
    assert bytes(shared.buf[:3]) == b"\1\2\0"
    assert not shared.closed


def test_a_child_killed_while_it_writes(forked):
    with SharedMemory(1 << 20) as shared:

        def write(ready):
            table = shared.asarray("u8")
            ready()
            while True:
                table += 1

        child = forked(write)
        child.wait_ready()
        eventually(lambda: shared.asarray("u8")[0] > 3)
        child.kill()
        assert child.wait() == -signal.SIGKILL
        table = shared.asarray("u8")
        assert 0 <= int(table[0]) - int(table[-1]) <= 1, "killed in the middle of a pass, or between two"
        table[:] = 7
        assert shared.buf[0] == 7


def truncations(fd, size):
    for length in (0, size - 1, size + 1):
        with pytest.raises(PermissionError) as caught:
            os.ftruncate(fd, length)
        assert caught.value.errno == errno.EPERM
    with pytest.raises(PermissionError):
        fcntl.fcntl(fd, fcntl.F_ADD_SEALS, fcntl.F_SEAL_WRITE)


def test_a_peer_can_not_truncate_it(shared, forked):
    def child(ready):
        truncations(shared.fileno(), 1000)

    assert forked(child).wait() == 0
    assert len(bytes(shared.buf)) == 1000


def talk(*arguments):
    ours, theirs = socket.socketpair()
    with theirs:
        number = theirs.fileno()
        verb, *rest = arguments
        command = [PEER, verb, str(number), *rest]
        peer = subprocess.Popen(command, pass_fds=[number], stdout=subprocess.PIPE, text=True)
    return ours, peer


def test_a_c_program_gets_memory_by_descriptor(shared):
    shared.buf[:11] = b"made by us\0"
    ours, peer = talk("take")
    with ours:
        sockets.send_fds(ours, b"x", [shared])
        printed, _ = peer.communicate(timeout=PATIENCE)
    assert printed == "size 1000, holds made by us\nshrink 1, grow 1, seal 1\n"  # EPERM
    assert peer.returncode == 0
    assert bytes(shared.buf[:12]) == b"written by C"


def test_memory_of_a_c_program():
    ours, peer = talk("give", "sealed")
    with ours:
        _, (fd,) = sockets.recv_fds(ours, 1, 1, timeout=PATIENCE)
        with SharedMemory.from_fd(fd, size=8192) as shared:
            assert bytes(shared.buf[:10]) == b"made by C\0"
            shared.buf[:11] = b"seen by us\0"
            assert shared.fileno() == fd
        ours.send(b".")
        assert peer.communicate(timeout=PATIENCE) == ("seen by us\n", None)


def test_a_c_program_that_does_not_seal_is_refused_unless_told_otherwise():
    ours, peer = talk("give", "unsealed")
    with ours:
        _, (fd,) = sockets.recv_fds(ours, 1, 1, timeout=PATIENCE)
        spare = os.dup(fd)
        with pytest.raises(ValueError, match=f"descriptor {fd} is not sealed against shrinking and growing"):
            SharedMemory.from_fd(fd)
        with SharedMemory.from_fd(spare, unsealed=True) as shared:
            assert bytes(shared.buf[:10]) == b"made by C\0"
        ours.send(b".")
        assert peer.communicate(timeout=PATIENCE) == ("made by C\n", None)


def memfd(size, seals=SEALED, flags=os.MFD_ALLOW_SEALING):
    fd = os.memfd_create("test", flags | os.MFD_CLOEXEC)
    os.ftruncate(fd, size)
    if seals:
        fcntl.fcntl(fd, fcntl.F_ADD_SEALS, seals)
    return fd


def reopened(fd, flags):
    again = os.open(f"/proc/self/fd/{fd}", flags | os.O_CLOEXEC)
    os.close(fd)
    return again


def one_end(ends):
    os.close(ends[1])
    return ends[0]


def socket_end():
    one, other = socket.socketpair()
    other.close()
    return one.detach()


def a_file(where):
    fd = os.open(where, os.O_TMPFILE | os.O_RDWR)
    os.write(fd, bytes(5000))
    return fd


REFUSED = {
    "without seals": (lambda: memfd(5000, 0), {}, "not sealed against shrinking and growing"),
    "that can't be sealed": (lambda: memfd(5000, 0, 0), {}, "not sealed"),
    "sealed against shrinking only": (lambda: memfd(5000, fcntl.F_SEAL_SHRINK), {}, "not sealed"),
    "sealed against growing only": (lambda: memfd(5000, fcntl.F_SEAL_GROW), {}, "not sealed"),
    "short": (lambda: memfd(4999), {"size": 5000}, "has 4999 bytes, not 5000"),
    "long": (lambda: memfd(5001), {"size": 5000}, "has 5001 bytes, not 5000"),
    "of huge pages": (
        lambda: memfd(1 << 30, SEALED, os.MFD_ALLOW_SEALING | os.MFD_HUGETLB),
        {},
        "is of huge pages",
    ),
    "empty": (lambda: memfd(0), {}, "is empty"),
    "empty and unsealed": (lambda: memfd(0, 0), {"unsealed": True}, "is empty"),
    "a file": (lambda: a_file("/tmp"), {}, "not sealed"),
    "a file in shared memory": (lambda: a_file("/dev/shm"), {}, "not sealed"),
    "a pipe": (lambda: one_end(os.pipe()), {}, "is no memory, but prw"),
    "a pipe, unsealed": (lambda: one_end(os.pipe()), {"unsealed": True}, "is no memory, but prw"),
    "a socket": (socket_end, {}, "is no memory, but srwx"),
    "a folder": (lambda: os.open("/tmp", os.O_RDONLY), {"readonly": True}, "is no memory, but d"),
    "a device": (lambda: os.open("/dev/zero", os.O_RDWR), {"unsealed": True}, "is no memory, but c"),
    "readonly": (lambda: reopened(memfd(5000), os.O_RDONLY), {}, "can't be both read and written"),
    "write-only": (lambda: reopened(memfd(5000), os.O_WRONLY), {}, "can't be both read and written"),
    "only a path": (lambda: reopened(memfd(5000), os.O_PATH), {"readonly": True}, "not sealed"),
}


@pytest.mark.parametrize("kind", REFUSED)
def test_a_descriptor_that_is_refused_is_closed(kind):
    make, more, complaint = REFUSED[kind]
    fd = make()
    with pytest.raises(ValueError, match=f"descriptor {fd} .*{complaint}|descriptor {fd} {complaint}"):
        SharedMemory.from_fd(fd, **more)
    with pytest.raises(OSError) as caught:
        os.fstat(fd)
    assert caught.value.errno == errno.EBADF


def test_a_descriptor_that_can_not_be_mapped_is_closed():
    for make, more, number in [
        (lambda: memfd(5000, SEALED | fcntl.F_SEAL_WRITE), {}, errno.EPERM),
        (lambda: reopened(memfd(5000), os.O_WRONLY), {"readonly": True}, errno.EACCES),
    ]:
        fd = make()
        with pytest.raises(
            PermissionError, match=f"mapping memory of 5000 bytes by descriptor {fd}"
        ) as caught:
            SharedMemory.from_fd(fd, **more)
        assert caught.value.errno == number
        with pytest.raises(OSError):
            os.fstat(fd)


def test_a_closed_descriptor_is_named():
    spare = os.dup(0)
    os.close(spare)
    with pytest.raises(OSError, match=f"descriptor {spare}") as caught:
        SharedMemory.from_fd(spare)
    assert caught.value.errno == errno.EBADF


def test_an_unsealed_file_at_own_risk():
    with SharedMemory.from_fd(a_file("/tmp"), size=5000, unsealed=True) as shared:
        shared.buf[4999] = 1
        assert repr(shared).startswith("<SharedMemory memory of 5000 bytes by descriptor ")


# --- readonly ------------------------------------------------------------------------------------


def test_a_readonly_descriptor_can_not_be_written_through(shared):
    shared.buf[:4] = b"seen"
    fd = shared.readonly_fd()
    with pytest.raises(OSError) as caught:
        os.write(fd, b"x")
    assert caught.value.errno == errno.EBADF
    with pytest.raises(PermissionError):
        mmap.mmap(fd, 1000)
    with pytest.raises(OSError):
        os.ftruncate(fd, 0)
    with SharedMemory.from_fd(fd, readonly=True) as seen:
        assert seen.readonly
        assert bytes(seen.buf[:4]) == b"seen"
        with pytest.raises(TypeError, match="read-only"):
            seen.buf[0] = 1
        array = seen.asarray("u1")
        with pytest.raises(ValueError, match="read-only"):
            array[0] = 1
        with pytest.raises(ValueError):
            array.flags.writeable = True
        libc = ctypes.CDLL(None, use_errno=True)
        address = ctypes.c_void_p(array.ctypes.data)
        assert libc.mprotect(address, 4096, mmap.PROT_READ | mmap.PROT_WRITE) == -1
        assert ctypes.get_errno() == errno.EACCES
        shared.buf[0] = ord("S")
        assert array[0] == ord("S")
        assert repr(seen).endswith(", readonly>")
        del array


@as_root
def test_another_user_can_not_make_it_writable_again(shared, forked):
    fd = shared.readonly_fd()

    def other(ready):
        os.setresgid(NOBODY, NOBODY, NOBODY)
        os.setresuid(NOBODY, NOBODY, NOBODY)
        shared.close()
        with pytest.raises(PermissionError):
            os.open(f"/proc/self/fd/{fd}", os.O_RDWR)
        with pytest.raises(PermissionError):
            os.fchmod(fd, 0o666)
        with SharedMemory.from_fd(fd, readonly=True) as seen:
            assert seen.buf[999] == 0

    assert forked(other).wait() == 0
    os.close(fd)


def test_mapping_a_descriptor_that_may_not_be_written_leaves_it_to_the_caller(shared):
    fd = shared.readonly_fd()
    with pytest.raises(PermissionError, match="mapping my memory") as caught:
        Mapping(fd, 1000, "my memory")
    assert caught.value.errno == errno.EACCES
    with Mapping(fd, 10, "my memory", readonly=True) as mapping:
        assert len(mapping.buf) == mapping.size == 10
        assert repr(mapping) == "<Mapping my memory, readonly>"
        with pytest.raises(TypeError, match="my memory can't be pickled"):
            copy.copy(mapping)


# --- pickling ------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", ["fork", "spawn", pytest.param("forkserver", marks=pytest.mark.slow)])
def test_children_of_multiprocessing_get_handles(method, tmp_path, name):
    script = tmp_path / "program.py"
    script.write_text(f"""if True:
        import multiprocessing, os
        from ipckit.memory import SharedMemory

        def child(plain, named, seen):
            assert (plain.size, named.size, seen.size) == (1001, 5000, 1001)
            assert (plain.name, named.name, seen.name) == (None, {name!r}, None)
            assert seen.readonly and not plain.readonly and not named.readonly
            assert not any(os.get_inheritable(shared.fileno()) for shared in (plain, named, seen))
            plain.buf[1000] = 7
            assert seen.buf[1000] == 7
            named.asarray("u4")[-1] = 77
            named.close()

        if __name__ == "__main__":
            context = multiprocessing.get_context({method!r})
            plain = SharedMemory(1001)
            named = SharedMemory(5000, name={name!r}, create=True, exclusive=True)
            seen = SharedMemory.from_fd(plain.readonly_fd(), readonly=True)
            process = context.Process(target=child, args=(plain, named, seen))
            process.start()
            if {method!r} == "spawn":
                named.unlink()  # the child has it, or its descriptor
            process.join()
            assert process.exitcode == 0
            assert plain.buf[1000] == 7
            assert named.asarray("u4")[-1] == 77
            if {method!r} != "spawn":
                named.unlink()
            named.close()
    """)
    done = subprocess.run([sys.executable, script], stdin=subprocess.DEVNULL, timeout=PATIENCE)
    assert done.returncode == 0
    assert not list(folder().glob("*")), "neither memory nor records"


def test_no_resource_tracker_is_started(name):
    code = f"""if True:
        import os, pathlib, pickle
        from multiprocessing import resource_tracker
        from ipckit.memory import SharedMemory
        with SharedMemory(100) as plain, SharedMemory(100, name={name!r}, create=True) as named:
            SharedMemory.from_fd(os.dup(plain.fileno())).close()
            pickle.loads(pickle.dumps(named)).close()
            named.unlink()
        assert resource_tracker._resource_tracker._pid is None
        assert pathlib.Path(f"/proc/self/task/{{os.getpid()}}/children").read_text() == ""
    """
    assert run(code) == (0, "")


def test_without_a_name_it_is_not_pickled_to_anywhere(shared):
    for attempt in (pickle.dumps, copy.copy, copy.deepcopy):
        with pytest.raises(TypeError, match=r"anonymous memory of 1000 bytes .* send fileno\(\)"):
            attempt(shared)


def test_with_a_name_it_is_pickled_to_anywhere(name, forked):
    with SharedMemory(100, name=name, create=True) as shared:
        reader, writer = os.pipe()

        def other(ready):
            with pickle.loads(os.read(reader, 10_000)) as mine:
                assert (mine.name, mine.size, mine.readonly) == (name, 100, False)
                mine.buf[99] = 5

        child = forked(other)
        os.write(writer, pickle.dumps(shared))
        assert child.wait() == 0
        assert shared.buf[99] == 5
        with SharedMemory(name=name, readonly=True) as seen, pickle.loads(pickle.dumps(seen)) as again:
            assert again.readonly
        os.close(reader)
        os.close(writer)
        earlier = pickle.dumps(shared)
        shared.unlink()
        with pytest.raises(FileNotFoundError, match="frames"):
            pickle.loads(earlier)
        with SharedMemory(100, name=name, create=True):
            with pytest.raises(FileNotFoundError, match="'frames' that was pickled") as caught:
                pickle.loads(earlier)
            assert caught.value.errno == errno.ENOENT


# --- with a name ---------------------------------------------------------------------------------


def test_a_name_is_found_by_other_processes(name, forked):
    def other(ready):
        with SharedMemory(name=name) as shared:
            assert shared.size == 1234
            shared.buf[1233] = 1

    with SharedMemory(1234, name=name, create=True) as shared:
        assert forked(other).wait() == 0
        assert shared.buf[1233] == 1
        assert repr(shared).startswith("<SharedMemory memory segment 'frames', descriptor ")
        assert fcntl.fcntl(shared.fileno(), fcntl.F_GETFD) & fcntl.FD_CLOEXEC
        with (
            SharedMemory(1234, name=name, create=True) as same,
            SharedMemory(name=name, readonly=True) as seen,
        ):
            same.buf[0] = 9
            assert seen.buf[0] == 9
            assert seen.buf.readonly
    with SharedMemory(name=name) as again:
        assert again.buf[0] == 9, "closing gives up nothing but the handle"


@pytest.mark.parametrize("umask", [0, 0o777])
def test_the_umask_changes_nothing(name, umask):
    with registry.entering():  # whose lock is made before
        former = os.umask(umask)
        try_umask(name, former)


def try_umask(name, former):
    try:
        with SharedMemory(10, name=name, create=True) as shared:
            found = (folder() / f"memory.{name}").stat()
            assert stat.S_IMODE(found.st_mode) == 0o600
            assert (found.st_uid, found.st_nlink, found.st_size) == (os.geteuid(), 1, 10)
            shared.unlink()
        with SharedMemory(10) as shared:
            assert stat.S_IMODE(os.fstat(shared.fileno()).st_mode) == 0o600
    finally:
        os.umask(former)


@pytest.mark.parametrize("bad", ["", "a/b", "/a", "..\n", "a b", "ä", "x" * 201, "a\0b"])
def test_names_that_are_none(bad):
    with pytest.raises(
        ValueError, match=re.escape(f"name must be 1 to 200 letters, digits and ._-, not {bad!r}")
    ):
        SharedMemory(1, name=bad, create=True)


def test_the_longest_and_the_oddest_name(name):
    for odd in ("x" * 200, "..", "-", "lock"):
        with SharedMemory(1, name=odd, create=True, exclusive=True) as shared:
            shared.unlink()


def test_what_is_missing_there_or_of_another_size_is_named(name):
    with pytest.raises(FileNotFoundError, match="memory segment 'frames'") as caught:
        SharedMemory(name=name)
    assert caught.value.errno == errno.ENOENT
    with SharedMemory(100, name=name, create=True):
        with pytest.raises(FileExistsError, match="memory segment 'frames'") as caught:
            SharedMemory(100, name=name, create=True, exclusive=True)
        assert caught.value.errno == errno.EEXIST
        for more in ({}, {"create": True}):
            with pytest.raises(ValueError, match="memory segment 'frames' has 100 bytes, not 101"):
                SharedMemory(101, name=name, **more)


def plant_link(path, target):
    path.symlink_to(target)


def plant_hard_link(path, target):
    path.hardlink_to(target)


def plant_fifo(path, target):
    os.mkfifo(path, 0o600)


def plant_folder(path, target):
    path.mkdir(0o700)


def plant_writable(path, target):
    path.write_bytes(b"untouched")
    path.chmod(0o620)


def plant_empty(path, target):
    path.touch(0o600)


def plant_foreign(path, target):
    path.write_bytes(b"untouched")
    os.chown(path, NOBODY, NOBODY)


PLANTED = {
    "symbolic link": (plant_link, OSError, errno.ELOOP, "is no file, but lrwx"),
    "hard link": (plant_hard_link, PermissionError, errno.EPERM, "has 2 names"),
    "FIFO": (plant_fifo, OSError, errno.EINVAL, "is no file, but prw"),
    "folder": (plant_folder, IsADirectoryError, errno.EISDIR, "is no file, but drwx"),
    "writable by the group": (
        plant_writable,
        PermissionError,
        errno.EPERM,
        "may be written by others: -rw--w----",
    ),
    "empty": (plant_empty, ValueError, None, "is empty"),
    "foreign": (plant_foreign, PermissionError, errno.EPERM, f"belongs to user {NOBODY}, not to 0"),
}


@pytest.mark.parametrize("kind", PLANTED)
def test_what_somebody_planted_is_refused_and_untouched(name, kind):
    plant, error, number, complaint = PLANTED[kind]
    if kind == "foreign" and os.geteuid() != 0:
        pytest.skip("needs root")
    with registry.entering():  # which keeps the folder
        path, target = folder() / f"memory.{name}", folder() / "memory.target"
        target.write_bytes(b"untouched")
        target.chmod(0o600)
        plant(path, target)
        before = path.lstat()
        for more in ({}, {"readonly": True}, {"size": 100, "create": True}):
            with pytest.raises(error, match=f"memory segment 'frames' {complaint}") as caught:
                SharedMemory(name=name, **more)
            assert getattr(caught.value, "errno", None) == number
        with pytest.raises(FileExistsError, match="memory segment 'frames'"):
            SharedMemory(100, name=name, create=True, exclusive=True)
        after = path.lstat()
        assert (after.st_ino, after.st_mode, after.st_mtime_ns) == (
            before.st_ino,
            before.st_mode,
            before.st_mtime_ns,
        )
        assert target.read_bytes() == b"untouched"
        path.rmdir() if kind == "folder" else path.unlink()
        target.unlink()


def test_unlink_gives_up_the_name_and_nothing_else(name):
    with SharedMemory(100, name=name, create=True) as first, SharedMemory(name=name) as second:
        first.unlink()
        second.buf[0] = 3
        assert first.buf[0] == 3
        for handle in (first, second):
            with pytest.raises(FileNotFoundError, match="memory segment 'frames'") as caught:
                handle.unlink()
            assert caught.value.errno == errno.ENOENT
        with SharedMemory(50, name=name, create=True, exclusive=True) as later:
            with pytest.raises(FileNotFoundError):
                first.unlink()
            assert [record.role for record in registry.records()] == ["creator"]
            with SharedMemory(name=name) as found:
                assert found.size == later.size
            later.unlink()
    assert os.listdir(folder()) == ["lock"]
    with SharedMemory(1) as plain, pytest.raises(ValueError, match="anonymous memory of 1 bytes has no name"):
        plain.unlink()


def test_close_then_unlink(name, forked):
    """The order that multiprocessing.shared_memory documents, in the maker and in who opened it."""
    with SharedMemory(100, name=name, create=True) as made:
        pass
    made.unlink()
    assert os.listdir(folder()) == ["lock"]
    with pytest.raises(FileNotFoundError, match="memory segment 'frames'"):
        made.unlink()
    forked(lambda ready: SharedMemory(100, name=name, create=True).close()).wait()
    found = SharedMemory(name=name)
    found.close()
    found.unlink()
    assert os.listdir(folder()) == ["lock"]


def test_a_closed_handle_unlinks_no_later_memory(name):
    first = SharedMemory(100, name=name, create=True)
    first.close()
    SharedMemory(name=name).unlink()
    with SharedMemory(100, name=name, create=True) as later:
        with pytest.raises(
            FileNotFoundError, match="'frames', whose name is that of a later one now"
        ) as caught:
            first.unlink()
        assert caught.value.errno == errno.ENOENT
        SharedMemory(name=name).close()
        later.unlink()


def test_unlink_while_another_does(name, forked):
    with SharedMemory(100, name=name, create=True) as shared:

        def other(ready):
            guard = shared.readonly_fd()
            fcntl.flock(guard, fcntl.LOCK_EX)
            ready()
            signal.pause()

        child = forked(other)
        child.wait_ready()
        with pytest.raises(BlockingIOError, match="memory segment 'frames'") as caught:
            shared.unlink()
        assert caught.value.errno == errno.EAGAIN
        child.kill()
        child.wait()
        shared.unlink()


def test_who_made_and_who_uses_it_is_recorded(name, forked):
    def roles():
        return sorted((record.kind, record.ident, record.role, record.left) for record in registry.records())

    def other(ready):
        with SharedMemory(name=name):
            ready()
            os.read(reader, 1)
        shared.close()  # this process has two

    reader, writer = os.pipe()
    shared = SharedMemory(100, name=name, create=True)
    (record,) = registry.records()
    found = os.fstat(shared.fileno())
    assert record.birth == f"{found.st_dev}.{found.st_ino}"
    child = forked(other)
    child.wait_ready()
    assert roles() == [("memory", name, "creator", False), ("memory", name, "user", False)]
    os.write(writer, b".")
    assert child.wait() == 0
    shared.close()
    assert roles() == [("memory", name, "creator", True)]
    dropped = SharedMemory(name=name)
    del dropped
    with SharedMemory(name=name) as again:
        again.unlink()
    assert roles() == []
    os.close(reader)
    os.close(writer)


def test_a_handle_that_is_dropped_keeps_its_record(name):
    shared = SharedMemory(100, name=name, create=True)
    del shared
    (record,) = registry.records()
    assert not record.left


def test_fifty_race_for_a_name(name, forked):
    begin, start = os.pipe()

    def racer(ready, exclusive):
        ready()
        os.read(begin, 1)
        try:
            shared = SharedMemory(10_000, name=name, create=True, exclusive=exclusive)
        except FileExistsError:
            shared = SharedMemory(10_000, name=name)
            shared.close()
            sys.exit(3)
        (record,) = [mine for mine in registry.records() if mine.process.pid == os.getpid()]
        assert len(bytes(shared.buf)) == 10_000
        shared.close()
        sys.exit(4 if record.role == "creator" else 3)

    racers = [forked(racer, number % 2 == 0) for number in range(50)]
    for child in racers:
        child.wait_ready()
    os.write(start, b"." * 50)
    assert sorted(child.wait() for child in racers) == [3] * 49 + [4]
    os.close(begin)
    os.close(start)


def test_a_creator_killed_in_the_middle_leaves_nothing(name, forked):
    def make(ready):
        ready()
        SharedMemory(512 << 20, name=name, create=True)

    def blocks(pid):
        for fd in Path(f"/proc/{pid}/fd").iterdir():
            try:
                if re.search(r"/ipckit-\d+/#\d+ ", os.readlink(fd)):
                    return fd.stat().st_blocks
            except FileNotFoundError:
                continue
        return 0

    def killed_in_the_middle():
        child = forked(make)
        child.wait_ready()
        while blocks(child.pid) <= 1000 and state(child.pid) != "Z":
            pass
        child.kill()
        if child.wait() == -signal.SIGKILL and not (folder() / f"memory.{name}").exists():
            return True
        SharedMemory(name=name).unlink()  # it was faster
        return False

    eventually(killed_in_the_middle)
    assert not (folder() / f"memory.{name}").exists()
    assert os.statvfs("/dev/shm").f_blocks - os.statvfs("/dev/shm").f_bfree < 1000
    with SharedMemory(10, name=name, create=True, exclusive=True) as shared:
        shared.unlink()


# --- a small /dev/shm ----------------------------------------------------------------------------


def in_small(options, code):
    """Run *code* where /dev/shm is a file system of its own with *options*."""
    if not shutil.which("unshare"):
        pytest.skip("needs unshare(1)")
    unshare = ["unshare", "-m"] if os.geteuid() == 0 else ["unshare", "-Urm"]
    if subprocess.run([*unshare, "true"], capture_output=True).returncode:
        pytest.skip("needs a mount namespace")
    mount = f'mount -t tmpfs -o {options} tmpfs /dev/shm && exec "$0" "$@"'
    return run(code, prefix=[*unshare, "sh", "-c", mount])


def test_a_full_file_system_is_an_error_and_no_signal():
    code = """if True:
        import os
        from ipckit import registry
        from ipckit.memory import SharedMemory
        with SharedMemory(8 << 20) as shared:  # not limited by /dev/shm
            shared.buf[:] = bytes(8 << 20)
        try:
            SharedMemory(8 << 20, name="big", create=True)
        except OSError as error:
            print(error.errno, error)
        with SharedMemory(900_000, name="fits", create=True) as shared:
            shared.buf[:] = bytes(900_000)
            shared.unlink()
        registry.tidy()
        print(os.listdir("/dev/shm"))
        SharedMemory(8 << 20, name="big", create=True)
    """
    status, printed = in_small("size=1M", code)
    assert status == 1
    first, second, *_, last = printed.splitlines()
    told = r"\[Errno 28\] .*: \"memory segment 'big' of 8388608 bytes: (\d+) bytes are free\""
    match = re.fullmatch("28 " + told, first)
    assert match and 900_000 < int(match[1]) <= 1 << 20
    assert second == "[]"
    assert re.fullmatch("OSError: " + told, last)


def test_memory_that_can_not_be_recorded_is_not_made():
    code = """if True:
        import os
        from ipckit.memory import SharedMemory
        try:
            SharedMemory(100, name="odd", create=True)
        except OSError as error:
            at = f"/dev/shm/ipckit-{os.geteuid()}/memory.odd"
            print(error.errno, os.path.exists(at), len(os.listdir("/proc/self/fd")))
    """
    for inodes in (4, 5):  # the root, our folder, its lock, the memory; then the folder of the record
        assert in_small(f"nr_inodes={inodes}", code) == (0, f"{errno.ENOSPC} False 4\n")


# --- the rest ------------------------------------------------------------------------------------


def test_what_can_not_be_allocated_is_a_plain_error():
    reader, writer = os.pipe()
    with pytest.raises(OSError) as caught:
        memory.allocate(writer, 10, "a pipe")
    assert caught.value.errno in (errno.ESPIPE, errno.EINVAL)
    os.close(reader)
    os.close(writer)


def test_the_example_runs():
    example = ROOT / "examples/shared_array.py"
    done = subprocess.run([sys.executable, example], capture_output=True, text=True, timeout=PATIENCE)
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout == "4 workers, 800000 bytes, the last of them 315.200\n"
