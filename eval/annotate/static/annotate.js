"use strict";
// Everything works without this script: it adds keys, keeps a form from being sent twice, and saves drafts.
const form = document.getElementById("vote");
const comment = document.getElementById("comment");
const saved = document.getElementById("saved");
const KEYS = { ArrowLeft: "1", ArrowRight: "2", ArrowUp: "3", ArrowDown: "4" };
// The second click of a double click would be a vote on the next item, unseen.
const UNSEEN_MILLISECONDS = 300;
let sent = false;
let waiting = 0;
setTimeout(() => { form.dataset.ready = ""; }, UNSEEN_MILLISECONDS);

document.addEventListener("keydown", (event) => {
  if (event.ctrlKey || event.altKey || event.metaKey || event.isComposing || event.repeat) return;
  const inText = event.target.closest("textarea, select, input:not([type=radio])");
  if (event.key === "Escape") {
    event.target.blur();
    return;
  }
  if (inText || (event.target.closest("input[type=radio]") && event.key in KEYS)) return;
  const key = KEYS[event.key] || event.key.toLowerCase();
  const button = key === "u"
    ? document.getElementById("undo")
    : [...document.querySelectorAll("button[data-key]")].find((one) => one.dataset.key === key);
  if (button) {
    event.preventDefault();
    button.click();
  } else if (key === "c") {
    event.preventDefault();
    comment.focus();
  }
});

document.addEventListener("submit", (event) => {
  const unseen = event.submitter && event.submitter.name === "choice" && !("ready" in form.dataset);
  if (sent || unseen) event.preventDefault();
  if (unseen) return;
  sent = true;
  clearTimeout(waiting);
});
// A page that the browser brings back from its history may be sent again; the server knows its nonce.
window.addEventListener("pageshow", () => { sent = false; });

async function save() {
  if (sent) return;
  const fields = new URLSearchParams(new FormData(form));
  try {
    const answer = await fetch("/draft", { method: "POST", body: fields, headers: { Accept: "application/json" } });
    saved.textContent = answer.status === 204 ? "Draft saved" : "The draft could not be saved";
  } catch {
    saved.textContent = "The draft could not be saved";
  }
}

form.addEventListener("input", (event) => {
  if (event.target.id === "reason") return;
  saved.textContent = "";
  clearTimeout(waiting);
  waiting = setTimeout(save, 700);
});
