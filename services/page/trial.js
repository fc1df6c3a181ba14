// Try an image: choose, drop or paste it, see what the teacher says, and turn the temperature.
import { show } from "./service.js";
import { planOf, queryOf, targetOf } from "./target.js";
import { drawTarget, sentenceOf } from "./bars.js";
import { drawDial, place } from "./dial.js";

const PAUSE = 250;
const at = (id) => document.getElementById(id);

export class Trial {
  #service;
  #locked;
  #answered;
  #card = null;
  #plan = null;
  #file = null;
  #answers = new Map();
  #asking = null;
  #pause = null;
  #speech = null;

  /** `locked` is called where the key is not taken any more, `answered` after each answer. */
  constructor(service, locked, answered) {
    this.#service = service;
    this.#locked = locked;
    this.#answered = answered;
    at("temperature").addEventListener("input", () => this.#turn());
    at("preview").addEventListener("load", () => this.#describe());
    at("preview").addEventListener("error", () => (at("figure").hidden = true));
    at("file").addEventListener("change", () => {
      this.#take(at("file").files);
      // So that the same file, changed since, can be chosen again.
      at("file").value = "";
    });
    document.addEventListener("paste", (event) => this.#take(event.clipboardData.files));
    for (const kind of ["dragenter", "dragover", "dragleave", "drop"]) {
      // Everywhere: a browser would leave the page for a file that misses the field.
      window.addEventListener(kind, (event) => this.#drag(kind, event));
    }
    // Chosen before this script had come.
    this.#take(at("file").files);
  }

  /** Begins anew with a teacher. */
  begin(card) {
    this.#asking?.abort();
    clearTimeout(this.#pause);
    this.#card = card;
    this.#plan = planOf(card);
    this.#answers.clear();
    show(at("trial-trouble"), null);
    at("result").hidden = true;
    at("file").disabled = this.#plan.reason !== undefined;
    at("drop").classList.toggle("closed", at("file").disabled);
    if (this.#plan.reason !== undefined) {
      this.#file = null;
      this.#preview();
      return;
    }
    drawDial(this.#plan);
    this.#preview();
    if (this.#file !== null) this.#ask();
  }

  #drag(kind, event) {
    if (!event.dataTransfer?.types.includes("Files")) return;
    event.preventDefault();
    const inside = at("drop").contains(event.target) && !at("file").disabled;
    at("drop").classList.toggle("over", inside && kind !== "drop" && kind !== "dragleave");
    event.dataTransfer.dropEffect = at("file").disabled ? "none" : "copy";
    if (kind === "drop") this.#take(event.dataTransfer.files);
  }

  #take(files) {
    if (files.length === 0 || this.#plan?.reason !== undefined) return;
    this.#file = files[0];
    // Chosen before the card has come: `begin` asks about it.
    if (this.#plan === null) return;
    this.#answers.clear();
    this.#preview(files.length);
    this.#ask();
  }

  #preview(found = 1) {
    const image = at("preview");
    if (image.src) URL.revokeObjectURL(image.src);
    image.removeAttribute("src");
    at("figure").hidden = this.#file === null;
    if (this.#file !== null) {
      image.src = URL.createObjectURL(this.#file);
      image.alt = `The image ${this.#file.name}`;
    }
    at("drop").dataset.dropped = found;
    this.#describe();
  }

  #describe() {
    const { reason } = this.#plan;
    const file = this.#file;
    at("drop-name").textContent = file?.name ?? (reason ? "No image can be tried." : "Drop an image here, or paste one.");
    document.querySelector("label[for=file]").textContent = file === null ? "Choose a file" : "Choose another";
    const image = at("preview");
    image.classList.toggle("tiny", image.naturalWidth < 64 && image.naturalHeight < 64);
    const [answer] = this.#answers.values();
    const [height, width] = this.#card.input.shape;
    const found = Number(at("drop").dataset.dropped);
    const facts = file === null ? [reason ?? "JPEG, PNG or WebP."] : [
      image.naturalWidth ? `${image.naturalWidth} × ${image.naturalHeight} pixels` : null,
      file.size < 1000 ? `${file.size} bytes` : `${Number((file.size / 1000).toPrecision(3))} kB`,
      answer?.resized ? `resized and cropped to ${width} × ${height}` : null,
      found > 1 ? `the first of ${found}` : null,
    ];
    at("drop-note").textContent = facts.filter(Boolean).join(" · ");
  }

  get #temperature() {
    return this.#plan.temperatures[Number(at("temperature").value)];
  }

  /**
   * Where every temperature is a question, waits until the slider rests: each may cost an image of a budget.
   * Where one answer holds all and is on its way, it will be shown at the temperature that stands then.
   */
  #turn() {
    place(this.#plan);
    clearTimeout(this.#pause);
    if (this.#known() !== undefined) {
      this.#asking?.abort();
      this.#busy(false);
      this.#draw();
    } else if (this.#file !== null && !this.#plan.once) {
      at("answer").hidden = true;
      this.#pause = setTimeout(() => this.#ask(), PAUSE);
    }
  }

  #known() {
    return this.#answers.get(this.#plan.once ? "once" : this.#temperature);
  }

  async #ask() {
    this.#asking?.abort();
    const asking = new AbortController();
    this.#asking = asking;
    const temperature = this.#temperature;
    this.#busy(true);
    try {
      const query = queryOf(this.#plan, temperature);
      const answer = await this.#service.predict(this.#card, this.#file, query, asking.signal);
      this.#answers.set(this.#plan.once ? "once" : temperature, answer);
      this.#describe();
      this.#draw();
    } catch (error) {
      if (error.name === "AbortError") return;
      at("answer").hidden = true;
      // A slider without an answer serves where turning it is a new question.
      if (this.#plan.once) at("result").hidden = true;
      if (error.locked) return this.#locked(error);
      show(at("trial-trouble"), error);
    } finally {
      if (this.#asking === asking) this.#busy(false);
    }
    this.#answered();
  }

  #busy(whether) {
    at("trial").setAttribute("aria-busy", String(whether));
  }

  #draw() {
    const answer = this.#known();
    const temperature = this.#temperature;
    const target = targetOf(this.#plan, answer, temperature);
    show(at("trial-trouble"), null);
    at("result").hidden = false;
    at("answer").hidden = false;
    drawTarget(this.#card, target, answer);
    clearTimeout(this.#speech);
    this.#speech = setTimeout(() => (at("said").textContent = sentenceOf(this.#card, target, temperature)), 500);
  }
}
