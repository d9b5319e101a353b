// What a budget takes, read from the thresholds that kappa_fast computed (see thresholds.py).
const ranked = Array.from(positions).filter(hasScore);
const sizesAreKnown = positions.every((i) => numelOf(i) > 0);

const refused = (problem) => ({ chosen: [], isCertain: false, problem });

// `endOf(i, before)` is the least value that takes the matrix i after those whose last end is `before`.
function outcomeOf(name, value, endOf) {
  const table = raw.thresholds[name];
  if (table.beyond !== null && value >= table.beyond) {
    return refused("This reaches beyond what was resolved: rank again with a larger top, or without.");
  }
  const order = table.order ?? ranked.slice(0, table.number);
  let [taken, end] = [0, 0];
  while (taken < order.length && (end = endOf(order[taken], end)) <= value) taken++;
  const isCertain = table.certain.some(([from, below]) => from <= value && (below === null || value < below));
  const unfit = name === "max_params" ? order[taken] : undefined;
  return { chosen: order.slice(0, taken), isCertain, problem: "", unfit };
}

function givenCut() {
  return { chosen: raw.selection.chosen, isCertain: raw.selection.certain, problem: "", words: raw.selection.unfit };
}

const kappasOfRegular = ranked.filter((i) => hasFiniteKappa(i)).map((i) => ranking.kappa[i]).filter((k) => k >= 1);
const kappaSpan = [
  kappasOfRegular.reduce((least, kappa) => Math.min(least, kappa), Infinity),
  kappasOfRegular.reduce((most, kappa) => Math.max(most, kappa), 1),
];

// For each kind of budget: whether it can be used, its first value, and how the slider's 0..1 maps to values and back.
const BUDGETS = {
  max_params: {
    words: "share of all parameters",
    isPossible: sizesAreKnown && raw.parameters !== null,
    start: 0.2,
    isValid: (value) => value > 0 && value <= 1,
    hint: "Give a share of all parameters, above 0 and up to 1.",
    at: (place) => Number(Math.max(place, 0.001).toFixed(3)),
    placeOf: (value) => value,
    inPython: (value) => (Number.isInteger(value) ? `${value}.0` : String(value)), // an int would be a count
    cut: (share) => outcomeOf("max_params", Math.floor(share * raw.parameters), (i, sum) => sum + numelOf(i)),
  },
  num_tensors: {
    words: "number of matrices",
    isPossible: ranked.length > 0,
    start: Math.max(1, Math.floor(ranked.length / 5)),
    isValid: (value) => Number.isInteger(value) && value >= 1,
    hint: "Give a count of matrices from 1 on.",
    at: (place) => Math.max(1, Math.round(place * ranked.length)),
    placeOf: (value) => value / ranked.length,
    inPython: String,
    cut: (value) => outcomeOf("num_tensors", value, (i, number) => number + 1),
  },
  max_kappa: {
    words: "kappa up to",
    isPossible: kappasOfRegular.length > 0 && !raw.tables.status.includes("scored"),
    start: kappasOfRegular.length ? Number(formatNumber(kappasOfRegular[kappasOfRegular.length >> 2], 3, 1)) : 1,
    isValid: (value) => value >= 1 && value < Infinity,
    hint: "Give a condition number from 1 on.",
    at: (place) => Number(formatNumber(kappaSpan[0] * (kappaSpan[1] / kappaSpan[0]) ** place, 4, 1)),
    placeOf: (value) => Math.log(value / kappaSpan[0]) / Math.log(kappaSpan[1] / kappaSpan[0]),
    inPython: String,
    cut: (value) => outcomeOf("max_kappa", value, (i) => ranking.kappa[i]),
  },
};

// The present cut. `chosen[i]` is 1 if the budget takes the matrix i; listeners are called after every change.
const cut = { chosen: new Uint8Array(count), number: 0, listeners: [] };
const cutKind = document.getElementById("cut-kind");
const cutValue = document.getElementById("cut-value");
const cutSlider = document.getElementById("cut-slider");

