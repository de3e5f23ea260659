// The column of settings: the key's place, models, and sampling.

import { byId } from "/dom.js";

const KEY = "posttrain-key";
export const SLIDERS = ["temperature", "top_p", "top_k", "max_tokens"];
const OFF = { top_k: "off", max_tokens: "no limit" };

export function store(value) {
  try {
    if (value) sessionStorage.setItem(KEY, value);
    else sessionStorage.removeItem(KEY);
  } catch {
    byId("key-note").textContent = "This browser keeps nothing: the key is asked for again after a reload.";
  }
}

export function stored() {
  try {
    return sessionStorage.getItem(KEY) ?? "";
  } catch {
    return "";
  }
}

export function showModels(known) {
  const versions = known.models.flatMap((model) => model.versions.map((version) => version.id));
  const all = known.models.flatMap((model) => [model.id, ...model.versions.map((version) => version.id)]);
  fill(byId("model"), all, 0);
  fill(byId("version-a"), versions, 0);
  fill(byId("version-b"), versions, Math.min(1, versions.length - 1));
}

function fill(select, names, chosen) {
  const before = select.value;
  select.replaceChildren(...names.map((name) => new Option(name, name)));
  select.value = names.includes(before) ? before : (names[chosen] ?? "");
  select.disabled = names.length === 0;
}

// The most tokens that every chosen version may answer with.
export function limitTokens(known, mode) {
  const limits = new Map(
    known.models.flatMap((model) => [model, ...model.versions].map((one) => [one.id, one.max_tokens])),
  );
  const names = mode === "chat" ? ["model"] : ["version-a", "version-b"];
  const slider = byId("max_tokens");
  slider.max = Math.min(...names.map((name) => limits.get(byId(name).value) ?? 1024));
  showSliders();
}

export function showSliders() {
  for (const name of SLIDERS) {
    const { value } = byId(name);
    document.querySelector(`output[for="${name}"]`).value = isOff(name) ? OFF[name] : value;
  }
}

function isOff(name) {
  const { value, max } = byId(name);
  return (name === "top_k" && value === "0") || (name === "max_tokens" && value === max);
}

// What the sliders say. A limit at its end is none: the answer may take all the room there is.
export function sampling() {
  const given = SLIDERS.filter((name) => !isOff(name));
  const chosen = Object.fromEntries(given.map((name) => [name, Number(byId(name).value)]));
  if (byId("seed").value !== "") chosen.seed = Number(byId("seed").value);
  return chosen;
}
