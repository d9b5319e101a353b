// Puts the parts together.
function startTheme() {
  const button = document.getElementById("theme");
  const prefersDark = window.matchMedia("(prefers-color-scheme: dark)");
  const isDark = () => {
    const chosen = document.documentElement.dataset.theme;
    return chosen ? chosen === "dark" : prefersDark.matches;
  };
  const show = () => {
    button.setAttribute("aria-pressed", String(isDark()));
    redrawCurve();
  };
  button.addEventListener("click", () => {
    document.documentElement.dataset.theme = isDark() ? "light" : "dark";
    show();
  });
  prefersDark.addEventListener("change", show);
  show();
}

startMap(reveal);
startCurve();
startHistogram();
startTable();
startSummary();
startSkipped();
startShown();
show(raw.shown.first);
startCut();
startTheme();
// Runs after the first complete frame has been drawn.
requestAnimationFrame(() => requestAnimationFrame(() => performance.mark("kappa-fast-ready")));
