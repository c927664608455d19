"""Options that several verbs share, and how their words become arguments of the Python API."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import click
import numpy as np

from hwopt.errors import UsageError
from hwopt.plan.budget import parse_budget

Command = Callable[..., Any]
MODEL = click.argument("model", type=click.Path(path_type=Path))
SHAPE = click.option("--shape", "shapes", multiple=True, metavar="NAME=1,3,224,224", help="Freeze an input's dimensions.")
BIND = click.option("--bind", "binds", multiple=True, metavar="NAME=VALUE", help="Make an input a constant.")
TARGET = click.option(
    "--target", default="host", show_default=True, help="Hardware (see: hwopt targets), or CPUs, best first: a,b."
)
THREADS = click.option("--threads", type=click.IntRange(1), default=None, help="Threads; all cores of the target if not given.")
SEED = click.option("--seed", type=int, default=0, show_default=True)
JSON = click.option("--json", "as_json", is_flag=True, help="Print data instead of text.")
DATA = "An .npz, a folder of pictures, a dataset on disk (arrow, parquet), or module:function"
CALIBRATE = click.option("--calibrate", type=click.Path(path_type=Path), metavar="FILE|FOLDER|MODULE:FUNCTION", help=f"{DATA}.")
EVALUATE = click.option(
    "--evaluate", metavar="FILE|FOLDER|MODULE:FUNCTION", help="The same with labels; or a function of run that returns the score."
)
PREPROCESS = click.option(
    "--preprocess", metavar="mean=..,std=..,scale=1/255,layout=nhwc", help="Becomes part of the model, which then takes pixels."
)
MAX_DROP = click.option("--max-drop", default="1%", show_default=True, help="How much the score may fall.")
BUDGET = click.option(
    "--budget", "limits", multiple=True, metavar="latency=2ms|size=1MB|memory=4MB|energy=2mJ", help="Further limits."
)
TUNING_DB = click.option(
    "--tuning-db",
    type=click.Path(path_type=Path),
    help="Tuned schedules. tune writes to the user's own database if not given; compile reads only what is given.",
)
WORKERS = click.option("--workers", metavar="ADDRESS", help="A Dask cluster that builds candidates, not local processes.")
PASSES = click.option(
    "--passes", "passes", default=None, help="Families to consider, by comma; name{...} is applied in any case."
)
ERRORS = "How the errors of changes are found: by gradients (torch), by running each, or by what takes less time."
CHECK = "Leave changes out once; those without which the model is faster stay out."
REPORT = click.option("--report", type=click.Path(path_type=Path), help="Write a page for people, one HTML file.")
TRAIN = click.option("--train", metavar="NPZ", help="What to train on: as --calibrate, whose data are used otherwise.")
RECOVERING = (
    click.option(
        "--recover",
        default=None,
        metavar="distill{epochs=3}",
        help="Train the changed model: distill, qat, dkm, gradual, netadapt, lottery (needs torch).",
    ),
    TRAIN,
    click.option("--checkpoints", type=click.Path(path_type=Path), help="Where unfinished training is kept and found again."),
)
BUILDING = (
    click.option("--emit", default="shared,source", show_default=True, help="shared, static, object, source, array, pc."),
    click.option("--parallel", type=click.Choice(["pthread", "openmp", "serial"]), default="pthread", show_default=True),
    click.option("--no-heap", is_flag=True, help="A run lives in the caller's workspace alone (with --parallel serial)."),
    click.option("--no-measure", is_flag=True, help="Time nothing: same inputs, same bytes, and the cache is used."),
    click.option("--install", type=click.Path(path_type=Path), help="Copy the libraries and the header to this folder, too."),
    click.option("--depfile", type=click.Path(path_type=Path), help="Write what was read, for make and Ninja."),
)


def building(command: Command) -> Command:
    """The options of a compilation that say what is delivered, and to whom."""
    for option in reversed(BUILDING):
        command = option(command)
    return command


def recovering(command: Command) -> Command:
    """The options of training after the changes."""
    for option in reversed(RECOVERING):
        command = option(command)
    return command


def planning(command: Command) -> Command:
    """The options of every command that decides what to change."""
    for option in (PASSES, BUDGET, MAX_DROP, EVALUATE, CALIBRATE, PREPROCESS, BIND, SHAPE, TARGET, SEED, THREADS):
        command = option(command)
    return command


def job_arguments(options: dict[str, Any]) -> dict[str, Any]:
    """Options of the command line as arguments of the Python API."""
    job = dict(options)
    job["shapes"] = dict(read_shape(text) for text in job.pop("shapes", ()))
    job["binds"] = dict(read_bind(text) for text in job.pop("binds", ()))
    if "max_drop" in job:
        job["budget"] = parse_budget(job.pop("max_drop"), job.pop("limits"))
    return job


def form_arguments(job: dict[str, Any]) -> dict[str, Any]:
    """The same with the options of `building` as one Form."""
    from hwopt.emit.products import Form, parse_emit

    form = Form(parse_emit(job.pop("emit")), job.pop("parallel"), not job.pop("no_heap"))
    return job | {"form": form, "measure": not job.pop("no_measure")}


def read_shape(text: str) -> tuple[str, tuple[int, ...]]:
    """`input=1,3,224,224` -> name and sizes."""
    name, equals, dims = text.rpartition("=")
    try:
        shape = tuple(int(dim) for dim in dims.split(",")) if dims else ()
    except ValueError as error:
        raise UsageError(f"cannot read {dims!r}", place=f"--shape {text}", hint="write --shape input=1,3,224,224") from error
    if not equals or any(dim < 1 for dim in shape):
        raise UsageError("needs a name and sizes above zero", place=f"--shape {text}", hint="write --shape input=1,3,224,224")
    return name, shape


def read_bind(text: str) -> tuple[str, Any]:
    """`sr=16000` -> name and array."""
    name, equals, value = text.partition("=")
    try:
        if not equals:
            raise ValueError(text)
        return name, np.asarray(json.loads(value))
    except ValueError as error:
        raise UsageError("needs a name and a number or a [list]", place=f"--bind {text}", hint="write --bind sr=16000") from error
