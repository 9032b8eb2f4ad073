"""Command line of Sigmoid Attention ViT: the same functions as the notebooks.

The environment variable PRESET chooses the data set ("toy" when unset), see lib/config.py; with any
command, --classes 21-40 is CLASSES=21-40: a part of its classes.
"""

from __future__ import annotations

import argparse
import os
import sys
import warnings

import tyro

from lib.cli.bench import cached, editing, kinds, loading, memory, speed
from lib.cli.data import check, fetch, split, weights
from lib.cli.models import models
from lib.cli.runs import demo, edit_pictures, evaluate_runs, sweep, teaching, train

# Mistakes that a person can mend: told in one sentence, exit code 2, no traceback; the last one
# is a loss that is not finite.
EXPECTED = (OSError, ValueError, FloatingPointError)


STOPPED = 141  # exit code of what ends because nobody reads its output, as the shell has it


def main(arguments: list[str] | None = None) -> int:
    """Runs one command; returns the exit code.

    No output ends the work: letters that the terminal, or the file behind `>`, cannot hold are
    written as escapes (\\u8d64). Where the reader has gone (`| head`) it ends without a word.
    """
    warnings.formatwarning = _in_a_line
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="backslashreplace")
    code, failure = 0, None
    try:
        code = _run(sys.argv[1:] if arguments is None else arguments)
    except EXPECTED as error:
        failure = error
    finally:  # also before tyro's exit
        # A pipe that broke has dropped what it was given: it is asked with a line of its own.
        unwritten = _flush("\n" if isinstance(failure, BrokenPipeError) else "")
    if isinstance(unwritten, BrokenPipeError) and isinstance(failure, BrokenPipeError | None):
        return STOPPED if failure else code
    if failure := failure or unwritten:
        rank = os.environ.get("RANK", "0")  # of several processes that train together
        told = str(failure)
        if "Original Traceback" in told:  # of a DataLoader's worker; the error is its last line
            told = told.strip().rpartition("\n")[2].partition(": ")[2]
        print(f"error{'' if rank == '0' else f' (process {rank})'}: {told}", file=sys.stderr)
        return 2
    return code


def _run(arguments: list[str]) -> int:
    commands = {
        "demo": demo,
        "train": train,
        "evaluate": evaluate_runs,
        "sweep": sweep,
        "models": models,
        "weights": weights,
        "download": fetch,
        "split": split,
        "check": check,
        "simulate-teaching": teaching,
        "edit-many": edit_pictures,
        "bench": speed,
        "bench-memory": memory,
        "bench-cached": cached,
        "bench-data": loading,
        "bench-edit": editing,
        "bench-kinds": kinds,
    }
    first = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    first.add_argument("--classes")
    given, arguments = first.parse_known_args(arguments)
    if given.classes is not None:
        os.environ["CLASSES"] = given.classes
    if arguments[:1] == ["train"]:  # has commands of its own
        return train(arguments[1:]) or 0
    code = tyro.extras.subcommand_cli_from_dict(
        commands, prog="python -m lib", description=__doc__, args=arguments
    )
    return code or 0


def _in_a_line(message: Warning, kind: type, *where: object) -> str:
    """A warning as a person at a terminal needs it: without the line of code that it came from."""
    return f"{'warning' if kind is UserWarning else kind.__name__}: {message}\n"


def _flush(more: str) -> OSError | None:
    """Writes what waits, and `more` to stdout; the error of an output that is closed or full.

    From then on that output leads nowhere: else Python fails at it once more as it ends.
    """
    found = None
    for stream in filter(None, (sys.stdout, sys.stderr)):
        try:
            stream.write(more if stream is sys.stdout else "")
            stream.flush()
        except OSError as error:
            found = error
            os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())
    return found


if __name__ == "__main__":
    sys.exit(main())
