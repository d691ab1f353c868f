"""`tritium`: the group of commands, and what an error looks like.

stdout carries data, stderr carries talk. Exit codes: 0, 1 for a failure, 2 for something to change in the command,
130 after Ctrl-C.
"""

from __future__ import annotations

import logging
import os
import sys
import traceback
from collections.abc import Sequence

import click

import tritium
from tritium.cli.bench import bench
from tritium.cli.chat import chat
from tritium.cli.doctor import doctor
from tritium.cli.evaluate import evaluate
from tritium.cli.generate import generate
from tritium.cli.quantize import quantize
from tritium.cli.serve import serve
from tritium.cli.tune import tune
from tritium.core import CapacityError, ConfigError, RequestError, TritiumError


@click.group(context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 110})
@click.version_option(tritium.__version__, prog_name="tritium", message="%(prog)s %(version)s")
@click.option("--traceback", is_flag=True, expose_value=False, help="Show where an error came from (on any command).")
def cli() -> None:
    """An inference engine for hybrid language models: Qwen3.5, 3.6 and 3.8, dense and mixture-of-experts.

    Without a model named, the small one that ships with Tritium is used.
    """


for command in (serve, chat, generate, evaluate, quantize, bench, tune, doctor):
    cli.add_command(command)


def main(argv: Sequence[str] | None = None) -> None:
    """Entry point of the `tritium` script."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    shown = "--traceback" in arguments
    quiet = bool({"--quiet", "-q"} & set(arguments))
    logging.basicConfig(format="%(message)s", stream=sys.stderr, level=logging.WARNING)
    logging.getLogger("tritium").setLevel(logging.WARNING if quiet else logging.INFO)
    try:
        code = cli.main([a for a in arguments if a != "--traceback"], prog_name="tritium", standalone_mode=False)
        sys.stdout.flush()
        sys.exit(code if isinstance(code, int) else 0)
    except BrokenPipeError:  # the reader of our output went away: not an error of ours
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(1)
    except (KeyboardInterrupt, click.Abort):
        click.echo("interrupted", err=True)
        sys.exit(130)
    except Exception as error:
        if shown:
            traceback.print_exc()
        sys.exit(complain(error))


def complain(error: Exception) -> int:
    """Tells the user about `error` on stderr in a line and a hint; gives the exit code."""
    code, hint = 1, None
    if isinstance(error, click.ClickException):
        path = error.ctx.command_path if isinstance(error, click.UsageError) and error.ctx else "tritium"
        message, code = error.format_message(), error.exit_code
        hint = f"see {path} --help"
    elif isinstance(error, TritiumError):
        message, hint = error.message, error.hint
        code = 2 if isinstance(error, (ConfigError, CapacityError, RequestError)) else 1
    else:
        message = f"unexpected {type(error).__name__}: {error}".splitlines()[0]
        hint = "add --traceback to see where it came from, and please report it"
    click.echo(f"error: {message}", err=True)
    if hint:
        click.echo(f"hint: {hint}", err=True)
    return code
