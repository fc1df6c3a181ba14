// The service's endpoints. The key is kept here, in memory, and nowhere else.

/** Why there is no answer: the parts of `application/problem+json`, whoever found the fault. */
export class Problem extends Error {
  /** @param {{status?: number, title: string, field: string, rule: string, value: string, hint: string}} parts */
  constructor(parts) {
    super(`${parts.field}: ${parts.rule}`);
    this.parts = parts;
  }

  /** Whether the service wants a key, or another one. */
  get locked() {
    return this.parts.status === 401;
  }
}

export class Service {
  #key = "";

  /** Takes a key for all that is asked from here on. */
  unlock(key) {
    const trimmed = key.trim();
    if (!/^[\x21-\x7e]+$/.test(trimmed)) {
      const rule = "must be visible ASCII characters";
      throw new Problem({ title: "Not a key", field: "key", rule, value: "(hidden)", hint: "Copy it once more." });
    }
    this.#key = trimmed;
  }

  /** Forgets the key. */
  forget() {
    this.#key = "";
  }

  /** Whether there is a key. */
  get unlocked() {
    return this.#key !== "";
  }

  /** The cards of the teachers that this key may ask. */
  async teachers() {
    return (await this.#ask("v1/teachers")).teachers;
  }

  /** What this key has used, and what is left. */
  usage() {
    return this.#ask("v1/usage");
  }

  /** How busy the teachers are. */
  load() {
    return this.#ask("v1/load");
  }

  /** The answer to one image. The condition makes sure that it comes from the teacher whose card is shown. */
  predict(card, file, query, signal) {
    const path = `v1/teachers/${encodeURIComponent(card.name)}/predict?${new URLSearchParams(query)}`;
    // A file of no known type is sent as such: the service says what it takes.
    const headers = { "Content-Type": file.type || "application/octet-stream", "If-Match": `"${card.digest}"` };
    return this.#ask(path, { method: "POST", body: file, headers, signal });
  }

  async #ask(path, { headers, ...options } = {}) {
    const key = this.#key ? { Authorization: `Bearer ${this.#key}` } : {};
    const sent = { Accept: "application/json", ...key, ...headers };
    let answer;
    try {
      answer = await fetch(path, { cache: "no-store", credentials: "omit", ...options, headers: sent });
    } catch (error) {
      if (error.name === "AbortError") throw error;
      const hint = "See whether it runs and is near, then try again.";
      throw new Problem({ title: "No answer", field: "server", rule: "must be reachable", value: error.message, hint });
    }
    if (!answer.ok) throw await problemOf(answer);
    return answer.json();
  }
}

async function problemOf(answer) {
  const retry = answer.headers.get("Retry-After");
  if (answer.headers.get("Content-Type")?.startsWith("application/problem+json")) {
    return new Problem({ ...(await answer.json()), retry });
  }
  const title = answer.statusText || "Refused";
  const hint = "Something between this page and the service has answered.";
  const rule = "must say what is wrong";
  return new Problem({ status: answer.status, title, field: "answer", rule, value: String(answer.status), hint, retry });
}

/** Shows a problem in an element that is an alert; null takes it away. An error of another kind is not swallowed. */
export function show(element, problem) {
  if (problem === null) {
    element.replaceChildren();
    return;
  }
  if (!(problem instanceof Problem)) throw problem;
  const { status, title, field, rule, value, hint, retry, request_id: id } = problem.parts;
  const box = document.createElement("div");
  box.className = "problem";
  const line = (className, ...words) => {
    const paragraph = document.createElement("p");
    paragraph.className = className;
    paragraph.append(...words);
    box.append(paragraph);
  };
  const name = document.createElement("code");
  name.textContent = field;
  line("problem-title", [status, title].filter(Boolean).join(" "));
  line("", name, ` ${rule}. Found: ${value}.`);
  line("", hint, retry ? ` It may help to wait ${retry} s.` : "");
  if (id) line("problem-id quiet", `Request ${id}`);
  element.replaceChildren(box);
}
