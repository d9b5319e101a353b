// What is shown of every matrix in the order of the ranking, kappa with its interval, and the cut of the budget.
const MARGIN = { left: 56, right: 12, top: 12, bottom: 34 };
const canvas = document.getElementById("curve");

const colorOf = (name) => getComputedStyle(document.documentElement).getPropertyValue(name).trim();

// The curve shows matrices with a finite kappa, or at least a lower bound; of another statistic those that have it.
function placesOnCurve() {
  const isOpen = (i) => statusOf(i) !== "ok" && statusOf(i) !== "non_finite" && ranking.lower[i] >= 1;
  return Array.from(positions).filter((i) => hasShown(i) || (isKappaShown() && isOpen(i)));
}

// Singular matrices have far larger lower bounds than others: they are drawn at the upper edge and not on the scale.
function spanOfKappas() {
  const onScale = onCurve.filter((i) => statusOf(i) !== "rank_deficient");
  let [low, high] = [Infinity, 1];
  for (const i of onScale.length ? onScale : onCurve) {
    for (const value of [ranking.kappa[i], ranking.lower[i], ranking.upper[i]]) {
      if (value >= 1 && value < Infinity) high = Math.max(high, value);
    }
    low = Math.min(low, hasShown(i) ? ranking.kappa[i] : ranking.lower[i]);
  }
  return [Math.min(low, high), high];
}

// Of the vertical axis: decimal logarithms of kappa, or values on a linear scale.
function spanOfAxis() {
  if (!onCurve.length) return [0, 1];
  const [low, high] = isKappaShown() ? spanOfKappas() : spanOf(onCurve.map((i) => shown.values[i]));
  const [from, to] = [low, high].map(onAxis);
  const room = shown.isLogarithmic ? 0.05 : 0.05 * (to - from);
  const more = shown.isLogarithmic ? 0.5 : 0.1 * Math.abs(to) + 1e-9;
  return [from - room, to + room + (to === from ? more : 0)];
}

const onAxis = (value) => (shown.isLogarithmic ? Math.log10(Math.max(value, 1e-300)) : value);

let onCurve = [];
let [curveLow, curveHigh] = [0, 1];
let inspected = 0;
let background = null; // everything but the cut and the pointer, drawn once for each size and theme

function curveFrame() {
  const [width, height] = [canvas.clientWidth, canvas.clientHeight];
  const inner = { width: width - MARGIN.left - MARGIN.right, height: height - MARGIN.top - MARGIN.bottom };
  const step = inner.width / Math.max(1, onCurve.length);
  return {
    width,
    height,
    step,
    x: (place) => MARGIN.left + (place + 0.5) * step,
    y: (value) => {
      const place = (onAxis(value) - curveLow) / (curveHigh - curveLow);
      return MARGIN.top + inner.height * (1 - Math.max(0, Math.min(1, place)));
    },
    placeAt: (x) => Math.max(0, Math.min(onCurve.length - 1, Math.floor((x - MARGIN.left) / step))),
  };
}

function sized(target, frame) {
  const ratio = window.devicePixelRatio || 1;
  target.width = Math.max(1, Math.round(frame.width * ratio));
  target.height = Math.max(1, Math.round(frame.height * ratio));
  const context = target.getContext("2d");
  context.scale(ratio, ratio);
  context.font = "12px system-ui, sans-serif";
  return context;
}

function ticksOfDecades() {
  const decades = Math.floor(curveHigh) - Math.ceil(curveLow) + 1;
  const values = [];
  for (let power = Math.ceil(curveLow); power <= Math.floor(curveHigh); power += Math.ceil(decades / 7)) {
    values.push(10 ** power);
    if (decades <= 2) values.push(2 * 10 ** power, 5 * 10 ** power);
  }
  if (decades <= 1) values.push(2 * 10 ** (Math.ceil(curveLow) - 1), 5 * 10 ** (Math.ceil(curveLow) - 1));
  return values.filter((value) => Math.log10(value) >= curveLow && Math.log10(value) <= curveHigh);
}

function ticksOfSteps() {
  const rough = (curveHigh - curveLow) / 5;
  const power = 10 ** Math.floor(Math.log10(rough));
  const step = [1, 2, 5, 10].find((factor) => factor * power >= rough) * power;
  const values = [];
  for (let k = Math.ceil(curveLow / step); k * step <= curveHigh; k += 1) values.push(Number((k * step).toPrecision(6)));
  return values;
}

