"""What leaves the editor: figures, tables, code, masks and maps that other programs read.

Pixels are those of the picture as the model sees it, `Shown.image`: it was squeezed to that size.
A pixel has the value of the cell in which its middle lies ("nearest"), so cells stay exact.
"""

from __future__ import annotations

import base64
import io
import json
import mimetypes
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from functools import partial
from html import escape
from pathlib import Path
from typing import Any

import ipywidgets as widgets
import numpy as np
from PIL import Image

from lib import figures
from lib.data.corrections import save_correction
from lib.edit import AttentionEdit
from lib.files import claimed, file_name, make_folder, write_bytes
from lib.widgets.controller import EditorController, Outcome
from lib.widgets.panel import Panel, in_row
from lib.widgets.pixels import map_over_picture, png
from lib.widgets.snapshots import Shelf, ShelfPanel

FRAMES = 21  # of the animation: strength 0, .05, ..., 1
FRAME_MS, LAST_MS = 120, 1500  # how long a frame is shown, and the last one
LINKED = 3_000_000  # bytes of a file that is handed to the browser as well, as a link


