"""Everything is declared in pyproject.toml; only the C build needs code."""

import os
from glob import glob

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

PROGRAM = [
    "connection",
    "messagelog",
    "messagelog_logger",
    "prefork",
    "process",
    "sockets",
    "spawner",
    "spawner_main",
    "wait",
]
ROOMS = ["lock", "posix", "process", "queues", "ring", "sync", "wait"]

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


class BuildAll(build_ext):
    """The extension modules, and the program that makes children which run C only (csrc/spawner_main.c)."""

    def run(self):
        super().run()
        native = next(extension for extension in self.extensions if extension.name == "ipckit._native")
        objects = self.compiler.compile(
            [f"csrc/{room}.c" for room in PROGRAM],
            output_dir=os.path.join(self.build_temp, "spawner"),
            macros=native.define_macros,
            include_dirs=native.include_dirs,
            extra_preargs=native.extra_compile_args,
            depends=native.depends,
        )
        folder = "ipckit" if self.inplace else os.path.join(self.build_lib, "ipckit")
        self.compiler.link_executable(
            objects, "ipckit-spawner", output_dir=folder, extra_preargs=["-pthread"]
        )


setup(cffi_modules=["csrc/build.py:ffi"], ext_modules=[hot], cmdclass={"build_ext": BuildAll})
