// Layers by types. A cell of several matrices (experts) shows their geometric mean and unfolds into all of them.
const MOST_BESIDE = 200;
const WIDE_STRIP = 16; // up to so many members, each is wide enough for its number
const channel = (part) => {
  const value = part / 255;
  return value <= 0.04045 ? value / 12.92 : ((value + 0.055) / 1.055) ** 2.4;
};

function luminance(color) {
  const [red, green, blue] = [1, 3, 5].map((start) => channel(parseInt(color.slice(start, start + 2), 16)));
  return 0.2126 * red + 0.7152 * green + 0.0722 * blue;
}

// Black or white, whichever stands out more: at least 4.58 to 1.
const inks = raw.colors.map((color) => (luminance(color) > 0.179 ? "#000000" : "#ffffff"));

function paint(cell, value) {
  const isKnown = !Number.isNaN(value);
  const last = raw.colors.length - 1;
  const place = Math.max(0, Math.min(last, Math.round(placeOnScale(value) * last)));
  cell.style.backgroundColor = isKnown ? raw.colors[place] : "";
  cell.style.color = isKnown ? inks[place] : "";
}

function entryCell(i, withText, classes = "cell") {
  const cell = element("button", { type: "button", class: classes, "data-position": i, tabindex: "-1" });
  if (withText) cell.dataset.text = "";
  dressEntry(cell);
  return cell;
}

// The color, the text and the name of the cell of one entry, for what is shown.
function dressEntry(cell) {
  const i = Number(cell.dataset.position);
  const isRegular = statusOf(i) === "ok" || statusOf(i) === "scored";
  const without = statusOf(i) === "rank_deficient" ? "singular" : isRegular ? "-" : formatCell(i);
  const other = hasShown(i) ? formatShort(shown.values[i]) : without;
  if (cell.dataset.text !== undefined) cell.textContent = isKappaShown() ? formatCell(i) : other;
  paint(cell, shown.values[i]);
  if (statusOf(i) !== "ok") cell.classList.toggle(statusOf(i), !hasShown(i));
  cell.setAttribute("aria-label", describeShown(i).join(", "));
}

const isBroken = (status) => status !== "ok" && !(status === "scored" && !isKappaShown());

function groupLines(found) {
  const { layer, label, members, mean, low, high, status } = found;
  const lines = [`layer ${layer}, ${label}: ${plural(members.length, "matrix", "matrices")}`];
  if (!Number.isNaN(mean)) {
    const kind = shown.isLogarithmic ? "geometric mean" : "mean";
    lines.push(`${shownWords()} ${formatNumber(low)} to ${formatNumber(high)}, ${kind} ${formatNumber(mean)}`);
  }
  if (isBroken(status)) {
    const number = members.filter((i) => isBroken(statusOf(i))).length;
    lines.push(`${number} of them without a finite ${shownWords()}, ${STATUS_WORDS[status]} at worst`);
  }
  const taken = members.filter((i) => cut.chosen[i]).length;
  lines.push(`${taken} of ${members.length} in the budget`);
  return lines;
}

function groupCell() {
  return element("button", { type: "button", class: "cell", tabindex: "-1", "aria-expanded": "false" });
}

function dressGroup({ cell, mean, status }) {
  paint(cell, mean);
  for (const name of ["mixed", status]) cell.classList.remove(name);
  if (isBroken(status)) cell.classList.add(Number.isNaN(mean) ? status : "mixed");
}

const mapCells = raw.grid.cells.map(([row, column, members, kappa, low, high, status]) => ({
  row,
  column,
  members,
  ofKappa: [kappa, low, high].map(toNumber),
  mean: NaN,
  low: NaN,
  high: NaN,
  status,
  layer: raw.grid.layers[row],
  label: printable(raw.grid.columns[column].label),
  cell: null,
}));

// The numbers of all cells for what is shown, and the span of their colors.
function measureCells() {
  for (const found of mapCells) {
    const values = found.members.filter(hasShown).map((i) => shown.values[i]);
    const [low, high] = values.length ? spanOf(values) : [NaN, NaN];
    [found.mean, found.low, found.high] = isKappaShown() ? found.ofKappa : [meanOf(values), low, high];
  }
  const means = mapCells.map((found) => found.mean);
  [shown.low, shown.high] = isKappaShown() ? raw.range : spanOf(means.length ? means : [...shown.values]);
}

