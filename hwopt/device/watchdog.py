"""An end for what TVM's client waits for without one: a device that hangs, or that is away.

TVM's calls return when the other end of their pipes is closed. The process that pumps bytes between TVM and the device is ours:
ended, it takes the session with it, here at once and on the device when the daemon notices.
"""

from __future__ import annotations

import contextlib
import threading
from types import TracebackType
from typing import Any

import psutil

from hwopt.device.session import first_line, pump_of
from hwopt.errors import DeviceError


class Watchdog:
    """A context manager around calls of a session. `feed` says that it gets on; `hang` seconds without that end the session.

    Errors of TVM inside of it become DeviceErrors, which say whether the device hung.
    """

    def __init__(self, session: Any, hang: float, place: str) -> None:
        self.hang, self.place = hang, place
        self._pump = pump_of(session)
        self._fed, self._over = threading.Event(), threading.Event()
        self._bitten = False
        self._thread = threading.Thread(target=self._watch, daemon=True)

    def feed(self) -> None:
        self._fed.set()

    def _watch(self) -> None:
        while not self._over.is_set():
            if self._fed.wait(self.hang):
                self._fed.clear()
                continue
            self._bitten = not self._over.is_set()
            if self._bitten:
                with contextlib.suppress(psutil.Error):
                    psutil.Process(self._pump).kill()
            return

    def __enter__(self) -> Watchdog:
        self._thread.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None) -> None:
        self._over.set()
        self._fed.set()
        self._thread.join()
        if self._bitten:
            hint = "it hangs, or is away; its daemon ends the session"
            raise DeviceError(f"no answer within {self.hang:g} s", place=self.place, hint=hint) from error
        if isinstance(error, (RuntimeError, AttributeError)):  # TVM's
            raise DeviceError(f"the run ended: {first_line(error)}", place=self.place) from error
