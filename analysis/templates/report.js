"use strict";
const make = (tag, properties = {}, ...children) => {
  const element = Object.assign(document.createElement(tag), properties);
  element.append(...children);
  return element;
};

// Tables: a button in each heading sorts; null is always last; texts that begin with a number are sorted by it.
const keyOf = cell => cell.dataset.sort ?? cell.textContent.trim();
const numberOf = text => Number.parseFloat(text.replace("\u2212", "-"));
const compareKeys = (x, y, sign) => {
  if (x === "" || y === "") return (x === "") - (y === "");
  const difference = numberOf(x) - numberOf(y);
  return (Number.isNaN(difference) ? x.localeCompare(y) : difference || x.localeCompare(y)) * sign;
};
const sortBy = (table, heads, column) => {
  const rising = heads[column].getAttribute("aria-sort") !== "ascending";
  heads.forEach(other => other.removeAttribute("aria-sort"));
  heads[column].setAttribute("aria-sort", rising ? "ascending" : "descending");
  const keyed = [...table.tBodies[0].rows].map(row => [keyOf(row.cells[column]), row]);
  keyed.sort((a, b) => compareKeys(a[0], b[0], rising ? 1 : -1));
  table.tBodies[0].append(...keyed.map(pair => pair[1]));
};
const filterable = table => {
  const rows = [...table.tBodies[0].rows];
  const texts = rows.map(row => [row, ...row.cells].map(part => part === row ? row.textContent : part.title).join(" ").toLowerCase());
  const count = make("output", {});
  const input = make("input", {type: "search", placeholder: "show only rows with \u2026"});
  input.setAttribute("aria-label", `Show only rows of \u201c${table.caption.textContent}\u201d that have this text`);
  input.addEventListener("input", () => {
    const wanted = input.value.trim().toLowerCase();
    let shown = 0;
    rows.forEach((row, index) => { row.hidden = !texts[index].includes(wanted); shown += !row.hidden; });
    count.textContent = wanted ? `${shown} of ${rows.length} rows` : "";
  });
  table.clearFilter = () => { input.value = ""; input.dispatchEvent(new Event("input")); };
  table.parentElement.before(make("div", {className: "tools filter"}, input, count));
};
for (const table of document.querySelectorAll("table")) {
  const heads = [...table.tHead.rows[0].cells];
  if (table.tBodies[0].rows.length > 1) heads.forEach((head, column) => {
    const button = make("button", {type: "button"}, ...head.childNodes);
    button.addEventListener("click", () => sortBy(table, heads, column));
    head.append(button);
  });
  if ("filter" in table.dataset) filterable(table);
}

// A link to a cell marks all of its trials, and shows them where a filter hid them.
const markTarget = () => {
  document.querySelectorAll("tr.target").forEach(row => row.classList.remove("target"));
  const found = document.getElementById(location.hash.slice(1));
  if (!found?.dataset.group) return;
  const table = found.closest("table");
  table.clearFilter?.();
  for (const row of table.tBodies[0].rows) row.classList.toggle("target", row.dataset.group === found.dataset.group);
  found.scrollIntoView({block: "center"});
};
addEventListener("hashchange", markTarget);
markTarget();

// Figures open in a dialog; Escape, the button and a click beside the picture close it.
const dialog = document.getElementById("enlarged");
dialog.addEventListener("click", event => { if (event.target === dialog) dialog.close(); });
for (const image of document.querySelectorAll("figure img")) {
  const title = image.parentElement.querySelector("figcaption strong").textContent;
  const button = make("button", {type: "button", className: "enlarge"});
  button.setAttribute("aria-label", `Enlarge: ${title}`);
  button.addEventListener("click", () => {
    dialog.querySelector("img").src = image.src;
    dialog.querySelector("img").alt = image.alt;
    document.getElementById("enlarged-title").textContent = title;
    dialog.showModal();
  });
  image.replaceWith(button);
  button.append(image);
}

// Print what is folded away, except very long tables.
const opened = [];
addEventListener("beforeprint", () => document.querySelectorAll("details:not([open]):not([data-long])").forEach(part => {
  part.open = true;
  opened.push(part);
}));
addEventListener("afterprint", () => opened.splice(0).forEach(part => { part.open = false; }));