function drawAxes(context, frame) {
  context.strokeStyle = colorOf("--line");
  context.fillStyle = colorOf("--muted");
  context.textAlign = "right";
  context.textBaseline = "middle";
  for (const value of shown.isLogarithmic ? ticksOfDecades() : ticksOfSteps()) {
    const y = Math.round(frame.y(value)) + 0.5;
    context.beginPath();
    context.moveTo(MARGIN.left, y);
    context.lineTo(frame.width - MARGIN.right, y);
    context.stroke();
    const isLong = Math.abs(value) >= 1e5 || (value !== 0 && Math.abs(value) < 1e-3);
    context.fillText(isLong ? value.toExponential(0).replace("e+", "e") : String(value), MARGIN.left - 6, y);
  }
  context.textBaseline = "top";
  context.textAlign = "left";
  context.fillText("1", MARGIN.left, frame.height - MARGIN.bottom + 6);
  context.textAlign = "right";
  context.fillText(onCurve.length.toLocaleString("en"), frame.width - MARGIN.right, frame.height - MARGIN.bottom + 6);
  context.textAlign = "center";
  const order = scoresAreKappas ? "place in the ranking" : "place in the ranking (by score)";
  const middle = (MARGIN.left + frame.width - MARGIN.right) / 2;
  context.fillText(order, middle, frame.height - MARGIN.bottom + 6);
}

// Draws a rectangle at half pixels, unless it was drawn last: of tens of thousands few are different.
function painter(context) {
  const half = (value) => Math.round(2 * value) / 2;
  let last = "";
  return (x, y, width, height) => {
    const box = [half(x), half(y), width, Math.max(1, half(height))];
    if (String(box) === last) return;
    last = String(box);
    context.fillRect(...box);
  };
}

function drawPoints(context, frame) {
  const size = Math.max(1.5, Math.min(5, frame.step));
  const width = Math.max(1, Math.min(6, frame.step * 0.8));
  const [band, open, ink, warn] = ["--accent-soft", "--stripe", "--accent", "--warn"].map(colorOf);
  const paintBand = painter(context);
  onCurve.forEach((i, place) => {
    if (!isKappaShown()) return;
    const isKnown = ranking.lower[i] > 1 || ranking.upper[i] < Infinity;
    if (!isKnown) return; // the interval [1, inf] says nothing
    const [top, bottom] = [frame.y(ranking.upper[i]), frame.y(ranking.lower[i])];
    context.fillStyle = hasFiniteKappa(i) ? band : open;
    paintBand(frame.x(place) - width / 2, top - 0.5, width, bottom - top + 1);
  });
  const paintPoint = painter(context);
  onCurve.forEach((i, place) => {
    const isFinite = hasShown(i);
    context.fillStyle = isFinite ? ink : warn;
    const y = frame.y(isFinite ? shown.values[i] : ranking.lower[i]);
    paintPoint(frame.x(place) - size / 2, y - (isFinite ? size / 2 : 1), size, isFinite ? size : 2);
  });
}

function drawBackground(frame) {
  background = document.createElement("canvas");
  const context = sized(background, frame);
  drawAxes(context, frame);
  drawPoints(context, frame);
}

function drawChosen(context, frame) {
  // Runs of chosen matrices, shaded down to the axis; for a plain budget that is one run, and its end is the cut.
  context.fillStyle = colorOf("--chosen");
  const bottom = frame.height - MARGIN.bottom;
  let start = -1;
  for (let place = 0; place <= onCurve.length; place += 1) {
    const isIn = place < onCurve.length && cut.chosen[onCurve[place]] === 1;
    if (isIn && start < 0) start = place;
    if (isIn || start < 0) continue;
    const [left, right] = [frame.x(start) - frame.step / 2, frame.x(place) - frame.step / 2];
    context.globalAlpha = 0.13;
    context.fillRect(left, MARGIN.top, right - left, bottom - MARGIN.top);
    context.globalAlpha = 1;
    context.fillRect(left, bottom, right - left, 3);
    context.fillRect(right - 0.75, MARGIN.top, 1.5, bottom - MARGIN.top);
    start = -1;
  }
}

