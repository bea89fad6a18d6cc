"""Named objects made as the rooms make them: by the kernel's calls, and a record of it."""

import ctypes
import os
from pathlib import Path

import posix_ipc
import sysv_ipc

from ipckit import inventory, registry

NEW_NS, NEW_IPC, NEW_PID = 0x00020000, 0x08000000, 0x20000000
LIBC = ctypes.CDLL(None, use_errno=True)


def change_time(table, ident):
    head, *lines = Path("/proc/sysvipc", table).read_text().splitlines()
    (row,) = (line.split() for line in lines if line.split()[1] == str(ident))
    return row[head.split().index("ctime")]


def place(status):
    return f"{status.st_dev}.{status.st_ino}"


def sysv_queue(_):
    queue = sysv_ipc.MessageQueue(None, sysv_ipc.IPC_CREX, max_message_size=100)
    return queue, str(queue.id), change_time("msg", queue.id)


def sysv_memory(_):
    segment = sysv_ipc.SharedMemory(None, sysv_ipc.IPC_CREX, size=5000)
    return segment, str(segment.id), change_time("shm", segment.id)


def sysv_semaphore(_):
    semaphore = sysv_ipc.Semaphore(None, sysv_ipc.IPC_CREX, initial_value=1)
    return semaphore, str(semaphore.id), change_time("sem", semaphore.id)


def posix_queue(name):
    queue = posix_ipc.MessageQueue(f"/{name}", posix_ipc.O_CREX, max_messages=5, max_message_size=100)
    return queue, f"/{name}", place(os.fstat(queue.mqd))


def posix_memory(name):
    segment = posix_ipc.SharedMemory(f"/{name}", posix_ipc.O_CREX, size=5000)
    return segment, f"/{name}", place(os.fstat(segment.fd))


def posix_semaphore(name):
    semaphore = posix_ipc.Semaphore(f"/{name}", posix_ipc.O_CREX, initial_value=1)
    return semaphore, f"/{name}", place(os.stat(f"/dev/shm/sem.{name}"))


def memory(name):
    folder = registry.folder()
    fd = os.open(f"memory.{name}", os.O_CREAT | os.O_EXCL | os.O_RDWR, 0o600, dir_fd=folder)
    os.close(folder)
    os.ftruncate(fd, 5000)
    return fd, name, place(os.fstat(fd))


MAKERS = {
    "sysv-queue": sysv_queue,
    "sysv-memory": sysv_memory,
    "sysv-semaphore": sysv_semaphore,
    "posix-queue": posix_queue,
    "posix-memory": posix_memory,
    "posix-semaphore": posix_semaphore,
    "memory": memory,
}


class Made:
    """An object that this process made, and its record."""

    here = []  # noqa: RUF012 - all of this process

    def __init__(self, kind, name="thing", birth=None):
        with registry.entering():
            self.handle, self.ident, own = MAKERS[kind](name)
            self.member = registry.enter(kind, self.ident, created=True, birth=birth or own)
        self.kind, self.id = kind, f"{kind}:{self.ident}"
        self.here.append(self)
        self.closed = False

    def close(self):
        """In good order, and so that the kernel knows of no user. Idempotent."""
        if self.closed:
            return
        self.closed = True
        if self.kind == "sysv-memory":
            self.handle.detach()
        elif self.kind == "posix-memory":
            self.handle.close_fd()
        elif self.kind == "memory":
            os.close(self.handle)
        elif self.kind.startswith("posix"):
            self.handle.close()
        self.member.leave()


def clean(before):
    """Remove what is there beside *before*: what a failed test left would be blamed on the next."""
    for obj in inventory.objects():
        if obj.id not in before and obj.verdict != "foreign":
            inventory.remove(obj)
    while Made.here:  # or a later child would be recorded as a user of it
        made = Made.here.pop()
        made.member.forget()
        made.close()
    inventory.collect()


def use(kind, ident):
    """This process uses what another made: the record only."""
    births = {(obj.kind, obj.ident): obj.birth for obj in inventory.objects()}
    with registry.entering():
        birth = "" if kind.startswith("sysv") else births[kind, ident]
        return registry.enter(kind, ident, created=False, birth=birth)


def become(uid):
    os.setgroups([])
    os.setgid(uid)
    os.setuid(uid)


def unshare(flags):
    if LIBC.unshare(flags):
        raise OSError(ctypes.get_errno(), "unshare")


def without_queue_folder():
    """For the rest of this process, as root: /dev/mqueue is not mounted."""
    unshare(NEW_NS)
    while os.path.ismount("/dev/mqueue"):  # the host's is below that of the tests
        assert LIBC.umount(b"/dev/mqueue") == 0


def mount(source, target, kind, options=b"", flags=0):
    if LIBC.mount(source, target, kind, flags, options):
        raise OSError(ctypes.get_errno(), f"mount {kind} on {target}")
