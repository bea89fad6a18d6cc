"""Everything is declared in pyproject.toml; only the C build needs code."""

import os
from glob import glob

from setuptools import Extension, setup

ROOMS = ["lean", "lock", "posix", "process", "queues", "ring", "sync", "wait"]

hot = Extension(
    "ipckit._hot",
    sorted(glob("csrc/hot*.c")) + [f"csrc/{room}.c" for room in ROOMS],
    depends=["csrc/hot.h"] + [f"csrc/{room}.h" for room in ROOMS],
    include_dirs=["csrc"],
    define_macros=[("_GNU_SOURCE", None)],
    extra_compile_args=["-std=gnu11", "-O2", "-Wall", "-Wextra"]
    + (["-Werror"] if os.environ.get("IPCKIT_WERROR") else []),
    extra_link_args=["-pthread"],
)
setup(cffi_modules=["csrc/build.py:ffi"], ext_modules=[hot])
