import copy
import errno
import gc
import itertools
import os
import pickle
import re
import signal
import subprocess
import sys
import textwrap
import threading
from pathlib import Path

import numpy as np
import pytest
import sysv_ipc
from conftest import PATIENCE, eventually
from hypothesis import given, settings
from hypothesis import strategies as st

from ipckit import Closed, registry
from ipckit.sysv.keys import ftok
from ipckit.sysv.memory import SegmentStat, SharedMemory, in_use

ROOT = Path(__file__).resolve().parent.parent
PEER = ROOT / "build/peers/sysv_memory"
PROOF = os.environ.get("IPCKIT_PROOF") == "1"
NOBODY = 65534
projects = itertools.cycle(range(1, 256))


@pytest.fixture
def key(tmp_path):
    """A (path, project) that no other test has."""
    return tmp_path, next(projects)


@pytest.fixture
def segment():
    with SharedMemory(size=5000) as made:
        yield made
        made.remove()


def gone(ident):
    """A segment of this id is not there any more."""
    return not any(
        line.split()[1] == str(ident) for line in Path("/proc/sysvipc/shm").read_text().splitlines()
    )


def peer(*words):
    return subprocess.run(
        [PEER, *map(str, words)], capture_output=True, text=True, check=True, timeout=PATIENCE
    ).stdout.rstrip("\n")


# --- a segment -----------------------------------------------------------------------------------


def test_two_processes_have_the_same_bytes(key, forked):
    def child(ready):
        with SharedMemory(key) as found:
            assert found.size == 100
            assert bytes(found.buf[:5]) == b"hello"
            found.buf[99] = 42

    with SharedMemory(key, 100, create=True, exclusive=True) as made:
        made.buf[:5] = b"hello"
        assert forked(child).wait() == 0
        assert made.buf[99] == 42
        assert made.key == ftok(*key)
        made.remove()


def test_the_size_is_the_one_asked_for(segment):
    assert (segment.size, len(segment.buf), segment.stat().size) == (5000, 5000, 5000)
    with SharedMemory.from_id(segment.id) as found:
        assert (found.size, found.buf.nbytes, found.buf.readonly) == (5000, 5000, False)
        assert not found.huge


def test_a_new_segment_is_zeros_and_private_ones_differ(segment):
    assert not any(segment.buf)
    with SharedMemory(size=1) as other:
        assert other.id != segment.id
        assert (other.key, segment.key) == (0, 0)
        other.remove()


def test_create_finds_what_is_there(key):
    with SharedMemory(key, 10, create=True) as made, SharedMemory(key, 8, create=True) as found:
        assert made.id == found.id
        assert found.size == 10
        made.remove()


def test_read_only_can_not_be_written(segment):
    segment.buf[0] = 7
    with SharedMemory.from_id(segment.id, readonly=True) as found:
        view = found.buf
        assert view.readonly and view[0] == 7
        with pytest.raises(TypeError):
            view[0] = 1
        for array in (found.asarray("u1"), np.ndarray(10, "u1", found.buf), np.frombuffer(view, "u1")):
            with pytest.raises(ValueError):
                array.flags.writeable = True
        with pytest.raises(TypeError):
            view.obj[0] = 1  # not even what is behind the view


def test_stat(segment, forked):
    before = segment.stat()
    assert isinstance(before, SegmentStat)
    assert (before.nattch, before.creator_pid, before.last_pid) == (1, os.getpid(), os.getpid())
    assert (before.mode, before.removed, before.locked, before.key) == (0o600, False, False, 0)
    assert (before.uid, before.gid, before.creator_uid) == (os.geteuid(), os.getegid(), os.geteuid())
    assert before.change_time > 0 and before.attach_time >= before.change_time and before.detach_time == 0
    child = forked(lambda ready: SharedMemory.from_id(segment.id).close())
    assert child.wait() == 0
    after = segment.stat()
    assert after.last_pid == child.pid and after.detach_time > 0
    assert after.nattch == 1


