"""The house in order: who imports whom, one source of dependencies, notebooks fit for readers."""

from __future__ import annotations

import ast
import json
import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
import yaml

ROOT = Path(__file__).resolve().parents[1]
FILES = sorted((ROOT / "lib").rglob("*.py"))
NOTEBOOKS = sorted((ROOT / "notebooks").glob("*.ipynb"))

# 1. The wings of lib, floor by floor: each imports its own files and lower floors only.
FLOORS = (
    {"files", "figures", "edit"},
    {"config"},
    {"model", "data"},  # which do not know each other
    {"losses"},
    {"evaluation"},  # measures; never trains
    {"training"},
    {"experiments", "widgets"},
    {"cli"},
    {"__main__", "__init__"},
)
FLOOR_OF = {wing: number for number, floor in enumerate(FLOORS) for wing in floor}

# 2. Packages that only some wings, or files, may import.
NOTEBOOK_ONLY = {"IPython", "ipywidgets", "anywidget", "jupyter", "jupyterlab", "notebook"}
KEPT_TO = {
    **{name: {"widgets"} for name in (*NOTEBOOK_ONLY, "jupyter_server", "traitlets")},
    "tyro": {"cli", "__main__"},
    "accelerate": {"training", "model/predict.py"},
    "matplotlib": {"figures"},
    "seaborn": {"figures"},
    **{name: {"experiments/cluster.py"} for name in ("dask", "distributed", "dask_jobqueue")},
}

# 3. What only one file may name: the insides of timm's blocks, and calls with side effects.
INSIDES = {
    *("attn", "qkv", "q_norm", "k_norm", "attn_drop", "proj_drop", "ls1", "ls2"),
    *("drop_path1", "drop_path2", "mlp", "norm_pre", "_pos_embed", "patch_drop", "rope"),
}
OF_THE_SYSTEM = {"os.replace", "os.rename", "os.link", "os.fsync", "shutil.move"}

# 4. How large things may be. Dask, an extra, has a file of its own; so has each part of the
# attention editor. So have the kinds of models: blocks, wholes, families, names from elsewhere.
FILE_LINES, CLASS_LINES, PARAMETERS, PYTHON_FILES, ROOMS = 450, 260, 8, 86, 12


def name_of(path: Path) -> str:
    return path.relative_to(ROOT / "lib").as_posix()


def wing_of(path: Path) -> str:
    return name_of(path).partition("/")[0].removesuffix(".py")


def imports(path: Path) -> tuple[set[str], set[str]]:
    """Wings of lib, and other packages, that a file imports."""
    wings, others = set(), set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            found = [node.module]
            if node.module == "lib":
                found = [f"lib.{alias.name}" for alias in node.names]
        else:
            continue
        for name in found:
            head, _, rest = name.partition(".")
            if head == "lib":
                wings.add(rest.partition(".")[0])
            else:
                others.add(head)
    return wings, others


every_file = pytest.mark.parametrize("path", FILES, ids=name_of)


@every_file
def test_imports_run_downward(path):
    wing = wing_of(path)
    for other in imports(path)[0] - {wing}:
        assert FLOOR_OF[other] < FLOOR_OF[wing], f"{wing} imports {other}"


@every_file
def test_packages_stay_in_their_wings(path):
    for package in imports(path)[1] & KEPT_TO.keys():
        assert KEPT_TO[package] & {wing_of(path), name_of(path)}, f"{package} is imported"


@every_file
def test_two_files_know_timms_insides_one_opens_pictures_one_writes(path):
    tree = ast.parse(path.read_text(encoding="utf-8"))
    attributes = {node.attr for node in ast.walk(tree) if isinstance(node, ast.Attribute)}
    calls = [node for node in ast.walk(tree) if isinstance(node, ast.Call)]
    called = {ast.unparse(call.func) for call in calls}
    if name_of(path) not in ("model/block.py", "model/adapter.py"):
        assert not attributes & INSIDES
    # Elsewhere than on Linux, Python takes text for the letters of one country.
    for call in calls:
        if ast.unparse(call.func).endswith(".read_text") or ast.unparse(call.func) == "open":
            words = ast.unparse(call)
            assert "encoding=" in words or ("'rb'" in words or "'wb'" in words), words
    if name_of(path) != "data/pictures.py":
        assert "Image.open" not in called
    if name_of(path) != "files.py":
        assert not called & OF_THE_SYSTEM
        # Of a Path; those of texts take two arguments, those of pandas have names.
        moved = [call for call in calls if len(call.args) == 1 and not call.keywords]
        moved = [call.func.attr for call in moved if isinstance(call.func, ast.Attribute)]
        assert not {"replace", "rename"} & {*moved}


@every_file
def test_nothing_is_too_large_to_read(path):
    text = path.read_text(encoding="utf-8")
    assert len(text.splitlines()) <= FILE_LINES
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.ClassDef):
            assert node.end_lineno - node.lineno < CLASS_LINES, node.name
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            given = node.args.posonlyargs + node.args.args + node.args.kwonlyargs
            count = sum(one.arg not in ("self", "cls") for one in given)
            assert count <= PARAMETERS, node.name