function showCut(found, code) {
  cut.chosen.fill(0);
  for (const i of found.chosen) cut.chosen[i] = 1;
  cut.number = found.chosen.length;
  document.getElementById("cut-result").textContent = found.problem || resultWords(found);
  document.getElementById("cut-code").textContent = found.problem ? "" : code;
  for (const listener of cut.listeners) listener();
}

// A sentence about the matrix that did not fit into the number of weights.
function unfitWords(found) {
  if (found.words) return `${printable(found.words)}.`;
  if (found.unfit === undefined) return "";
  const numel = numelOf(found.unfit).toLocaleString("en");
  return `${printable(ranking.key[found.unfit])} with ${numel} weights did not fit (fill=True goes on to smaller ones).`;
}

function resultWords(found) {
  if (!found.chosen.length) return "This takes nothing.";
  const parts = [`${found.chosen.length.toLocaleString("en")} of ${plural(count, "matrix", "matrices")}`];
  const numel = found.chosen.reduce((sum, i) => sum + numelOf(i), 0);
  if (sizesAreKnown) {
    const share = raw.parameters ? ` (${((100 * numel) / raw.parameters).toFixed(1)}% of all)` : "";
    parts.push(`${numel.toLocaleString("en")} parameters${share}`);
  }
  const kappas = found.chosen.map((i) => ranking.kappa[i]).filter((kappa) => !Number.isNaN(kappa));
  const [low, high] = [Math.min, Math.max].map((pick) => kappas.reduce((a, b) => pick(a, b), kappas[0]));
  if (kappas.length) parts.push(`kappa ${formatNumber(low)} to ${formatNumber(high)}`);
  const certainty = found.isCertain
    ? "The cut is certain: exact values would take the same."
    : "The cut is uncertain: exact values might take others.";
  return [`Takes ${parts.join(", ")}.`, unfitWords(found), certainty].filter((words) => words).join(" ");
}

function updateCut(movesSlider) {
  const isGiven = cutKind.value === "given";
  cutValue.disabled = cutSlider.disabled = isGiven || !cutKind.value;
  if (isGiven) return showCut(givenCut(), printable(raw.selection.code));
  const budget = BUDGETS[cutKind.value];
  if (!budget) return showCut(refused("There is nothing to select."), "");
  const value = cutValue.value === "" ? NaN : Number(cutValue.value);
  const isValid = budget.isValid(value);
  cutValue.setAttribute("aria-invalid", String(!isValid));
  if (!isValid) return showCut(refused(budget.hint), "");
  if (movesSlider) {
    const place = budget.placeOf(value);
    cutSlider.value = String(Math.round(1000 * (Number.isFinite(place) ? place : 0)));
  }
  cutSlider.setAttribute("aria-valuetext", `${cutKind.value} ${value}`);
  return showCut(budget.cut(value), `ranking.select(${cutKind.value}=${budget.inPython(value)})`);
}

function setBudget(kind, value) {
  cutKind.value = kind;
  if (BUDGETS[kind]) cutValue.value = String(value ?? BUDGETS[kind].start);
  updateCut(true);
}

function startCut() {
  if (raw.selection) cutKind.append(element("option", { value: "given" }, "the selection of this report"));
  for (const [name, budget] of Object.entries(BUDGETS)) {
    if (budget.isPossible) cutKind.append(element("option", { value: name }, budget.words));
  }
  cutKind.addEventListener("change", () => setBudget(cutKind.value));
  cutValue.addEventListener("input", () => updateCut(true));
  cutSlider.addEventListener("input", () => {
    cutValue.value = String(BUDGETS[cutKind.value].at(Number(cutSlider.value) / 1000));
    updateCut(false);
  });
  const first = BUDGETS[cutKind.value];
  if (first && first.cut(first.start).problem) {
    setBudget("num_tensors", Math.max(1, raw.thresholds.num_tensors.beyond - 1)); // the most that is resolved
  } else {
    setBudget(cutKind.value);
  }
}
