"use strict";
const rows = [...document.querySelectorAll(".row")];
const place = document.getElementById("place");
let current = 0;

function show(number) {
  current = Math.max(0, Math.min(rows.length - 1, number));
  place.textContent = `Row ${current + 1} of ${rows.length}`;
}

function go(number) {
  show(number);
  rows[current].focus({ preventScroll: true });
  rows[current].scrollIntoView();
}

function press(button) {
  const is_pressed = button.getAttribute("aria-pressed") !== "true";
  button.setAttribute("aria-pressed", String(is_pressed));
  return is_pressed;
}

const actions = {
  previous: () => go(current - 1),
  next: () => go(current + 1),
  bounds: (button) => document.body.classList.toggle("bounds", press(button)),
  fold: (button) => {
    const is_folded = press(button);
    for (const sample of document.querySelectorAll("details")) sample.open = !is_folded;
  },
};
const keys = { k: "previous", j: "next", t: "bounds", f: "fold" };

for (const name of Object.keys(actions)) {
  const button = document.getElementById(name);
  button.addEventListener("click", () => actions[name](button));
}
document.addEventListener("keydown", (event) => {
  const name = keys[event.key.toLowerCase()];
  if (!name || event.ctrlKey || event.altKey || event.metaKey) return;
  event.preventDefault();
  actions[name](document.getElementById(name));
});

// The row at the top of the window is the current one, however the reader came there.
let waiting = false;
addEventListener("scroll", () => {
  if (waiting) return;
  waiting = true;
  requestAnimationFrame(() => {
    waiting = false;
    const above = rows.filter((row) => row.getBoundingClientRect().top < innerHeight / 3);
    show(Math.max(0, above.length - 1));
  });
}, { passive: true });
