// What every page of ours is made with: nodes, numbers, settings, heat over films, charts, the theme.
const at = id => document.getElementById(id);
function bytesOf(base64) {
  const text = atob(base64);
  const bytes = new Uint8Array(text.length);
  for (let i = 0; i < text.length; i++) bytes[i] = text.charCodeAt(i);
  return bytes;
}

function unzip(base64) {
  const stream = new Blob([bytesOf(base64)]).stream().pipeThrough(new DecompressionStream("gzip"));
  return new Response(stream).text();
}

function make(tag, attributes = {}, ...children) {
  const node = document.createElement(tag);
  for (const [name, value] of Object.entries(attributes)) {
    if (value === null || value === false) continue;
    if (name.startsWith("on")) node.addEventListener(name.slice(2), value);
    else node.setAttribute(name, value === true ? "" : value);
  }
  node.append(...children.filter(child => child !== null && child !== undefined));
  return node;
}

const whole = value => value.toLocaleString("en-US");

function figure(value, digits = 3) {
  if (value === null || value === undefined) return "–";
  if (typeof value !== "number") return String(value);
  return Number.isInteger(value) ? String(value) : value.toFixed(digits);
}

function percent(share) {
  if (share === 0) return "0%";
  if (share < 0.0001) return "<0.01%";
  return (100 * share).toFixed(share < 0.01 ? 2 : share < 0.1 ? 1 : 0) + "%";
}

const strength = value => value >= 100 ? value.toFixed(0) : value >= 10 ? value.toFixed(1) : value.toFixed(2);
const plural = (n, one, many = one + "s") => `${whole(n)} ${n === 1 ? one : many}`;

// A sandboxed frame, as in a notebook, has no storage: there a setting lasts as long as the page.
function remember(name, value) {
  try { localStorage.setItem("maira-sae-" + name, value); } catch (error) { if (!(error instanceof DOMException)) throw error; }
}
function recall(name) {
  try { return localStorage.getItem("maira-sae-" + name); } catch (error) { if (!(error instanceof DOMException)) throw error; return null; }
}

// Viridis, at ten places: it differs from the film's greys and is even to colour-blind eyes.
const SCALE = ["#440154", "#482878", "#3e4989", "#31688e", "#26828e", "#1f9e89", "#35b779", "#6ece58", "#b5de2b", "#fde725"];
const VIRIDIS = SCALE.map(hex => [1, 3, 5].map(i => parseInt(hex.slice(i, i + 2), 16)));
const LOOKUP = Array.from({length: 256}, (_, byte) => {
  const place = byte / 255 * (VIRIDIS.length - 1), low = Math.min(Math.floor(place), VIRIDIS.length - 2), share = place - low;
  return VIRIDIS[low].map((value, i) => Math.round(value + share * (VIRIDIS[low + 1][i] - value)));
});
const percentOf = value => (100 * value).toFixed(3) + "%";
const place = ([left, top, right, bottom]) =>
  `left:${percentOf(left)};top:${percentOf(top)};width:${percentOf(right - left)};height:${percentOf(bottom - top)}`;

function heatCanvas(heat, bytes) {
  const canvas = make("canvas", {class: "heat", width: heat.columns, height: heat.rows, "aria-hidden": "true"});
  const context = canvas.getContext("2d");
  const image = context.createImageData(heat.columns, heat.rows);
  bytes.forEach((byte, i) => {
    const [red, green, blue] = LOOKUP[byte];
    // A silent patch is clear; a weak one already shows, so that it is not taken for silence.
    image.data.set([red, green, blue, byte === 0 ? 0 : Math.round(90 + 165 * byte / 255)], 4 * i);
  });
  context.putImageData(image, 0, 0);
  return canvas;
}

function setOpacity(share) {
  document.body.style.setProperty("--heat", share);
  for (const slider of document.querySelectorAll("input.opacity")) {
    slider.value = Math.round(100 * share);
    slider.setAttribute("aria-valuetext", `${slider.value} percent`);
  }
  remember("heat", share);
}
function setBoxes(shown) {
  document.body.classList.toggle("no-boxes", !shown);
  for (const box of document.querySelectorAll("input.boxes")) box.checked = shown;
}
const heatNow = () => parseFloat(document.body.style.getPropertyValue("--heat") || "0.6");
const boxesNow = () => !document.body.classList.contains("no-boxes");

// Charts by Plotly, which is unpacked after the page can already be used.
let plotly = null;
function chartLibrary() {
  plotly ??= unzip(at("plotly").textContent).then(code => {
    const script = document.createElement("script");
    script.textContent = code;
    document.head.append(script);
    return window.Plotly;
  });
  return plotly;
}

// Plotly knows no light-dark(): an element resolves it.
const probe = make("i", {hidden: true});
document.body.append(probe);
function colour(name) {
  probe.style.color = `var(${name})`;
  return getComputedStyle(probe).color;
}
const MODALITIES = ["frontal", "lateral", "prior", "prompt", "report", "generated"];
const modalityColour = name => colour(MODALITIES.includes(name) ? `--${name}` : "--other");

const drawn = new Map();  // node → what draws it, so that a change of theme draws it again

async function chart(node, build) {
  drawn.set(node, build);
  const library = await chartLibrary();
  if (!node.isConnected) { drawn.delete(node); return; }
  const {data, layout, onclick} = build();
  const ink = colour("--soft"), line = colour("--line");
  const axis = {gridcolor: line, zerolinecolor: line, linecolor: line, tickfont: {size: 11}, title: {font: {size: 11}}, fixedrange: true};
  await library.react(node, data, {
    paper_bgcolor: "transparent", plot_bgcolor: "transparent", font: {family: "inherit", size: 11, color: ink},
    margin: {l: 42, r: 8, t: 6, b: 32}, showlegend: false, dragmode: false, bargap: 0.06,
    hoverlabel: {bgcolor: colour("--card"), bordercolor: line, font: {color: colour("--ink"), size: 12}},
    ...layout, xaxis: {...axis, ...layout.xaxis}, yaxis: {...axis, ...layout.yaxis},
  }, {displayModeBar: false, responsive: true, displaylogo: false});
  if (onclick && !node.dataset.listens) {
    node.on("plotly_click", event => onclick(event.points[0]));
    node.dataset.listens = "1";
  }
  node.dataset.drawn = "1";
}

function redrawCharts() {
  for (const [node, build] of drawn) node.isConnected ? chart(node, build) : drawn.delete(node);
}

function chartNode(label, height) {
  return make("div", {class: "chart", role: "img", "aria-label": label, style: `height:${height}px`});
}

const THEMES = {auto: "Theme: system", light: "Theme: light", dark: "Theme: dark"};
function setTheme(name) {
  document.documentElement.dataset.theme = name;
  at("theme").textContent = THEMES[name];
  remember("theme", name);
  redrawCharts();
}
const nextTheme = () => setTheme({auto: "light", light: "dark", dark: "auto"}[document.documentElement.dataset.theme]);
