import dataclasses
import errno
import os
import random
import signal
import time

import posix_ipc
import pytest
import sysv_ipc
from conftest import ISOLATED, PATIENCE, eventually
from making import (
    MAKERS,
    NEW_IPC,
    NEW_NS,
    NEW_PID,
    Made,
    become,
    change_time,
    clean,
    mount,
    unshare,
    use,
    without_queue_folder,
)

from ipckit import inventory, limits, registry

WHOLE = bool(os.environ.get("IPCKIT_PROOF"))
root_only = pytest.mark.skipif(
    os.geteuid() != 0 or not ISOLATED, reason="needs root that may make namespaces"
)
kinds = pytest.mark.parametrize("kind", MAKERS)


@pytest.fixture(autouse=True)
def nothing_survives(nothing_left_behind):
    before = {obj.id for obj in inventory.objects()}
    yield
    clean(before)


def find(ident):
    return next((obj for obj in inventory.objects() if obj.id == ident), None)


def ids(found):
    return {obj.id for obj in found}


class Tell:
    """One line from a child to its parent, over a pipe."""

    def __init__(self):
        self.reader, self.writer = os.pipe()

    def send(self, text):
        os.write(self.writer, text.encode())

    def receive(self):
        return os.read(self.reader, 4096).decode()

    def __enter__(self):
        return self

    def __exit__(self, *_):
        os.close(self.reader)
        os.close(self.writer)


def make_and_stay(ready, kind, tell, name="thing"):
    made = Made(kind, name)
    tell.send(made.id)
    ready()
    signal.pause()


def make_and_close(ready, kind, tell):
    made = Made(kind)
    made.close()
    tell.send(made.id)


def use_and_stay(ready, ident):
    kind, _, name = ident.partition(":")
    use(kind, name)
    ready()
    signal.pause()


def use_and_close(ready, ident):
    kind, _, name = ident.partition(":")
    use(kind, name).leave()


@pytest.fixture
def maker(forked):
    """``child, id = maker(kind)``: a process that made such an object, recorded it, and sleeps."""

    def start(kind, **options):
        with Tell() as tell:
            child = forked(make_and_stay, kind, tell, *options.values())
            child.wait_ready()
            return child, tell.receive()

    return start


@pytest.fixture
def left(forked):
    """``id = left(kind)``: an object whose maker closed it in good order, and ended."""

    def start(kind):
        with Tell() as tell:
            assert forked(make_and_close, kind, tell).wait() == 0
            return tell.receive()

    return start


# --- what is seen ----------------------------------------------------------------------------------


@kinds
def test_what_an_object_is(kind, maker):
    before = time.time()
    child, ident = maker(kind)
    obj = find(ident)
    assert (obj.kind, obj.id, obj.uid, obj.mode) == (kind, ident, os.geteuid(), 0o600)
    assert (obj.creator, obj.users, obj.verdict) == (child.pid, 1, "live")
    assert obj.why == f"used by pid {child.pid}"
    assert abs(obj.created - before) < 3 + PATIENCE
    sizes = {"sysv-queue": 0, "sysv-semaphore": 1, "posix-queue": 0, "posix-semaphore": 32}
    assert obj.size == sizes.get(kind, 5000)
    assert (obj.key is not None) == kind.startswith("sysv")


def test_messages_that_wait_are_the_size_of_a_queue():
    system_v, posix = Made("sysv-queue"), Made("posix-queue")
    assert find(system_v.id).active is None
    system_v.handle.send(b"12345")
    posix.handle.send(b"1234567")
    assert find(system_v.id).size == 5
    assert abs(find(system_v.id).active - time.time()) < PATIENCE
    assert find(posix.id).size == 7


def test_by_kind_then_by_id():
    made = [Made("posix-memory", "b"), Made("posix-memory", "a")]
    made += [Made("sysv-queue") for _ in range(12)]
    ordered = [obj for obj in inventory.objects() if obj.id in {one.id for one in made}]
    assert [obj.kind for obj in ordered] == ["sysv-queue"] * 12 + ["posix-memory"] * 2
    numbers = [int(obj.ident) for obj in ordered[:12]]
    assert numbers == sorted(numbers)
    assert [obj.ident for obj in ordered[12:]] == ["/a", "/b"]


def test_our_own_records_are_no_objects():
    Made("posix-semaphore")
    assert [obj.ident for obj in inventory.objects() if "ipckit" in obj.ident] == []
    assert not [obj for obj in inventory.objects() if obj.kind == "memory"]


