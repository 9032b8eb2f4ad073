"""Command line of Sigmoid Attention ViT: the same functions as the notebooks.

The environment variable PRESET chooses the data set ("toy" when unset), see lib/config.py.
"""

from __future__ import annotations

import os
import sys

import tyro

from lib.cli.bench import cached, editing, loading, memory, speed
from lib.cli.data import check, fetch, split, weights
from lib.cli.runs import demo, evaluate_runs, sweep, teaching, train

# Mistakes that a person can mend: told in one sentence, exit code 2, no traceback; the last one
# is a loss that is not finite.
EXPECTED = (OSError, ValueError, FloatingPointError)


def main(arguments: list[str] | None = None) -> int:
    """Runs one command; returns the exit code."""
    arguments = sys.argv[1:] if arguments is None else arguments
    commands = {
        "demo": demo,
        "train": train,
        "evaluate": evaluate_runs,
        "sweep": sweep,
        "weights": weights,
        "download": fetch,
        "split": split,
        "check": check,
        "simulate-teaching": teaching,
        "bench": speed,
        "bench-memory": memory,
        "bench-cached": cached,
        "bench-data": loading,
        "bench-edit": editing,
    }
    try:
        if arguments[:1] == ["train"]:  # has commands of its own
            return train(arguments[1:]) or 0
        code = tyro.extras.subcommand_cli_from_dict(
            commands, prog="python -m lib", description=__doc__, args=arguments
        )
    except EXPECTED as error:
        rank = os.environ.get("RANK", "0")  # of several processes that train together
        told = str(error)
        if "Original Traceback" in told:  # of a DataLoader's worker; the error is its last line
            told = told.strip().rpartition("\n")[2].partition(": ")[2]
        print(f"error{'' if rank == '0' else f' (process {rank})'}: {told}", file=sys.stderr)
        return 2
    return code or 0


if __name__ == "__main__":
    sys.exit(main())
