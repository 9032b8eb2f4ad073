"""Text anywhere: names of classes and files in figures, in output and in files of any encoding."""

from __future__ import annotations

import io
import json
import os
import subprocess
import sys
import unicodedata
import warnings
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import pytest
from fontTools.fontBuilder import FontBuilder
from fontTools.pens.ttGlyphPen import TTGlyphPen
from hypothesis import given
from hypothesis import strategies as st
from matplotlib import font_manager
from PIL import Image

from lib import figures
from lib.__main__ import main
from lib.figures import fonts

ROOT = Path(__file__).resolve().parents[1]
WITHOUT_FONT = {
    "赤い鳥": ("U+8D64 i U+9CE5", "fonts-noto-cjk"),
    "スズメ": ("suzume", "fonts-noto-cjk"),
    "붉은 새": ("bulgeun sae", "fonts-noto-cjk"),
    "🐦‍🔥 👍🏽": ("(bird) (fire) (thumbs up sign)", "fonts-symbola"),
    "นก": ("U+0E19 U+0E01", "fonts-noto-core"),
    "caf\udce9": ("caf\\udce9", None),
    "a\tb": ("a b", None),
}


@pytest.fixture
def bare(monkeypatch):
    """A machine that has only the fonts of matplotlib, whatever this one has."""
    own = [entry for entry in font_manager.fontManager.ttflist if "mpl-data" in entry.fname]
    monkeypatch.setattr(font_manager.fontManager, "ttflist", own)
    monkeypatch.setattr(fonts, "findSystemFonts", list)
    monkeypatch.setattr(fonts, "_told", set())
    fonts.families.cache_clear()
    yield monkeypatch
    fonts.families.cache_clear()
    plt.close("all")


def drawn(*names: str, kind: str = "png") -> tuple[list[str], list[str]]:
    """Draws names as titles, legends and ticks; what is shown, and the warnings."""
    figure, axes = plt.subplots(1, len(names), squeeze=False, layout="constrained")
    for axis, name in zip(axes[0], names, strict=True):
        axis.set_title(name)
        axis.bar([name], [1], label=name)
        axis.legend()
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        figure.savefig(io.BytesIO(), format=kind)
    # Short axes are none of this test's business.
    told = [str(one.message) for one in told if "constrained_layout" not in str(one.message)]
    assert [axis.get_title() for axis in axes[0]] == list(names)  # to whom asks, nothing changed
    shown = [axis.title._get_layout(figure.canvas.get_renderer())[1] for axis in axes[0]]
    return ["\n".join(line for line, *_ in lines) for lines in shown], told


def test_without_a_font_names_are_spelled_out_and_one_sentence_names_the_package(bare):
    spelled = {name: words for name, (words, _) in WITHOUT_FONT.items()}
    shown, told = drawn(*WITHOUT_FONT)
    shown = [words.replace("\n", " ").replace("\u200d ", "") for words in shown]  # joins nothing
    assert shown == list(spelled.values())
    packages = {package for _, package in WITHOUT_FONT.values() if package}
    assert len(told) == len(packages) and all("no font of this machine" in one for one in told)
    assert {p for p in packages if any(f"apt install {p}`" in one for one in told)} == packages
    assert drawn("青い鳥", "🦉", kind="pdf")[1] == []  # said once


def test_a_font_of_the_machine_is_found_though_installed_after_matplotlib_looked(bare, tmp_path):
    pen = TTGlyphPen(None)
    pen.moveTo((0, 0))
    pen.lineTo((500, 700))
    pen.lineTo((900, 0))
    pen.closePath()
    letters = "赤い鳥ก🐦"
    made = FontBuilder(1000)
    made.setupGlyphOrder([".notdef", "one"])
    made.setupCharacterMap({ord(letter): "one" for letter in letters})
    made.setupGlyf({".notdef": TTGlyphPen(None).glyph(), "one": pen.glyph()})
    made.setupHorizontalMetrics({".notdef": (1000, 0), "one": (1000, 0)})
    made.setupHorizontalHeader(ascent=800, descent=-200)
    made.setupNameTable({"familyName": "Made Here", "styleName": "Regular"})
    made.setupOS2()
    made.setupPost()
    made.save(tmp_path / "made.ttf")
    (tmp_path / "broken.ttf").write_bytes(b"no font")
    paths = [str(tmp_path / "made.ttf"), str(tmp_path / "broken.ttf")]
    bare.setattr(fonts, "findSystemFonts", lambda: paths)
    assert drawn("赤い鳥", "kก 🐦", "plain") == (["赤い鳥", "kก 🐦", "plain"], [])
    figure, axis = plt.subplots()
    title = axis.set_title("赤")
    figure.draw_without_rendering()
    assert title.get_fontfamily()[-1] == "Made Here"
    assert axis.xaxis.label.get_fontfamily() == plt.rcParams["font.family"]
    assert drawn("赤い猫")[0] == ["赤い U+732B"]


