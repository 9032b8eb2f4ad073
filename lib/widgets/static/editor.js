// The picture with the attention map over it, to paint on. Plain ESM for anywidget: no bundler,
// nothing from a network.
//
// A `Store` is one widget in one page: the painted map and the messages to Python. A `View` is one
// place where the widget is displayed; all views of a page share its store. A cell is a patch of the
// picture, named by its number in reading order; null stands for "not painted".

const EPS = 1e-6;
const VALUE_STEP = 0.05; // of the keys + and -
const MOST = 0.99; // of the brush: beyond it, odds mean nothing
const MAX_SIZE = 12; // cells, of the brush
const MAX_ZOOM = 8;
const ZOOM_STEP = 1.5;
const PAN_STEP = 0.2; // of what is in view
const WORKING = 150; // ms without an answer until that is said
const SILENT = 15000; // ms without an answer until the kernel may be gone
const HELD = 150; // ms that a finger's stroke waits: a second finger makes it a pinch
const DRAFT_DELAY = 400; // ms until a change is in the draft
const LEVELS = [0.5, 0.75, 0.9]; // of the contours: the average patch, 3 and 9 times as much
const SHARED = [
  ...["tool", "view", "brush_value", "brush_size", "soft_edge", "opacity", "grid_lines"],
];
const SHOWN = ["own", "base", "strength", "sharpness", "colours", "odds"]; // repaint the map

const clamp = (x, low, high) => Math.min(Math.max(x, low), high);
const round = (x) => (x === null ? null : Math.round(x * 1e4) / 1e4);

// ---------------------------------------------------------------------------------- arithmetic

const logit = (value) => {
  const inside = clamp(value, EPS, 1 - EPS);
  return Math.log(inside / (1 - inside));
};

/** What the edit makes of a painted cell: asked_map of history.py, for one cell. */
export function asked(value, own, strength, sharpness) {
  if (strength === 1 && sharpness === 1) return value;
  const wanted = clamp(sharpness * logit(value), logit(0), logit(1));
  return 1 / (1 + Math.exp(-(1 - strength) * logit(own) - strength * wanted));
}

/** A value in words: v / (1 - v) is how many times as much as the average patch it asks for. */
export function oddsText(value) {
  if (value < EPS) return "nothing";
  if (value > 1 - EPS) return "all there is";
  const ratio = value / (1 - value);
  const size = Math.max(ratio, 1 / ratio);
  const times = size < 9.95 ? String(Math.round(10 * size) / 10) : String(Math.round(size));
  if (times === "1") return "as the average patch";
  return ratio > 1 ? `${times} × the average patch` : `1/${times} of the average patch`;
}

/** Distance of a point to the line from one point to another; a point is [x, y]. */
export function distance([x, y], [x0, y0], [x1, y1]) {
  const [dx, dy] = [x1 - x0, y1 - y0];
  const length = dx * dx + dy * dy;
  const along = length ? clamp(((x - x0) * dx + (y - y0) * dy) / length, 0, 1) : 0;
  return Math.hypot(x - x0 - along * dx, y - y0 - along * dy);
}

/**
 * How much a brush that moves from one point to another covers each cell: [cell, share] pairs.
 * Points and `size`, the brush's diameter, are in cells; `soft` is the share of the radius over
 * which the brush fades out. The cell under the pointer is always covered.
 */
export function covered(from, to, { size, soft }, rows, columns) {
  const radius = Math.max(size / 2, 0.5);
  const [left, right] = [Math.min(from[0], to[0]) - radius, Math.max(from[0], to[0]) + radius];
  const [top, bottom] = [Math.min(from[1], to[1]) - radius, Math.max(from[1], to[1]) + radius];
  const found = [];
  for (let r = Math.max(Math.floor(top), 0); r <= Math.min(bottom, rows - 1); r++) {
    for (let c = Math.max(Math.floor(left), 0); c <= Math.min(right, columns - 1); c++) {
      const away = distance([c + 0.5, r + 0.5], from, to);
      let share = soft ? clamp((radius - away) / (soft * radius), 0, 1) : Number(away <= radius);
      if (c === Math.floor(to[0]) && r === Math.floor(to[1])) share = 1;
      if (share > 0) found.push([r * columns + c, share]);
    }
  }
  return found;
}

/** The cells that a fill from `start` reaches: side by side, and painted alike or not at all. */
export function filled(painted, start, rows, columns) {
  const reached = new Set([start]);
  for (const cell of reached) {
    const [r, c] = [Math.floor(cell / columns), cell % columns];
    const beside = [
      r > 0 && cell - columns,
      r < rows - 1 && cell + columns,
      c > 0 && cell - 1,
      c < columns - 1 && cell + 1,
    ];
    for (const next of beside) {
      if (next !== false && painted[next] === painted[start]) reached.add(next);
    }
  }
  return [...reached];
}

/**
 * Where a map crosses a level: pairs of points [x, y] in cells, joined by straight lines between the
 * middles of the cells (marching squares); at the border the map goes on as it ends.
 */
export function contour(map, rows, columns, level) {
  const at = (r, c) => map[clamp(r, 0, rows - 1) * columns + clamp(c, 0, columns - 1)];
  const middle = (k, count) => clamp(k + 0.5, 0, count);
  const lines = [];
  for (let r = -1; r < rows; r++) {
    for (let c = -1; c < columns; c++) {
      const corners = [at(r, c), at(r, c + 1), at(r + 1, c + 1), at(r + 1, c)];
      const above = corners.map((value) => value >= level);
      if (above.every((one) => one === above[0])) continue;
      const [left, right] = [middle(c, columns), middle(c + 1, columns)];
      const [top, bottom] = [middle(r, rows), middle(r + 1, rows)];
      const places = [[left, top], [right, top], [right, bottom], [left, bottom]];
      const crossed = [];
      for (let k = 0; k < 4; k++) {
        const next = (k + 1) % 4;
        if (above[k] === above[next]) continue;
        const along = (level - corners[k]) / (corners[next] - corners[k]);
        const [[x0, y0], [x1, y1]] = [places[k], places[next]];
        crossed.push([x0 + along * (x1 - x0), y0 + along * (y1 - y0)]);
      }
      // Of a saddle, the two high corners are one region where the mean of the four is high.
      const mean = corners.reduce((sum, value) => sum + value, 0) / 4;
      if (crossed.length === 4 && above[0] !== mean >= level) crossed.push(crossed.shift());
      for (let k = 0; k < crossed.length; k += 2) lines.push([crossed[k], crossed[k + 1]]);
    }
  }
  return lines;
}

// -------------------------------------------------------------------------------------- drafts

const DRAFT = "sigmoid-attention draft: ";