def test_looking_changes_nothing():
    before = os.listdir("/dev/shm")
    inventory.objects()
    inventory.unlisted()
    assert os.listdir("/dev/shm") == before


# --- the verdict -----------------------------------------------------------------------------------


@kinds
def test_a_killed_maker_leaves_an_orphan_and_a_stopped_one_does_not(kind, maker):
    child, ident = maker(kind)
    child.kill(signal.SIGSTOP)
    os.waitid(os.P_PID, child.pid, os.WSTOPPED)
    assert find(ident).verdict == "live"
    assert ident not in ids(inventory.collect(dead=True))
    child.kill(signal.SIGCONT)
    child.kill()
    eventually(lambda: find(ident).verdict == "orphan")  # not reaped yet: a zombie uses nothing
    obj = find(ident)
    assert (obj.users, obj.left) == (0, False)
    assert obj.why == f"pid {child.pid} ({registry.records()[0].command}) never closed it"
    assert ids(inventory.collect(dry_run=True)) == {ident}
    assert find(ident), "a dry run removes nothing"
    assert ids(inventory.collect()) == {ident}
    assert find(ident) is None
    assert registry.records() == []
    assert inventory.collect() == []


@kinds
def test_what_its_maker_closed_is_left_and_goes_only_when_asked(kind, left):
    ident = left(kind)
    obj = find(ident)
    assert (obj.verdict, obj.left, obj.users) == ("unknown", True, 0)
    assert obj.why == "left by its maker, who closed it"
    assert inventory.collect() == []
    assert ids(inventory.collect(dead=True, dry_run=True)) == {ident}
    assert ids(inventory.collect(dead=True)) == {ident}
    assert find(ident) is None


@pytest.mark.parametrize("kind", ["sysv-semaphore", "posix-memory"])
def test_one_user_who_lives_is_enough(kind, maker, forked):
    child, ident = maker(kind)
    user = forked(use_and_stay, ident)
    user.wait_ready()
    assert find(ident).users == 2
    child.kill()
    child.wait()
    obj = find(ident)
    assert (obj.verdict, obj.users, obj.why) == ("live", 1, f"used by pid {user.pid}")
    assert inventory.collect(dead=True) == []
    user.kill()
    user.wait()
    assert find(ident).verdict == "orphan"


def test_a_user_killed_later_makes_an_orphan_of_what_was_left(left, forked):
    ident = left("posix-memory")
    assert forked(use_and_close, ident).wait() == 0
    assert find(ident).left, "that user closed it too"
    user = forked(use_and_stay, ident)
    user.wait_ready()
    user.kill()
    user.wait()
    assert find(ident).verdict == "orphan"
    assert f"pid {user.pid}" in find(ident).why


def test_a_maker_who_closed_and_lives_may_come_back():
    made = Made("posix-memory")
    made.close()
    obj = find(made.id)
    assert (obj.verdict, obj.left) == ("unknown", False)
    assert obj.why == f"closed by its maker, pid {os.getpid()}, who lives"
    assert inventory.collect(dead=True) == []


def test_what_ipckit_did_not_make_stays():
    semaphore = posix_ipc.Semaphore("/thing", posix_ipc.O_CREX)
    semaphore.close()
    assert (find("posix-semaphore:/thing").verdict, find("posix-semaphore:/thing").why) == (
        "unknown",
        "not made by ipckit",
    )
    assert inventory.collect(dead=True) == []


@pytest.mark.parametrize("kind", ["sysv-memory", "posix-memory"])
def test_a_successor_of_the_same_name_is_another_object(kind, forked):
    def make(ready):
        Made(kind, birth="1")
        ready()
        signal.pause()

    child = forked(make)
    child.wait_ready()
    child.kill()
    child.wait()
    (obj,) = (obj for obj in inventory.objects() if obj.kind == kind)
    why = "successor of one that ipckit made" if kind == "sysv-memory" else "not made by ipckit"
    assert (obj.verdict, obj.why) == ("unknown", why)
    assert inventory.collect(dead=True) == []


def test_a_record_of_a_former_object_of_that_name_proves_nothing(maker, left):
    """A user of the former one was killed; the maker of this one closed it."""
    child, ident = maker("posix-memory")
    child.kill()
    child.wait()
    os.unlink("/dev/shm/thing")
    assert left("posix-memory") == ident
    assert len(registry.records()) == 2
    assert find(ident).left
    assert inventory.collect() == []
    (record,) = registry.records()
    assert record.left, "that of the former one is dropped"


