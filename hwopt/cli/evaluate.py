"""hwopt evaluate: score what ships, in every way that tells whether a compression hurt."""

from __future__ import annotations

import json
from fractions import Fraction
from pathlib import Path
from typing import Any

import click

from hwopt.cli.files import check_parent
from hwopt.cli.options import BIND, DATA, PREPROCESS, SEED, SHAPE, job_arguments
from hwopt.cli.progress import ProgressBar
from hwopt.errors import UsageError
from hwopt.files import write_whole


@click.command()
@click.argument("artifact", type=click.Path(path_type=Path))
@click.option("--data", required=True, metavar="FILE|FOLDER|MODULE:FUNCTION", help=f"{DATA}; a function of run scores by itself.")
@click.option("--model", type=click.Path(path_type=Path), help="The float model, where the artifact's own is not found.")
@click.option(
    "--robustness",
    default="",
    metavar="noise,blur,...",
    help="Corruptions: noise, blur, contrast, jpeg, images (all), characters.",
)
@click.option("--severities", default="1-5", show_default=True, help="Of the corruptions.")
@click.option(
    "--attack", "attacks", default="", metavar="fgsm,pgd", help="Adversarial inputs, made on either model (needs torch)."
)
@click.option("--epsilon", default="2/255", show_default=True, help="How much an attack may change, as a share of white.")
@click.option("--steps", type=click.IntRange(1), default=10, show_default=True, help="Of pgd.")
@click.option("--save-changed", "folder", type=click.Path(path_type=Path), help="A folder for the samples that changed most.")
@click.option("--keep", type=click.IntRange(1), default=16, show_default=True, help="How many of them.")
@click.option("--report", type=click.Path(path_type=Path), help="Write a page for people, one HTML file.")
@click.option(
    "--json", "json_file", type=click.Path(path_type=Path, allow_dash=True), help="Write the report as data; - prints it."
)
@PREPROCESS
@SHAPE
@BIND
@SEED
def evaluate(artifact: Path, report: Path | None, json_file: Path | None, folder: Path | None, **options: Any) -> None:
    """Score the library in ARTIFACT beside its float model: flips, classes that pay, calibration, corruptions, attacks.

    With --preprocess the data are pixels, for a library that takes what they become.
    """
    job = _arguments(options)
    for file in filter(None, (report, json_file)):
        if str(file) != "-":
            check_parent(file)
    from hwopt.evaluation import evaluate_artifact, summary
    from hwopt.evaluation.page import page

    with ProgressBar() as progress:
        found = evaluate_artifact(artifact, save_changed_to=folder, progress=progress, **job)
    text = json.dumps(found, indent=1, sort_keys=True, allow_nan=False)
    if json_file and str(json_file) != "-":
        write_whole(json_file, text + "\n")
    if report:
        write_whole(report, page(found))
    click.echo(text if str(json_file) == "-" else summary(found))


def _arguments(options: dict[str, Any]) -> dict[str, Any]:
    """Words of the command line as arguments of evaluate_artifact."""
    from hwopt.evaluation.attacks import parse_attacks
    from hwopt.evaluation.corruptions import parse_corruptions, parse_severities

    job = job_arguments(options)
    job["robustness"] = parse_corruptions(job["robustness"])
    job["severities"] = parse_severities(job["severities"])
    job["attacks"] = parse_attacks(job["attacks"])
    job["preprocess"] = job["preprocess"] or ""
    try:
        job["epsilon"] = float(Fraction(job["epsilon"]))
    except (ValueError, ZeroDivisionError) as error:
        raise UsageError(f"{job['epsilon']!r} is no number", place="--epsilon", hint="write 2/255 or 0.01") from error
    return job
