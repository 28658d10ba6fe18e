// The page: what a person does, and what follows from it.

import { ask, info as askInfo, ApiError } from "./api.js";
import { Conversation, finished, statistics } from "./conversation.js";
import { el } from "./dom.js";
import { ACCEPT, bodyOf, checkTotal, namingFiles, read, size, thumbnail } from "./media.js";
import { ApiKey, Settings } from "./settings.js";

const byId = (id) => document.getElementById(id);
const [main, list, input, send, files, strip, alerts, status] = [
  "main", "conversation", "input", "send", "files", "strip", "alerts", "status",
].map(byId); // prettier-ignore

const settings = new Settings();
const key = new ApiKey();
const AT_ONCE = 16; // files that are read together, in their order
let server = null; // what /info says; null: not reached
let media = []; // what will be sent with the next question
let editing = null; // the exchange that the next question takes the place of
let running = null; // AbortController of the answer that is being written
const conversation = new Conversation(list, { edit, retry });

// ------------------------------------------------------------------------------------------------ the server

let next = 0; // timer of the next try

async function connect() {
  clearTimeout(next);
  try {
    server = await askInfo();
  } catch (error) {
    byId("model").textContent = "not connected";
    document.body.dataset.server = "gone";
    complain(`${error.message} Trying again.`, "connection");
    next = setTimeout(connect, 2000);
    return;
  }
  retract("connection");
  document.body.dataset.server = server.state ?? "ready";
  if (server.state === "loading") {
    byId("model").textContent = `${server.model} is loading`;
    server = null;
    next = setTimeout(connect, 1000);
    return;
  }
  document.body.dataset.vision = server.vision === false ? "no" : "yes";
  byId("model").textContent = server.model;
  document.title = server.model;
  settings.limit(server.max_model_len);
  byId("open-key").hidden = !server.api_key;
  if (server.api_key && !key.value) key.ask();
  showSamples();
  refresh();
}

async function showSamples() {
  if (server.vision === false || byId("samples").childElementCount) return;
  const samples = await (await fetch("page/samples.json")).json();
  for (const { file, title, question } of samples) {
    const address = `page/${file}`;
    const view = file.endsWith(".mp4") ? el("video", { src: address, muted: true, preload: "metadata" }) : el("img", { src: address, alt: "" });
    const words = el("span", {}, el("b", { text: title }), el("span", { text: question }));
    const choose = async () => {
      const content = await (await fetch(address)).blob();
      await add([new File([content], file, { type: content.type })]);
      input.value = question;
      refresh();
      input.focus();
    };
    byId("samples").append(el("button", { type: "button", class: "sample", on: { click: choose } }, view, words));
  }
  byId("credit").hidden = false;
}

// ------------------------------------------------------------------------------------------------ words to people

function complain(message, about = "other") {
  retract(about);
  const close = el("button", { type: "button", class: "remove", "aria-label": "Dismiss", text: "×", on: { click: () => retract(about) } });
  alerts.append(el("div", { class: "alert", "data-about": about }, el("p", { text: message }), close));
}

function retract(about) {
  for (const one of [...alerts.children]) if (one.dataset.about === about) one.remove();
}

// ------------------------------------------------------------------------------------------------ pictures and videos

async function add(chosen) {
  retract("media");
  const refused = [];
  if (server?.vision === false) return complain("This model reads text only.", "media");
  for (let i = 0; i < chosen.length; i += AT_ONCE) {
    const done = await Promise.allSettled(chosen.slice(i, i + AT_ONCE).map((file) => read(file, server?.limits ?? {})));
    for (const { value: medium, reason } of done) {
      try {
        if (!medium) throw reason;
        const before = editing ? conversation.before(editing) : conversation.media;
        checkTotal([...before, ...media, medium], server?.limits ?? {});
        attach(medium);
      } catch (error) {
        refused.push(error.message);
      }
    }
    refresh();
  }
  if (refused.length) complain(refused.slice(0, 5).join(" "), "media");
}

function attach(medium) {
  media.push(medium);
  const view = thumbnail(medium, () => {
    media = media.filter((one) => one !== medium);
    view.remove();
    refresh();
    input.focus();
  });
  strip.append(view);
}

let over = 0;
addEventListener("dragenter", (event) => {
  if (!event.dataTransfer?.types.includes("Files")) return;
  event.preventDefault();
  over++;
  document.body.classList.add("dropping");
});
addEventListener("dragover", (event) => event.preventDefault());
addEventListener("dragleave", () => {
  over = Math.max(0, over - 1);
  if (!over) document.body.classList.remove("dropping");
});
addEventListener("drop", (event) => {
  event.preventDefault();
  over = 0;
  document.body.classList.remove("dropping");
  if (event.dataTransfer?.files.length) add([...event.dataTransfer.files]);
});
addEventListener("paste", (event) => {
  if (!event.clipboardData?.files.length) return;
  event.preventDefault();
  add([...event.clipboardData.files]);
});
files.accept = ACCEPT;
files.addEventListener("change", () => {
  add([...files.files]);
  files.value = "";
});
byId("attach").addEventListener("click", () => files.click());

