"""A place of the tests' own: they neither see nor touch what the rest of the machine has.

Run as a program, ``python isolation.py ARGUMENT...`` isolates itself and becomes ``python ARGUMENT...``, with
all signals blocked.
"""

import ctypes
import os
import signal
import sys
from pathlib import Path

NEW_NS, NEW_IPC, NEW_USER = 0x00020000, 0x08000000, 0x10000000
PRIVATE_AND_BELOW = 0x00044000
CAPABILITY_VERSION_3 = 0x20080522

# Where the POSIX message queues can be listed; where there is no /dev/mqueue, a folder that all have.
QUEUES = "/dev/mqueue" if os.path.isdir("/dev/mqueue") else "/mnt"

libc = ctypes.CDLL(None, use_errno=True)


def isolate() -> bool:
    """Give this process its own System V objects, message queues and /dev/shm.

    An ordinary user gets them by way of a user namespace, and is an ordinary user in there.

    Returns: False where that is refused, as many containers do, and for a process with threads.
    """
    child = os.fork()
    if child == 0:  # tried first where it does no harm: what is granted by half can't be taken back
        try:
            _enter()
            os._exit(0)
        finally:
            os._exit(1)
    if os.waitpid(child, 0)[1]:
        return False
    _enter()
    os.environ["IPCKIT_TESTS_ISOLATED"] = _namespace()
    return True


def _enter() -> None:
    user, group, ordinary = os.geteuid(), os.getegid(), os.geteuid() != 0
    _check(libc.unshare(NEW_NS | NEW_IPC | (NEW_USER if ordinary else 0)), "unshare")
    if ordinary:
        Path("/proc/self/setgroups").write_text("deny")
        Path("/proc/self/uid_map").write_text(f"{user} {user} 1")
        Path("/proc/self/gid_map").write_text(f"{group} {group} 1")
    _mount("none", "/", None, PRIVATE_AND_BELOW)
    _mount("shm", "/dev/shm", b"tmpfs", 0, b"mode=1777")
    _mount("mqueue", QUEUES, b"mqueue")
    if ordinary:
        _drop_capabilities()


def isolated() -> bool:
    """Whether this process is where isolate() took it, or a process that started it."""
    return os.environ.get("IPCKIT_TESTS_ISOLATED") == _namespace()


def _namespace() -> str:
    return os.readlink("/proc/self/ns/ipc")


def _mount(source: str, where: str, kind: bytes | None, flags: int = 0, options: bytes | None = None) -> None:
    _check(libc.mount(source.encode(), where.encode(), kind, flags, options), f"mount {where}")


def _drop_capabilities() -> None:
    """Those that a user namespace gives to its maker, who is root in there: no ordinary user has them."""
    header, none = (ctypes.c_uint32 * 2)(CAPABILITY_VERSION_3, 0), (ctypes.c_uint32 * 6)()
    _check(libc.capset(header, none), "capset")


def _check(rc: int, what: str) -> None:
    if rc < 0:
        raise OSError(ctypes.get_errno(), f"{what}: {os.strerror(ctypes.get_errno())}")


def leave_process_1() -> None:
    """As process 1 (a container's entry point): go on in a child, and be its init meanwhile.

    Process 1 has no default actions of signals and adopts all orphans: the tests are about neither.
    """
    if os.getpid() != 1:
        return
    passed_on = {signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGQUIT}
    former = signal.pthread_sigmask(signal.SIG_BLOCK, passed_on | {signal.SIGCHLD})
    child = os.fork()
    if child == 0:
        signal.pthread_sigmask(signal.SIG_SETMASK, former)
        return
    while True:
        info = signal.sigwaitinfo(passed_on | {signal.SIGCHLD})
        if info.si_signo != signal.SIGCHLD:
            if info.si_code <= 0:  # by kill(2): a terminal's has come to the child as well
                os.kill(child, info.si_signo)
        elif (status := _reap(child)) is not None:
            os._exit(os.WEXITSTATUS(status) if os.WIFEXITED(status) else 128 + os.WTERMSIG(status))


def _reap(child: int) -> int | None:
    """Reap all that ended; how *child* did, if it is among them."""
    found = None
    while True:
        try:
            pid, status = os.waitpid(-1, os.WNOHANG)
        except ChildProcessError:
            return found
        if pid == 0:
            return found
        if pid == child:
            found = status


if __name__ == "__main__":
    isolate()
    # So are they in the threads that start before the tests: a signal for the process is one for the tests.
    signal.pthread_sigmask(signal.SIG_BLOCK, signal.valid_signals())
    os.execv(sys.executable, [sys.executable, *sys.argv[1:]])
