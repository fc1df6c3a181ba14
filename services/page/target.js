// From a card to the question that its key may ask, and from an answer to a soft target. Nothing here touches the page.
import { Problem } from "./service.js";

const LOWEST = 0.1;
const HIGHEST = 20;
const SHOWN = 10;

const HALF_STEP = Math.LN10 / 200;
const ROUND = [0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 12, 15, 20];

/** Logarithmic, 100 to a decade, three digits each; where a round number is near, it is that. */
const GRID = Array.from({ length: 231 }, (_, step) => {
  const exact = 10 ** ((step - 100) / 100);
  return ROUND.find((one) => Math.abs(Math.log(one / exact)) < HALF_STEP) ?? Number(exact.toPrecision(3));
});

/**
 * What may be asked with this card.
 *
 * `once`: one answer holds the target at every temperature. Else each temperature is a question of its own.
 * `temperatures` rise, and are those that may be chosen. Where `reason` is given, nothing may be asked.
 */
export function planOf(card) {
  const { outputs, limits, fields } = card;
  const classes = fields.logits?.shape[0] ?? 0;
  const has = (output) => classes > 0 && outputs.includes(output);
  if (limits.by_id_only) return { reason: "This key asks by sample key only: images are not taken." };
  if (has("logits")) return { once: true, output: "logits", temperatures: GRID, classes };
  const temperatures = allowed(limits.temperatures);
  if (has("logprobs") && temperatures.includes(1)) return { once: true, output: "logprobs", temperatures: GRID, classes };
  const output = ["logprobs", "probs", "topk"].find(has);
  if (output === undefined) return { reason: "This key may have nothing that is made of logits." };
  if (temperatures.length === 0) return { reason: "This key may have no temperature, so no soft target." };
  const k = Math.min(limits.largest_k ?? SHOWN, SHOWN, classes);
  return { once: false, output, temperatures, classes, k };
}

function allowed(limit) {
  if (limit === null) return GRID;
  if (Array.isArray(limit)) return [...new Set(limit)].sort((a, b) => a - b);
  const { low, high } = limit;
  const ends = [low, high].filter((end) => end >= LOWEST && end <= HIGHEST);
  const inside = [...new Set([...GRID.filter((one) => one >= low && one <= high), ...ends])];
  return inside.length > 0 ? inside.sort((a, b) => a - b) : [...new Set([low, high])];
}

/** The query that asks for it. */
export function queryOf(plan, temperature) {
  const query = { output: plan.output };
  if (plan.output === "topk") query.k = plan.k;
  if (plan.output !== "logits") query.temperature = plan.once ? 1 : temperature;
  return query;
}

/** softmax(values / T) of logits, or of log-probabilities at T = 1: these differ by a constant. */
export function softmax(values, temperature) {
  const most = Math.max(...values);
  const powers = values.map((value) => Math.exp((value - most) / temperature));
  const sum = powers.reduce((total, power) => total + power, 0);
  return powers.map((power) => power / sum);
}

/**
 * The soft target that an answer holds.
 *
 * @returns {{rows: {index: number, probability: number}[], rest: {classes: number, probability: number}, nats: number[]}}
 * the likeliest classes, what is left, and the lowest and highest that the entropy can be.
 */
export function targetOf(plan, answer, temperature) {
  const values = answer.values[0];
  if (values.includes(null)) {
    const hint = "Tell whoever runs this server.";
    throw new Problem({ title: "No soft target", field: "values", rule: "must be finite", value: "null", hint });
  }
  if (plan.output === "topk") return ofTopK(plan, answer, values.map(Math.exp));
  const known = plan.output === "logprobs" ? values.map(Math.exp) : values;
  const all = plan.once ? softmax(values, temperature) : known;
  const rows = all.map((probability, index) => ({ index, probability }));
  // Equal ones stand in the order of their classes: the sort is stable.
  rows.sort((a, b) => b.probability - a.probability);
  const left = rows.slice(SHOWN);
  const probability = left.reduce((total, row) => total + row.probability, 0);
  const nats = all.reduce((total, one) => total + surprise(one), 0);
  return { rows: rows.slice(0, SHOWN), rest: { classes: left.length, probability }, nats: [nats, nats] };
}

function ofTopK(plan, answer, probabilities) {
  const rows = probabilities.map((probability, place) => ({ index: answer.indices[0][place], probability }));
  const tail = answer.tail_logmass[0];
  const rest = { classes: plan.classes - rows.length, probability: tail === null ? 0 : Math.exp(tail) };
  const known = probabilities.reduce((total, one) => total + surprise(one), 0);
  if (rest.classes === 0 || rest.probability === 0) return { rows, rest, nats: [known, known] };
  // What is left is spread evenly at most, and at least in pieces as large as the last class that is known.
  const largest = Math.min(probabilities.at(-1), rest.probability);
  const low = known - rest.probability * Math.log(largest);
  const high = known - rest.probability * Math.log(rest.probability / rest.classes);
  return { rows, rest, nats: [Math.min(low, high), high] };
}

function surprise(probability) {
  return probability > 0 ? -probability * Math.log(probability) : 0;
}
