"use strict";
const PAGE_ROWS = 100;
const COLUMNS = [
  { key: "name", title: "Neuron", hint: "block:neuron, both from 0" },
  { key: "promoted", title: "Writes", hint: "class that the value vector promotes most", text: true },
  { key: "product", title: "E·v", hint: "product of this class's embedding and the value vector", digits: 3 },
  { key: "label", title: "Exemplars’ label", hint: "most frequent label of the exemplars", text: true },
  { key: "share", title: "Share", hint: "share of the exemplars with this label", percent: true },
  { key: "detected", title: "Best overlap", hint: "class whose segmentation masks overlap most with the activation", text: true },
  { key: "iou", title: "IoU", hint: "intersection over union with this class; bold above the detector threshold", digits: 4 },
  { key: "clip", title: "CLIP", hint: "text whose embedding is closest to the masked exemplars", text: true },
  { key: "agreeing", title: "Agreeing", hint: "pairs of words (writes, exemplars' label, CLIP) that name the same class", digits: 0 },
];

const { names, columns } = CLASSLENS_INDEX;
const total = columns.block.length;
const shown = COLUMNS.filter(({ key }) => key === "name" || key in columns);
const texts = shown.filter(({ text }) => text);
const element = (id) => document.getElementById(id);
const table = element("table"), controls = element("controls");
const detector = Number(controls.dataset.detector);
const state = { query: "", block: "", detectors: false, agreeing: false, sort: "name", falling: false, page: 0 };

// Names are compared once; rows then compare by their names' places.
const collator = new Intl.Collator("en", { numeric: true });
const place = new Float64Array(names.length);
[...names.keys()].sort((a, b) => collator.compare(names[a], names[b])).forEach((name, i) => { place[name] = i; });

const keys = {};
for (const { key, text } of shown) {
  const of = columns[key];
  keys[key] = key === "name"
    ? Float64Array.from({ length: total }, (_, i) => i)
    : Float64Array.from(of, (value) => (value === null ? NaN : text ? place[value] : value));
}

function matching() {
  const query = state.query.trim().toLowerCase();
  const hits = new Set();
  if (query) names.forEach((name, i) => { if (name.toLowerCase().includes(query)) hits.add(i); });
  const [, block, neuron] = query.match(/^(\d+):(\d*)$/) ?? [];
  const number = /^\d+$/.test(query) ? Number(query) : -1;
  const rows = [];
  for (let i = 0; i < total; i++) {
    if (state.block !== "" && columns.block[i] !== Number(state.block)) continue;
    if (state.detectors && !(columns.iou[i] > detector)) continue;
    if (state.agreeing && !(columns.agreeing[i] > 0)) continue;
    if (query) {
      const named = block !== undefined && columns.block[i] === Number(block) && String(columns.neuron[i]).startsWith(neuron);
      if (!named && columns.neuron[i] !== number && !texts.some(({ key }) => hits.has(columns[key][i]))) continue;
    }
    rows.push(i);
  }
  return rows;
}

function sorted(rows) {
  const by = keys[state.sort], sign = state.falling ? -1 : 1;
  return rows.sort((a, b) => {
    const x = by[a], y = by[b];
    if (x === y) return a - b;
    if (Number.isNaN(x)) return Number.isNaN(y) ? a - b : 1; // what is not there comes last
    if (Number.isNaN(y)) return -1;
    return sign * (x - y);
  });
}

function cell(column, i) {
  const value = columns[column.key]?.[i];
  if (column.key === "name") {
    const th = document.createElement("th"), link = document.createElement("a");
    th.scope = "row";
    link.href = `neurons/${columns.block[i]}/${columns.neuron[i]}.html`;
    link.textContent = `${columns.block[i]}:${columns.neuron[i]}`;
    th.append(link);
    return th;
  }
  const td = document.createElement("td");
  if (value === null) td.textContent = "–";
  else if (column.text) td.textContent = td.title = names[value];
  else td.textContent = (column.percent ? `${(100 * value).toFixed(0)}%` : value.toFixed(column.digits)).replace("-", "−");
  td.className = column.text ? "name" : "number";
  if (column.key === "iou" && value > detector) td.classList.add("detector");
  return td;
}

