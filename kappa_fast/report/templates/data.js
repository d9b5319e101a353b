// The ranking as columns. `count` entries, by position; numbers in typed arrays, repeated texts through tables.
const raw = JSON.parse(document.getElementById("kappa-data").textContent);
const count = raw.entries.key.length;

const NAMED_NUMBERS = { nan: NaN, inf: Infinity, "-inf": -Infinity };
const toNumber = (value) => (typeof value === "string" ? NAMED_NUMBERS[value] : value);
const numbers = (name) => Float64Array.from(raw.entries[name], toNumber);
const repeated = (name) => ({ id: Uint32Array.from(raw.entries[name]), values: raw.tables[name] });

const ranking = {
  key: raw.entries.key,
  order: Uint32Array.from(raw.entries.order),
  layer: raw.entries.layer,
  certified: Uint8Array.from(raw.entries.certified),
  kappa: numbers("kappa"),
  lower: numbers("lower"),
  upper: numbers("upper"),
  score: numbers(raw.entries.score ? "score" : "kappa"),
  sensitivity: numbers("sensitivity"),
  group: repeated("group"),
  shape: repeated("shape"),
  dtype: repeated("dtype"),
  method: repeated("method"),
  status: repeated("status"),
  quantization: repeated("quantization"),
};

const valueOf = (column, i) => column.values[column.id[i]];
const statusOf = (i) => valueOf(ranking.status, i);
const numelOf = (i) => valueOf(ranking.shape, i)[2];
const isSettled = (i) => statusOf(i) === "ok" || statusOf(i) === "rank_deficient";
const hasFiniteKappa = (i) => statusOf(i) === "ok" && ranking.kappa[i] > 0 && ranking.kappa[i] < Infinity;

const positions = Uint32Array.from({ length: count }, (_, i) => i);
const hasScore = (i) => isSettled(i) || statusOf(i) === "scored";
const scoresAreKappas = positions.every((i) => !hasScore(i) || ranking.score[i] === ranking.kappa[i]);

function element(tag, attributes = {}, ...children) {
  const made = document.createElement(tag);
  for (const [name, value] of Object.entries(attributes)) {
    if (value !== null) made.setAttribute(name, value);
  }
  made.append(...children); // texts become text nodes: no name is ever read as markup
  return made;
}

function numbersTable(headers, rows) {
  const head = element("tr", {}, ...headers.map((header) => element("th", { scope: "col" }, header)));
  const body = rows.map((row) => element("tr", {}, ...row.map((cell) => element("td", { class: "number" }, cell))));
  return element("table", { class: "plain" }, element("thead", {}, head), element("tbody", {}, ...body));
}
