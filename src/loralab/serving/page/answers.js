// The columns: what each model answers, turn after turn, and how that differs from the base.

import { differences } from "./differences.js";
import { curl, events, post } from "./server.js";
import { $, BASE, adapterOf, canAnswer, copy, hueOf, isVision, make, mode, seconds, state, titleOf } from "./state.js";
import { say } from "./words.js";

let columns = new Map();  // name -> Column

// Keeps the columns of what is compared, in its order; new ones are empty.
export function showColumns() {
  const shown = state.picked.filter(canAnswer);
  columns = new Map(shown.map(name => [name, columns.get(name) || new Column(name)]));
  $("answers").replaceChildren(...[...columns.values()].map(column => column.paint()));
  markAll();
}

export const canFollow = () => mode() === "chat" && [...columns.values()].some(column => column.turns.length);

// Returns the columns that a new question is for; a follow-up goes to those that have answered.
export function columnsFor(follow) {
  if (!follow) {
    columns = new Map();
    showColumns();
  }
  return [...columns.values()].filter(column => !follow || column.turns.length);
}

export function markAll() {
  const base = columns.get(BASE), comparable = base?.done && base.text && columns.size > 1;
  $("marking").hidden = !comparable;
  for (const column of columns.values()) if (column !== base && column.done) column.mark(comparable ? base.text : null);
}

class Column {
  constructor(name) {
    const title = titleOf(name);
    this.name = name;
    this.turns = [];      // the conversation as far as it was answered
    this.text = "";       // the last answer
    this.numbers = [];
    this.request = null;  // its path and its body
    this.done = false;
    this.digest = make("span", { className: "digest" });
    this.place = make("div", { className: "text" });
    this.figures = make("dl", { hidden: true });
    this.tools = make("div", { className: "tools", hidden: true }, this.tool("copy", () => this.text), this.tool("curl", () => curl(...this.request)));
    this.node = make("article", { className: "card answer" },
      make("header", {}, make("span", { className: "dot" }), make("h3", { textContent: title, title }), make("span", { className: "spring" }), this.digest),
      this.place, this.figures, this.tools);
    this.node.dataset.name = name;
    this.node.setAttribute("aria-label", title);
    this.identify(adapterOf(name));
  }

  tool(word, text) {
    const button = make("button", { type: "button", className: "plain", onclick: async () => {
      $("spoken").textContent = button.textContent = await copy(text()) ? say.copied : say.notCopied;
      setTimeout(() => { button.textContent = say[word]; }, 1500);
    } });
    button.dataset.say = word;
    return button;
  }

  paint() {
    this.node.style.setProperty("--hue", hueOf(this.name));
    for (const button of this.tools.children) button.textContent = say[button.dataset.say];
    this.show(this.numbers);
    return this.node;
  }

  identify(adapter) {
    Object.assign(this.digest, { textContent: adapter ? adapter.digest.slice(0, 12) : say.base, title: adapter?.digest || "" });
  }

  add(tag, className, textContent, role = null) {
    const node = make(tag, { className, textContent });
    if (role) node.setAttribute("role", role);
    this.figures.before(node);
    return node;
  }

  // Shows numbers under their words: [[word, value]].
  show(numbers) {
    this.figures.replaceChildren(...numbers.map(([word, value]) => make("div", {}, make("dt", { textContent: say[word] }), make("dd", { textContent: value }))));
    this.figures.hidden = !numbers.length;
  }

  // Marks the words that the base's answer lacks; without one, nothing is marked.
  mark(base) {
    if (!this.place.classList.contains("text")) return;
    const { parts, share } = base === null ? { parts: [{ text: this.text, same: true }] } : differences(this.text, base);
    const marked = $("marks").checked;
    this.place.replaceChildren(...parts.map(({ text, same }) => same || !marked ? text : make("mark", { textContent: text })));
    if (this.numbers.length) this.show(base === null ? this.numbers : [...this.numbers, ["same", `${(100 * share).toFixed(0)} %`]]);
  }

