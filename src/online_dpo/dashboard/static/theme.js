// Light or dark: as the system says, until the reader chooses. It runs before the page is drawn, so that nothing flashes.
"use strict";

const root = document.documentElement;
const chosen = localStorage.getItem("online-dpo-theme");
if (chosen === "light" || chosen === "dark") root.dataset.theme = chosen;

document.addEventListener("click", (event) => {
  if (!event.target.closest("#theme")) return;
  const isDark = root.dataset.theme
    ? root.dataset.theme === "dark"
    : matchMedia("(prefers-color-scheme: dark)").matches;
  root.dataset.theme = isDark ? "light" : "dark";
  localStorage.setItem("online-dpo-theme", root.dataset.theme);
  document.dispatchEvent(new CustomEvent("themechange"));
});
