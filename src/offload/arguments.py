"""Checks the script's arguments before DeepSpeed's launcher takes seconds to start it: `... ARGUMENTS`; exits with 2.

In a process of its own: the supervisor imports nothing of this before it forks.
"""

import sys

from src.cli import command_line
from src.offload_config import CPU_DEFAULTS, OffloadConfig

if __name__ == "__main__":
    command_line(None, OffloadConfig(), CPU_DEFAULTS)
    sys.exit()
