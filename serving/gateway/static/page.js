// The page: one conversation in each mode, settings, and what can be done when.

import { ApiFailure, describe, sentence } from "/api.js";
import { alarm, byId, follow, make, say } from "/dom.js";
import { Ballot, Pane, reveal } from "/panes.js";
import { SLIDERS, limitTokens, sampling, showModels, showSliders, store, stored } from "/settings.js";

const WELCOME = {
  chat: ["Talk to a model", "Answers appear as they are written. Change the sampling at any time."],
  compare: [
    "Compare two versions",
    "Both answer the same message. Vote, and the better answer goes on as the conversation.",
  ],
};
const needsKey = document.documentElement.dataset.authentication !== "none";
const conversations = { chat: fresh(), compare: fresh() };
let mode = "chat";
let known = null; // What GET /v1/page said.
let key = "";
let running = null; // The AbortController of the answer that is being written.

function fresh() {
  return { messages: [], ballot: null, node: make("div", "rounds") };
}

// ---- Key and models

async function connect(typed) {
  byId("use-key").disabled = true;
  try {
    known = await describe(typed);
    key = typed;
    store(key);
    alarm("");
    showModels(known);
    byId("settings").classList.remove("open");
    byId("toggle").setAttribute("aria-expanded", "false");
    show();
    byId("message").focus();
    say("Connected");
  } catch (error) {
    known = null;
    fail(error);
  } finally {
    byId("use-key").disabled = false;
    show();
  }
}

function fail(error) {
  if (!(error instanceof ApiFailure)) throw error;
  if (error.status === 401) {
    store("");
    openSettings();
    byId("key").focus();
    alarm(byId("key").value ? "The API key is not valid." : "An API key is needed.");
  } else {
    alarm(error.message);
  }
}

// ---- What is shown when

function show() {
  const comparing = mode === "compare";
  const conversation = conversations[mode];
  const ready = known !== null && known.models.length > 0;
  if (ready) limitTokens(known, mode);
  byId("mode-chat").setAttribute("aria-pressed", String(!comparing));
  byId("mode-compare").setAttribute("aria-pressed", String(comparing));
  byId("chat-models").hidden = comparing;
  byId("compare-models").hidden = !comparing;
  byId("message").disabled = byId("send").disabled = !ready;
  byId("send").hidden = running !== null;
  byId("stop").hidden = running === null;
  byId("welcome").hidden = conversation.node.childElementCount > 0;
  const [title, text] = ready ? WELCOME[mode] : ["Connect first", "Enter an API key of this gateway."];
  byId("welcome-title").textContent = title;
  const votes = ready && comparing && !known.votes.kept ? ` ${sentence(known.votes.reason)}` : "";
  byId("welcome-text").textContent = known && !ready ? "This key may use no model." : text + votes;
  const keys = "Enter sends · Shift+Enter breaks the line · Esc stops";
  byId("hint").textContent = conversation.ballot ? "Keys 1 to 4 vote" : keys;
}

function change(next) {
  if (running || next === mode) return;
  mode = next;
  byId("log").querySelector(".rounds")?.remove();
  byId("log").append(conversations[mode].node);
  show();
}

function restart() {
  running?.abort();
  conversations[mode].node.remove();
  conversations[mode] = fresh();
  byId("log").append(conversations[mode].node);
  alarm("");
  show();
  byId("message").focus();
  say("New conversation");
}

// ---- Asking

async function send() {
  const text = byId("message").value.trim();
  if (!text || running || !known || conversations[mode].ballot?.casting) return;
  if (!byId("seed").validity.valid) {
    alarm("The seed is a whole number from 0 on, or empty.");
    return;
  }
  const conversation = conversations[mode];
  const asked = { role: "user", content: text };
  const system = byId("system").value.trim();
  const before = system ? [{ role: "system", content: system }] : [];
  const round = {
    conversation,
    asked,
    text,
    sampling: sampling(),
    messages: [...before, ...conversation.messages, asked],
    key,
    limits: known.limits,
    refused: (error) => error.status === 401 && fail(error),
    node: make("div", "round", make("article", "turn user", make("p", "text", text))),
  };
  byId("message").value = "";
  grow();
  alarm("");
  conversation.ballot?.close("Not voted on, and not part of the conversation.");
  conversation.node.append(round.node);
  byId("log").scrollTop = byId("log").scrollHeight;
  running = new AbortController();
  const signal = running.signal;
  show();
  say("Answering");
  try {
    await (mode === "chat" ? chat(round, signal) : compare(round, signal));
  } finally {
    if (running?.signal === signal) running = null;
    show();
  }
}

