# SPDX-License-Identifier: MIT
"""The kernel's limits on what has a name: what they are here, and how to change them.

A limit that is reached shows as an errno that means many things ("no space left on device" for one
message queue too many). The rooms ask here, and say which limit it was. See proc_sys_kernel(5),
mq_overview(7).
"""

import configparser
import errno
import resource
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

from ipckit import _procfs
from ipckit._native import lib
from ipckit._unpatched import os

__all__ = ["Limit", "advice", "queue_folder", "raise_descriptors", "survey", "value"]

# One file with four numbers; the names are those of semget(2).
_SEMAPHORES = ("kernel.sem.semmsl", "kernel.sem.semmns", "kernel.sem.semopm", "kernel.sem.semmni")


# What /dev/mqueue may be instead of the folder of this process's queues.
_NO_FOLDER = {errno.ENOENT: "not mounted", errno.EXDEV: "of another ipc namespace"}


def _numbers(file: str) -> list[int]:
    with suppress(OSError, ValueError):
        return [int(word) for word in Path(_procfs.path("sys"), *file.split(".")).read_text().split()]
    return []


def value(name: str) -> int | None:
    """The limit *name* (``kernel.msgmax``, ``kernel.sem.semmni``, ...) as it is now for this process.

    Returns: the number; None if the kernel has no such limit or doesn't show it here.
    """
    if name in _SEMAPHORES:
        numbers = _numbers("kernel.sem")
        return numbers[_SEMAPHORES.index(name)] if len(numbers) == len(_SEMAPHORES) else None
    numbers = _numbers(name)
    return numbers[0] if numbers else None


def _command(name: str, wanted: int) -> str:
    if name not in _SEMAPHORES:
        return f"sysctl -w {name}={wanted}"
    numbers = _numbers("kernel.sem") or [0] * len(_SEMAPHORES)
    numbers[_SEMAPHORES.index(name)] = wanted
    return f'sysctl -w kernel.sem="{" ".join(map(str, numbers))}"'


def advice(name: str, wanted: int) -> str:
    """What an error says of the limit *name* when it should be *wanted*, with the command."""
    now = value(name)
    if now is None:
        return f"the limit {name} can't be read here"
    return f"{name} is {now}; raise it with: {_command(name, wanted)}"


def raise_descriptors(more: int) -> "tuple[int, int]":
    """Raise the soft RLIMIT_NOFILE so that *more* descriptors can be opened, as far as the hard one goes.

    It is never lowered, and not touched if it is enough. What this process starts inherits it.
    Returns: how many descriptors that would be, and the soft limit as it was before. See getrlimit(2).
    """
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = len(os.listdir(_procfs.path("self/fd"))) + more
    if soft != resource.RLIM_INFINITY:
        most = wanted if hard == resource.RLIM_INFINITY else min(wanted, hard)
        resource.setrlimit(resource.RLIMIT_NOFILE, (max(soft, most), hard))
    return wanted, soft


# --- all of them, for this process ----------------------------------------------------------------


@dataclass(frozen=True)
class Limit:
    """One limit, as it applies to this process."""

    name: str
    """Of the sysctl, the resource (RLIMIT_*), the file, or the setting."""
    value: int | str | None
    """A number in *unit*, a word, or None: the kernel has no such limit, or doesn't show it here."""
    unit: str
    used: int | None
    """How much of it is in use, by all whom it counts; None where that isn't known cheaply."""
    stops: str
    """What it stops, and the error that shows it."""
    change: str
    """The command that changes it, by root (``ulimit``: by everybody); empty where there is none."""
    tight: bool
    """Nine tenths of it are used, or it is lower than kernels have it unasked, or else likely to bite."""

    @property
    def unlimited(self) -> bool:
        """Whether *value* stands for no limit: nobody has that much."""
        return isinstance(self.value, int) and self.value >= _SO_MANY


_SO_MANY = 1 << 60
_PAGE = os.sysconf("SC_PAGE_SIZE")
_MEBI = 1 << 20
_UNLIMITED = (1 << 64) - 1
_MOST = 32768  # the kernel takes no more, unless booted with ipcmni_extend

