"""Seeded faults in the engine, each of which a named test must catch within a minute.

    python tests/proof/mutants.py [name ...]

Each mutant is one replacement in a copy of the tree; what catches it is a command of that copy. A
mutant whose text is not found exactly once is an error: then this table is not true any more.
"""

import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).parents[2]
SECONDS = 60


class Mutant(NamedTuple):
    name: str
    file: str
    old: str
    new: str
    caught_by: str


RING, LOCK, WAIT = "csrc/ring.c", "csrc/lock.c", "csrc/wait.c"
UNIT = "build/tests/test_ring"
STEP = "build/proof/stepkill -e"
LOOP = "build/proof/killloop -k 1500"
MODEL = "make model"
NEEDS = {MODEL: "spin"}

MUTANTS = [
    Mutant("lock not robust", LOCK, "PTHREAD_MUTEX_ROBUST)", "PTHREAD_MUTEX_STALLED)", f"{STEP} 3 lock,"),
    Mutant(
        "forget consistent()",
        LOCK,
        "pthread_mutex_consistent(&lock->mutex);",
        "(void)lock;",
        f"{STEP} 23 repair",
    ),
    Mutant("a death is not told", LOCK, "return 1;\n", "return 0;\n", f"{UNIT} death"),
    Mutant(
        "commit before the copy",
        RING,
        "        memcpy(room, data, len);\n        ik_ring_stage(ring, len);\n"
        "        ik_ring_commit(ring, IK_RING_SEND);\n",
        "        ik_ring_stage(ring, len);\n        ik_ring_commit(ring, IK_RING_SEND);\n"
        "        memcpy(room, data, len);\n",
        f"{STEP} 3 with",
    ),
    Mutant(
        "a commit wakes nobody",
        RING,
        "    if (__atomic_load_n(&own->waiting, __ATOMIC_RELAXED))\n        wake(",
        "    if (0)\n        wake(",
        f"{UNIT} woken",
    ),
    Mutant(
        "wake before commit",
        "tests/proof/ring.pml",
        "        commit(SEND);\n        MAY_DIE(SEND);\n        wake_other(SEND);\n",
        "        wake_other(SEND);\n        MAY_DIE(SEND);\n        commit(SEND);\n",
        MODEL,
    ),
    Mutant(
        "the futex waits for ever",
        WAIT,
        "FUTEX_WAIT, seen, &time,",
        "FUTEX_WAIT, seen, deadline_ns < 0 || left > IK_SLICE ? NULL : &time,",
        f"{STEP} 3 with",
    ),
    Mutant(
        "released before it was read",
        RING,
        "        memcpy(buffer, data, len);\n        ik_ring_step(ring, len);\n"
        "        ik_ring_commit(ring, IK_RING_RECV);\n",
        "        ik_ring_step(ring, len);\n        ik_ring_commit(ring, IK_RING_RECV);\n"
        "        memcpy(buffer, data, len);\n",
        f"{UNIT} threads_take_turns",
    ),
    Mutant(
        "the index stored relaxed",
        RING,
        "__atomic_store_n(&own->index, end->at, __ATOMIC_RELEASE)",
        "__atomic_store_n(&own->index, end->at, __ATOMIC_RELAXED)",
        "make tsan",
    ),
    Mutant(
        "the index loaded relaxed",
        RING,
        "uint64_t tail = __atomic_load_n(&ring->shared->lines[IK_RING_SEND].index, __ATOMIC_ACQUIRE);\n    if",
        "uint64_t tail = __atomic_load_n(&ring->shared->lines[IK_RING_SEND].index, __ATOMIC_RELAXED);\n    if",
        "make tsan",
    ),
    Mutant(
        "magic first",
        RING,
        "    shared->capacity = capacity;\n",
        "    shared->magic = MAGIC;\n",
        f"{STEP} 3 create",
    ),
    Mutant(
        "no check of the capacity",
        RING,
        "(capacity & (capacity - 1)) == 0 && ",
        "",
        f"{UNIT} attaching_checks",
    ),
    Mutant(
        "no bound of a record",
        RING,
        "    if (size > end->seen - end->at || size > ring->capacity - offset)\n        return -EBADMSG;\n",
        "",
        f"{UNIT} spoilt_records",
    ),
    Mutant(
        "any distance is believed",
        RING,
        "if (end->seen - end->at - 1 < ring->capacity)",
        "if ((int64_t)(end->seen - end->at) > 0)",
        f"{UNIT} a_spoilt_index",
    ),
    Mutant(
        "a gap of any size",
        RING,
        "if (kind == GAP && size != ring->capacity - offset)",
        "if (0)",
        f"{UNIT} spoilt",
    ),
    Mutant(
        "a length read twice",
        RING,
        "    *ret_len = len;\n    *ret_id =",
        "    *ret_len = load((const uint64_t *)(ring->data + offset)) & (((uint64_t)1 << LENGTH_BITS) - 1);\n"
        "    *ret_id =",
        "build/proof/stepspoil",
    ),
    Mutant(
        "a piece longer than the buffer",
        RING,
        "total != len || size - extra != piece || (kind == LAST) != (piece == left)",
        "total != len",
        f"{UNIT} spoilt_records",
    ),
    Mutant(
        "room reserved unseen",
        RING,
        "    if (room) {\n",
        "    {\n",
        f"{UNIT} the_end_may_be_shut",
    ),
    Mutant(
        "staged before is not counted",
        RING,
        "staged++;\n    if (taken",
        "staged = 1;\n    if (taken",
        f"{UNIT} staged",
    ),
    Mutant(
        "a receiver's death loses a long message",
        RING,
        "    if (change_stream(ring, progress->stream, SENDING, IDLE))\n        return 0;\n",
        "    change_stream(ring, progress->stream, SENDING, IDLE);\n    return 0;\n",
        LOOP,
    ),
    Mutant(
        "what a dead receiver had begun is skipped",
        RING,
        "    rewind_stream(ring, id);\n",
        "    (void)id;\n",
        LOOP,
    ),
    Mutant(
        "who receives is not told that the sender left",
        RING,
        "    if (state_of(stream) != IDLE)\n        __atomic_store_n(stream_of",
        "    if (0)\n        __atomic_store_n(stream_of",
        f"{UNIT} gives_up",
    ),
    Mutant(
        "the slice of ever is a time-out",
        WAIT,
        "deadline_ns == IK_FOREVER ? INT64_MAX",
        "deadline_ns == IK_FOREVER ? slice_ns",
        f"{UNIT} gives_up",
    ),
    Mutant(
        "the limit of messages is off by one",
        RING,
        "received < ring->max_messages",
        "received <= ring->max_messages",
        f"{UNIT} limited",
    ),
    Mutant(
        "a sleeper's announcement is lost",
        "tests/proof/ring.pml",
        ":: waiting[1 - side] -> sleepers",
        ":: true -> sleepers",
        MODEL,
    ),
    Mutant(
        "a fork waits for the parent's thread",
        RING,
        "found == 0 || is_left_behind(found)",
        "found == 0",
        f"{UNIT} of_the_parent",
    ),
]


