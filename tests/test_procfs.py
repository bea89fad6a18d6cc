"""A jail without /proc: what needs it says so by one error, before it has made anything; the rest works."""

import ast
import ctypes
import errno
import os
from pathlib import Path

import pytest
from conftest import PATIENCE

import ipckit
from ipckit import _procfs, inventory, limits, pipes, posix, registry, sockets, sysv
from ipckit.servers.listening import activated, listen_unix

ROOMS = sorted(Path(ipckit.__file__).parent.rglob("*.py"))
NAME = f"noproc-{os.getpid()}"


def without_proc():
    """From here on /proc is empty for this process, a child of the test. Skips where that is not allowed."""
    libc = ctypes.CDLL(None, use_errno=True)
    new_ns, new_user, private_and_below = 0x00020000, 0x10000000, 0x00044000
    if libc.unshare(new_ns if os.geteuid() == 0 else new_ns | new_user):
        os._exit(77)
    libc.mount(b"none", b"/", None, private_and_below, None)
    if libc.mount(b"none", b"/proc", b"tmpfs", 0, None):
        os._exit(77)


def in_jail(forked, what):
    def target(ready):
        without_proc()
        what()

    if (status := forked(target).wait()) == 77:
        pytest.skip("no namespaces here")
    assert status == 0


def chmod_by_link(path):
    os.umask(0o777)
    listen_unix(path)


NEED = {
    "put": lambda: ipckit.Queue().put(1),
    "get": lambda: ipckit.Queue().get(timeout=0),
    "named queue": lambda: ipckit.Queue.open(NAME),
    "named memory": lambda: ipckit.SharedMemory(100, name=NAME, create=True),
    "readonly_fd": lambda: ipckit.SharedMemory(100).readonly_fd(),
    "POSIX queue": lambda: posix.MessageQueue(f"/{NAME}", create=True),
    "POSIX memory": lambda: posix.SharedMemory(f"/{NAME}", 100, create=True),
    "POSIX semaphore": lambda: posix.Semaphore(f"/{NAME}", create=True),
    "System V queue": lambda: sysv.MessageQueue(create=True),
    "System V memory": lambda: sysv.SharedMemory(size=100, create=True),
    "System V semaphore": lambda: sysv.Semaphore(create=True),
    "keep": lambda: ipckit.fork(lambda: 0, keep=()),
    "mode": lambda: chmod_by_link(f"/tmp/{NAME}.sock"),
    "survey": limits.survey,
    "inventory": inventory.objects,
    "myself": registry.myself,
}


@pytest.mark.parametrize("what", NEED)
def test_what_needs_it_says_so(forked, what):
    def refused():
        before = os.listdir("/dev/shm")
        with pytest.raises(OSError) as caught:
            NEED[what]()
        assert caught.value.errno == errno.ENOSYS
        assert "/proc is not mounted" in str(caught.value)
        assert os.listdir("/dev/shm") == before
        assert not os.path.exists(f"/tmp/{NAME}.sock")

    in_jail(forked, refused)


def exchanged(ends):
    one, other = ends
    one.send(b"x")
    assert other.recv(timeout=PATIENCE) == b"x"


def exchanged_with_a_client(path):
    def talk():
        ipckit.connect(path, timeout=PATIENCE).send(b"x")

    with ipckit.Listener(path) as listener, ipckit.fork(talk):
        assert listener.accept(timeout=PATIENCE).recv(timeout=PATIENCE) == b"x"


def waited_for_children():
    with ipckit.Reaper() as reaper:
        reaper.fork(lambda: 3)
        reaper.wait(PATIENCE)


def logged(path):
    with ipckit.MessageLog(path, durability="written") as log:
        log.append(b"x\n")


def told_of_impossible_memory():
    with pytest.raises(OSError, match="bytes of memory are available") as caught:
        ipckit.SharedMemory(1 << 50)
    assert caught.value.errno == errno.ENOMEM


def refused_descriptor():
    os.environ.update(LISTEN_PID=str(os.getpid()), LISTEN_FDS="1")
    os.dup2(os.open("/dev/null", os.O_RDONLY), 3)
    with pytest.raises(OSError, match="descriptor 3 of LISTEN_FDS") as caught:
        activated()
    assert caught.value.errno == errno.ENOTSOCK


DO_NOT = {
    "memory": lambda path: ipckit.SharedMemory(65 << 20).close(),
    "impossible memory": lambda path: told_of_impossible_memory(),
    "lock": lambda path: ipckit.Lock().acquire(),
    "pipe": lambda path: exchanged(pipes.pipe()[::-1]),
    "duplex": lambda path: exchanged(ipckit.duplex()),
    "channel": lambda path: exchanged(ipckit.channel()),
    "listener": exchanged_with_a_client,
    "children": lambda path: waited_for_children(),
    "log": logged,
    "descriptor": lambda path: refused_descriptor(),
    "socket file": lambda path: sockets.check_path(path) and listen_unix(path).close(),
}


@pytest.mark.parametrize("what", DO_NOT)
def test_what_does_not_need_it_works(forked, what, tmp_path):
    in_jail(forked, lambda: DO_NOT[what](str(tmp_path / "x")))


def test_a_process_that_may_live_is_not_called_dead(forked):
    process = registry.Process(os.getpid(), 1, 1)

    def look():
        assert process.state() == "unknown"
        assert registry.lives(os.getpid())

    in_jail(forked, look)


def test_one_function_asks():
    asks = set()
    for room in ROOMS:
        for node in ast.walk(ast.parse(room.read_text())):
            if isinstance(node, ast.Constant) and str(node.value).startswith("/proc"):
                asks.add(room.name)
    assert asks <= {"_procfs.py", "objects.py"}  # the latter names it in messages


def test_its_number():
    assert _procfs.own_number() == os.getpid()
    assert _procfs.path("self/stat") == "/proc/self/stat"
