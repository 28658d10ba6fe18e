// Markdown, as models write it, to DOM nodes: headings, paragraphs, nested lists, quotes, tables, code. HTML is text.
// A block knows its source, so that a growing answer renders anew only what is not settled. Every loop is linear in the
// text and every depth is bounded: no text, however broken, stalls or breaks the page.

import { copyButton, el, fill } from "./dom.js";
import { inline } from "./inline.js";

const DEEPEST = 12;
const FENCE = /^(\s*)(`{3,}|~{3,})\s*([^\s`]*)/;
const HEADING = /^ {0,3}(#{1,6})(?=\s|$)/;
const RULE = /^ {0,3}(?:(?:\* *){3,}|(?:- *){3,}|(?:_ *){3,})$/;
const QUOTE = /^ {0,3}> ?/;
const ITEM = /^(\s*)([-*+]|(\d{1,9})[.)])(?:\s+|$)/;

const blank = (line) => line.trim() === "";
const indent = (line) => line.length - line.trimStart().length;

/** Blocks of lines, each with `from` and `to`, its lines. */
export function blocks(lines, depth = 0) {
  const found = [];
  let at = 0;
  while (at < lines.length) {
    if (blank(lines[at])) {
      at++;
      continue;
    }
    const block = depth < DEEPEST ? read(lines, at, depth) : { kind: "paragraph", lines: lines.slice(at), to: lines.length };
    found.push({ ...block, from: at });
    at = block.to;
  }
  return found;
}

