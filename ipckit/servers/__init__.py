# SPDX-License-Identifier: MIT
"""Runnable servers, one file per model, and the split client."""
