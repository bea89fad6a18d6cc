import contextlib
import io
import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import posix_ipc
import pytest
import sysv_ipc
from conftest import ISOLATED, PATIENCE, eventually
from making import MAKERS, NEW_IPC, NEW_NS, Made, become, clean, mount, unshare, without_queue_folder

from ipckit import inventory
from ipckit.cli import commands, objects  # noqa: F401 - the latter adds to the former

IPCKIT = [sys.executable, "-m", "ipckit"]
KEYS = [
    "id", "kind", "ident", "key", "uid", "owner", "mode", "size", "users", "creator", "created", "active", "verdict",
    "why",
]  # fmt: skip
root_only = pytest.mark.skipif(
    os.geteuid() != 0 or not ISOLATED, reason="needs root that may make namespaces"
)


@pytest.fixture(autouse=True)
def nothing_survives(nothing_left_behind):
    before = {obj.id for obj in inventory.objects()}
    yield
    clean(before)


def run(*arguments, columns=None):
    environment = {key: value for key, value in os.environ.items() if key != "COLUMNS"}
    if columns:
        environment["COLUMNS"] = str(columns)
    command = [*IPCKIT, *arguments]
    done = subprocess.run(command, capture_output=True, text=True, timeout=PATIENCE, env=environment)
    assert "Traceback" not in done.stderr, done.stderr
    return done.returncode, done.stdout, done.stderr


@pytest.fixture
def orphan(forked):
    """``id = orphan(kind)``: made by a process that was killed."""

    def start(kind, name="thing"):
        def make(ready):
            Made(kind, name)
            ready()
            signal.pause()

        before = {obj.id for obj in inventory.objects()}
        child = forked(make)
        child.wait_ready()
        child.kill()
        child.wait()
        (obj,) = (obj for obj in inventory.objects() if obj.id not in before)
        return obj.id

    return start


# --- ls --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("command", ["ls", "rm", "gc", "doctor"])
def test_help_reads_well(command):
    status, out, _ = run(command, "--help", columns=80)
    assert status == 0
    assert out.startswith(f"Usage: ipckit {command} ")
    assert max(map(len, out.splitlines())) <= 100


def test_json_has_the_same_keys_for_all():
    made = {Made(kind).id for kind in MAKERS}
    status, out, errors = run("ls", "--json")
    assert (status, errors.strip()) == (0, inventory.unlisted() or "")
    found = [obj for obj in json.loads(out) if obj["id"] in made]
    assert {obj["id"] for obj in found} == made
    assert all([*obj] == KEYS for obj in found)
    assert all(obj["creator"] == os.getpid() for obj in found)
    assert {obj["mode"] for obj in found} == {"0600"}
    assert {obj["verdict"] for obj in found} == {"live"}


def test_nothing_is_an_empty_list():
    assert run("ls", "--json", "--kind", "memory") == (0, "[]\n", "")
    assert run("ls", "--kind", "memory") == (0, "", "")


def test_filters():
    queue, semaphore, memory = Made("sysv-queue"), Made("posix-semaphore"), Made("memory")
    out = run("ls", "--json", "--kind", "sysv-queue", "--kind", "memory")[1]
    assert [obj["id"] for obj in json.loads(out)] == [queue.id, memory.id]
    assert semaphore.id not in out
    status, _, errors = run("ls", "--kind", "sysv")
    assert status == 2
    assert "sysv" in errors


@root_only
def test_mine_leaves_out_what_is_another_s(forked):
    def make(ready):
        become(65534)
        posix_ipc.Semaphore("/theirs", posix_ipc.O_CREX)

    assert forked(make).wait() == 0
    assert "posix-semaphore:/theirs" in run("ls")[1]
    assert "theirs" not in run("ls", "--mine")[1]
    os.unlink("/dev/shm/sem.theirs")


def test_wide_is_a_line_an_object_with_all_columns():
    made = Made("sysv-memory")
    status, out, _ = run("ls", "--kind", "sysv-memory", columns=200)
    assert status == 0
    assert out.splitlines()[0].split() == [
        "id", "key", "owner", "mode", "size", "users", "age", "last", "verdict", "why",
    ]  # fmt: skip
    (line,) = (line for line in out.splitlines() if line.startswith(made.id))
    assert f"0x{made.handle.key & 0xFFFFFFFF:08x}" in line
    assert "0600" in line
    assert "4.9 KiB" in line
    assert f"live     used by pid {os.getpid()}" in line


def test_a_pipe_is_wide():
    made = Made("sysv-queue")
    assert f"used by pid {os.getpid()}" in next(line for line in run("ls")[1].splitlines() if made.id in line)


