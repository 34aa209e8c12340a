"use strict";
// Without this script the page shows everything; with it, sites can be filtered and drawings moved.

for (const form of document.querySelectorAll(".filter")) {
  const rows = [...document.querySelectorAll("#site-table tbody tr")];
  const search = form.querySelector("input");
  const buttons = [...form.querySelectorAll("button")];
  const filter = () => {
    const words = search.value.toLowerCase().split(/\s+/).filter(Boolean);
    const kind = buttons.find((b) => b.getAttribute("aria-pressed") === "true").dataset.kind;
    let shown = 0;
    for (const row of rows) {
      const text = row.textContent.toLowerCase();
      row.hidden = !((!kind || row.dataset.kind === kind) && words.every((word) => text.includes(word)));
      shown += !row.hidden;
    }
    form.querySelector("output").textContent = `${shown} of ${rows.length}`;
  };
  search.addEventListener("input", filter);
  form.addEventListener("submit", (event) => event.preventDefault());
  for (const button of buttons) {
    button.addEventListener("click", () => {
      for (const other of buttons) other.setAttribute("aria-pressed", String(other === button));
      filter();
    });
  }
  form.hidden = false;
  filter();
}

for (const pair of document.querySelectorAll(".pair")) {
  const drawings = [...pair.querySelectorAll("svg")];
  let box = drawings[0].dataset.view.split(" ").map(Number);
  const show = () => drawings.forEach((svg) => svg.setAttribute("viewBox", box.join(" ")));
  const move = (dx, dy) => { box[0] -= dx; box[1] -= dy; show(); };
  const zoom = (factor, x = box[0] + box[2] / 2, y = box[1] + box[3] / 2) => {
    box = [x - (x - box[0]) * factor, y - (y - box[1]) * factor, box[2] * factor, box[3] * factor];
    show();
  };
  const actions = {
    in: () => zoom(0.8),
    out: () => zoom(1.25),
    view: () => { box = drawings[0].dataset.view.split(" ").map(Number); show(); },
    whole: () => { box = drawings[0].dataset.whole.split(" ").map(Number); show(); },
  };
  const keys = {
    "+": actions.in, "-": actions.out, "0": actions.view,
    ArrowLeft: () => move(40, 0), ArrowRight: () => move(-40, 0), ArrowUp: () => move(0, 40), ArrowDown: () => move(0, -40),
  };
  for (const svg of drawings) {
    const scale = () => 1 / svg.getScreenCTM().a; // units of the drawing per pixel
    svg.addEventListener("wheel", (event) => {
      if (!event.ctrlKey && !event.metaKey) return;
      event.preventDefault();
      const at = new DOMPoint(event.clientX, event.clientY).matrixTransform(svg.getScreenCTM().inverse());
      zoom(event.deltaY > 0 ? 1.15 : 1 / 1.15, at.x, at.y);
    }, { passive: false });
    svg.addEventListener("pointerdown", (event) => {
      if (event.button) return;
      svg.setPointerCapture(event.pointerId);
      svg.classList.add("dragged");
    });
    svg.addEventListener("pointermove", (event) => {
      if (svg.hasPointerCapture(event.pointerId)) move(event.movementX * scale(), event.movementY * scale());
    });
    svg.addEventListener("lostpointercapture", () => svg.classList.remove("dragged"));
    svg.addEventListener("keydown", (event) => {
      if (event.ctrlKey || event.metaKey || event.altKey || !keys[event.key]) return;
      event.preventDefault();
      keys[event.key]();
    });
  }
  const tools = pair.querySelector(".tools");
  tools.hidden = false;
  for (const button of tools.querySelectorAll("button")) button.addEventListener("click", () => actions[button.dataset.do]());
}
