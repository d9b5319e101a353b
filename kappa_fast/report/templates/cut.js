// What a budget takes: the rules of Ranking.select() for single matrices, without groups.
const ranked = Array.from(positions).filter(isSettled);
const regular = ranked.filter((i) => statusOf(i) === "ok");
const bounded = Array.from(positions).filter((i) => statusOf(i) === "bounded");
const sizesAreKnown = positions.every((i) => numelOf(i) > 0);

const isExact = (i) => isSettled(i) && ranking.lower[i] === ranking.upper[i];
const scoreLower = (i) => (scoresAreKappas ? Math.max(ranking.lower[i], 1) : isExact(i) ? ranking.score[i] : -Infinity);
const scoreUpper = (i) => (scoresAreKappas ? ranking.upper[i] : isExact(i) ? ranking.score[i] : Infinity);
// Up to this score no matrix that is only bounded can come in between.
const horizon = bounded.reduce((least, i) => Math.min(least, scoreLower(i)), Infinity);

// By score, then by key.
const isAhead = (a, keyA, b, keyB) => a < b || (a === b && keyA < keyB);

function firstOf(entries) {
  let first = -1;
  for (const i of entries) {
    if (first < 0 || isAhead(scoreLower(i), ranking.key[i], scoreLower(first), ranking.key[first])) first = i;
  }
  return first;
}

function lastOf(entries) {
  let last = -1;
  for (const i of entries) {
    if (last < 0 || isAhead(scoreUpper(last), ranking.key[last], scoreUpper(i), ranking.key[i])) last = i;
  }
  return last;
}

// Exact kappas would take the same matrices: every chosen one is ahead of every other one.
function isSeparated(chosen, rest) {
  if (!chosen.length || !rest.length) return true;
  const [last, first] = [lastOf(chosen), firstOf(rest)];
  return isAhead(scoreUpper(last), ranking.key[last], scoreLower(first), ranking.key[first]);
}

// The matrix that did not fit is certainly ahead of all that would have.
function stopIsCertain(rest, left) {
  const first = firstOf(rest.filter((i) => numelOf(i) <= left && statusOf(i) !== "rank_deficient"));
  if (first < 0) return true;
  return rest.some(
    (i) => numelOf(i) > left && isAhead(scoreUpper(i), ranking.key[i], scoreLower(first), ranking.key[first]),
  );
}

const BEYOND = "This reaches beyond what was resolved: rank again with a larger top, or without.";

function outcome(chosen, rest, isCertain) {
  return { chosen, isCertain: !raw.partial && isCertain && isSeparated(chosen, rest), problem: "" };
}

const refused = (problem) => ({ chosen: [], isCertain: false, problem });

function without(chosen) {
  const taken = new Set(chosen);
  return [...ranked, ...bounded].filter((i) => !taken.has(i));
}

function cutByCount(value) {
  const wanted = Math.min(value, ranked.length + bounded.length);
  const chosen = ranked.slice(0, wanted);
  const last = chosen[chosen.length - 1];
  if (bounded.length && (chosen.length < wanted || ranking.score[last] > horizon)) return refused(BEYOND);
  return outcome(chosen, without(chosen), true);
}

function cutByKappa(value) {
  const chosen = regular.filter((i) => ranking.kappa[i] <= value);
  if (bounded.some((i) => Math.max(ranking.lower[i], 1) <= value)) return refused(BEYOND);
  const rest = without(chosen);
  const isCertain =
    rest.every((i) => Math.max(ranking.lower[i], 1) > value) && chosen.every((i) => ranking.upper[i] <= value);
  return { chosen, isCertain: !raw.partial && isCertain, problem: "" };
}

function cutByParameters(share) {
  let left = Math.floor(share * raw.parameters);
  const known = regular.filter((i) => ranking.score[i] <= horizon);
  let taken = 0;
  while (taken < known.length && numelOf(known[taken]) <= left) left -= numelOf(known[taken++]);
  const chosen = known.slice(0, taken);
  if (taken === known.length && bounded.length) {
    const further = [...regular.slice(taken), ...bounded];
    if (further.some((i) => numelOf(i) <= left)) return refused(BEYOND);
  }
  const rest = without(chosen);
  const found = outcome(chosen, rest, stopIsCertain(rest, left));
  return { ...found, unfit: taken < known.length ? known[taken] : undefined };
}

function givenCut() {
  return { chosen: raw.selection.chosen, isCertain: raw.selection.certain, problem: "", words: raw.selection.unfit };
}

const kappasOfRegular = regular.map((i) => ranking.kappa[i]).filter((kappa) => kappa >= 1 && kappa < Infinity);
const kappaSpan = [
  kappasOfRegular.reduce((least, kappa) => Math.min(least, kappa), Infinity),
  kappasOfRegular.reduce((most, kappa) => Math.max(most, kappa), 1),
];

// For each kind of budget: whether it can be used, its first value, the way from the slider's 0..1 to values and back.
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
    cut: cutByParameters,
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
    cut: cutByCount,
  },
  max_kappa: {
    words: "kappa up to",
    isPossible: kappasOfRegular.length > 0,
    start: kappasOfRegular.length ? Number(formatNumber(kappasOfRegular[kappasOfRegular.length >> 2], 3, 1)) : 1,
    isValid: (value) => value >= 1 && value < Infinity,
    hint: "Give a condition number from 1 on.",
    at: (place) => Number(formatNumber(kappaSpan[0] * (kappaSpan[1] / kappaSpan[0]) ** place, 4, 1)),
    placeOf: (value) => Math.log(value / kappaSpan[0]) / Math.log(kappaSpan[1] / kappaSpan[0]),
    inPython: String,
    cut: cutByKappa,
  },
};

// The present cut. `chosen[i]` is 1 for what the budget takes; listeners are called after every change.
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

// What ended the selection, or was passed over.
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
  const kappas = found.chosen.map((i) => ranking.kappa[i]);
  const [low, high] = [Math.min, Math.max].map((pick) => kappas.reduce((a, b) => pick(a, b)));
  parts.push(`kappa ${formatNumber(low)} to ${formatNumber(high)}`);
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
  if (first && bounded.length && first.cut(first.start).problem) {
    // Not resolved so far: what certainly comes before all that is only bounded.
    setBudget("num_tensors", Math.max(1, ranked.filter((i) => ranking.score[i] <= horizon).length));
  } else {
    setBudget(cutKind.value);
  }
}
