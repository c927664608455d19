"""Passes bytes between a socket and two pipes until either end is closed: `python pump.py SOCKET FROM TO`, file descriptors.

TVM's client starts it as the other end of a session; the socket is connected and through all handshakes. Plain Python, no
imports of hwopt: it has to start fast.
"""

import contextlib
import os
import select
import sys


def pump(link: int, source: int, sink: int) -> None:
    ways = {link: sink, source: link}
    poll = select.poll()
    for end in ways:
        poll.register(end, select.POLLIN)
    while True:
        for end, _ in poll.poll():
            data = os.read(end, 1 << 16)
            if not data:
                return
            while data:
                data = data[os.write(ways[end], data) :]


if __name__ == "__main__":
    with contextlib.suppress(OSError):  # a closed end is the end
        pump(*map(int, sys.argv[1:4]))
