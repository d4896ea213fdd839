// One latent: what it is called and how well that holds, what it fires on, what it writes.
const KINDS = {
  top: "Strongest", quantile: "Across its range", random_silent: "Silent: drawn at random", same_finding_absent: "Silent, though the finding is named",
  neighbour: "Silent, while a neighbour fires", same_region: "Silent, in the same region",
};
const kindWords = kind => KINDS[kind] ?? kind;

const block = (title, note, ...children) =>
  make("section", {class: "block"}, make("h3", {}, title), note ? make("p", {class: "note"}, note) : null, ...children);

function scoreTable(scores) {
  if (!scores.length) return null;
  return make("table", {class: "scores"},
    make("thead", {}, make("tr", {}, ...["Score", "value", "", "baseline"].map((word, n) => make(n === 2 ? "td" : "th", {scope: n === 2 ? null : "col"}, word)))),
    make("tbody", {}, ...scores.map(score => make("tr", {},
      make("th", {scope: "row"}, score.scorer, make("small", {}, " " + score.modality)),
      make("td", {class: "number"}, figure(score.value, 2), score.standard_error === null ? null : make("small", {title: "95% interval"}, ` ± ${figure(1.96 * score.standard_error, 2)}`)),
      make("td", {class: "wide"}, scoreBar(score.value, score.baseline)),
      make("td", {class: "number"}, figure(score.baseline, 2))))));
}

function activity(stats) {
  const facts = [`fires on ${percent(stats.n_rows ? stats.n_fired / stats.n_rows : 0)} of ${plural(stats.n_rows, "row")}`,
    ...Object.entries(stats.quantiles).map(([name, value]) => `${name} ${strength(value)}`), stats.n_fired ? `max ${strength(stats.maximum)}` : null].filter(Boolean);
  const tail = stats.n_fired >= FEWEST && Object.keys(stats.quantiles).length > 0;
  const shape = stats.counts.length ? [histogramChart(stats)] : tail ? [make("p", {class: "note"}, "Share of the firing rows at or above an activation:"), tailChart(stats)] : [];
  return make("div", {class: "activity"}, make("h4", {}, make("i", {class: "dot", style: `background:var(--${MODALITIES.includes(stats.modality) ? stats.modality : "other"})`}), stats.modality),
    make("p", {class: "note"}, facts.join(" · ")), ...shape);
}

// Tokens without heat join into plain text; a marked one keeps its value for the pointer and for readers.
function markedText(view, top) {
  const line = make("p", {class: "report", dir: "auto"});
  let plain = "";
  view.tokens.forEach((token, i) => {
    const byte = view.bytes[i];
    if (byte === 0) { plain += token; return; }
    line.append(plain); plain = "";
    const share = byte / 255;
    const lead = token.match(/^\s*/)[0];
    line.append(lead, make("mark", {style: `--share:${share.toFixed(2)}`, class: share > 0.5 ? "strong" : null, title: strength(share * top)}, token.slice(lead.length)));
  });
  line.append(plain);
  return make("div", {class: "excerpt"}, line, make("p", {class: "meta"}, [view.study, view.modality].filter(Boolean).join(" · ") + ` · peak ${strength(view.peak)}`));
}

function grouped(items, draw, wrap) {
  const kinds = [...new Set(items.map(item => item.kind))];
  kinds.sort((a, b) => Object.keys(KINDS).indexOf(a) - Object.keys(KINDS).indexOf(b));
  return kinds.map(kind => {
    const own = items.filter(item => item.kind === kind), body = wrap(own.map(draw));
    if (kind === "top") return body;
    return make("details", {open: kind === "quantile"}, make("summary", {}, `${kindWords(kind)} (${own.length})`), body);
  });
}

function tokenList(title, tokens) {
  const most = Math.max(...tokens.map(([, value]) => Math.abs(value)), 1e-12);
  return make("div", {}, make("h4", {}, title), make("ol", {class: "tokens"}, ...tokens.map(([token, value]) => make("li", {},
    make("code", {dir: "auto"}, token.replaceAll(" ", "␣").replaceAll("\n", "⏎")), make("span", {class: "tokenbar"}, make("i", {style: `width:${percentOf(Math.abs(value) / most)}`})), make("span", {class: "number"}, (value > 0 ? "+" : "") + value.toFixed(2))))));
}

