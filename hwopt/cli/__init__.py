"""The command line: the group of verbs, and how it ends. One function per verb, in the files beside by what they are for."""

from __future__ import annotations

import errno
import sys
from pathlib import Path

import click

from hwopt.cli.device import device
from hwopt.cli.evaluate import evaluate
from hwopt.cli.look import diff, explain_, passes, print_
from hwopt.cli.make import apply_, compile_, demo, plan
from hwopt.cli.profile import profile
from hwopt.cli.targets import targets
from hwopt.cli.use import bench, cache, run, tune
from hwopt.errors import EXIT_CODES, HwoptError


def _show_cmake_dir(context: click.Context, _: click.Parameter, asked: bool) -> None:
    if asked:
        click.echo(Path(__file__).parent.with_name("cmake"))
        context.exit()


EPILOG = "\b\nExit codes:\n" + "\n".join(f"{code:5}  {meaning}" for code, meaning in EXIT_CODES.items())


@click.group(epilog=EPILOG, context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 120})
@click.version_option(package_name="hwopt")
@click.option("--cmake-dir", is_flag=True, is_eager=True, expose_value=False, callback=_show_cmake_dir, help="For find_package.")
def cli() -> None:
    """Compile a trained model for one piece of hardware, as small and fast as an accuracy budget allows."""


MAKE = (compile_, plan, apply_, demo)
LOOK = (print_, diff, explain_, passes, targets)
USE = (run, evaluate, bench, tune, profile, device, cache)
for verb in (*MAKE, *LOOK, *USE):
    cli.add_command(verb)


def main(arguments: list[str] | None = None) -> None:
    """The entry point: every error ends as one line and an exit code."""
    if "" not in sys.path:  # --evaluate module:function finds modules where the user stands, as python -m does
        sys.path.insert(0, "")
    try:
        code = cli.main(arguments, prog_name="hwopt", standalone_mode=False)
    except HwoptError as error:
        _fail(str(error), error.exit_code)
    except click.UsageError as error:
        error.show()
        sys.exit(2)
    except click.ClickException as error:
        _fail(error.format_message(), 1)
    except (KeyboardInterrupt, click.Abort):
        _fail("interrupted", 130)
    except RuntimeError as error:  # an interrupt inside of an import arrives wrapped
        if not isinstance(error.__cause__ or error.__context__, KeyboardInterrupt):
            raise
        _fail("interrupted", 130)
    except OSError as error:
        reason = "no space left on the disk" if error.errno == errno.ENOSPC else error.strerror or str(error)
        _fail(f"{error.filename or 'output'}: {reason}", 1)
    else:
        sys.exit(code if isinstance(code, int) else 0)


def _fail(message: str, code: int) -> None:
    click.echo(f"hwopt: error: {message}", err=True)
    sys.exit(code)
