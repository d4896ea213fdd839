function histogramChart(stats) {
  const node = chartNode(`Histogram of the activations on ${stats.modality}`, 118);
  const middles = stats.counts.map((_, i) => (stats.edges[i] + stats.edges[i + 1]) / 2);
  const texts = stats.counts.map((n, i) => `${strength(stats.edges[i])}–${strength(stats.edges[i + 1])}<br>${plural(n, "row")}`);
  chart(node, () => ({
    data: [{type: "bar", x: middles, y: stats.counts, width: stats.edges[1] - stats.edges[0], marker: {color: modalityColour(stats.modality)}, hovertext: texts, hoverinfo: "text"}],
    layout: {xaxis: {range: [0, stats.edges.at(-1)], nticks: 5}, yaxis: {type: "log", dtick: 1, tickformat: "~s", title: {text: "rows", standoff: 4}}},
  }));
  return node;
}

// Without a histogram, the quantiles still say how the activations fall off, if there are enough of them.
const FEWEST = 100;
const TAILS = {p50: 0.5, p90: 0.1, p99: 0.01};
function tailChart(stats) {
  const node = chartNode(`Share of firing rows at or above an activation, on ${stats.modality}`, 118);
  const points = Object.entries(stats.quantiles).filter(([name]) => name in TAILS).map(([name, value]) => [value, TAILS[name]]);
  points.unshift([0, 1]);
  points.push([stats.maximum, 1 / stats.n_fired]);
  points.sort((a, b) => a[0] - b[0]);
  chart(node, () => ({
    data: [{type: "scatter", mode: "lines+markers", x: points.map(p => p[0]), y: points.map(p => p[1]), line: {color: modalityColour(stats.modality), width: 2}, marker: {size: 5}, hovertemplate: "%{y:.2p} of firing rows<br>at or above %{x:.2f}<extra></extra>"}],
    layout: {xaxis: {rangemode: "tozero", nticks: 5}, yaxis: {type: "log", dtick: 1, tickformat: "~p"}},
  }));
  return node;
}

function doseChart(dose) {
  const node = chartNode(`${dose.outcome} against the strength of the edit`, 200);
  chart(node, () => {
    const hue = colour("--accent"), data = [];
    if (dose.lower.length)
      data.push({x: [...dose.strengths, ...[...dose.strengths].reverse()], y: [...dose.upper, ...[...dose.lower].reverse()], fill: "toself", fillcolor: hue, opacity: 0.18, line: {width: 0}, hoverinfo: "skip", mode: "lines"});
    data.push({x: dose.strengths, y: dose.values, mode: "lines+markers", line: {color: hue, width: 2}, marker: {size: 6}, hovertemplate: "strength %{x}<br>%{y:.3f}<extra></extra>"});
    return {data, layout: {xaxis: {title: {text: "strength (× 99th percentile)", standoff: 6}}, yaxis: {}, margin: {l: 42, r: 8, t: 6, b: 40}}};
  });
  return make("figure", {class: "dose"}, make("figcaption", {}, dose.outcome), node);
}

function mapChart(open) {
  const L = INDEX.latents;
  const node = chartNode("All latents: firing rate against score", 340);
  node.classList.add("map");
  chart(node, () => ({
    data: INDEX.modalities.map((name, m) => {
      const own = L.key.map((_, i) => i).filter(i => L.modality[i] === m && L.score[i] !== null && L.rate[i] > 0);
      return {type: "scatter", mode: "markers", name, x: own.map(i => L.rate[i]), y: own.map(i => L.score[i]), customdata: own,
        marker: {color: modalityColour(name), size: 6, opacity: 0.62, line: {width: 0}}, hoverinfo: "text",
        hovertext: own.map(i => `${L.key[i]} · ${escaped(nameOf(i))}<br>${INDEX.scorer} ${figure(L.score[i])} · fires on ${percent(L.rate[i])}`)};
    }).filter(trace => trace.x.length),
    layout: {showlegend: true, legend: {orientation: "h", x: 0, y: 1.12, font: {size: 12}}, hovermode: "closest", margin: {l: 48, r: 10, t: 30, b: 44},
      xaxis: {type: "log", title: {text: "share of rows it fires on"}, tickformat: "~p", dtick: 1}, yaxis: {title: {text: INDEX.scorer}}},
    onclick: point => open(point.customdata),
  }));
  return node;
}

// Plotly reads a little HTML in the text of labels.
const escaped = text => text.replace(/[&<>"']/g, sign => `&#${sign.charCodeAt(0)};`);
