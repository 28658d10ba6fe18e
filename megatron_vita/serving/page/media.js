// Pictures and videos that a person adds: what the server does not take is refused here, in words, before it is sent.

import { el, icon } from "./dom.js";

const PICTURES = ["image/png", "image/jpeg", "image/webp", "image/gif", "image/bmp"];
const BY_SUFFIX = {
  png: "image/png", jpg: "image/jpeg", jpeg: "image/jpeg", webp: "image/webp", gif: "image/gif", bmp: "image/bmp",
  mp4: "video/mp4", m4v: "video/mp4", webm: "video/webm", mov: "video/quicktime", mkv: "video/x-matroska",
  avi: "video/x-msvideo", mpg: "video/mpeg", mpeg: "video/mpeg",
}; // prettier-ignore
const PATIENCE = 4000; // milliseconds until a file that the browser cannot play is left to the server

export const ACCEPT = [...PICTURES, "video/*", ".mkv", ".avi"].join(",");

/** Bytes for people. */
export function size(bytes) {
  const units = ["bytes", "KB", "MB", "GB"];
  let unit = 0;
  for (; bytes >= 1000 && unit < units.length - 1; unit++) bytes /= 1000;
  return `${bytes < 10 && unit ? bytes.toFixed(1) : Math.round(bytes)} ${units[unit]}`;
}

/**
 * A picture or a video, ready to be shown and sent: {kind, name, bytes, seconds, preview (object URL), data (its data URL,
 * as a Blob: a conversation may hold more than the longest string of a browser)}.
 */
export async function read(file, limits) {
  const type = PICTURES.includes(file.type) || file.type.startsWith("video/") ? file.type : BY_SUFFIX[suffix(file.name)];
  const name = file.name || "picture";
  if (!type) {
    throw new Error(`${name} is neither a picture (PNG, JPEG, WebP, GIF, BMP) nor a video.`);
  }
  if (file.size === 0) throw new Error(`${name} is empty.`);
  const most = Math.min(limits.picture_bytes ?? Infinity, ((limits.body_bytes ?? Infinity) / 4) * 3); // base64: 4 for 3
  if (file.size > most) throw new Error(`${name} has ${size(file.size)}; the server takes files of ${size(most)}.`);
  const kind = type.startsWith("video/") ? "video" : "image";
  const preview = URL.createObjectURL(file);
  try {
    const facts = await (kind === "video" ? videoFacts(preview) : pictureFacts(preview, name));
    if (facts.pixels > limits.picture_pixels) {
      throw new Error(`${name} has ${count(facts.pixels)} pixels; the server takes ${count(limits.picture_pixels)}.`);
    }
    const data = new Blob([await dataUrl(file, type)]);
    return { kind, name, bytes: file.size, data, preview, small: facts.side < 64, seconds: facts.seconds || 0 };
  } catch (error) {
    URL.revokeObjectURL(preview);
    throw error;
  }
}

const suffix = (name) => name?.toLowerCase().split(".").pop();

/** Throws the refusal, in words, of more media in one conversation than the server takes. */
export function checkTotal(media, limits) {
  const videos = media.filter((one) => one.kind === "video");
  const seconds = Math.round(videos.reduce((sum, one) => sum + one.seconds, 0));
  const totals = [
    [media.length, limits.pictures, "pictures and videos"],
    [videos.length, limits.videos, "videos"],
    [seconds, limits.video_seconds, "seconds of video"],
  ];
  for (const [total, most, what] of totals) {
    if (total > most) {
      throw new Error(`That makes ${count(total)} ${what} in this chat; the server takes ${count(most)}. Remove some, or start a new chat.`);
    }
  }
}

const count = (number) => number.toLocaleString("en");

function pictureFacts(url, name) {
  return new Promise((resolve, reject) => {
    const image = new Image();
    image.onload = () =>
      resolve({ pixels: image.naturalWidth * image.naturalHeight, side: Math.max(image.naturalWidth, image.naturalHeight) });
    image.onerror = () => reject(new Error(`${name} cannot be read as a picture; the file is damaged, or is something else.`));
    image.src = url;
  });
}

/** What the browser can tell of a video; the server knows more formats, so nothing known is no refusal. */
function videoFacts(url) {
  return new Promise((resolve) => {
    const video = document.createElement("video");
    const known = () => resolve({ seconds: video.duration, side: Math.max(video.videoWidth, video.videoHeight) });
    video.onloadedmetadata = known;
    video.onerror = known;
    setTimeout(known, PATIENCE);
    video.preload = "metadata";
    video.src = url;
  });
}

function dataUrl(file, type) {
  return new Promise((resolve, reject) => {
    const reader = new FileReader();
    reader.onload = () => resolve(reader.result);
    reader.onerror = () => reject(new Error(`${file.name} cannot be read: ${reader.error.message}`));
    reader.readAsDataURL(file.type === type ? file : new Blob([file], { type }));
  });
}

/** A request's body. Where the JSON holds a medium, its data URL stands. */
export function bodyOf(request) {
  const media = [];
  const secret = `medium-${crypto.getRandomValues(new Uint32Array(4)).join("-")}-`; // no text of a person holds it
  const json = JSON.stringify(request, (_, value) => (value?.data instanceof Blob ? `${secret}${media.push(value.data) - 1}` : value));
  const pieces = json.split(new RegExp(`(?<=")${secret}(\\d+)(?=")`));
  return new Blob(pieces.map((one, i) => (i % 2 ? media[Number(one)] : one)), { type: "application/json" });
}

/** A medium as a part of a message, in OpenAI's form; `bodyOf` puts its data in. */
export const part = ({ kind, name, data }) => ({ type: `${kind}_url`, [`${kind}_url`]: { url: { name, data } } });

/** Words of the server about messages, with the names of files where it names their places. */
export function namingFiles(words, messages) {
  return words.replace(/messages\[(\d+)\]\.content\[(\d+)\]\.(\w+_url)\.url/gi, (place, message, part, kind) => {
    return messages[message]?.content[part]?.[kind]?.url.name ?? place;
  });
}

/** A small view of a medium; with `remove`, a button that takes it away. */
export function thumbnail(medium, remove = null) {
  const { kind, name, bytes, preview, small } = medium;
  const label = `${name}, ${size(bytes)}`;
  const view =
    kind === "image"
      ? el("img", { src: preview, alt: label, class: small ? "small" : undefined })
      : el("video", { src: preview, class: small ? "small" : undefined, "aria-label": label, preload: "auto", muted: true, controls: remove ? undefined : true });
  return el(
    "figure",
    { class: `medium ${kind}${small ? " small" : ""}`, title: label },
    view,
    kind === "video" && remove ? el("span", { class: "badge" }, icon("film")) : null,
    remove && el("button", { type: "button", class: "remove", "aria-label": `Remove ${name}`, on: { click: remove } }, icon("close")),
  );
}

/** Lets go of views. */
export const release = (media) => media.forEach((one) => URL.revokeObjectURL(one.preview));