// Long names may break after a dot or an underscore.
const breakable = (text) => text.split(/(?<=[._])/).flatMap((word) => [word, element("wbr")]);

function mapTable() {
  const headers = raw.grid.columns.map((column) => {
    const whole = printable(raw.tables.group[column.group] ?? column.group);
    return element("th", { scope: "col", title: whole }, ...breakable(printable(column.label)));
  });
  const table = element("table", { class: "map" });
  const head = element("tr", {}, element("th", { scope: "col" }, "layer"), ...headers);
  const rows = raw.grid.layers.map((layer) => {
    const cells = raw.grid.columns.map(() => element("td"));
    return element("tr", {}, element("th", { scope: "row" }, layer), ...cells);
  });
  for (const found of mapCells) {
    const isOne = found.members.length === 1;
    found.cell = isOne ? entryCell(found.members[0], true) : groupCell();
    found.cell.dataset.row = found.row;
    found.cell.dataset.column = found.column;
    rows[found.row].children[found.column + 1].append(found.cell);
  }
  table.append(element("thead", {}, head), element("tbody", {}, ...rows));
  return table;
}

function toggleLayer(row, table) {
  const several = mapCells.filter((found) => found.row === row && found.members.length > 1);
  const own = table.tBodies[0].querySelector(`tr.unfolded[data-row="${row}"]`);
  for (const found of several) found.cell.setAttribute("aria-expanded", String(!own));
  if (own) return own.remove();
  const strips = several.map((found) => {
    const isWide = found.members.length <= WIDE_STRIP;
    const cells = found.members.map((i) => entryCell(i, isWide));
    if (cells.length) cells[0].tabIndex = 0;
    const members = element("div", { class: "members", role: "group", "aria-label": found.label }, ...cells);
    const title = element("div", { class: "title" }, `layer ${found.layer}, ${found.label}`);
    return element("div", { class: isWide ? "strip wide" : "strip" }, title, members);
  });
  const inView = element("div", { class: "strips" }, ...strips);
  const holder = element("td", { colspan: raw.grid.columns.length + 1 }, inView);
  const unfolded = element("tr", { class: "unfolded", "data-row": row }, holder);
  several[0].cell.closest("tr").after(unfolded);
  return markChosen(unfolded);
}

function markChosen(within) {
  for (const cell of within.querySelectorAll(".cell[data-position]")) {
    cell.classList.toggle("chosen", cut.chosen[cell.dataset.position] === 1);
  }
}

function markGroups() {
  for (const found of mapCells) {
    if (found.members.length === 1) continue;
    const taken = found.members.filter((i) => cut.chosen[i]).length;
    found.cell.classList.toggle("chosen", taken === found.members.length);
    const some = taken > 0 && taken < found.members.length;
    found.cell.classList.toggle("some", some);
    const unknown = isBroken(found.status) ? STATUS_WORDS[found.status] : "?";
    const mean = Number.isNaN(found.mean) ? unknown : formatShort(found.mean);
    found.cell.textContent = some ? `${taken}/${found.members.length}` : `${mean} \u00d7${found.members.length}`;
    found.cell.setAttribute("aria-label", groupLines(found).join(", "));
  }
}

// Arrow keys: over the map from cell to cell, in a strip from member to member. One cell of each is in the tab order.
function moveFocus(event, table) {
  const steps = { ArrowLeft: [0, -1], ArrowRight: [0, 1], ArrowUp: [-1, 0], ArrowDown: [1, 0] };
  const step = steps[event.key];
  const cell = event.target.closest(".cell");
  if (!step || !cell) return;
  event.preventDefault();
  const strip = cell.closest(".members");
  const next = strip ? neighborInStrip(cell, strip, step) : neighborInMap(cell, table, step);
  if (!next) return;
  cell.tabIndex = -1;
  next.tabIndex = 0;
  next.focus();
}

function neighborInStrip(cell, strip, [down, right]) {
  if (right) return right > 0 ? cell.nextElementSibling : cell.previousElementSibling;
  const strips = [...strip.closest("td").querySelectorAll(".members")];
  const other = strips[strips.indexOf(strip) + down];
  return other && other.children[[...strip.children].indexOf(cell)];
}