def test_set_changes_mode_and_owner(segment):
    segment.set(mode=0o644, uid=NOBODY, gid=NOBODY)
    found = segment.stat()
    assert (found.mode, found.uid, found.gid, found.creator_uid) == (0o644, NOBODY, NOBODY, os.geteuid())
    segment.set(mode=0o600)
    assert (segment.stat().mode, segment.stat().uid) == (0o600, NOBODY)
    with pytest.raises(ValueError, match="0o1777"):
        segment.set(mode=0o1777)
    with pytest.raises(ValueError, match="gid must be .* not -1"):
        segment.set(gid=-1)


def test_umask_has_no_part_in_the_mode():
    former = os.umask(0o077)
    try:
        with SharedMemory(size=1, mode=0o666) as made:
            assert made.stat().mode == 0o666
            made.remove()
    finally:
        os.umask(former)


def test_removed_early_it_lives_as_long_as_it_is_attached(key, forked):
    with SharedMemory(key, 10, create=True) as made:
        made.remove()
        assert made.stat().removed
        with pytest.raises(FileNotFoundError):
            SharedMemory(key)
        made.buf[0] = 9

        def child(ready):
            with SharedMemory.from_id(made.id) as late:  # Linux lets the id be attached still
                assert late.buf[0] == 9 and late.stat().removed

        assert forked(child).wait() == 0
        assert not gone(made.id)
        made.remove()  # no error: it is still there
    assert gone(made.id)


def test_the_record_of_a_segment_goes_with_it():
    made = SharedMemory(size=10)
    mine = [record for record in registry.records() if record.ident == str(made.id)]
    assert [(record.kind, record.role, record.birth) for record in mine] == [
        ("sysv-memory", "creator", str(made.stat().change_time))
    ]
    made.remove()
    assert not [record for record in registry.records() if record.ident == str(made.id)]
    made.close()


def test_what_can_not_be_recorded_is_not_left_behind(monkeypatch):
    def full(*_, **__):
        raise OSError(errno.ENOSPC, "no inode left")

    monkeypatch.setattr(registry, "enter", full)
    with pytest.raises(OSError, match="no inode left"):
        SharedMemory(size=1)  # the fixture of every test looks for what is left


# --- bad input -----------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [0, -1])
def test_a_new_segment_needs_a_size(key, size):
    for arguments in ({}, {"create": True}):
        with pytest.raises(ValueError, match=f"size .* not {size}"):
            SharedMemory(key if arguments else None, size, **arguments)


def test_arguments_that_make_no_sense(key):
    with pytest.raises(ValueError, match="exclusive=True needs create=True"):
        SharedMemory(key, 1, exclusive=True)
    with pytest.raises(ValueError, match="0o10600"):
        SharedMemory(key, 1, create=True, mode=0o10600)
    with pytest.raises(ValueError, match="not 0$"):
        SharedMemory(0, 1, create=True)
    with pytest.raises(TypeError, match="'/name'"):
        SharedMemory("/name", 1, create=True)


def test_not_there_and_there_already(key):
    with pytest.raises(FileNotFoundError, match="System V segment .*key 0x") as caught:
        SharedMemory(key)
    assert caught.value.errno == errno.ENOENT
    with SharedMemory(key, 10, create=True) as made:
        with pytest.raises(FileExistsError, match="segment of 10 bytes .*key 0x") as caught:
            SharedMemory(key, 10, create=True, exclusive=True)
        assert caught.value.errno == errno.EEXIST
        made.remove()
    for call in (SharedMemory.from_id, lambda ident: pickle.loads(pickle.dumps(made))):
        with pytest.raises((FileNotFoundError, Closed), match=f"segment {made.id}"):
            call(made.id)


def test_smaller_than_asked_for(key):
    with SharedMemory(key, 10, create=True) as made:
        for create in (False, True):
            with pytest.raises(OSError, match=f"segment {made.id} .*has 10 bytes, and 11") as caught:
                SharedMemory(key, 11, create=create)
            assert caught.value.errno == errno.EINVAL
        made.remove()


