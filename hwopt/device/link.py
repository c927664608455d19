"""Connections to a device: addresses, the secret, TVM's handshake and its tracker. Nothing here waits without an end.

TVM's own client blocks for ever where no server has the key, where a server died after it was handed out, and where a port
answers nothing; so all of that is done here, and TVM gets a connection that is ready.
"""

from __future__ import annotations

import hashlib
import hmac
import json
import os
import socket
import struct
import time
from collections.abc import Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hwopt.emit import cpu
from hwopt.errors import DeviceError, UsageError

SESSION, MISMATCH, QUESTION, TRACKER = 0xFF271, 0xFF273, 0x71B2A5, 0x2F271  # what a connection begins with
PROOF = b"hwopt-auth-1\n"
REQUEST, SUMMARY = 4, 6  # TVM's TrackerCode.REQUEST and SUMMARY
KEY, PORT = "hwopt", 9190
CONNECT_SECONDS = 10.0
QUEUE_SECONDS = 120.0  # until the sessions of others are over
LONGEST = 1 << 20


@dataclass(frozen=True)
class Address:
    """Where a device's daemon listens, and what it takes to talk to it."""

    host: str
    port: int
    key: str = KEY
    secret: bytes = b""

    def __str__(self) -> str:
        return f"{self.host}:{self.port}"


def parse_address(text: str, key: str = KEY, secret: bytes = b"") -> Address:
    """`host:port`, `host`, or `:port` of this machine."""
    host, colon, port = text.rpartition(":")
    if not colon:
        host, port = text, str(PORT)
    if not port.isdigit() or not 0 < int(port) < 65536:
        raise UsageError("is no address", place=text, hint="write host:port, as 192.168.1.7:9190")
    return Address(host.strip("[]") or "127.0.0.1", int(port), key, secret)


def read_secret(file: Path | str | None) -> bytes:
    """The first line of a file; b"" without one."""
    if file is None:
        return b""
    try:
        secret = Path(file).read_bytes().partition(b"\n")[0]
    except OSError as error:
        raise UsageError(f"cannot be read: {error.strerror}", place=str(file)) from error
    if len(secret) < 16:
        raise UsageError("the secret is shorter than 16 characters", place=str(file), hint="openssl rand -hex 32 makes one")
    return secret


@contextmanager
def _place(where: object):  # type: ignore[no-untyped-def]
    """Whatever goes wrong with a socket, said with the device's name."""
    try:
        yield
    except TimeoutError as error:
        raise DeviceError("does not answer", place=str(where)) from error
    except OSError as error:
        raise DeviceError(f"cannot be reached: {error.strerror or error}", place=str(where)) from error
    except (ValueError, struct.error) as error:
        raise DeviceError(f"answers what makes no sense: {error}", place=str(where)) from error


def open_session(address: Address, seconds: int, wait: float = QUEUE_SECONDS) -> socket.socket:
    """A connection on which TVM's protocol goes on, for a session of at most `seconds`; raises DeviceError."""
    with _place(address):
        made = _connect(address)
        _send(made, SESSION, f"client:{address.key} -timeout={seconds}")
        made.settimeout(wait)
        code = _number(made)
        if code == MISMATCH:
            raise DeviceError(f"serves another key than {address.key!r}", place=str(address), hint="give its --key")
        if code != SESSION:
            raise DeviceError(_strange(code), place=str(address), hint="is the port hwopt's daemon? Does it want --secret-file?")
        _text(made)
        made.settimeout(None)
        return made


def ask(address: Address, question: str) -> str:
    """The daemon's answer, also while it is busy; raises DeviceError."""
    with _place(address):
        made = _connect(address)
        try:
            _send(made, QUESTION, question)
            return _text(made)
        finally:
            made.close()


def _connect(address: Address) -> socket.socket:
    made = socket.create_connection((address.host, address.port), timeout=CONNECT_SECONDS)
    made.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    _tend(made)
    if address.secret:
        _prove(made, address)
    return made


def _tend(link: socket.socket) -> None:
    """A device that went away without a word is noticed within about a minute (Linux; elsewhere when the system thinks so)."""
    link.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    for name, value in (("TCP_KEEPIDLE", 20), ("TCP_KEEPINTVL", 10), ("TCP_KEEPCNT", 4), ("TCP_USER_TIMEOUT", 60_000)):
        if hasattr(socket, name):
            link.setsockopt(socket.IPPROTO_TCP, getattr(socket, name), value)


