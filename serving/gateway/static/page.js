// The page: one conversation in each mode, an answer at a time, and votes. Text is only ever set as text.

import { ApiFailure, answer, settings, vote } from "/api.js";

const KEY = "posttrain-key";
const SLIDERS = ["temperature", "top_p", "top_k", "max_tokens"];
const CHOICES = [
  ["a", "A is better"],
  ["b", "B is better"],
  ["tie", "Tie"],
  ["both_bad", "Both bad"],
];
const WELCOME = {
  chat: ["Talk to a model", "Answers appear as they are written. Change the sampling at any time."],
  compare: [
    "Compare two versions",
    "Both answer the same message. Vote, and the better answer goes on as the conversation.",
  ],
};
const byId = (id) => document.getElementById(id);
const needsKey = document.documentElement.dataset.authentication !== "none";
const conversations = { chat: fresh(), compare: fresh() };
let mode = "chat";
let known = null; // What GET /v1/page said.
let key = "";
let running = null; // The AbortController of the answer that is being written.
let ballot = null; // The vote that can be given now.

function fresh() {
  return { messages: [], node: make("div", "rounds") };
}

function make(tag, className = "", ...content) {
  const node = document.createElement(tag);
  if (className) node.className = className;
  node.append(...content);
  return node;
}

function button(text, className, onClick) {
  const node = make("button", className, text);
  node.type = "button";
  node.addEventListener("click", onClick);
  return node;
}

function say(text) {
  byId("status").textContent = text;
}

function alarm(text) {
  byId("alert").textContent = text;
  byId("alert").hidden = !text;
}

// ---- Key and models