@pytest.mark.skipif(os.geteuid() != 0, reason="needs root, to become somebody else")
def test_no_permission(key, forked):
    def child(ready):
        os.setresgid(NOBODY, NOBODY, NOBODY)
        os.setresuid(NOBODY, NOBODY, NOBODY)
        for readonly in (False, True):
            with pytest.raises(PermissionError, match=f"segment {made.id}") as caught:
                SharedMemory(ftok_key, readonly=readonly)
            assert caught.value.errno == errno.EACCES
        with pytest.raises(PermissionError, match=f"removing System V segment {made.id}") as caught:
            made.remove()
        assert caught.value.errno == errno.EPERM
        with pytest.raises(PermissionError, match=f"stat of System V segment {made.id}"):
            made.stat()
        with pytest.raises(PermissionError, match=f"setting System V segment {made.id}") as caught:
            made.set(mode=0o666)
        assert caught.value.errno == errno.EPERM
        assert in_use(made.id), "not to be looked into, so it counts as in use"

    def reader(ready):
        os.setresuid(NOBODY, NOBODY, NOBODY)
        with pytest.raises(PermissionError, match="attaching .* read-write"):
            SharedMemory(ftok_key)
        with SharedMemory(ftok_key, readonly=True) as found:
            assert found.buf[0] == 5
        with pytest.raises(PermissionError, match="setting"):
            made.set(mode=0o666)

    ftok_key = ftok(*key)
    with SharedMemory(key, 10, create=True) as made:
        made.buf[0] = 5
        assert forked(child).wait() == 0
        made.set(mode=0o644)
        assert forked(reader).wait() == 0
        made.remove()


def in_own_namespace(code, *limits):
    """Run *code* in an ipc namespace with its own limits; what it printed."""
    script = textwrap.dedent(code)
    shell = "; ".join([f"echo {value} > /proc/sys/kernel/{name}" for name, value in limits] + ['exec "$@"'])
    command = ["unshare", "--ipc", "sh", "-ec", shell, "sh", sys.executable, "-c", script]
    done = subprocess.run(command, capture_output=True, text=True, timeout=PATIENCE)
    if done.returncode and "unshare" in done.stderr:
        pytest.skip(f"no namespace of one's own here: {done.stderr}")
    assert (done.returncode, done.stderr) == (0, ""), done.stderr
    return done.stdout.strip()


TRY = """
    from ipckit.sysv.memory import SharedMemory
    made = []
    try:
        for _ in range(5):
            made.append(SharedMemory(size={size}))
    except OSError as error:
        print(len(made), error.errno, error)
    for segment in made:
        segment.remove()
        segment.close()
"""


@pytest.mark.parametrize(
    "size, limit, made, number, text",
    [
        (
            5000,
            ("shmmax", 4096),
            0,
            errno.EINVAL,
            "of 5000 bytes .*kernel.shmmax is 4096; .*-w kernel.shmmax=5000",
        ),
        (5000, ("shmmni", 3), 3, errno.ENOSPC, "kernel.shmmni is 3; .*kernel.shmmni=6"),
        (8192, ("shmall", 5), 2, errno.ENOSPC, r"kernel.shmall is 5; .*kernel.shmall=6 \(pages\)"),
    ],
)
def test_limits_are_named_with_the_command(size, limit, made, number, text):
    first, code, message = in_own_namespace(TRY.format(size=size), limit).split(" ", 2)
    assert (int(first), int(code)) == (made, number)
    assert re.search(text, message), message


@pytest.mark.parametrize("size", [1 << 50, 1 << 62, 1 << 64, 1 << 70])
def test_more_than_there_is(size):
    with pytest.raises(
        OSError, match=f"segment of {min(size, (1 << 64) - 1)} bytes|segment of {size} bytes"
    ) as caught:
        SharedMemory(size=size)
    assert caught.value.errno in (errno.ENOMEM, errno.EINVAL, errno.ENOSPC)


def test_a_closed_handle(segment):
    found = SharedMemory.from_id(segment.id)
    found.close()
    found.close()
    assert found.closed and (found.id, found.size) == (segment.id, 5000)
    for verb in (
        lambda: found.buf,
        lambda: found.asarray("u1"),
        found.stat,
        found.in_use,
        found.set,
        lambda: pickle.dumps(found),
    ):
        with pytest.raises(Closed, match=f"System V segment {segment.id} .* is closed"):
            verb()


