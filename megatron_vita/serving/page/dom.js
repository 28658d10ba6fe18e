// Elements are built from names and texts, never from markup: what a model writes stays text.

const SVG = "http://www.w3.org/2000/svg";

/** An element. `text` is its text, `on` its listeners, `true` an attribute without a value; the rest are attributes. */
export function el(tag, attributes = {}, ...children) {
  const node = document.createElement(tag);
  for (const [name, value] of Object.entries(attributes)) {
    if (value === undefined || value === null || value === false) continue;
    if (name === "text") node.textContent = value;
    else if (name === "on") for (const [event, call] of Object.entries(value)) node.addEventListener(event, call);
    else node.setAttribute(name, value === true ? "" : value);
  }
  return fill(node, children);
}

/** Appends nodes and strings, in arrays too; null is nothing. (Spreading them would overflow the stack for long texts.) */
export function fill(node, children) {
  for (const child of children) {
    if (Array.isArray(child)) fill(node, child);
    else if (child !== null && child !== undefined) node.append(child);
  }
  return node;
}

/** A drawing from the page's sheet of symbols. */
export function icon(name) {
  const svg = document.createElementNS(SVG, "svg");
  svg.setAttribute("class", "icon");
  svg.setAttribute("aria-hidden", "true");
  const use = document.createElementNS(SVG, "use");
  use.setAttribute("href", `#i-${name}`);
  svg.append(use);
  return svg;
}

/** A button with a drawing and words. */
export function button(label, drawing, press, attributes = {}) {
  return el("button", { type: "button", on: { click: press }, ...attributes }, icon(drawing), el("span", { text: label }));
}

/** A button that copies a text, and says so for a moment. */
export function copyButton(text, attributes = {}) {
  const words = el("span", { text: "Copy" });
  const press = async () => {
    try {
      await copy(text());
      words.textContent = "Copied";
    } catch {
      words.textContent = "Copying is not allowed";
    }
    setTimeout(() => (words.textContent = "Copy"), 1500);
  };
  return el("button", { type: "button", on: { click: press }, ...attributes }, icon("copy"), words);
}

async function copy(text) {
  if (navigator.clipboard) return navigator.clipboard.writeText(text);
  // An address that is neither HTTPS nor this machine has no clipboard of its own.
  const area = el("textarea", { class: "sr", "aria-hidden": "true" });
  area.value = text;
  document.body.append(area);
  area.select();
  const copied = document.execCommand("copy");
  area.remove();
  if (!copied) throw new Error("refused");
}
