import os
import resource
import signal
from pathlib import Path

import pytest
import sysv_ipc
from conftest import ISOLATED
from making import NEW_IPC, NEW_NS, become, mount, unshare
from serving import user_of_its_own

from ipckit import limits

root_only = pytest.mark.skipif(
    os.geteuid() != 0 or not ISOLATED, reason="needs root that may make namespaces"
)


def test_a_limit_is_what_the_kernel_says():
    assert limits.value("kernel.msgmax") == int(Path("/proc/sys/kernel/msgmax").read_text())


def test_the_four_of_one_file():
    numbers = [int(word) for word in Path("/proc/sys/kernel/sem").read_text().split()]
    names = ("semmsl", "semmns", "semopm", "semmni")
    assert [limits.value(f"kernel.sem.{name}") for name in names] == numbers


def test_what_the_kernel_does_not_have():
    assert limits.value("kernel.no_such_thing") is None
    assert limits.advice("kernel.no_such_thing", 5) == "the limit kernel.no_such_thing can't be read here"


def test_the_advice_is_a_command():
    now = limits.value("kernel.msgmax")
    assert limits.advice("kernel.msgmax", 10000) == (
        f"kernel.msgmax is {now}; raise it with: sysctl -w kernel.msgmax=10000"
    )


def test_the_advice_for_one_of_four_keeps_the_others():
    msl, mns, opm, _ = (int(word) for word in Path("/proc/sys/kernel/sem").read_text().split())
    text = limits.advice("kernel.sem.semmni", 64000)
    assert text.endswith(f'raise it with: sysctl -w kernel.sem="{msl} {mns} {opm} 64000"')


# --- the survey ------------------------------------------------------------------------------------


def may_raise():
    (line,) = (
        line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("CapEff")
    )
    return bool(int(line.split()[1], 16) >> 24 & 1)


def by_name():
    return {limit.name: limit for limit in limits.survey()}


def test_the_survey_has_every_limit_once():
    found = limits.survey()
    names = [limit.name for limit in found]
    assert len(names) == len(set(names))
    assert {
        "kernel.msgmax", "kernel.msgmnb", "kernel.msgmni", "kernel.shmmax", "kernel.shmall", "kernel.shmmni",
        "kernel.sem.semmsl", "kernel.sem.semmns", "kernel.sem.semopm", "kernel.sem.semmni", "kernel.shm_rmid_forced",
        "/dev/shm", "/dev/mqueue", "fs.mqueue.msg_max", "fs.mqueue.msgsize_max", "fs.mqueue.queues_max",
        "fs.pipe-max-size", "fs.pipe-user-pages-soft", "fs.pipe-user-pages-hard", "RLIMIT_MSGQUEUE", "RLIMIT_NOFILE",
        "RLIMIT_NPROC", "RLIMIT_SIGPENDING", "RLIMIT_MEMLOCK", "RemoveIPC", "vm.nr_hugepages", "fs.protected_symlinks",
    } <= set(names)  # fmt: skip
    assert all(limit.stops for limit in found)
    for limit in found:
        assert limit.change or limit.unlimited or limit.value == "no systemd", limit


def test_what_is_in_use_is_counted():
    before = by_name()
    queue = sysv_ipc.MessageQueue(None, sysv_ipc.IPC_CREX)
    semaphore = sysv_ipc.Semaphore(None, sysv_ipc.IPC_CREX)
    segment = sysv_ipc.SharedMemory(None, sysv_ipc.IPC_CREX, size=3 * sysv_ipc.PAGE_SIZE + 1)
    try:
        used = {
            name: limit.used - (before[name].used or 0) for name, limit in by_name().items() if limit.used
        }
        assert used["kernel.msgmni"] == used["kernel.shmmni"] == 1
        assert used["kernel.sem.semmni"] == used["kernel.sem.semmns"] == 1
        assert used["kernel.shmall"] == 4
    finally:
        queue.remove()
        semaphore.remove()
        segment.remove()
        segment.detach()