/** What was painted, kept by the browser by picture; without its storage nothing is kept. */
export const drafts = {
  /** { run, cells } as it was written, or null. `run` names the tool that wrote it. */
  read(key, size) {
    try {
      const { run, cells } = JSON.parse(localStorage.getItem(DRAFT + key));
      const isShare = (value) => typeof value === "number" && value >= 0 && value <= 1;
      const isCell = (cell) => Number.isInteger(cell) && cell >= 0 && cell < size;
      const fine = cells.filter(([cell, value]) => isCell(cell) && isShare(value));
      return fine.length ? { run, cells: fine } : null;
    } catch {
      return null; // there is none, or it is not ours
    }
  },

  write(key, draft) {
    try {
      if (!draft.cells.length) localStorage.removeItem(DRAFT + key);
      else localStorage.setItem(DRAFT + key, JSON.stringify(draft));
    } catch {
      // no storage, or it is full: painting goes on without a draft
    }
  },
};

// ---------------------------------------------------------------------------------- connection

// States of a kernel that had a widget. Where another page restarts it, only its start is heard of.
const GONE = ["terminating", "restarting", "autorestarting", "starting", "dead"];

/**
 * Whether the kernel of a widget is still there and busy: `tell(gone, busy)`. After a restart its
 * widgets are gone for good. JupyterLab and Notebook 7 say it; elsewhere only silence does.
 * Returns how to stop listening.
 */
function listenToKernel(model, tell) {
  const context = model.widget_manager?.context?.sessionContext;
  const onStatus = (_, status) => tell(GONE.includes(status), status === "busy");
  const onKernel = () => tell(true, false);
  context?.statusChanged?.connect(onStatus);
  context?.kernelChanged?.connect(onKernel);
  return () => {
    context?.statusChanged?.disconnect(onStatus);
    context?.kernelChanged?.disconnect(onKernel);
  };
}

// --------------------------------------------------------------------------------------- store

const newPage = () => Math.random().toString(36).slice(2, 12);

/**
 * The painted map of a widget in one page, and its messages to Python.
 *
 * Several pages may paint on one map. A stroke therefore travels as what it changes, cells and
 * their values, and Python lays it over the map that it has then; it answers with that map. What is
 * shown is Python's map, and over it what Python has not answered yet.
 *
 * A stroke is painted here at once and waits in `queue`; so do undo and redo. One message at most
 * is on its way: the next goes when the last one is answered, with all that the first stroke that
 * waits has changed meanwhile. So a fast drag costs few messages, and none of its end is lost.
 *
 * A stroke belongs to the picture on which it began: what it had painted when another one was opened
 * still goes there, and what follows goes nowhere.
 */
export class Store {
  constructor(model) {
    this.model = model;
    this.views = new Set();
    this.page = newPage();
    this.queue = []; // strokes and actions that Python has not taken in full
    this.drawing = new Set(); // strokes with the hand still down
    this.flying = null; // { item, n } of the message on its way
    this.sentCount = 0;
    this.strokeCount = 0;
    this.gone = this.busy = false; // the kernel
    this.late = ""; // "working" or "silent" while an answer is
    this.offer = null; // a draft from before
    this.adopt();
  }

  get own() {
    return this.model.get("own");
  }

  /** Python has answered, or changed the map, or both in one message. */
  update() {
    if (this.flying && this.model.get("answered")[this.page] === this.flying.n) {
      this.flying.item.flying = new Map();
      this.flying = null;
      this.timers.forEach(clearTimeout);
      this.late = "";
    }
    this.adopt();
    this.pump();
    this.tell();
  }

  /** Takes Python's map, and lays over it what Python has not answered yet. */
  adopt() {
    const { model } = this;
    const isOpen = ["subject", "rows", "columns"].every((name) => model.get(name) === this[name]);
    if (!isOpen) this.openPicture();
    const painted = [...model.get("painted")];
    for (const item of this.queue) {
      if (item.subject !== this.subject || item.of !== painted.length) continue;
      for (const cells of [item.flying, item.waiting]) {
        for (const [cell, value] of cells) painted[cell] = value;
      }
    }
    this.painted = painted;
    for (const stroke of this.drawing) {
      painted.forEach((value, cell) => {
        if (stroke.cells.get(cell) === value) return;
        stroke.before[cell] = value; // somebody else's; nothing of the stroke is left of it
        stroke.cells.delete(cell);
      });
    }
    this.changed();
  }

  openPicture() {
    if (this.later !== undefined) this.saveDraft(); // of the picture before
    for (const stroke of this.drawing) Object.assign(stroke, { over: true, done: true });
    this.drawing.clear();
    for (const name of ["subject", "rows", "columns"]) this[name] = this.model.get(name);
    this.draftKey = this.model.get("draft_key");
    const draft = drafts.read(this.draftKey, this.rows * this.columns);
    const painted = this.model.get("painted");
    const isNews = ([cell, value]) => painted[cell] !== value;
    const isOffered = draft && draft.run !== this.model.get("run") && draft.cells.some(isNews);
    this.offer = isOffered ? draft : null;
    this.tell();
  }

  /** A new stroke; it counts from its first change on. A stroke that is `held` is not sent yet. */
  begin({ held = false } = {}) {
    const cells = { cells: new Map(), waiting: new Map(), flying: new Map(), told: new Set() };
    const { subject, painted } = this; // and how many cells there are: others at another size
    const stroke = { ...cells, subject, of: painted.length, before: [...painted], held };
    this.drawing.add(stroke);
    return Object.assign(stroke, { shares: new Map(), done: false, over: false });
  }

  /** Lets a stroke that was held go. */
  release(stroke) {
    stroke.held = false;
    this.pump();
  }

  end(stroke) {
    this.drawing.delete(stroke);
    stroke.done = true;
    this.release(stroke);
  }

  /** Ends a stroke and takes back what it has painted. */
  cancel(stroke) {
    this.set(stroke, [...stroke.cells.keys()].map((cell) => [cell, stroke.before[cell]]));
    this.end(stroke);
  }

  /** Lets a stroke set cells: [cell, value or null] pairs. */
  set(stroke, pairs) {
    const changes = pairs.filter(([cell, value]) => this.painted[cell] !== value);
    if (!changes.length || stroke.over) return;
    if (!this.queue.includes(stroke)) {
      stroke.number = ++this.strokeCount;
      this.queue.push(stroke);
    }
    for (const [cell, value] of changes) {
      this.painted[cell] = value;
      if (value !== stroke.before[cell]) stroke.cells.set(cell, value);
      else stroke.cells.delete(cell);
      // Given back before Python has heard of it: nothing of the stroke, so it says nothing.
      if (stroke.cells.has(cell) || stroke.told.has(cell)) stroke.waiting.set(cell, value);
      else stroke.waiting.delete(cell);
    }
    this.changed();
    this.pump();
  }