let isPointed = false;
let isDue = false;

// Draws once for each frame, even if it is called several times.
function drawCurve(pointed = false) {
  isPointed = pointed;
  if (isDue) return;
  isDue = true;
  requestAnimationFrame(() => {
    isDue = false;
    drawNow();
  });
}

function drawNow() {
  const frame = curveFrame();
  if (frame.width <= 0) return;
  if (!background) drawBackground(frame);
  const context = sized(canvas, frame);
  if (!onCurve.length) {
    context.fillStyle = colorOf("--muted");
    context.fillText(`No matrix has a finite ${shownWords()}.`, MARGIN.left, frame.height / 2);
    return;
  }
  drawChosen(context, frame);
  context.drawImage(background, 0, 0, frame.width, frame.height);
  if (isPointed) {
    context.fillStyle = colorOf("--text");
    context.fillRect(frame.x(inspected) - 0.5, MARGIN.top, 1, frame.height - MARGIN.top - MARGIN.bottom);
  }
}

function inspect(place) {
  if (!onCurve.length) return;
  inspected = Math.max(0, Math.min(onCurve.length - 1, place));
  const i = onCurve[inspected];
  canvas.setAttribute("aria-valuenow", String(inspected + 1));
  canvas.setAttribute("aria-valuetext", describeShown(i).join(", "));
  drawCurve(true);
  const [frame, box] = [curveFrame(), canvas.getBoundingClientRect()];
  const y = frame.y(hasShown(i) ? shown.values[i] : ranking.lower[i]);
  showTip(box.left + frame.x(inspected), box.top + y, describeShown(i));
}

function cutHere() {
  const place = ranked.indexOf(onCurve[inspected]);
  if (place >= 0) setBudget("num_tensors", place + 1);
}

function moveAlong(event) {
  const leap = Math.max(1, Math.round(onCurve.length / 20));
  const steps = { ArrowLeft: -1, ArrowDown: -1, ArrowRight: 1, ArrowUp: 1, PageDown: -leap, PageUp: leap };
  if (event.key in steps) inspect(inspected + steps[event.key]);
  else if (event.key === "Home") inspect(0);
  else if (event.key === "End") inspect(onCurve.length - 1);
  else if (event.key === "Enter") cutHere();
  else return;
  event.preventDefault();
}

function curveNumbers() {
  const finite = onCurve.filter(hasShown);
  const rows = [0, 0.1, 0.25, 0.5, 0.75, 0.9, 1].map((share) => {
    const place = Math.round(share * (finite.length - 1));
    const i = finite[place];
    const texts = isKappaShown() ? [formatKappa(i), formatInterval(i)] : [formatNumber(shown.values[i])];
    return [`${100 * share}%`, String(place + 1), ...texts];
  });
  const headers = ["along the curve", "place", shownWords(), ...(isKappaShown() ? ["interval"] : [])];
  return numbersTable(headers, finite.length ? rows : []);
}

function showCurve() {
  onCurve = placesOnCurve();
  [curveLow, curveHigh] = spanOfAxis();
  inspected = 0;
  canvas.setAttribute("aria-valuemax", String(Math.max(1, onCurve.length)));
  canvas.setAttribute("aria-valuenow", "1");
  canvas.setAttribute("aria-valuetext", onCurve.length ? describeShown(onCurve[0]).join(", ") : "empty");
  document.getElementById("curve-numbers").replaceChildren(curveNumbers());
  redrawCurve();
}

function startCurve() {
  canvas.setAttribute("aria-valuemin", "1");
  shown.listeners.push(showCurve);
  const placeOf = (event) => curveFrame().placeAt(event.clientX - canvas.getBoundingClientRect().left);
  canvas.addEventListener("pointermove", (event) => inspect(placeOf(event)));
  canvas.addEventListener("pointerleave", () => {
    hideTip();
    drawCurve();
  });
  canvas.addEventListener("blur", () => {
    hideTip();
    drawCurve();
  });
  canvas.addEventListener("click", (event) => {
    inspect(placeOf(event));
    cutHere();
  });
  canvas.addEventListener("keydown", moveAlong);
  cut.listeners.push(() => drawCurve(isPointed));
  new ResizeObserver(redrawCurve).observe(canvas);
}

function redrawCurve() {
  background = null;
  drawCurve(isPointed);
}