let rows = [];
function draw() {
  const pages = Math.max(1, Math.ceil(rows.length / PAGE_ROWS));
  state.page = Math.min(Math.max(0, state.page), pages - 1);
  const first = state.page * PAGE_ROWS;
  const body = document.createElement("tbody");
  for (const i of rows.slice(first, first + PAGE_ROWS)) {
    const row = body.insertRow();
    row.append(...shown.map((column) => cell(column, i)));
  }
  table.tBodies[0].replaceWith(body);
  for (const header of table.tHead.rows[0].cells) {
    const sorts = header.dataset.key === state.sort;
    if (sorts) header.setAttribute("aria-sort", state.falling ? "descending" : "ascending");
    else header.removeAttribute("aria-sort");
  }
  document.querySelector(".count").textContent = rows.length
    ? `${first + 1}–${Math.min(first + PAGE_ROWS, rows.length)} of ${rows.length.toLocaleString("en")} neurons`
    : "No neuron fits.";
  for (const turn of document.querySelectorAll(".turn")) {
    turn.hidden = pages === 1;
    turn.querySelector(".where").textContent = `page ${state.page + 1} of ${pages}`;
    for (const button of turn.querySelectorAll("button"))
      button.disabled = Number(button.dataset.step) < 0 ? state.page === 0 : state.page === pages - 1;
  }
  remember();
}

function update() {
  rows = sorted(matching());
  draw();
}

function remember() {
  const kept = Object.entries(state).filter(([, value]) => value !== "" && value !== false && value !== 0);
  const hash = `#${new URLSearchParams(kept)}`;
  if (location.hash !== hash) history.replaceState(null, "", hash);
}

function recall() {
  const kept = new URLSearchParams(location.hash.slice(1));
  state.query = kept.get("query") ?? "";
  state.block = kept.get("block") ?? "";
  state.detectors = kept.has("detectors") && "iou" in columns;
  state.agreeing = kept.has("agreeing") && "agreeing" in columns;
  state.sort = kept.get("sort") in keys ? kept.get("sort") : "name";
  state.falling = kept.has("falling");
  state.page = Number(kept.get("page")) || 0;
  element("query").value = state.query;
  element("block").value = state.block;
  element("detectors").checked = state.detectors;
  element("agreeing").checked = state.agreeing;
}

function makeHeader() {
  const row = table.createTHead().insertRow();
  for (const { key, title, hint, text } of shown) {
    const header = document.createElement("th"), button = document.createElement("button");
    header.scope = "col";
    header.dataset.key = key;
    if (!text && key !== "name") header.className = "number";
    button.textContent = title;
    button.title = hint;
    button.addEventListener("click", () => {
      const ascendingFirst = text || key === "name";
      state.falling = state.sort === key ? !state.falling : !ascendingFirst;
      state.sort = key;
      state.page = 0;
      update();
    });
    header.append(button);
    row.append(header);
  }
  table.createTBody();
}

function makePager() {
  for (const turn of document.querySelectorAll(".turn")) {
    const where = document.createElement("span");
    where.className = "where";
    const button = (text, step, label) => {
      const made = document.createElement("button");
      made.textContent = text;
      made.dataset.step = step;
      made.setAttribute("aria-label", label);
      made.addEventListener("click", () => { state.page += step; draw(); });
      return made;
    };
    turn.append(button("«", -1e9, "first page"), button("‹", -1, "previous page"), where, button("›", 1, "next page"), button("»", 1e9, "last page"));
  }
}

makeHeader();
makePager();
element("only-detectors").hidden = !("iou" in columns);
element("only-agreeing").hidden = !("agreeing" in columns);
controls.addEventListener("submit", (event) => event.preventDefault());
controls.addEventListener("input", () => {
  state.query = element("query").value;
  state.block = element("block").value;
  state.detectors = element("detectors").checked;
  state.agreeing = element("agreeing").checked;
  state.page = 0;
  update();
});
addEventListener("hashchange", () => { recall(); update(); });
for (const part of [controls, ...document.querySelectorAll(".pager")]) part.hidden = false;
recall();
update();