def test_remove_after_close():
    with SharedMemory(size=5000) as made:
        pass
    made.remove()
    assert not registry.records()
    with pytest.raises(OSError, match=f"removing System V segment {made.id}") as caught:
        made.remove()
    assert caught.value.errno == errno.EIDRM


def test_a_broken_handle_says_removed(segment):
    with SharedMemory.from_id(segment.id) as found:
        found._id = 0x7FFFFFF0  # as if it had gone, which the kernel prevents while it is attached
        for verb in (found.stat, found.set, found.remove):
            with pytest.raises(OSError, match=f"System V segment {segment.id}") as caught:
                verb()
            assert caught.value.errno == errno.EIDRM
        assert not found.in_use()
        found._id = segment.id


# --- huge pages ----------------------------------------------------------------------------------


def huge_pages():
    return int(Path("/proc/sys/vm/nr_hugepages").read_text())


def test_huge_pages_are_asked_for_politely():
    with SharedMemory(size=3 << 20, huge=True) as made:
        assert made.huge == bool(huge_pages())
        assert (made.size, len(made.buf)) == (3 << 20, 3 << 20)
        made.buf[-1] = 1
        made.remove()


@pytest.mark.skipif(huge_pages() > 0, reason="there are huge pages")
def test_huge_pages_required_and_missing():
    with pytest.raises(OSError, match=r"huge pages: vm.nr_hugepages is 0; .*-w vm.nr_hugepages=2 ") as caught:
        SharedMemory(size=3 << 20, huge="require")
    assert caught.value.errno in (errno.ENOMEM, errno.EPERM, errno.EINVAL)


@pytest.mark.skipif(os.geteuid() != 0, reason="needs CAP_IPC_LOCK")
def test_a_segment_of_huge_pages_is_attached():
    """A C program's; no page of it is there, so only the mapping can be looked at."""
    handles = [SharedMemory.from_id(int(peer("huge", (3 << 20) + i))) for i in range(10)]
    for i, found in enumerate(handles):
        assert found.huge
        assert (found.size, len(found.buf), found.stat().nattch) == ((3 << 20) + i, (3 << 20) + i, 1)
        found.remove()
        found.close()


# --- views ---------------------------------------------------------------------------------------


def views_of(segment):
    yield segment.buf
    yield segment.buf[10:20]
    yield segment.buf.cast("I")
    yield memoryview(segment.buf)
    yield segment.asarray("f8", (5, 5), 8)
    yield segment.asarray("u1")[::7]
    yield np.ndarray((10,), "u1", segment.buf)  # keeps what is behind the view, not the view
    yield np.frombuffer(segment.buf, "i4")
    yield iter(segment.buf)
    yield pickle.PickleBuffer(segment.buf)


def test_close_is_refused_while_a_view_lives(segment):
    found = SharedMemory.from_id(segment.id)
    for view in views_of(found):
        with pytest.raises(BufferError, match=f"System V segment {segment.id} .*close\\(defer=True\\)"):
            found.close()
        assert not found.closed and bytes(found.buf[:1]) == b"\0"
        del view
        assert segment.stat().nattch == 2
    found.close()
    assert segment.stat().nattch == 1


def test_a_deferred_close_detaches_with_the_last_view(segment):
    for i in range(10):
        found = SharedMemory.from_id(segment.id)
        view = list(views_of(found))[i]
        found.close(defer=True)
        assert found.closed
        assert segment.stat().nattch == 2
        del view, found
        assert segment.stat().nattch == 1


def test_a_handle_dropped_leaves_its_views(segment):
    array = SharedMemory.from_id(segment.id).asarray("u1")
    gc.collect()
    array[4999] = 3
    assert segment.buf[4999] == 3
    del array
    assert segment.stat().nattch == 1


def test_an_error_in_the_block_is_the_one_that_is_seen(segment):
    with pytest.raises(KeyError, match="mine"), SharedMemory.from_id(segment.id) as found:
        array = found.asarray("u1")
        raise KeyError("mine")
    assert array[0] == 0


