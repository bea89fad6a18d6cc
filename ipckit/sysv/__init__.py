# SPDX-License-Identifier: MIT
"""System V message queues, shared memory and semaphores. See sysvipc(7)."""
