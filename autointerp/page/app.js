// Which part is shown, the keys, the theme.
const PARTS = [["overview", "Overview"], ["latents", "Latents"], ["steering", "Steering"]].filter(([name]) =>
  name !== "steering" || INDEX.steering.length || INDEX.doses.length);
const narrow = matchMedia("(max-width: 999px)");

function showPart(name) {
  for (const [part] of PARTS) {
    at(part).hidden = part !== name;
    const tab = at("tab-" + part);
    tab.setAttribute("aria-selected", String(part === name));
    tab.tabIndex = part === name ? 0 : -1;
  }
  document.body.dataset.part = name;
  if (name === "latents") { drawList(); if (selected === null && !narrow.matches && found.length) openLatent(found[0]); }
  note(name === "latents" && selected !== null ? "latent=" + encodeURIComponent(L.key[selected]) : name);
  // Charts measure themselves when they are seen.
  redrawCharts();
}

// The address names what is open, but not inside a notebook's frame, whose address is not its own.
function note(text) { if (location.protocol !== "about:") history.replaceState(null, "", "#" + text); }

function showList() {
  document.body.classList.remove("reading");
  at("list").focus();
}

let asked = 0;
async function openLatent(i, focus = false) {
  selected = i;
  const mine = ++asked;
  document.body.classList.add("reading");
  if (document.body.dataset.part !== "latents") showPart("latents");
  if (!found.includes(i)) clearFinder();
  reveal(i);
  drawList();
  note("latent=" + encodeURIComponent(L.key[i]));
  const latent = await latentOf(i);
  if (mine !== asked) return;  // another was opened meanwhile
  at("detail").replaceChildren(...latentPage(i, latent, one => openLatent(one, true)));
  at("detail").dataset.key = L.key[i];
  at("detail").scrollTop = 0;
  at("detail").setAttribute("aria-label", `Latent ${L.key[i]}: ${nameOf(i)}`);
  if (focus) at("detail").focus({preventScroll: true});
}

function step(by) {
  if (!found.length) return;
  const now = found.indexOf(selected);
  openLatent(found[now < 0 ? 0 : Math.min(found.length - 1, Math.max(0, now + by))]);
}

function onKey(event) {
  if (event.ctrlKey || event.metaKey || event.altKey || document.querySelector("dialog[open]")) return;
  const field = event.target.closest("input, select, textarea"), inSearch = field === at("search");
  if (event.key === "Escape") {
    if (finder.words) { at("search").value = ""; finder.words = ""; find(); }
    else if (field) field.blur();
    else if (narrow.matches && document.body.classList.contains("reading")) showList();
    if (inSearch) at("list").focus();
    return;
  }
  if (inSearch && (event.key === "ArrowDown" || event.key === "Enter")) {
    event.preventDefault();
    at("list").focus();
    if (found.length) openLatent(found[0]);
    return;
  }
  if (field) return;
  const tab = event.target.closest("[role=tab]"), moves = {ArrowDown: 1, ArrowRight: 1, ArrowUp: -1, ArrowLeft: -1}[event.key];
  if (tab && moves) {
    const names = PARTS.map(([name]) => name), name = names[(names.indexOf(tab.dataset.part) + moves + names.length) % names.length];
    showPart(name);
    at("tab-" + name).focus();
  } else if (moves && document.body.dataset.part === "latents") step(moves);
  else if (event.key === "/") { showPart("latents"); document.body.classList.remove("reading"); at("search").focus(); at("search").select(); }
  else if (event.key === "t") nextTheme();
  else if (event.key === "b") setBoxes(!boxesNow());
  else if (event.key === "[" || event.key === "]") setOpacity(Math.min(1, Math.max(0, Math.round(10 * heatNow() + (event.key === "]" ? 1 : -1)) / 10)));
  else if (event.key === "?") at("help").showModal();
  else if (PARTS[Number(event.key) - 1]) showPart(PARTS[Number(event.key) - 1][0]);
  else return;
  event.preventDefault();
}

function start() {
  at("banner").append(make("strong", {}, INDEX.holds.banner), " ", INDEX.origin);
  at("tabs").append(...PARTS.map(([name, text]) => make("button", {type: "button", role: "tab", id: "tab-" + name, "aria-controls": name, "data-part": name, onclick: () => showPart(name)},
    text, name === "latents" ? make("span", {class: "n"}, whole(N_LATENTS)) : null)));
  document.querySelector(".skip").addEventListener("click", event => { event.preventDefault(); at("view").focus(); });
  at("theme").addEventListener("click", nextTheme);
  at("help-open").addEventListener("click", () => at("help").showModal());
  document.addEventListener("keydown", onKey);
  matchMedia("(prefers-color-scheme: dark)").addEventListener("change", redrawCharts);
  addEventListener("resize", drawList);
  setOpacity(parseFloat(recall("heat") ?? "0.6"));
  const open = i => openLatent(i, true);
  startList(i => openLatent(i));
  steeringView();
  const address = location.hash.slice(1), key = address.startsWith("latent=") ? decodeURIComponent(address.slice(7)) : null;
  overview(open);
  if (key !== null && byKey.has(key)) openLatent(byKey.get(key));
  else showPart(PARTS.some(([name]) => name === address) ? address : "overview");
  setTheme(THEMES[recall("theme")] ? recall("theme") : "auto");
  performance.mark("ready");
  document.documentElement.dataset.ready = "1";
}
start();
