// The skipped parameters by reason. Long lists are added to the page in portions when a reader opens them.
const PORTION = 200;

function skippedList(items) {
  const list = element("ul");
  const more = element("button", { type: "button" });
  let shown = 0;
  const add = () => {
    for (const [name, shape, reason] of items.slice(shown, shown + PORTION)) {
      const words = [printable(name), shape.length ? shape.join("x") : "scalar"];
      if (reason !== undefined) words.push(`(${printable(reason)})`);
      list.append(element("li", {}, words.join("  ")));
    }
    shown = Math.min(items.length, shown + PORTION);
    more.hidden = shown === items.length;
    more.textContent = `Show more (${(items.length - shown).toLocaleString("en")} left)`;
  };
  more.addEventListener("click", add);
  add();
  return [list, more];
}

function startSkipped() {
  const target = document.getElementById("skipped");
  if (!raw.skipped.length) target.append(element("p", {}, "Nothing."));
  for (const { reason, items } of raw.skipped) {
    const summary = element("summary", {}, `${items.length.toLocaleString("en")}: ${printable(reason)}`);
    const details = element("details", {}, summary);
    details.addEventListener("toggle", () => details.childElementCount > 1 || details.append(...skippedList(items)), {
      once: true,
    });
    target.append(details);
  }
}
