// The list: found by words, narrowed, sorted, and drawn only where it is seen.
const L = INDEX.latents;
const ROW = 58;
const SORTS = {
  score: ["score", i => L.score[i], true],
  gain: ["score above baseline", i => L.score[i] === null || L.baseline[i] === null ? null : L.score[i] - L.baseline[i], true],
  latent: ["number", i => i, false],
  label: ["label", i => L.label[i]?.toLowerCase() ?? null, false],
  rate: ["firing rate", i => rateOf(i), true],
  peak: ["largest activation", i => L.peak[i], true],
  modality: ["modality", i => INDEX.modalities[L.modality[i]] ?? null, false],
  finding: ["finding", i => L.finding[i]?.toLowerCase() ?? null, false],
};
const finder = {words: "", sort: "latent", down: false, modality: "", finding: "", labelled: false, sparse: false};
const haystack = L.key.map((key, i) => [key, L.label[i], L.finding[i], L.tokens[i]].filter(Boolean).join("\n").toLowerCase());
const collator = new Intl.Collator("en", {numeric: true});
const nameOf = i => L.label[i] ?? (L.asked[i] ? "no clear concept" : L.finding[i] ? `${L.finding[i]} (finding, no label)` : "not labelled");
let found = [];
let selected = null;

// Of the modality asked for, or else of the one the latent fires on most.
const rateOf = i => finder.modality ? L.rates[INDEX.modalities.indexOf(finder.modality)][i] : L.rate[i];

function find() {
  const words = finder.words.toLowerCase().split(/\s+/).filter(Boolean);
  const modality = finder.modality ? INDEX.modalities.indexOf(finder.modality) : null;
  found = [];
  for (let i = 0; i < N_LATENTS; i++) {
    if (finder.labelled && L.label[i] === null) continue;
    if (finder.sparse && L.dense[i]) continue;
    if (modality !== null && L.modality[i] !== modality) continue;
    if (finder.finding && L.finding[i] !== finder.finding) continue;
    if (words.every(word => haystack[i].includes(word))) found.push(i);
  }
  const [, key] = SORTS[finder.sort], sign = finder.down ? -1 : 1;
  const keys = new Map(found.map(i => [i, key(i)]));
  found.sort((a, b) => {
    const x = keys.get(a), y = keys.get(b);
    if (x === null || y === null) return (x === null) - (y === null) || a - b;  // unknown last, either way
    return sign * (typeof x === "string" ? collator.compare(x, y) : x - y) || a - b;
  });
  at("count").textContent = found.length === N_LATENTS ? plural(N_LATENTS, "latent") : `${whole(found.length)} of ${plural(N_LATENTS, "latent")}`;
  at("list").scrollTop = 0;
  drawList();
}

function scoreBar(score, baseline) {
  const bar = make("span", {class: "bar"}, make("i", {style: `width:${percentOf(Math.max(0, Math.min(1, score)))}`}));
  if (baseline !== null) bar.append(make("b", {style: `left:${percentOf(Math.max(0, Math.min(1, baseline)))}`}));
  return bar;
}

function listRow(i, position) {
  const label = L.label[i], score = L.score[i];
  const facts = [L.key[i], INDEX.modalities[L.modality[i]], percent(rateOf(i)), L.dense[i] ? "dense" : null, L.finding[i]].filter(Boolean).join(" · ");
  return make("div", {id: "option-" + i, class: "option", role: "option", "aria-selected": String(i === selected), "aria-setsize": found.length, "aria-posinset": position + 1,
    style: `top:${position * ROW}px;height:${ROW}px`, "data-latent": i, "data-key": L.key[i]},
    make("span", {class: "label" + (label === null ? " none" : ""), dir: "auto"}, nameOf(i)),
    make("span", {class: "facts"}, facts),
    score === null ? null : make("span", {class: "score", title: `${INDEX.scorer} ${figure(score)}` + (L.baseline[i] === null ? "" : `, baseline ${figure(L.baseline[i])}`)}, make("span", {class: "number"}, score.toFixed(2)), scoreBar(score, L.baseline[i])));
}

function drawList() {
  const list = at("list"), rows = at("rows");
  rows.style.height = found.length * ROW + "px";
  const first = Math.max(0, Math.floor(list.scrollTop / ROW) - 6);
  const last = Math.min(found.length, Math.ceil((list.scrollTop + (list.clientHeight || 800)) / ROW) + 6);
  rows.replaceChildren(...found.slice(first, last).map((i, n) => listRow(i, first + n)));
  if (!found.length) rows.append(make("p", {class: "empty"}, "Nothing found. ", make("button", {type: "button", onclick: clearFinder}, "Clear the search")));
  const active = selected !== null && document.getElementById("option-" + selected);
  active ? list.setAttribute("aria-activedescendant", "option-" + selected) : list.removeAttribute("aria-activedescendant");
}

function clearFinder() {
  Object.assign(finder, {words: "", modality: "", finding: "", labelled: false, sparse: false});
  at("search").value = at("modality").value = at("finding").value = "";
  at("labelled").checked = at("sparse").checked = false;
  find();
}

function reveal(i) {
  const position = found.indexOf(i), list = at("list");
  if (position < 0) return;
  if (position * ROW < list.scrollTop) list.scrollTop = position * ROW;
  else if ((position + 1) * ROW > list.scrollTop + list.clientHeight) list.scrollTop = (position + 1) * ROW - list.clientHeight;
}

function sortBy(name) {
  finder.sort = name;
  finder.down = SORTS[name][2];
  at("sort").value = name;
  showDirection();
  find();
}
function showDirection() {
  at("direction").textContent = finder.down ? "↓" : "↑";
  at("direction").setAttribute("aria-label", finder.down ? "Descending; make ascending" : "Ascending; make descending");
}

function startList(open) {
  const known = name => name === "label" || name === "latent" || N_LATENTS === 0 || L.key.some((_, i) => SORTS[name][1](i) !== null);
  at("sort").append(...Object.entries(SORTS).filter(([name]) => known(name)).map(([name, [words]]) => make("option", {value: name}, words)));
  at("modality").append(make("option", {value: ""}, "anything"), ...INDEX.modalities.map(name => make("option", {value: name}, name)));
  const findings = [...new Set(L.finding.filter(Boolean))].sort(collator.compare);
  at("finding").append(make("option", {value: ""}, "any"), ...findings.map(name => make("option", {value: name}, name)));
  at("finding-label").hidden = findings.length === 0;
  at("search").addEventListener("input", event => { finder.words = event.target.value; find(); });
  at("sort").addEventListener("change", event => sortBy(event.target.value));
  at("direction").addEventListener("click", () => { finder.down = !finder.down; showDirection(); find(); });
  for (const name of ["modality", "finding"]) at(name).addEventListener("change", event => { finder[name] = event.target.value; find(); });
  for (const name of ["labelled", "sparse"]) at(name).addEventListener("change", event => { finder[name] = event.target.checked; find(); });
  let waiting = false;
  at("list").addEventListener("scroll", () => {
    if (!waiting) requestAnimationFrame(() => { waiting = false; drawList(); });
    waiting = true;
  }, {passive: true});
  at("rows").addEventListener("click", event => {
    const row = event.target.closest("[data-latent]");
    if (row) open(Number(row.dataset.latent));
  });
  sortBy(L.score.some(score => score !== null) ? "score" : "latent");
}
