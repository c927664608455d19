"""The verbs of devices: hwopt device serve, build, list, info, bench; and the options by which other verbs name one."""

from __future__ import annotations

import signal
import subprocess
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from hwopt.cli.files import print_table
from hwopt.cli.options import JSON
from hwopt.errors import DeviceError, UsageError

if TYPE_CHECKING:
    from hwopt.device.link import Address

Command = Callable[..., Any]
NAMING = (
    click.option("--device", metavar="HOST:PORT", help="Where the daemon of a device listens (hwopt device serve)."),
    click.option("--tracker", metavar="HOST:PORT", help="TVM's tracker that knows the device, by --key."),
    click.option("--key", default="hwopt", show_default=True, help="What the device is registered as."),
    click.option("--secret-file", type=click.Path(path_type=Path), help="Its first line is the secret that the daemon knows."),
)


def naming_device(command: Command) -> Command:
    """The options that name a device."""
    for option in reversed(NAMING):
        command = option(command)
    return command


def take_device(options: dict[str, Any]) -> Address | None:
    """The device that these options name; they are taken out of `options`. Raises UsageError for two ways at once."""
    from hwopt.device.link import parse_address, read_secret, request

    device, tracker, key, file = (options.pop(name) for name in ("device", "tracker", "key", "secret_file"))
    if device and tracker:
        raise UsageError("a device and a tracker", hint="give --device or --tracker")
    secret = read_secret(file)
    if tracker:
        return request(parse_address(tracker), key, secret)
    return parse_address(device, key, secret) if device else None


def _named(options: dict[str, Any]) -> Address:
    address = take_device(options)
    if address is None:
        raise UsageError("which device?", hint="give --device host:port, or --tracker host:port --key name")
    return address


@click.group()
def device() -> None:
    """Devices that hwopt tunes and times over a network: their daemon RUNS WHAT IS UPLOADED, with its own rights.

    It listens on this machine only (reach it through ssh -L), or asks for a secret. A secret proves who connects, it does not
    encrypt: across networks of others, use ssh.
    """


@device.command()
@click.option("--target", default="host", show_default=True, help="The device's target; a processor family will do: aarch64.")
@click.option("-o", "--out", type=click.Path(path_type=Path), required=True, help="A folder, to be copied to the device.")
@click.option(
    "--runtime", type=click.Path(path_type=Path), help="A folder with TVM's two libraries for it, instead of a download."
)
def build(target: str, out: Path, runtime: Path | None) -> None:
    """Build the daemon for a device: a program without Python, and TVM's runtime, in one folder."""
    from hwopt.device.build import build_daemon, machine_of_target
    from hwopt.emit.toolchain import CROSS
    from hwopt.plugins import find_target

    machine = target if target in CROSS else machine_of_target(find_target(target))
    program = build_daemon(machine, out, runtime)
    click.echo(f"{out} is for {machine}: copy it there and run {program.name} (--port 9190 if not given)")


@device.command(context_settings={"ignore_unknown_options": True})
@click.option("--host", default="127.0.0.1", show_default=True, help="The address to listen on; others need --secret-file.")
@click.option("--port", type=click.IntRange(0, 65535), default=9190, show_default=True)
@click.option("--key", default="hwopt", show_default=True, help="What clients and trackers know it as.")
@click.option("--name", help="The name in the tuning database; the board's or processor's model if not given.")
@click.option("--timeout", type=click.IntRange(1), default=3600, show_default=True, help="Seconds that a session may take.")
@click.option("--secret-file", type=click.Path(exists=True, path_type=Path), help="Its first line must be known to clients.")
@click.option("--tracker", metavar="HOST:PORT", help="Register with TVM's tracker.")
@click.option("--advertise", metavar="HOST", help="The address that the tracker tells to clients.")
def serve(**options: Any) -> None:
    """Let this machine be a device: build the daemon and run it until it is interrupted."""
    from hwopt.device.build import build_daemon
    from hwopt.device.session import die_with_parent
    from hwopt.emit.cpu import host_machine

    given = [word for name, value in options.items() if value for word in (f"--{name.replace('_', '-')}", str(value))]
    if not options["port"]:
        given += ["--port", "0"]
    with tempfile.TemporaryDirectory(prefix="hwopt-device-") as folder:
        program = build_daemon(host_machine(), Path(folder))
        daemon = subprocess.Popen([str(program), *given], preexec_fn=die_with_parent)  # noqa: PLW1509  # no threads yet
        signal.signal(signal.SIGTERM, lambda *_: daemon.terminate())
        signal.signal(signal.SIGINT, signal.SIG_IGN)  # the terminal interrupts the daemon, too
        code = daemon.wait()
    if code:
        raise DeviceError(f"the daemon ended with {code}", place="hwopt device serve")


@device.command("list")
@click.option("--tracker", metavar="HOST:PORT", required=True)
@JSON
def list_(tracker: str, as_json: bool) -> None:
    """List the devices that are registered with TVM's tracker."""
    from hwopt.device.link import devices, parse_address

    rows = devices(parse_address(tracker))
    if not rows and not as_json:
        click.echo("no device is registered")
        return
    print_table(rows, as_json)


@device.command()
@naming_device
@JSON
def info(as_json: bool, **options: Any) -> None:
    """Say what a device is: processor, features, cores, clock."""
    from hwopt.device.link import facts

    found = facts(_named(options))
    if as_json:
        print_table([found], True)
        return
    told = (("clock_khz", ""), ("clock_most_khz", " at most"))
    clock = [f"{found[name] / 1e6:.2f} GHz{what}" for name, what in told if found[name]]
    rows = {
        "name": found["name"], "model": found["model"], "processor": found["machine"], "cores": found["cores"],
        "clock": ", ".join([*clock, *filter(None, [found["governor"]])]) or "not told", "memory": f"{found['memory_mb']} MB",
        "system": found["system"], "key": found["key"], "features": " ".join(found["features"]),
    }  # fmt: skip
    for name, value in rows.items():
        click.echo(f"{name:10}{value}")


@device.command()
@click.argument("artifacts", type=click.Path(path_type=Path), nargs=-1, required=True)
@click.option("--threads", type=click.IntRange(1), default=None, help="Threads; the artifact's if not given.")
@naming_device
@JSON
def bench(artifacts: tuple[Path, ...], threads: int | None, as_json: bool, **options: Any) -> None:
    """Time ARTIFACTS on a device: the library that ships is uploaded and run, several in turns."""
    from hwopt.device.bench import bench as timed

    found = timed({str(path): path for path in artifacts}, _named(options), threads=threads)
    rows = [
        {"artifact": name, "median ms": one.median * 1e3, "iqr ms": one.spread * 1e3, "runs": one.runs}
        for name, one in found.items()
    ]
    print_table(rows, as_json)
