"""The package without its repository: a wheel holds all that it needs, and leaves work with you."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]


def can_build() -> bool:
    return bool(find_spec("pip") and find_spec("setuptools")) and (
        int(version("setuptools").partition(".")[0]) >= 68
    )


@pytest.mark.skipif(not can_build(), reason="pip and setuptools 68 or newer build it")
def test_an_installed_package_trains_in_an_empty_folder(tmp_path):
    """Built offline, of a copy: a build leaves folders behind."""
    source, site, here = (tmp_path / name for name in ("source", "site", "here"))
    ignored = shutil.ignore_patterns("__pycache__")
    shutil.copytree(ROOT / "lib", source / "lib", ignore=ignored)
    for name in ("pyproject.toml", "README.md"):
        shutil.copy(ROOT / name, source)
    here.mkdir()
    pip = [sys.executable, "-m", "pip", "install", "-q", "--no-deps", "--no-build-isolation"]
    subprocess.run([*pip, "--target", site, source], check=True, capture_output=True)
    files = {path.relative_to(ROOT) for path in (ROOT / "lib").rglob("*.*") if path.is_file()}
    files = {path for path in files if path.suffix != ".pyc"}
    assert not [path for path in files if not (site / path).is_file()]
    # Another package's, as some leave it: no sign of a checkout.
    (site / "pyproject.toml").write_text('[project]\nname = "other"\n')

    environment = {**os.environ, "PYTHONPATH": str(site), "TQDM_DISABLE": "1", "PRESET": ""}
    environment.pop("RUNS_DIR", None)
    tiny = ["--data.toy-train", "8", "--data.toy-val", "8", "--batch-size", "8", "--epochs", "1"]
    command = [sys.executable, "-m", "lib", "train", "ft", *tiny]
    done = subprocess.run(command, cwd=here, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert f"{here / 'runs' / 'toy' / 'ft-s0'}: 1 epochs" in done.stdout
    assert "54 tensors loaded" in done.stdout + done.stderr
    assert [path.name for path in here.iterdir()] == ["runs"]
