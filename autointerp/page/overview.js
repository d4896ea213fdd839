// The first view: what the page holds, all latents at a glance, and the findings with the latents that stand for them.
function findingsTable(rows, open) {
  const columns = Object.keys(rows[0]);
  const head = make("tr", {}), body = make("tbody", {id: "findings"});
  let order = {column: null, down: false};
  const plainCell = cell => cell !== null && typeof cell === "object" ? cell.text : cell;
  function cellNode(cell) {
    if (cell !== null && typeof cell === "object") {
      const i = byKey.get(cell.key);
      return i === undefined ? cell.text : make("button", {type: "button", class: "link", "data-key": cell.key, onclick: () => open(i)}, cell.text);
    }
    return figure(cell);
  }
  function draw() {
    const sorted = [...rows];
    if (order.column !== null) sorted.sort((a, b) => {
      const x = plainCell(a[order.column]), y = plainCell(b[order.column]);
      if (x === null || y === null) return (x === null) - (y === null);
      return (order.down ? -1 : 1) * (typeof x === "number" && typeof y === "number" ? x - y : collator.compare(x, y));
    });
    head.replaceChildren(...columns.map(column => make("th", {scope: "col", "aria-sort": order.column === column ? (order.down ? "descending" : "ascending") : "none"},
      make("button", {type: "button", onclick: () => { order = {column, down: order.column === column ? !order.down : typeof plainCell(rows[0][column]) === "number"}; draw(); }}, column))));
    body.replaceChildren(...sorted.map(row => make("tr", {}, ...columns.map((column, n) =>
      make(n ? "td" : "th", {scope: n ? null : "row", dir: "auto", class: typeof row[column] === "number" ? "number" : null}, cellNode(row[column]))))));
  }
  draw();
  return make("div", {class: "scroll", tabindex: "0", role: "region", "aria-label": "Findings"}, make("table", {class: "findings"}, make("thead", {}, head), body));
}

function overview(open) {
  const node = at("overview"), labelled = L.label.filter(label => label !== null).length;
  node.append(make("p", {class: "lead"}, INDEX.subtitle));
  const facts = {...INDEX.facts, Latents: `${whole(N_LATENTS)}, ${whole(labelled)} with a label`};
  node.append(make("dl", {class: "facts"}, ...Object.entries(facts).map(([name, value]) => make("div", {}, make("dt", {}, name), make("dd", {}, value)))));
  if (L.score.some(score => score !== null))
    node.append(block("All latents", "Each point is a latent: how often it fires, and its score. A click opens it.", mapChart(open)));
  if (INDEX.findings.length)
    node.append(block("Findings", null, findingsTable(INDEX.findings, open)));
  node.append(block("What this page holds", null, make("ul", {class: "holds"}, ...INDEX.holds.lines.map(line => make("li", {}, line)))));
}

function steeringView() {
  if (!INDEX.steering.length && !INDEX.doses.length) return;
  at("steering").append(make("p", {class: "lead"}, "A latent is turned up or down while the report is being written. Words that differ are marked."),
    INDEX.doses.length ? make("div", {class: "doses"}, ...INDEX.doses.map(doseChart)) : "", ...INDEX.steering.map(beforeAfter));
}
