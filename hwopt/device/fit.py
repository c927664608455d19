"""Whether code for a target runs on a device."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from hwopt.device.build import machine_of_target
from hwopt.errors import DeviceError, UsageError
from hwopt.target import Target


def check_fit(device: Mapping[str, Any], target: Target, threads: int, place: str) -> None:
    """Raise DeviceError for another processor family or missing features, UsageError for more threads than cores."""
    wanted = machine_of_target(target)
    if device["machine"] != wanted:
        raise DeviceError(f"is a {device['machine']}, the target {target.name} a {wanted}", place=place)
    check_features(device, target.features, place)
    if threads > device["cores"]:
        cores = device["cores"]
        raise UsageError(f"{threads} threads on {cores} cores", place=place, hint=f"give --threads {cores}, here and to compile")


def check_features(device: Mapping[str, Any], wanted: tuple[str, ...], place: str) -> None:
    lacking = sorted(set(wanted) - set(device["features"]))
    if lacking:
        raise DeviceError(f"lacks {', '.join(lacking)}", place=place)