def _prove(link: socket.socket, address: Address) -> None:
    """Both ends show that they know the secret, which is never sent; raises DeviceError."""
    hint = "was it started with --secret-file, and with the same secret?"
    try:
        greeting = _exactly(link, len(PROOF) + 32)
    except TimeoutError as error:
        raise DeviceError("asks for no secret, so it is not the device that this one is for", place=str(address)) from error
    theirs, mine = greeting[len(PROOF) :], os.urandom(32)
    if not greeting.startswith(PROOF):
        raise DeviceError("does not speak hwopt's protocol", place=str(address), hint=hint)
    link.sendall(mine + _digest(address.secret, b"client" + theirs + mine))
    try:
        proof = _exactly(link, 32)
    except OSError as error:
        raise DeviceError("refuses the secret", place=str(address), hint=hint) from error
    if not hmac.compare_digest(proof, _digest(address.secret, b"server" + theirs + mine)):
        raise DeviceError("does not know the secret", place=str(address), hint=hint)


def _digest(secret: bytes, message: bytes) -> bytes:
    return hmac.new(secret, message, hashlib.sha256).digest()


def _send(link: socket.socket, magic: int, text: str) -> None:
    data = text.encode()
    link.sendall(struct.pack("<ii", magic, len(data)) + data)


def _exactly(link: socket.socket, count: int) -> bytes:
    data = b""
    while len(data) < count:
        more = link.recv(count - len(data))
        if not more:
            raise ConnectionResetError(104, "the connection was closed")
        data += more
    return data


def _number(link: socket.socket) -> int:
    return int(struct.unpack("<i", _exactly(link, 4))[0])


def _text(link: socket.socket) -> str:
    length = _number(link)
    if not 0 <= length <= LONGEST:
        raise ValueError(_strange(length))
    return _exactly(link, length).decode()


def _strange(number: int) -> str:
    wants = struct.pack("<i", number) == PROOF[:4]
    return "asks for a secret" if wants else "does not speak TVM's protocol"


# ------------------------------------------------------------------------------------------------------------- questions


def facts(address: Address) -> dict[str, Any]:
    """What the device is: machine, features (names of /proc/cpuinfo), cores, clock; raises DeviceError."""
    with _place(address):
        found = json.loads(ask(address, "info"))
    found["features"] = sorted(features(found))
    for name in ("clock_khz", "clock_most_khz"):
        found[name] = int(found[name]) if str(found[name]).isdigit() else 0
    return found


def features(found: Mapping[str, Any]) -> frozenset[str]:
    """Of a device's answer: words of its cpuinfo, or the bits of its auxiliary vector."""
    tables = {"aarch64": cpu.AARCH64, "arm": cpu.ARM, "riscv": cpu.RISCV}
    if found["machine"] not in tables:
        return frozenset(str(found["flags"]).split())
    words = {1: int(found["hwcap"]), 2: int(found["hwcap2"])}
    return frozenset(name for name, (word, bit) in tables[found["machine"]].items() if words[word] >> bit & 1)


# --------------------------------------------------------------------------------------------------------------- tracker


def _talk(tracker: Address) -> socket.socket:
    link = socket.create_connection((tracker.host, tracker.port), timeout=CONNECT_SECONDS)
    link.sendall(struct.pack("<i", TRACKER))
    if _number(link) != TRACKER:
        raise DeviceError("is no TVM tracker", place=str(tracker))
    return link


def _command(link: socket.socket, *words: Any) -> Any:
    data = json.dumps(words).encode()
    link.sendall(struct.pack("<i", len(data)) + data)
    return json.loads(_text(link))


def devices(tracker: Address) -> list[dict[str, Any]]:
    """One row for every server that is registered; raises DeviceError."""
    with _place(tracker):
        link = _talk(tracker)
        try:
            summary = _command(link, SUMMARY)[1]
        finally:
            link.close()
    rows = []
    for one in summary.get("server_info", []):
        host, port = one.get("addr", ("", 0))
        key = str(one.get("key", "")).removeprefix("server:")
        queue = summary.get("queue_info", {}).get(key, {})
        rows.append({"key": key, "host": str(host), "port": int(port), "free": int(queue.get("free", 0))})
    return rows


def request(tracker: Address, key: str, secret: bytes = b"", wait: float = QUEUE_SECONDS) -> Address:
    """A device with this key, by turns with others who ask; raises DeviceError where there is none, or none gets free."""
    known = devices(tracker)
    if not any(row["key"] == key for row in known):
        keys = sorted({row["key"] for row in known})
        raise DeviceError(f"no device with the key {key!r} is registered", place=str(tracker), hint=f"known: {', '.join(keys)}")
    with _place(f"{tracker}, key {key}"):
        link = _talk(tracker)
        link.settimeout(wait)
        end = time.monotonic() + wait
        while time.monotonic() < end:
            code, (host, port, _) = _command(link, REQUEST, key, "", 1)
            if code == 0:
                link.close()
                return Address(str(host), int(port), key, secret)
    raise DeviceError(f"no device with the key {key!r} got free within {wait:g} s", place=str(tracker))
