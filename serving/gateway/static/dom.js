// Making nodes and saying things. Text is only ever set as text, so nothing a model writes is markup.

export const byId = (id) => document.getElementById(id);

export function make(tag, className = "", ...content) {
  const node = document.createElement(tag);
  if (className) node.className = className;
  node.append(...content);
  return node;
}

export function button(text, className, onClick) {
  const node = make("button", className, text);
  node.type = "button";
  node.addEventListener("click", onClick);
  return node;
}

export function say(text) {
  byId("status").textContent = text;
}

export function alarm(text) {
  byId("alert").textContent = text;
  byId("alert").hidden = !text;
}

export function follow(work) {
  const log = byId("log");
  const atEnd = log.scrollHeight - log.scrollTop - log.clientHeight < 60;
  work();
  if (atEnd) log.scrollTop = log.scrollHeight;
}

export async function copy(text, from) {
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
