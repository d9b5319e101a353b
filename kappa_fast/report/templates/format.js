// Texts for numbers and entries, the same as those of the table that kappa_fast prints.
const STATUS_WORDS = { ok: "ok", rank_deficient: "rank deficient", bounded: "bounded", scored: "without kappa", non_finite: "non-finite" };

// Names come from untrusted files: an invisible character is shown as its code.
const printable = (text) =>
  text.replace(/[\p{C}\p{Zl}\p{Zp}]|(?! )\p{Zs}/gu, (char) => `\\u{${char.codePointAt(0).toString(16)}}`);

const plural = (number, word, words) => `${number.toLocaleString("en")} ${number === 1 ? word : words}`;

// `digits` significant digits; direction -1 rounds down, 1 up, 0 to nearest with ties to even. toExponential(100) has
// all digits that matter of a double, so that what is rounded is the number and not its shortest text.
function formatNumber(value, digits = 4, direction = 0) {
  if (Number.isNaN(value)) return "nan";
  if (!Number.isFinite(value)) return value > 0 ? "inf" : "-inf";
  if (value === 0) return "0";
  if (value < 0) return `-${formatNumber(-value, digits, -direction)}`;
  const [mantissa, power] = value.toExponential(100).split("e");
  const all = mantissa.replace(".", "");
  const rest = all.slice(digits);
  let units = Number(all.slice(0, digits));
  let exponent = Number(power);
  const half = `5${"0".repeat(rest.length - 1)}`;
  const nearestIsUp = rest > half || (rest === half && units % 2 === 1);
  if (direction > 0 ? /[1-9]/.test(rest) : direction === 0 && nearestIsUp) units += 1;
  if (units === 10 ** digits) {
    units /= 10;
    exponent += 1;
  }
  if (exponent >= -3 && exponent < 6) {
    const decimals = digits - 1 - exponent;
    if (decimals <= 0) return String(units * 10 ** -decimals);
    const padded = String(units).padStart(decimals + 1, "0");
    return `${padded.slice(0, -decimals)}.${padded.slice(-decimals)}`;
  }
  const text = String(units);
  return `${text[0]}${digits > 1 ? `.${text.slice(1)}` : ""}e${exponent}`;
}

// Significant digits that show the width of the interval: one more than its ends have in common.
function intervalDigits(i) {
  const width = (ranking.upper[i] - ranking.lower[i]) / Math.max(ranking.lower[i], 1);
  if (!(width < 1)) return 3;
  return width <= 1e-4 ? 5 : Math.max(3, 1 + Math.ceil(-Math.log10(width)));
}

const formatKappa = (i) => formatNumber(ranking.kappa[i], Math.max(4, intervalDigits(i)));

// Rounded outward: the interval that is shown contains the exact one.
function formatInterval(i) {
  const [lower, upper] = [ranking.lower[i], ranking.upper[i]];
  if (statusOf(i) === "non_finite" || (lower <= 1 && upper === Infinity)) return "-";
  const digits = intervalDigits(i);
  const [low, high] = [formatNumber(lower, digits, -1), formatNumber(upper, digits, 1)];
  return high === "inf" ? `>= ${low}` : low === high ? low : `${low}..${high}`;
}

function formatRelative(value) {
  if (!Number.isFinite(value)) return Number.isNaN(value) ? "-" : "inf";
  if (value < 0.001) return "<0.1%";
  if (value >= 10) return `${formatNumber(value, 2)}x`;
  return value < 0.1 ? `${(100 * value).toFixed(1)}%` : `${(100 * value).toFixed(0)}%`;
}

// Three digits at most: for cells.
function formatShort(value) {
  if (value >= 1000) return value.toExponential(1).replace("e+", "e");
  return value >= 100 ? value.toFixed(0) : value.toPrecision(3);
}

function formatShape(i) {
  const [rows, columns, numel] = valueOf(ranking.shape, i);
  return numel ? `${rows}x${columns}` : "?";
}

const formatProven = (i) => (isSettled(i) ? (ranking.certified[i] ? "yes" : "no") : "-");

// The kappa of one entry for a cell, or its status in a word.
function formatCell(i) {
  const status = statusOf(i);
  if (status === "ok") return Number.isFinite(ranking.kappa[i]) ? formatShort(ranking.kappa[i]) : "?";
  if (status === "rank_deficient") return "\u221e";
  if (status === "scored") return "-";
  return status === "bounded" ? `\u2265${formatShort(ranking.lower[i])}` : "NaN";
}

// Lines about one entry: the key, kappa with its interval, then the rest.
function describe(i) {
  const status = statusOf(i);
  const lines = [printable(ranking.key[i])];
  if (isSettled(i)) lines.push(`kappa ${formatKappa(i)}`);
  const interval = formatInterval(i);
  if (interval !== "-") lines.push(`interval ${interval}${ranking.certified[i] ? ", proven" : ""}`);
  if (status !== "ok") lines.push(`status: ${STATUS_WORDS[status]}`);
  if (!scoresAreKappas && hasScore(i)) lines.push(`score ${formatNumber(ranking.score[i])}`);
  const quantization = valueOf(ranking.quantization, i);
  const stored = quantization ? `, quantized: ${printable(quantization)}` : "";
  lines.push(`${formatShape(i)} ${printable(valueOf(ranking.dtype, i))}${stored}, number ${i + 1} of ${count}`);
  const aliases = raw.aliases[i];
  if (aliases) lines.push(`also called ${aliases.map(printable).join(", ")}`);
  return lines;
}
