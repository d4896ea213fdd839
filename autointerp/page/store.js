// What the page holds: an index that is read at once, and parts that are unpacked when they are needed.
const at = id => document.getElementById(id);
const INDEX = JSON.parse(at("index").textContent);
const N_LATENTS = INDEX.latents.key.length;
const byKey = new Map(INDEX.latents.key.map((key, i) => [key, i]));

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

const chunks = new Map();

async function latentOf(i) {
  const chunk = Math.floor(i / INDEX.chunk);
  if (!chunks.has(chunk)) {
    if (chunks.size >= 8) chunks.delete(chunks.keys().next().value);
    chunks.set(chunk, unzip(at("chunk-" + chunk).textContent).then(JSON.parse));
  }
  return (await chunks.get(chunk))[i % INDEX.chunk];
}

const filmSource = film => film.stored === null ? null : at("film-" + film.stored).textContent;

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
