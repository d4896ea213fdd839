// A page of viewers: the films of each, and buttons that choose whose heat lies over them.
const DATA = JSON.parse(at("data").textContent);
const layerButtons = () => [...document.querySelectorAll("button[data-layer]")];

function drawLayer(viewer, layer) {
  for (const frame of viewer.querySelectorAll(".film")) {
    const holder = frame.querySelector(".grid"), heat = layer.films[frame.dataset.film];
    const value = frame.closest("figure").querySelector(".value");
    holder.replaceChildren();
    value.textContent = "";
    holder.onpointermove = holder.onpointerleave = null;
    if (!heat) continue;
    const bytes = bytesOf(heat.bytes), peak = bytes.reduce((a, b) => Math.max(a, b), 0) / 255 * layer.top;
    const usual = `peak ${strength(peak)}`;
    holder.append(heatCanvas(heat, bytes));
    value.textContent = usual;
    holder.onpointermove = event => {
      const area = holder.getBoundingClientRect();
      const within = (share, n) => Math.min(n - 1, Math.max(0, Math.floor(share * n)));
      const column = within((event.clientX - area.left) / area.width, heat.columns), row = within((event.clientY - area.top) / area.height, heat.rows);
      value.textContent = `row ${row + 1}, column ${column + 1}: ${strength(bytes[row * heat.columns + column] / 255 * layer.top)}`;
    };
    holder.onpointerleave = () => { value.textContent = usual; };
  }
  const scale = viewer.querySelector(".scale"), shows = viewer.querySelector(".shows");
  if (shows) shows.textContent = layer.name;
  if (!scale) return;
  const seen = layer.top > 0 && Object.keys(layer.films).length > 0;
  scale.replaceChildren(...(seen ? ["0", make("i", {style: `background:linear-gradient(90deg,${SCALE.join(",")})`}), strength(layer.top)] : []));
  scale.setAttribute("aria-label", seen ? `Colour scale from 0 to ${strength(layer.top)}` : "No heat");
}

function choose(button) {
  const viewer = button.closest("[data-viewer]");
  for (const other of viewer.querySelectorAll("button[data-layer]")) other.setAttribute("aria-pressed", String(other === button));
  for (const item of viewer.querySelectorAll(".item")) item.classList.toggle("chosen", item.contains(button));
  drawLayer(viewer, DATA.layers[Number(button.dataset.layer)]);
}

function step(by, from = document.activeElement) {
  const buttons = layerButtons();
  if (!buttons.length) return;
  const now = buttons.indexOf(from);
  const start = now >= 0 ? now : by > 0 ? -1 : buttons.length;
  const next = buttons[Math.min(buttons.length - 1, Math.max(0, start + by))];
  choose(next);
  next.focus();
  next.scrollIntoView({block: "nearest"});
}

function enlarge(button) {
  const dialog = at("film-dialog"), frame = button.querySelector(".film").cloneNode(true), canvas = button.querySelector("canvas");
  if (canvas) frame.querySelector("canvas").getContext("2d").drawImage(canvas, 0, 0);
  const picture = frame.querySelector("img").alt.replace("Film: ", "");
  const [width, height] = frame.style.aspectRatio.split("/").map(Number);
  frame.style.maxWidth = `calc(78vh * ${width} / ${height})`;
  const viewer = button.closest("[data-viewer]"), shows = viewer && viewer.querySelector(".shows");
  dialog.replaceChildren(
    make("div", {class: "dialog-head"}, make("strong", {}, picture), make("span", {class: "meta"}, shows ? shows.textContent : ""),
      make("button", {type: "button", onclick: () => dialog.close()}, "Close")),
    frame);
  dialog.showModal();
}

function onKey(event) {
  if (event.ctrlKey || event.metaKey || event.altKey || document.querySelector("dialog[open]")) return;
  if (event.target.closest("input, select, textarea")) return;
  const moves = {ArrowDown: 1, ArrowRight: 1, ArrowUp: -1, ArrowLeft: -1}[event.key];
  if (moves && event.target.closest("button[data-layer]")) step(moves);
  else if (event.key === "n") step(1);
  else if (event.key === "p") step(-1);
  else if (event.key === "t") nextTheme();
  else if (event.key === "[" || event.key === "]") setOpacity(Math.min(1, Math.max(0, Math.round(10 * heatNow() + (event.key === "]" ? 1 : -1)) / 10)));
  else if (event.key === "?") at("help").showModal();
  else return;
  event.preventDefault();
}

function start() {
  at("theme").addEventListener("click", nextTheme);
  at("help-open").addEventListener("click", () => at("help").showModal());
  document.addEventListener("keydown", onKey);
  document.addEventListener("click", event => {
    const layer = event.target.closest("button[data-layer]"), film = event.target.closest("button.enlarge");
    if (layer) choose(layer);
    else if (film) enlarge(film);
  });
  document.addEventListener("input", event => { if (event.target.matches("input.opacity")) setOpacity(event.target.value / 100); });
  setOpacity(parseFloat(recall("heat") ?? "0.6"));
  for (const viewer of document.querySelectorAll("[data-viewer]")) {
    const first = viewer.querySelector("button[data-layer]");
    if (first) choose(first);
  }
  for (const node of document.querySelectorAll("[data-figure]")) {
    const {data, layout} = DATA.figures[Number(node.dataset.figure)];
    chart(node, () => ({data, layout}));
  }
  setTheme(THEMES[recall("theme")] ? recall("theme") : "auto");
  document.documentElement.dataset.ready = "1";
}
start();