  /** A stretch of a stroke with the brush, or with the eraser where `value` is null. */
  brush(stroke, from, to, brush, value) {
    const pairs = [];
    for (const [cell, share] of covered(from, to, brush, this.rows, this.columns)) {
      // The most that the stroke ever covered counts: how often it passes must not matter.
      const most = Math.max(share, stroke.shares.get(cell) ?? 0);
      stroke.shares.set(cell, most);
      if (value !== null) {
        const before = stroke.before[cell] ?? this.own[cell];
        pairs.push([cell, round((1 - most) * before + most * value)]);
      } else if (most >= 0.5) {
        pairs.push([cell, null]);
      }
    }
    this.set(stroke, pairs);
  }

  /** "undo" or "redo", which Python does. */
  act(action) {
    if (this.gone) return;
    const nothing = { waiting: new Map(), flying: new Map() };
    this.queue.push({ ...nothing, action, subject: this.subject, isNew: true, done: true });
    this.pump();
  }

  pump() {
    const waits = (item) => item.isNew || (item.waiting.size > 0 && !item.held);
    const isOver = (item) => item.done && !waits(item) && this.flying?.item !== item;
    while (this.queue.length && isOver(this.queue[0])) this.queue.shift();
    const item = this.queue[0];
    if (this.flying || this.gone || !item || !waits(item)) return;
    const { action = "", number, subject, of, waiting } = item;
    Object.assign(item, { flying: waiting, waiting: new Map(), isNew: false });
    for (const cell of waiting.keys()) item.told.add(cell);
    this.flying = { item, n: ++this.sentCount };
    const late = (state) => () => {
      this.late = state;
      this.tell();
    };
    this.timers = [setTimeout(late("working"), WORKING), setTimeout(late("silent"), SILENT)];
    const { page, flying } = this;
    this.model.send({ page, n: flying.n, subject, action, number, of, cells: [...waiting] });
  }

  /** What is known of the kernel. Once gone it is gone: another one does not know this widget. */
  onKernel(gone, busy) {
    this.gone ||= gone;
    clearTimeout(this.busyTimer);
    const say = () => {
      this.busy = busy;
      this.tell();
    };
    if (busy && !this.gone) this.busyTimer = setTimeout(say, WORKING);
    else say();
  }

  /** "gone", "silent", "working", or "". */
  get state() {
    return this.gone ? "gone" : this.late || (this.busy ? "working" : "");
  }

  // -- the draft

  changed() {
    this.later ??= setTimeout(() => this.saveDraft(), DRAFT_DELAY);
    for (const view of this.views) view.repaint();
  }

  /** Keeps what is painted; a draft that is still offered stays in it, and is offered again. */
  saveDraft() {
    clearTimeout(this.later);
    this.later = undefined;
    if (!this.draftKey) return;
    const cells = new Map(this.offer?.cells);
    this.painted.forEach((value, cell) => value !== null && cells.set(cell, value));
    const run = this.offer?.run ?? this.model.get("run");
    drafts.write(this.draftKey, { run, cells: [...cells] });
  }

  /** Takes or leaves the draft that is offered; to take it is one stroke. */
  answerOffer(isTaken) {
    const { cells } = this.offer;
    this.offer = null;
    if (isTaken) {
      const stroke = this.begin();
      this.set(stroke, cells);
      this.end(stroke);
    }
    this.saveDraft();
    this.tell();
  }

  tell() {
    for (const view of this.views) view.showState();
  }
}

// ------------------------------------------------------------------------------------ elements

/** An element with attributes, and children that are elements or text. */
function element(tag, attributes = {}, ...children) {
  const made = document.createElement(tag);
  for (const [name, value] of Object.entries(attributes)) made.setAttribute(name, value);
  made.append(...children);
  return made;
}

let names = 0;
const newName = () => `ae-${Date.now().toString(36)}-${names++}`;

const KEYS = [
  ["Arrows", "move the cell cursor"],
  ["Space, Enter", "use the tool at the cursor (rectangle: first one corner, then the other)"],
  ["Delete", "erase with the brush"],
  ["+ and -", "brush value"],
  ["[ and ]", "brush size"],
  ["Z and X", "zoom in and out; F shows all, Shift with arrows moves the picture"],
  ["U or Ctrl-Z", "undo, wherever the focus is in the tool"],
  ["R or Ctrl-Y", "redo, likewise"],
  ["O, held", "the picture without the map, likewise"],
  ["G", "hide the true class and the verdict, and show them again"],
  ["Escape", "give up a rectangle"],
];
const POINTERS =
  "Mouse: Ctrl with the wheel zooms, the middle button or Space moves the picture. " +
  "Touch: one finger paints, two zoom and move.";
const VIEWS = {
  contour: "Contours",
  dimming: "Dimming",
  heat: "Heat map",
};
const STATES = {
  gone: "Not connected: what you painted is kept here. Run the cell again to go on with it.",
  silent:
    "No answer from the kernel for a while: it is busy, or gone. What you painted is kept here.",
};
// Ticks of the scale: a value, what it asks for, and whether a narrow scale does without it. Without
// odds there are only values.
const TICKS = [
  [0, "0"],
  [0.1, "1/9 ×"],
  [0.3, "less", "ae-minor"],
  [0.5, "average patch"],
  [0.7, "more", "ae-minor"],
  [0.9, "9 ×"],
  [MOST, "99 ×", "ae-minor"],
];
const PLAIN_TICKS = [0, 0.25, 0.5, 0.75, MOST].map((value) => [value, value.toFixed(2)]);

/** Whether keys on an element are text that somebody writes. */
function isText(target) {
  const others = ["range", "radio", "checkbox", "button", "submit"];
  const isField = target.tagName === "INPUT" && !others.includes(target.type);
  return isField || target.tagName === "TEXTAREA" || target.isContentEditable;
}

// ---------------------------------------------------------------------------------------- view

class View {
  constructor(store, model, el) {
    Object.assign(this, { store, model });
    this.stop = new AbortController();
    this.cursor = [0, 0]; // row, column of the keyboard's cell
    this.keyboard = false; // whether the cursor is shown
    this.pointer = null; // [x, y] in cells, where it hovers
    this.stroke = null; // the one the pointer is drawing
    this.corner = null; // cell [x, y] of a rectangle's first corner
    this.zoom = 1;
    this.origin = [0, 0]; // left and top of what is in view, as shares of the picture
    this.fingers = new Map(); // where each is, by pointer
    this.pinch = null; // middle and distance of two fingers; { } until the last one is lifted
    this.drag = null; // [x, y] of the pointer that moves the picture
    this.build(el);
    this.listen();
    const { signal } = this.stop;
    const on = (name, react) => {
      model.on(`change:${name}`, react);
      signal.addEventListener("abort", () => model.off(`change:${name}`, react));
    };
    on("picture", () => this.showPicture());
    for (const name of SHOWN) on(name, () => this.repaint());
    for (const name of [...SHARED, "odds"]) on(name, () => this.showControls());
    on("sentence", () => (this.spoken.textContent = model.get("sentence")));
    store.views.add(this);
    this.showPicture();
    this.showControls();
    this.showState();
  }

