// The page: what is compared, what is asked, and the list of adapters.

import { canFollow, columnsFor, markAll, showColumns } from "./answers.js";
import { get, hasKey, useKey } from "./server.js";
import { $, BASE, MOST, adapterOf, bytes, canAnswer, hueOf, isVision, make, mode, state, titleOf, writes } from "./state.js";
import { say, switchLanguage, tongue } from "./words.js";

const SHOWN = 200;  // adapters of the list
const wanted = new URLSearchParams(location.search);
const examples = new Map();  // digest -> promise of an example, or of null
let seen = "", timer = 0, example = null;

function speak() {
  document.documentElement.lang = tongue();
  for (const node of document.querySelectorAll("[data-say]")) node.textContent = say[node.dataset.say];
  Object.assign($("language"), { textContent: say.language, lang: tongue() === "en" ? "zh-TW" : "en" });
  for (const [id, word] of [["filter", "filter"], ["more", "more"]]) $(id).setAttribute("aria-label", say[word]);
  $("filter").placeholder = say.filter;
  $("seed").placeholder = say.anySeed;
  setMode();
}

function setMode() {
  const now = mode();
  $("promptLabel").textContent = { chat: say.promptChat, text: say.promptText, classes: say.promptClasses }[now];
  for (const node of document.querySelectorAll("[data-in]")) node.hidden = !node.dataset.in.split(" ").includes(now);
  if (state.store) show();
}

function allowRun() {
  const ready = state.store && (isVision() ? state.picture : $("prompt").value.trim());
  $("run").disabled = !ready || !state.picked.some(canAnswer);
  $("follow").disabled = !ready || !canFollow();
  $("example").hidden = !example || isVision() || !!$("prompt").value;
}

// -- the store ------------------------------------------------------------------------------------

async function look() {
  clearTimeout(timer);
  try {
    const response = await get("store");
    $("locked").hidden = response.status !== 401;
    if (response.status === 401) {
      trouble(hasKey() ? say.wrongKey : "");
      return;
    }
    if (!response.ok) throw new Error();
    const first = state.store === null, store = state.store = await response.json();
    trouble(store.engine.healthy ? "" : say.sick);
    if (first) begin();
    const kept = JSON.stringify([store.base, store.adapters]);
    if (kept !== seen) show();
    seen = kept;
    $("state").hidden = false;
    $("running").textContent = store.engine.running;
    $("waiting").textContent = store.engine.waiting;
    $("held").textContent = new Set(store.adapters.filter(a => a.loaded).map(a => a.digest)).size;
  } catch {
    trouble(say.away);
  }
  timer = setTimeout(() => document.hidden ? document.addEventListener("visibilitychange", look, { once: true }) : look(), state.under.size ? 1000 : 4000);
}

function trouble(text) {
  $("trouble").textContent = text;
  $("trouble").hidden = !text;
}

function begin() {
  const { base, adapters } = state.store, known = adapters.map(a => a.name);
  $("base").textContent = `${base.name} · ${base.kind}`;
  document.title = `loralab · ${base.name}`;
  if (!writes()) {
    $("classes").checked = true;
    $("modes").hidden = true;
    $("words").hidden = isVision();
    $("picture").hidden = !isVision();
  }
  const models = wanted.get("models");
  state.picked = models !== null ? models.split(",").map(n => n === base.name ? BASE : n).filter(n => n === BASE || known.includes(n))
    : [...(writes() ? [BASE] : []), ...known.slice(0, writes() ? 1 : 2)];
  for (const [field, id] of [["prompt", "prompt"], ["system", "system"], ["max_tokens", "most"], ["seed", "seed"]]) {
    if (wanted.has(field)) $(id).value = wanted.get(field);
  }
  $("instructed").open = !!$("system").value;
  if (wanted.has("mode") && writes() && $(wanted.get("mode"))?.name === "mode") $(wanted.get("mode")).checked = true;
  setMode();
  if (wanted.has("autorun")) setTimeout(run);
}

