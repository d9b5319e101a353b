// All matrices, sorted and searched; only the rows in view are in the document.
const ROW_HEIGHT = 28;
const SPARE_ROWS = 12;
const rowsBox = document.getElementById("rows");

// Ids of repeated texts as places in the order of the texts.
function placesOfTexts(column) {
  const texts = column.values.map(String);
  const order = texts.map((_, id) => id).sort((a, b) => (texts[a] < texts[b] ? -1 : 1));
  const places = new Uint32Array(order.length);
  order.forEach((id, place) => (places[id] = place));
  return (i) => places[column.id[i]];
}

const textColumn = (name, header) => ({
  name,
  header,
  text: (i) => printable(valueOf(ranking[name], i) ?? ""),
  value: placesOfTexts(ranking[name]),
});

// name, header, text of a row, what it is sorted by (nan always comes last), whether it is set to the right
const COLUMNS = [
  { name: "place", header: "#", text: (i) => String(i + 1), value: (i) => i, isNumber: true },
  { name: "key", header: "Tensor", text: (i) => printable(ranking.key[i]), value: (i) => ranking.order[i] },
  {
    name: "layer",
    header: "Layer",
    text: (i) => String(ranking.layer[i] ?? ""),
    value: (i) => ranking.layer[i] ?? NaN,
    isNumber: true,
  },
  { name: "shape", header: "Shape", text: formatShape, value: numelOf, isNumber: true },
  textColumn("dtype", "Dtype"),
  {
    name: "score",
    header: "Score",
    text: (i) => (hasScore(i) ? formatNumber(ranking.score[i]) : "?"),
    value: (i) => ranking.score[i],
    isNumber: true,
  },
  { name: "kappa", header: "kappa", text: formatKappa, value: (i) => ranking.kappa[i], isNumber: true },
  { name: "interval", header: "Interval", text: formatInterval, value: (i) => ranking.lower[i] },
  { name: "proven", header: "Proven", text: formatProven, value: (i) => ranking.certified[i] },
  {
    name: "sensitivity",
    header: "Sensitivity",
    text: (i) => formatRelative(ranking.sensitivity[i]),
    value: (i) => ranking.sensitivity[i],
    isNumber: true,
  },
  { ...textColumn("status", "Status"), text: (i) => STATUS_WORDS[statusOf(i)] },
  textColumn("method", "Method"),
  textColumn("quantization", "Quantized"),
  { name: "budget", header: "Budget", text: (i) => (cut.chosen[i] ? "in" : ""), value: (i) => 1 - cut.chosen[i] },
].filter((column) => {
  if (column.name === "score") return !scoresAreKappas;
  return column.name !== "quantization" || ranking.quantization.values.some((kind) => kind !== null);
});

const table = { sort: "place", isDescending: false, rows: positions, head: null, body: null, revealed: -1 };
const searched = ranking.key.map((key) => key.toLowerCase());

function isShown(i, words, status, onlyChosen) {
  if (status && statusOf(i) !== status) return false;
  if (onlyChosen && !cut.chosen[i]) return false;
  return words.every((word) => searched[i].includes(word));
}

function sortRows(rows) {
  const { value } = COLUMNS.find((column) => column.name === table.sort);
  const values = Float64Array.from(rows, value);
  const places = Uint32Array.from(rows, (_, place) => place);
  const sign = table.isDescending ? -1 : 1;
  places.sort((a, b) => {
    const [x, y] = [values[a], values[b]];
    if (x !== x || y !== y) return (x !== x) - (y !== y) || rows[a] - rows[b];
    return x < y ? -sign : x > y ? sign : rows[a] - rows[b];
  });
  return places.map((place) => rows[place]);
}

function refilter() {
  const words = document.getElementById("search").value.toLowerCase().split(/\s+/).filter(Boolean);
  const status = document.getElementById("filter-status").value;
  const onlyChosen = document.getElementById("filter-chosen").checked;
  table.rows = sortRows(positions.filter((i) => isShown(i, words, status, onlyChosen)));
  const all = count.toLocaleString("en");
  document.getElementById("table-count").textContent =
    table.rows.length === count ? `${all} rows` : `${table.rows.length.toLocaleString("en")} of ${all} rows`;
  table.head.closest("table").setAttribute("aria-rowcount", String(table.rows.length + 1));
  drawRows();
}

