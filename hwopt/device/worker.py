"""The process that measures on a device: TVM's client, and the loops of backends/tvm/tune/child.py over it.

TVM's calls do not end when a device hangs; runner.py notices that no answer comes and has the session, or this process, ended.
Commands and answers are those of child.py, a JSON object a line, and: the first command is {"device": {...}, "seconds"}; every
batch is a session of its own and is answered first by {"session": name}; {"lost": why} means that the session ended early,
{"refused": why} that the device cannot do it.
"""

from __future__ import annotations

import base64
import json
import os
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from hwopt.backends.tvm.tune.child import BFLOAT16, COLD, COPIES, Batch, random_array
from hwopt.device.link import Address
from hwopt.device.session import die_with_parent, first_line, remote
from hwopt.errors import DeviceError

Say = Callable[[Mapping[str, Any]], None]


class Remote(Batch):
    """A batch whose candidates run on the device: one call there for each turn of one."""

    def __init__(self, command: Mapping[str, Any], session: Any, say: Say) -> None:
        self.command, self.say = command, say
        names = [row[0] for row in command["signature"]]
        self.weights = names.index("weights") if "weights" in names else -1
        session.upload(command["library"])
        self.say({"alive": "uploaded"})
        module = session.load_module(Path(command["library"]).name)
        self.call = module["hwopt_device_time"]
        self.kernels = command["symbols"]
        self.tensors = [self._tensor(session, row) for row in self._arrays(command)]
        self.sets = self._sets(command)

    def _arrays(self, command: Mapping[str, Any]) -> list[np.ndarray]:
        generator = np.random.default_rng(command["seed"])
        return [random_array(generator, dtype, size, low, high) for _, dtype, size, low, high in command["signature"]]

    def _tensor(self, session: Any, array: np.ndarray) -> Any:
        import tvm

        made = tvm.runtime.empty(array.shape, array.dtype.name, session.cpu(0))
        made.copyfrom(array)
        self.say({"alive": "copied"})
        return made

    def _sets(self, command: Mapping[str, Any]) -> int:
        if self.weights < 0:
            return 1
        _, dtype, size, *_ = command["signature"][self.weights]
        bytes_each = size * (2 if dtype == BFLOAT16 else np.dtype(dtype).itemsize)
        return min(COPIES, max(1, COLD // bytes_each))

    def _first(self, index: int) -> tuple[float, np.ndarray]:
        out = self.tensors[-1]
        spoilt = np.empty(out.shape, out.dtype)
        spoilt.view(np.uint8)[:] = 0xA5
        out.copyfrom(spoilt)
        seconds = self._time(index, 1)
        return seconds, out.numpy()

    def _time(self, index: int, times: int) -> float:
        place, threads = self.command["places"][index], self.command["threads"]
        seconds = float(self.call(place, threads, times, self.sets, self.weights, *self.tensors))
        if seconds <= -2:
            raise AttributeError("the timing loop refuses its arguments")
        return seconds


def measure(command: Mapping[str, Any], address: Address, seconds: int, say: Say) -> None:
    """One batch in one session."""
    with remote(address, seconds) as session:
        say({"session": str(session.get_function("hwopt.device.session")())})
        batch = Remote(command, session, say)
        batch.run()
        del batch


def main() -> None:
    """Answer commands until the input ends."""
    die_with_parent()
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)

    def say(answer: Mapping[str, Any]) -> None:
        answers.write(json.dumps(answer) + "\n")
        answers.flush()

    first = json.loads(sys.stdin.readline() or "{}")
    if not first:
        return
    os.environ.setdefault("TVM_USE_RUNTIME_LIB", "1")  # the compiler is large and not needed
    from tvm.error import RPCError  # takes seconds: before the first answer is waited for

    device = dict(first["device"], secret=base64.b64decode(first["device"]["secret"]))
    say({"ready": True})
    for line in sys.stdin:
        try:
            measure(json.loads(line), Address(**device), first["seconds"], say)
        except (RPCError, AttributeError) as error:  # the device's answer, in a session that works
            say({"refused": first_line(error)})
        except (DeviceError, RuntimeError) as error:  # TVM's are RuntimeErrors
            say({"lost": error.message if isinstance(error, DeviceError) else first_line(error)})


if __name__ == "__main__":
    main()