function show() {
  const { adapters } = state.store, names = adapters.map(a => a.name);
  state.picked = state.picked.filter(name => name === BASE || names.includes(name));
  const hidden = !adapters.some(a => a.labels.length);
  if (writes()) for (const node of [$("classes"), document.querySelector("label[for=classes]")]) node.hidden = hidden;
  showPicked(adapters);
  showShelf(adapters);
  if (!state.under.size) showColumns();
  offerExample();
}

function showPicked(adapters) {
  $("chips").replaceChildren(...[BASE, ...state.picked.filter(n => n !== BASE)].map(chip));
  const idle = state.picked.filter(name => !canAnswer(name)).map(titleOf);
  $("hint").textContent = !idle.length ? say.hint : idle.length === state.picked.length ? say.noLabels : `${idle.join(", ")}: ${say.unlabelled}`;
  const free = adapters.filter(a => !state.picked.includes(a.name) && canAnswer(a.name));
  $("more").hidden = !free.length || state.picked.filter(n => n !== BASE).length >= MOST;
  const option = a => make("option", { value: a.name, textContent: a.task ? `${a.name} · ${a.task}` : a.name });
  $("more").replaceChildren(make("option", { value: "", textContent: say.more }), ...free.slice(0, SHOWN).map(option));
}

function showShelf(adapters) {
  const filter = $("filter").value.trim().toLowerCase();
  const found = adapters.filter(a => !filter || [a.name, a.task, a.method, a.digest].some(v => (v || "").toLowerCase().includes(filter)));
  $("rows").replaceChildren(...found.slice(0, SHOWN).map(line));
  $("count").textContent = say.shown(found.length, adapters.length) + (found.length > SHOWN ? ` · ${say.first200}` : "");
  $("table").hidden = !found.length;
  $("none").hidden = !!found.length;
  $("none").textContent = adapters.length ? say.nothing : say.noneYet;
}

function chip(name) {
  const on = state.picked.includes(name), idle = on && !canAnswer(name);
  const title = name === BASE ? `${state.store.base.name} (${say.base})` : name;
  const node = make("button", { type: "button", className: idle ? "chip idle" : "chip", title: idle ? say.unlabelled : on ? say.remove : say.add, onclick: () => toggle(name) },
    make("span", { className: "dot" }), make("span", { textContent: title }));
  if (name !== BASE) node.append(make("span", { textContent: "×", ariaHidden: "true" }));
  node.setAttribute("aria-pressed", on);
  node.style.setProperty("--hue", hueOf(name));
  return node;
}

function line(adapter) {
  const on = state.picked.includes(adapter.name);
  const button = make("button", { type: "button", onclick: () => toggle(adapter.name), title: on ? say.remove : say.add }, adapter.name);
  button.setAttribute("aria-pressed", on);
  if (on) button.prepend(make("span", { className: "dot" }));
  button.style.setProperty("--hue", on ? hueOf(adapter.name) : "var(--line)");
  const { metric, value: score } = adapter.score || {};
  const method = adapter.method + (adapter.rank ? ` r=${adapter.rank}` : "");
  const held = [adapter.loaded ? say.loaded : "", adapter.pinned ? say.pinned : ""].filter(Boolean).join(", ");
  const cell = (text, className = "", title = "") => make("td", { className, title, textContent: text ?? "" });
  return make("tr", {}, make("td", {}, button), cell(method, "tag"), cell(bytes(adapter.bytes), "right"), cell(adapter.task),
    cell(score === undefined ? "" : `${metric} ${Math.abs(score) < 1000 ? score.toFixed(3) : score.toPrecision(4)}`, "right"),
    cell(held, "yes"), cell(adapter.digest.slice(0, 12), "digest", adapter.digest));
}