function neighbourList(neighbours, open) {
  return make("ol", {class: "neighbours"}, ...neighbours.map(([key, cosine]) => {
    const i = byKey.get(key), label = i === undefined ? "not in this page" : nameOf(i);
    const body = [make("span", {class: "number"}, cosine.toFixed(2)), make("span", {class: "label", dir: "auto"}, label), make("span", {class: "facts"}, key)];
    return make("li", {}, i === undefined ? make("span", {class: "line"}, ...body) : make("button", {type: "button", class: "line", "data-key": key, onclick: () => open(i)}, ...body));
  }));
}

const words = pairs => make("p", {class: "report", dir: "auto"}, ...pairs.flatMap(([word, changed]) => [changed ? make("mark", {class: "changed"}, word) : word, " "]));

function beforeAfter(view) {
  const film = view.film === null ? null : filmFrame(INDEX.films[view.film]);
  return make("article", {class: "change"}, make("h4", {}, view.title), make("div", {class: film ? "sides with-film" : "sides"}, film,
    make("div", {}, make("h5", {}, "before"), words(view.before)), make("div", {}, make("h5", {}, "after"), words(view.after))));
}

function latentPage(i, latent, open) {
  const label = L.label[i];
  const tags = [L.finding[i] ? `finding: ${L.finding[i]}` : null, L.dense[i] ? "dense: fires nearly everywhere" : null,
    latent.explainer ? `named by ${latent.explainer}` : null, latent.confidence === null ? null : `confidence ${figure(latent.confidence, 2)}`].filter(Boolean);
  const head = make("header", {class: "latent-head"},
    make("div", {class: "steps"}, make("button", {type: "button", class: "back", onclick: () => showList()}, "← List"), make("span", {class: "key"}, "Latent " + L.key[i]),
      make("button", {type: "button", class: "step", "aria-label": "Previous latent", onclick: () => step(-1)}, "↑"), make("button", {type: "button", class: "step", "aria-label": "Next latent", onclick: () => step(1)}, "↓")),
    make("h2", {class: label === null ? "none" : null, dir: "auto"}, nameOf(i)),
    tags.length ? make("p", {class: "tags"}, ...tags.map(tag => make("span", {}, tag))) : null);

  const evidence = make("div", {class: "evidence"}), figures = make("div", {class: "figures"});
  if (latent.heats.length) {
    const cards = grouped(latent.heats, heat => filmCard(heat, latent.heat_top, () => enlargeFilms(latent.heats, latent.heat_top, latent.heats.indexOf(heat))), nodes => make("div", {class: "films"}, ...nodes));
    const more = latent.n_heats > latent.heats.length ? `${latent.heats.length} of ${latent.n_heats} collected films are in this page.` : null;
    evidence.append(block("Films", more, filmControls(latent.heat_top), ...cards));
  }
  if (latent.texts.length) evidence.append(block("Text", null, ...grouped(latent.texts, view => markedText(view, latent.text_top), nodes => make("div", {}, ...nodes))));
  if (INDEX.holds.text_withheld && latent.n_texts) evidence.append(block("Text", `${plural(latent.n_texts, "excerpt")} of reports left out of this page.`));
  if (latent.doses.length || latent.steering.length)
    evidence.append(block("Steering", null, ...latent.doses.map(doseChart), ...latent.steering.map(beforeAfter)));
  if (!evidence.childElementCount) evidence.append(make("p", {class: "note"}, "No examples of this latent are in this page."));

  const table = scoreTable(latent.scores);
  if (table) figures.append(block("Scores", `Held-out patients. The line across a bar is the baseline: the same measure of ${INDEX.baseline}.`, table));
  if (latent.modalities.length) figures.append(block("Activity", null, ...latent.modalities.map(activity)));
  if (latent.promoted.length || latent.suppressed.length)
    figures.append(block("Tokens it writes", "Change of the logit along its decoder direction.", make("div", {class: "pair"}, tokenList("promoted", latent.promoted), tokenList("suppressed", latent.suppressed))));
  if (latent.neighbours.length) figures.append(block("Neighbours", "Cosine of decoder directions.", neighbourList(latent.neighbours, open)));
  return [head, make("div", {class: "columns"}, evidence, figures)];
}