def test_a_maker_killed_before_the_record_is_known_by_our_own_folder(forked):
    """Elsewhere nothing would tell it from a stranger's."""

    def make(ready):
        with registry.entering():
            MAKERS["memory"]("thing")
            MAKERS["posix-memory"]("thing")
            ready()
            signal.pause()

    child = forked(make)
    child.wait_ready()
    assert find("memory:thing").verdict == "live", "its maker has it open"
    child.kill()
    child.wait()
    assert find("memory:thing").why == "left by its maker, who was killed before it was recorded"
    assert find("posix-memory:/thing").why == "not made by ipckit"
    assert inventory.collect() == []
    assert ids(inventory.collect(dead=True)) == {"memory:thing"}


# --- what only the kernel knows --------------------------------------------------------------------------


def strangers():
    """Processes that use what ipckit made, and don't tell: each acts, then calls ready()."""

    def attached(ready, ident):
        segment = sysv_ipc.attach(int(ident))
        ready()
        signal.pause()
        segment.detach()

    def opened(ready, ident):
        os.open(f"/dev/shm{ident}", os.O_RDONLY)
        ready()
        signal.pause()

    def mapped(ready, ident):
        semaphore = posix_ipc.Semaphore(ident)  # whose descriptor is closed, and its file renamed
        ready()
        signal.pause()
        semaphore.close()

    def queue_open(ready, ident):
        posix_ipc.MessageQueue(ident)
        ready()
        signal.pause()

    def receiving(ready, key):
        queue = sysv_ipc.MessageQueue(key)
        queue.send(b"x")
        queue.receive()
        ready()
        signal.pause()

    def changing(ready, key):
        sysv_ipc.Semaphore(key).release()
        ready()
        signal.pause()

    return [
        ("sysv-memory", attached), ("posix-memory", opened), ("posix-semaphore", mapped),
        ("posix-queue", queue_open), ("sysv-queue", receiving), ("sysv-semaphore", changing),
    ]  # fmt: skip


@pytest.mark.parametrize("kind, act", strangers(), ids=lambda value: getattr(value, "__name__", value))
def test_a_stranger_who_uses_it_keeps_it(kind, act, maker, forked):
    child, ident = maker(kind)
    name = find(ident).key if act.__name__ in ("receiving", "changing") else ident.partition(":")[2]
    stranger = forked(act, name)
    stranger.wait_ready()
    child.kill()
    child.wait()
    obj = find(ident)
    assert (obj.verdict, obj.users, obj.why) == ("live", 1, f"used by pid {stranger.pid}")
    assert inventory.collect(dead=True) == []
    stranger.kill()
    stranger.wait()
    assert ids(inventory.collect()) == {ident}


def test_a_stranger_who_waits_for_a_semaphore_keeps_it(maker, forked):
    child, ident = maker("sysv-semaphore")
    key = find(ident).key

    def wait(ready):
        semaphore = sysv_ipc.Semaphore(key)
        ready()
        semaphore.acquire(delta=2)

    stranger = forked(wait)
    stranger.wait_ready()
    child.kill()
    child.wait()
    eventually(lambda: find(ident).verdict == "live")  # in semop by now
    assert find(ident).why == "used by processes that can't be seen"
    stranger.kill()
    stranger.wait()
    assert find(ident).verdict == "orphan"


def test_a_segment_removed_while_attached_says_so():
    made = Made("sysv-memory")
    made.handle.remove()
    obj = find(made.id)
    assert (obj.verdict, obj.key, obj.mode) == ("live", 0, 0o600)
    assert obj.why == f"removed, but still used by pid {os.getpid()}"
    made.member.forget()
    made.close()
    assert find(made.id) is None


# --- other users, other namespaces -----------------------------------------------------------------------


