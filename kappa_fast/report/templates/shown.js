// What the colors of the map, the axis of the curve and the histogram show: kappa, or a statistic of the entries.
const choices = new Map(raw.shown.choices); // by name: whether the scale is logarithmic
const shown = { name: "", isLogarithmic: true, values: new Float64Array(count), low: 1, high: 10, listeners: [] };

const isKappaShown = () => shown.name === "kappa";
const shownWords = () => shown.name.replaceAll("_", " ");
const hasShown = (i) => !Number.isNaN(shown.values[i]);

function valuesOf(name) {
  if (name === "kappa") return Float64Array.from(positions, (i) => (hasFiniteKappa(i) ? ranking.kappa[i] : NaN));
  return Float64Array.from(raw.entries.statistics[name] ?? raw.entries[name], (value, i) => {
    const isRegular = statusOf(i) === "ok" || statusOf(i) === "scored";
    const isOnScale = typeof value === "number" && (value > 0 || !choices.get(name)); // inf is a text
    return isRegular && isOnScale ? value : NaN;
  });
}

const toScale = (value) => (shown.isLogarithmic ? Math.log(value) : value);
const fromScale = (value) => (shown.isLogarithmic ? Math.exp(value) : value);

// Where a value lies between the lowest and the highest color, and the value at such a place.
function placeOnScale(value) {
  const [low, high] = [toScale(shown.low), toScale(shown.high)];
  return high > low ? (toScale(value) - low) / (high - low) : 0.5;
}

const valueAt = (place) => fromScale(toScale(shown.low) + place * (toScale(shown.high) - toScale(shown.low)));

function meanOf(values) {
  const sum = values.reduce((total, value) => total + toScale(value), 0);
  return values.length ? fromScale(sum / values.length) : NaN;
}

function spanOf(values) {
  const known = values.filter((value) => !Number.isNaN(value));
  if (!known.length) return [1, 10];
  return [known.reduce((a, b) => Math.min(a, b)), known.reduce((a, b) => Math.max(a, b))];
}

function show(name) {
  [shown.name, shown.isLogarithmic] = [name, choices.get(name)];
  shown.values = valuesOf(name);
  for (const listener of shown.listeners) listener();
}

// The lines about an entry, with what is shown if that is not kappa.
function describeShown(i) {
  const lines = describe(i);
  if (!isKappaShown() && hasShown(i)) lines.splice(1, 0, `${shownWords()} ${formatNumber(shown.values[i])}`);
  return lines;
}

function startShown() {
  const select = document.getElementById("shown");
  for (const name of choices.keys()) {
    select.append(element("option", { value: name }, name.replaceAll("_", " ")));
  }
  select.value = raw.shown.first;
  select.addEventListener("change", () => show(select.value));
}
