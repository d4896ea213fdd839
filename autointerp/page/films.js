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

function filmControls(top) {
  const stops = SCALE.join(",");
  return make("div", {class: "controls"},
    make("label", {}, "Heat ", make("input", {type: "range", class: "opacity", min: 0, max: 100, value: Math.round(100 * heatNow()), oninput: event => setOpacity(event.target.value / 100)})),
    make("label", {}, make("input", {type: "checkbox", class: "boxes", checked: boxesNow(), onchange: event => setBoxes(event.target.checked)}), " boxes"),
    top > 0 ? make("span", {class: "scale", role: "img", "aria-label": `Colour scale from 0 to ${strength(top)}`}, "0", make("i", {style: `background:linear-gradient(90deg,${stops})`}), strength(top)) : null);
}
