"""Everything is declared in pyproject.toml; only the C build needs code."""

from setuptools import setup

setup(cffi_modules=["csrc/build.py:ffi"])