function neighborInMap(cell, table, [down, right]) {
  let [row, column] = [Number(cell.dataset.row), Number(cell.dataset.column)];
  for (;;) {
    row += down;
    column += right;
    if (row < 0 || column < 0 || row >= raw.grid.layers.length || column >= raw.grid.columns.length) return null;
    const next = table.querySelector(`.cell[data-row="${row}"][data-column="${column}"]`);
    if (next) return next;
  }
}

function legend() {
  const ramp = element("div", { class: "ramp", role: "img", "aria-label": "color scale" });
  ramp.style.background = `linear-gradient(to right, ${raw.colors.filter((_, i) => i % 15 === 0).join(", ")})`;
  const ticks = element("div", { class: "ticks" });
  for (const place of [0, 0.5, 1]) {
    ticks.append(element("span", {}, formatShort(valueAt(place))));
  }
  const keys = ["rank_deficient", "bounded", "scored", "non_finite"]
    .filter((status) => isBroken(status) && raw.tables.status.includes(status))
    .map((status) => legendKey(status, STATUS_WORDS[status]));
  const target = document.getElementById("legend");
  target.replaceChildren();
  if (shown.values.some((value) => !Number.isNaN(value))) {
    target.append(shownWords(), element("div", { class: "bar" }, ramp, ticks));
  }
  target.append(...keys);
  if (mapCells.some((found) => isBroken(found.status) && !Number.isNaN(found.mean))) {
    const mark = element("span", { class: "mixed", "aria-hidden": "true" }, "!");
    target.append(element("span", { class: "key" }, mark, `some without a finite ${shownWords()}`));
  }
  target.append(legendKey("chosen", "in the budget"));
}

function legendKey(name, words) {
  const swatch = element("span", { class: `swatch ${name}`, "aria-hidden": "true" });
  return element("span", { class: "key" }, swatch, words);
}

function besideList() {
  const beside = raw.grid.beside;
  if (!beside.length) return;
  const items = beside.slice(0, MOST_BESIDE).map((i) => {
    const cell = entryCell(i, true);
    cell.tabIndex = 0;
    return element("li", {}, cell, printable(ranking.key[i]));
  });
  const more = beside.length - items.length;
  const words = `Without a place in the map: ${plural(beside.length, "matrix", "matrices")}`;
  document.getElementById("beside").append(
    element("div", { class: "small" }, more > 0 ? `${words}, the first ${MOST_BESIDE} of them here` : words),
    element("ul", {}, ...items),
  );
}

function mapHelp(hasGroups) {
  if (!mapCells.length) return "No matrix of this ranking has the number of a layer in its name.";
  const scale = shown.isLogarithmic ? "on a logarithmic scale" : "on a linear scale";
  const colors = `The color is ${shownWords()} ${scale}; point at a cell, or go there by arrow keys, for the rest.`;
  const mean = shown.isLogarithmic ? "geometric mean" : "mean";
  const groups = `A cell of several matrices, such as experts, shows their ${mean}, or how many of them the budget takes: open it for each.`;
  return hasGroups ? `${colors} ${groups}` : colors;
}

function startMap(reveal) {
  const map = document.getElementById("map");
  const hasGroups = mapCells.some((found) => found.members.length > 1);
  besideList();
  const section = map.closest("section");
  if (mapCells.length) {
    const table = mapTable();
    map.append(table);
    mapCells[0].cell.tabIndex = 0;
    map.addEventListener("keydown", (event) => moveFocus(event, table));
    map.addEventListener("click", (event) => {
      const cell = event.target.closest(".cell[aria-expanded]");
      if (cell) toggleLayer(Number(cell.dataset.row), table);
    });
  }
  const groupOf = new Map(mapCells.map((found) => [found.cell, found]));
  explain(section, ".cell", (cell) =>
    cell.dataset.position === undefined ? groupLines(groupOf.get(cell)) : describeShown(Number(cell.dataset.position)),
  );
  section.addEventListener("click", (event) => {
    const cell = event.target.closest(".cell[data-position]");
    if (cell) reveal(Number(cell.dataset.position));
  });
  cut.listeners.push(() => {
    markChosen(section);
    markGroups();
  });
  shown.listeners.push(() => {
    measureCells();
    for (const cell of section.querySelectorAll(".cell[data-position]")) dressEntry(cell);
    for (const found of mapCells) if (found.members.length > 1) dressGroup(found);
    markGroups();
    document.getElementById("map-help").textContent = mapHelp(hasGroups);
    legend();
  });
}