def test_asarray(segment):
    array = segment.asarray(np.int32, (10, 20), 64)
    array[9, 19] = -5
    assert segment.buf.cast("i")[16 + 199] == -5
    assert segment.asarray("u1").shape == (5000,)
    assert segment.asarray("f8", 3).shape == (3,)
    assert segment.asarray("f8", ()).shape == ()
    assert segment.asarray("f8", (1, -1)).shape == (1, 625)
    for bad in (("f8", 626), ("f8", 1, 5000), ("f8", 1, 4), ("f8", 1, -8), (object, 1), ("f8", (3, -1))):
        with pytest.raises(ValueError, match=f"System V segment {segment.id}"):
            segment.asarray(*bad)


def test_threads_that_look_and_one_that_closes(segment):
    """A thread gets views, all of them good, or Closed; never anything worse."""
    for _ in range(20):
        found = SharedMemory.from_id(segment.id)
        start = threading.Barrier(3)
        wrong = []

        def look(found=found, start=start, wrong=wrong):
            start.wait()
            try:
                while True:
                    wrong += found.buf[4999:].tolist()[1:]
            except Closed:
                pass

        threads = [threading.Thread(target=look) for _ in range(2)]
        for thread in threads:
            thread.start()
        start.wait()
        while not found.closed:
            try:
                found.close()
            except BufferError:
                continue
        # A failed close of before may have ended a looker; the good one ends all.
        for thread in threads:
            thread.join()
        assert not wrong
    assert segment.stat().nattch == 1


STEPS = st.lists(
    st.tuples(
        st.sampled_from(
            [
                "attach",
                "view",
                "slice",
                "array",
                "ndarray",
                "close",
                "defer",
                "drop",
                "forget",
                "read",
                "write",
                "remove",
            ]
        ),
        st.integers(0, 7),
    ),
    max_size=40,
)


@pytest.mark.proof
@settings(max_examples=1000 if PROOF else 100)
@given(steps=STEPS)
def test_no_order_of_views_and_closes_is_worse_than_an_error(steps):
    root = SharedMemory(size=4096)
    handles, views = [SharedMemory.from_id(root.id)], []

    def pick(things, number):
        return things[number % len(things)] if things else None

    for verb, number in steps:
        handle, view = pick(handles, number), pick(views, number)
        try:
            if verb == "attach":
                handles.append(SharedMemory.from_id(root.id, readonly=bool(number & 1)))
            elif verb == "view" and handle:
                views.append(handle.buf)
            elif verb == "slice" and view is not None:
                views.append(view[number:])
            elif verb == "array" and handle:
                views.append(handle.asarray("u1"))
            elif verb == "ndarray" and handle:
                views.append(np.ndarray(64, "u1", handle.buf))
            elif verb == "close" and handle:
                handle.close()
            elif verb == "defer" and handle:
                handle.close(defer=True)
            elif verb == "drop" and handle:
                handles.remove(handle)
            elif verb == "forget" and views:
                del views[number % len(views)]
            elif verb == "read" and view is not None:
                sum(bytes(view[:64]))
            elif verb == "write" and view is not None:
                view[0] = number
            elif verb == "remove":
                root.remove()
        except (Closed, BufferError, TypeError, ValueError, IndexError):
            pass
        del handle, view
    for view in views:
        bytes(view)
    del views
    view = None
    for handle in handles:
        handle.close()
    assert root.stat().nattch == 1
    root.remove()
    root.close()
    assert gone(root.id)


# --- other processes -----------------------------------------------------------------------------


def test_a_fork_child_has_the_segment_and_detaches_for_itself(segment, forked):
    def child(ready):
        segment.buf[0] = 1
        assert segment.stat().nattch == 2 and segment.in_use()
        segment.close()
        with SharedMemory.from_id(segment.id) as again:
            assert again.stat().nattch == 2

    assert forked(child).wait() == 0
    assert segment.buf[0] == 1 and segment.stat().nattch == 1


POOL = """
import multiprocessing
import sys
from ipckit.sysv.memory import SharedMemory

def fill(segment, value):
    with segment:
        segment.buf[:] = bytes([value]) * segment.size

if __name__ == "__main__":
    context = multiprocessing.get_context(sys.argv[1])
    with SharedMemory(size=10) as segment:
        child = context.Process(target=fill, args=(segment, 7))
        child.start()
        child.join()
        print(child.exitcode, bytes(segment.buf) == bytes([7] * 10))
        segment.remove()
"""