// ------------------------------------------------------------------------------------------------ the composer

function refresh() {
  strip.hidden = media.length === 0;
  byId("editing").hidden = editing === null;
  byId("welcome").hidden = conversation.exchanges.length > 0;
  byId("clear").disabled = conversation.exchanges.length === 0;
  document.body.classList.toggle("answering", running !== null);
  send.disabled = running === null && (server === null || (input.value.trim() === "" && media.length === 0));
  send.setAttribute("aria-label", running ? "Stop" : "Send");
  send.title = running ? "Stop (Escape)" : "Send (Enter)";
  input.style.height = "auto";
  input.style.height = `${Math.min(input.scrollHeight, innerHeight / 3)}px`;
}

input.addEventListener("input", refresh);
input.addEventListener("keydown", (event) => {
  if (event.key !== "Enter" || event.shiftKey || event.isComposing) return;
  event.preventDefault();
  if (!running && !send.disabled) submit();
});
addEventListener("keydown", (event) => {
  if (event.key !== "Escape" || document.querySelector("dialog[open]")) return;
  if (running) running.abort();
  else if (editing) compose("", []);
});
byId("composer").addEventListener("submit", (event) => {
  event.preventDefault();
  if (running) running.abort();
  else if (!send.disabled) submit();
});
byId("keep").addEventListener("click", () => compose("", []));
byId("clear").addEventListener("click", () => {
  running?.abort();
  conversation.clear();
  if (editing) compose("", []);
  refresh();
  input.focus();
});

/** Puts a question into the composer, to take the place of another's or none's. */
function compose(text, chosen, instead = null) {
  editing = instead;
  media = [];
  strip.replaceChildren();
  chosen.forEach(attach);
  input.value = text;
  refresh();
  input.focus();
}

function submit() {
  const [text, chosen, instead] = [input.value.trim(), media, editing];
  compose("", []);
  if (instead) conversation.cut(instead);
  answer(conversation.add(text, chosen));
}

function edit(exchange) {
  running?.abort();
  compose(exchange.text, exchange.media, exchange);
}

function retry(exchange) {
  if (running) return;
  conversation.cut(exchange);
  answer(conversation.add(exchange.text, exchange.media));
}

// ------------------------------------------------------------------------------------------------ an answer

async function answer(exchange) {
  const controller = (running = new AbortController());
  const times = { asked: performance.now(), first: 0, ended: 0, usage: null };
  let [note, failed, locked] = ["", false, false];
  retract("media");
  refresh();
  atEnd = true;
  follow();
  status.textContent = "Answering";
  const painter = paint(exchange);
  const clock = setInterval(() => exchange.wait(Math.round((performance.now() - times.asked) / 1000)), 1000);
  const messages = [...settings.messages, ...conversation.messages(exchange)];
  try {
    const body = bodyOf({ messages, ...settings.body, stream: true, stream_options: { include_usage: true } });
    const most = server?.limits?.body_bytes;
    if (body.size > most) {
      throw new ApiError(`This chat has ${size(body.size)}; the server takes ${size(most)}. Start a new one, or send fewer files.`);
    }
    for await (const { text, finish, usage } of ask(body, key.value, controller.signal)) {
      if (text) {
        times.first ||= performance.now();
        clearInterval(clock);
        exchange.answer += text;
        painter.touch();
      }
      if (finish) note = finished(finish);
      if (usage) times.usage = usage;
    }
  } catch (error) {
    if (error.name === "AbortError") note = "Stopped.";
    else {
      [note, failed] = [error instanceof ApiError ? namingFiles(error.message, messages) : `The page failed: ${error.message}`, true];
      locked = error.status === 401;
      if (error.status === 0 || error.status === 503) connect(); // is it still there?
    }
  }
  times.ended = performance.now();
  painter.stop();
  clearInterval(clock);
  if (!note && !exchange.answer) note = "The model answered nothing.";
  exchange.close({ note, failed, stats: failed ? "" : statistics(times) });
  status.textContent = failed ? "" : `${note} ${exchange.answer.slice(0, 2000)}`.trim();
  if (running === controller) running = null;
  refresh();
  if (locked) {
    const words = key.value ? "The server does not take this key." : "";
    key.forget();
    key.ask(words, () => retry(exchange));
  }
}

/** Paints a growing answer at most once a frame. */
function paint(exchange) {
  let frame = 0;
  return {
    touch() {
      frame ||= requestAnimationFrame(() => {
        frame = 0;
        exchange.show();
      });
    },
    stop: () => cancelAnimationFrame(frame),
  };
}

// The end stays in view while it grows; a reader who has scrolled away from it stays where he is.
let atEnd = true;
const follow = () => atEnd && (main.scrollTop = main.scrollHeight);
main.addEventListener("scroll", () => (atEnd = main.scrollHeight - main.scrollTop - main.clientHeight < 96));
const sizes = new ResizeObserver(follow);
sizes.observe(main);
sizes.observe(list);

refresh();
connect();
input.focus();
