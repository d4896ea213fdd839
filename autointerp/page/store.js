// What the page holds: an index that is read at once, and parts that are unpacked when they are needed.
const INDEX = JSON.parse(at("index").textContent);
const N_LATENTS = INDEX.latents.key.length;
const byKey = new Map(INDEX.latents.key.map((key, i) => [key, i]));

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

