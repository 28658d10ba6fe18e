// One conversation: what was asked and answered, how it looks, and what of it is sent again.

import { button, copyButton, el, icon } from "./dom.js";
import { MarkdownView } from "./markdown.js";
import { part, release, thumbnail } from "./media.js";

const SHOWN = 12; // pictures of a question; a thousand frames would fill the page

const FINISHED = { length: "The answer was cut at the longest length that the settings and the model allow.", abort: "The server stopped this answer." };

/** A question with its answer, in state and view. */
class Exchange {
  constructor(text, media, actions) {
    this.text = text;
    this.media = media;
    this.answer = "";
    this.actions = actions;
    this.body = el("div", { class: "markdown" });
    this.note = el("p", { class: "note", hidden: true });
    this.stats = el("span", { class: "stats" });
    this.tools = el("div", { class: "tools", hidden: true });
    this.waited = el("span");
    this.reply = el(
      "section",
      { class: "answer waiting", "aria-label": "Answer", "aria-busy": "true" },
      el("p", { class: "dots", "aria-hidden": "true" }, el("i"), el("i"), el("i"), this.waited),
      this.body,
      this.note,
      el("footer", {}, this.tools, this.stats),
    );
    const edit = el("button", { type: "button", class: "quiet edit", "aria-label": "Edit this question", title: "Edit", on: { click: () => actions.edit(this) } }, icon("edit"));
    this.element = el(
      "article",
      { class: "exchange" },
      el(
        "section",
        { class: "question", "aria-label": "Question" },
        media.length ? el("div", { class: "media" }, media.slice(0, SHOWN).map((one) => thumbnail(one))) : null,
        media.length > SHOWN ? el("p", { class: "more", text: `and ${media.length - SHOWN} more` }) : null,
        el("div", { class: "said" }, edit, text ? el("p", { class: "bubble", text }) : null),
      ),
      this.reply,
    );
    this.view = new MarkdownView(this.body);
  }

  /** Shows the answer as far as it has come. */
  show() {
    this.reply.classList.toggle("waiting", this.answer === "");
    this.view.update(this.answer);
  }

  /** Says how many seconds nothing has come, once they are worth a word. */
  wait(seconds) {
    if (seconds >= 3) this.waited.textContent = `${seconds} s`;
  }

  /** Ends the answer, with words on what went wrong or was cut, if anything. */
  close({ note = "", failed = false, stats = "" } = {}) {
    this.show();
    this.reply.classList.remove("waiting");
    this.reply.setAttribute("aria-busy", "false");
    this.note.textContent = note;
    this.note.hidden = note === "";
    this.note.classList.toggle("error", failed);
    if (failed) this.note.setAttribute("role", "alert");
    this.stats.textContent = stats;
    this.tools.replaceChildren();
    if (this.answer) this.tools.append(copyButton(() => this.answer, { class: "quiet copy" }));
    this.tools.append(button(failed ? "Try again" : "Retry", "retry", () => this.actions.retry(this), { class: "quiet retry" }));
    this.tools.hidden = false;
  }

  /** The messages of this exchange; none where nothing was answered, unless it is the one that is asked now. */
  messages(asked) {
    const content = this.media.length ? [...this.media.map(part), { type: "text", text: this.text }] : this.text;
    const user = { role: "user", content };
    if (this === asked) return [user];
    return this.answer ? [user, { role: "assistant", content: this.answer }] : [];
  }
}

export class Conversation {
  /** @param actions {edit(exchange), retry(exchange)}: what the buttons of an exchange do */
  constructor(list, actions) {
    this.list = list;
    this.actions = actions;
    this.exchanges = [];
  }

  add(text, media) {
    const exchange = new Exchange(text, media, this.actions);
    this.exchanges.push(exchange);
    this.list.append(exchange.element);
    return exchange;
  }

  /** Takes out an exchange and all behind it; returns their media, which may still be shown. */
  cut(exchange) {
    const gone = this.exchanges.splice(this.exchanges.indexOf(exchange));
    for (const one of gone) one.element.remove();
    return gone.flatMap((one) => one.media);
  }

  clear() {
    if (this.exchanges.length) release(this.cut(this.exchanges[0]));
  }

  /** Pictures and videos of all exchanges. */
  get media() {
    return this.exchanges.flatMap((one) => one.media);
  }

  /** Pictures and videos of what was said before an exchange. */
  before(exchange) {
    return this.exchanges.slice(0, this.exchanges.indexOf(exchange)).flatMap((one) => one.media);
  }

  /** The messages that ask an exchange's question, with all that was said before. */
  messages(asked) {
    return this.exchanges.slice(0, this.exchanges.indexOf(asked) + 1).flatMap((one) => one.messages(asked));
  }
}

/** Why an answer ended, where that is worth a word. */
export const finished = (reason) => FINISHED[reason] ?? "";

/** Tokens and seconds of an answer, for people; times in milliseconds. */
export function statistics({ asked, first, ended, usage }) {
  const seconds = (from, to) => `${((to - from) / 1000).toFixed(to - from < 10000 ? 2 : 1)} s`;
  const words = [];
  if (usage) {
    const { prompt_tokens: prompt, completion_tokens: tokens } = usage;
    words.push(`${prompt.toLocaleString("en")} tokens read`, `${tokens.toLocaleString("en")} written`);
    if (first && tokens > 1 && ended - first > 20) {
      const rate = ((tokens - 1) / (ended - first)) * 1000;
      words.push(`${rate < 10 ? rate.toFixed(1) : Math.round(rate).toLocaleString("en")} tokens/s`);
    }
  }
  if (first) words.push(`first after ${seconds(asked, first)}`);
  words.push(`${seconds(asked, ended)} in all`);
  return words.map((one) => one.replaceAll(" ", "\u00a0")).join(" · "); // a line breaks between facts only
}
