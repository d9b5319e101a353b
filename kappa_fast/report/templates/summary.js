// The ranking by type or by layer: how many, median, lowest and highest kappa, and what the budget takes of each.
function summaryRows(byLayer) {
  const members = new Map();
  for (const i of positions) {
    const layer = ranking.layer[i];
    const name = byLayer ? (layer === null ? "outside of layers" : String(layer)) : valueOf(ranking.group, i);
    if (!members.has(name)) members.set(name, []);
    members.get(name).push(i);
  }
  const rows = [...members].map(([name, some]) => {
    const kappas = some.filter(isSettled).map((i) => ranking.kappa[i]).sort((a, b) => a - b);
    const middle = kappas.length / 2;
    const median = (kappas[Math.ceil(middle) - 1] + kappas[Math.floor(middle)]) / 2;
    return { name, some, median: kappas.length ? median : NaN, low: kappas[0] ?? NaN, high: kappas.at(-1) ?? NaN };
  });
  const number = (name) => (name === "outside of layers" ? Infinity : Number(name));
  const order = (a, b) => (a === b ? 0 : Number.isNaN(a) || a > b ? 1 : -1);
  return rows.sort((a, b) => (byLayer ? order(number(a.name), number(b.name)) : order(a.median, b.median)));
}

function startSummary() {
  const choice = document.getElementById("summary-by");
  const target = document.getElementById("summary");
  const headers = ["matrices", "median", "lowest", "highest", "weights", "taken", "share"];
  let cells = [];
  const sum = (some) => some.reduce((total, i) => total + numelOf(i), 0);
  const update = () => {
    for (const { some, taken, share } of cells) {
      const chosen = some.filter((i) => cut.chosen[i]);
      taken.textContent = chosen.length.toLocaleString("en");
      share.textContent = sizesAreKnown ? `${((100 * sum(chosen)) / sum(some)).toFixed(1)}%` : "?";
    }
  };
  const draw = () => {
    const byLayer = choice.value === "layer";
    const rows = summaryRows(byLayer);
    const [first, ...others] = [byLayer ? "layer" : "type", ...headers];
    const head = element("tr", {}, ...[first, ...others].map((header) => element("th", { scope: "col" }, header)));
    cells = [];
    const body = rows.map(({ name, some, median, low, high }) => {
      const [taken, share] = [0, 1].map(() => element("td", { class: "number" }));
      cells.push({ some, taken, share });
      const numbers = [some.length.toLocaleString("en"), ...[median, low, high].map((value) => formatNumber(value))];
      numbers.push(sizesAreKnown ? sum(some).toLocaleString("en") : "?");
      const filled = numbers.map((cell) => element("td", { class: "number" }, cell));
      return element("tr", {}, element("th", { scope: "row" }, printable(name)), ...filled, taken, share);
    });
    target.replaceChildren(
      element("table", { class: "plain" }, element("thead", {}, head), element("tbody", {}, ...body)),
    );
    update();
  };
  choice.addEventListener("change", draw);
  cut.listeners.push(update);
  draw();
}