async function connect(typed) {
  byId("use-key").disabled = true;
  try {
    known = await settings(typed);
    key = typed;
    store(key);
    alarm("");
    showModels();
    byId("settings").classList.remove("open");
    byId("toggle").setAttribute("aria-expanded", "false");
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

function store(value) {
  try {
    if (value) sessionStorage.setItem(KEY, value);
    else sessionStorage.removeItem(KEY);
  } catch {
    byId("key-note").textContent = "This browser keeps nothing: the key is asked for again after a reload.";
  }
}

function stored() {
  try {
    return sessionStorage.getItem(KEY) ?? "";
  } catch {
    return "";
  }
}

function showModels() {
  const versions = known.models.flatMap((model) => model.versions.map((version) => version.id));
  const all = known.models.flatMap((model) => [model.id, ...model.versions.map((version) => version.id)]);
  fill(byId("model"), all, 0);
  fill(byId("version-a"), versions, 0);
  fill(byId("version-b"), versions, Math.min(1, versions.length - 1));
  limitTokens();
}

function fill(select, names, chosen) {
  const before = select.value;
  select.replaceChildren(...names.map((name) => new Option(name, name)));
  select.value = names.includes(before) ? before : (names[chosen] ?? "");
  select.disabled = names.length === 0;
}

function limitTokens() {
  if (!known) return;
  const limits = new Map(
    known.models.flatMap((model) => [model, ...model.versions].map((one) => [one.id, one.max_tokens])),
  );
  const names = mode === "chat" ? ["model"] : ["version-a", "version-b"];
  const slider = byId("max_tokens");
  slider.max = Math.min(...names.map((name) => limits.get(byId(name).value) ?? 1024));
  showSliders();
}

function showSliders() {
  for (const name of SLIDERS) {
    const value = byId(name).value;
    const off = name === "top_k" && value === "0";
    document.querySelector(`output[for="${name}"]`).value = off ? "off" : value;
  }
}

function sampling() {
  const chosen = Object.fromEntries(SLIDERS.map((name) => [name, Number(byId(name).value)]));
  if (chosen.top_k === 0) delete chosen.top_k;
  if (byId("seed").value !== "") chosen.seed = Number(byId("seed").value);
  return chosen;
}

// ---- What is shown when

function show() {
  const comparing = mode === "compare";
  const conversation = conversations[mode];
  const ready = known !== null && known.models.length > 0;
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
  const votes = ready && comparing && !known.votes.kept ? ` No votes: ${known.votes.reason}.` : "";
  byId("welcome-text").textContent = known && !ready ? "This key may use no model." : text + votes;
  byId("hint").textContent = ballot ? "Keys 1 to 4 vote" : "Enter sends · Shift+Enter breaks the line · Esc stops";
}

function change(next) {
  if (running || next === mode) return;
  mode = next;
  ballot = null;
  byId("log").querySelector(".rounds")?.remove();
  byId("log").append(conversations[mode].node);
  limitTokens();
  show();
}

function restart() {
  running?.abort();
  ballot = null;
  conversations[mode].node.remove();
  conversations[mode] = fresh();
  byId("log").append(conversations[mode].node);
  alarm("");
  show();
  byId("message").focus();
  say("New conversation");
}

function follow(work) {
  const log = byId("log");
  const atEnd = log.scrollHeight - log.scrollTop - log.clientHeight < 60;
  work();
  if (atEnd) log.scrollTop = log.scrollHeight;
}

// ---- Asking

async function send() {
  const text = byId("message").value.trim();
  if (!text || running || !known) return;
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
    node: make("div", "round", make("article", "turn user", make("p", "text", text))),
  };
  byId("message").value = "";
  grow();
  alarm("");
  ballot?.close("Not voted on, and not part of the conversation.");
  ballot = null;
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

class Pane {
  constructor(title, tag = "") {
    this.text = "";
    this.failed = this.stopped = false;
    this.title = make("span", "name", title);
    this.words = make("p", "text");
    this.note = make("span", "note");
    this.copy = button("Copy", "quiet small", () => copy(this.text, this.copy));
    this.copy.hidden = true;
    const head = make("header", "", ...(tag ? [make("span", "tag", tag)] : []), this.title);
    this.node = make("article", "turn answer writing", head, this.words, make("footer", "", this.note, this.copy));
    this.node.setAttribute("aria-busy", "true");
  }

  async ask(model, round, signal) {
    const started = performance.now();
    const written = document.createTextNode("");
    this.words.append(written);
    const request = { model, messages: round.messages, ...round.sampling };
    try {
      const end = await answer(key, request, signal, (piece) => {
        this.text += piece;
        follow(() => written.appendData(piece));
      });
      const seconds = ((performance.now() - started) / 1000).toFixed(1);
      this.facts = [`${end.usage.completion_tokens} tokens`, `${seconds} s`];
      if (end.reason === "length") this.facts.push("cut at max tokens");
      this.version = end.version;
      this.note.textContent = [...(model.includes("@") ? [] : [end.version]), ...this.facts].join(" · ");
    } catch (error) {
      this.broke(error);
    }
    this.node.classList.remove("writing");
    this.node.removeAttribute("aria-busy");
    this.copy.hidden = !this.text;
  }

  broke(error) {
    if (error.name === "AbortError") {
      this.stopped = true;
      this.note.textContent = "Stopped";
      return;
    }
    this.failed = true;
    this.note.textContent = "Not part of the conversation.";
    follow(() => this.words.after(make("p", "alert inline", error.message)));
    say(error.message);
    fail(error);
  }
}

async function copy(text, from) {
  let copied = true;
  try {
    await navigator.clipboard.writeText(text);
  } catch {
    // Without HTTPS there is no clipboard object.
    const box = make("textarea", "hidden-label");
    box.value = text;
    document.body.append(box);
    box.select();
    copied = document.execCommand("copy");
    box.remove();
  }
  from.textContent = copied ? "Copied" : "Not allowed";
  say(from.textContent);
  setTimeout(() => (from.textContent = "Copy"), 1500);
}

// ---- Comparing

async function compare(round, signal) {
  let versions = [byId("version-a").value, byId("version-b").value];
  const blind = byId("blind").checked;
  if (blind && crypto.getRandomValues(new Uint8Array(1))[0] < 128) versions = versions.reverse();
  const panes = versions.map((name, index) => new Pane(blind ? "hidden" : name, "AB"[index]));
  follow(() => round.node.append(make("div", "pair", ...panes.map((pane) => pane.node))));
  if (blind) panes.forEach((pane) => pane.note.classList.add("veiled"));
  await Promise.all(panes.map((pane, index) => pane.ask(versions[index], round, signal)));
  if (panes.some((pane) => pane.failed || pane.stopped)) {
    reveal(panes, versions);
    giveBack(round);
    return;
  }
  if (!known.votes.kept) {
    reveal(panes, versions);
    follow(() => round.node.append(make("p", "note", `No vote: ${known.votes.reason}.`)));
    say("Both answers complete");
    return;
  }
  ballot = new Ballot(round, panes, versions);
  follow(() => round.node.append(ballot.node));
  ballot.node.focus({ preventScroll: true });
  say("Both answers complete. Vote with the keys 1 to 4.");
}

function reveal(panes, versions) {
  panes.forEach((pane, index) => {
    pane.title.textContent = versions[index];
    pane.note.classList.remove("veiled");
  });
}

class Ballot {
  constructor(round, panes, versions) {
    Object.assign(this, { round, panes, versions });
    this.buttons = CHOICES.map(([choice, text], index) => {
      const node = button(text, "", () => this.cast(choice));
      node.append(make("kbd", "", String(index + 1)));
      node.setAttribute("aria-keyshortcuts", String(index + 1));
      node.dataset.choice = choice;
      return node;
    });
    this.comment = make("input", "");
    this.comment.placeholder = "Comment (optional)";
    this.comment.setAttribute("aria-label", "Comment");
    this.comment.maxLength = known.limits.comment_characters;
    this.result = make("p", "note");
    this.node = make("div", "ballot", make("div", "choices", ...this.buttons), this.comment, this.result);
    this.node.setAttribute("role", "group");
    this.node.setAttribute("aria-label", "Your vote");
    this.node.tabIndex = -1;
  }

  press(digit) {
    this.buttons[digit - 1]?.click();
  }

  async cast(choice) {
    const { round, panes, versions } = this;
    this.enable(false);
    const record = {
      model: versions[0].split("@")[0],
      messages: round.messages,
      version_a: versions[0],
      version_b: versions[1],
      answer_a: panes[0].text,
      answer_b: panes[1].text,
      choice,
      sampling: round.sampling,
    };
    if (this.comment.value.trim()) record.comment = this.comment.value.trim();
    try {
      await vote(key, record);
    } catch (error) {
      this.enable(true);
      this.result.textContent = "Not saved. Vote again.";
      fail(error);
      return;
    }
    this.finish(choice);
  }

  finish(choice) {
    const { round, panes, versions } = this;
    const winner = { a: 0, b: 1, tie: 0 }[choice];
    alarm("");
    reveal(panes, versions);
    this.buttons.find((node) => node.dataset.choice === choice).classList.add("chosen");
    if (winner === undefined) {
      round.node.classList.add("dropped");
    } else {
      round.conversation.messages.push(round.asked, { role: "assistant", content: panes[winner].text });
      if (choice !== "tie") panes[winner].node.classList.add("winner");
    }
    const goes = winner === undefined ? "without this message" : `with answer ${"AB"[winner]}`;
    this.close(`Vote saved. The conversation goes on ${goes}.`);
    say(`Vote saved. A was ${versions[0]}, B was ${versions[1]}.`);
    byId("message").focus();
  }

  close(text) {
    this.enable(false);
    reveal(this.panes, this.versions);
    this.comment.hidden = true;
    follow(() => (this.result.textContent = text));
    if (ballot === this) ballot = null;
    show();
  }

  enable(on) {
    for (const node of [...this.buttons, this.comment]) node.disabled = !on;
  }
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
  for (const id of ["model", "version-a", "version-b"]) byId(id).addEventListener("change", limitTokens);
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
