import contextlib
import errno
import fcntl
import itertools
import json
import os
import random
import resource
import select
import shutil
import signal
import stat
import subprocess
import sys
import threading
import time
from pathlib import Path

import procfs
import pytest
from conftest import PATIENCE, eventually
from hypothesis import given, settings
from hypothesis import strategies as st
from serving import silent, user_of_its_own, wait_asleep

import ipckit
from ipckit._native import ffi, lib
from ipckit.messagelog import LogWriter, MessageLog, records

PIPE_BUF = select.PIPE_BUF


def content(path):
    with open(path, "rb") as file:
        return file.read()


def stop(child):
    """SIGSTOP, and wait until it stands."""
    child.send_signal(signal.SIGSTOP)
    os.waitid(os.P_PID, child.pid, os.WSTOPPED)


def append_lines(ready, log, name, count, size, end=None):
    """A writer: numbered lines; it tells after each one that append() returned, in a file of its own.

    Args: count: of them; None: until the file *end* is there."""
    with open(f"{log.path}.{name}", "ab", buffering=0) as returned:
        ready()
        for number in itertools.count() if count is None else range(count):
            if end and end.exists():
                break
            log.append(b"%s %d " % (name.encode(), number) + b"x" * size + b"\n")
            returned.write(b".")


def returned(log, name):
    return os.path.getsize(f"{log.path}.{name}")


class Writers:
    """Each appends until all are told to end, so that what is done to the log meanwhile meets them."""

    def __init__(self, forked, log, sizes):
        self.log, self.sizes = log, sizes
        self._end = Path(f"{log.path}.end")
        self._children = [
            forked(append_lines, log, name, None, size, self._end) for name, size in sizes.items()
        ]
        for child in self._children:
            child.wait_ready()

    def wait_for_more(self, each_time=lambda: None):
        """Until another append() of each has returned; *each_time* sees to the log meanwhile."""
        before = self.counts()

        def further():
            each_time()
            return all(now > then for now, then in zip(self.counts(), before, strict=True))

        eventually(further)

    def counts(self):
        return [returned(self.log, name) for name in self.sizes]

    def end(self, each_time=lambda: None):
        """How many lines each has appended."""
        self._end.touch()

        def ended():
            each_time()
            return all(has_ended(child) for child in self._children)

        eventually(ended)
        assert [child.wait() for child in self._children] == [0] * len(self._children)
        return dict(zip(self.sizes, self.counts(), strict=True))


def has_ended(child):
    """Without reaping it."""
    return os.waitid(os.P_PID, child.pid, os.WEXITED | os.WNOHANG | os.WNOWAIT) is not None


def reopen_soon(log):
    """With a short time limit, again and again: half of it is what the logger waits before it splits a
    message, and in the other half a busy machine may not get round to it."""
    end = time.monotonic() + PATIENCE
    while True:
        try:
            return log.reopen(timeout=0.1)
        except TimeoutError:
            assert time.monotonic() < end


def interrupt_when_asleep(forked, signum=signal.SIGUSR1):
    """A child that sends the signal to us once we wait for something."""

    def interrupt(ready):
        wait_asleep(os.getppid(), seconds=0.02)
        os.kill(os.getppid(), signum)

    return forked(interrupt)


# --- what it does --------------------------------------------------------------------------------


def test_the_raw_file_is_the_bytes(tmp_path):
    path = tmp_path / "log"
    with MessageLog(path) as log:
        for data in (b"one\n", bytearray(b"\0\xff"), memoryview(b"three"), b""):
            log.append(data)
        assert log.stats().messages == 4
    assert content(path) == b"one\n\0\xffthree"
    assert stat.S_IMODE(os.stat(path).st_mode) == 0o600


def test_it_appends_to_what_is_there(tmp_path):
    path = tmp_path / "log"
    for text in (b"first\n", b"second\n"):
        with MessageLog(path) as log:
            log.append(text)
    assert content(path) == b"first\nsecond\n"


def test_umask_does_not_open_it_to_others(tmp_path):
    former = os.umask(0)
    try:
        MessageLog(tmp_path / "log").close()
    finally:
        os.umask(former)
    assert stat.S_IMODE(os.stat(tmp_path / "log").st_mode) == 0o600


@pytest.mark.parametrize("durability", ["none", "written", "synced"])
def test_each_level_holds_what_it_says(tmp_path, durability):
    path = tmp_path / "log"
    with MessageLog(path, durability=durability) as log:
        for number in range(50):
            log.append(b"%d\n" % number)
            if durability != "none":
                assert content(path).endswith(b"\n%d\n" % number if number else b"0\n"), (
                    "not acknowledged before"
                )
    assert content(path) == b"".join(b"%d\n" % number for number in range(50))


@pytest.mark.parametrize("durability", ["none", "written", "synced"])
def test_many_processes_and_long_messages_stay_whole(tmp_path, forked, durability):
    path = tmp_path / "log"
    count = 40
    sizes = {"a": 10, "b": PIPE_BUF, "c": 30_000, "d": 200_000}
    with MessageLog(path, durability=durability, capacity=65536) as log:
        writers = [forked(append_lines, log, name, count, size) for name, size in sizes.items()]
        assert [writer.wait() for writer in writers] == [0] * 4
    lines = content(path).splitlines()
    for name, size in sizes.items():
        mine = [line for line in lines if line.startswith(name.encode() + b" ")]
        assert mine == [b"%s %d " % (name.encode(), n) + b"x" * size for n in range(count)]
    assert len(lines) == count * len(sizes)


