"""The command line: what it prints, and how it refuses."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]


def command(*arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "lib", *arguments],
        capture_output=True,
        text=True,
        cwd=ROOT,
        env={**os.environ, **environment},
    )


def test_help_names_the_commands():
    done = command("--help")
    assert done.returncode == 0
    for word in ("demo", "pretrain", "bench"):
        assert word in done.stdout


@pytest.mark.parametrize(
    ("arguments", "environment", "says"),
    [
        (("demo",), {"PRESET": "imagenet"}, 'PRESET is "imagenet"'),
        (("demo", "--seeds", "0"), {"PRESET": "toy"}, "seeds is 0"),
        (("demo",), {"PRESET": "cub2011", "WEIGHTS": "/nowhere.pt"}, "no weights at /nowhere.pt"),
        (("bench", "--name", "resnet18"), {}, "resnet18"),
    ],
)
def test_mistakes_are_one_sentence_and_exit_code_2(arguments, environment, says, tmp_path):
    done = command(*arguments, RUNS_DIR=str(tmp_path), **environment)
    assert done.returncode == 2
    assert says in done.stderr and "Traceback" not in done.stderr
    assert len(done.stderr.strip().splitlines()[-1]) < 400
