// The page: who asks, which teacher, and its three parts.
import { factsOf, fill, keyFactsOf, summaryOf } from "./card.js";
import { Load } from "./load.js";
import { Problem, Service, show } from "./service.js";
import { Trial } from "./trial.js";

const at = (id) => document.getElementById(id);
const service = new Service();
const load = new Load(service, lock);
const trial = new Trial(service, lock, showUsage);
let cards = [];
let shown = null;

/** Asks for a key; says why where there was one. Several questions may find out at once: the first one tells. */
function lock(problem) {
  load.watch(null);
  if (service.unlocked) show(at("door-trouble"), problem);
  service.forget();
  at("main").hidden = true;
  at("door").hidden = false;
  at("choice").hidden = true;
  at("title").textContent = "Teacher";
  at("summary").textContent = "";
  at("key").focus();
}

async function open() {
  show(at("trouble"), null);
  try {
    cards = await service.teachers();
    if (cards.length === 0) {
      const rule = "must be one or more for this key";
      const hint = "Ask whoever gave it to you.";
      throw new Problem({ title: "Nothing to show", field: "teachers", rule, value: "none", hint });
    }
    enter();
    await showTeacher(cards[0]);
  } catch (error) {
    if (error.locked) lock(error);
    else show(at("trouble"), error);
  }
}

function enter() {
  const select = at("teacher");
  select.replaceChildren(...cards.map((card) => new Option(card.name)));
  at("choice").hidden = cards.length === 1;
  const asked = !at("door").hidden;
  at("door").hidden = true;
  at("main").hidden = false;
  at("leave").hidden = !service.unlocked;
  // What had the focus is gone; the keyboard goes on at the top of what has come.
  if (asked) at("title").focus();
}

async function showTeacher(card) {
  shown = card;
  at("title").textContent = card.name;
  document.title = `${card.name} – teacher service`;
  at("summary").textContent = summaryOf(card);
  fill(at("card-facts"), factsOf(card));
  load.watch(card.name);
  trial.begin(card);
  await showUsage();
}

async function showUsage() {
  try {
    fill(at("key-facts"), keyFactsOf(shown, await service.usage()));
  } catch (error) {
    if (error.locked) lock(error);
    else show(at("trouble"), error);
  }
}

at("door").addEventListener("submit", (event) => {
  event.preventDefault();
  show(at("door-trouble"), null);
  try {
    service.unlock(at("key").value);
  } catch (error) {
    show(at("door-trouble"), error);
    return;
  }
  at("key").value = "";
  open();
});
at("teacher").addEventListener("change", () => showTeacher(cards[at("teacher").selectedIndex]));
at("leave").addEventListener("click", () => {
  service.forget();
  lock(null);
});

open();
