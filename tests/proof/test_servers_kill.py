"""Every server under load, its processes killed and itself stopped: nothing lost, nothing left.

By default a slice of each proof; the whole with IPCKIT_PROOF=1 (``make proof-server``).
"""

import contextlib
import os
import random
import signal
import time
from collections import Counter

import procfs
import pytest
from conftest import eventually
from fire import WHOLE, check_log, client_under_fire, client_until_closed, slice_of
from serving import Served, name_of, wait_gone

from ipckit.servers import MODELS

pytestmark = [pytest.mark.proof, *([pytest.mark.timeout(3000)] if WHOLE else [])]

KILLS = slice_of(10_000, 500) // len(MODELS)
STORM = slice_of(450, 40)
STOPS = max(slice_of(1000, 24) // len(MODELS), 2)


@pytest.mark.parametrize("model", MODELS)
def test_kill_9_of_children_and_logger(model, tmp_path, forked):
    chance = random.Random(4)
    total = Counter()
    while total["workers"] + total["loggers"] < KILLS:
        total += Counter(kill_a_hundred(model, tmp_path, forked, chance))
    # Idle ones were killed too, and some in the moment before their client came.
    assert total["cut"] or not total["workers"], "the kills hit nobody"
    print(f"\n{model}: {total['workers']} workers and {total['loggers']} loggers killed under load: {total['connections']} "
          f"connections, {total['cut']} of them cut, {total['echoed']:,} bytes echoed, all of them in the log once")  # fmt: skip


def kill_a_hundred(model, folder, forked, chance):
    """What was killed, and what came of it; the files of all kills together would fill the disk."""
    log, stop, notes = folder / "log", folder / "stop", [folder / f"notes{n}" for n in range(8)]
    with Served(log, "--format", "record", model=model) as server:
        clients = [forked(client_under_fire, server.address, n, notes[n], stop) for n in range(8)]
        for client in clients:
            client.wait_ready()
        killed = kill_in_turn(server, chance, min(100, KILLS))
        stop.touch()
        assert [client.wait() for client in clients] == [0] * len(clients)
        code, printed = server.stop()
    assert code == 0, printed
    connections, cut, echoed = check_log(log, notes)
    for path in (log, stop, *notes):
        path.unlink()
    return killed | {"connections": connections, "cut": cut, "echoed": echoed}


def kill_in_turn(server, chance, count):
    """Kill so many children of the server, every other one its logger; how many of which."""
    killed = {"loggers": 0, "workers": 0}
    while sum(killed.values()) < count:
        time.sleep(chance.random() * 0.03)  # a log gives up when its loggers die 100 times in a second
        logger = server.wait_logger()
        workers = [pid for pid in server.children()[0] if pid != logger]
        victim = chance.choice(workers) if workers and chance.random() < 0.5 else logger
        with contextlib.suppress(ProcessLookupError):  # it ended between the look and the kill
            os.kill(victim, signal.SIGKILL)
            killed["loggers" if victim == logger else "workers"] += 1
    return killed


@pytest.mark.parametrize("model", MODELS)
def test_a_storm_of_kills_and_stops_and_rotations(model, tmp_path, forked):
    """Workers, loggers and the spawner are killed and stopped, and the log is renamed, all under load."""
    log, stop, notes = tmp_path / "log", tmp_path / "stop", [tmp_path / f"notes{n}" for n in range(6)]
    with Served(log, "--format", "record", model=model) as server:
        clients = [forked(client_under_fire, server.address, n, notes[n], stop) for n in range(6)]
        for client in clients:
            client.wait_ready()
        hit, rotated = storm(server, random.Random(7))
        stop.touch()
        wake_until(server, lambda: all(procfs.state(client.pid) == "Z" for client in clients))
        assert [client.wait() for client in clients] == [0] * len(clients)
        code, printed = server.stop()
    assert code == 0, printed
    parts = [*rotated, log]
    whole = tmp_path / "whole"
    whole.write_bytes(b"".join(part.read_bytes() for part in parts if part.exists()))
    connections, cut, echoed = check_log(whole, notes)
    assert hit["ipckit-logger"]
    if model in ("fork", "prefork"):
        assert hit["ipckit-spawner"]
    print(f"\n{model}: {sum(hit.values())} kills and stops ({dict(hit)}), {len(rotated)} rotations: {connections} connections, "
          f"{cut} cut, {echoed:,} bytes echoed: lost 0, doubled 0")  # fmt: skip


def storm(server, chance):
    """What was hit, by its name, and the files that the log was renamed to."""
    hit, rotated = Counter(), []
    while sum(hit.values()) < STORM:
        names = {pid: name_of(pid) for pid in server.everybody()}
        kind = chance.choice(sorted(set(names.values()))) if names else None
        if victims := [pid for pid, name in names.items() if name == kind]:
            with contextlib.suppress(ProcessLookupError):
                os.kill(chance.choice(victims), chance.choice([signal.SIGKILL] * 3 + [signal.SIGSTOP]))
                hit[kind] += 1
        for pid in names:
            if chance.random() < 0.5:
                wake(pid)
        if chance.random() < 0.1 and server.path.exists():
            rotated.append(server.path.with_name(f"log.{len(rotated)}"))
            server.path.rename(rotated[-1])
            os.kill(server.pid, signal.SIGHUP)
        time.sleep(chance.random() * 0.03)  # a log gives up when its loggers die 100 times in a second
    return hit, rotated


def wake(pid):
    with contextlib.suppress(ProcessLookupError):
        os.kill(pid, signal.SIGCONT)


def wake_until(server, condition):
    """Until it holds, let none of the server's children stand still."""

    def woken():
        for pid in server.everybody():
            wake(pid)
        return condition()

    eventually(woken)


@pytest.mark.parametrize("model", MODELS)
def test_sigterm_under_load(model, tmp_path, forked):
    chance = random.Random(5)
    slowest = 0.0
    for number in range(STOPS):
        log = tmp_path / f"log{number}"
        notes = [tmp_path / f"notes{number}.{n}" for n in range(4)]
        with Served(log, "--format", "record", model=model) as server:
            clients = [forked(client_until_closed, server.address, n, notes[n]) for n in range(4)]
            for client in clients:
                client.wait_ready()
            time.sleep(chance.random() * 0.2)
            children = server.children()[0]
            start = time.monotonic()
            code, printed = server.stop(chance.choice([signal.SIGTERM, signal.SIGINT]))  # has no deadline
            slowest = max(slowest, time.monotonic() - start)
            assert code == 0, printed
            wait_gone(children)
            assert [client.wait() for client in clients] == [0] * 4
        check_log(log, notes)
    print(f"\n{model}: {STOPS} stops under load: exit status 0 each time, the slowest took {slowest:.3f} s")
