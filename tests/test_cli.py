"""The command line: what it prints, and how it refuses."""

from __future__ import annotations

import json
import os
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
import timm
import torch
from conftest import CUB_CLASSES

from lib.__main__ import main

ROOT = Path(__file__).resolve().parents[1]


def command(*arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "lib", *arguments],
        capture_output=True,
        text=True,
        cwd=ROOT,
        env={**os.environ, **environment},
    )


def test_help_names_the_commands_and_loads_nothing_for_it():
    code = "import sys; from lib.__main__ import main\ntry: main(['--help'])\n"
    code += "finally: print({'torch', 'pandas', 'numpy', 'matplotlib'} & {*sys.modules})"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0 and done.stdout.endswith("set()\n")
    for word in (
        "demo",
        "evaluate",
        "weights",
        "download",
        "split",
        "check",
        "bench",
        "sweep",
    ):
        assert word in done.stdout


@pytest.mark.parametrize("workers", ["2", "auto", "few"])
def test_workers_are_a_number_or_auto(workers, run_main, tmp_path):
    arguments = ("train", "ft", "--resume", "--workers", workers)
    try:
        code, _, told = run_main(*arguments, RUNS_DIR=str(tmp_path))
    except SystemExit:  # of tyro
        assert workers == "few"
    else:
        assert code == 2 and "no run that could be resumed" in told


@pytest.fixture
def run_main(monkeypatch, capsys):
    """Runs a command in this process, which spares a start of several seconds."""

    def run(*arguments: str, **environment: str) -> tuple[int, str, str]:
        for name in ("PRESET", "DATA_DIR", "MAPS", "SPLIT", "CACHE", "MODEL", "WEIGHTS", "PWD"):
            monkeypatch.delenv(name, raising=False)
        for name, value in environment.items():
            monkeypatch.setenv(name, value)
        return main(list(arguments)), *capsys.readouterr()

    return run


@pytest.mark.parametrize(
    ("arguments", "environment", "says"),
    [
        (("demo",), {"PRESET": "imagenet"}, 'PRESET is "imagenet"'),
        (("demo", "--seeds", "0"), {"PRESET": "toy"}, "seeds is 0"),
        (("demo",), {"PRESET": "cub2011", "WEIGHTS": "/nowhere.pt"}, "no weights at /nowhere.pt"),
        (("bench", "--name", "resnet18"), {}, "resnet18"),
        (("split", "--N", "1.5"), {"PRESET": "folder", "DATA_DIR": "/nowhere"}, "/nowhere is miss"),
        (("split",), {"PRESET": "toy"}, "toy birds are drawn in parts"),
        (("train", "ft", "--resume"), {}, "is no run that could be resumed"),
        (("train", "ft", "--resume", "--overwrite"), {}, "--resume and --overwrite"),
        (("train", "hitl", "--init", "absent"), {}, "absent is no finished run"),
        (("evaluate", "absent-s0"), {"PRESET": "toy"}, "no run absent-s0 in"),
        (("evaluate",), {"PRESET": "toy"}, "no run is named"),
        (("train", "ft", "--drop-path", "2"), {}, "drop_path is 2; it must be in [0, 1)"),
    ],
)
def test_mistakes_are_one_sentence_and_exit_code_2(
    arguments, environment, says, tmp_path, run_main
):
    code, _, stderr = run_main(*arguments, RUNS_DIR=str(tmp_path), **environment)
    assert code == 2
    assert says in stderr and "Traceback" not in stderr
    assert len(stderr.strip().splitlines()[-1]) < 400


def test_split_writes_the_file_of_the_original_experiment(cub, run_main):
    environment = {"DATA_DIR": str(cub.root)}
    code, out, error = run_main("split", "--N", "0.7", "--shuffle", "--seed", "1", **environment)
    assert code == 0, error
    path = cub.root / "cub200_2011_dataset.json"
    assert f"{path}: 14 train, 0 val, 6 test images of 2 classes" in out
    told = out.strip().splitlines()[-1]
    assert told.startswith("to train with it: ") and told.endswith(" make demo")
    chosen = dict(word.split("=") for word in shlex.split(told)[4:-2])
    assert chosen == {"SPLIT": str(path), "PRESET": "cub2011", "DATA_DIR": str(cub.root)}
    content = json.loads(path.read_text())
    assert list(content) == ["train", "test", "label_list"]
    assert content["label_list"] == list(CUB_CLASSES)
    name, label, map_name = content["train"][0]
    assert (cub.root / "CUB_200_2011" / "images" / name).is_file()
    assert label == 0 and map_name.isdigit()
    code, out, error = run_main(
        "split", "--official", "--val-share", "0.34", "--out", str(path), **environment
    )
    assert "8 train, 4 val, 8 test images" in out
    first = json.loads(path.read_text())["test"][0]
    assert first == [f"{CUB_CLASSES[0]}/bird_6.jpg", 0, "7"]


