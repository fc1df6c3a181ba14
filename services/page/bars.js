// A soft target as bars, and in words. The numbers stand as text; the bars repeat them for the eye.
import { counted } from "./card.js";

const at = (id) => document.getElementById(id);

function percent(share) {
  return share > 0 && share < 0.00005 ? "< 0.01\u202f%" : `${(100 * share).toFixed(2)}\u202f%`;
}

function nameOf(card, index) {
  return card.class_names?.[index] ?? `class ${index}`;
}

/** Puts the target into the page. */
export function drawTarget(card, target, answer) {
  const rows = target.rows.map(({ index, probability }) => [nameOf(card, index), probability, ""]);
  const { classes, probability } = target.rest;
  if (classes > 0) rows.push([counted(classes, "other class", "other classes"), probability, "rest"]);
  const list = at("classes");
  while (list.children.length > rows.length) list.lastChild.remove();
  while (list.children.length < rows.length) list.append(emptyRow());
  rows.forEach((row, place) => fillRow(list.children[place], ...row));
  drawEntropy(target);
  const kept = answer.encodings.logits;
  const step = answer.rounding ?? null;
  const remarks = [
    kept === undefined ? null : `Read from the cache, where logits are kept as ${kept}.`,
    step === null ? null : `This key's answers are rounded to multiples of ${step}.`,
  ];
  at("remark").textContent = remarks.filter(Boolean).join(" ");
}

// The same elements are used again, so that a bar moves and does not jump.
function emptyRow() {
  const row = document.createElement("li");
  const [name, bar, fill] = ["name", "bar", "fill"].map((className) => {
    const part = document.createElement("span");
    part.className = className;
    return part;
  });
  bar.append(fill);
  row.append(name, document.createElement("data"), bar);
  return row;
}

function fillRow(row, label, share, className) {
  const [name, value, bar] = row.children;
  row.className = className;
  name.textContent = label;
  value.value = share;
  value.textContent = percent(share);
  bar.firstChild.style.width = `${100 * Math.min(share, 1)}%`;
}

function drawEntropy({ nats }) {
  const [low, high] = nats.map((one) => one / Math.LN2);
  const bits = document.createElement("data");
  bits.value = low;
  bits.textContent = low.toFixed(2);
  if (low === high) {
    const alike = (2 ** low).toFixed(low < 6 ? 1 : 0);
    at("entropy").replaceChildren("Entropy ", bits, ` bits, as much as ${alike} equally likely classes.`);
    return;
  }
  const most = document.createElement("data");
  most.value = high;
  most.textContent = high.toFixed(2);
  const rest = " bits: the others are known as a sum only.";
  at("entropy").replaceChildren("Entropy between ", bits, " and ", most, rest);
}

/** What a screen reader says once the target rests. */
export function sentenceOf(card, target, temperature) {
  const [first] = target.rows;
  return `Likeliest: ${nameOf(card, first.index)}, ${percent(first.probability)}, at temperature ${temperature}.`;
}