# Name, unit, what it stops, what to raise it to, and the least that a kernel has unasked.
_SYSCTLS = (
    ("kernel.msgmax", "bytes", "a longer message in a System V queue (EINVAL)", 65536, 8192),
    ("kernel.msgmnb", "bytes", "more bytes in one System V queue: senders wait (or EAGAIN)", _MEBI, 16384),
    ("kernel.msgmni", "queues", "one more System V queue (ENOSPC)", _MOST, 0),
    ("kernel.shmmax", "bytes", "a larger System V segment (EINVAL)", 1 << 40, 0),
    ("kernel.shmall", "pages", "more memory in all System V segments (ENOSPC)", 1 << 28, 0),
    ("kernel.shmmni", "segments", "one more System V segment (ENOSPC)", _MOST, 0),
    ("kernel.sem.semmsl", "semaphores", "more semaphores in one System V set (EINVAL)", 64000, 0),
    ("kernel.sem.semmns", "semaphores", "more semaphores in all System V sets (ENOSPC)", 2000000000, 0),
    ("kernel.sem.semopm", "operations", "more operations in one semop call (E2BIG)", 1000, 0),
    ("kernel.sem.semmni", "sets", "one more System V semaphore set (ENOSPC)", _MOST, 0),
    ("fs.mqueue.msg_max", "messages",
     "a POSIX queue for more messages (EINVAL; not with CAP_SYS_RESOURCE)", 1000, 10),
    ("fs.mqueue.msgsize_max", "bytes",
     "a POSIX queue for longer messages (EINVAL; not with CAP_SYS_RESOURCE)", 65536, 8192),
    ("fs.mqueue.queues_max", "queues", "one more POSIX queue (ENOSPC; not with CAP_SYS_RESOURCE)", 4096, 0),
    ("fs.pipe-max-size", "bytes", "a pipe made larger (EPERM; not with CAP_SYS_RESOURCE)", 16 * _MEBI, _MEBI),
    ("fs.pipe-user-pages-soft", "pages",
     "the next pipe's usual size (0: never; not with CAP_SYS_RESOURCE)", 65536, 0),
    ("fs.pipe-user-pages-hard", "pages",
     "the next pipe at all (ENFILE; 0: never; not with CAP_SYS_RESOURCE)", 0, 0),
)  # fmt: skip

_RESOURCES = (
    ("RLIMIT_MSGQUEUE", "bytes", "one more POSIX queue; its whole room counts (EMFILE)", "q", 16 * _MEBI),
    ("RLIMIT_NOFILE", "descriptors", "one more file, pipe, socket, memfd, POSIX queue (EMFILE)", "n", 65536),
    ("RLIMIT_NPROC", "threads", "a fork, one more thread of this user (EAGAIN; not root's)", "u", 65536),
    ("RLIMIT_SIGPENDING", "signals", "one more real-time signal waiting for this user (EAGAIN)", "i", 65536),
    ("RLIMIT_MEMLOCK", "bytes", "more memory locked by mlock and SHM_LOCK (ENOMEM)", "l", 1 << 30),
)  # fmt: skip


def survey() -> list[Limit]:
    """Every limit that named objects, pipes and processes meet here, as it applies to this process.

    In a container those are often other ones than the machine's. Nothing is changed; nothing blocks.
    Raises: OSError if /proc can't be read.
    """
    return [
        *_sysctls(),
        _shm_rmid_forced(),
        _shared_memory(),
        _queue_folder(),
        *_resources(),
        *_cgroup(),
        _remove_ipc(),
        _huge_pages(),
        _links(),
    ]


def _is_tight(value: int | str | None, used: int | None, least: int = 0) -> bool:
    if not isinstance(value, int):
        return False
    return value < least or (used is not None and 10 * used >= 9 * value > 0)


def _container() -> bool:
    """Where not even root can write /proc/sys, whoever starts the container sets its limits."""
    return bool(os.statvfs(_procfs.path("sys")).f_flag & os.ST_RDONLY)


def _sysctls() -> Iterator[Limit]:
    used = _in_use()
    for name, unit, stops, wanted, least in _SYSCTLS:
        now = value(name)
        tight = _is_tight(now, used.get(name), least)
        yield Limit(name, now, unit, used.get(name), stops, _raise_sysctl(name, now or 0, wanted), tight)


def _raise_sysctl(name: str, now: int, wanted: int) -> str:
    if now >= wanted == _MOST:
        return "boot with the kernel parameter ipcmni_extend"
    more = now if now >= _SO_MANY else max(wanted, 2 * now if now >= wanted else 0)
    command = _command(name, more)
    # What belongs to the machine, and not to an ipc namespace, can't be set for one container.
    if name.startswith("fs.pipe") or not _container():
        return command
    return f"docker run --sysctl {command.removeprefix('sysctl -w ')} ..."


def _table(kind: str, column: str) -> list[int]:
    """One column of /proc/sysvipc: who is refused to read an object sees it there all the same."""
    with suppress(FileNotFoundError):
        head, *lines = Path(_procfs.path("sysvipc"), kind).read_text().splitlines()
        return [int(line.split()[head.split().index(column)]) for line in lines]
    return []


@contextmanager
def _opened(folder: int) -> Iterator[int]:
    try:
        yield folder
    finally:
        if folder >= 0:
            os.close(folder)