def test_threads_append_whole_messages(tmp_path):
    path = tmp_path / "log"
    with MessageLog(path) as log:

        def work(name):
            for number in range(200):
                log.append(b"%d %d " % (name, number) + b"y" * 9000 + b"\n")

        threads = [threading.Thread(target=work, args=(name,)) for name in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    lines = content(path).splitlines()
    assert len(lines) == 800
    assert {len(line.split()[2]) for line in lines} == {9000}


def _spawned(writer):
    assert type(writer) is LogWriter
    writer.append(b"from a spawned child\n", peer="spawn")
    writer.close()


def test_it_pickles_to_a_spawned_child(tmp_path):
    path = tmp_path / "log"
    script = tmp_path / "spawning.py"
    script.write_text(
        "import multiprocessing, sys\n"
        "from ipckit.messagelog import MessageLog\n"
        "def work(writer):\n"
        "    writer.append(b'from a spawned child\\n')\n"
        "if __name__ == '__main__':\n"
        "    context = multiprocessing.get_context('spawn')\n"
        "    with MessageLog(sys.argv[1], durability='written') as log:\n"
        "        child = context.Process(target=work, args=(log,))\n"
        "        child.start(); child.join()\n"
        "        assert child.exitcode == 0\n"
    )
    subprocess.run([sys.executable, "-W", "error", str(script), str(path)], check=True, timeout=PATIENCE)
    assert content(path) == b"from a spawned child\n"


# --- records -------------------------------------------------------------------------------------


def test_records_come_back(tmp_path):
    path = tmp_path / "log"
    before = time.time()
    with MessageLog(path, format="record") as log:
        log.append(b"hello\n", peer="127.0.0.1:5000", connection=7)
        log.append(b"\xff\0binary")
    first, second = records(path)
    assert (first.peer, first.connection, first.data) == ("127.0.0.1:5000", 7, b"hello\n")
    assert before - 1 <= first.time <= second.time <= time.time() + 1
    assert (second.peer, second.connection, second.data) == ("", 0, b"\xff\0binary")
    shown = json.loads(content(path).splitlines()[0])
    assert shown["text"] == "hello\n"
    assert shown["length"] == 6


@settings(max_examples=25)
@given(
    messages=st.lists(
        st.binary(max_size=300)
        | st.text(max_size=200).map(str.encode)
        | st.binary(min_size=10, max_size=22).map(lambda piece: piece * 400)
    ),
    peer=st.text(max_size=20),
)
def test_any_message_is_one_printable_line_and_comes_back(tmp_path_factory, messages, peer):
    path = tmp_path_factory.mktemp("log") / "log"
    with MessageLog(path, format="record") as log:
        for data in messages:
            log.append(data, peer=peer)
    assert [record.data for record in records(path)] == messages
    raw = content(path)
    assert raw.count(b"\n") == len(messages)
    assert raw.decode().replace("\n", "x").isprintable() or not any(
        ord(c) < 0x20 or 0x7F <= ord(c) < 0xA0 for c in raw.decode() if c != "\n"
    )


@pytest.mark.parametrize(
    "forged",
    [
        b'x"}\n{"time":0,"peer":"root","length":1,"text":"y"}\n',
        b"\x1b[2J\x7f",
        "\x9b2J".encode(),
        b"\0",
        b"\xed\xa0\x80",
    ],
)
def test_a_message_can_not_forge_a_record(tmp_path, forged):
    path = tmp_path / "log"
    with MessageLog(path, format="record") as log:
        log.append(forged, peer=forged.decode("latin-1"))
    assert content(path).count(b"\n") == 1
    assert not {*content(path)[:-1]} & {*range(0x20), 0x7F}
    assert [record.data for record in records(path)] == [forged]


def test_pieces_of_a_server_are_never_longer_than_an_atomic_write(tmp_path):
    path = tmp_path / "log"
    with MessageLog(path, format="record") as log:
        for data in (os.urandom(2880), b"\0" * 2880, b"\n" * 2880, "é".encode() * 1440):
            log.append(
                data, peer="[ffff:ffff:ffff:ffff:ffff:ffff:ffff:ffff%interface0]:65535", connection=2**63
            )
    assert all(len(line) < PIPE_BUF for line in content(path).splitlines())


def test_a_torn_tail_is_closed_and_counted(tmp_path):
    path = tmp_path / "log"
    with MessageLog(path, format="record") as log:
        log.append(b"whole")
    with open(path, "ab") as file:
        file.write(b'{"time":1.0,"peer":"","length":9,"te')
    with MessageLog(path, format="record") as log:
        assert log.stats().torn == 1
        log.append(b"after")
    torn = []
    assert [r.data for r in records(path, on_torn=lambda *where: torn.append(where))] == [b"whole", b"after"]
    assert torn == [(2, b'{"time":1.0,"peer":"","length":9,"te\n')]


def test_a_writer_killed_in_the_middle_of_a_long_message_leaves_it_whole_or_out(tmp_path, forked):
    path = tmp_path / "log"
    message = os.urandom(300_000)
    chance = random.Random(11)
    with MessageLog(path, format="record", capacity=4096) as log:

        def write(ready):
            ready()
            while True:
                log.append(message)

        for _ in range(20):
            writer = forked(write)
            writer.wait_ready()
            time.sleep(chance.random() * 0.01)
            writer.kill()
            writer.wait()
            log.append(b"the next one")
    torn = []
    found = [r.data for r in records(path, on_torn=lambda *where: torn.append(where))]
    assert (torn, found.count(b"the next one")) == ([], 20)
    assert set(found) == {b"the next one", message}


def test_a_long_message_waits_for_no_disk_and_keeps_its_place(tmp_path, forked):
    path = tmp_path / "log"
    with MessageLog(path) as log:
        stop(log.logger)
        log.append(b"before\n")
        log.append(b"x" * 100_000 + b"\n")
        assert log.stats().backlog == 100_008

        def write(ready):
            ready()
            log.append(b"after\n")

        writer = forked(write)
        writer.wait_ready()
        assert silent(writer._told), "it waits for its turn"
        log.logger.send_signal(signal.SIGCONT)
        assert writer.wait() == 0
    assert content(path) == b"before\n" + b"x" * 100_000 + b"\nafter\n"


def test_a_logger_killed_in_a_long_message_is_followed_by_one_that_goes_on(tmp_path):
    path = tmp_path / "log"
    messages = [b"%d " % number + os.urandom(3 << 20) for number in range(8)]
    chance = random.Random(3)
    with MessageLog(path, durability="written") as log:
        for message in messages:
            appending = threading.Thread(target=log.append, args=(message,))
            appending.start()
            for _ in range(3):
                time.sleep(chance.random() * 0.002)
                log.logger.kill()
                log.logger.wait()
                log.supervise()
            appending.join()
    assert content(path) == b"".join(messages)


def test_a_stopped_writer_of_short_messages_stops_nobody(tmp_path, forked):
    """Stopped at any moment: there is no lock that it could hold."""
    path = tmp_path / "log"
    with MessageLog(path) as log:
        ends = {"a": 60, "b": 60}
        writers = Writers(forked, log, ends)
        chance = random.Random(1)
        for _ in range(30):
            victim, other = chance.sample(range(2), 2)
            time.sleep(chance.random() * 0.002)
            writers._children[victim].kill(signal.SIGSTOP)
            before = writers.counts()[other]
            eventually(lambda: writers.counts()[other] > before + 3)  # noqa: B023
            writers._children[victim].kill(signal.SIGCONT)
        counts = writers.end()
    lines = content(path).splitlines()
    assert [numbers(lines, name) for name in ends] == [[*range(count)] for count in counts.values()]


# --- the logger dies -----------------------------------------------------------------------------


@pytest.mark.parametrize("durability", ["none", "written", "synced"])
def test_killed_loggers_lose_double_and_reorder_nothing(tmp_path, forked, durability):
    path = tmp_path / "log"
    kills = 10
    with MessageLog(path, durability=durability) as log:
        writers = Writers(forked, log, {"a": 60, "b": 60})
        chance = random.Random(7)
        for _ in range(kills):
            writers.wait_for_more()
            time.sleep(0.01 + chance.random() * 0.01)  # a hundred restarts a second are the limit
            log.logger.kill()
            log.logger.wait()
            assert log.supervise()
        counts = writers.end()
        assert log.restarts == kills
    lines = content(path).splitlines()
    assert len(lines) == sum(counts.values())
    for name, count in counts.items():
        assert numbers(lines, name) == [*range(count)]


def test_append_and_close_replace_a_dead_logger(tmp_path):
    path = tmp_path / "log"
    with MessageLog(path, capacity=4096) as log:
        log.logger.kill()
        for _ in range(20):
            log.append(b"z" * 1000)  # more than the pipe holds
        log.append(b"end")
        assert log.restarts == 1
        log.logger.kill()
    assert content(path) == b"z" * 20_000 + b"end"


def test_its_descriptor_tells_that_the_logger_died(tmp_path):
    with MessageLog(tmp_path / "log") as log:
        assert select.select([log], [], [], 0)[0] == []
        log.logger.kill()
        assert select.select([log], [], [], PATIENCE)[0] == [log]
        assert log.supervise()
        assert select.select([log], [], [], 0)[0] == []
        assert not log.supervise()


def test_a_logger_that_always_dies_is_not_restarted_for_ever(tmp_path):
    with MessageLog(tmp_path / "log") as log:
        log._recent = [time.monotonic() + 100] * 100  # a hundred deaths "now", however slow this machine
        log.logger.kill()
        log.logger.wait()
        with pytest.raises(
            RuntimeError, match=r"the logger of .*log died 101 times in a second: killed by SIGKILL"
        ):
            log.supervise()
        log._recent.clear()


def test_the_logger_writes_the_rest_when_the_supervisor_is_killed(tmp_path, forked):
    path = tmp_path / "log"
    told, tell = os.pipe()

    def supervise(ready):
        log = MessageLog(path)
        stop(log.logger)
        for number in range(1000):
            log.append(b"%d\n" % number)
        os.write(tell, b"%d" % log.logger.pid)
        ready()
        signal.pause()

    supervisor = forked(supervise)
    supervisor.wait_ready()
    logger = os.pidfd_open(int(os.read(told, 20)))
    supervisor.kill()
    supervisor.wait()
    signal.pidfd_send_signal(logger, signal.SIGCONT)
    assert select.select([logger], [], [], PATIENCE)[0], "the logger never ended"
    for fd in (logger, told, tell):
        os.close(fd)
    assert content(path) == b"".join(b"%d\n" % number for number in range(1000))


def test_the_logger_holds_nothing_but_what_it_needs(tmp_path):
    extra = os.open("/dev/null", os.O_RDONLY)
    with MessageLog(tmp_path / "log") as log:
        folder = f"/proc/{log.logger.pid}/fd"
        file = str(tmp_path / "log")

        def held():
            links = []
            for name in os.listdir(folder):
                with contextlib.suppress(FileNotFoundError):  # it has just closed that one
                    links.append(os.readlink(f"{folder}/{name}").split(":")[0])
            return sorted(links)

        ours = ["/dev/null"] * 3 + ["anon_inode"] * 2 + ["pipe"] * 3 + ["socket"] * 4
        eventually(lambda: held() == sorted([*ours, file]))
    os.close(extra)


# --- full disks, broken disks --------------------------------------------------------------------


def limited_log(ready, path, durability, tell, go):
    """A log whose file may not grow beyond 20,000 bytes until the limit is lifted."""
    log = MessageLog(path, durability=durability, capacity=4096)
    logger = log.logger.pid
    resource.prlimit(logger, resource.RLIMIT_FSIZE, (20_000, resource.RLIM_INFINITY))
    ready()
    os.write(tell, b"%d\n" % logger)
    for number in range(3000):
        log.append(b"%9d\n" % number)
    stats = log.stats()
    assert stats.restarts == 0
    log.close()
    os.read(go, 1)


@pytest.mark.parametrize("durability", ["none", "written"])
def test_a_full_file_pauses_and_keeps(tmp_path, forked, durability):
    path = tmp_path / "log"
    told, tell = os.pipe()
    held, go = os.pipe()
    child = forked(limited_log, path, durability, tell, held)
    child.wait_ready()
    logger = int(os.read(told, 20))
    eventually(lambda: path.exists() and os.path.getsize(path) == 20_000)
    assert silent(child._told), "the writer waits"
    resource.prlimit(logger, resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
    os.write(go, b".")
    assert child.wait() == 0
    assert content(path) == b"".join(b"%9d\n" % number for number in range(3000))
    for fd in (told, tell, held, go):
        os.close(fd)


def test_a_full_disk_at_the_end_is_an_error_that_counts_the_rest(tmp_path):
    path = tmp_path / "log"
    log = MessageLog(path)
    resource.prlimit(log.logger.pid, resource.RLIMIT_FSIZE, (1000, resource.RLIM_INFINITY))
    log.append(b"x" * 5000)
    eventually(lambda: log.stats().error == errno.EFBIG)
    with pytest.raises(TimeoutError, match="File too large; 4000 bytes not written") as caught:
        log.close(timeout=0.05)
    assert caught.value.errno == errno.ETIMEDOUT
    assert caught.value.filename == str(path)
    assert log.closed
    assert content(path) == b"x" * 1000


def test_append_times_out_on_a_full_disk_and_appends_nothing(tmp_path):
    path = tmp_path / "log"
    log = MessageLog(path, capacity=4096)
    stop(log.logger)
    log.append(b"x" * 4096)
    start = time.monotonic()
    with pytest.raises(TimeoutError, match="log") as caught:
        log.append(b"late", timeout=0.1)
    assert time.monotonic() - start >= 0.1
    assert caught.value.errno == errno.ETIMEDOUT
    log.logger.send_signal(signal.SIGCONT)
    log.close()
    assert content(path) == b"x" * 4096


def test_a_real_full_file_system(tmp_path, forked):
    """A tmpfs of 256 KiB in a mount namespace of the child's own."""

    def fill(ready):
        if os.geteuid() or not _own_tmpfs(tmp_path):
            raise SystemExit(77)
        path = tmp_path / "log"
        ballast = tmp_path / "ballast"
        ballast.write_bytes(bytes(200_000))
        log = MessageLog(path)
        for number in range(20_000):
            log.append(b"%9d\n" % number)
        eventually(lambda: log.stats().error == errno.ENOSPC)
        log.append(b"while it is full\n")
        ballast.unlink()
        log.close(timeout=PATIENCE)
        assert content(path) == b"".join(b"%9d\n" % n for n in range(20_000)) + b"while it is full\n"

    child = forked(fill)
    if child.wait() == 77:
        pytest.skip("no mount namespace to be had")
    assert child.wait() == 0


def _own_tmpfs(path):
    import ctypes

    libc = ctypes.CDLL(None, use_errno=True)
    clone_newns, clone_newuser, ms_rec_private = 0x20000, 0x10000000, 0x44000
    if libc.unshare(clone_newns) and libc.unshare(clone_newuser | clone_newns):
        return False
    libc.mount(b"none", b"/", None, ms_rec_private, None)
    return libc.mount(b"tmpfs", str(path).encode(), b"tmpfs", 0, b"size=256k") == 0


def test_after_a_failed_fdatasync_nothing_is_promised_any_more(tmp_path):
    strace = shutil.which("strace")
    if not strace:
        pytest.skip("strace injects the error")
    script = (
        "import sys\n"
        "from ipckit.messagelog import MessageLog\n"
        "log = MessageLog(sys.argv[1], durability='synced')\n"
        "log.append(b'1'); log.append(b'2')\n"
        "for text in (b'3', b'4'):\n"
        "    try:\n"
        "        log.append(text)\n"
        "    except OSError as error:\n"
        "        print(error)\n"
        "print(log.stats().sync_error)\n"
        "try:\n"
        "    log.close()\n"
        "except OSError as error:\n"
        "    print(error)\n"
    )
    path = tmp_path / "log"
    inject = [
        strace,
        "-f",
        "-qq",
        "-o",
        "/dev/null",
        "-e",
        "trace=fdatasync",
        "-e",
        "inject=fdatasync:error=EIO:when=3",
    ]
    done = subprocess.run(
        [*inject, sys.executable, "-c", script, str(path)], capture_output=True, text=True, timeout=PATIENCE
    )
    failed = f"[Errno 5] Input/output error: '{path}'"
    assert (done.stdout.splitlines(), done.stderr) == ([failed, failed, "5", failed], "")
    assert content(path) == b"1234", "written all the same"


# --- rotation ------------------------------------------------------------------------------------


def set_flags(log, flags):
    """Of the file in use, which only the logger has open."""
    came = ffi.new("ik_sockets_fds *")
    assert lib.ik_sockets_peek_fds(log.native.parked, ffi.new("char[64]"), 64, came, 1) > 0
    fcntl.fcntl(came.fd[0], fcntl.F_SETFL, flags)
    os.close(came.fd[0])


class Rotation:
    """Renames the file of a log to file.1, file.2, ... and has it reopened."""

    def __init__(self, log):
        self.log = log
        self.files = []

    def rename(self):
        self.files.append(f"{self.log.path}.{len(self.files) + 1}")
        os.rename(self.log.path, self.files[-1])

    def __call__(self, reopen=lambda log: log.reopen(timeout=PATIENCE)):
        self.rename()
        assert reopen(self.log)

    def contents(self):
        """One after the other, the one in use last; each with whole lines only."""
        parts = [content(path) for path in (*self.files, self.log.path)]
        assert all(part.endswith(b"\n") for part in parts if part), "a message was split"
        return b"".join(parts)


def numbers(lines, name):
    return [int(line.split()[1]) for line in lines if line.startswith(name.encode() + b" ")]


def test_reopen_goes_over_to_the_path(tmp_path):
    path = tmp_path / "log"
    with MessageLog(path) as log:
        log.append(b"one\n")
        assert not log.reopen(), "the same file"
        Rotation(log)()
        assert content(f"{path}.1") == b"one\n"
        assert stat.S_IMODE(os.stat(path).st_mode) == 0o600
        log.append(b"two\n")
        assert not log.reopen()
        assert (log.stats().files, log.stats().split, log.stats().restarts) == (1, 0, 0)
        MessageLog(f"{path}.1").close()  # nobody's lock is on it any more
    assert content(f"{path}.1") == b"one\n"
    assert content(path) == b"two\n"


def test_reopen_appends_to_a_file_that_is_there_and_closes_its_torn_tail(tmp_path):
    path = tmp_path / "log"
    with MessageLog(path, format="record") as log:
        log.append(b"one")
        os.rename(path, f"{path}.1")
        path.write_bytes(b'{"time":1.0,"pe')
        assert log.reopen(timeout=PATIENCE)
        log.append(b"two")
        assert log.stats().torn == 1
    assert [record.data for record in records(f"{path}.1")] == [b"one"]
    assert [record.data for record in records(path)] == [b"two"]


def test_reopen_finds_a_relative_path_after_chdir(tmp_path):
    former = os.getcwd()
    os.chdir(tmp_path)
    try:
        with MessageLog("log", durability="synced") as log:
            os.chdir("/")
            os.rename(tmp_path / "log", tmp_path / "log.1")
            assert log.reopen(timeout=PATIENCE)
            log.append(b"x")
    finally:
        os.chdir(former)
    assert content(tmp_path / "log") == b"x"


@pytest.mark.parametrize("format", ["raw", "record"])
@pytest.mark.parametrize("durability", ["none", "written", "synced"])
@pytest.mark.parametrize("splice", [True, False])
@pytest.mark.parametrize("rotations", [5, pytest.param(25, marks=pytest.mark.slow)])
def test_rotation_under_load_loses_splits_and_doubles_nothing(
    tmp_path, forked, format, durability, splice, rotations
):
    path = tmp_path / "log"
    with MessageLog(path, format=format, durability=durability, capacity=65536) as log:
        if not splice:  # which refuses such a file
            set_flags(log, os.O_APPEND)
        rotate = Rotation(log)
        writers = Writers(forked, log, {"a": 10, "b": 3000, "c": 30_000, "d": 150_000})
        for _ in range(rotations):
            writers.wait_for_more()
            rotate()
        counts = writers.end()
        assert (log.stats().files, log.stats().split) == (rotations, 0)
        assert log.restarts == 0
    everything = rotate.contents()
    if format == "record":
        torn = []
        files = [*rotate.files, path]
        messages = [r.data for file in files for r in records(file, on_torn=lambda *at: torn.append(at))]
        assert torn == []
        everything = b"".join(messages)
    lines = everything.splitlines()
    assert len(lines) == sum(counts.values())
    for name, size in writers.sizes.items():
        assert numbers(lines, name) == [*range(counts[name])]
        assert {line for line in lines if line.startswith(name.encode())} == {
            b"%s %d " % (name.encode(), n) + b"x" * size for n in range(counts[name])
        }


@pytest.mark.parametrize("durability", ["none", "written", "synced"])
def test_loggers_killed_while_files_change(tmp_path, forked, durability):
    path = tmp_path / "log"
    with MessageLog(path, durability=durability, capacity=65536) as log:
        rotate = Rotation(log)
        writers = Writers(forked, log, {"a": 60, "b": 6000})
        stopping = threading.Event()

        def kill():
            chance = random.Random(5)
            while not stopping.wait(0.01 + chance.random() * 0.01):
                log.logger.kill()

        killer = threading.Thread(target=kill)
        killer.start()
        try:
            while log.restarts < 10 or len(rotate.files) < 5:
                writers.wait_for_more(log.supervise)
                rotate()
        finally:
            stopping.set()
            killer.join()
        counts = writers.end(log.supervise)
        assert log.stats().files == len(rotate.files)
        assert log.stats().split == 0
    lines = rotate.contents().splitlines()
    assert len(lines) == sum(counts.values())
    for name, count in counts.items():
        assert numbers(lines, name) == [*range(count)]


def rotate_until_killed(ready, path, durability, count, pids):
    """A supervisor with two writers, which outlive it."""
    log = MessageLog(path, durability=durability, capacity=65536)
    for name, size in (("a", 60), ("b", 6000)):
        pid = os.fork()
        if pid == 0:
            append_lines(lambda: None, log, name, count, size)
            os._exit(0)
        os.write(pids, b"%d\n" % pid)
    os.write(pids, b"%d\n" % log.logger.pid)
    rotate = Rotation(log)
    ready()
    while True:
        rotate()


@pytest.mark.parametrize("durability", ["none", "synced"])
def test_a_supervisor_killed_while_files_change(tmp_path, forked, durability):
    count = {"none": 2000, "synced": 150}[durability]
    chance = random.Random(3)
    for turn in range(3):
        path = tmp_path / f"log{turn}"
        told, pids = os.pipe()
        supervisor = forked(rotate_until_killed, path, durability, count, pids)
        supervisor.wait_ready()
        time.sleep(chance.random() * 0.02)
        supervisor.kill()
        supervisor.wait()
        os.close(pids)
        with open(told) as file:
            left = [int(pid) for pid in file.read().split()]
        assert len(left) == 3
        for pid in left:
            with contextlib.suppress(ProcessLookupError):  # it has ended already
                end = os.pidfd_open(pid)
                assert select.select([end], [], [], PATIENCE)[0], "a writer or the logger hangs"
                os.close(end)
        rotated = sorted(tmp_path.glob(f"{path.name}.[0-9]*"), key=lambda p: int(p.suffix[1:]))
        parts = [content(file) for file in (*rotated, path) if file.exists()]
        assert all(part.endswith(b"\n") for part in parts if part), "a message was split"
        lines = b"".join(parts).splitlines()
        assert len(lines) == 2 * count
        for name in ("a", "b"):
            assert numbers(lines, name) == [*range(count)]


def test_reopen_refuses_what_open_refuses_and_keeps_the_file(tmp_path):
    path = tmp_path / "log"
    with MessageLog(path) as log:
        os.rename(path, f"{path}.1")

        def refused_again(kind, number, message):
            with pytest.raises(kind, match=message) as caught:
                log.reopen(timeout=PATIENCE)
            assert (caught.value.errno, caught.value.filename) == (number, str(path))
            log.append(b"%d\n" % number)

        (tmp_path / "other").write_bytes(b"")
        path.symlink_to("other")
        refused_again(OSError, errno.ELOOP, "must not be a symbolic link")
        path.unlink()
        os.mkfifo(path)
        refused_again(OSError, errno.EINVAL, "must be a regular file")
        path.unlink()
        os.link(tmp_path / "other", path)
        refused_again(OSError, errno.EMLINK, "not 2 links")
        path.unlink()
        other = MessageLog(path)
        refused_again(BlockingIOError, errno.EWOULDBLOCK, "another process writes this log")
        other.close()
        assert log.stats().files == 0
        assert log.reopen(timeout=PATIENCE)
        log.append(b"new\n")
    numbers = (errno.ELOOP, errno.EINVAL, errno.EMLINK, errno.EWOULDBLOCK)
    assert content(f"{path}.1") == b"".join(b"%d\n" % number for number in numbers)
    assert content(path) == b"new\n"


@pytest.mark.parametrize("durability", ["none", "written", "synced"])
def test_a_full_disk_does_not_hold_rotation_up(tmp_path, durability):
    """RLIMIT_FSIZE stands for it: each file has room for 1,000 bytes."""
    path = tmp_path / "log"
    log = MessageLog(path, format="record", durability=durability)
    resource.prlimit(log.logger.pid, resource.RLIMIT_FSIZE, (1000, resource.RLIM_INFINITY))
    appends = [log.begin(b"%d" % number, peer="x" * 40) for number in range(40)]
    still_waiting(appends)
    eventually(lambda: log.stats().error == errno.EFBIG)
    rotate = Rotation(log)
    rotate(reopen_soon)
    assert (log.stats().files, log.stats().split) == (1, 1)
    eventually(lambda: os.path.getsize(path) == 1000)
    infinite = (resource.RLIM_INFINITY, resource.RLIM_INFINITY)
    resource.prlimit(log.logger.pid, resource.RLIMIT_FSIZE, infinite)
    loop_until_done(log, appends)
    log.close()
    whole = tmp_path / "whole"
    whole.write_bytes(content(rotate.files[0]) + content(path))
    assert [record.data for record in records(whole)] == [b"%d" % number for number in range(40)]


def test_a_disk_that_has_room_in_time_splits_nothing(tmp_path):
    path = tmp_path / "log"
    log = MessageLog(path, durability="written")
    resource.prlimit(log.logger.pid, resource.RLIMIT_FSIZE, (1000, resource.RLIM_INFINITY))
    appending = threading.Thread(target=log.append, args=(b"x" * 5000 + b"\n",))
    appending.start()
    eventually(lambda: log.stats().error == errno.EFBIG)
    infinite = (resource.RLIM_INFINITY, resource.RLIM_INFINITY)
    freeing = threading.Timer(0.1, resource.prlimit, (log.logger.pid, resource.RLIMIT_FSIZE, infinite))
    freeing.start()
    rotate = Rotation(log)
    rotate()
    assert (log.stats().files, log.stats().split) == (1, 0)
    freeing.join()
    appending.join()
    log.append(b"next\n")
    log.close()
    assert content(rotate.files[0]) == b"x" * 5000 + b"\n"
    assert content(path) == b"next\n"


def test_a_writer_that_stands_still_does_not_hold_rotation_up(tmp_path, forked):
    """At any moment of a long message."""
    path = tmp_path / "log"
    message = b"y" * 300_000 + b"\n"
    chance = random.Random(2)
    with MessageLog(path, capacity=4096) as log:

        def write(ready):
            ready()
            while True:
                log.append(message)

        writer = forked(write)
        writer.wait_ready()
        rotate = Rotation(log)
        for _ in range(10):
            time.sleep(chance.random() * 0.005)
            writer.kill(signal.SIGSTOP)
            rotate()
            writer.kill(signal.SIGCONT)
        writer.kill()
        writer.wait()
        assert (log.stats().files, log.stats().split) == (10, 0)
    for file in (*rotate.files, path):
        assert content(file).replace(message, b"") == b""


def test_a_logger_that_stands_still_keeps_the_old_file(tmp_path):
    path = tmp_path / "log"
    with MessageLog(path) as log:
        stop(log.logger)
        rotate = Rotation(log)
        rotate.rename()
        for _ in range(3):  # what a logger finds of these later is over
            with pytest.raises(TimeoutError, match="did not go over in time; the old file stays") as caught:
                log.reopen(timeout=0.05)
        assert (caught.value.errno, caught.value.filename) == (errno.ETIMEDOUT, str(path))
        log.append(b"old\n")
        assert log.stats().files == 0
        log.logger.send_signal(signal.SIGCONT)
        eventually(lambda: content(rotate.files[0]) == b"old\n")
        assert log.reopen(timeout=PATIENCE)
        assert (log.stats().files, log.stats().split) == (1, 0)
        log.append(b"new\n")
    assert content(rotate.files[0]) == b"old\n"
    assert content(path) == b"new\n"


def test_a_new_file_is_synced_again_after_a_failed_fdatasync(tmp_path):
    strace = shutil.which("strace")
    if not strace:
        pytest.skip("strace injects the error")
    script = (
        "import os, signal, sys\n"
        "from ipckit._native import ffi, lib\n"
        "from ipckit.messagelog import MessageLog\n"
        "path = sys.argv[1]\n"
        "log = MessageLog(path, durability='synced')\n"
        "log.append(b'1')\n"
        "def tried(text):\n"
        "    try:\n"
        "        log.append(text)\n"
        "    except OSError as error:\n"
        "        print(error.errno)\n"
        "tried(b'2'); tried(b'3')\n"
        "text = ffi.new('char[]', b'4')\n"
        "waiting = ffi.new('ik_append *', {'data': text, 'len': 1})\n"
        "log.logger.send_signal(signal.SIGSTOP)\n"
        "assert lib.ik_log_append(log.native, waiting, 0) < 0 and waiting.asked\n"
        "log.logger.send_signal(signal.SIGCONT)\n"
        "print(log.stats().sync_error)\n"
        "os.rename(path, path + '.1')\n"
        "assert log.reopen(timeout=120)\n"
        "print(log.stats().sync_error)\n"
        "log.append(b'5')\n"
        "print(-lib.ik_log_append(log.native, waiting, 0))\n"
        "log.append(b'6')\n"
        "log.close()\n"
    )
    path = tmp_path / "log"
    inject = "inject=fdatasync:error=EIO:when=2"
    command = [strace, "-f", "-qq", "-o", "/dev/null", "-e", "trace=fdatasync", "-e", inject]
    done = subprocess.run(
        [*command, sys.executable, "-c", script, str(path)], capture_output=True, text=True, timeout=PATIENCE
    )
    assert (done.stdout.split(), done.stderr) == (["5", "5", "5", "0", "5"], "")
    assert (content(f"{path}.1"), content(path)) == (b"1234", b"56")


def test_the_old_file_is_synced_before_the_new_one_is_used(tmp_path):
    """Of the three fdatasyncs the second is the old file's: whoever has not asked yet counts on it."""
    strace = shutil.which("strace")
    if not strace:
        pytest.skip("strace shows them")
    script = (
        "import os, sys\n"
        "from ipckit.messagelog import MessageLog\n"
        "log = MessageLog(sys.argv[1], durability='synced')\n"
        "log.append(b'1')\n"
        "os.rename(sys.argv[1], sys.argv[1] + '.1')\n"
        "assert log.reopen(timeout=120)\n"
        "log.append(b'2')\n"
        "log.logger.kill()\n"
        "log.logger.wait()\n"
        "os._exit(0)\n"
    )
    path, trace = tmp_path / "log", tmp_path / "trace"
    command = [strace, "-f", "-qq", "-y", "-o", trace, "-e", "trace=fdatasync,fsync"]
    subprocess.run([*command, sys.executable, "-c", script, str(path)], check=True, timeout=PATIENCE)
    calls = [line.split(maxsplit=1)[1] for line in trace.read_text().splitlines() if "sync(" in line]
    synced = [(call.split("(")[0], call.split("<")[1].split(">")[0]) for call in calls]
    folder = ("fsync", str(tmp_path))
    old, new = ("fdatasync", f"{path}.1"), ("fdatasync", str(path))
    assert synced == [folder, ("fdatasync", str(path)), folder, old, new]


def test_signals_to_the_group_neither_end_nor_rotate(tmp_path):
    path = tmp_path / "log"
    with MessageLog(path) as log:
        rotate = Rotation(log)
        rotate.rename()
        for signum in (signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2, signal.SIGINT, signal.SIGTERM):
            log.logger.send_signal(signum)
            log.append(b"%d\n" % signum)
        assert log.logger.poll() is None
        assert not path.exists()
        assert log.reopen(timeout=PATIENCE)
        for signum in (signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2):
            log.logger.send_signal(signum)
        log.append(b"new\n")
    assert log.restarts == 0
    assert content(rotate.files[0]) == b"1\n10\n12\n2\n15\n"
    assert content(path) == b"new\n"


def test_who_can_not_reopen(tmp_path, forked):
    log = MessageLog(tmp_path / "log")

    def work(ready):
        with pytest.raises(RuntimeError, match=f"process {os.getpid()} is not the supervisor"):
            log.reopen()

    assert forked(work).wait() == 0
    with pytest.raises(ValueError, match="timeout must be None or a number of seconds >= 0, not -1"):
        log.reopen(timeout=-1)
    with log._alone(), pytest.raises(RuntimeError, match="a signal handler interrupted"):
        log.reopen()
    log.close()
    with pytest.raises(ipckit.Closed, match="log is closed"):
        log.reopen()


def test_an_exception_of_a_handler_leaves_one_file_or_the_other(tmp_path, forked):
    path = tmp_path / "log"

    def give_up(*_):
        raise KeyboardInterrupt

    log = MessageLog(path)
    stop(log.logger)
    former = signal.signal(signal.SIGUSR1, give_up)
    rotate = Rotation(log)
    rotate.rename()
    try:
        with pytest.raises(KeyboardInterrupt):
            interrupt_when_asleep(forked)
            log.reopen(timeout=PATIENCE)
    finally:
        signal.signal(signal.SIGUSR1, former)
    log.append(b"old\n")
    log.logger.send_signal(signal.SIGCONT)
    assert log.reopen(timeout=PATIENCE)
    log.append(b"new\n")
    log.close()
    assert (content(rotate.files[0]), content(path)) == (b"old\n", b"new\n")


def test_several_threads_replace_a_dead_logger_once(tmp_path):
    with MessageLog(tmp_path / "log") as log:
        for _ in range(20):
            log.logger.kill()
            log.logger.wait()
            together = threading.Barrier(4)
            replaced = []

            def work(together=together, replaced=replaced):
                together.wait()
                replaced.append(log.supervise())

            threads = [threading.Thread(target=work) for _ in range(4)]
            for thread in threads:
                thread.start()
            for thread in threads:
                thread.join()
            assert sorted(replaced) == [False, False, False, True]
        assert log.restarts == 20


# --- event loops ---------------------------------------------------------------------------------


def still_waiting(appends):
    """Those that are not done; where the pipe is full, later ones must not overtake."""
    waiting = []
    for place, append in enumerate(appends):
        if not append.done():
            waiting.append(append)
            if append.events == select.POLLOUT:
                return waiting + appends[place + 1 :]
    return waiting


def hear_first_ring(log):
    """Each new logger rings once."""
    assert select.select([log.acked], [], [], PATIENCE)[0] == [log.acked]
    os.eventfd_read(log.acked)


def loop_until_done(log, appends, supervise=True):
    """What an event loop does with appends that wait."""
    end = time.monotonic() + PATIENCE
    while appends := still_waiting(appends):
        assert time.monotonic() < end, f"{len(appends)} appends wait for ever"
        poller = select.poll()
        poller.register(appends[0].fileno(), appends[0].events)
        if supervise:
            poller.register(log, select.POLLIN)
        for fd, _ in poller.poll(100):
            if fd == log.acked:
                with contextlib.suppress(BlockingIOError):  # another process's loop was first
                    os.read(fd, 8)
            elif supervise and fd == log.fileno():
                log.supervise()


@pytest.mark.parametrize("durability", ["none", "written", "synced"])
def test_a_loop_appends_without_waiting(tmp_path, durability):
    path = tmp_path / "log"
    lines = [b"%d\n" % number * 100 for number in range(1000)]
    with MessageLog(path, durability=durability, capacity=4096) as log:
        stop(log.logger)
        appends = [log.begin(line) for line in lines]
        waiting = still_waiting(appends)
        assert len(waiting) == (1000 if durability != "none" else 1000 - log.stats().messages)
        assert 0 < log.stats().messages < 40, "the pipe holds less"
        assert appends[log.stats().messages].events == select.POLLOUT
        if durability != "none":
            assert (appends[0].events, appends[0].fileno()) == (select.POLLIN, log.acked)
        log.logger.send_signal(signal.SIGCONT)
        loop_until_done(log, waiting)
        assert all(append.done() for append in appends)
        if durability != "none":
            assert content(path) == b"".join(lines)
        assert log.stats().messages == 1000
    assert content(path) == b"".join(lines), "in order, each once"


def test_one_acknowledgement_is_for_all(tmp_path):
    path = tmp_path / "log"
    with MessageLog(path, durability="synced") as log:
        hear_first_ring(log)
        stop(log.logger)
        appends = [log.begin(b"%d\n" % number) for number in range(100)]
        assert not any(append.done() for append in appends)
        log.logger.send_signal(signal.SIGCONT)
        assert select.select([log.acked], [], [], PATIENCE)[0] == [log.acked]
        assert all(append.done() for append in appends)
    assert content(path) == b"".join(b"%d\n" % number for number in range(100))


def test_nobody_is_rung_for_who_waits_in_append(tmp_path):
    with MessageLog(tmp_path / "log", durability="written") as log:
        hear_first_ring(log)
        for _ in range(100):
            log.append(b"x")
        stop(log.logger)
        with pytest.raises(TimeoutError):
            log.append(b"late", timeout=0.01)
        log.logger.send_signal(signal.SIGCONT)
        log.append(b"x")
        assert select.select([log.acked], [], [], 0)[0] == []


@pytest.mark.parametrize("durability", ["none", "written", "synced"])
def test_a_loop_with_killed_loggers_and_changing_files(tmp_path, durability):
    path = tmp_path / "log"
    chance = random.Random(9)
    count = 0
    with MessageLog(path, durability=durability, format="record", capacity=8192) as log:
        rotate = Rotation(log)
        for _ in range(25):
            batch = [log.begin(b"%d" % number) for number in range(count, count + 30)]
            count += len(batch)
            for append in batch[: chance.randrange(30)]:
                append.done()
            if chance.random() < 0.5:
                log.logger.kill()
            if chance.random() < 0.5:
                rotate()
            loop_until_done(log, batch)
            time.sleep(0.005)  # a hundred restarts a second are the limit
    torn = []
    files = [*rotate.files, path]
    found = [r.data for file in files for r in records(file, on_torn=lambda *at: torn.append(at))]
    assert (found, torn) == ([b"%d" % number for number in range(count)], [])


def test_a_logger_killed_before_it_rang_is_followed_by_one_that_does(tmp_path):
    with MessageLog(tmp_path / "log", durability="written") as log:
        hear_first_ring(log)
        stop(log.logger)
        append = log.begin(b"x")
        assert not append.done()
        log.logger.kill()
        log.logger.wait()
        assert select.select([log.acked], [], [], 0)[0] == []
        assert log.supervise()
        eventually(append.done)
        assert select.select([log.acked], [], [], PATIENCE)[0] == [log.acked]


def test_a_loop_hears_when_the_long_message_before_has_passed(tmp_path, forked):
    """That of another process."""
    with MessageLog(tmp_path / "log", capacity=4096) as log:
        hear_first_ring(log)
        stop(log.logger)
        writer = forked(lambda ready: log.append(b"y" * 300_000))
        assert writer.wait() == 0
        append = log.begin(b"next")
        assert not append.done()
        assert (append.events, append.fileno()) == (select.POLLIN, log.acked)
        assert select.select([log.acked], [], [], 0)[0] == []
        log.logger.send_signal(signal.SIGCONT)
        assert select.select([log.acked], [], [], PATIENCE)[0] == [log.acked]
        loop_until_done(log, [append])
    assert content(tmp_path / "log") == b"y" * 300_000 + b"next"


def test_children_have_loops_too(tmp_path, forked):
    path = tmp_path / "log"

    def work(ready, name):
        ready()
        loop_until_done(log, [log.begin(b"%d %d \n" % (name, n)) for n in range(300)], supervise=False)

    with MessageLog(path, durability="written") as log:
        children = [forked(work, name) for name in range(3)]
        assert [child.wait() for child in children] == [0] * 3
    assert sorted(content(path).splitlines()) == sorted(
        b"%d %d " % (name, n) for name in range(3) for n in range(300)
    )


def test_an_append_given_up(tmp_path):
    log = MessageLog(tmp_path / "log", capacity=4096)
    stop(log.logger)
    data = bytearray(b"x" * 4096)
    assert log.begin(data).done()
    late = log.begin(data)
    assert not late.done()
    late.close()
    data.clear()  # nobody looks at it any more
    with pytest.raises(ipckit.Closed, match="an append to the log .*log was given up"):
        late.done()
    assert log.begin(b"y" * 10_000).done()
    behind = log.begin(b"never")
    assert not behind.done()
    del behind
    log.logger.send_signal(signal.SIGCONT)
    log.append(b"z")
    with pytest.raises(TypeError):
        log.begin("text")
    after = log.begin(b"x")
    log.close()
    with pytest.raises(ipckit.Closed, match="the log .*log is closed"):
        after.done()
    with pytest.raises(ipckit.Closed, match="the log .*log is closed"):
        log.acked  # noqa: B018
    assert content(tmp_path / "log") == b"x" * 4096 + b"y" * 10_000 + b"z"


def test_without_a_logger_a_loop_is_told(tmp_path):
    log = MessageLog(tmp_path / "log", durability="written")
    stop(log.logger)
    append = log.begin(b"x")
    assert not append.done()
    log.logger.kill()
    log.logger.wait()
    log._forget("reader")
    with pytest.raises(BrokenPipeError) as caught:
        append.done()
    assert caught.value.filename == log.path
    with pytest.raises(BrokenPipeError):
        log.begin(b"x").done()
    log._logger.close()
    log._logger = None
    log.close()


# --- refusals and misuse -------------------------------------------------------------------------


def refused(path, kind, number, message=None, **options):
    with pytest.raises(kind, match=message) as caught:
        MessageLog(path, lock_timeout=0, **options)
    assert caught.value.errno == number
    assert caught.value.filename == str(path)


def test_links_pipes_and_folders_are_refused_and_left_alone(tmp_path):
    target = tmp_path / "target"
    target.write_bytes(b"precious")
    (tmp_path / "symlink").symlink_to(target)
    refused(tmp_path / "symlink", OSError, errno.ELOOP, "must not be a symbolic link")
    (tmp_path / "dangling").symlink_to(tmp_path / "nothing")
    refused(tmp_path / "dangling", OSError, errno.ELOOP, "symbolic link")
    os.link(target, tmp_path / "hardlink")
    refused(tmp_path / "hardlink", OSError, errno.EMLINK, "not 2 links")
    os.mkfifo(tmp_path / "fifo")
    refused(tmp_path / "fifo", OSError, errno.EINVAL, "must be a regular file")
    refused(tmp_path, IsADirectoryError, errno.EISDIR)
    assert target.read_bytes() == b"precious"
    assert not (tmp_path / "nothing").exists()


def test_devices_missing_folders_and_strangers_files_are_refused(tmp_path, forked):
    refused("/dev/null", OSError, errno.EINVAL, "regular file")
    refused(tmp_path / "no" / "log", FileNotFoundError, errno.ENOENT)
    if os.geteuid() != 0:
        pytest.skip("only root can make a file that belongs to somebody else")
    path = tmp_path / "theirs"
    path.write_bytes(b"")
    os.chown(path, 12345, 12345)
    refused(path, PermissionError, errno.EPERM, "belongs to user 12345")

    def as_nobody(ready):
        os.setuid(65534)
        try:
            MessageLog("/ipckit-test-log")
        except PermissionError as error:
            assert error.errno == errno.EACCES
            return
        raise AssertionError("opened")

    assert forked(as_nobody).wait() == 0


def test_a_second_log_on_the_same_file_is_refused(tmp_path):
    path = tmp_path / "log"
    with MessageLog(path) as log:
        names_it = rf"another process writes this log \(process {log.logger.pid}\)"
        hear_first_ring(log)  # it has opened the file
        refused(path, BlockingIOError, errno.EWOULDBLOCK, names_it)
    MessageLog(path).close()


def test_the_next_log_waits_for_the_logger_of_one_that_was_killed(tmp_path, forked):
    path = tmp_path / "log"
    told, tell = os.pipe()

    def serve(ready):
        log = MessageLog(path)
        hear_first_ring(log)  # it has opened the file
        stop(log.logger)
        log.append(b"the rest\n")
        os.write(tell, b"%d" % log.logger.pid)
        ready()
        signal.pause()

    supervisor = forked(serve)
    supervisor.wait_ready()
    logger = int(os.read(told, 20))
    supervisor.kill()
    supervisor.wait()
    refused(path, BlockingIOError, errno.EWOULDBLOCK, rf"\(process {logger}\)")
    going_on = threading.Timer(0.1, os.kill, (logger, signal.SIGCONT))
    going_on.start()
    with MessageLog(path, lock_timeout=PATIENCE) as log:
        assert content(path) == b"the rest\n"
        log.append(b"and the next\n")
    going_on.join()
    assert content(path) == b"the rest\nand the next\n"
    for fd in (told, tell):
        os.close(fd)


def test_bad_options_name_the_value(tmp_path):
    with pytest.raises(ValueError, match="format must be one of raw, record, not 'json'"):
        MessageLog(tmp_path / "log", format="json")
    with pytest.raises(ValueError, match="durability must be one of none, written, synced, not 'very'"):
        MessageLog(tmp_path / "log", durability="very")
    assert not (tmp_path / "log").exists()


def test_after_close(tmp_path):
    log = MessageLog(tmp_path / "log")
    log.close()
    log.close()
    assert log.closed
    for use in (lambda: log.append(b"x"), log.stats, log.fileno, log.supervise):
        with pytest.raises(ipckit.Closed, match="log .*log is closed"):
            use()


def test_not_bytes(tmp_path):
    for format in ("raw", "record"):
        with MessageLog(tmp_path / format, format=format) as log:
            with pytest.raises(TypeError):
                log.append("text")
            log.append(b"fine")


def test_a_child_can_not_supervise_and_closes_only_its_own(tmp_path, forked):
    path = tmp_path / "log"
    with MessageLog(path) as log:

        def work(ready):
            with pytest.raises(RuntimeError, match=f"process {os.getpid()} is not the supervisor"):
                log.supervise()
            log.append(b"child\n")
            log.close()
            assert log.closed

        assert forked(work).wait() == 0
        log.append(b"parent\n")
    assert content(path) == b"child\nparent\n"


def test_close_waits_for_the_other_writers_but_not_for_ever(tmp_path, forked):
    log = MessageLog(tmp_path / "log")

    def hold(ready):
        ready()
        signal.pause()

    holder = forked(hold)
    holder.wait_ready()
    with pytest.raises(TimeoutError, match="writers still have it open; 0 bytes not written"):
        log.close(timeout=0.05)


def test_without_logger_and_supervisor_a_writer_is_told(tmp_path, forked):
    told, tell = os.pipe()

    def supervise(ready):
        log = MessageLog(tmp_path / "log", durability="written")
        if os.fork() == 0:
            os.read(told, 1)
            try:
                log.append(b"x")
            except BrokenPipeError as error:
                os._exit(0 if error.filename == log.path else 3)
            os._exit(2)
        log.logger.kill()
        log.logger.wait()
        ready()
        signal.pause()

    import ctypes

    libc = ctypes.CDLL(None)
    pr_set_child_subreaper = 36
    libc.prctl(pr_set_child_subreaper, 1)
    try:
        supervisor = forked(supervise)
        supervisor.wait_ready()
        supervisor.kill()
        supervisor.wait()
        os.write(tell, b".")
        _, status = os.wait()
        assert os.waitstatus_to_exitcode(status) == 0
    finally:
        libc.prctl(pr_set_child_subreaper, 0)
        os.close(told)
        os.close(tell)


def test_an_exception_of_a_handler_gives_the_message_up(tmp_path, forked):
    log = MessageLog(tmp_path / "log", capacity=4096)
    stop(log.logger)
    log.append(b"x" * 4096)

    def give_up(*_):
        raise KeyboardInterrupt

    former = signal.signal(signal.SIGUSR1, give_up)
    try:
        for size in (10, 50_000):
            with pytest.raises(KeyboardInterrupt):
                interrupt_when_asleep(forked)
                log.append(b"y" * size, timeout=PATIENCE)
                if size > PIPE_BUF:  # that is in the log; this one waits for it
                    log.append(b"y" * size, timeout=PATIENCE)
    finally:
        signal.signal(signal.SIGUSR1, former)
    log.logger.send_signal(signal.SIGCONT)
    log.append(b"|after")
    log.close()
    assert content(tmp_path / "log") == b"x" * 4096 + b"y" * 50_000 + b"|after"


def test_the_example(tmp_path):
    script = Path(__file__).parent.parent / "examples" / "message_log.py"
    done = subprocess.run(
        [sys.executable, script, tmp_path / "log"], capture_output=True, text=True, timeout=PATIENCE
    )
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.splitlines() == [f"worker {n}: 2000 messages" for n in range(4)]


# --- descriptors, processes ----------------------------------------------------------------------


def test_with_0_to_2_closed_nothing_of_the_log_is_there(tmp_path, forked):
    path = tmp_path / "log"

    def work(ready):
        os.closerange(0, 3)
        log = MessageLog(path)
        assert min(log._own.values()) > 2
        log.append(b"short\n")
        log.append(b"x" * 10_000)
        os.rename(path, f"{path}.1")
        assert log.reopen(timeout=PATIENCE)
        log.append(b"new\n")
        log.close()

    assert forked(work).wait() == 0
    assert content(f"{path}.1") == b"short\n" + b"x" * 10_000
    assert content(path) == b"new\n"


def test_close_does_not_start_loggers_without_end(tmp_path):
    log = MessageLog(tmp_path / "log")
    log._recent = [time.monotonic() + 100] * 100  # a hundred deaths "now", however slow this machine
    log.append(b"x\n")
    log.logger.kill()
    with pytest.raises(ChildProcessError, match=r"died 101 times in a second: killed by SIGKILL; \d bytes"):
        log.close()
    assert (log.closed, log.restarts) == (True, 0)


def test_without_a_process_for_a_logger_append_and_close_wait(tmp_path, forked):
    if os.geteuid() != 0:
        pytest.skip("needs root, to become a user whose processes can be limited")
    path = tmp_path / "log"
    told, tell = os.pipe()
    limit, most = resource.getrlimit(resource.RLIMIT_NPROC)

    def work(ready):
        log = MessageLog(path, capacity=4096)
        user = user_of_its_own()
        os.setresuid(user, user, user)
        lifting = threading.Timer(1, resource.setrlimit, (resource.RLIMIT_NPROC, (limit, most)))
        lifting.start()
        resource.setrlimit(resource.RLIMIT_NPROC, (1, most))
        os.write(tell, b"%20d" % log.logger.pid)
        log.logger.wait()
        with pytest.raises(BlockingIOError):
            log.supervise()
        assert select.select([log], [], [], 0)[0] == [log], "it is due"
        log.append(b"x" * 4096)
        with pytest.raises(TimeoutError):
            log.append(b"late", timeout=0.05)
        log.append(b"y" * 4096)
        lifting.join()
        resource.setrlimit(resource.RLIMIT_NPROC, (1, most))
        log.logger.kill()
        log.logger.wait()
        with pytest.raises(TimeoutError, match="there is no logger: Resource temporarily unavailable"):
            log.close(timeout=0.05)
        os.write(tell, b"%20d" % log.unwritten)

    child = forked(work)
    os.kill(int(os.read(told, 20)), signal.SIGKILL)
    assert child.wait() == 0
    written = content(path)
    assert written == (b"x" * 4096 + b"y" * 4096)[: len(written)]
    assert len(written) + int(os.read(told, 20)) == 8192
    for fd in (told, tell):
        os.close(fd)


def test_an_event_loop_reopens_without_waiting(tmp_path):
    path = tmp_path / "log"
    log = MessageLog(path)
    assert log.begin_reopen() is None
    stop(log.logger)
    rotate = Rotation(log)
    rotate.rename()
    first = log.begin_reopen(timeout=PATIENCE)
    assert not first.done()
    second = log.begin_reopen(timeout=PATIENCE)
    with pytest.raises(TimeoutError, match="the old file stays"):
        first.done()
    log.logger.kill()
    log.logger.wait()
    log.supervise()
    while not second.done():
        second.wait()
    assert (log.stats().files, log.stats().split) == (1, 0)
    log.append(b"new\n")
    log.close()
    assert second.done()
    with pytest.raises(ipckit.Closed):
        second.fileno()
    assert (content(rotate.files[0]), content(path)) == (b"", b"new\n")


# --- a descriptor in place of a path -------------------------------------------------------------


def test_a_log_into_a_pipe_waits_for_its_reader(tmp_path):
    """It is full for long; all comes in order, and no logger spins meanwhile."""
    reader, writer = os.pipe()
    lines = [b"%d\n" % number for number in range(60_000)]
    with MessageLog(writer, durability="none") as log:
        assert log.path == f"descriptor {writer}"
        os.close(writer)  # the log has a copy
        for line in lines:
            log.append(line)
        eventually(lambda: log.stats().backlog > 0 and procfs.asleep(log.logger.pid))
        got = bytearray()
        while len(got) < len(b"".join(lines)):
            got += os.read(reader, 1 << 16)
        with pytest.raises(OSError, match=r"no path to be opened again.*'descriptor") as caught:
            log.reopen()
        assert caught.value.errno == errno.EINVAL
        log.logger.kill()
        log.append(b"another logger\n")
        eventually(log.supervise)
        got += os.read(reader, 1 << 16)
    assert bytes(got) == b"".join(lines) + b"another logger\n"
    assert os.read(reader, 1) == b"", "nobody has it open any more"
    os.close(reader)


def test_a_reader_of_the_log_that_goes_away_is_told(tmp_path):
    reader, writer = os.pipe()
    log = MessageLog(writer)
    os.close(writer)
    os.close(reader)
    log.append(b"lost\n")
    eventually(lambda: log.stats().error == errno.EPIPE)
    with pytest.raises(OSError, match="5 bytes"):
        log.close(timeout=0.1)


def test_what_can_not_be_given_in_place_of_a_path(tmp_path):
    with open(tmp_path / "file", "w") as file:
        with pytest.raises(
            OSError, match=f"must be given by its path.*'descriptor {file.fileno()}'"
        ) as caught:
            MessageLog(file.fileno())
        assert caught.value.errno == errno.EINVAL
        number = file.fileno()
    with pytest.raises(OSError) as caught:
        MessageLog(number)
    assert caught.value.errno == errno.EBADF
    reader, writer = os.pipe()
    with pytest.raises(ValueError, match=f"'synced' is of a file, and descriptor {writer} is given"):
        MessageLog(writer, durability="synced")
    os.close(reader)
    os.close(writer)