NAMES = st.text(st.characters(codec=None), max_size=30) | st.text("$_^\\{}a1 赤", max_size=12)


@given(NAMES)
def test_any_name_is_drawn_and_told_from_others(name):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        warnings.filterwarnings("ignore", "no font of this machine")
        warnings.filterwarnings("ignore", "constrained_layout not applied")
        figure = plt.figure()
        for number, words in enumerate((name, figures.label(name))):
            figure.text(0, number, words)
        figure.canvas.draw()
    plt.close(figure)
    assert all(spelled.isascii() for spelled in map(fonts.spelled, name))
    known = [unicodedata.name(letter, "") for letter in name]
    assert all(map(fonts.spelled, (a for a, b in zip(name, known, strict=True) if "CJK" in b)))


def test_labels_hold_what_mathematics_and_legends_take_away():
    figure, axis = plt.subplots()
    names = ["_hidden", "$5 bill$", r"a$b_c$d^2", "word " * 40]
    for name in names:
        axis.plot([0, 1], label=figures.label(name))
    texts = axis.legend().get_texts()
    figure.draw_without_rendering()
    shown = [text._get_layout(figure.canvas.get_renderer())[1] for text in texts]
    shown = ["\n".join(text._preprocess_math(line)[0] for line, *_ in lines)
             for text, lines in zip(texts, shown, strict=True)]  # fmt: skip
    plain = [words.replace("\N{ZERO WIDTH SPACE}", "") for words in shown]
    assert [words.replace("\n", " ") for words in plain] == [*names[:3], names[3].strip()]
    widths = [max(map(len, figures.label(name).split("\n"))) for name in (names[3], "鳥" * 30)]
    assert widths == [24, 12]  # letters of the East are twice as wide
    assert not any(text._preprocess_math(text.get_text())[1] for text in texts)
    plt.close("all")


def test_a_run_whose_name_starts_with_an_underscore_is_in_every_legend():
    names = ["_a", "$b$", "c" * 200]
    images = pd.DataFrame({"variant": np.repeat(names, 8), "p_true": np.linspace(0, 1, 24)})
    images = images.assign(rung="all", seed=0, top1=0.5, cc=0.5)
    measured = ("epoch", "cross_entropy", "human_loss", "val_top1", "val_cc")
    history = pd.DataFrame({name: [1] for name in measured})
    bins = images.assign(images=1, confidence=0.5, accuracy=0.5)
    for figure, more in (
        (figures.true_class_density(images), 0),
        (figures.ladder(images, "", ""), 0),
        (figures.accuracy_and_alignment(images, {}), 0),
        (figures.histories(dict.fromkeys(names, history)), 0),
        (figures.reliability(bins, dict.fromkeys(names, 0.1)), 1),
    ):
        (legend,) = [axis.get_legend() for axis in figure.axes if axis.get_legend()]
        assert len(legend.get_texts()) == len(names) + more
        assert max(len(text.get_text().split("\n")[0]) for text in legend.get_texts()) <= 60
    plt.close("all")


# ------------------------------------------------------------------------------ output and files


@pytest.mark.parametrize("encoding", ["cp1252", "cp932", "ascii", "utf-8"])
def test_what_an_output_cannot_hold_is_escaped(monkeypatch, encoding):
    out = io.TextIOWrapper(io.BytesIO(), encoding)
    monkeypatch.setattr(sys, "stdout", out)
    monkeypatch.setattr("lib.__main__._run", lambda given: print("赤 🐦 é ± caf\udce9") or 0)
    assert main([]) == 0
    written = out.buffer.getvalue().decode(encoding)
    assert written.startswith("赤" if encoding in ("cp932", "utf-8") else "\\u8d64")
    assert written.endswith("caf\\udce9\n")


