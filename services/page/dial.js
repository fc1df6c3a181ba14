// The temperature slider: its places are the temperatures that may be chosen, so that a key's list is a slider too.
const at = (id) => document.getElementById(id);
const MARKS = [0.1, 0.2, 0.5, 1, 2, 4, 10, 20];

/** Sets the slider up for a plan, at the temperature nearest to 1. */
export function drawDial(plan) {
  const { temperatures, once, output } = plan;
  const slider = at("temperature");
  slider.max = temperatures.length - 1;
  slider.disabled = temperatures.length === 1;
  const far = temperatures.map((one) => Math.abs(Math.log(one)));
  slider.value = far.indexOf(Math.min(...far));
  at("dial-note").textContent = once
    ? "Higher is softer. Worked out in this page, from one answer."
    : `Higher is softer. With this key each temperature is a question of its own, for ${output}.`;
  drawTicks(temperatures);
  place(plan);
}

/** Says where the slider stands. */
export function place({ temperatures }) {
  const slider = at("temperature");
  const temperature = temperatures[Number(slider.value)];
  const shown = temperature.toPrecision(3);
  at("shown").textContent = shown;
  slider.setAttribute("aria-valuetext", shown);
  const share = temperatures.length === 1 ? 0 : Number(slider.value) / (temperatures.length - 1);
  slider.style.setProperty("--share", share);
}

function drawTicks(temperatures) {
  const marks = temperatures.length > 12 ? MARKS : temperatures;
  const last = temperatures.length - 1;
  const ticks = marks.filter((mark) => temperatures.includes(mark)).map((mark) => {
    const tick = document.createElement("span");
    tick.textContent = mark;
    tick.style.setProperty("--share", last === 0 ? 0 : temperatures.indexOf(mark) / last);
    return tick;
  });
  at("ticks").replaceChildren(...ticks);
}