  remove() {
    this.store.views.delete(this);
    if (this.stroke) this.store.end(this.stroke);
    this.stop.abort();
    this.sizes.disconnect();
    cancelAnimationFrame(this.frame);
    clearTimeout(this.holding);
  }

  // -- building

  build(el) {
    const help = newName();
    this.picture = element("img", { class: "ae-picture", alt: "", draggable: "false" });
    this.heat = element("canvas", { class: "ae-heat" });
    this.marks = element("canvas", {
      class: "ae-marks",
      tabindex: "0",
      role: "application",
      "aria-describedby": help,
    });
    this.sheet = element("div", { class: "ae-sheet" }, this.picture, this.heat);
    this.working = element("div", { class: "ae-working", hidden: "" }, "working…");
    this.stage = element("div", { class: "ae-stage" }, this.sheet, this.marks, this.working);
    this.banner = element("div", { class: "ae-banner", role: "status" });
    this.readout = element("div", { class: "ae-readout" });
    this.live = element("div", { class: "ae-hidden", "aria-live": "polite" }); // the cell
    this.spoken = element("div", { class: "ae-hidden", "aria-live": "polite" }); // the outcome
    const keys = KEYS.map(([key, what]) =>
      element("div", {}, element("kbd", {}, key), ` ${what}`),
    );
    this.controls = {};
    this.ticks = element("div", { class: "ae-ticks", "aria-hidden": "true" });
    const twoDigits = (x) => x.toFixed(2);
    const input = this.slider("brush_value", "Brush value", 0, MOST, 0.01, (x) =>
      this.model.get("odds") ? `${twoDigits(x)} = ${oddsText(x)}` : twoDigits(x),
    );
    this.controls.brush_value.input.classList.add("ae-scale");
    const value = element("div", { class: "ae-value" }, input, this.ticks);
    const sliders = element(
      "div",
      { class: "ae-sliders" },
      this.slider("brush_size", "Brush size", 1, MAX_SIZE, 0.5, (x) => String(x)),
      this.slider("soft_edge", "Soft edge", 0, 1, 0.05, twoDigits),
      this.slider("opacity", "Map opacity", 0, 1, 0.01, twoDigits),
    );
    const grid = element("input", { type: "checkbox" });
    this.controls.grid_lines = { input: grid };
    this.bind("grid_lines", grid, () => grid.checked);
    const below = element(
      "div",
      { class: "ae-below" },
      this.choice("view", "Map", Object.entries(VIEWS)),
      element("label", { class: "ae-check" }, grid, " Grid"),
    );
    const details = element(
      "details",
      { class: "ae-keys" },
      element("summary", {}, "Keys, mouse and touch"),
      element("div", { id: help }, ...keys, element("div", {}, POINTERS)),
    );
    const tools = ["brush", "erase", "rectangle", "fill"];
    const texts = tools.map((tool) => [tool, tool[0].toUpperCase() + tool.slice(1)]);
    const top = element("div", { class: "ae-top" }, this.choice("tool", "Tool", texts), this.lens());
    // What is set seldom is below: picture and scores are to be seen together.
    const above = [top, value, this.banner, this.stage, this.readout];
    const shown = [...above, sliders, below, details];
    this.root = element("div", { class: "ae-paint" }, ...shown, this.live, this.spoken);
    el.append(this.root);
  }

  /** Radio buttons side by side that write a trait. */
  choice(name, legend, entries) {
    const group = newName();
    const set = element("fieldset", { class: "ae-tools" });
    set.append(element("legend", { class: "ae-hidden" }, legend));
    this.controls[name] = {};
    for (const [value, text] of entries) {
      const input = element("input", { type: "radio", name: group, value });
      this.controls[name][value] = input;
      this.bind(name, input, () => value);
      set.append(element("label", {}, input, text));
    }
    return set;
  }

  /** Buttons that zoom, and one that shows the picture alone as long as it is held. */
  lens() {
    const { signal } = this.stop;
    const button = (text, name, react) => {
      const made = element("button", { type: "button", "aria-label": name, title: name }, text);
      if (react) made.addEventListener("click", react, { signal });
      return made;
    };
    const middle = () => {
      const { left, top, width, height } = this.marks.getBoundingClientRect();
      return [left + width / 2, top + height / 2];
    };
    this.buttons = {
      out: button("−", "Zoom out", () => this.zoomAt(middle(), 1 / ZOOM_STEP)),
      in: button("+", "Zoom in", () => this.zoomAt(middle(), ZOOM_STEP)),
      fit: button("Fit", "Fit", () => this.fit()),
      original: button("Original", "Original: hold to see the picture without the map"),
    };
    const { original } = this.buttons;
    const hold = (isHeld) => (event) => {
      const isKey = event.type.startsWith("key");
      if (isKey && event.key !== " " && event.key !== "Enter") return;
      if (isKey) event.preventDefault();
      this.showOriginal(isHeld);
    };
    for (const type of ["pointerdown", "keydown"]) {
      original.addEventListener(type, hold(true), { signal });
    }
    for (const type of ["pointerup", "pointercancel", "pointerleave", "keyup", "blur"]) {
      original.addEventListener(type, type === "blur" ? () => this.showOriginal(false) : hold(false), {
        signal,
      });
    }
    return element("div", { class: "ae-lens" }, ...Object.values(this.buttons));
  }

  slider(name, text, min, max, step, format) {
    const input = element("input", { type: "range", min, max, step, "aria-label": text });
    const output = element("output");
    this.controls[name] = { input, output, format };
    this.bind(name, input, () => Number(input.value));
    return element("label", { class: "ae-slider" }, element("span", {}, text), input, output);
  }

  /** A control writes a trait: at once for all views, to Python when the hand rests. */
  bind(name, input, read) {
    const { signal } = this.stop;
    input.addEventListener("input", () => this.model.set(name, read()), { signal });
    input.addEventListener("change", () => this.model.save_changes(), { signal });
  }

  // -- showing

  showPicture() {
    this.picture.src = this.model.get("picture");
    this.corner = null;
    const last = [this.model.get("rows") - 1, this.model.get("columns") - 1];
    this.cursor = this.cursor.map((place, axis) => clamp(place, 0, Math.max(last[axis], 0)));
    this.fit();
    this.repaint();
  }

  showControls() {
    const tool = this.model.get("tool");
    this.controls.tool[tool].checked = true;
    this.controls.view[this.model.get("view")].checked = true;
    this.controls.grid_lines.input.checked = this.model.get("grid_lines");
    for (const { input, output, format, name } of this.sliders()) {
      const value = this.model.get(name);
      input.value = value;
      output.textContent = format(value);
      input.setAttribute("aria-valuetext", output.textContent);
    }
    const ticks = this.model.get("odds") ? TICKS : PLAIN_TICKS;
    const marks = ticks.map(([value, text, name = ""]) =>
      element("span", { class: name, style: `left: ${(100 * value) / MOST}%` }, text),
    );
    this.ticks.replaceChildren(...marks);
    if (tool !== "rectangle") this.corner = null;
    this.heat.style.opacity = this.model.get("opacity");
    if (this.painted !== this.model.get("view")) this.repaint();
    this.mark();
  }