def queue_folder() -> AbstractContextManager[int]:
    """A descriptor of the folder of this ipc namespace's POSIX queues, or -errno where there is none.

    That is ENODEV where the kernel has no such queues, ENOENT where /dev/mqueue is not mounted, and EXDEV
    where it shows the queues of another ipc namespace. Root needs no mount.
    """
    folder = lib.ik_inventory_queue_folder()
    return _opened(folder) if folder >= 0 or folder == -errno.ENODEV else _mounted_queue_folder()


@contextmanager
def _mounted_queue_folder() -> Iterator[int]:
    if not _queue_mounted():
        yield -errno.ENOENT
        return
    with _opened(os.open("/dev/mqueue", os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)) as folder:
        yield -errno.EXDEV if _is_of_another_namespace(folder) else folder


def _queue_mounted() -> bool:
    return any(
        line.split()[4] == "/dev/mqueue" and " - mqueue " in line
        for line in Path(_procfs.path("self/mountinfo")).read_text().splitlines()
    )


def _is_of_another_namespace(folder: int) -> bool:
    """A mount keeps the ipc namespace of its mounter: its queues are not those that mq_open() opens.

    False also if no queue in it tells, because it has none, or none that this user may open.
    """
    for name in os.listdir(folder):
        with (
            suppress(FileNotFoundError),
            _opened(lib.ik_inventory_queue_open(os.fsencode(f"/{name}"))) as queue,
        ):
            if queue >= 0:
                return os.fstat(queue).st_dev != os.fstat(folder).st_dev
            if queue == -errno.ENOENT and os.stat(name, dir_fd=folder):
                return True
    return False