@root_only
@kinds
def test_another_user_s_is_foreign_and_never_removed(kind, forked):
    def make(ready, tell):
        become(65534)
        Made(kind)
        tell.send("made")
        ready()
        signal.pause()

    before = ids(inventory.objects())
    with Tell() as tell:
        child = forked(make, tell)
        child.wait_ready()
    child.kill()
    child.wait()
    (obj,) = (obj for obj in inventory.objects() if obj.id not in before)
    assert (obj.verdict, obj.uid, obj.why) == ("foreign", 65534, "belongs to user 65534")
    assert obj.id == (f"memory:65534/{obj.ident}" if kind == "memory" else f"{kind}:{obj.ident}")
    assert inventory.collect(dead=True) == []
    with pytest.raises(PermissionError, match=f"{obj.id} belongs to user 65534") as caught:
        inventory.remove(obj)
    assert caught.value.errno == errno.EPERM
    assert find(obj.id)

    def clean(ready):
        become(65534)
        assert [one.verdict for one in inventory.objects() if one.kind == kind] == ["orphan"]
        assert [one.kind for one in inventory.collect()] == [kind]

    assert forked(clean).wait() == 0
    assert find(obj.id) is None


@root_only
def test_who_claims_another_s_object_proves_nothing(forked):
    """A record of another user says that this object's maker is dead."""
    semaphore = posix_ipc.Semaphore("/thing", posix_ipc.O_CREX)
    semaphore.close()
    birth = find("posix-semaphore:/thing").birth

    def claim(ready):
        become(65534)
        with registry.entering():
            registry.enter("posix-semaphore", "/thing", created=True, birth=birth)

    assert forked(claim).wait() == 0
    assert len(registry.records()) == 1
    assert find("posix-semaphore:/thing").why == "not made by ipckit"
    assert inventory.collect(dead=True) == []

    def drop(ready):
        become(65534)
        assert inventory.collect() == []
        with registry.cleaning():
            for record in registry.records():
                registry.drop(record)

    assert forked(drop).wait() == 0


@root_only
def test_other_users_processes_can_not_all_be_looked_at(forked):
    """Who may open it, and isn't to be seen, may have it open."""

    def make(ready):
        become(65534)
        os.umask(0)
        with registry.entering():
            segment = posix_ipc.SharedMemory("/thing", posix_ipc.O_CREX, size=100, mode=0o666)
            status = os.fstat(segment.fd)
            registry.enter("posix-memory", "/thing", created=True, birth=f"{status.st_dev}.{status.st_ino}")

    def look(ready):
        become(65534)
        obj = find("posix-memory:/thing")
        assert (obj.verdict, obj.why) == (
            "unknown",
            "open to other users, whose processes can't be looked at",
        )
        assert inventory.collect(dead=True) == []
        inventory.remove(obj)

    assert forked(make).wait() == 0
    assert forked(look).wait() == 0


def in_a_pid_namespace(body):
    """Run body() as process 1 of a new pid namespace, with its own /proc; its exit code."""
    unshare(NEW_PID | NEW_NS)
    pid = os.fork()
    if pid == 0:
        code = 1
        try:
            mount(b"proc", b"/proc", b"proc")
            body()
            code = 0
        finally:
            os._exit(code)
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


@root_only
@pytest.mark.parametrize("kind", ["sysv-semaphore", "posix-memory"])
def test_what_another_pid_namespace_used_is_unknown(kind, forked):
    """It ended there without closing, but its number is here another's or nobody's."""

    def make():
        Made(kind)

    def inside(ready):
        assert in_a_pid_namespace(make) == 0

    assert forked(inside).wait() == 0
    (obj,) = (obj for obj in inventory.objects() if obj.kind == kind)
    assert (obj.verdict, obj.why) == ("unknown", "used in another pid namespace, where somebody may live")
    assert inventory.collect(dead=True) == []
    assert find(obj.id)


@root_only
@pytest.mark.parametrize("kind", ["sysv-queue", "posix-memory"])
def test_from_inside_a_pid_namespace_nobody_outside_is_dead(kind, maker, forked):
    child, ident = maker(kind)
    child.kill(signal.SIGSTOP)

    def clean():
        assert find(ident).verdict == "unknown"
        assert inventory.collect(dead=True) == []

    def inside(ready):
        assert in_a_pid_namespace(clean) == 0

    assert forked(inside).wait() == 0
    assert find(ident).verdict == "live"


@root_only
def test_a_queue_last_used_from_a_pid_namespace_that_is_not_seen_is_not_dead(forked):
    """The kernel gives 0 for a process that has no number here; both siblings see each other so."""
    queue = sysv_ipc.MessageQueue(None, sysv_ipc.IPC_CREX)

    def send():
        sysv_ipc.MessageQueue(queue.key).send(b"x")

    def sender(ready):
        assert in_a_pid_namespace(send) == 0

    def look():
        birth = change_time("msg", queue.id)
        with registry.entering():
            made = registry.enter("sysv-queue", str(queue.id), created=True, birth=birth)
        made.leave()
        obj = find(f"sysv-queue:{queue.id}")
        assert (obj.verdict, obj.why) == ("unknown", "last used from another pid namespace")
        made.forget()

    def looker(ready):
        assert in_a_pid_namespace(look) == 0

    assert forked(sender).wait() == 0
    assert forked(looker).wait() == 0
    inventory.remove(find(f"sysv-queue:{queue.id}"))
    with registry.cleaning():
        for record in registry.records():
            registry.drop(record)


