// One answer as it is written (Pane), and the vote between two of them (Ballot).

import { answer, vote } from "/api.js";
import { button, copy, follow, make, say } from "/dom.js";

const CHOICES = [
  ["a", "A is better"],
  ["b", "B is better"],
  ["tie", "Tie"],
  ["both_bad", "Both bad"],
];

export class Pane {
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
      const end = await answer(round.key, request, signal, (piece) => {
        this.text += piece;
        follow(() => written.appendData(piece));
      });
      const seconds = ((performance.now() - started) / 1000).toFixed(1);
      const facts = model.includes("@") ? [] : [`version ${end.version}`];
      const count = end.usage.completion_tokens;
      facts.push(count === 1 ? "1 token" : `${count} tokens`, `${seconds} s`);
      if (end.reason === "length") facts.push("cut at max tokens");
      this.note.textContent = facts.join(" · ");
    } catch (error) {
      this.broke(error, round);
    }
    this.node.classList.remove("writing");
    this.node.removeAttribute("aria-busy");
    this.copy.hidden = !this.text;
  }

  broke(error, round) {
    if (error.name === "AbortError") {
      this.stopped = true;
      this.note.textContent = "Stopped";
      return;
    }
    this.failed = true;
    this.note.textContent = "Not part of the conversation.";
    follow(() => this.words.after(make("p", "alert inline", error.message)));
    say(error.message);
    round.refused(error);
  }
}

export function reveal(panes, versions) {
  panes.forEach((pane, index) => {
    pane.title.textContent = versions[index];
    pane.note.classList.remove("veiled");
  });
}

export class Ballot {
  // onEnd is called when it is over, with a vote or without one.
  constructor(round, panes, versions, onEnd) {
    Object.assign(this, { round, panes, versions, onEnd, casting: false });
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
    this.comment.maxLength = round.limits.comment_characters;
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
    this.casting = true;
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
      await vote(round.key, record);
    } catch (error) {
      this.casting = false;
      this.enable(true);
      this.result.textContent = `Not saved: ${error.message} Vote again.`;
      say(this.result.textContent);
      round.refused(error);
      return;
    }
    this.finish(choice);
  }

  finish(choice) {
    const { round, panes, versions } = this;
    const winner = { a: 0, b: 1, tie: 0 }[choice];
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
  }

  close(text) {
    this.enable(false);
    reveal(this.panes, this.versions);
    this.comment.hidden = true;
    follow(() => (this.result.textContent = text));
    this.onEnd();
  }

  enable(on) {
    for (const node of [...this.buttons, this.comment]) node.disabled = !on;
  }
}
