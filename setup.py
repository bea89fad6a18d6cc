"""Everything is declared in pyproject.toml; only the C build needs code."""

import os

from setuptools import Extension, setup

hot = Extension(
    "ipckit._hot",
    ["csrc/hot.c", "csrc/posix.c", "csrc/wait.c"],
    depends=["csrc/posix.h", "csrc/wait.h"],
    include_dirs=["csrc"],
    define_macros=[("_GNU_SOURCE", None)],
    extra_compile_args=["-std=gnu11", "-O2", "-Wall", "-Wextra"]
    + (["-Werror"] if os.environ.get("IPCKIT_WERROR") else []),
    py_limited_api=True,
)
setup(cffi_modules=["csrc/build.py:ffi"], ext_modules=[hot])
