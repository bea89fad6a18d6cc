"""Every server under load, its processes killed and itself stopped: nothing lost, nothing left.

By default a slice of each proof; the whole with IPCKIT_PROOF=1 (``make proof-server``).
"""

import contextlib
import os
import random
import signal
import time
from collections import Counter

import pytest
from fire import WHOLE, check_log, client_under_fire, client_until_closed, slice_of
from serving import Served, wait_gone

from ipckit.servers import MODELS

pytestmark = [pytest.mark.proof, *([pytest.mark.timeout(3000)] if WHOLE else [])]

KILLS = slice_of(10_000, 500) // len(MODELS)
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