def copy_of_tree(folder: str) -> Path:
    tree = Path(folder) / "tree"
    skip = shutil.ignore_patterns(".git", ".venv*", "build", "*.so", "__pycache__", "docs", ".*_cache")
    shutil.copytree(ROOT, tree, ignore=skip)
    return tree


def mutate(tree: Path, mutant: Mutant) -> None:
    path = tree / mutant.file
    text = path.read_text()
    if text.count(mutant.old) != 1:
        sys.exit(f"mutant '{mutant.name}': its text is {text.count(mutant.old)} times in {mutant.file}")
    path.write_text(text.replace(mutant.old, mutant.new))


def run(tree: Path, command: str) -> int | None:
    """The status, or None if it was still running after a minute."""
    quiet = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
    process = subprocess.Popen(command.split(), cwd=tree, start_new_session=True, **quiet)
    try:
        return process.wait(SECONDS)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, 9)  # its own session: what the test started goes too
        process.wait()
        return None


def build(tree: Path, command: str) -> None:
    program = command.split(maxsplit=1)[0]
    if program != "make":
        subprocess.run(
            ["make", "-s", "SANITIZE=-Wno-error", program], cwd=tree, check=True, capture_output=True
        )


def is_caught(tree: Path, mutant: Mutant) -> bool:
    original = (tree / mutant.file).read_text()
    mutate(tree, mutant)
    try:
        build(tree, mutant.caught_by)
        return run(tree, mutant.caught_by) != 0
    finally:
        (tree / mutant.file).write_text(original)


def main() -> None:
    chosen = [mutant for mutant in MUTANTS if not sys.argv[1:] or mutant.name in sys.argv[1:]]
    for mutant in [mutant for mutant in chosen if not shutil.which(NEEDS.get(mutant.caught_by, "make"))]:
        print(f"skipped, no {NEEDS[mutant.caught_by]}: {mutant.name}")
        chosen.remove(mutant)
    caught = 0
    with tempfile.TemporaryDirectory() as folder:
        tree = copy_of_tree(folder)
        for command in sorted({mutant.caught_by for mutant in chosen}):
            build(tree, command)  # else a test that is slow or broken would catch everything
            assert run(tree, command) == 0, f"without any mutant, {command} fails or takes over {SECONDS} s"
        for mutant in chosen:
            found = is_caught(tree, mutant)
            caught += found
            print(f"{'caught' if found else 'LIVES'}: {mutant.name} ({mutant.caught_by})", flush=True)
    print(f"mutants: caught {caught} of {len(chosen)}")
    sys.exit(caught != len(chosen))


if __name__ == "__main__":
    main()
