"use strict";
// Masks are bits of the patch grid; here they become paths over the pictures.

function decoded(text, count) {
  const bytes = atob(text);
  return Array.from({ length: count }, (_, i) => (bytes.charCodeAt(i >> 3) >> (i & 7)) & 1);
}

function shade(bits, rows, columns) {
  let path = `M0 0H${columns}V${rows}H0Z`;
  for (let y = 0; y < rows; y++)
    for (let x = 0; x < columns; x++) {
      let width = 0;
      while (x + width < columns && bits[y * columns + x + width]) width++;
      if (width) path += `M${x} ${y}h${width}v1h-${width}z`;
      x += width;
    }
  return path;
}

function outline(bits, rows, columns) {
  const inside = (x, y) => x >= 0 && y >= 0 && x < columns && y < rows && bits[y * columns + x];
  let path = "";
  for (let y = 0; y <= rows; y++)
    for (let x = 0; x <= columns; x++) {
      if (!inside(x, y) !== !inside(x - 1, y)) path += `M${x} ${y}v1`;
      if (!inside(x, y) !== !inside(x, y - 1)) path += `M${x} ${y}h1`;
    }
  return path;
}

for (const exemplars of document.querySelectorAll(".exemplars[data-rows]")) {
  const rows = Number(exemplars.dataset.rows), columns = Number(exemplars.dataset.columns);
  for (const thumb of exemplars.querySelectorAll("[data-bits]")) {
    const bits = decoded(thumb.dataset.bits, rows * columns);
    const line = outline(bits, rows, columns);
    thumb.insertAdjacentHTML("beforeend", `<svg viewBox="0 0 ${columns} ${rows}" preserveAspectRatio="none" aria-hidden="true">
      <path class="shade" fill-rule="evenodd" d="${shade(bits, rows, columns)}"/>
      <path class="halo" d="${line}"/><path class="outline" d="${line}"/></svg>`);
  }
  for (const picture of exemplars.querySelectorAll("img")) picture.title = picture.alt;
  const controls = exemplars.parentElement.querySelector(".controls");
  controls.hidden = !exemplars.querySelector("[data-bits]");
  const update = () => { exemplars.dataset.mask = controls.querySelector(":checked").value; };
  controls.addEventListener("input", update);
  update(); // a browser may have kept another choice over a reload
}

document.addEventListener("keydown", (event) => {
  const rel = { ArrowLeft: "prev", ArrowRight: "next" }[event.key];
  if (!rel || event.target.matches("input") || event.altKey || event.ctrlKey || event.metaKey) return;
  document.querySelector(`a[rel=${rel}]`)?.click();
});