  // Asks, and shows the answer as it comes.
  async ask(signal, follow) {
    this.done = false;
    if (follow) this.continue($("prompt").value);
    this.text = "";
    this.place.classList.add("waiting");
    try {
      await (mode() === "classes" ? this.classify(signal) : this.write(signal));
    } catch (error) {
      if (error.name === "AbortError") this.add("p", "note", say.cut, "status");
      else this.add("p", "error", error.message === "Failed to fetch" ? say.away : error.message, "alert");
    }
    this.place.classList.remove("waiting");
    this.done = true;
    if (this.text && mode() === "chat") this.turns = [...this.request[1].messages, { role: "assistant", content: this.text }];
    this.tools.hidden = !this.text;
  }

  // Shows a further question, and with the first of them the one that began.
  continue(question) {
    const said = text => make("p", { className: "asked" }, make("b", { textContent: say.you }), text);
    if (!this.node.querySelector(".asked")) this.place.before(said(this.turns.find(turn => turn.role === "user").content));
    this.place = make("div", { className: "text" });
    this.figures.before(said(question), this.place);
  }

  opening() {
    const system = $("system").value.trim();
    return this.turns.length ? this.turns : system ? [{ role: "system", content: system }] : [];
  }

  body() {
    const content = $("prompt").value, seed = $("seed").value;
    const asked = mode() === "chat" ? { messages: [...this.opening(), { role: "user", content }] } : { prompt: content };
    return { model: titleOf(this.name), ...asked, temperature: Number($("temperature").value), max_tokens: Number($("most").value),
      ...(seed === "" ? {} : { seed: Number(seed) }), stream: true, stream_options: { include_usage: true, continuous_usage_stats: true } };
  }

  async write(signal) {
    const chat = mode() === "chat", begun = performance.now();
    let first = 0, early = 0, tokens = 0, reason = "";  // early: tokens of the first piece, whose time is not known
    const tell = () => {
      const now = performance.now();
      const speed = tokens > early && now > first ? ((tokens - early) * 1000 / (now - first)).toFixed(1) : "–";
      this.numbers = [["speed", speed], ["first", first ? seconds(first - begun) : "–"], ["tokens", tokens + (reason === "length" ? "…" : "")]];
      this.show(this.numbers);
      if (reason === "length") this.figures.querySelector("div:last-child dd").title = say.length;
    };
    this.request = [chat ? "v1/chat/completions" : "v1/completions", this.body()];
    const response = await post(...this.request, signal);
    const warning = response.headers.get("X-Loralab-Warning");
    if (warning) this.add("p", "warning", warning);
    for await (const event of events(response)) {
      if (event.error) throw new Error(event.error.message);
      if (event.adapter) this.identify(event.adapter);
      const choice = event.choices[0], more = choice && (chat ? choice.delta.content : choice.text);
      if (choice?.finish_reason) reason = choice.finish_reason;
      if (event.usage) tokens = event.usage.completion_tokens;
      if (more) {
        if (!first) [first, early] = [performance.now(), tokens];
        this.text += more;
        this.place.append(more);
      }
      if (first || reason) tell();
    }
    this.place.normalize();
  }

  async classify(signal) {
    const begun = performance.now(), input = isVision() ? { image: state.picture } : $("prompt").value;
    this.request = ["v1/classify", { model: titleOf(this.name), input }];
    const answer = await (await post(...this.request, signal)).json();
    const [found] = answer.data, ranked = Object.entries(found.probabilities);
    if (answer.adapter) this.identify(answer.adapter);
    const bars = make("div", { className: "bars" }, ...ranked.slice(0, 10).map(([label, chance]) => bar(label, chance)));
    this.place.replaceWith(bars);
    this.place = bars;
    this.text = ranked.map(([label, chance]) => `${label}\t${chance}`).join("\n");
    this.numbers = [["took", seconds(performance.now() - begun)], ["number", found.num_classes], ["tokens", answer.usage.prompt_tokens]];
    this.show(this.numbers);
  }
}

function bar(label, chance) {
  const fill = make("b");
  fill.style.width = `${100 * chance}%`;
  return make("div", { className: "bar" }, make("span", { textContent: label }), make("em", { textContent: `${(100 * chance).toFixed(1)} %` }), make("i", {}, fill));
}
