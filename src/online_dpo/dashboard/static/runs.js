// The table of all runs: asked for again when a run has written, with what was chosen still chosen.
import { follow } from "/static/live.js";

const table = document.getElementById("table");

function refresh() {
  const query = document.querySelector("form.filter");
  const chosen = new Set([...table.querySelectorAll("input:checked")].map((box) => box.value));
  const parameters = new URLSearchParams(new FormData(query));
  htmx.ajax("GET", `/runs.table?${parameters}`, { target: "#table", swap: "innerHTML" }).then(() => {
    for (const box of table.querySelectorAll('input[name="run"]')) box.checked = chosen.has(box.value);
  });
}

follow(table.dataset.live, { changed: refresh });
