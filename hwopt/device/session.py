"""A TVM session over a link."""

from __future__ import annotations

import contextlib
import ctypes
import gc
import os
import signal
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil

from hwopt.device.link import Address, open_session
from hwopt.errors import DeviceError

PUMP = Path(__file__).with_name("pump.py")
DIE_WITH_PARENT = 1  # PR_SET_PDEATHSIG


@contextlib.contextmanager
def remote(address: Address, seconds: int) -> Iterator[Any]:
    """TVM's session object; raises DeviceError."""
    from tvm.rpc import _ffi_api, client

    link = open_session(address, seconds)
    before = _children()
    try:
        os.set_inheritable(link.fileno(), True)
        pipes = _ffi_api.CreatePipeClient(sys.executable, "-I", "-S", str(PUMP), str(link.fileno()))
        session = client.RPCSession(pipes)
        session.pumps = tuple(_children() - before)
    except RuntimeError as error:
        raise DeviceError(f"does not begin a session: {first_line(error)}", place=str(address)) from error
    finally:
        link.close()
    try:
        yield session
    finally:
        del session
        gc.collect()  # TVM ends the session when its last reference goes


def _children() -> frozenset[int]:
    """The pumps that this process has started."""
    found = set()
    for one in psutil.Process().children():
        with contextlib.suppress(psutil.Error):
            if str(PUMP) in one.cmdline():
                found.add(one.pid)
    return frozenset(found)


def pump_of(session: Any) -> int:
    """The process between TVM's client and the device."""
    (pump,) = session.pumps
    return int(pump)


def first_line(error: BaseException) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[-1][:300] if lines else type(error).__name__


def die_with_parent() -> None:
    """Ask Linux for the end of this process when its parent ends, also by kill -9."""
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL(None).prctl(DIE_WITH_PARENT, signal.SIGKILL)
