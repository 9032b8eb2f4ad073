"""What the first cell of every notebook does on Colab and Kaggle, once the project is there.

It needs nothing but Python and pip. What these hosts have installed is never changed: a package
that is missing comes under constraints that hold every other one at its version.
"""

from __future__ import annotations

import importlib
import os
import re
import runpy
import subprocess
import sys
import tempfile
import tomllib
from importlib import metadata
from pathlib import Path

try:
    from IPython.core.error import UsageError as Stop  # shown as one line, without a traceback
except ImportError:
    Stop = RuntimeError
try:
    from packaging.requirements import Requirement
    from packaging.utils import canonicalize_name
    from packaging.version import InvalidVersion, Version
except ImportError:  # pip carries it
    from pip._vendor.packaging.requirements import Requirement
    from pip._vendor.packaging.utils import canonicalize_name
    from pip._vendor.packaging.version import InvalidVersion, Version

ROOT = Path(__file__).resolve().parents[1]
NEVER = {"torch", "torchvision", "numpy", "ipywidgets"}  # the host's drivers and pages need theirs
ELSEWHERE = {"jupyterlab", "nbconvert"}  # what shows notebooks on a machine of one's own
KEY = "WANDB_API_KEY"


def set_up(address: str, version: str, drive: bool = False, wandb: bool = False) -> None:
    """Makes the kernel of a notebook ready and prints what its reader has to know, in seconds.

    It may be called again and again. `address` and `version` are the notebook's: a clone that is
    at another is moved there, unless somebody changed it. `drive` keeps runs and data in Google
    Drive; `wandb` takes the key of Weights & Biases from the host's secrets.

    Raises:
        Stop: a package could not be installed, or Drive is not to be had; names the remedy.
    """
    kaggle = "KAGGLE_KERNEL_RUN_TYPE" in os.environ
    before, said = head(), update(address, f"v{version}")
    if head() != before:  # what was fetched just now knows best what it needs
        if "lib" in sys.modules:
            print("Another version was imported before: restart the session, then go on.")
        return runpy.run_path(__file__)["set_up"](address, version, drive, wandb)
    print(f"{ROOT}: version {version}{said}.")
    install(wanted(kaggle, wandb))
    sys.path[:0] = [] if str(ROOT) in sys.path else [str(ROOT)]
    os.chdir(ROOT)  # relative paths start here, and `!python -m lib` works
    if drive:
        print(use_drive(kaggle))
    if wandb:
        print(use_wandb(kaggle))
    print(machine(kaggle), run_times(), sep="\n")
    if kaggle and installed("anywidget") is None:
        print("The attention editor has sliders in place of its brush: Kaggle has no anywidget.")
    return None


# ----------------------------------------------------------------------------------- the clone


def git(*words: str) -> str | None:
    """What git says in the clone; None where it fails."""
    done = subprocess.run(["git", "-C", ROOT, *words], capture_output=True, text=True)
    return done.stdout.strip() if done.returncode == 0 else None


def head() -> str | None:
    """The commit that is checked out; None where ROOT is no clone."""
    return git("rev-parse", "HEAD") if (ROOT / ".git").exists() else None


def update(address: str, tag: str) -> str:
    """Moves the clone to the tag, or where the repository has none, to the end of its main branch.

    What a person changed stays as it is. Returns the rest of a sentence that begins with the
    version that is wanted, "" where there is nothing to tell.
    """
    if head() is None:
        return " is wanted; the folder is no clone of git, and stays as it is"
    published = git("for-each-ref", "--contains=HEAD", "refs/tags", "refs/remotes")
    if git("status", "--porcelain", "--untracked-files=no") or not published:
        return " is wanted; the clone has changes of yours, and stays as it is"
    said, wanted = "", git("rev-parse", "-q", "--verify", f"refs/tags/{tag}^{{commit}}")
    if wanted is None or git("remote", "get-url", "origin") != address:
        git("remote", "set-url", "origin", address)  # a fork's tags and branches are its own
        wanted = fetched(f"refs/tags/{tag}", f"refs/tags/{tag}")
    if wanted is None:
        said = f" (there is no tag {tag}: this is the branch main)"
        wanted = fetched("refs/heads/main", "refs/remotes/origin/main")
    if wanted is None:
        return f" is wanted; {address} does not answer, and the clone stays as it is"
    if wanted != head() and git("checkout", "-q", "--detach", wanted) is None:
        return " is wanted; files of yours are in its way, and the clone stays as it is"
    return said


def fetched(theirs: str, ours: str) -> str | None:
    """The commit that a reference of the repository names; None where it is not to be had."""
    if git("fetch", "-q", "origin", f"+{theirs}:{ours}") is None:
        return None
    return git("rev-parse", f"{ours}^{{commit}}")


# ------------------------------------------------------------------------------------ packages


def installed(name: str) -> str | None:
    """The version of a package, None where it is missing."""
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None


def everything() -> dict[str, str]:
    """The version of every package, by name; of two of one name, that which is imported."""
    found: dict[str, str] = {}
    for one in metadata.distributions():
        found.setdefault(canonicalize_name(str(one.name)), one.version)
    return found