# --- queues without a folder ---------------------------------------------------------------------------


@root_only
def test_without_a_folder_only_recorded_queues_are_listed(forked):
    def look(ready):
        without_queue_folder()
        become(65534)
        made = Made("posix-queue", "recorded")
        queue = posix_ipc.MessageQueue("/secret", posix_ipc.O_CREX)
        assert [obj.id for obj in inventory.objects() if obj.kind == "posix-queue"] == [made.id]
        assert "/dev/mqueue is not mounted" in inventory.unlisted()
        inventory.remove(find(made.id))
        queue.unlink()

    assert inventory.unlisted() is None, "root sees them all"
    assert forked(look).wait() == 0


@root_only
def test_a_mounted_folder_is_for_everybody(forked):
    def look(ready):
        unshare(NEW_NS)
        mount(b"none", b"/", None, flags=0x00044000)
        mount(b"dev", b"/dev", b"tmpfs")
        os.mkdir("/dev/shm", 0o1777)
        os.mkdir("/dev/mqueue")
        mount(b"none", b"/dev/mqueue", b"mqueue")
        os.chmod("/dev/shm", 0o1777)
        become(65534)
        queue = posix_ipc.MessageQueue("/secret", posix_ipc.O_CREX, mode=0o200)
        assert inventory.unlisted() is None
        obj = find("posix-queue:/secret")
        assert (obj.size, obj.mode) == (0, 0o200), "what can't be read is listed all the same"
        queue.unlink()

    assert forked(look).wait() == 0


def limit_of_queues():
    (folder,) = (limit.value for limit in limits.survey() if limit.name == "/dev/mqueue")
    (used,) = (limit.used for limit in limits.survey() if limit.name == "fs.mqueue.queues_max")
    return folder, used


@root_only
def test_a_folder_of_another_ipc_namespace_is_not_taken_for_ours(forked):
    """As where a container shares the folder of its host."""

    def look(ready):
        unshare(NEW_NS | NEW_IPC)
        mount(b"none", b"/", None, flags=0x00044000)
        mount(b"dev", b"/dev", b"tmpfs")
        os.mkdir("/dev/shm")
        os.mkdir("/dev/mqueue")
        os.chmod("/dev/shm", 0o1777)
        mount(b"none", b"/dev/mqueue", b"mqueue")
        posix_ipc.MessageQueue("/theirs", posix_ipc.O_CREX, mode=0o666)
        unshare(NEW_IPC)
        posix_ipc.MessageQueue("/another", posix_ipc.O_CREX, mode=0o666)
        assert limit_of_queues() == ("of another ipc namespace", 1), "root needs no folder"
        assert {obj.ident for obj in inventory.objects()} == {"/another"}
        become(65534)
        Made("posix-queue", "ours")
        assert limit_of_queues() == ("of another ipc namespace", None)
        assert {obj.ident for obj in inventory.objects()} == {"/ours"}
        assert "/dev/mqueue shows those of another ipc namespace" in inventory.unlisted()
        # The same name is not the same queue.
        posix_ipc.MessageQueue("/theirs", posix_ipc.O_CREX)
        assert {obj.ident for obj in inventory.objects()} == {"/ours"}

    assert forked(look).wait() == 0


# --- removing ------------------------------------------------------------------------------------------


@kinds
def test_removing_takes_the_object_and_its_records(kind):
    made = Made(kind)
    inventory.remove(find(made.id))
    obj = find(made.id)
    if kind == "sysv-memory":
        assert obj.why.startswith("removed, but still used")
    else:
        assert obj is None
    assert registry.records() == []


@kinds
def test_removing_what_went_already(kind):
    made = Made(kind)
    obj = find(made.id)
    made.close()
    inventory.remove(obj)
    with pytest.raises(FileNotFoundError) as caught:
        inventory.remove(obj)
    assert caught.value.errno == errno.ENOENT
    assert obj.ident.lstrip("/") in str(caught.value)