@pytest.mark.parametrize("method", ["fork", "spawn", pytest.param("forkserver", marks=pytest.mark.slow)])
def test_pickled_to_a_child_of_multiprocessing(method, tmp_path):
    script = tmp_path / "pool.py"
    script.write_text(POOL)
    done = subprocess.run([sys.executable, script, method], capture_output=True, text=True, timeout=PATIENCE)
    assert (done.stdout, done.stderr) == ("0 True\n", "")


def test_copies_are_handles_of_their_own(segment):
    for make in (lambda it: pickle.loads(pickle.dumps(it)), copy.copy, copy.deepcopy):
        copied = make(segment)
        assert copied.id == segment.id and segment.stat().nattch == 2
        copied.close()
    with SharedMemory.from_id(segment.id, True) as read, pickle.loads(pickle.dumps(read)) as again:
        assert again.readonly and again.buf.readonly


def test_in_use_while_a_child_of_a_killed_parent_has_it(forked, tmp_path):
    """The scenario of a database server: the parent is killed, and a child of it goes on."""
    told = tmp_path / "told"

    def parent(ready):
        made = SharedMemory(size=100)
        if os.fork() == 0:
            told.write_text(f"{os.getpid()} {made.id}")
            ready()
            signal.pause()
        signal.pause()

    first = forked(parent)
    first.wait_ready()
    child, ident = map(int, told.read_text().split())
    first.kill()
    first.wait()
    with SharedMemory.from_id(ident) as found:
        assert found.stat().creator_pid == first.pid
        assert found.in_use() and in_use(ident)
        os.kill(child, signal.SIGSTOP)  # still living
        assert found.in_use()
        os.kill(child, signal.SIGKILL)
        eventually(lambda: not found.in_use())
        assert in_use(ident), "by ourselves"
        found.remove()
    assert not in_use(ident), "there is no such segment any more"


def test_in_use_counts_other_handles_of_this_process(segment):
    assert not segment.in_use()
    with SharedMemory.from_id(segment.id):
        assert segment.in_use()
    assert not segment.in_use()


# --- interoperation ------------------------------------------------------------------------------


def test_a_c_program_reads_what_we_write_and_the_reverse(key):
    path, project = key
    assert int(peer("ftok", path, project)) == ftok(path, project)
    ident = int(peer("write", path, project, 300, "from C"))
    with SharedMemory(key) as found:
        assert (found.id, found.size) == (ident, 300)
        assert bytes(found.buf[:7]) == b"from C\0"
        assert not found.in_use()
        found.buf[:10] = b"from here\0"
        assert peer("read", path, project) == "from here"
        found.remove()
    with SharedMemory(key, 50, create=True, exclusive=True) as made:
        made.buf[:5] = b"ours\0"
        assert peer("read", path, project) == "ours"
        assert int(peer("write", path, project, 40, "theirs")) == made.id
        assert bytes(made.buf[:6]) == b"theirs"
        made.remove()


def test_the_sysv_ipc_package_reads_what_we_write_and_the_reverse(key, forked):
    number = ftok(*key)

    def theirs_reads(ready):
        found = sysv_ipc.SharedMemory(number)
        assert found.read(4) == b"ours" and found.size == 50
        found.write(b"theirs")
        found.detach()

    def ours_reads(ready):
        with SharedMemory(key) as found:
            assert (found.size, bytes(found.buf[:6])) == (60, b"theirs")
            found.buf[:4] = b"ours"

    with SharedMemory(key, 50, create=True) as made:
        made.buf[:4] = b"ours"
        assert forked(theirs_reads).wait() == 0
        assert bytes(made.buf[:6]) == b"theirs"
        made.remove()
    other = sysv_ipc.SharedMemory(number, sysv_ipc.IPC_CREX, size=60)
    other.write(b"theirs")
    assert forked(ours_reads).wait() == 0
    assert other.read(4) == b"ours"
    other.detach()
    other.remove()


def test_the_example():
    script = ROOT / "examples/shared_memory.py"
    done = subprocess.run(
        [sys.executable, "-W", "error", script], capture_output=True, text=True, timeout=PATIENCE
    )
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.startswith("20000 counted by two processes\nattached 1 time")
