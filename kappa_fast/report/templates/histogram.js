// How often which value of what is shown occurs, for all matrices or for those of one type in front of all.
const SVG = "http://www.w3.org/2000/svg";
const BOX = { width: 640, height: 320, left: 48, right: 10, top: 12, bottom: 38 };

function shape(tag, attributes, text) {
  const made = document.createElementNS(SVG, tag);
  for (const [name, value] of Object.entries(attributes)) made.setAttribute(name, value);
  if (text !== undefined) made.textContent = text;
  return made;
}

let finiteEntries = [];
let binCount = 8;
let edges = [];

function setBins() {
  finiteEntries = Array.from(positions).filter(hasShown);
  binCount = Math.max(8, Math.min(48, Math.ceil(Math.sqrt(finiteEntries.length) * 1.5)));
  const [low, high] = [shown.low, shown.high].map(toScale);
  const span = high > low ? high - low : shown.isLogarithmic ? Math.LN10 : 1;
  edges = Array.from({ length: binCount + 1 }, (_, k) => fromScale(low + (span * k) / binCount));
}

function countBins(entries) {
  const counts = new Array(binCount).fill(0);
  for (const i of entries) {
    counts[Math.max(0, Math.min(binCount - 1, Math.floor(placeOnScale(shown.values[i]) * binCount)))] += 1;
  }
  return counts;
}

function drawBars(svg, counts, most, className) {
  const step = (BOX.width - BOX.left - BOX.right) / binCount;
  const unit = (BOX.height - BOX.top - BOX.bottom) / Math.max(1, most);
  counts.forEach((number, k) => {
    if (!number) return;
    const height = Math.max(1, number * unit);
    const bar = shape("rect", {
      x: BOX.left + k * step + 0.5,
      y: BOX.height - BOX.bottom - height,
      width: Math.max(1, step - 1),
      height,
      class: className,
    });
    if (className === "bar") {
      bar.style.fill = raw.colors[Math.round(((k + 0.5) / binCount) * (raw.colors.length - 1))];
      bar.style.stroke = "var(--line)";
    }
    bar.append(shape("title", {}, `${formatShort(edges[k])} to ${formatShort(edges[k + 1])}: ${number}`));
    svg.append(bar);
  });
}

function drawScales(svg, most) {
  const bottom = BOX.height - BOX.bottom;
  const width = BOX.width - BOX.left - BOX.right;
  svg.append(shape("line", { x1: BOX.left, x2: BOX.width - BOX.right, y1: bottom, y2: bottom }));
  for (const place of BOX.width < 480 ? [0, 0.5, 1] : [0, 0.25, 0.5, 0.75, 1]) {
    const anchor = place === 0 ? "start" : place === 1 ? "end" : "middle";
    const label = formatShort(fromScale(toScale(edges[0]) + place * (toScale(edges[binCount]) - toScale(edges[0]))));
    svg.append(shape("text", { x: BOX.left + place * width, y: bottom + 16, "text-anchor": anchor }, label));
  }
  const scale = shown.isLogarithmic ? `${shownWords()}, logarithmic` : shownWords();
  svg.append(shape("text", { x: BOX.left + width / 2, y: bottom + 33, "text-anchor": "middle" }, scale));
  svg.append(shape("text", { x: BOX.left - 6, y: BOX.top + 10, "text-anchor": "end" }, most.toLocaleString("en")));
  svg.append(shape("text", { x: BOX.left - 6, y: bottom, "text-anchor": "end" }, "0"));
}

function drawHistogram(group) {
  const isAll = group === "";
  const entries = isAll ? finiteEntries : finiteEntries.filter((i) => ranking.group.id[i] === Number(group));
  const [everything, counts] = [countBins(finiteEntries), countBins(entries)];
  const most = Math.max(...everything, 1);
  const name = isAll ? "all types" : printable(ranking.group.values[group]);
  const words = `Histogram of ${shownWords()} for ${name}: ${plural(entries.length, "matrix", "matrices")}`;
  BOX.width = Math.max(240, document.getElementById("histogram").clientWidth);
  const svg = shape("svg", { viewBox: `0 0 ${BOX.width} ${BOX.height}`, role: "img", "aria-label": words });
  drawScales(svg, most);
  if (!isAll) drawBars(svg, everything, most, "all");
  drawBars(svg, counts, most, "bar");
  document.getElementById("histogram").replaceChildren(svg);
  const rows = counts.map((number, k) => [formatNumber(edges[k]), formatNumber(edges[k + 1]), String(number)]);
  const filled = rows.filter((_, k) => counts[k]);
  document.getElementById("histogram-numbers").replaceChildren(numbersTable(["from", "to", "matrices"], filled));
}

function startHistogram() {
  const select = document.getElementById("histogram-group");
  const groups = ranking.group.values.map((group, id) => [group, id]);
  groups.sort(([a], [b]) => (a < b ? -1 : 1));
  select.append(element("option", { value: "" }, "all"));
  for (const [group, id] of groups) select.append(element("option", { value: id }, printable(group)));
  select.addEventListener("change", () => drawHistogram(select.value));
  new ResizeObserver(() => drawHistogram(select.value)).observe(document.getElementById("histogram"));
  shown.listeners.push(() => {
    setBins();
    drawHistogram(select.value);
  });
}
