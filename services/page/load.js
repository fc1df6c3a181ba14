// Live load: asked for each second while somebody can see it, drawn as a line over the last minute.
import { fill } from "./card.js";
import { Problem } from "./service.js";

const PERIOD = 1000;
const SAMPLES = 60;
const WIDTH = 300;
const HEIGHT = 56;
const SVG = "http://www.w3.org/2000/svg";
const number = new Intl.NumberFormat("en-GB", { maximumFractionDigits: 1 });
const share = new Intl.NumberFormat("en-GB", { style: "percent", maximumFractionDigits: 0 });

export class Load {
  #service;
  #locked;
  #name = null;
  #history = new Map();
  #timer = null;
  #asking = false;

  /** Nothing is asked before `watch`. `locked` is called where the key is not taken any more. */
  constructor(service, locked) {
    this.#service = service;
    this.#locked = locked;
    document.addEventListener("visibilitychange", () => this.#again(0));
  }

  /** Shows one teacher; null stops. */
  watch(name) {
    this.#name = name;
    if (name === null) this.#history.clear();
    this.#again(0);
  }

  #again(wait) {
    clearTimeout(this.#timer);
    if (this.#name !== null && !document.hidden) this.#timer = setTimeout(() => this.#poll(), wait);
  }

  async #poll() {
    if (this.#asking) return;
    this.#asking = true;
    const trouble = document.getElementById("load-trouble");
    try {
      const report = await this.#service.load();
      trouble.textContent = "";
      this.#take(report);
    } catch (error) {
      if (!(error instanceof Problem)) throw error;
      if (error.locked) return this.#locked(error);
      trouble.textContent = `Not known at the moment: ${error.message}.`;
    } finally {
      this.#asking = false;
    }
    this.#again(PERIOD);
  }

  #take(report) {
    for (const one of report.teachers) {
      const past = this.#history.get(one.name) ?? [];
      this.#history.set(one.name, [...past, one.images_per_second].slice(-SAMPLES));
    }
    document.getElementById("draining").hidden = !report.draining;
    const now = report.teachers.find((one) => one.name === this.#name);
    if (now === undefined) return;
    fill(document.getElementById("load-figures"), [
      ["Images a second", number.format(now.images_per_second)],
      ["Waiting", `${number.format(now.images_waiting)} of ${number.format(now.queue_images)}`],
      ["Batch fill", now.batch_fill === null ? "–" : share.format(now.batch_fill)],
    ]);
    document.getElementById("spark").replaceChildren(drawn(this.#history.get(now.name)));
  }
}

function drawn(history) {
  const most = Math.max(...history);
  const step = WIDTH / (SAMPLES - 1);
  const first = WIDTH - (history.length - 1) * step;
  const y = (value) => HEIGHT - 2 - (HEIGHT - 6) * (most > 0 ? value / most : 0);
  const points = history.map((value, place) => `${(first + place * step).toFixed(1)},${y(value).toFixed(1)}`);
  const line = `M${points.join("L")}`;
  const picture = made("svg", { viewBox: `0 0 ${WIDTH} ${HEIGHT}`, preserveAspectRatio: "none", role: "img" });
  const now = number.format(history.at(-1));
  picture.setAttribute("aria-label", `Images a second in the last minute: now ${now}, at most ${number.format(most)}`);
  picture.append(
    made("path", { class: "spark-base", d: `M0,${HEIGHT - 2}H${WIDTH}` }),
    made("path", { class: "spark-area", d: `${line}L${WIDTH},${HEIGHT - 2}L${first.toFixed(1)},${HEIGHT - 2}Z` }),
    made("path", { class: "spark-line", d: line }),
  );
  return picture;
}

function made(name, attributes) {
  const element = document.createElementNS(SVG, name);
  for (const [key, value] of Object.entries(attributes)) element.setAttribute(key, value);
  return element;
}
