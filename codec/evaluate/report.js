// The comparison view: two variants of an image, one beside the other under a slider, or their difference.
"use strict";

const views = JSON.parse(document.getElementById("views").textContent);
const [image, left, right, zoom, mode, position, stage, pair, rule] =
  ["image", "left", "right", "zoom", "mode", "position", "stage", "pair", "rule"].map((id) => document.getElementById(id));
const [under, over] = pair.querySelectorAll("img");

function fill(select, labels, chosen) {
  select.replaceChildren(...labels.map((label, i) => new Option(label, i)));
  select.selectedIndex = Math.min(chosen, labels.length - 1);
}

function caption(variant) {
  const figures = [];
  if (variant.bpp !== null) figures.push(`${variant.bpp.toFixed(4)} bpp`);
  if (variant.psnr !== null) figures.push(`${variant.psnr.toFixed(2)} dB`);
  return [variant.label, ...figures].join(" · ");
}

function show() {
  const view = views[image.selectedIndex];
  const [a, b] = [view.variants[left.selectedIndex], view.variants[right.selectedIndex]];
  over.src = a.source; // the left one lies above and is cut off at the slider
  under.src = b.source;
  [over.alt, under.alt] = [`${view.name}: ${a.label}`, `${view.name}: ${b.label}`];
  document.getElementById("left-caption").textContent = caption(a);
  document.getElementById("right-caption").textContent = caption(b);
  document.querySelector("#variants tbody").replaceChildren(...view.variants.map((variant) => {
    const row = document.createElement("tr");
    row.append(...[variant.label, variant.bpp?.toFixed(4) ?? "–", variant.psnr?.toFixed(2) ?? "–"].map((text, i) => {
      const cell = document.createElement("td");
      cell.textContent = text;
      cell.className = i ? "" : "t";
      return cell;
    }));
    return row;
  }));
  resize();
}

function resize() {
  const view = views[image.selectedIndex];
  const scale = Number(zoom.value); // 0: the width of the page
  const width = scale ? view.width * scale : Math.min(stage.clientWidth, view.width);
  pair.style.width = `${width}px`;
  pair.style.height = `${(width * view.height) / view.width}px`;
  pair.classList.toggle("zoomed", scale > 1);
  stage.classList.toggle("panned", width > stage.clientWidth);
}

function slide() {
  const difference = mode.value === "difference";
  pair.classList.toggle("difference", difference);
  over.style.clipPath = difference ? "none" : `inset(0 ${100 - position.value}% 0 0)`;
  rule.style.left = `${position.value}%`;
  position.disabled = difference;
}

function drag(event) {
  if (position.disabled || (event.type === "pointermove" && !event.buttons)) return;
  if (event.pointerType !== "mouse" && stage.classList.contains("panned") && event.type === "pointermove") return;
  const box = pair.getBoundingClientRect();
  position.value = Math.min(100, Math.max(0, (100 * (event.clientX - box.left)) / box.width));
  slide();
}

function turn(by) {
  image.selectedIndex = (image.selectedIndex + by + views.length) % views.length;
  choose();
}

function choose() {
  const labels = views[image.selectedIndex].variants.map((variant) => variant.label);
  fill(left, labels, left.selectedIndex < 0 ? 0 : left.selectedIndex);
  fill(right, labels, right.selectedIndex < 0 ? Number(right.dataset.first) : right.selectedIndex);
  show();
}

fill(image, views.map((view) => view.name), 0);
choose();
slide();
image.addEventListener("change", choose);
for (const select of [left, right]) select.addEventListener("change", show);
zoom.addEventListener("change", resize);
mode.addEventListener("change", slide);
position.addEventListener("input", slide);
for (const name of ["pointerdown", "pointermove"]) pair.addEventListener(name, drag);
document.getElementById("previous").addEventListener("click", () => turn(-1));
document.getElementById("next").addEventListener("click", () => turn(1));
window.addEventListener("resize", resize);
document.addEventListener("keydown", (event) => {
  if (event.altKey || event.ctrlKey || event.metaKey || ["SELECT", "INPUT"].includes(event.target.tagName)) return;
  const step = { ArrowLeft: -2, ArrowRight: 2 }[event.key];
  if (step && !position.disabled) position.value = Number(position.value) + step;
  else if (event.key === "p") turn(-1);
  else if (event.key === "n") turn(1);
  else if (event.key === "d") mode.value = mode.value === "difference" ? "slider" : "difference";
  else return;
  event.preventDefault();
  slide();
});
