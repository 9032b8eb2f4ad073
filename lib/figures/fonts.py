"""Names in figures: letters that the font lacks, dollar signs, lengths that fit.

matplotlib draws a box for a letter that its font lacks, and warns once a letter. From the import of
this file on, any text of a figure takes such letters from the fonts of this machine; what none of
them has is spelled out, and one sentence says which package brings it.
"""

from __future__ import annotations

import re
import textwrap
import unicodedata
import warnings
from collections.abc import Callable
from functools import cache, wraps

import pandas as pd
from matplotlib.backend_bases import RendererBase
from matplotlib.cbook import is_math_text
from matplotlib.font_manager import findSystemFonts, fontManager, weight_dict
from matplotlib.ft2font import FT2Font
from matplotlib.text import Text

LONGEST = 24  # letters of a model's name that fit below a bar, or in a line above a map
LEGEND_LETTERS = 60  # letters of a name in a legend that has the figure's side to itself
PLAIN = re.compile(r"[\n -~]*")  # every font has these
ROMAN = re.compile(r".* (?:LETTER|SYLLABLE|VOWEL SIGN) (?:SMALL )?(\w+)$")
# Fonts of boxes, of colours, which matplotlib cannot draw, and of its mathematics.
NO_TEXT = re.compile("Last ?Resort|Colou?r|^cm[a-z]+[0-9]+$|^STIX(NonU|Size)")
EAST_ASIAN = re.compile("CJK|HIRAGANA|KATAKANA|HANGUL|BOPOMOFO|IDEOGRAPHIC|FULLWIDTH|HALFWIDTH")

_told: set[str] = set()  # packages that were named


def label(name: object, width: int = LONGEST) -> str:
    """A name that anybody may have chosen, as matplotlib shows it letter by letter.

    Lines break at `width` letters, or half as many that are twice as wide. Without this a pair of
    dollar signs makes mathematics, and a legend leaves out what starts with an underscore.
    """
    words = str(name)
    if 2 * sum(unicodedata.east_asian_width(letter) in "WF" for letter in words) > len(words):
        width //= 2
    if len(words) > width or not words.isprintable():
        words = textwrap.fill(words, width)
    return re.sub("^(?=_)", "\N{ZERO WIDTH SPACE}", words).replace("$", r"\$")


def labelled(table: pd.DataFrame) -> pd.DataFrame:
    """A table whose column variant holds labels, for legends."""
    return table.assign(variant=[label(name, LEGEND_LETTERS) for name in table["variant"]])


def spelled(letter: str) -> str:
    """A letter in ASCII: its sound or meaning where Unicode's name tells it, else its number."""
    name, category = unicodedata.name(letter, ""), unicodedata.category(letter)
    if category in ("Cf", "Sk") or name.startswith("VARIATION"):  # joins or colours emoji
        return ""
    if letter.isspace():
        return " "
    if category in ("Cs", "Cc"):  # half of a letter, of a file name that is not UTF-8; a signal
        return ascii(letter)[1:-1]
    if sound := ROMAN.match(name):
        return sound[1].lower()
    return f" ({name.lower()}) " if category == "So" else f" U+{ord(letter):04X} "


@cache
def _letters(path: str) -> frozenset[str]:
    return frozenset(map(chr, FT2Font(path).get_charmap()))


@cache
def families() -> dict[str, str]:
    """Of every letter that a font of this machine has, the family of the plainest that does."""
    known = {entry.fname for entry in fontManager.ttflist}
    for path in {*findSystemFonts()} - known:  # installed after matplotlib made its list
        try:
            fontManager.addfont(path)
        except Exception:  # as matplotlib does: a font may be broken in any way
            continue
    found: dict[str, str] = {}
    plain: dict[str, tuple] = {}
    for entry in fontManager.ttflist:
        if getattr(entry, "index", 0) or re.search(NO_TEXT, entry.name):
            continue
        weight = weight_dict.get(entry.weight, entry.weight)
        other = "Sans" not in entry.name and "Gothic" not in entry.name, "Mono" in entry.name
        rank = (*other, entry.style != "normal", abs(weight - 400), entry.name, entry.fname)
        plain[entry.name] = min(rank, plain.get(entry.name, rank))
    for rank in sorted(plain.values()):
        try:
            letters = FT2Font(rank[-1]).get_charmap()
        except (OSError, RuntimeError):  # deleted, or broken
            continue
        if 0x378 not in letters:  # else it claims to have what is no letter: boxes again
            for letter in map(chr, letters):
                found.setdefault(letter, rank[-2])
    return found


def _legible(text: Text) -> str:
    """What a text shows; its fonts are added to where they lack letters that others have."""
    words, font = text.get_text(), text.get_fontproperties()
    if PLAIN.fullmatch(words) or text.get_usetex():
        return words
    lacking, own = {*words} - {"\n"}, font.get_family()
    for family in own:
        one = font.copy()
        one.set_family(family)
        letters = _letters(str(fontManager.findfont(one)))
        lacking = {letter for letter in lacking if letter not in letters}
    if not lacking:
        return words
    if _has_math(words):  # which has fonts of its own, without such letters
        text.set_parse_math(False)
    found = {letter for letter in lacking & families().keys() if letter.isprintable()}
    if found:
        more = [families()[letter] for letter in sorted(found)]
        text.set_fontfamily(list(dict.fromkeys([*own, *more])))
    lacking -= found
    if not lacking:
        return words
    _tell(lacking)
    drawn = "".join(spelled(letter) if letter in lacking else letter for letter in words)
    width = max(LONGEST, *map(len, words.split("\n")))
    return "\n".join(textwrap.fill(" ".join(line.split()), width) for line in drawn.split("\n"))


def _has_math(words: str) -> bool:
    return any(map(is_math_text, words.split("\n")))


def _tell(lacking: set[str]) -> None:
    """Says, once a package, what brings these letters."""
    of_package: dict[str, list[str]] = {}
    for letter in sorted(lacking):
        name, category = unicodedata.name(letter, ""), unicodedata.category(letter)
        if name and spelled(letter).strip():
            package = "fonts-symbola" if category == "So" else "fonts-noto-core"
            package = "fonts-noto-cjk" if EAST_ASIAN.match(name) else package
            of_package.setdefault(package, []).append(letter)
    for package in of_package.keys() - _told:
        _told.add(package)
        warnings.warn(
            f"no font of this machine has {' '.join(of_package[package][:8])}: figures spell such "
            f"letters out. `apt install {package}` brings one (Debian, Ubuntu, Colab; elsewhere "
            "any font that has them); then restart Python",
            stacklevel=2,
        )


def _made_legible(layout: Callable) -> Callable:
    """`Text._get_layout`, through which every text goes, measured or drawn, whoever wrote it."""

    @wraps(layout)
    def of(self: Text, renderer: RendererBase) -> tuple:
        written, self._text = self._text, _legible(self)
        try:
            return layout(self, renderer)
        except ValueError:
            if not _has_math(self._text):
                raise
            self.set_parse_math(False)  # dollars that are no mathematics
            return layout(self, renderer)
        finally:
            self._text = written

    return of


if not hasattr(Text._get_layout, "__wrapped__"):  # a notebook may load this file again
    Text._get_layout = _made_legible(Text._get_layout)