  sliders() {
    const found = Object.entries(this.controls).filter(([, control]) => control.output);
    return found.map(([name, control]) => ({ name, ...control }));
  }

  /** What is known of the kernel, and whether a draft is offered. */
  showState() {
    const { state, offer } = this.store;
    this.working.hidden = state !== "working";
    const tool = this.root.closest(".ae-tool") ?? this.root;
    tool.classList.toggle("ae-late", Boolean(this.store.late));
    tool.classList.toggle("ae-gone", state === "gone");
    if (state === "gone") this.disableAround(tool);
    const said = `${state}${offer?.cells.length ?? ""}`;
    if (said === this.said) return;
    this.said = said;
    const shown = [];
    if (STATES[state]) shown.push(element("span", {}, STATES[state]));
    if (offer) shown.push(...this.offered(offer.cells.length));
    this.banner.replaceChildren(...shown);
  }

  offered(count) {
    const choose = (text, isTaken) => {
      const button = element("button", { type: "button" }, text);
      button.addEventListener("click", () => {
        this.store.answerOffer(isTaken);
        this.marks.focus({ preventScroll: true });
      });
      return button;
    };
    const words = `Draft of ${count} ${count === 1 ? "cell" : "cells"} from before:`;
    return [element("span", {}, words), choose("Restore", true), choose("Discard", false)];
  }

  /** What Python alone can do is no longer done. */
  disableAround(tool) {
    for (const control of tool.querySelectorAll("button, input, select, textarea")) {
      if (this.root.contains(control)) continue;
      control.disabled = true;
      control.title = "Not connected: run the cell again";
    }
  }

  /** The map itself: one pixel a cell, which the browser enlarges. */
  repaint() {
    const { rows, columns, painted } = this.store;
    const { own, base, strength, sharpness, colours, odds } = this.traits(SHOWN);
    if (!rows || base.length !== painted.length) return;
    if (this.heat.width !== columns || this.heat.height !== rows || this.colours !== colours) {
      Object.assign(this.heat, { width: columns, height: rows });
      this.marks.setAttribute(
        "aria-label",
        `Attention map to paint on, ${rows} rows and ${columns} columns`,
      );
      this.colours = colours;
      this.root.style.setProperty("--ae-scale", gradient(colours));
    }
    const view = (this.painted = this.model.get("view"));
    const [low, high] = odds ? [0, 0.5] : [Math.min(...base), Math.max(...base)];
    const pixels = new ImageData(columns, rows);
    for (let cell = 0; cell < painted.length; cell++) {
      const value = this.valueOf(cell, painted, own, base, strength, sharpness);
      if (painted[cell] !== null || view === "heat") {
        const at = 3 * Math.round(255 * value);
        pixels.data.set([colours[at], colours[at + 1], colours[at + 2], 255], 4 * cell);
      } else if (view === "dimming") {
        // Dark where less is asked for than of the average patch.
        pixels.data[4 * cell + 3] = 255 * clamp((high - value) / (high - low || 1), 0, 1);
      }
    }
    this.heat.getContext("2d").putImageData(pixels, 0, 0);
    this.mark();
  }

  traits(list) {
    return Object.fromEntries(list.map((name) => [name, this.model.get(name)]));
  }

  valueOf(cell, painted, own, base, strength, sharpness) {
    const value = painted[cell];
    return value === null ? base[cell] : asked(value, own[cell], strength, sharpness);
  }

  /** Asks for the lines over the map to be drawn with the next frame. */
  mark() {
    this.frame ??= requestAnimationFrame(() => {
      this.frame = undefined;
      this.drawMarks();
      this.readout.textContent = this.readoutText();
    });
  }

  /** Never empty: what stands below must not move. */
  readoutText() {
    if (this.pointer) return this.describe(this.cellAt(this.pointer));
    const count = this.store.painted.filter((value) => value !== null).length;
    if (!count) return "Nothing is painted.";
    return `${count} ${count === 1 ? "cell is" : "cells are"} painted.`;
  }

  /** Width and height of a cell, and where the map begins, in the canvas's dots. */
  scale() {
    const { rows, columns } = this.store;
    const [width, height] = [this.marks.width * this.zoom, this.marks.height * this.zoom];
    const [x0, y0] = [-this.origin[0] * width, -this.origin[1] * height];
    return { dx: width / columns, dy: height / rows, x0, y0 };
  }

  drawMarks() {
    const { rows, columns, painted } = this.store;
    const context = this.marks.getContext("2d");
    const { dx, dy, x0, y0 } = this.scale();
    const dot = window.devicePixelRatio || 1;
    context.resetTransform();
    context.clearRect(0, 0, this.marks.width, this.marks.height);
    context.translate(x0, y0);
    if (!this.original) {
      if (this.model.get("grid_lines")) {
        const lines = new Path2D();
        for (let c = 1; c < columns; c++) line(lines, c * dx, 0, c * dx, rows * dy);
        for (let r = 1; r < rows; r++) line(lines, 0, r * dy, columns * dx, r * dy);
        strokePath(context, lines, "rgba(255, 255, 255, 0.45)", dot);
      }
      if (this.model.get("view") === "contour") this.drawContours(context, dx, dy, dot);
      const border = new Path2D();
      const inside = (r, c) => r >= 0 && c >= 0 && r < rows && c < columns;
      const own = (r, c) => inside(r, c) && painted[r * columns + c] !== null;
      for (let r = 0; r <= rows; r++) {
        for (let c = 0; c <= columns; c++) {
          if (own(r, c) !== own(r - 1, c)) line(border, c * dx, r * dy, (c + 1) * dx, r * dy);
          if (own(r, c) !== own(r, c - 1)) line(border, c * dx, r * dy, c * dx, (r + 1) * dy);
        }
      }
      outlined(context, border, dot);
    }
    this.drawPointer(context, dx, dy, dot);
  }

  /** Lines of equal value of the map where nothing is painted, in the colours of the scale. */
  drawContours(context, dx, dy, dot) {
    const { rows, columns } = this.store;
    const { base, odds, colours } = this.traits(["base", "odds", "colours"]);
    if (base.length !== rows * columns) return;
    if (this.contoured !== base) {
      this.contoured = base;
      const [low, high] = [Math.min(...base), Math.max(...base)];
      const levels = odds ? LEVELS : [0.25, 0.5, 0.75].map((share) => low + share * (high - low));
      this.contours = levels.map((level, k) => [k, contour(base, rows, columns, level)]);
    }
    for (const [k, lines] of this.contours) {
      const path = new Path2D();
      for (const [[xa, ya], [xb, yb]] of lines) line(path, xa * dx, ya * dy, xb * dx, yb * dy);
      const at = 3 * Math.round(255 * LEVELS[k]);
      context.lineCap = "round";
      strokePath(context, path, "rgba(0, 0, 0, 0.6)", (3 + k) * dot);
      strokePath(context, path, `rgb(${colours.slice(at, at + 3)})`, (1.5 + 0.5 * k) * dot);
    }
  }