async function chat(round, signal) {
  const pane = new Pane(byId("model").value);
  follow(() => round.node.append(pane.node));
  await pane.ask(byId("model").value, round, signal);
  if (pane.failed || !pane.text) {
    giveBack(round);
    return;
  }
  round.conversation.messages.push(round.asked, { role: "assistant", content: pane.text });
  say(pane.stopped ? "Stopped" : "Answer complete");
}

function giveBack(round) {
  round.node.classList.add("dropped");
  if (!byId("message").value && round.conversation === conversations[mode]) byId("message").value = round.text;
}

// ---- Comparing

async function compare(round, signal) {
  let versions = [byId("version-a").value, byId("version-b").value];
  const blind = byId("blind").checked;
  if (blind && crypto.getRandomValues(new Uint8Array(1))[0] < 128) versions = versions.reverse();
  const panes = versions.map((name, index) => new Pane(blind ? "Version hidden" : name, "AB"[index]));
  follow(() => round.node.append(make("div", "pair", ...panes.map((pane) => pane.node))));
  if (blind) panes.forEach((pane) => pane.note.classList.add("veiled"));
  const ask = (index) => panes[index].ask(versions[index], round, signal);
  // A key that may only ask once at a time gets its answers one after the other.
  if (known.limits.concurrent === 1) for (const index of panes.keys()) await ask(index);
  else await Promise.all([ask(0), ask(1)]);
  if (panes.some((pane) => pane.failed || pane.stopped)) {
    reveal(panes, versions);
    giveBack(round);
    return;
  }
  if (!known.votes.kept) {
    reveal(panes, versions);
    follow(() => round.node.append(make("p", "note", sentence(known.votes.reason))));
    say("Both answers complete");
    return;
  }
  const ballot = new Ballot(round, panes, versions, () => {
    round.conversation.ballot = null;
    show();
    byId("message").focus();
  });
  round.conversation.ballot = ballot;
  follow(() => round.node.append(ballot.node));
  ballot.node.focus({ preventScroll: true });
  say("Both answers complete. Vote with the keys 1 to 4.");
}

// ---- Events

function openSettings() {
  byId("settings").classList.add("open");
  byId("toggle").setAttribute("aria-expanded", "true");
}

function grow() {
  const box = byId("message");
  box.style.height = "auto";
  box.style.height = `${Math.min(box.scrollHeight + 2, 200)}px`;
}

function pressed(event) {
  const typing = event.target.matches("input:not([type=range]):not([type=checkbox]), textarea, select");
  const { ballot } = conversations[mode];
  if (event.key === "Escape") running?.abort();
  else if (ballot && !typing && /^[1-4]$/.test(event.key) && !(event.ctrlKey || event.altKey || event.metaKey)) {
    event.preventDefault();
    ballot.press(Number(event.key));
  }
}

function start() {
  byId("log").append(conversations[mode].node);
  byId("key-form").addEventListener("submit", (event) => {
    event.preventDefault();
    connect(byId("key").value.trim());
  });
  byId("composer").addEventListener("submit", (event) => {
    event.preventDefault();
    send();
  });
  byId("message").addEventListener("keydown", (event) => {
    if (event.key !== "Enter" || event.shiftKey || event.isComposing) return;
    event.preventDefault();
    send();
  });
  byId("message").addEventListener("input", grow);
  byId("stop").addEventListener("click", () => running?.abort());
  byId("new").addEventListener("click", restart);
  byId("mode-chat").addEventListener("click", () => change("chat"));
  byId("mode-compare").addEventListener("click", () => change("compare"));
  byId("toggle").addEventListener("click", () => {
    const open = byId("settings").classList.toggle("open");
    byId("toggle").setAttribute("aria-expanded", String(open));
  });
  for (const id of ["model", "version-a", "version-b"]) byId(id).addEventListener("change", show);
  for (const id of SLIDERS) byId(id).addEventListener("input", showSliders);
  document.addEventListener("keydown", pressed);
  if (!isSecureContext) {
    byId("key-note").textContent = "This page came over plain HTTP: others on the way can read the key. Use HTTPS.";
    byId("key-note").classList.add("warning");
  }
  showSliders();
  show();
  byId("key-form").hidden = !needsKey;
  byId("key").value = stored();
  if (!needsKey || stored()) connect(stored());
  else {
    openSettings();
    byId("key").focus();
  }
}

start();