def test_pending_signals_and_threads_of_this_user(forked):
    def look(ready):
        if os.geteuid() == 0:
            become(user_of_its_own())
        before = by_name()
        signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGRTMIN])
        for _ in range(3):
            os.kill(os.getpid(), signal.SIGRTMIN)
        after = by_name()
        assert after["RLIMIT_SIGPENDING"].used == before["RLIMIT_SIGPENDING"].used + 3
        assert after["RLIMIT_NPROC"].used >= 1

    assert forked(look).wait() == 0


def test_resources_are_those_of_this_process(forked):
    def look(ready):
        resource.setrlimit(resource.RLIMIT_NOFILE, (1024, 4096))
        resource.setrlimit(resource.RLIMIT_MEMLOCK, (65536, 131072))
        resource.setrlimit(resource.RLIMIT_SIGPENDING, (100, 100))
        found = by_name()
        files, locked, pending = found["RLIMIT_NOFILE"], found["RLIMIT_MEMLOCK"], found["RLIMIT_SIGPENDING"]
        assert (files.value, files.tight, files.change) == (1024, True, "ulimit -S -n 4096")
        assert (locked.value, locked.tight, locked.change) == (65536, False, "ulimit -S -l 128")  # in KiB
        assert (pending.value, pending.change) == (100, "prlimit --pid $$ --sigpending=65536")

    assert forked(look).wait() == 0


