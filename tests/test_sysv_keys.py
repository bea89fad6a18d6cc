import errno
import os
from functools import partial
from pathlib import Path

import pytest
import sysv_ipc
from making import unshare

from ipckit.sysv import MessageQueue, Semaphore, SharedMemory
from ipckit.sysv.keys import ftok, key_of, shown


@pytest.mark.parametrize("project", [1, ord("R"), 127, 128, 255])
def test_ftok_is_what_c_gives(tmp_path, project):
    assert ftok(tmp_path, project) == sysv_ipc.ftok(str(tmp_path), project, True)
    assert ftok(os.fsencode(tmp_path), project) == key_of((tmp_path, project))


@pytest.mark.parametrize("project", [0, -1, 256, 1 << 20])
def test_a_project_that_ftok_would_cut_is_refused(tmp_path, project):
    with pytest.raises(ValueError, match=f"from 1 to 255, not {project}"):
        ftok(tmp_path, project)


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match="nowhere") as caught:
        key_of((tmp_path / "nowhere", 1))
    assert caught.value.errno == errno.ENOENT


def test_numbers_signed_and_unsigned_are_one_key():
    assert key_of(0x80000001) == key_of(-0x7FFFFFFF) == -0x7FFFFFFF
    assert key_of(0x1234) == 0x1234
    assert shown(-0x7FFFFFFF) == "key 0x80000001"
    assert shown(0x1234) == "key 0x00001234"


def test_none_is_a_private_object():
    assert key_of(None) == 0
    assert shown(0) == "private"


@pytest.mark.parametrize("key", [0, 1 << 32, -(1 << 31) - 1])
def test_a_number_that_is_no_key(key):
    with pytest.raises(ValueError, match=f"not {key}$"):
        key_of(key)


@pytest.mark.parametrize("key", ["/jobs", 1.5, b"x"])
def test_what_is_no_key_at_all(key):
    with pytest.raises(TypeError, match=f"not {key!r}"):
        key_of(key)


@pytest.mark.parametrize("make", [MessageQueue, partial(SharedMemory, size=10), Semaphore])
def test_an_owner_that_the_user_namespace_lacks_is_not_taken_for_a_removed_object(make, forked):
    def inside(ready):
        user, group = os.geteuid(), os.getegid()
        try:
            unshare(0x10000000)
        except OSError:
            os._exit(77)
        Path("/proc/self/setgroups").write_text("deny")
        Path("/proc/self/uid_map").write_text(f"{user} {user} 1")
        Path("/proc/self/gid_map").write_text(f"{group} {group} 1")
        made = make()
        for owner in ({"uid": user + 12}, {"gid": group + 12}):
            with pytest.raises(OSError, match=r"of this user namespace.*System V .* \(private\)") as caught:
                made.set(**owner)
            assert caught.value.errno == errno.EINVAL
        made.set(mode=0o640, uid=user, gid=group)
        assert (made.stat().uid, made.stat().mode) == (user, 0o640)
        made.remove()
        made.close()

    if (status := forked(inside).wait()) == 77:
        pytest.skip("no user namespace to be had")
    assert status == 0