def test_a_closed_pipe_ends_without_a_word_and_a_full_disk_with_one():
    code = (
        "import sys; from lib import __main__ as m\nm._run = lambda given: print('x' * 10**6) or 0"
    )
    code += "\nsys.exit(m.main([]))"
    for out, expected, words in (("closed", 141, ""), ("/dev/full", 2, "No space left")):
        if out == "closed":
            reader, writer = os.pipe()
            os.close(reader)
        elif Path(out).exists():
            writer = os.open(out, os.O_WRONLY)
        else:
            continue
        done = subprocess.run(
            [sys.executable, "-c", code], cwd=ROOT, stdout=writer, stderr=subprocess.PIPE, text=True
        )
        os.close(writer)
        assert (done.returncode, bool(done.stderr)) == (expected, bool(words)), done.stderr
        assert words in done.stderr and "Traceback" not in done.stderr


def picture_folder(root: bytes, classes: list[bytes], stem: bytes) -> None:
    random = np.random.default_rng(0)
    for name in classes:
        os.makedirs(os.path.join(root, name))
        for number in range(10):
            path = os.path.join(root, name, b"%s%d.png" % (stem, number))
            with open(path, "wb") as file:
                pixels = random.integers(0, 255, (40, 48, 3), dtype=np.uint8)
                Image.fromarray(pixels).save(file, "png")


@pytest.mark.skipif(sys.platform != "linux", reason="others have no such names of files")
def test_all_commands_in_a_locale_without_letters(tmp_path):
    """Names in UTF-8, and of bytes that are not; stdout in Windows' letters of Europe."""
    classes = ["赤い鳥".encode(), "🐦 $x$".encode(), b"caf\xe9", b"_<b>&\"'", b"n" * 200]
    picture_folder(os.fsencode(tmp_path / "data"), classes, b"p\xe9")
    sizes = '{"patch_size": 16, "embed_dim": 32, "depth": 2, "num_heads": 2}'
    code = f"""
import json, os, sys
from dataclasses import replace
import lib.config, lib.cli.data, lib.cli.runs
from lib.__main__ import main
old = lib.config.preset
def tiny(*given, **named):
    config = old(*given, **named)
    config.model = lib.config.ModelConfig("vit_tiny_patch16_224", None, json.loads('{sizes}'))
    config.data = replace(config.data, image_size=(32, 32))
    config.ft = replace(config.ft, epochs=1, batch_size=8)
    return config
for module in (lib.config, lib.cli.data, lib.cli.runs):
    module.preset = tiny
for line in sys.stdin:
    code = main([os.fsdecode(word.encode()) for word in json.loads(line)])
    assert code == 0, line
"""
    commands = (
        ["check", "--details", str(tmp_path / "details.csv")],
        ["split", "--val-share", "0.2"],
        ["train", "ft", "--name", "_é 鳥"],
        ["train", "ft", "--name", "b/" + "b" * 240],
        ["evaluate", "_é 鳥", "b/" + "b" * 240, "--out", str(tmp_path / "out"), "--gallery", "2"],
    )
    environment = {name: value for name, value in os.environ.items() if name not in
                   ("MAPS", "SPLIT", "CACHE", "MODEL", "WEIGHTS")}  # fmt: skip
    environment |= {"PRESET": "folder", "DATA_DIR": str(tmp_path / "data"), "TQDM_DISABLE": "1"}
    environment |= {"RUNS_DIR": str(tmp_path / "r é 鳥"), "LC_ALL": "C"}
    environment |= {"PYTHONUTF8": "0", "PYTHONIOENCODING": "cp1252:strict"}
    done = subprocess.run(
        [sys.executable, "-c", code], input="\n".join(map(json.dumps, commands)).encode(),
        cwd=ROOT, env=environment, capture_output=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr.decode(errors="replace")
    assert b"\nwarning: 5 validation pictures: one is 20 points" in b"\n" + done.stderr
    assert b"\\udce9" in done.stdout and "Traceback" not in done.stderr.decode(errors="replace")
    for path in [*(tmp_path / "out").iterdir(), tmp_path / "details.csv"]:
        if path.suffix in (".csv", ".html", ".txt", ".md", ".json"):
            path.read_text(encoding="utf-8")
    page = (tmp_path / "out" / "gallery.html").read_text(encoding="utf-8")
    assert "_<b>" not in page
