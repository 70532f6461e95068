"use strict";
const root = document.documentElement;
const probe = document.getElementById("probe");
const everything = document.getElementById("everything");
const legend = [...document.querySelectorAll("[data-switch]")];
const hiddenMethods = new Set();

// Plotly does not know CSS's ways to write a colour for light and dark: they become the colours of the moment.
function resolveColours(figure) {
  const known = {};
  const resolve = (name) => {
    probe.style.color = name;
    return (known[name] ??= getComputedStyle(probe).color);
  };
  const isColour = (value) => typeof value === "string" && /^(var|light-dark)\(/.test(value);
  return JSON.parse(figure, (key, value) => (isColour(value) ? resolve(value) : value));
}

function draw(plot) {
  const { data, layout } = resolveColours(plot.dataset.figure);
  layout.shapes = (layout.shapes ?? []).filter((shape) => !hiddenMethods.has(shape.name));
  const traces = data.filter((trace) => !hiddenMethods.has(trace.meta));
  Plotly.react(plot, traces, layout, { responsive: true, displayModeBar: false });
}

// A table that goes on to the right fades out there and has a hint above it, until it is scrolled to its end.
function showScrolling() {
  for (const box of document.querySelectorAll(".scroll")) {
    box.classList.toggle("more", box.scrollLeft + box.clientWidth < box.scrollWidth - 2);
    box.previousElementSibling.hidden = box.scrollWidth <= box.clientWidth + 2;
  }
}
for (const box of document.querySelectorAll(".scroll")) box.addEventListener("scroll", showScrolling);
for (const details of document.querySelectorAll("details")) details.addEventListener("toggle", showScrolling);
addEventListener("resize", showScrolling);

function drawVisible() {
  showScrolling();
  if (typeof Plotly === "undefined") {
    document.querySelector(".missing").hidden = false;
    return;
  }
  [...document.querySelectorAll(".plot")].filter((plot) => plot.offsetParent).forEach(draw);
}

// A panel belongs to one value of one choice; panels inside panels need both.
function show(name, value) {
  for (const panel of document.querySelectorAll(`[data-choice="${name}"]`)) panel.hidden = panel.dataset.value !== value;
}

function showMethods() {
  for (const button of legend) button.setAttribute("aria-pressed", !hiddenMethods.has(button.dataset.switch));
  for (const part of document.querySelectorAll("[data-method]")) part.classList.toggle("off", hiddenMethods.has(part.dataset.method));
  everything.hidden = hiddenMethods.size === 0;
  drawVisible();
}

function setHidden(methods) {
  hiddenMethods.clear();
  for (const method of methods) hiddenMethods.add(method);
  showMethods();
}

function emphasise(method) {
  if (typeof Plotly === "undefined") return;
  for (const plot of document.querySelectorAll(".plot.many")) {
    if (plot.offsetParent) Plotly.restyle(plot, { opacity: plot.data.map((trace) => (!method || trace.meta === method ? 1 : 0.15)) });
  }
}

for (const button of legend) {
  const method = button.dataset.switch;
  button.addEventListener("click", () => {
    if (!hiddenMethods.delete(method)) hiddenMethods.add(method);
    showMethods();
  });
  button.addEventListener("dblclick", () => setHidden(legend.map((other) => other.dataset.switch).filter((other) => other !== method)));
  button.addEventListener("pointerenter", (event) => event.pointerType === "mouse" && emphasise(method));
  button.addEventListener("pointerleave", (event) => event.pointerType === "mouse" && emphasise(null));
}
everything.addEventListener("click", () => setHidden([]));

function sortBy(header) {
  const body = header.closest("table").tBodies[0];
  const descending = header.getAttribute("aria-sort") !== "descending";
  const direction = descending ? -1 : 1;
  const valueOf = (row) => row.cells[header.cellIndex].dataset.value;
  const compare = (one, other) => {
    const [first, second] = [valueOf(one), valueOf(other)];
    if (first === "" || second === "") return (first === "") - (second === ""); // what was not measured comes last
    return direction * (isNaN(first) ? first.localeCompare(second) : first - second);
  };
  for (const other of header.parentElement.cells) other.removeAttribute("aria-sort");
  header.setAttribute("aria-sort", descending ? "descending" : "ascending");
  body.classList.remove("grouped");
  body.append(...[...body.rows].sort(compare));
}
for (const button of document.querySelectorAll("thead button")) button.addEventListener("click", () => sortBy(button.closest("th")));

const systemIsDark = matchMedia("(prefers-color-scheme: dark)");
document.getElementById("theme").addEventListener("click", () => {
  const dark = root.dataset.theme ? root.dataset.theme === "dark" : systemIsDark.matches;
  root.dataset.theme = dark ? "light" : "dark";
  drawVisible();
});
systemIsDark.addEventListener("change", drawVisible);

const controls = document.querySelectorAll("select, input:checked");
for (const control of controls) show(control.name, control.value);
document.addEventListener("change", (event) => {
  show(event.target.name, event.target.value);
  drawVisible();
});
drawVisible();
