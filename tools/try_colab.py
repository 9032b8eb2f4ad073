"""All notebooks as on Colab, by hand: `python3.13 tools/try_colab.py FOLDER [NOTEBOOK...]`

FOLDER gets an environment of Colab's versions (2026-08; CUDA apart), a stand-in for `google.colab`,
and what git would publish of this checkout. Each notebook is then executed from an empty folder,
its first cell with that address. Six GB, and half an hour on two CPU cores; a second run keeps the
environment. FOLDER must not lie in the project.
"""

from __future__ import annotations

import os
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
# What Colab has of what the notebooks meet; its Jupyter is in tests/browser/colab.txt.
COLAB = """
torch==2.11.0 torchvision==0.26.0 timm==1.0.28 accelerate==1.14.0 safetensors==0.8.0
huggingface_hub==1.27.0 numpy==2.1.3 scipy==1.16.3 pandas==2.2.3 pillow==11.3.0 matplotlib==3.10.0
seaborn==0.13.2 tqdm==4.67.3 filelock==3.32.3 jinja2==3.1.6 packaging==26.3 wandb==0.28.1
scikit-learn==1.6.1 tensorboard==2.20.0 protobuf==5.29.6 psutil==5.9.5 pyzmq==26.2.1 tornado==6.5.7
traitlets==5.7.1 matplotlib-inline==0.2.2 nbclient==0.10.4 nbformat==5.11.1 typeguard==4.6.0
docstring_parser==0.18.0 typing_extensions==4.16.0 psygnal==0.15.1
"""
STAND_IN = {  # google/colab/...: what the first cell and anywidget ask for
    "__init__.py": "from . import drive, output, userdata",
    "drive.py": "def mount(folder): print('Mounted at', folder)",
    "output.py": "class _widgets: _installed_url = None\ndef enable_custom_widget_manager(): "
    "_widgets._installed_url = 'https://colab.invalid/manager'",
    "userdata.py": "def get(key): return 'key'",
}


def environment(folder: Path) -> str:
    """Colab's packages in a new environment; its interpreter."""
    python = folder / "venv" / "bin" / "python"
    if not (folder / "installed").exists():
        subprocess.run([sys.executable, "-m", "venv", folder / "venv"], check=True)
        pip = [python, "-m", "pip", "install", "-q", "--disable-pip-version-check"]
        jupyter = ["-r", ROOT / "tests" / "browser" / "colab.txt"]
        subprocess.run([*pip, "pip==24.1.2", *COLAB.split(), *jupyter], check=True)
        (folder / "installed").touch()
    (site,) = (folder / "venv" / "lib").glob("python*/site-packages")
    for name, text in STAND_IN.items():
        path = site / "google" / "colab" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    # On Colab the kernel has imported it before the first cell; anywidget looks whether it did.
    startup = folder / "ipython" / "profile_default" / "startup"
    startup.mkdir(parents=True, exist_ok=True)
    (startup / "colab.py").write_text("import google.colab.output")
    return str(python)


def publish(address: Path) -> None:
    """Makes a repository whose branch main holds this checkout, committed or not."""
    git = ["git", f"--git-dir={address}", f"--work-tree={ROOT}", "-c", "user.name=x"]
    git += ["-c", "user.email=x"]
    subprocess.run(["git", "init", "-q", "--bare", "-b", "main", address], check=True)
    subprocess.run([*git, "add", "-A"], check=True, cwd=ROOT)
    subprocess.run([*git, "commit", "-q", "-m", "As it is"], check=True, cwd=ROOT)


def execute(name: str, folder: Path) -> None:
    """Runs one notebook in `folder`; called in Colab's environment."""
    import nbformat
    from first_cells import ID, cell, rendered
    from nbclient import NotebookClient

    path = ROOT / "notebooks" / name
    text = rendered(path.read_text(encoding="utf-8"), name)
    notebook = nbformat.reads(text, as_version=4)
    first = next(one for one in notebook.cells if one.id == ID)
    first.source = cell(str(folder / "origin.git"), "0").replace(
        "/content", str(folder / "content")
    )
    empty = folder / "empty"
    empty.mkdir(exist_ok=True)
    where = {"metadata": {"path": empty}}
    client = NotebookClient(notebook, timeout=1800, kernel_name="python3", resources=where)
    start, words = time.perf_counter(), "passed"
    try:
        client.execute()
    except Exception as error:
        words = f"FAILED: {error}"
    print("".join(out.get("text", "") for out in first.outputs))
    print(f"{name}: {words}, {time.perf_counter() - start:.0f} s", flush=True)
    nbformat.write(notebook, folder / name)


def main() -> None:
    folder = Path(sys.argv[1]).resolve()
    names = sys.argv[2:] or [path.name for path in sorted((ROOT / "notebooks").glob("*.ipynb"))]
    if os.environ.get("COLAB_RELEASE_TAG"):  # the second turn, in the environment
        for name in names:
            execute(name, folder)
        return
    folder.mkdir(parents=True, exist_ok=True)
    python = environment(folder)
    subprocess.run(["rm", "-rf", folder / "origin.git", folder / "content"], check=True)
    (folder / "content").mkdir()
    publish(folder / "origin.git")
    colab = {
        "COLAB_RELEASE_TAG": "release-colab-external",
        "IPYTHONDIR": str(folder / "ipython"),
        "MPLBACKEND": "module://matplotlib_inline.backend_inline",
    }
    again = [python, __file__, str(folder), *names]
    sys.exit(subprocess.run(again, env={**os.environ, **colab}).returncode)


if __name__ == "__main__":
    main()
