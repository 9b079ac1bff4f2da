// What the page knows, and small helpers around it.

export const MOST = 4;   // adapters that are compared
export const BASE = "";  // the key of the base among what is compared

// store: as /store tells it; picked: what is compared, in order; under: columns that are being answered
export const state = { store: null, picked: [], under: new Map(), picture: null };

export const $ = id => document.getElementById(id);

export function make(tag, properties = {}, ...inside) {
  const node = Object.assign(document.createElement(tag), properties);
  node.append(...inside);
  return node;
}

export const mode = () => document.querySelector("input[name=mode]:checked").value;
export const isVision = () => state.store.base.kind.startsWith("image");
export const writes = () => state.store.base.kind === "causal-lm";
export const adapterOf = name => state.store.adapters.find(adapter => adapter.name === name);
export const titleOf = name => name === BASE ? state.store.base.name : name;
export const hueOf = name => `var(--hue-${name === BASE ? 0 : 1 + state.picked.filter(n => n !== BASE).indexOf(name)})`;

// Only what has labels can classify; a base that writes has none.
export const canAnswer = name => mode() !== "classes" || !writes() || (name !== BASE && adapterOf(name).labels.length > 0);

export const bytes = n => n >= 1e9 ? `${(n / 1e9).toFixed(1)} GB` : n >= 1e6 ? `${(n / 1e6).toFixed(1)} MB` : `${(n / 1e3).toFixed(0)} KB`;
export const seconds = ms => ms < 1000 ? `${ms.toFixed(0)} ms` : `${(ms / 1000).toFixed(2)} s`;

// Copies a text; returns whether the browser let it. Pages that are not served over TLS or by this machine have no clipboard.
export async function copy(text) {
  try {
    await navigator.clipboard.writeText(text);
    return true;
  } catch {
    const field = make("textarea", { value: text, className: "sr" }), before = document.activeElement;
    document.body.append(field);
    field.select();
    const done = document.execCommand("copy");
    field.remove();
    before?.focus();
    return done;
  }
}