function read(lines, at, depth) {
  const line = lines[at];
  const fence = fenceOf(line);
  if (fence) return readCode(lines, at, fence);
  const heading = HEADING.exec(line);
  if (heading) {
    const text = line.slice(heading[0].length).trim().replace(/(?:^|\s)#+$/, "");
    return { kind: "heading", level: heading[1].length, text, to: at + 1 };
  }
  if (RULE.test(line)) return { kind: "rule", to: at + 1 };
  if (QUOTE.test(line)) {
    let to = at;
    while (to < lines.length && QUOTE.test(lines[to])) to++;
    const inner = lines.slice(at, to).map((one) => one.replace(QUOTE, ""));
    return { kind: "quote", blocks: blocks(inner, depth + 1), to };
  }
  if (ITEM.test(line)) return readList(lines, at, depth);
  if (startsTable(lines, at)) return readTable(lines, at);
  let to = at + 1;
  while (to < lines.length && !blank(lines[to]) && !interrupts(lines, to)) to++;
  return { kind: "paragraph", lines: lines.slice(at, to), to };
}

/** Whether a line begins another block in the middle of a paragraph. */
function interrupts(lines, at) {
  const line = lines[at];
  if (fenceOf(line) || HEADING.test(line) || RULE.test(line) || QUOTE.test(line)) return true;
  const item = ITEM.exec(line);
  if (item && item[0].length < line.length && (item[3] === undefined || item[3] === "1")) return true;
  return startsTable(lines, at);
}

function fenceOf(line) {
  const fence = FENCE.exec(line);
  // Three backticks that are closed in their line are a code span.
  return fence && !(fence[2][0] === "`" && line.indexOf("`", fence[0].length) >= 0) ? fence : null;
}

function readCode(lines, at, fence) {
  const [, space, mark, language] = fence;
  const body = [];
  let to = at + 1;
  for (; to < lines.length; to++) {
    const line = lines[to].trim();
    if (line.length >= mark.length && line === mark[0].repeat(line.length)) break;
    body.push(lines[to].slice(Math.min(indent(lines[to]), space.length)));
  }
  return { kind: "code", shape: language, language, text: body.join("\n"), to: Math.min(to + 1, lines.length) };
}

function readList(lines, at, depth) {
  const first = ITEM.exec(lines[at]);
  const base = first[1].length;
  const ordered = first[3] !== undefined;
  const items = [];
  let inner = 0; // where the text of the current item begins
  let to = at;
  while (to < lines.length) {
    const line = lines[to];
    if (blank(line)) {
      let next = to;
      while (next < lines.length && blank(lines[next])) next++;
      const item = next < lines.length ? ITEM.exec(lines[next]) : null;
      const goesOn = next < lines.length && (indent(lines[next]) >= base + 2 || (item && (item[3] !== undefined) === ordered));
      if (!goesOn) break;
      for (; to < next; to++) items.at(-1).push("");
      continue;
    }
    const item = ITEM.exec(line);
    const rule = RULE.test(line);
    if (item && !rule && item[1].length < base + 2 && (item[3] !== undefined) === ordered) {
      inner = item[0].length - item[1].length > 6 ? item[1].length + item[2].length + 1 : item[0].length;
      items.push([line.slice(inner)]);
    } else if (indent(line) >= base + 2) {
      items.at(-1).push(line.slice(Math.min(indent(line), inner)));
    } else if (!blank(lines[to - 1]) && !item && !interrupts(lines, to)) {
      items.at(-1).push(line.trimStart());
    } else break;
    to++;
  }
  const start = ordered ? Number(first[3]) : 1;
  const parts = items.map((one) => ({ source: one.join("\n"), build: () => item(blocks(one, depth + 1)) }));
  return { kind: "list", shape: `${ordered}${start}`, ordered, start, parts, to };
}

function cells(line) {
  const row = [];
  let cell = "";
  const text = line.trim();
  for (let i = 0; i < text.length; i++) {
    if (text[i] === "\\" && text[i + 1] === "|") {
      cell += "|";
      i++;
    } else if (text[i] === "|") {
      if (i > 0) row.push(cell.trim());
      cell = "";
    } else cell += text[i];
  }
  if (cell.trim() !== "" || row.length === 0) row.push(cell.trim());
  return row;
}

function startsTable(lines, at) {
  const next = lines[at + 1];
  if (next === undefined || !lines[at].includes("|") || !/^[\s|:-]+$/.test(next) || !next.includes("-")) return false;
  const marks = cells(next);
  return marks.every((one) => /^:?-+:?$/.test(one)) && marks.length === cells(lines[at]).length;
}

function readTable(lines, at) {
  const head = cells(lines[at]);
  const align = cells(lines[at + 1]).map((one) => (one.endsWith(":") ? (one.startsWith(":") ? "centre" : "right") : null));
  const row = (tag, texts) => el("tr", {}, head.map((_, i) => withText(el(tag, { class: align[i] }), texts[i] ?? "")));
  const parts = [];
  let to = at + 2;
  for (; to < lines.length && lines[to].includes("|"); to++) {
    const source = lines[to];
    parts.push({ source, build: () => row("td", cells(source)) });
  }
  return { kind: "table", shape: lines.slice(at, at + 2).join("\n"), head: () => row("th", head), parts, to };
}

function node(block) {
  switch (block.kind) {
    case "heading":
      // The page's own headings are of levels 1 and 2.
      return withText(el(`h${Math.min(block.level + 2, 6)}`, { class: `level-${block.level}` }), block.text);
    case "rule":
      return el("hr");
    case "quote":
      return el("blockquote", {}, block.blocks.map(node));
    case "list":
      return el(
        block.ordered ? "ol" : "ul",
        { start: block.start === 1 ? undefined : block.start },
        block.parts.map((part) => part.build()),
      );
    case "table":
      return table(block);
    case "code": {
      const code = el("code", { text: block.text });
      const bar = el("div", { class: "bar" }, el("span", { text: block.language || "text" }), copyButton(() => code.textContent));
      return el("div", { class: "code" }, bar, el("pre", { tabindex: "0", role: "region", "aria-label": "Code" }, code));
    }
    default:
      return withText(el("p"), block.lines.map((line) => line.trim()).join("\n"));
  }
}

const withText = (parent, text) => fill(parent, inline(text));

function item(inside) {
  const [first, ...rest] = inside;
  if (first?.kind !== "paragraph") return el("li", {}, inside.map(node));
  const lines = first.lines.map((line) => line.trim());
  lines[0] = lines[0].replace(/^\[( |x|X)\] /, (_, mark) => (mark === " " ? "☐ " : "☑ "));
  const li = withText(el("li"), lines.join("\n"));
  return fill(li, rest.map(node));
}

function table({ head, parts }) {
  const rows = el("tbody", {}, parts.map((part) => part.build()));
  const attributes = { class: "table", tabindex: "0", role: "region", "aria-label": "Table" };
  return el("div", attributes, el("table", {}, el("thead", {}, head()), rows));
}

/** Makes the element of a block that of its longer form, where only the end is new; says whether it could. */
function grow(there, old, block) {
  if (old.kind !== block.kind || old.shape === undefined || old.shape !== block.shape) return false;
  if (block.kind === "code") {
    const code = there.querySelector("code");
    if (code.firstChild && block.text.startsWith(old.text)) code.firstChild.appendData(block.text.slice(old.text.length));
    else code.textContent = block.text;
    return true;
  }
  const within = block.kind === "table" ? there.querySelector("tbody") : there;
  while (within.childNodes.length > block.parts.length) within.lastChild.remove();
  block.parts.forEach((part, i) => {
    if (i >= within.childNodes.length) within.append(part.build());
    else if (part.source !== old.parts[i].source) within.childNodes[i].replaceWith(part.build());
  });
  return true;
}

/** A text that grows, as Markdown within an element. */
export class MarkdownView {
  /** @param {Element} root element that holds nothing else */
  constructor(root) {
    this.root = root;
    this.settled = 0; // characters, and below nodes, that later text cannot change
    this.kept = 0;
    this.shown = []; // [block, its source] of each node
  }

  /** Shows a text that begins with all texts shown before. */
  update(text) {
    const lines = text.slice(this.settled).split("\n");
    // What separates two blocks are whole lines: blocks before the last of the whole lines are settled.
    const whole = blocks(lines.slice(0, -1));
    const start = whole.length > 1 ? whole.at(-1).from : 0;
    this.show(this.kept, [...whole.slice(0, -1), ...blocks(lines.slice(start)).map((one) => shifted(one, start))], lines);
    if (whole.length > 1) {
      this.kept += whole.length - 1;
      for (let i = 0; i < start; i++) this.settled += lines[i].length + 1;
    }
  }

  show(at, found, lines) {
    const nodes = this.root.childNodes;
    found.forEach((block, i) => {
      const source = lines.slice(block.from, block.to).join("\n");
      const [old, before] = this.shown[at + i] ?? [];
      this.shown[at + i] = [block, source];
      if (before === source) return;
      const there = nodes[at + i];
      if (!there) this.root.append(node(block));
      else if (!grow(there, old, block)) there.replaceWith(node(block));
    });
    while (nodes.length > at + found.length) nodes[nodes.length - 1].remove();
    this.shown.length = nodes.length;
  }
}

const shifted = (block, by) => ({ ...block, from: block.from + by, to: block.to + by });
