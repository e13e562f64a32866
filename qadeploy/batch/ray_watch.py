"""Detects that Ray has ended. Ray would kill the driver process some 15 seconds later, without a message."""

from __future__ import annotations

import contextlib
import logging
import os
import socket
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from qadeploy.errors import FailureError

_LOOK = 0.5  # seconds between checks whether Ray still runs
_PATIENCE = 8  # seconds for the block to end once one of Ray's processes has ended
_UNHEARD = 30  # seconds without a connection to the GCS, which a cluster may restart
_RAY_ENDED = (
    "Ray has ended: its process {} was killed or crashed (is there enough memory?); finished parts are kept, and the same "
    "command continues from there"
)


@contextmanager
def watched(ray: Any) -> Iterator[None]:
    """Shuts Ray down, and raises FailureError, if a process that Ray needs ends during the block.

    Ray itself would wait in vain and kill this process after some 15 seconds, without a message. If the block does not end
    before that, this function reports why and ends the process.
    """
    from ray._private import auto_init_hook

    over, lost, health = threading.Event(), "", _Health(ray)

    def watch() -> None:
        nonlocal lost
        while not over.wait(_LOOK):
            if lost := health.ended():
                last.start()
                auto_init_hook.enable_auto_connect = False  # or Ray Data would start another Ray, open to the network
                logging.getLogger("ray.data").setLevel(logging.CRITICAL + 1)
                ray.shutdown()  # calls in the block that wait for Ray now fail
                return

    def give_up() -> None:
        sys.stderr.write(f"Error: {_RAY_ENDED.format(lost)}\n")
        sys.stderr.flush()
        os._exit(1)

    connects = auto_init_hook.enable_auto_connect
    watcher = threading.Thread(target=watch, name="qadeploy-ray-watch", daemon=True)
    last = threading.Timer(_PATIENCE, give_up)
    last.daemon = True
    watcher.start()
    try:
        yield
    except Exception as error:
        if ended := lost or health.ended():
            raise FailureError(_RAY_ENDED.format(ended)) from error
        raise
    finally:
        over.set()
        watcher.join()
        last.cancel()
        health.close()
        auto_init_hook.enable_auto_connect = connects


class _Health:
    """Checks the processes that Ray cannot work without: its raylet on this machine, and the GCS.

    In a local Ray they are children of this process. In a cluster that was joined they are not, but they accept connections.
    """

    def __init__(self, ray: Any) -> None:
        node = ray._private.worker._global_node
        self._own = node.all_processes if node else {}
        self._raylet: socket.socket | None = None
        self._gcs = ""
        self._heard = time.monotonic()
        if node and not self._own:
            self._gcs = node.gcs_address
            self._raylet = _connected(node.raylet_socket_name)

    def ended(self) -> str:
        """The name of a process that has ended; empty if none has."""
        for name in ("raylet", "gcs_server"):
            if any(each.process.poll() is not None for each in self._own.get(name, ())):
                return name
        if self._raylet and _is_cut(self._raylet):
            return "raylet"
        if self._gcs and not self._answers():
            return f"gcs_server at {self._gcs}"
        return ""

    def close(self) -> None:
        """Closes the connection to the raylet."""
        if self._raylet:
            self._raylet.close()

    def _answers(self) -> bool:
        host, _, port = self._gcs.rpartition(":")
        with contextlib.suppress(OSError):
            socket.create_connection((host.strip("[]"), int(port)), timeout=_LOOK).close()
            self._heard = time.monotonic()
        return time.monotonic() - self._heard < _UNHEARD


def _connected(path: str) -> socket.socket | None:
    connection = socket.socket(socket.AF_UNIX)
    try:
        connection.connect(path)
    except OSError:  # not on this machine, or not for this user
        connection.close()
        return None
    connection.setblocking(False)
    return connection


def _is_cut(connection: socket.socket) -> bool:
    """Whether the other end has closed the connection, as the system does when a process ends."""
    try:
        return not connection.recv(1)
    except BlockingIOError:
        return False
    except OSError:
        return True
