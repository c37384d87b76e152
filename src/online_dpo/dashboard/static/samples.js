// Keys and "copy link" on the pages of samples and votes. An element says its key itself: data-key="j".
"use strict";

const samples = () => [...document.querySelectorAll("a.sample")];

function moveInList(step) {
  const all = samples();
  const place = all.indexOf(document.activeElement.closest("a.sample"));
  const next = all[place < 0 ? (step > 0 ? 0 : all.length - 1) : place + step];
  if (next) next.focus();
  else document.querySelector(step > 0 ? "#results a[rel=next]" : "#results a[rel=prev]")?.focus();
}

document.addEventListener("keydown", (event) => {
  const inField = event.target.closest("input, textarea, select");
  if (event.key === "Escape" && inField) return inField.blur();
  if (inField || event.ctrlKey || event.metaKey || event.altKey) return;
  const keyed = document.querySelector(`[data-key="${CSS.escape(event.key)}"]`);
  if (keyed) {
    event.preventDefault();
    if (keyed.matches("input")) {
      keyed.focus();
      keyed.select();
    } else if (!event.repeat || keyed.matches("a")) keyed.click();
  } else if ((event.key === "j" || event.key === "k") && samples().length) {
    event.preventDefault();
    moveInList(event.key === "j" ? 1 : -1);
  } else if (event.key === "/" && document.querySelector(".tabs a[href$='/pairs']")) {
    event.preventDefault();
    location.assign(`${document.querySelector(".tabs a[href$='/pairs']").getAttribute("href")}#search`);
  } else if (event.key === "?") {
    const keys = document.querySelector(".keys");
    if (keys) keys.open = !keys.open;
  }
});

// htmx takes a form over a moment after it has come into the page. Who is faster waits for that moment.
document.addEventListener("submit", (event) => {
  if (event.defaultPrevented || !event.target.matches("form[hx-post]")) return;
  event.preventDefault();
  setTimeout(() => event.submitter?.click(), 30); // a click tells htmx which button it was
});

async function copy(text) {
  if (navigator.clipboard && isSecureContext) return navigator.clipboard.writeText(text);
  const field = document.createElement("textarea"); // an address of another machine has no clipboard
  field.value = text;
  field.className = "unseen";
  document.body.append(field);
  field.select();
  document.execCommand("copy");
  field.remove();
}

document.addEventListener("click", async (event) => {
  const button = event.target.closest("[data-copy]");
  if (!button) return;
  await copy(location.href);
  const label = button.textContent;
  button.textContent = "Copied";
  setTimeout(() => (button.textContent = label), 1500);
});

if (location.hash === "#search") document.querySelector("#search")?.focus();

// While the server still reads the files of a run, the list is asked for again, by its form as it is filled in then.
function askAgain() {
  const form = document.querySelector("form#filters");
  if (form && document.querySelector("#results[data-reading]")) setTimeout(() => form.requestSubmit(), 700);
}
document.addEventListener("htmx:load", (event) => event.target.matches("body, #results") && askAgain());
