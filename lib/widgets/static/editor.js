// The picture with the attention map over it, to paint on. Plain ESM for anywidget: no bundler,
// nothing from a network.
//
// A `Store` is one widget: the painted map and the messages to Python. A `View` is one place where
// the widget is displayed; all views of a widget share its store. A cell is a patch of the picture,
// named by its number in reading order; null stands for "not painted".

const EPS = 1e-6;
const VALUE_STEP = 0.05; // of the keys + and -
const MAX_SIZE = 12; // cells, of the brush
const SHARED = ["tool", "brush_value", "brush_size", "soft_edge", "opacity", "grid_lines"];
const SHOWN = ["own", "base", "strength", "sharpness", "colours"]; // a change repaints the map

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

// --------------------------------------------------------------------------------------- store

/**
 * The painted map of a widget, and its messages to Python.
 *
 * A stroke is painted here at once and waits in `queue`; so do undo and redo. One message at most
 * is on its way: the next goes when Python's `ack` ticks, with the newest version of the first
 * stroke that waits. So a fast drag costs few messages, and none of its end is lost.
 *
 * Where Python changes the map on its own (`revision` ticks), its map counts. A stroke that Python
 * has already taken part of is then Python's; one that it has not seen is laid over the new map and
 * sent again, unless another picture was opened.
 */
export class Store {
  constructor(model) {
    this.model = model;
    this.views = new Set();
    this.queue = [];
    this.sent = null; // { item, revision } of the message on its way
    this.count = 0;
    this.stroke = model.get("stroke");
    this.ack = model.get("ack");
    this.adopt();
  }

  get own() {
    return this.model.get("own");
  }

  /** Python has answered, or changed the map, or both in one message. */
  update() {
    this.acknowledge();
    if (this.model.get("revision") !== this.revision) this.adopt();
    this.pump();
  }

  /** Takes Python's map. */
  adopt() {
    const other = this.model.get("subject") !== this.subject;
    const taken = ["subject", "revision", "rows", "columns"];
    for (const name of taken) this[name] = this.model.get(name);
    this.painted = [...this.model.get("painted")];
    this.queue = this.queue.filter((item) => !other && (item.action || !item.taken));
    for (const stroke of this.queue) {
      if (stroke.action) continue;
      stroke.before = [...this.painted];
      for (const [cell, value] of stroke.cells) this.painted[cell] = value;
      stroke.painted = [...this.painted];
      stroke.waits = true;
    }
    this.changed();
  }

  /** A new stroke; it counts from its first change on. */
  begin() {
    return { shares: new Map(), before: [...this.painted], done: false };
  }

  end(stroke) {
    stroke.done = true;
    this.pump();
  }

  /** Lets a stroke set cells: [cell, value or null] pairs. */
  set(stroke, pairs) {
    const changes = pairs.filter(([cell, value]) => this.painted[cell] !== value);
    if (!changes.length) return;
    if (!this.queue.includes(stroke)) {
      // New, or Python took the map over in the middle of it: what follows is another stroke.
      const before = [...this.painted];
      Object.assign(stroke, { number: ++this.stroke, taken: false, cells: new Map(), before });
      this.queue.push(stroke);
    }
    for (const [cell, value] of changes) {
      if (value === stroke.before[cell]) stroke.cells.delete(cell);
      else stroke.cells.set(cell, value);
      this.painted[cell] = value;
    }
    stroke.painted = [...this.painted];
    stroke.waits = true;
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
    this.queue.push({ action, waits: true, done: true });
    this.pump();
  }

  pump() {
    while (this.queue.length && this.queue[0].done && !this.queue[0].waits) this.queue.shift();
    const item = this.queue[0];
    if (this.sent || !item?.waits) return;
    item.waits = false;
    this.sent = { item, revision: this.revision };
    const { model, revision, subject } = this;
    if (!item.action) {
      model.set("painted", item.painted);
      model.set("stroke", item.number);
    }
    // `sent` is always new, so there is always a message, even if the map is as it was.
    model.set("sent", { n: ++this.count, subject, revision, action: item.action ?? "" });
    model.save_changes();
  }

  /** Whether Python took what was on its way: not where it had changed the map before. */
  acknowledge() {
    if (this.model.get("ack") === this.ack) return;
    this.ack = this.model.get("ack");
    if (this.sent?.revision === this.revision) this.sent.item.taken = true;
    this.sent = null;
  }