@pytest.mark.skipif(not may_raise(), reason="raising a limit needs CAP_SYS_RESOURCE")
def test_an_unlimited_resource_is_no_number_to_reach(forked):
    def look(ready):
        resource.setrlimit(resource.RLIMIT_MSGQUEUE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
        limit = by_name()["RLIMIT_MSGQUEUE"]
        assert (limit.unlimited, limit.tight, limit.change) == (True, False, "")

    assert forked(look).wait() == 0


@root_only
def test_the_kernel_takes_every_command(forked):
    """In an ipc namespace of its own, where nobody else meets what it changes."""

    def apply(ready):
        unshare(NEW_IPC)
        for limit in limits.survey():
            name, _, wanted = limit.change.removeprefix("sysctl -w ").partition("=")
            if not limit.change.startswith("sysctl -w ") or name.startswith(
                ("vm.", "fs.pipe", "fs.protected")
            ):
                continue
            Path("/proc/sys", *name.split(".")).write_text(wanted.strip('"'))
            now = limits.value(limit.name)
            # What is at its highest, or at a 0 that is as it should be, is given as it is.
            assert now > limit.value or limit.unlimited or limit.value == 0, limit

    assert forked(apply).wait() == 0


@root_only
def test_at_the_highest_that_the_kernel_takes(forked):
    def look(ready):
        unshare(NEW_IPC)
        Path("/proc/sys/kernel/msgmni").write_text("32768")
        assert by_name()["kernel.msgmni"].change == "boot with the kernel parameter ipcmni_extend"

    assert forked(look).wait() == 0


@root_only
def test_nearly_used_up_is_tight_and_so_is_lower_than_usual(forked):
    def look(ready):
        unshare(NEW_IPC)
        Path("/proc/sys/kernel/msgmni").write_text("10")
        Path("/proc/sys/kernel/msgmax").write_text("100")
        Path("/proc/sys/kernel/shm_rmid_forced").write_text("1")
        queues = [sysv_ipc.MessageQueue(None, sysv_ipc.IPC_CREX) for _ in range(8)]
        assert not by_name()["kernel.msgmni"].tight
        queues.append(sysv_ipc.MessageQueue(None, sysv_ipc.IPC_CREX))
        found = by_name()
        assert (found["kernel.msgmni"].used, found["kernel.msgmni"].tight) == (9, True)
        assert found["kernel.msgmax"].tight
        assert found["kernel.shm_rmid_forced"].tight

    assert forked(look).wait() == 0


@root_only
@pytest.mark.parametrize("megabytes, tight", [(1, True), (64, True), (65, False)])
def test_the_shared_memory_of_a_container_is_small(forked, megabytes, tight):
    def look(ready):
        unshare(NEW_NS)
        mount(b"shm", b"/dev/shm", b"tmpfs", f"size={megabytes}m".encode())
        limit = by_name()["/dev/shm"]
        assert (limit.value, limit.used, limit.tight) == (megabytes << 20, 0, tight)
        Path("/dev/shm/full").write_bytes(bytes(limit.value))
        limit = by_name()["/dev/shm"]
        assert (limit.used, limit.tight) == (limit.value, True)

    assert forked(look).wait() == 0


@root_only
def test_in_a_container_whoever_starts_it_sets_the_limits(forked):
    def look(ready):
        unshare(NEW_NS)
        bind, remount, read_only = 0x1000, 0x20, 1
        mount(b"/proc/sys", b"/proc/sys", None, flags=bind)
        mount(None, b"/proc/sys", None, flags=bind | remount | read_only)
        found = by_name()
        assert found["kernel.msgmax"].change == "docker run --sysctl kernel.msgmax=65536 ..."
        assert found["/dev/shm"].change == "docker run --shm-size=1g ..."
        resource.setrlimit(resource.RLIMIT_NOFILE, (1024, 1024))
        assert by_name()["RLIMIT_NOFILE"].change == "docker run --ulimit nofile=65536 ..."
        assert found["fs.pipe-max-size"].change.startswith("sysctl -w "), "it is the machine's"

    assert forked(look).wait() == 0


def fake(path, text):
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    Path(path).write_text(text)


@root_only
@pytest.mark.parametrize(
    "files, value",
    [
        ({}, "yes"),
        ({"/etc/systemd/logind.conf": "[Login]\n#RemoveIPC=yes\n"}, "yes"),
        ({"/etc/systemd/logind.conf": "[Login]\nRemoveIPC=no\n"}, "no"),
        ({"/etc/systemd/logind.conf": "[Login]\nRemoveIPC=0\n"}, "no"),
        ({"/etc/systemd/logind.conf": "[Login]\nRemoveIPC=no\n", "/run/systemd/logind.conf.d/a.conf": "[Login]\nRemoveIPC=yes\n"}, "yes"),
        ({"/run/systemd/logind.conf.d/b.conf": "[Login]\nRemoveIPC=no\n", "/etc/systemd/logind.conf.d/a.conf": "[Login]\nRemoveIPC=yes\n"}, "no"),
        ({"/run/systemd/logind.conf.d/a.conf": "[Login]\nRemoveIPC=no\n", "/etc/systemd/logind.conf.d/a.conf": "[Login]\nRemoveIPC=yes\n"}, "yes"),
        ({"/etc/systemd/logind.conf": "no section"}, "yes"),
    ],
)  # fmt: skip
def test_whether_logind_removes_a_user_s_objects(forked, files, value):
    def look(ready):
        unshare(NEW_NS)
        mount(b"fake", b"/etc", b"tmpfs")
        mount(b"fake", b"/run", b"tmpfs")
        assert by_name()["RemoveIPC"].value == "no systemd"
        Path("/run/systemd/system").mkdir(parents=True)
        for path, text in files.items():
            fake(path, text)
        assert (by_name()["RemoveIPC"].value, by_name()["RemoveIPC"].tight) == (value, False)
        os.setuid(1000)
        assert by_name()["RemoveIPC"].tight == (value == "yes")

    assert forked(look).wait() == 0


@root_only
@pytest.mark.parametrize("version", [1, 2])
def test_the_control_group_that_is_reached_first(forked, version):
    def look(ready):
        unshare(NEW_NS)
        mount(b"fake", b"/sys/fs/cgroup", b"tmpfs")
        own = Path("/proc/self/cgroup").read_text().splitlines()
        if version == 1:
            pids = [line.split(":")[2] for line in own if "pids" in line.split(":")[1]]
            root, path = "/sys/fs/cgroup/pids", (pids or ["/"])[0]
        else:
            root, path = "/sys/fs/cgroup", next(line[3:] for line in own if line.startswith("0::"))
        fake(f"{root}/pids.max", "100")
        fake(f"{root}/pids.current", "95")
        if path != "/":
            fake(f"{root}{path}/pids.max", "max")
            fake(f"{root}{path}/pids.current", "5")
        limit = by_name()["pids.max"]
        assert (limit.value, limit.used, limit.tight) == (100, 95, True)
        assert limit.change == f"echo 200 > {root}/pids.max"

    assert forked(look).wait() == 0
