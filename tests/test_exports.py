import importlib
import importlib.metadata
import pkgutil
import subprocess
import sys

import pytest

import ipckit

# Too general a name at the top, or of use to those only who know the room: found in the room.
IN_THE_ROOM = {
    "memory": {
        "Mapping",
        "Views",
        "allocate",
        "check_file",
        "check_name",
        "check_regular",
        "fault_in",
        "look_at",
        "naming",
        "open_seen",
        "unlink_file",
        "unnamed",
    },
    "pipes": {"Duplex", "DuplexStats", "Reader", "Stats", "Writer"},
    "process": {"made_by"},
    "queues": {"Codec", "Participant"},
    "ring": {"Ends", "memory_size"},
    "errors": {"check"},
}
BY_MODULE = {"endpoints", "inventory", "limits", "load", "registry", "sockets", "wait"}


def rooms():
    return [
        importlib.import_module(f"ipckit.{module.name}")
        for module in pkgutil.iter_modules(ipckit.__path__)
        if not module.ispkg and not module.name.startswith("_")
    ]


def test_what_the_rooms_offer_is_at_the_top_and_nothing_else():
    offered = set()
    for room in rooms():
        name = room.__name__.removeprefix("ipckit.")
        assert room.__all__, name
        assert all(hasattr(room, item) for item in room.__all__)
        if name not in BY_MODULE:
            offered |= set(room.__all__) - IN_THE_ROOM.get(name, set())
    modules = {name for name in vars(ipckit) if type(vars(ipckit)[name]) is type(ipckit)}
    assert {name for name in vars(ipckit) if not name.startswith("_")} - modules == offered


def test_the_map_names_every_room():
    described = {line.split()[0] for line in ipckit.__doc__.splitlines() if line.startswith("    ")}
    assert {room.__name__.removeprefix("ipckit.") for room in rooms()} <= described


def test_every_room_is_an_attribute_of_the_package():
    """In a process of its own: here some test has imported them all."""
    asked = """
import ipckit, pkgutil
for room in pkgutil.iter_modules(ipckit.__path__):
    if not room.name.startswith("_"):
        print(room.name, type(getattr(ipckit, room.name)).__name__, room.name in dir(ipckit))
"""
    ran = subprocess.run([sys.executable, "-c", asked], capture_output=True, text=True)
    assert (ran.returncode, ran.stderr) == (0, "")
    found = dict(line.split(maxsplit=1) for line in ran.stdout.splitlines())
    assert found.pop("channel") == "function True"  # the room is reached by from ipckit.channel import ...
    assert len(found) > 20
    assert set(found.values()) == {"module True"}


def test_what_few_programs_need_is_imported_when_it_is_asked_for():
    asked = """
import ipckit, sys
print(*({f"ipckit.{room}" for room in ipckit._LATER} | {"posix_ipc"}) & sys.modules.keys())
"""
    ran = subprocess.run([sys.executable, "-c", asked], capture_output=True, text=True)
    assert (ran.returncode, ran.stdout, ran.stderr) == (0, "\n", "")


def test_a_name_that_is_not_there_is_an_attribute_error_that_names_it():
    with pytest.raises(AttributeError, match="module 'ipckit' has no attribute 'quues'"):
        _ = ipckit.quues
    with pytest.raises(ImportError, match="cannot import name 'Quue' from 'ipckit'"):
        from ipckit import Quue  # noqa: F401


def test_the_version_is_that_of_the_distribution():
    installed = importlib.metadata.version("ipckit-unix")
    assert ipckit.__version__ == installed, "ipckit/__init__.py has another one: touch pyproject.toml, make"


def test_without_posix_ipc_only_its_room_is_missing():
    """As where that package could not be built."""
    text = """if 1:
        import sys
        sys.modules["posix_ipc"] = None
        import ipckit
        with ipckit.SharedMemory(100): pass
        print([obj for obj in ipckit.inventory.objects() if obj.kind == "nonsense"])
        try: ipckit.posix
        except ImportError as error: print(error.name)
    """
    done = subprocess.run([sys.executable, "-c", text], stdout=subprocess.PIPE, text=True, check=True)
    assert done.stdout == "[]\nposix_ipc\n"