def _in_use() -> dict[str, int]:
    segments, sets = _table("shm", "size"), _table("sem", "nsems")
    used = {
        "kernel.msgmni": len(_table("msg", "msqid")),
        "kernel.shmmni": len(segments),
        "kernel.shmall": sum(-(-size // _PAGE) for size in segments),
        "kernel.sem.semmns": sum(sets),
        "kernel.sem.semmni": len(sets),
    }
    with queue_folder() as folder:
        if folder >= 0:
            used["fs.mqueue.queues_max"] = len(os.listdir(folder))
    return used


def _shm_rmid_forced() -> Limit:
    now = value("kernel.shm_rmid_forced")
    stops = "segments that nobody has attached, if 1: the kernel destroys them"
    return Limit(
        "kernel.shm_rmid_forced", now, "", None, stops, _command("kernel.shm_rmid_forced", 0), now == 1
    )


def _shared_memory() -> Limit:
    stops = "more POSIX and named shared memory (ENOSPC; SIGBUS if not reserved)"
    try:
        found = os.statvfs("/dev/shm")
    except OSError:
        return Limit("/dev/shm", None, "bytes", None, stops, "mount -t tmpfs -o mode=1777 shm /dev/shm", True)
    size, used = found.f_blocks * found.f_frsize, (found.f_blocks - found.f_bfree) * found.f_frsize
    command = "docker run --shm-size=1g ..." if _container() else "mount -o remount,size=80% /dev/shm"
    # 64 MiB is what a container has unasked. A size of 0 is no limit.
    tight = _is_tight(size or _UNLIMITED, used, 64 * _MEBI + 1)
    return Limit("/dev/shm", size or _UNLIMITED, "bytes", used, stops, command, tight)


def _queue_folder() -> Limit:
    with _mounted_queue_folder() as folder:
        now = "mounted" if folder >= 0 else _NO_FOLDER[-folder]
    stops = "listing POSIX queues, if not mounted (root can all the same)"
    command = "mkdir -p /dev/mqueue && mount -t mqueue none /dev/mqueue"
    return Limit("/dev/mqueue", now, "", None, stops, command, False)


def _resources() -> Iterator[Limit]:
    used = {"RLIMIT_SIGPENDING": _pending_signals()}
    if os.getuid() != 0:  # whom this limit doesn't stop
        used["RLIMIT_NPROC"] = _threads()
    for name, unit, stops, letter, wanted in _RESOURCES:
        soft, hard = (
            _UNLIMITED if limit == resource.RLIM_INFINITY else limit
            for limit in resource.getrlimit(getattr(resource, name))
        )
        least = 1025 if name == "RLIMIT_NOFILE" else 0  # 1,024 unasked, for select(2)'s sake only
        tight = _is_tight(soft, used.get(name), least)
        yield Limit(
            name, soft, unit, used.get(name), stops, _raise_resource(name, letter, wanted, soft, hard), tight
        )


def _raise_resource(name: str, letter: str, wanted: int, soft: int, hard: int) -> str:
    if soft < hard:  # which everybody may use
        soft = min(hard, max(wanted, 2 * soft))
        return f"ulimit -S -{letter} {soft // 1024 if letter == 'l' else soft}"
    if soft >= _SO_MANY:
        return ""
    raised = f"{name.removeprefix('RLIMIT_').lower()}={max(wanted, 2 * soft)}"
    return f"docker run --ulimit {raised} ..." if _container() else f"prlimit --pid $$ --{raised}"


def _pending_signals() -> int:
    status = Path(_procfs.path("self/status")).read_text()
    return int(status.partition("SigQ:")[2].partition("/")[0])


def _threads() -> int:
    """Those of this user, as far as /proc shows them."""
    count = 0
    for entry in os.scandir(_procfs.path("")):
        with suppress(OSError):
            if entry.name.isdecimal() and entry.stat().st_uid == os.getuid():
                count += len(os.listdir(f"{entry.path}/task"))
    return count


# --- what others set: the control group, systemd, the administrator -------------------------------

_CGROUPS = (  # the names of version 2, which are those of version 1 for pids
    ("pids", "max", "current", "threads", "a fork, one more thread in this control group (EAGAIN)"),
    ("memory", "max", "current", "bytes", "more memory, shared too (the kernel kills)"),
    ("memory", "limit_in_bytes", "usage_in_bytes", "bytes", "more memory, shared too (the kernel kills)"),
)  # fmt: skip


def _cgroup_folders(controller: str) -> Iterator[Path]:
    """The control group of this process and those that it is in; version 1 and 2."""
    for line in Path(_procfs.path("self/cgroup")).read_text().splitlines():
        _, controllers, path = line.split(":", 2)
        if not controllers or controller in controllers.split(","):
            root = Path("/sys/fs/cgroup", controller if controllers else "")
            # A container may see its own group as the root, and be told of another path.
            here = root / path.lstrip("/")
            yield from [here, *here.parents][: len(here.parts) - len(root.parts) + 1]


def _cgroup() -> Iterator[Limit]:
    for controller, most, current, unit, stops in _CGROUPS:
        found: list[tuple[int, int, Path]] = []
        for folder in _cgroup_folders(controller):
            with suppress(OSError, ValueError):  # no such file at the root; "max" is no limit
                limit = int((folder / f"{controller}.{most}").read_text())
                found.append((limit, int((folder / f"{controller}.{current}").read_text()), folder))
        if found:  # the one that is reached first
            now, used, folder = min(found, key=lambda group: group[0] - group[1])
            change = f"echo {2 * now} > {folder}/{controller}.{most}" if now < _SO_MANY else ""
            yield Limit(f"{controller}.{most}", now, unit, used, stops, change, _is_tight(now, used))


def _logind_files() -> list[Path]:
    """logind.conf(5): the main file, then the drop-ins by name; /etc goes before /run and /usr/lib."""
    roots = [
        Path("/usr/lib/systemd"),
        Path("/usr/local/lib/systemd"),
        Path("/run/systemd"),
        Path("/etc/systemd"),
    ]
    main = [root / "logind.conf" for root in roots if (root / "logind.conf").exists()][-1:]
    dropins = {path.name: path for root in roots for path in root.glob("logind.conf.d/*.conf")}
    return main + [path for _, path in sorted(dropins.items())]


def _removes_ipc() -> bool:
    config = configparser.ConfigParser(strict=False, interpolation=None, allow_no_value=True)
    with suppress(configparser.Error):
        config.read(_logind_files())
    said = config.get("Login", "RemoveIPC", fallback=None) or "yes"
    return said.lower() in ("yes", "true", "on", "1", "y", "t")


def _remove_ipc() -> Limit:
    stops = "a user's objects, if yes: removed when that user's last session ends"
    command = (
        "mkdir -p /etc/systemd/logind.conf.d"
        " && printf '[Login]\\nRemoveIPC=no\\n' > /etc/systemd/logind.conf.d/ipc.conf"
        " && systemctl restart systemd-logind"
    )
    runs = os.path.isdir("/run/systemd/system")
    now = ("yes" if _removes_ipc() else "no") if runs else "no systemd"
    # Users of the system, below 1,000, are spared.
    return Limit(
        "RemoveIPC", now, "", None, stops, command if runs else "", now == "yes" and os.getuid() >= 1000
    )


def _huge_pages() -> Limit:
    words = [line.split() for line in Path(_procfs.path("meminfo")).read_text().splitlines()]
    found = {name.rstrip(":"): int(number) for name, number, *_ in words}
    total = found.get("HugePages_Total")
    used = None if total is None else total - found["HugePages_Free"]
    size = found.get("Hugepagesize", 0)
    stops = f"segments in huge pages, here of {size} KiB (ENOMEM)"
    return Limit("vm.nr_hugepages", total, "pages", used, stops, "sysctl -w vm.nr_hugepages=64", False)


def _links() -> Limit:
    name = "fs.protected_symlinks"
    stops = "following another user's link in /tmp or /dev/shm, if 1"
    return Limit(name, value(name), "", None, stops, _command(name, 1), value(name) == 0)
