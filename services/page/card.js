// The teacher's card, and what a key may ask and has used, as lists of facts.

const count = new Intl.NumberFormat("en-GB");

/** `1 image`, `2 images`. */
export function counted(number, one, many = `${one}s`) {
  return `${count.format(number)} ${number === 1 ? one : many}`;
}

/** Puts pairs of a term and what it is into a `<dl>`; a pair without a value is left out. */
export function fill(list, facts) {
  const rows = facts.filter(([, value]) => value !== null).map(([term, value]) => {
    const row = document.createElement("div");
    const name = document.createElement("dt");
    const what = document.createElement("dd");
    name.textContent = term;
    what.append(value);
    row.append(name, what);
    return row;
  });
  list.replaceChildren(...rows);
}

/** One line on what the teacher takes and tells. */
export function summaryOf(card) {
  const classes = card.fields.logits?.shape[0];
  return [classes === undefined ? null : counted(classes, "class", "classes"), inputOf(card)].filter(Boolean).join(" · ");
}

function inputOf(card) {
  const [height, width, channels] = card.input.shape;
  const colours = { 1: "greyscale", 3: "RGB" }[channels] ?? `${channels} channels`;
  return `${height} × ${width} pixels, ${colours}`;
}

/** What the card says of the teacher. */
export function factsOf(card) {
  const { mean, std } = card.input;
  const numbers = (values) => values.map((value) => Number(value.toPrecision(4))).join(", ");
  const digest = document.createElement("code");
  digest.textContent = card.digest;
  const { precision, device, threads } = card.numerics;
  return [
    ["Digest", digest],
    ["Classes", classesOf(card)],
    ["Input", `${inputOf(card)}, ${card.input.dtype}`],
    ["Preprocessing", mean === null ? "x / 255" : `x / 255, then mean ${numbers(mean)} and std ${numbers(std)}`],
    ["Outputs", card.outputs.join(", ") || "none for this key"],
    ["Fields", Object.keys(card.fields).join(", ") || "none for this key"],
    ["Computed", `${precision} on ${device}, ${counted(threads, "thread")}, ${counted(card.micro_batch, "row")} a batch`],
  ];
}

function classesOf(card) {
  const names = card.class_names;
  const classes = card.fields.logits?.shape[0] ?? names?.length;
  if (names === null) return classes === undefined ? null : `${count.format(classes)}, without names`;
  const box = document.createElement("details");
  const head = document.createElement("summary");
  head.textContent = counted(names.length, "class", "classes");
  const list = document.createElement("p");
  list.textContent = names.join(", ");
  box.append(head, list);
  return box;
}

/** What this key may ask, and what it has used: only limits that there are. */
export function keyFactsOf(card, usage) {
  const { limits } = card;
  const left = (number) => (number === null ? "" : `, ${count.format(number)} left`);
  const or = (value, shown) => (value === null ? null : shown(value));
  const megapixels = `${count.format(Number((limits.pixels / 1e6).toPrecision(3)))} megapixels`;
  return [
    ["Name", usage.key],
    ["Used", `${counted(usage.images, "image")} in ${counted(usage.requests, "request")}`],
    ["Today", `${counted(usage.images_today, "image")}${left(usage.images_today_left)}`],
    ["Distinct", or(usage.distinct_images, (used) => `${counted(used, "image")}${left(usage.distinct_images_left)}`)],
    ["Pace", or(limits.images_per_second, (most) => `${count.format(most)} images a second`)],
    ["Images", limits.by_id_only ? "none: sample keys only" : null],
    ["Largest k", or(limits.largest_k, (most) => count.format(most))],
    ["Temperatures", or(limits.temperatures, shownTemperatures)],
    ["Rounding", or(limits.rounding, (step) => `to multiples of ${step}`)],
    ["Data sets", or(limits.datasets, (names) => names.join(", ") || "none")],
    ["Until", or(limits.expires, (moment) => new Date(moment).toISOString().replace("T", " ").replace(/\.\d+Z/, " UTC"))],
    ["A request", `${counted(limits.images, "image")}, ${count.format(limits.body_bytes / 2 ** 20)} MiB, ${megapixels}`],
  ];
}

/** A list, or a span, of temperatures. */
export function shownTemperatures(limit) {
  return Array.isArray(limit) ? limit.join(", ") || "none" : `from ${limit.low} to ${limit.high}`;
}
