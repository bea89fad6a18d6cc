import importlib
import pkgutil

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
        "unnamed",
    },
    "pipes": {"Duplex", "DuplexStats", "Reader", "Stats", "Writer"},
    "process": {"NativeMemory"},
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