function toggle(name) {
  const { picked } = state;
  if (picked.includes(name)) state.picked = picked.filter(n => n !== name);
  else if (name === BASE) state.picked = [BASE, ...picked];
  else if (picked.filter(n => n !== BASE).length < MOST) state.picked = [...picked, name];
  else return trouble(say.full);
  trouble("");
  const before = document.activeElement?.textContent;
  show();
  [...document.querySelectorAll(".chip, td button")].find(b => b.textContent === before)?.focus();
}

// -- an example of what the first adapter was trained on --------------------------------------------

async function offerExample() {
  const asked = state.picked;
  for (const name of asked.filter(n => n !== BASE && canAnswer(n))) {
    const { digest } = adapterOf(name);
    if (!examples.has(digest)) examples.set(digest, fetchExample(name));
    const found = await examples.get(digest);
    if (asked !== state.picked) return;  // others are compared by now
    if (found && adapterOf(name)) return showExample(found, (adapterOf(name).task || name).split(/[\\/]/).at(-1));
  }
  showExample(null, "");
}

async function fetchExample(name) {
  try {
    const response = await get(`page/example?model=${encodeURIComponent(name)}`);
    return response.ok ? (await response.json()).example : null;
  } catch {
    return null;
  }
}

function showExample(found, source) {
  example = found;
  $("exampleOf").textContent = found ? say.exampleOf(source) : "";
  $("exampleText").textContent = found ? found.text : "";
  allowRun();
}

function takeExample() {
  $("prompt").value = example.text;
  if (writes()) $(example.mode).checked = true;
  setMode();
  $("prompt").focus();
}

// -- asking ---------------------------------------------------------------------------------------

async function run(follow = false) {
  if (!state.store || !state.picked.some(canAnswer)) return;
  if (isVision() && !state.picture) return trouble(say.choose);
  stop();
  const turn = state.under = new Map(columnsFor(follow).map(column => [column, new AbortController()]));
  $("stop").disabled = false;
  scrollToAnswers();
  look();
  const asked = [...turn].map(([column, control]) => column.ask(control.signal, follow));
  if (follow) $("prompt").value = "";
  allowRun();
  await Promise.all(asked);
  if (state.under !== turn) return;  // another run has begun
  state.under = new Map();
  $("stop").disabled = true;
  $("spoken").textContent = say.finished;
  show();
  look();
}

function stop() {
  for (const control of state.under.values()) control.abort();
}

// On a small screen the answers are out of sight.
function scrollToAnswers() {
  const title = $("answersTitle");
  if (title.getBoundingClientRect().top < innerHeight * 0.6) return;
  const calm = matchMedia("(prefers-reduced-motion: reduce)").matches;
  title.scrollIntoView({ block: "start", behavior: calm ? "auto" : "smooth" });
}

function readPicture() {
  const [file] = $("file").files, reader = new FileReader();
  if (!file) return;
  reader.onload = () => {
    state.picture = reader.result;
    Object.assign($("preview"), { src: state.picture, alt: file.name, hidden: false });
    allowRun();
  };
  reader.readAsDataURL(file);
}

$("ask").addEventListener("submit", event => { event.preventDefault(); if (!$("run").disabled) run(); });
$("follow").addEventListener("click", () => run(true));
$("stop").addEventListener("click", stop);
$("filter").addEventListener("input", () => state.store && showShelf(state.store.adapters));
$("more").addEventListener("change", () => { if ($("more").value) toggle($("more").value); });
$("modes").addEventListener("change", setMode);
$("marks").addEventListener("change", markAll);
$("useExample").addEventListener("click", takeExample);
$("prompt").addEventListener("input", allowRun);
$("prompt").addEventListener("keydown", event => {
  if (event.key === "Enter" && (event.ctrlKey || event.metaKey)) { event.preventDefault(); $("ask").requestSubmit(); }
});
$("language").addEventListener("click", () => { switchLanguage(); speak(); });
$("unlock").addEventListener("submit", event => {
  event.preventDefault();
  useKey($("key").value.trim());
  look();
});
$("file").addEventListener("change", readPicture);
speak();
look();
