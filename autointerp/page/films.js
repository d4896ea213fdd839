// Films under heat: the film's own pixels below, the patch map in a scale that colour-blind eyes can read above.
const VIRIDIS = INDEX.scale.map(hex => [1, 3, 5].map(i => parseInt(hex.slice(i, i + 2), 16)));
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

// A film with its heat (or none) and boxes. onvalue hears which patch the pointer is on.
function filmFrame(film, heat = null, top = 0, onvalue = null) {
  const source = filmSource(film);
  const frame = make("div", {class: "film", style: `aspect-ratio:${film.width}/${film.height}`});
  if (source) frame.append(make("img", {src: source, alt: "Film: " + film.caption, decoding: "async", draggable: "false"}));
  else frame.append(make("span", {class: "withheld"}, INDEX.holds.films_withheld ? "film withheld" : "film not in this page"));
  if (heat) {
    const bytes = bytesOf(heat.bytes), canvas = heatCanvas(heat, bytes);
    const holder = make("div", {class: "grid", style: place(film.grid)}, canvas);
    if (onvalue) {
      holder.addEventListener("pointermove", event => {
        const area = holder.getBoundingClientRect();
        const column = Math.min(heat.columns - 1, Math.max(0, Math.floor((event.clientX - area.left) / area.width * heat.columns)));
        const row = Math.min(heat.rows - 1, Math.max(0, Math.floor((event.clientY - area.top) / area.height * heat.rows)));
        onvalue(`row ${row + 1}, column ${column + 1}: ${strength(bytes[row * heat.columns + column] / 255 * top)}`);
      });
      holder.addEventListener("pointerleave", () => onvalue(null));
    }
    frame.append(holder);
  }
  for (const [name, corners] of film.boxes)
    frame.append(make("div", {class: "box", style: place(corners)}, make("span", {}, name)));
  return frame;
}

function filmCard(heat, top, enlarge) {
  const film = INDEX.films[heat.film];
  const usual = `peak ${strength(heat.peak)}`;
  const value = make("span", {class: "value"}, usual);
  const frame = filmFrame(film, heat, top, text => { value.textContent = text ?? usual; });
  const button = make("button", {type: "button", class: "plain", "aria-label": `Enlarge: ${film.caption}, ${heat.modality}, ${usual}`, onclick: enlarge}, frame);
  return make("figure", {class: "card"}, button,
    make("figcaption", {}, make("span", {class: "name", title: film.caption}, film.caption), make("span", {class: "meta"}, heat.modality + " · ", value)));
}

// The enlarged film steps through the films of the latent.
function enlargeFilms(heats, top, start) {
  const dialog = at("film-dialog");
  let i = start;
  function draw() {
    const heat = heats[i], film = INDEX.films[heat.film], value = make("span", {class: "value"}, `peak ${strength(heat.peak)}`);
    const frame = filmFrame(film, heat, top, text => { value.textContent = text ?? `peak ${strength(heat.peak)}`; });
    frame.style.maxWidth = `calc(78vh * ${film.width} / ${film.height})`;
    dialog.replaceChildren(
      make("div", {class: "dialog-head"}, make("strong", {}, film.caption), make("span", {class: "meta"}, `${heat.modality} · `, value, ` · film ${i + 1} of ${heats.length}`),
        make("button", {type: "button", onclick: () => dialog.close()}, "Close")),
      frame, make("p", {class: "meta"}, `${film.width} × ${film.height} px` + (film.shown && film.shown[0] !== film.width ? `, shown at ${film.shown[0]} × ${film.shown[1]}` : "") + "; grey values as the model reads them"));
  }
  const step = by => { i = (i + by + heats.length) % heats.length; draw(); };
  dialog.onkeydown = event => {
    const by = {ArrowRight: 1, ArrowDown: 1, ArrowLeft: -1, ArrowUp: -1}[event.key];
    if (by) { event.preventDefault(); event.stopPropagation(); step(by); }
  };
  draw();
  dialog.showModal();
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

function filmControls(top) {
  const stops = INDEX.scale.join(",");
  return make("div", {class: "controls"},
    make("label", {}, "Heat ", make("input", {type: "range", class: "opacity", min: 0, max: 100, value: Math.round(100 * heatNow()), oninput: event => setOpacity(event.target.value / 100)})),
    make("label", {}, make("input", {type: "checkbox", class: "boxes", checked: boxesNow(), onchange: event => setBoxes(event.target.checked)}), " boxes"),
    top > 0 ? make("span", {class: "scale", role: "img", "aria-label": `Colour scale from 0 to ${strength(top)}`}, "0", make("i", {style: `background:linear-gradient(90deg,${stops})`}), strength(top)) : null);
}
