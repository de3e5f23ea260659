"use strict";
const list = document.getElementById("list");
const rows = Array.from(list.children);
const text = document.getElementById("text"), slice = document.getElementById("slice");
const which = document.getElementById("which"), sort = document.getElementById("sort");
const shown = document.getElementById("shown");
const keys = {
  gain: row => -Number(row.dataset.gain),
  loss: row => Number(row.dataset.gain),
  change: row => -Math.abs(Number(row.dataset.gain)),
  disagreement: row => -Number(row.dataset.disagreement),
};
function update() {
  const words = text.value.toLowerCase(), key = keys[sort.value];
  let count = 0;
  for (const row of rows) {
    const gain = Number(row.dataset.gain);
    const fits = { all: true, better: gain > 0, worse: gain < 0, equal: gain === 0, changed: row.dataset.same !== "1" };
    const inside = !slice.value || JSON.parse(row.dataset.slices).includes(slice.value);
    row.hidden = !(fits[which.value] && inside && row.textContent.toLowerCase().includes(words));
    count += !row.hidden;
  }
  rows.slice().sort((a, b) => key(a) - key(b)).forEach(row => list.append(row));
  shown.textContent = count + " of " + rows.length;
}
for (const control of [text, slice, which, sort]) control.addEventListener("input", update);
for (const table of document.querySelectorAll("table.sortable")) {
  table.querySelectorAll("thead th").forEach((heading, column) => heading.addEventListener("click", () => {
    const up = heading.getAttribute("aria-sort") !== "ascending";
    table.querySelectorAll("thead th").forEach(other => other.removeAttribute("aria-sort"));
    heading.setAttribute("aria-sort", up ? "ascending" : "descending");
    const cell = row => row.cells[column].dataset.value ?? row.cells[column].textContent;
    const body = table.tBodies[0];
    Array.from(body.rows).sort((a, b) => {
      const x = cell(a), y = cell(b), difference = Number(x) - Number(y);
      return (up ? 1 : -1) * (Number.isNaN(difference) ? x.localeCompare(y) : difference);
    }).forEach(row => body.append(row));
  }));
}
update();
