// One tooltip for all elements that have one. Escape hides it.
const tip = document.getElementById("tip");

function showTip(x, y, lines) {
  tip.replaceChildren(...lines.map((line) => element("div", {}, line)));
  tip.hidden = false;
  const box = tip.getBoundingClientRect();
  const left = Math.max(8, Math.min(x + 12, window.innerWidth - box.width - 8));
  const below = y + 16 + box.height < window.innerHeight;
  tip.style.left = `${left}px`;
  tip.style.top = `${below ? y + 16 : Math.max(8, y - box.height - 12)}px`;
}

function hideTip() {
  tip.hidden = true;
}

// `linesOf(target)` gives the lines for an element, or null. Works by pointer and by focus.
function explain(container, selector, linesOf) {
  const show = (event) => {
    const target = event.target.closest(selector);
    const lines = target && linesOf(target);
    if (!lines) return hideTip();
    const box = target.getBoundingClientRect();
    return showTip(box.left + box.width / 2, box.bottom - 12, lines);
  };
  container.addEventListener("pointerover", show);
  container.addEventListener("focusin", show);
  container.addEventListener("pointerleave", hideTip);
  container.addEventListener("focusout", hideTip);
}

document.addEventListener("keydown", (event) => {
  if (event.key === "Escape") hideTip();
});
document.addEventListener("scroll", hideTip, { capture: true, passive: true });