  /** The brush under the pointer, the keyboard's cell, a rectangle that waits for its corner. */
  drawPointer(context, dx, dy, dot) {
    const shape = new Path2D();
    const tool = this.model.get("tool");
    if (this.pointer && (tool === "brush" || tool === "erase")) {
      const radius = Math.max(this.model.get("brush_size") / 2, 0.5);
      const [x, y] = this.pointer;
      shape.ellipse(x * dx, y * dy, radius * dx, radius * dy, 0, 0, 2 * Math.PI);
    }
    if (this.keyboard) {
      const [r, c] = this.cursor;
      shape.rect(c * dx + 2 * dot, r * dy + 2 * dot, dx - 4 * dot, dy - 4 * dot);
      if (this.corner) {
        const [top, left] = [Math.min(r, this.corner[1]), Math.min(c, this.corner[0])];
        const [bottom, right] = [Math.max(r, this.corner[1]) + 1, Math.max(c, this.corner[0]) + 1];
        shape.rect(left * dx, top * dy, (right - left) * dx, (bottom - top) * dy);
      }
    }
    context.setLineDash([4 * dot, 3 * dot]);
    outlined(context, shape, dot);
    context.setLineDash([]);
  }

  describe([r, c]) {
    const { rows, columns, painted } = this.store;
    const cell = r * columns + c;
    const { own, base, strength, sharpness, odds } = this.traits(SHOWN);
    if (r >= rows || base.length !== painted.length) return "";
    const value = this.valueOf(cell, painted, own, base, strength, sharpness);
    const whose = painted[cell] === null ? "" : `, painted (model ${own[cell].toFixed(2)})`;
    const times = odds ? `, ${oddsText(value)}` : "";
    return `row ${r + 1}, column ${c + 1}, value ${value.toFixed(2)}${whose}${times}`;
  }

  // -- zoom

  /** Zooms by a factor, so that a place [x, y] of the window stays where it is. */
  zoomAt([x, y], factor) {
    const { left, top, width, height } = this.marks.getBoundingClientRect();
    const inView = [(x - left) / width, (y - top) / height];
    const zoom = clamp(this.zoom * factor, 1, MAX_ZOOM);
    this.origin = this.origin.map((at, k) => at + inView[k] / this.zoom - inView[k] / zoom);
    this.zoom = zoom;
    this.pan([0, 0]);
  }

  /** Moves what is in view by shares of the picture. */
  pan(by) {
    this.origin = this.origin.map((at, k) => clamp(at + by[k], 0, 1 - 1 / this.zoom));
    const [x, y] = this.origin.map((at) => `${-100 * at}%`);
    this.sheet.style.transform = `scale(${this.zoom}) translate(${x}, ${y})`;
    const { out, fit } = this.buttons;
    out.disabled = fit.disabled = this.zoom <= 1;
    this.buttons.in.disabled = this.zoom >= MAX_ZOOM;
    this.mark();
  }

  fit() {
    this.zoom = 1;
    this.pan([0, 0]);
  }

  /** Pans by a way of the pointer, in pixels of the window. */
  panBy([x, y]) {
    const { width, height } = this.marks.getBoundingClientRect();
    this.pan([-x / width / this.zoom, -y / height / this.zoom]);
  }

  /** The keyboard's cell comes into view. */
  follow() {
    const { rows, columns } = this.store;
    const [r, c] = this.cursor;
    const spans = [[c, columns], [r, rows]];
    this.pan(
      spans.map(([k, count], side) => {
        const [first, last] = [k / count, (k + 1) / count];
        const [low, high] = [this.origin[side], this.origin[side] + 1 / this.zoom];
        return first < low ? first - low : Math.max(last - high, 0);
      }),
    );
  }

  showOriginal(isHeld) {
    if (Boolean(this.original) === isHeld) return;
    this.original = isHeld;
    this.heat.style.visibility = isHeld ? "hidden" : "";
    this.buttons.original.setAttribute("aria-pressed", isHeld);
    this.mark();
  }

  // -- the pointer and the keyboard

  listen() {
    const { signal } = this.stop;
    const on = (type, react, options = {}) =>
      this.marks.addEventListener(type, (event) => react.call(this, event), { signal, ...options });
    on("pointerdown", this.press);
    on("pointermove", this.move);
    on("pointerup", this.release);
    on("pointercancel", this.release);
    on("pointerleave", () => {
      this.pointer = null;
      this.mark();
    });
    on("mousedown", (event) => event.button === 1 && event.preventDefault()); // no autoscroll
    on("wheel", this.wheel, { passive: false });
    on("keydown", this.key);
    on("keyup", (event) => event.key === " " && this.grip(false));
    on("focus", () => {
      this.keyboard = this.marks.matches(":focus-visible");
      this.mark();
    });
    on("blur", () => {
      this.keyboard = false;
      this.grip(false);
      this.mark();
    });
    // Before the notebook, which has shortcuts on the same keys, and before the control that has the
    // focus: undo is undo wherever it is in the tool.
    const everywhere = { signal, capture: true };
    window.addEventListener("keydown", (event) => this.keyAnywhere(event), everywhere);
    window.addEventListener("keyup", (event) => {
      if (event.key.toLowerCase() === "o") this.showOriginal(false);
    }, everywhere);
    window.addEventListener("blur", () => this.showOriginal(false), { signal });
    // A notebook has shortcuts on plain keys; while a control here has the focus, they are ours.
    this.root.addEventListener(
      "keydown",
      (event) => {
        if (!(event.ctrlKey || event.metaKey || event.altKey)) event.stopPropagation();
      },
      { signal },
    );
    this.sizes = new ResizeObserver(() => this.resize());
    this.sizes.observe(this.stage);
    window.addEventListener("resize", () => this.resize(), { signal }); // zoom changes the ratio
  }

  resize() {
    const dot = window.devicePixelRatio || 1;
    const [width, height] = ["clientWidth", "clientHeight"].map((side) =>
      Math.round(this.stage[side] * dot),
    );
    if (width === this.marks.width && height === this.marks.height) return;
    Object.assign(this.marks, { width, height });
    this.drawMarks(); // at once: a canvas that changed its size is empty
  }

  /** Where an event is, in cells. */
  place(event) {
    const { rows, columns } = this.store;
    const { left, top, width, height } = this.box;
    const x = this.origin[0] + (event.clientX - left) / width / this.zoom;
    const y = this.origin[1] + (event.clientY - top) / height / this.zoom;
    return [x * columns, y * rows];
  }

  /** Row and column of a place, the nearest of the map. */
  cellAt([x, y]) {
    const { rows, columns } = this.store;
    return [clamp(Math.floor(y), 0, rows - 1), clamp(Math.floor(x), 0, columns - 1)];
  }