def test_the_house_is_small_enough_to_know():
    rooms = {wing_of(path) for path in FILES} - {"__init__", "__main__"}
    assert len(rooms) <= ROOMS and len(FILES) <= PYTHON_FILES


def test_no_name_stands_for_two_things():
    homes: dict[str, set[str]] = {}
    for path in FILES:
        for node in ast.parse(path.read_text(encoding="utf-8")).body:
            targets = getattr(node, "targets", [getattr(node, "target", None)])
            names = [one.id for one in targets if isinstance(one, ast.Name)]
            names += [node.name] if hasattr(node, "name") else []
            for name in names:
                homes.setdefault(name, set()).add(name_of(path))
    assert {name: files for name, files in homes.items() if len(files) > 1} == {}


def test_the_face_has_what_it_names_and_loads_nothing_before_it_is_asked():
    code = "import lib, sys; assert 'torch' not in sys.modules\n"
    code += "for name in lib.__all__: assert getattr(lib, name).__name__ == name\n"
    code += "assert {*lib.__all__} <= {*dir(lib)}\n"
    code += "try: lib.nothing\nexcept AttributeError as error: print(error)"
    done = subprocess.run(
        [sys.executable, "-c", code], check=True, cwd=ROOT, capture_output=True, text=True
    )
    assert "'lib' has no attribute 'nothing'" in done.stdout


def test_a_bare_gpu_server_can_import_the_training_path():
    wings = ("model", "data", "evaluation", "training", "experiments")
    names = [
        path.relative_to(ROOT).with_suffix("").as_posix().replace("/", ".")
        for path in FILES
        if wing_of(path) in wings
    ]
    forbidden = sorted(NOTEBOOK_ONLY | {"tyro"})
    # None in sys.modules makes an import fail; one process, as each would load PyTorch again.
    code = f"import sys; sys.modules.update(dict.fromkeys({forbidden}))\n"
    code += "".join(f"import {name}\n" for name in names)
    subprocess.run([sys.executable, "-c", code], check=True, cwd=ROOT)


def test_environment_yml_agrees_with_pyproject():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    wanted = {*project["dependencies"], *project["optional-dependencies"]["notebooks"]}
    environment = yaml.safe_load((ROOT / "environment.yml").read_text(encoding="utf-8"))[
        "dependencies"
    ]
    given = next(part["pip"] for part in environment if isinstance(part, dict))
    assert set(given) - {"-e .", "-c constraints.txt"} == wanted
    assert environment[0].split(",")[0] == f"python{project['requires-python']}"


def test_constraints_satisfy_the_lower_bounds():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    extras = project["optional-dependencies"].values()
    pinned = dict(
        line.lower().split("==")
        for line in (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines()
        if "==" in line
    )
    as_tuple = lambda text: tuple(int(part) for part in re.findall(r"\d+", text))  # noqa: E731
    for requirement in [*project["dependencies"], *(one for part in extras for one in part)]:
        name, least = requirement.split(",")[0].split(">=")
        assert as_tuple(pinned[name]) >= as_tuple(least), requirement


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda p: p.stem)
def test_notebooks_are_fit_for_readers(path):
    assert path.stat().st_size < 1_000_000
    notebook = json.loads(path.read_text(encoding="utf-8"))
    cells = notebook["cells"]
    code = ["".join(cell["source"]) for cell in cells if cell["cell_type"] == "code"]
    assert 15 <= len(code) <= 35
    lengths = sorted(len(source.splitlines()) for source in code)
    assert lengths[len(lengths) // 2] < 10 and lengths[-1] <= 40
    kinds = "".join(cell["cell_type"][0] for cell in cells)
    assert "cccc" not in kinds, "more than three code cells without prose between them"
    assert "widgets" not in notebook["metadata"]
    assert any("assert " in source for source in code)
    assert "What this does not show" in "".join(cells[-1]["source"]) + "".join(cells[-2]["source"])


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda p: p.stem)
def test_notebooks_are_executed_and_without_errors(path):
    for cell in json.loads(path.read_text(encoding="utf-8"))["cells"]:
        if cell["cell_type"] == "code":
            assert cell["execution_count"], "run `make notebooks`"
            assert not [out for out in cell["outputs"] if out["output_type"] == "error"]
            assert not [out for out in cell["outputs"] if out.get("name") == "stderr"]


def test_nothing_in_git_names_this_machine_or_weighs_too_much():
    listed = subprocess.run(
        ["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, text=True, check=True
    ).stdout.split("\0")
    for name in filter(None, listed):
        path = ROOT / name
        if not path.is_file():
            continue
        assert path.stat().st_size < 10_000_000, name
        if path.suffix not in (".safetensors", ".png", ".pt", ".pixels"):
            text = path.read_text(encoding="utf-8")
            assert str(ROOT) + "/" not in text and str(Path.home()) + "/" not in text, name
