"use strict";
for (const controls of document.querySelectorAll(".controls")) {
  const pictures = controls.parentElement.querySelector(".pictures");
  controls.hidden = false;
  controls.addEventListener("input", ({ target }) => {
    if (target.type === "radio") pictures.dataset.stream = target.value;
    else pictures.style.setProperty("--opacity", target.value);
  });
}