  brush() {
    return { size: this.model.get("brush_size"), soft: this.model.get("soft_edge") };
  }

  press(event) {
    const { pointerId, button, clientX, clientY } = event;
    const isFinger = event.pointerType === "touch";
    if (isFinger) this.fingers.set(pointerId, [clientX, clientY]);
    if (this.fingers.size > 1) this.beginPinch();
    if (this.pinch || this.stroke || this.drag) return;
    if (button === 1 || (button === 0 && this.gripping)) {
      this.drag = [clientX, clientY];
      this.marks.setPointerCapture(pointerId);
      return;
    }
    if (button !== 0 || !event.isPrimary) return;
    this.box = this.marks.getBoundingClientRect();
    this.marks.setPointerCapture(pointerId);
    const stroke = (this.stroke = this.store.begin({ held: isFinger }));
    if (isFinger) this.holding = setTimeout(() => this.store.release(stroke), HELD);
    this.keyboard = false;
    this.pointer = this.last = this.corner = this.place(event);
    this.cursor = this.cellAt(this.last);
    if (this.model.get("tool") === "fill") this.fill(this.stroke, this.cursor);
    else this.draw(this.last);
  }

  move(event) {
    const here = [event.clientX, event.clientY];
    if (this.fingers.has(event.pointerId)) this.fingers.set(event.pointerId, here);
    if (this.pinch) return this.movePinch();
    if (this.drag) {
      this.panBy([here[0] - this.drag[0], here[1] - this.drag[1]]);
      this.drag = here;
      return;
    }
    this.box ??= this.marks.getBoundingClientRect();
    if (!this.stroke) this.box = this.marks.getBoundingClientRect();
    this.pointer = this.place(event);
    if (this.stroke && event.isPrimary) {
      const events = event.getCoalescedEvents?.() ?? [];
      for (const one of events.length ? events : [event]) this.draw(this.place(one));
    }
    this.mark();
  }

  release(event) {
    this.fingers.delete(event.pointerId);
    if (this.pinch) {
      this.pinch = this.fingers.size ? this.spread() : null;
      return;
    }
    this.drag = null;
    if (!this.stroke || !event.isPrimary) return;
    this.endStroke((stroke) => this.store.end(stroke));
  }

  endStroke(end) {
    clearTimeout(this.holding);
    end(this.stroke);
    this.stroke = this.corner = null;
  }

  /** A second finger: what the first has painted is taken back. */
  beginPinch() {
    if (this.stroke) this.endStroke((stroke) => this.store.cancel(stroke));
    this.pinch = this.spread();
    this.pointer = null;
  }

  /** Middle and distance of the first two fingers; nothing where there is only one. */
  spread() {
    const [one, two] = this.fingers.values();
    if (!two) return {};
    const middle = [(one[0] + two[0]) / 2, (one[1] + two[1]) / 2];
    return { middle, apart: Math.hypot(one[0] - two[0], one[1] - two[1]) };
  }

  movePinch() {
    const [before, now] = [this.pinch, this.spread()];
    this.pinch = now;
    if (!before.middle || !now.middle) return;
    this.panBy([now.middle[0] - before.middle[0], now.middle[1] - before.middle[1]]);
    this.zoomAt(now.middle, now.apart / Math.max(before.apart, 1));
  }

  /** With Ctrl, as a touchpad's pinch has it too; without, the page scrolls. */
  wheel(event) {
    if (!event.ctrlKey) return;
    event.preventDefault();
    this.zoomAt([event.clientX, event.clientY], Math.exp(clamp(-event.deltaY, -60, 60) / 150));
  }

  /** While the space bar is down, the mouse moves the picture. */
  grip(isHeld) {
    this.gripping = isHeld;
    this.marks.classList.toggle("ae-grip", isHeld);
  }

  /** One step of the pointer's stroke. */
  draw(place) {
    const tool = this.model.get("tool");
    if (tool === "rectangle") {
      this.rectangle(this.stroke, this.cellAt(this.corner), this.cellAt(place));
    } else if (tool !== "fill") {
      const value = tool === "erase" ? null : this.model.get("brush_value");
      this.store.brush(this.stroke, this.last, place, this.brush(), value);
      this.last = place;
    }
  }

  /** From cell to cell, both included; what an earlier step of the stroke covered is given back. */
  rectangle(stroke, [r0, c0], [r1, c1]) {
    const { columns } = this.store;
    const value = round(this.model.get("brush_value"));
    const pairs = stroke.before.map((before, cell) => {
      const [r, c] = [Math.floor(cell / columns), cell % columns];
      const inside = (r - r0) * (r - r1) <= 0 && (c - c0) * (c - c1) <= 0;
      return [cell, inside ? value : before];
    });
    this.store.set(stroke, pairs);
  }

  fill(stroke, [r, c]) {
    const { painted, rows, columns } = this.store;
    const value = round(this.model.get("brush_value"));
    const cells = filled(painted, r * columns + c, rows, columns);
    this.store.set(stroke, cells.map((cell) => [cell, value]));
  }

  /** The keys that work wherever the focus is in the tool, but not where somebody writes. */
  keyAnywhere(event) {
    const home = this.root.closest(".ae-tool") ?? this.root;
    const { target } = event;
    if (!home.contains(target) || isText(target) || event.altKey) return;
    const command = event.ctrlKey || event.metaKey;
    if (!command && target.tagName === "SELECT") return; // letters choose there
    const key = event.key.toLowerCase();
    const undo = command ? key === "z" && !event.shiftKey : key === "u";
    const redo = command ? key === "y" || (key === "z" && event.shiftKey) : key === "r";
    const original = !command && key === "o";
    const guess = !command && key === "g" && home.querySelector(".ae-guess");
    if (!(undo || redo || original || guess)) return;
    event.preventDefault();
    event.stopPropagation();
    if (original) this.showOriginal(true);
    else if (guess) guess.click();
    else if (!this.stroke) this.store.act(undo ? "undo" : "redo");
  }

  key(event) {
    if (this.stroke || event.ctrlKey || event.metaKey || event.altKey) return;
    const key = event.key.length === 1 ? event.key.toLowerCase() : event.key;
    const steps = { ArrowUp: [-1, 0], ArrowDown: [1, 0], ArrowLeft: [0, -1], ArrowRight: [0, 1] };
    const isGrip = key === " " && this.pointer && !this.keyboard;
    if (isGrip) this.grip(true);
    else if (steps[key] && event.shiftKey) {
      this.pan(steps[key].toReversed().map((by) => (PAN_STEP * by) / this.zoom));
    } else if (steps[key]) this.step(steps[key]);
    else if (key === " " || key === "Enter") this.use();
    else if (key === "Delete" || key === "Backspace") this.dab(null);
    else if (key === "+" || key === "=") this.nudge("brush_value", VALUE_STEP, 0, MOST);
    else if (key === "-") this.nudge("brush_value", -VALUE_STEP, 0, MOST);
    else if (key === "]") this.nudge("brush_size", 1, 1, MAX_SIZE);
    else if (key === "[") this.nudge("brush_size", -1, 1, MAX_SIZE);
    else if (key === "z" || key === "x") this.zoomAtCursor(key === "z" ? ZOOM_STEP : 1 / ZOOM_STEP);
    else if (key === "f") this.fit();
    else if (key === "Escape" && this.corner) this.corner = null;
    else return;
    event.preventDefault();
    event.stopPropagation();
    this.keyboard = !isGrip;
    this.mark();
  }