def wanted(kaggle: bool, wandb: bool) -> list[Requirement]:
    """What the notebooks need of pyproject.toml on this host."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    extras = project["optional-dependencies"]
    texts = [*project["dependencies"], *extras["notebooks"], *(extras["wandb"] if wandb else [])]
    # On Kaggle the page knows anywidget only after a restart, which loses the session.
    elsewhere = ELSEWHERE | ({"anywidget"} if kaggle else set())
    return [one for one in map(Requirement, texts) if one.name not in elsewhere]


def install(requirements: list[Requirement]) -> None:
    """Installs what is missing or too old, and nothing else; what is in `NEVER` is only told of.

    Raises Stop where pip fails; what was there is as it was.
    """
    needed = []
    for one in requirements:
        version = installed(one.name)
        if version is not None and one.specifier.contains(version, prereleases=True):
            continue
        if version is None or one.name not in NEVER:
            needed.append(one)
        if version is not None:
            remedy = "start a newer runtime" if one.name in NEVER else "it is replaced"
            print(f"{one.name} {version} is not {one.specifier}, which is needed: {remedy}.")
    if not needed:
        return
    before = everything()
    new = {canonicalize_name(one.name) for one in needed}
    with tempfile.TemporaryDirectory() as folder:
        held = Path(folder, "held.txt")
        lines = [f"{n}=={v}\n" for n, v in before.items() if n not in new and is_version(v)]
        held.write_text("".join(lines), encoding="utf-8")
        pip = [sys.executable, "-m", "pip", "install", "-q", "--disable-pip-version-check"]
        pip += ["--no-input", "--retries=1", "-c", str(held), *map(str, needed)]
        done = subprocess.run(pip, capture_output=True, text=True)
    names = ", ".join(map(str, needed))
    if done.returncode:
        errors = [line for line in done.stderr.splitlines() if line.startswith("ERROR")]
        raise Stop(
            f"{names} could not be installed; nothing was changed. Is the internet on (Kaggle: "
            f"Settings)? Then run this cell again. {' '.join(errors) or done.stderr.strip()}"
        )
    importlib.invalidate_caches()
    added = [f"{n} {v}" for n, v in everything().items() if before.get(n) != v]
    print(f"Installed: {', '.join(added)}; all other packages are as they were.")


def is_version(text: str) -> bool:
    """Whether pip takes it in a constraint; the system's own packages have others."""
    try:
        return bool(Version(text))
    except (InvalidVersion, TypeError):
        return False


# ------------------------------------------------------------------------- what the host offers


def use_drive(kaggle: bool) -> str:
    """Sends runs and data to Google Drive, unless RUNS_DIR or DATA_DIR is set; a sentence."""
    if kaggle:
        return "DRIVE is Colab's; on Kaggle, `Save version` keeps /kaggle/working."
    mounted = ROOT.parent / "drive"  # /content/drive, as everybody calls it
    kept = mounted / "MyDrive" / ROOT.name
    folders = {"RUNS_DIR": kept / "runs", "DATA_DIR": kept / "datasets"}
    try:
        from google.colab import drive

        drive.mount(str(mounted))
        for variable, folder in folders.items():
            folder.mkdir(parents=True, exist_ok=True)
            os.environ.setdefault(variable, str(folder))
    except Exception as error:  # whatever Colab raises, the kernel goes on
        raise Stop(
            f"Google Drive is not to be had ({error}): run this cell again and allow it, or set "
            "DRIVE = False"
        ) from error
    runs, data = os.environ["RUNS_DIR"], os.environ["DATA_DIR"]
    return f"Trained models go to {runs}, data are looked for in {data}."


def use_wandb(kaggle: bool) -> str:
    """Takes WANDB_API_KEY from the host's secrets, unless it is set; a sentence."""
    try:
        if KEY not in os.environ and kaggle:
            from kaggle_secrets import UserSecretsClient

            os.environ[KEY] = UserSecretsClient().get_secret(KEY)
        elif KEY not in os.environ:
            from google.colab import userdata

            os.environ[KEY] = userdata.get(KEY)
    except Exception as error:  # no such secret, no access, nobody there to ask
        where = "Add-ons > Secrets" if kaggle else "the key at the left"
        return (
            f"No {KEY} ({error}): add it under {where}, let this notebook read it, and run this "
            "cell again; until then Weights & Biases works offline."
        )
    os.environ.setdefault("WANDB_MODE", "online")
    return 'Weights & Biases has its key; a training with `trackers=("wandb",)` goes there.'


def machine(kaggle: bool) -> str:
    """Which GPU there is, or how one is switched on."""
    ask = ["nvidia-smi", "--query-gpu=name,memory.total", "--format=csv,noheader"]
    try:
        done = subprocess.run(ask, capture_output=True, text=True, timeout=20)
    except (OSError, subprocess.TimeoutExpired):
        done = None
    if done and done.returncode == 0 and done.stdout.strip():
        return f"GPU: {'; '.join(done.stdout.split(chr(10))).strip('; ')}."
    where = "Settings > Accelerator" if kaggle else "Runtime > Change runtime type"
    return (
        f"No GPU, {os.cpu_count()} CPU cores: enough for the toy preset. For real pictures switch "
        f"one on ({where}) and run this cell again."
    )


def run_times() -> str:
    """The README's run times of the notebooks, which are those of two CPU cores."""
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    rows = re.findall(r"^\| `(\d\d)_\w+` \|.*\| ([^|]*\d[^|]*) \|$", readme, re.MULTILINE)
    times = ", ".join(f"{number}: {time}" for number, time in rows)
    return f"First runs of the notebooks on two CPU cores ({times}); none is measured on a GPU."
