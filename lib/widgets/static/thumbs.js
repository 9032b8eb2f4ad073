// Arrow keys, Home and End among the pictures of a page. Without this, Tab goes through them.
function render({ el }) {
  const stop = new AbortController();
  let grid = null;

  function move(event) {
    const { key, target } = event;
    if (event.ctrlKey || event.metaKey || event.altKey || target.tagName !== "BUTTON") return;
    event.stopPropagation(); // a notebook has shortcuts on plain keys
    const buttons = [...grid.querySelectorAll("button")].filter((one) => one.offsetParent);
    const top = buttons[0]?.offsetTop;
    const columns = buttons.filter((one) => one.offsetTop === top).length;
    const at = buttons.indexOf(target);
    const steps = { ArrowLeft: -1, ArrowRight: 1, ArrowUp: -columns, ArrowDown: columns };
    const ends = { Home: 0, End: buttons.length - 1 };
    const next = key in ends ? ends[key] : at + steps[key];
    if (Number.isNaN(next)) return;
    event.preventDefault();
    buttons[next]?.focus();
  }

  // It is laid into the page only afterwards.
  function attach() {
    if (stop.signal.aborted) return;
    grid = el.closest(".thumbs")?.querySelector(".thumbs-grid");
    if (grid) grid.addEventListener("keydown", move, { signal: stop.signal });
    else requestAnimationFrame(attach);
  }
  attach();
  return () => stop.abort();
}

export default { render };