function spacer(rows) {
  const line = element("tr", { class: "spacer", "aria-hidden": "true" }, element("td", { colspan: COLUMNS.length }));
  line.firstChild.style.height = `${rows * ROW_HEIGHT}px`;
  return line;
}

function row(i, place) {
  const cells = COLUMNS.map((column) => {
    const kind = [column.name, column.isNumber ? "number" : ""].join(" ").trim();
    return element("td", { class: kind }, column.text(i));
  });
  const line = element("tr", { class: statusOf(i), "data-position": i, "aria-rowindex": place + 2 }, ...cells);
  if (cut.chosen[i]) line.dataset.chosen = "";
  if (i === table.revealed) line.classList.add("revealed");
  return line;
}

function drawRows() {
  const visible = Math.ceil(rowsBox.clientHeight / ROW_HEIGHT);
  const first = Math.max(0, Math.floor(rowsBox.scrollTop / ROW_HEIGHT) - SPARE_ROWS);
  const last = Math.min(table.rows.length, first + visible + 2 * SPARE_ROWS);
  const rows = [];
  for (let place = Math.min(first, last); place < last; place += 1) rows.push(row(table.rows[place], place));
  table.body.replaceChildren(spacer(Math.min(first, last)), ...rows, spacer(table.rows.length - last));
}

function sortBy(name) {
  table.isDescending = table.sort === name && !table.isDescending;
  table.sort = name;
  markSorted();
  rowsBox.scrollTop = 0;
  refilter();
}

function markSorted() {
  for (const header of table.head.children) {
    const direction = table.isDescending ? "descending" : "ascending";
    header.setAttribute("aria-sort", header.dataset.name === table.sort ? direction : "none");
  }
}

// Scrolls to one entry, and clears search and filters.
function reveal(i) {
  for (const [id, empty] of [["search", ""], ["filter-status", ""]]) document.getElementById(id).value = empty;
  document.getElementById("filter-chosen").checked = false;
  table.revealed = i;
  refilter();
  rowsBox.scrollTop = Math.max(0, (table.rows.indexOf(i) - 3) * ROW_HEIGHT);
  drawRows();
  hideTip();
  rowsBox.scrollIntoView({ block: "nearest" });
}

function startTable() {
  const headers = COLUMNS.map((column) => {
    const button = element("button", { type: "button" }, column.header);
    button.addEventListener("click", () => sortBy(column.name));
    const kind = column.isNumber ? "number" : null;
    return element("th", { scope: "col", "data-name": column.name, "aria-sort": "none", class: kind }, button);
  });
  table.head = element("tr", { "aria-rowindex": "1" }, ...headers);
  table.body = element("tbody");
  rowsBox.append(element("table", {}, element("thead", {}, table.head), table.body));
  const select = document.getElementById("filter-status");
  select.append(element("option", { value: "" }, "all"));
  for (const status of raw.tables.status) select.append(element("option", { value: status }, STATUS_WORDS[status]));
  for (const id of ["search", "filter-status", "filter-chosen"]) {
    document.getElementById(id).addEventListener("input", () => {
      rowsBox.scrollTop = 0;
      refilter();
    });
  }
  let isWaiting = false;
  rowsBox.addEventListener("scroll", () => {
    if (isWaiting) return;
    isWaiting = true;
    requestAnimationFrame(() => {
      isWaiting = false;
      drawRows();
    });
  });
  new ResizeObserver(drawRows).observe(rowsBox);
  markSorted();
  refilter();
  // Sorts and filters by the cut are applied again; otherwise the rows are only drawn again.
  cut.listeners.push(() => {
    if (document.getElementById("filter-chosen").checked || table.sort === "budget") refilter();
    else drawRows();
  });
}