  zoomAtCursor(factor) {
    const { rows, columns } = this.store;
    const [r, c] = this.cursor;
    const { left, top, width, height } = this.marks.getBoundingClientRect();
    const at = [(c + 0.5) / columns, (r + 0.5) / rows];
    const [x, y] = at.map((share, k) => clamp((share - this.origin[k]) * this.zoom, 0, 1));
    this.zoomAt([left + x * width, top + y * height], factor);
    this.live.textContent = `zoom ${this.zoom.toFixed(1)}`;
  }

  step([down, right]) {
    const { rows, columns } = this.store;
    const [r, c] = this.cursor;
    this.cursor = [clamp(r + down, 0, rows - 1), clamp(c + right, 0, columns - 1)];
    this.follow();
    this.announce();
  }

  /** The tool at the keyboard's cell. */
  use() {
    const tool = this.model.get("tool");
    if (tool === "brush") this.dab(this.model.get("brush_value"));
    else if (tool === "erase") this.dab(null);
    else if (tool === "rectangle" && !this.corner) this.corner = [this.cursor[1], this.cursor[0]];
    else {
      const stroke = this.store.begin();
      if (tool === "fill") this.fill(stroke, this.cursor);
      else this.rectangle(stroke, [this.corner[1], this.corner[0]], this.cursor);
      this.corner = null;
      this.store.end(stroke);
    }
    this.announce();
  }

  /** The brush (value null: the eraser), once, at the keyboard's cell. */
  dab(value) {
    const [r, c] = this.cursor;
    const [stroke, middle] = [this.store.begin(), [c + 0.5, r + 0.5]];
    this.store.brush(stroke, middle, middle, this.brush(), value);
    this.store.end(stroke);
    this.announce();
  }

  nudge(name, by, low, high) {
    this.model.set(name, round(clamp(this.model.get(name) + by, low, high)));
    this.model.save_changes();
    const { format } = this.controls[name];
    this.live.textContent = `${name.replace("_", " ")} ${format(this.model.get(name))}`;
  }

  announce() {
    this.live.textContent = this.describe(this.cursor);
  }
}

function line(path, x0, y0, x1, y1) {
  path.moveTo(x0, y0);
  path.lineTo(x1, y1);
}

function strokePath(context, path, colour, width) {
  context.strokeStyle = colour;
  context.lineWidth = width;
  context.stroke(path);
}

/** A white line with a dark rim, seen on every picture. */
function outlined(context, path, dot) {
  strokePath(context, path, "rgba(0, 0, 0, 0.75)", 3.5 * dot);
  strokePath(context, path, "#fff", 1.5 * dot);
}

/** The colours of 0 to `MOST` as the track of the brush's value. */
function gradient(colours) {
  const stops = [];
  for (let k = 0; k <= MOST * 255; k += 12) stops.push(`rgb(${colours.slice(3 * k, 3 * k + 3)})`);
  return `linear-gradient(to right, ${stops})`;
}

/**
 * What ipywidgets leaves out for screen readers and the keyboard, in the whole tool. A slider's
 * handle gets its label as a name; that of ipywidgets 7 (Colab) does not even say that it is a
 * slider, and gets its value as well. Its readout can be written in: it gets a name, and no stop of
 * its own on the way of the Tab key. A button that can be pressed in says whether it is.
 * The controls are views of their own and may be drawn after this one, or come later.
 */
function nameControls(el, signal) {
  const watch = (node, options, react) => {
    const observer = new MutationObserver(react);
    observer.observe(node, options);
    signal.addEventListener("abort", () => observer.disconnect());
    react();
  };
  const known = new WeakSet();
  const isNew = (node) => !known.has(node) && known.add(node);
  const nameSlider = (handle) => {
    const box = handle.closest(".widget-inline-hbox");
    const label = box?.querySelector(".widget-label")?.textContent;
    if (label) handle.setAttribute("aria-label", label);
    const readout = box?.querySelector(".widget-readout");
    if (!readout) return;
    const named = { role: "textbox", "aria-label": `${label}, as a number`, tabindex: "-1" };
    for (const [name, value] of Object.entries(named)) readout.setAttribute(name, value);
    if (handle.hasAttribute("role")) return;
    handle.setAttribute("role", "slider");
    watch(readout, { childList: true, subtree: true }, () =>
      handle.setAttribute("aria-valuenow", readout.textContent),
    );
  };
  const nameToggle = (button) => {
    const text = button.textContent.trim();
    if (button.closest(".ae-head")) button.setAttribute("aria-label", `head ${text}`);
    watch(button, { attributes: true, attributeFilter: ["class"] }, () =>
      button.setAttribute("aria-pressed", button.classList.contains("mod-active")),
    );
  };
  const name = (tool) => {
    const found = (selector) => [...tool.querySelectorAll(selector)].filter(isNew);
    found(".noUi-handle, .ui-slider-handle").forEach(nameSlider);
    found(".widget-toggle-button").forEach(nameToggle);
  };
  let timer;
  const begin = () => {
    const tool = el.closest(".ae-tool");
    if (!tool || !isNew(tool)) return;
    watch(tool, { childList: true, subtree: true }, () => {
      clearTimeout(timer);
      timer = setTimeout(name, 100, tool);
    });
  };
  const soon = [0, 200, 1000, 3000].map((wait) => setTimeout(begin, wait));
  signal.addEventListener("abort", () => [...soon, timer].forEach(clearTimeout));
}

/** anywidget calls this once a widget; `initialize` once, `render` for every place it is shown. */
export default () => {
  let store;
  return {
    initialize({ model }) {
      store = new Store(model);
      const update = () => store.update();
      const names = ["answered", "painted", "subject"].map((name) => `change:${name}`);
      for (const name of names) model.on(name, update);
      const onComm = () => store.onKernel(true, false); // a live widget's comm only ever dies
      model.on("comm_live_update", onComm);
      const deafen = listenToKernel(model, (gone, busy) => store.onKernel(gone, busy));
      return () => {
        deafen();
        for (const name of names) model.off(name, update);
        model.off("comm_live_update", onComm);
      };
    },
    render({ model, el }) {
      const view = new View(store, model, el);
      nameControls(el, view.stop.signal);
      return () => view.remove();
    },
  };
};
