// Markdown within a paragraph: code, emphasis, links to http and https, line breaks. One pass over the text.

import { el } from "./dom.js";

const TOKEN = /\\[\s\S]|`+|\*+|_+|~~|!?\[|\]|<br\s*\/?>|https?:\/\/|\n/gi;
const TARGET = /\(\s{0,9}<?([^\s<>()]{1,2000}(?:\([^\s<>()]{0,500}\)[^\s<>()]{0,500}){0,9})>?(?:\s{1,9}"[^"\n]{0,500}")?\s{0,9}\)/y;
const ADDRESS = /https?:\/\/[^\s<>"`]{1,2000}/iy;
const OPEN_AT_ONCE = 16;
const WORD = /[\p{L}\p{N}]/u;

/** Nodes of a text. */
export function inline(text) {
  const out = []; // nodes, strings, and open marks
  const open = []; // the marks among them that may still be closed
  const ticks = codeSpans(text);
  let done = 0;
  const say = (to) => {
    if (to > done) out.push(text.slice(done, to));
  };
  TOKEN.lastIndex = 0;
  for (let token; (token = TOKEN.exec(text)); TOKEN.lastIndex = done) {
    const [mark] = token;
    const at = token.index;
    say(at);
    done = at + mark.length;
    if (mark === "\n" || mark[0] === "<") out.push(el("br"));
    else if (mark[0] === "\\") {
      const escapes = /[!-/:-@[-`{-~]/.test(mark[1]);
      out.push(escapes ? mark[1] : "\\");
      if (!escapes) done = at + 1;
    } else if (mark[0] === "`") {
      const end = ticks(at, mark.length);
      if (end < 0) out.push(mark);
      else {
        out.push(el("code", { text: text.slice(done, end).replace(/\n/g, " ") }));
        done = end + mark.length;
      }
    } else if (mark.endsWith("[")) begin(out, open, mark, 1);
    else if (mark === "]") done = endLink(text, done, out, open);
    else if (mark[0] === "h" || mark[0] === "H") done = address(text, at, out, open);
    else emphasis(text, at, mark, out, open);
  }
  say(text.length);
  return nodes(out);
}

/** (place of a run of backticks, its length) → place of the next run of that length, or -1. */
function codeSpans(text) {
  const runs = new Map();
  for (const { 0: run, index } of text.matchAll(/`+/g)) {
    if (!runs.has(run.length)) runs.set(run.length, { places: [], next: 0 });
    runs.get(run.length).places.push(index);
  }
  return (at, length) => {
    const run = runs.get(length);
    if (!run) return -1;
    while (run.next < run.places.length && run.places[run.next] <= at) run.next++;
    return run.places[run.next] ?? -1;
  };
}

function begin(out, open, mark, size) {
  const opened = { mark, size };
  out.push(opened);
  if (open.length < OPEN_AT_ONCE) open.push(opened);
}

/** What stands behind an open mark, taken out, with all marks within it given up. */
function taken(out, open, which) {
  const place = out.lastIndexOf(open[which]);
  const inside = nodes(out.splice(place).slice(1));
  open.length = which;
  return inside;
}

function emphasis(text, at, mark, out, open) {
  const before = text[at - 1] ?? " ";
  const after = text[at + mark.length] ?? " ";
  const within = mark[0] === "_";
  const closes = before.trim() !== "" && !(within && WORD.test(after));
  const opens = after.trim() !== "" && !(within && WORD.test(before));
  const strike = mark === "~~";
  let left = mark.length;
  while (closes && left > 0) {
    const which = open.findLastIndex((one) => one.mark[0] === mark[0] && one.size <= left);
    if (which < 0) break;
    const { size } = open[which];
    const inside = taken(out, open, which);
    out.push(el(strike ? "del" : size === 2 ? "strong" : "em", {}, inside));
    left -= size;
  }
  if (!opens) out.push(mark.slice(0, left));
  else if (left > 6) out.push(mark.slice(0, left));
  else {
    for (; left >= 2; left -= 2) begin(out, open, mark.slice(0, 2), 2);
    if (left) begin(out, open, mark[0], 1);
  }
}

/** Closes a link behind `]`; returns where the text goes on. */
function endLink(text, at, out, open) {
  const which = open.findLastIndex((one) => one.mark.endsWith("["));
  TARGET.lastIndex = at;
  const target = which >= 0 ? TARGET.exec(text) : null;
  const url = target && safe(target[1]);
  if (which < 0 || !url) {
    if (which >= 0) open.splice(which, 1);
    out.push("]");
    return at;
  }
  const inside = taken(out, open, which);
  out.push(link(url, inside.length ? inside : [target[1]]));
  for (let i = open.length - 1; i >= 0; i--) if (open[i].mark.endsWith("[")) open.splice(i, 1); // no link in a link
  return TARGET.lastIndex;
}

/** A bare address becomes a link to itself; returns where the text goes on. */
function address(text, at, out, open) {
  ADDRESS.lastIndex = at;
  let found = ADDRESS.exec(text)?.[0] ?? text.slice(at, at + 4);
  let end = found.length;
  while (end > 0 && /[.,;:!?'"*_~\])}]/.test(found[end - 1])) {
    if (found[end - 1] === ")" && found.slice(0, end).split("(").length >= found.slice(0, end).split(")").length) break;
    end--;
    if (found.length - end > 8) break;
  }
  found = found.slice(0, Math.max(end, 4));
  const url = /\p{L}|\p{N}/u.test(text[at - 1] ?? " ") || open.some((one) => one.mark.endsWith("[")) ? null : safe(found);
  out.push(url ? link(url, [found]) : found);
  return at + found.length;
}

/** An address of the web, or null: no scheme but http and https is ever followed. */
function safe(address) {
  try {
    const url = new URL(address);
    return ["http:", "https:"].includes(url.protocol) ? url.href : null;
  } catch {
    return null;
  }
}

const link = (href, inside) => el("a", { href, rel: "noopener noreferrer nofollow", target: "_blank" }, inside);

const nodes = (out) => out.map((one) => (typeof one === "string" || one instanceof Node ? one : one.mark));