  changed() {
    for (const view of this.views) view.repaint();
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
  ["U or Ctrl-Z", "undo"],
  ["R or Ctrl-Y", "redo"],
  ["Escape", "give up a rectangle"],
];

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
    this.build(el);
    this.listen();
    this.onPicture = () => this.showPicture();
    this.model.on("change:picture", this.onPicture);
    this.onMap = () => this.repaint();
    for (const name of SHOWN) this.model.on(`change:${name}`, this.onMap);
    this.onControls = () => this.showControls();
    for (const name of SHARED) this.model.on(`change:${name}`, this.onControls);
    this.onSentence = () => (this.spoken.textContent = this.model.get("sentence"));
    this.model.on("change:sentence", this.onSentence);
    store.views.add(this);
    this.showPicture();
    this.showControls();
  }

  remove() {
    this.store.views.delete(this);
    this.stop.abort();
    this.sizes.disconnect();
    cancelAnimationFrame(this.frame);
    this.model.off("change:picture", this.onPicture);
    for (const name of SHOWN) this.model.off(`change:${name}`, this.onMap);
    for (const name of SHARED) this.model.off(`change:${name}`, this.onControls);
    this.model.off("change:sentence", this.onSentence);
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
    this.stage = element("div", { class: "ae-stage" }, this.picture, this.heat, this.marks);
    this.readout = element("div", { class: "ae-readout" });
    this.live = element("div", { class: "ae-hidden", "aria-live": "polite" }); // the cell
    this.spoken = element("div", { class: "ae-hidden", "aria-live": "polite" }); // the outcome
    const keys = KEYS.map(([key, what]) =>
      element("div", {}, element("kbd", {}, key), ` ${what}`),
    );
    this.controls = {};
    const sliders = element(
      "div",
      { class: "ae-sliders" },
      this.slider("brush_value", "Brush value", 0, 1, 0.01, (x) => x.toFixed(2)),
      this.slider("brush_size", "Brush size", 1, MAX_SIZE, 0.5, (x) => String(x)),
      this.slider("soft_edge", "Soft edge", 0, 1, 0.05, (x) => x.toFixed(2)),
    );
    this.controls.brush_value.input.classList.add("ae-scale");
    const grid = element("input", { type: "checkbox" });
    this.controls.grid_lines = { input: grid };
    this.bind("grid_lines", grid, () => grid.checked);
    const below = element(
      "div",
      { class: "ae-below" },
      this.readout,
      this.slider("opacity", "Map opacity", 0, 1, 0.01, (x) => x.toFixed(2)),
      element("label", { class: "ae-check" }, grid, " Grid"),
    );
    const details = element(
      "details",
      { class: "ae-keys" },
      element("summary", {}, "Keyboard"),
      element("div", { id: help }, ...keys),
    );
    const shown = [this.tools(), sliders, this.stage, below, details];
    this.root = element("div", { class: "ae-paint" }, ...shown, this.live, this.spoken);
    el.append(this.root);
  }

  tools() {
    const group = newName();
    const set = element("fieldset", { class: "ae-tools" });
    set.append(element("legend", { class: "ae-hidden" }, "Tool"));
    this.controls.tool = {};
    for (const tool of ["brush", "erase", "rectangle", "fill"]) {
      const input = element("input", { type: "radio", name: group, value: tool });
      this.controls.tool[tool] = input;
      this.bind("tool", input, () => tool);
      set.append(element("label", {}, input, tool[0].toUpperCase() + tool.slice(1)));
    }
    return set;
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
    this.repaint();
  }

  showControls() {
    const tool = this.model.get("tool");
    this.controls.tool[tool].checked = true;
    this.controls.grid_lines.input.checked = this.model.get("grid_lines");
    for (const { input, output, format, name } of this.sliders()) {
      const value = this.model.get(name);
      input.value = value;
      output.textContent = format(value);
    }
    this.heat.style.opacity = this.model.get("opacity");
    if (tool !== "rectangle") this.corner = null;
    this.mark();
  }

  sliders() {
    const found = Object.entries(this.controls).filter(([, control]) => control.output);
    return found.map(([name, control]) => ({ name, ...control }));
  }

  /** The map itself: one pixel a cell, which the browser enlarges. */
  repaint() {
    const { rows, columns, painted } = this.store;
    const { own, base, strength, sharpness, colours } = this.traits(SHOWN);
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
    const pixels = new ImageData(columns, rows);
    for (let cell = 0; cell < painted.length; cell++) {
      const value = this.valueOf(cell, painted, own, base, strength, sharpness);
      const at = 3 * Math.round(255 * value);
      pixels.data.set([colours[at], colours[at + 1], colours[at + 2], 255], 4 * cell);
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
      this.readout.textContent = this.pointer ? this.describe(this.cellAt(this.pointer)) : "";
    });
  }

  drawMarks() {
    const { rows, columns, painted } = this.store;
    const context = this.marks.getContext("2d");
    const { width, height } = this.marks;
    const [dx, dy] = [width / columns, height / rows];
    const dot = window.devicePixelRatio || 1;
    context.clearRect(0, 0, width, height);
    if (this.model.get("grid_lines")) {
      const lines = new Path2D();
      for (let c = 1; c < columns; c++) line(lines, c * dx, 0, c * dx, height);
      for (let r = 1; r < rows; r++) line(lines, 0, r * dy, width, r * dy);
      strokePath(context, lines, "rgba(255, 255, 255, 0.45)", dot);
    }
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
    this.drawPointer(context, dx, dy, dot);
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
    const { own, base, strength, sharpness } = this.traits(SHOWN);
    if (r >= rows || base.length !== painted.length) return "";
    const value = this.valueOf(cell, painted, own, base, strength, sharpness).toFixed(2);
    const whose = painted[cell] === null ? "" : `, painted (model ${own[cell].toFixed(2)})`;
    return `row ${r + 1}, column ${c + 1}, value ${value}${whose}`;
  }

  // -- the pointer and the keyboard

  listen() {
    const { signal } = this.stop;
    const on = (type, react) =>
      this.marks.addEventListener(type, (event) => react.call(this, event), { signal });
    on("pointerdown", this.press);
    on("pointermove", this.move);
    on("pointerup", this.release);
    on("pointercancel", this.release);
    on("pointerleave", () => {
      this.pointer = null;
      this.mark();
    });
    on("keydown", this.key);
    on("focus", () => {
      this.keyboard = this.marks.matches(":focus-visible");
      this.mark();
    });
    on("blur", () => {
      this.keyboard = false;
      this.mark();
    });
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
    const x = ((event.clientX - left) / width) * columns;
    return [x, ((event.clientY - top) / height) * rows];
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
    if (event.button !== 0 || !event.isPrimary || this.stroke) return;
    this.box = this.marks.getBoundingClientRect();
    this.marks.setPointerCapture(event.pointerId);
    this.stroke = this.store.begin();
    this.keyboard = false;
    this.pointer = this.last = this.corner = this.place(event);
    this.cursor = this.cellAt(this.last);
    if (this.model.get("tool") === "fill") this.fill(this.stroke, this.cursor);
    else this.draw(this.last);
  }

  move(event) {
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
    if (!this.stroke || !event.isPrimary) return;
    this.store.end(this.stroke);
    this.stroke = this.corner = null;
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

  key(event) {
    if (this.stroke) return;
    const command = event.ctrlKey || event.metaKey;
    const key = event.key.length === 1 ? event.key.toLowerCase() : event.key;
    const undo = command ? key === "z" && !event.shiftKey : key === "u";
    const redo = command ? key === "y" || (key === "z" && event.shiftKey) : key === "r";
    const steps = { ArrowUp: [-1, 0], ArrowDown: [1, 0], ArrowLeft: [0, -1], ArrowRight: [0, 1] };
    if (undo) this.store.act("undo");
    else if (redo) this.store.act("redo");
    else if (command || event.altKey) return;
    else if (steps[key]) this.step(steps[key]);
    else if (key === " " || key === "Enter") this.use();
    else if (key === "Delete" || key === "Backspace") this.dab(null);
    else if (key === "+" || key === "=") this.nudge("brush_value", VALUE_STEP, 0, 1);
    else if (key === "-") this.nudge("brush_value", -VALUE_STEP, 0, 1);
    else if (key === "]") this.nudge("brush_size", 1, 1, MAX_SIZE);
    else if (key === "[") this.nudge("brush_size", -1, 1, MAX_SIZE);
    else if (key === "Escape" && this.corner) this.corner = null;
    else return;
    event.preventDefault();
    event.stopPropagation();
    this.keyboard = true;
    this.mark();
  }

  step([down, right]) {
    const { rows, columns } = this.store;
    const [r, c] = this.cursor;
    this.cursor = [clamp(r + down, 0, rows - 1), clamp(c + right, 0, columns - 1)];
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
    this.live.textContent = `${name.replace("_", " ")} ${this.model.get(name)}`;
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

/** The colours of 0 to 1 as the track of the brush's value. */
function gradient(colours) {
  const stops = [];
  for (let k = 0; k < 256; k += 15) stops.push(`rgb(${colours.slice(3 * k, 3 * k + 3)})`);
  return `linear-gradient(to right, ${stops})`;
}

/**
 * ipywidgets draws a slider's handle without a name for screen readers: it gets its label's. That of
 * ipywidgets 7 (Colab) does not even say that it is a slider, and gets its value as well.
 * The sliders are views of their own and may be drawn after this one; returns how to stop waiting.
 */
function nameSliders(el) {
  const name = () => {
    const handles = el.closest(".ae-tool")?.querySelectorAll(".noUi-handle, .ui-slider-handle");
    for (const handle of handles ?? []) {
      const box = handle.closest(".widget-inline-hbox");
      const label = box?.querySelector(".widget-label");
      if (label) handle.setAttribute("aria-label", label.textContent);
      const readout = box?.querySelector(".widget-readout");
      if (!readout || handle.hasAttribute("role")) continue;
      handle.setAttribute("role", "slider");
      const tell = () => handle.setAttribute("aria-valuenow", readout.textContent);
      new MutationObserver(tell).observe(readout, { childList: true, subtree: true });
      tell();
    }
  };
  const soon = [0, 200, 1000, 3000].map((wait) => setTimeout(name, wait));
  return () => soon.forEach(clearTimeout);
}

/** anywidget calls this once a widget; `initialize` once, `render` for every place it is shown. */
export default () => {
  let store;
  return {
    initialize({ model }) {
      store = new Store(model);
      const update = () => store.update();
      for (const name of ["ack", "revision"]) model.on(`change:${name}`, update);
      return () => {
        for (const name of ["ack", "revision"]) model.off(`change:${name}`, update);
      };
    },
    render({ model, el }) {
      const view = new View(store, model, el);
      const stop = nameSliders(el);
      return () => {
        stop();
        view.remove();
      };
    },
  };
};
