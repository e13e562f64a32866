"""Other processes, run to their end."""

from __future__ import annotations

import subprocess
from collections.abc import Sequence
from typing import Any


def ended(command: Sequence[Any], **options: Any) -> subprocess.CompletedProcess[str]:
    """A process that has ended, with all that it printed."""
    return subprocess.run(command, capture_output=True, text=True, check=False, **options)


def succeeded(command: Sequence[Any], **options: Any) -> subprocess.CompletedProcess[str]:
    """A process that has ended with the code 0."""
    done = ended(command, **options)
    assert done.returncode == 0, done.stdout + done.stderr
    return done