@pytest.fixture
def tiny_weights(tmp_path):
    """MODEL and WEIGHTS of a ViT of 0.4 million parameters; the file is the test's to damage."""
    torch.save(timm.create_model("test_vit").state_dict(), tmp_path / "vit.pt")
    return {"MODEL": "test_vit", "WEIGHTS": str(tmp_path / "vit.pt"), "TQDM_DISABLE": "1"}


def test_check_says_what_was_found_and_its_exit_code_is_the_verdict(cub, run_main, tiny_weights):
    environment = {"DATA_DIR": str(cub.root), **tiny_weights}
    details = cub.root / "details.csv"
    code, out, error = run_main("check", "cub2011", "--details", str(details), **environment)
    assert code == 0, error
    found, _, absent = out.partition("looked for and not found: ")
    assert "stops training" not in found and "worth knowing\n" in found
    assert "     1  map: none" in found and "to do: nothing; these pictures take part" in found
    assert "unreadable" in absent and "map: none" not in absent
    assert "training can start" in absent and "map: none" in details.read_text()
    broken = cub.root / "CUB_200_2011" / "images" / CUB_CLASSES[0] / "bird_2.jpg"
    broken.write_bytes(b"no picture")
    code, out, error = run_main("check", "cub2011", **environment)
    assert code == 1 and "training would fail" in out
    stops = out.partition("worth knowing")[0]
    assert f"{broken.relative_to(cub.root)}: cannot be decoded" in stops
    assert "     1  picture: unreadable (" in stops
    assert "to do: restore it from where it came from, or delete it" in stops
    assert max(map(len, out.splitlines())) <= 100 + len(str(cub.root))


def test_check_tells_scripts_in_json_and_nothing_else(cub, run_main, tiny_weights):
    environment = {"DATA_DIR": str(cub.root), **tiny_weights, "TQDM_DISABLE": "0"}
    details = cub.root / "details.csv"
    arguments = ("check", "cub2011", "--json", "--details", str(details))
    code, out, error = run_main(*arguments, **environment)
    report = json.loads(out)
    assert code == 0 and "findings: " in error and details.is_file()
    assert list(report) == ["preset", "root", "can_train", "problems", "balance"]
    assert report["preset"] == "cub2011" and report["root"] == str(cub.root)
    assert report["can_train"] is True
    assert {row["problem"]: row["count"] for row in report["problems"]}["map: none"] == 1
    assert all(row["remedy"] and not row["stops_training"] for row in report["problems"])


@pytest.mark.parametrize("stand", ["absent.pt", "no_weights", "not_finite"])
def test_check_tells_of_weights_that_training_would_fail_at(cub, run_main, tiny_weights, stand):
    environment = {"DATA_DIR": str(cub.root), **tiny_weights}
    path = Path(environment["WEIGHTS"])
    if stand == "no_weights":
        path.write_bytes(b"no weights")
    elif stand == "not_finite":
        state = torch.load(path)
        state["blocks.0.attn.qkv.weight"][0, 0] = torch.nan
        torch.save(state, path)
    else:
        environment["WEIGHTS"] = stand
    code, out, _ = run_main("check", "cub2011", "--json", **environment)
    report = json.loads(out)
    (row,) = [row for row in report["problems"] if "weights" in row["problem"]]
    is_fault = stand != "absent.pt"  # what is not there yet is no fault of the data
    assert row["stops_training"] == is_fault and report["can_train"] != is_fault
    assert code == int(is_fault) and len(report["balance"]) == 3
    kind = "missing" if stand == "absent.pt" else "cannot be used"
    assert row["problem"] == f"weights: {kind}"
    assert (stand if stand == "absent.pt" else str(path)) in row["examples"][0]
    verdict = run_main("check", "cub2011", **environment)[1].splitlines()[-1]
    assert verdict == ("training would fail" if is_fault else
                       "training can start, once the weights are there")  # fmt: skip


@pytest.mark.parametrize("variables", [{"MODEL": "resnet18"}, {"MODEL": "vit_x"}, {"PRESET": "x"}])
def test_check_tells_of_a_model_or_preset_that_there_is_not(cub, run_main, variables):
    environment = {"DATA_DIR": str(cub.root), "PRESET": "cub2011", **variables}
    code, out, _ = run_main("check", "--json", **environment)
    assert code == 1 and any(row["stops_training"] for row in json.loads(out)["problems"])


@pytest.mark.parametrize("variable", ["DATA_DIR", "MAPS", "SPLIT"])
def test_check_tells_of_a_variable_that_names_nothing(cub, run_main, tiny_weights, variable):
    environment = {"DATA_DIR": str(cub.root), **tiny_weights, variable: "not/there"}
    code, out, _ = run_main("check", "cub2011", "--json", **environment)
    (row,) = json.loads(out)["problems"]
    assert code == 1 and row["problem"] == "path: cannot be used"
    assert f'not/there is missing ({variable} is "not/there")' in row["examples"][0]
    code, out, _ = run_main("check", "cub2011", **environment)
    assert code == 1 and "training would fail" in out