@kinds
def test_what_is_another_one_by_now_stays(kind):
    made = Made(kind)
    obj = find(made.id)
    with pytest.raises(OSError, match=f"{made.id} is another object by now") as caught:
        inventory.remove(dataclasses.replace(obj, birth="1"))
    assert caught.value.errno == errno.ESTALE
    assert find(made.id)


def test_a_new_file_at_the_name_is_another_one():
    made = Made("posix-memory")
    obj = find(made.id)
    made.handle.unlink()
    posix_ipc.SharedMemory("/thing", posix_ipc.O_CREX, size=10).close_fd()
    with pytest.raises(OSError, match="another object by now"):
        inventory.remove(obj)
    assert find(made.id).size == 10


def test_who_attaches_after_the_verdict_keeps_it(maker):
    """Between the two looks of the cleaner: it must not be removed under him."""
    child, ident = maker("sysv-memory")
    child.kill()
    child.wait()
    obj = find(ident)
    assert obj.verdict == "orphan"
    late = sysv_ipc.attach(int(obj.ident))
    assert not inventory._removed(obj, {})
    assert find(ident).key == obj.key, "not even marked"
    late.detach()
    assert inventory._removed(obj, {})
    assert not inventory._removed(obj, {}), "gone meanwhile is no error"


def test_records_of_what_is_gone_are_dropped(maker):
    child, _ = maker("posix-memory")
    other, _ = maker("posix-semaphore")
    os.unlink("/dev/shm/thing")
    os.unlink("/dev/shm/sem.thing")
    child.kill()
    child.wait()
    assert len(registry.records()) == 2
    assert inventory.collect() == []
    (record,) = registry.records()
    assert record.process.pid == other.pid, "the living forget it themselves"


def test_a_cleaner_that_can_not_have_the_lock_says_who_has_it(forked):
    def hold(ready):
        with registry.entering():
            ready()
            signal.pause()

    child = forked(hold)
    child.wait_ready()
    with pytest.raises(TimeoutError, match=f"held by pid {child.pid}") as caught:
        inventory.collect(timeout=0.05)
    assert caught.value.errno == errno.ETIMEDOUT
    assert f"/dev/shm/ipckit-{os.geteuid()}" in str(caught.value)
    child.kill()
    child.wait()
    inventory.collect()


# --- the whole -----------------------------------------------------------------------------------------


@pytest.mark.proof
def test_exactly_the_orphans_go_and_the_living_go_on(forked):
    """Each process makes one object and uses a common one; half are killed, some of the others stopped."""
    count = 100 if WHOLE else 20
    common = Made("posix-memory", "common")
    go, gun = os.pipe()
    fine, tell = os.pipe()

    def work(ready, kind, number, told):
        made = Made(kind, f"thing{number}")
        use("posix-memory", "/common")
        told.send(made.id)
        ready()
        os.read(go, 1)
        assert find(made.id), "it is still there"
        assert posix_ipc.SharedMemory("/common").size == 5000
        made.close()
        os.write(tell, b".")

    children = {}
    for number in range(count):
        with Tell() as told:
            child = forked(work, random.choice([*MAKERS]), number, told)
            child.wait_ready()
            children[told.receive()] = child
    killed = set(random.sample(sorted(children), count // 2))
    living = children.keys() - killed
    stopped = random.sample(sorted(living), count // 10)
    for ident in stopped:
        children[ident].kill(signal.SIGSTOP)
    for ident in killed:
        children[ident].kill()
    for ident in killed:
        assert children[ident].wait() == -signal.SIGKILL
    common.close()

    assert {obj.id for obj in inventory.objects() if obj.verdict == "orphan"} == killed
    assert ids(inventory.collect(dry_run=True)) == killed
    assert ids(inventory.collect()) == killed
    assert ids(inventory.collect()) == set()
    now = {obj.id: obj for obj in inventory.objects()}
    assert living | {common.id} <= now.keys()
    assert not killed & now.keys()
    assert {now[ident].verdict for ident in living} == {"live"}
    assert (now[common.id].verdict, now[common.id].users) == ("live", count - len(killed))

    for ident in stopped:
        children[ident].kill(signal.SIGCONT)
    os.write(gun, b"x" * count)
    assert [children[ident].wait() for ident in living] == [0] * len(living)
    assert len(os.read(fine, count)) == len(living)
    for end in (go, gun, fine, tell):
        os.close(end)