def test_narrow_fits_and_cuts_no_name():
    made = Made("posix-memory", "n" * 150)
    status, out, _ = run("ls", "--kind", "posix-memory", columns=80)
    assert status == 0
    lines = out.splitlines()
    assert max(map(len, lines)) <= 80
    assert lines[0].split() == ["id", "owner", "size", "users", "age", "verdict"]
    assert "".join(line.split()[0] for line in lines[1:] if "n" * 10 in line) == made.id
    assert any(line.startswith(f"  used by pid {os.getpid()}") for line in lines)


def test_a_name_can_not_upset_the_terminal():
    name = "/\x1b[31mred\n[bold]:smile:"
    segment = posix_ipc.SharedMemory("/plain", posix_ipc.O_CREX, size=10)
    segment.close_fd()
    os.rename("/dev/shm/plain", f"/dev/shm{name}")
    out = run("ls", "--kind", "posix-memory")[1]
    assert "\x1b" not in out
    assert "posix-memory:/\\x1b[31mred\\n[bold]:smile:" in out
    assert run("rm", "posix-memory:/\\x1b[31mred\\n[bold]:smile:")[0] == 0
    assert not os.path.exists(f"/dev/shm{name}")


@pytest.mark.parametrize("columns", [80, 200])
def test_the_name_of_a_program_is_shown_as_it_is(forked, columns):
    def make(ready):
        Path("/proc/self/comm").write_text("[red]:x:[/red]")
        Made("posix-queue")

    assert forked(make).wait() == 0
    assert "([red]:x:[/red]) never closed it" in run("ls", columns=columns)[1]


@root_only
def test_what_can_not_be_listed_is_told(forked):
    def look(ready):
        without_queue_folder()
        become(65534)
        with pytest.raises(SystemExit), contextlib.redirect_stderr(io.StringIO()) as errors:
            commands.group(["ls", "--json"])  # here, because that user may not be let near this Python
        assert errors.getvalue().count("\n") == 1
        assert "/dev/mqueue is not mounted" in errors.getvalue()

    assert forked(look).wait() == 0


# --- rm --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", MAKERS)
def test_remove_by_the_id_that_ls_prints(kind, orphan):
    ident = orphan(kind)
    assert run("rm", ident) == (0, f"removed {ident}\n", "")
    assert run("rm", ident) == (1, "", f"Error: {ident}: no such object; `ipckit ls` lists them\n")


def test_a_name_alone_will_do_if_only_one_has_it(orphan):
    assert orphan("posix-semaphore") == "posix-semaphore:/thing"
    assert run("rm", "/thing") == (0, "removed posix-semaphore:/thing\n", "")


def test_an_ambiguous_name_is_refused_with_the_candidates(orphan):
    orphan("posix-semaphore")
    orphan("posix-memory")
    status, out, errors = run("rm", "/thing")
    assert (status, out) == (1, "")
    assert errors == "Error: /thing may be posix-memory:/thing, posix-semaphore:/thing: say which\n"


def test_what_lives_is_refused_and_forced():
    made = Made("posix-memory")
    status, out, errors = run("rm", made.id)
    assert (status, out) == (1, "")
    assert errors == f"Error: {made.id} is used by pid {os.getpid()}; --force removes it all the same\n"
    assert run("rm", "--force", made.id) == (0, f"removed {made.id}\n", "")


@root_only
def test_another_user_s_is_refused_even_when_forced(forked):
    def make(ready):
        become(65534)
        posix_ipc.Semaphore("/theirs", posix_ipc.O_CREX)

    assert forked(make).wait() == 0
    status, out, errors = run("rm", "--force", "/theirs")
    assert (status, out) == (1, "")
    assert errors == (
        "Error: posix-semaphore:/theirs belongs to user 65534, who alone may remove it: Operation not permitted\n"
    )
    os.unlink("/dev/shm/sem.theirs")


def test_a_failure_is_a_line_and_the_others_go(orphan):
    first, second = orphan("sysv-queue"), orphan("posix-memory")
    status, out, errors = run("rm", first, "posix-queue:/none", second, "x")
    assert status == 1
    assert out == f"removed {first}\nremoved {second}\n"
    assert [line.split(":")[0] for line in errors.splitlines()] == ["Error"] * 2
    assert "posix-queue:/none" in errors


def test_rm_of_nothing_is_wrong_usage():
    assert run("rm")[0] == 2


# --- gc --------------------------------------------------------------------------------------------