def test_a_run_remembers_where_its_data_is_whatever_folder_it_is_loaded_from(
    tmp_path, run_main, monkeypatch
):
    monkeypatch.chdir(tmp_path)
    tiny = ["--data.toy-train", "16", "--data.toy-val", "8", "--epochs", "1", "--batch-size", "8"]
    tiny += ["--model.weights", "None", "--model.overrides.depth", "1", "--data.root", "photos"]
    code, _, error = run_main("train", "ft", *tiny, RUNS_DIR="trained", PRESET="toy")
    assert code == 0, error
    kept = json.loads((tmp_path / "trained" / "toy" / "ft-s0" / "config.json").read_text())
    assert kept["data"]["root"] == str(tmp_path / "photos")


def test_a_run_that_exists_is_refused_unless_told_what_to_do(tmp_path, run_main):
    tiny = ["--data.toy-train", "16", "--data.toy-val", "8", "--epochs", "1", "--batch-size", "8"]
    tiny += ["--model.weights", "None", "--model.overrides.depth", "1"]
    environment = {"RUNS_DIR": str(tmp_path), "PRESET": "toy"}
    code, out, _ = run_main("train", "ft", *tiny, **environment)
    assert code == 0 and "toy/ft-s0: 1 epochs in float32, validation accuracy" in out
    code, _, error = run_main("train", "ft", *tiny, **environment)
    assert code == 2 and "exists and is finished; go on with --resume" in error
    code, _, error = run_main("train", "ft", *tiny, "--lr", "1", "--resume", **environment)
    assert code == 2 and "train.lr is 0.0003 there and 1.0 here" in error
    code, out, _ = run_main("train", "ft", *tiny, "--resume", **environment)
    assert code == 0 and "1 epochs" in out
    code, out, _ = run_main("train", "ft", *tiny, "--lr", "1", "--overwrite", **environment)
    assert code == 0 and '"lr": 1.0' in (tmp_path / "toy" / "ft-s0" / "config.json").read_text()


@pytest.fixture
def two_runs(tmp_path, run_main):
    """Two small trained models below a runs folder."""
    tiny = ["--data.toy-train", "16", "--data.toy-val", "8", "--data.toy-test", "8"]
    tiny += ["--epochs", "1", "--batch-size", "8", "--model.weights", "None"]
    tiny += ["--model.overrides.depth", "1"]
    environment = {"RUNS_DIR": str(tmp_path / "runs"), "PRESET": "toy"}
    for more in (["ft"], ["hitl", "--init", "ft-s0", "--name", "control-s0"]):
        code, _, error = run_main("train", *more, *tiny, **environment)
        assert code == 0, error
    return environment


def test_evaluate_measures_runs_side_by_side(tmp_path, run_main, two_runs, monkeypatch):
    out = tmp_path / "results" / "one"
    arguments = ["evaluate", "ft-s0", "control-s0", "--split", "val", "--which", "best"]
    arguments += ["--gallery", "2", "--gallery-rule", "change", "--out", str(out)]
    arguments += ["--label", "plain", "yardstick"]
    monkeypatch.setattr("sys.argv", ["lib", *arguments])
    code, told, error = run_main(*arguments, **two_runs)
    assert code == 0, error
    assert (
        'Each model minus "yardstick"' in told
        and "plain" in told
        and "val, 8 images, 8 classes" in told
    )
    assert f"PRESET=toy python -m lib {' '.join(arguments)}" in told
    assert told == (out / "result.txt").read_text() + f"\nfigures and tables: {out}\n"
    assert "whose probability of the true class changed most" in (out / "gallery.html").read_text()
    assert len((out / "seeds.csv").read_text().splitlines()) == 3
    assert list(out.parent.iterdir()) == [out]


@pytest.mark.parametrize(
    ("more", "says"),
    [
        (["--against", "nobody"], '--against is "nobody", but the models are ft, control'),
        (["--gallery", "-1"], "gallery is -1; use a number of images"),
        (["--label", "a", "a"], "label names a, a; give 2 names that differ, for ft, control"),
        (["--out", "{folder}/taken/one"], "taken/one cannot be made"),
    ],
)
def test_evaluate_refuses_before_it_computes(more, says, tmp_path, run_main, two_runs, monkeypatch):
    (tmp_path / "taken").write_text("a file, no folder")
    for name in ("ask", "measure_runs"):
        monkeypatch.setattr(
            f"lib.experiments.evaluate.{name}", lambda *_: pytest.fail("it computes")
        )
    more = [part.format(folder=tmp_path) for part in more]
    code, _, error = run_main("evaluate", "ft-s0", "control-s0", *more, **two_runs)
    assert code == 2 and says in error and "Traceback" not in error


def test_the_recipe_is_where_the_options_start(tmp_path, run_main, capsys):
    with pytest.raises(SystemExit):
        run_main("train", "ft", "--recipe", "original", "--help")
    told = " ".join(capsys.readouterr().out.split())
    assert "peak learning rate (default: 1e-05)" in told and "(default: adam)" in told