def test_gc_removes_the_orphans_and_says_why(orphan):
    ident = orphan("posix-queue")
    keeps = Made("sysv-queue")
    status, out, _ = run("gc", "--dry-run")
    assert status == 0
    assert out.splitlines()[0].startswith(f"would remove {ident}: pid ")
    assert out.splitlines()[1:] == ["would remove 1"]
    (obj,) = json.loads(run("gc", "--dry-run", "--json")[1])
    assert (obj["id"], obj["verdict"], [*obj]) == (ident, "orphan", KEYS)
    status, out, _ = run("gc")
    assert status == 0
    assert out.splitlines()[1:] == ["removed 1"]
    assert run("gc") == (0, "removed 0\n", "")
    assert run("gc", "--json") == (0, "[]\n", "")
    assert keeps.id in run("ls")[1]


def test_gc_tells_of_what_was_left_and_removes_it_when_asked(forked):
    def make(ready):
        Made("posix-memory").close()

    assert forked(make).wait() == 0
    assert run("gc")[1] == "removed 0; 1 more left in good order by users who ended: --dead\n"
    assert run("gc", "--dead")[1] == (
        "removed posix-memory:/thing: left by its maker, who closed it\nremoved 1\n"
    )


def test_gc_that_can_not_is_one_line_and_status_1(forked):
    folder = f"/dev/shm/ipckit-{os.geteuid()}"
    os.symlink("/tmp", folder)
    status, out, errors = run("gc")
    os.unlink(folder)
    assert (status, out) == (1, "")
    assert errors.startswith(f"Error: {folder}: ")
    assert errors.count("\n") == 1


# --- doctor ----------------------------------------------------------------------------------------


def test_doctor_for_scripts():
    status, out, errors = run("doctor", "--json")
    assert (status, errors) == (0, "")
    found = json.loads(out)
    keys = ["name", "value", "unit", "used", "stops", "change", "tight", "unlimited"]
    assert all([*limit] == keys for limit in found)
    assert {"kernel.msgmax", "/dev/shm", "RLIMIT_NOFILE", "RemoveIPC"} <= {limit["name"] for limit in found}


def test_doctor_in_a_narrow_terminal_gives_commands_whole():
    out = run("doctor", columns=80)[1]
    lines = out.splitlines()
    at = next(number for number, line in enumerate(lines) if line.startswith("kernel.msgmax "))
    assert lines[at + 1] == "    stops: a longer message in a System V queue (EINVAL)"
    assert lines[at + 2] == "    sysctl -w kernel.msgmax=65536"
    assert max(len(line) for line in lines if not line.startswith("    ")) <= 80
    assert "    mkdir -p /dev/mqueue && mount -t mqueue none /dev/mqueue" in lines


def test_doctor_in_a_wide_one_is_a_table():
    lines = run("doctor", columns=200)[1].splitlines()
    assert lines[0].split("  ")[0] == "limit"
    (line,) = (line for line in lines if line.startswith("kernel.msgmni "))
    assert line.endswith("sysctl -w kernel.msgmni=32768") or "sysctl -w kernel.msgmni=32768 " in line
    assert max(map(len, lines)) <= 200


@root_only
@pytest.mark.parametrize("columns", [80, 200])
def test_doctor_gives_the_command_for_logind_as_it_is(forked, columns):
    def look(ready):
        unshare(NEW_NS)
        mount(b"fake", b"/run", b"tmpfs")
        os.makedirs("/run/systemd/system")
        out = run("doctor", columns=columns)[1]
        assert "printf '[Login]" in out
        assert (
            columns == 200
            or "printf '[Login]\\nRemoveIPC=no\\n' > /etc/systemd/logind.conf.d/ipc.conf" in out
        )

    assert forked(look).wait() == 0


@root_only
def test_doctor_shows_what_applies_here(forked):
    """Another ipc namespace, a small /dev/shm."""

    def look(ready):
        unshare(NEW_IPC | NEW_NS)
        mount(b"shm", b"/dev/shm", b"tmpfs", b"size=1m")
        queue = sysv_ipc.MessageQueue(None, sysv_ipc.IPC_CREX)
        out = run("doctor", columns=80)[1]
        assert "kernel.msgmni            32,000 queues, 1 in use\n" in out
        assert "/dev/shm                 1 MiB, 0 B in use\n" in out
        assert "/dev/shm" in out.splitlines()[-1].partition("tight: ")[2]
        queue.remove()

    assert forked(look).wait() == 0


def test_an_orphan_that_is_not_reaped_yet_is_one(forked):
    """As in the shell: `kill -9 %1; ipckit gc`."""

    def make(ready):
        Made("sysv-memory")
        ready()
        signal.pause()

    child = forked(make)
    child.wait_ready()
    child.kill()
    eventually(lambda: run("gc")[1].endswith("removed 1\n"))
