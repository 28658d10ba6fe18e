// Settings of an answer, and the API key. They last as long as the tab, and nothing is written to disk for longer.

const KEY = "megatron_vita.key";
const SETTINGS = "megatron_vita.settings";

const byId = (id) => document.getElementById(id);

/** A dialog that closes by Escape and by a press beside it. */
function dialog(id) {
  const element = byId(id);
  element.addEventListener("click", (event) => {
    if (event.target === element) element.close();
  });
  return element;
}

const FIELDS = ["temperature", "length", "seed", "frames", "instructions"];

/** Fields of the settings dialog. */
export class Settings {
  constructor() {
    this.dialog = dialog("settings");
    this.form = byId("settings-form");
    const stored = JSON.parse(sessionStorage.getItem(SETTINGS) ?? "{}");
    for (const name of FIELDS) {
      this[name] = byId(name);
      if (name in stored) this[name].value = stored[name];
      this[name].addEventListener("input", () => this.changed());
    }
    byId("open-settings").addEventListener("click", () => this.dialog.showModal());
    this.form.addEventListener("submit", (event) => {
      event.preventDefault();
      this.dialog.close();
    });
    this.changed();
  }

  changed() {
    byId("temperature-value").textContent = Number(this.temperature.value).toFixed(1);
    sessionStorage.setItem(SETTINGS, JSON.stringify(Object.fromEntries(FIELDS.map((name) => [name, this[name].value]))));
  }

  /** Says what fits into the model; the server cuts a longer answer. */
  limit(tokens) {
    if (tokens) byId("length-hint").textContent = `Question and answer together fit ${tokens.toLocaleString("en")} tokens.`;
  }

  /** Fields of the request's body; what is no number falls back to what the server does by default. */
  get body() {
    const whole = (field) => (/^\d{1,15}$/.test(field.value.trim()) ? Number(field.value) : undefined);
    const frames = whole(this.frames) || undefined;
    return {
      temperature: Number(this.temperature.value),
      max_completion_tokens: whole(this.length) || undefined,
      seed: whole(this.seed),
      media_io_kwargs: frames && { video: { num_frames: frames } },
    };
  }

  /** The system message, if there is one. */
  get messages() {
    const content = this.instructions.value.trim();
    return content ? [{ role: "system", content }] : [];
  }
}

/** The API key of this tab. */
export class ApiKey {
  constructor() {
    this.dialog = dialog("key");
    this.field = byId("key-field");
    this.entered = () => {};
    byId("key-form").addEventListener("submit", (event) => {
      event.preventDefault();
      if (!this.field.value.trim()) return;
      sessionStorage.setItem(KEY, this.field.value.trim());
      this.field.value = "";
      this.dialog.close();
      this.entered();
    });
    byId("open-key").addEventListener("click", () => this.ask());
  }

  get value() {
    return sessionStorage.getItem(KEY);
  }

  /** Asks for a key; `then` is called once there is one. */
  ask(message = "", then = () => {}) {
    byId("key-message").textContent = message;
    this.entered = then;
    if (!this.dialog.open) this.dialog.showModal();
  }

  forget() {
    sessionStorage.removeItem(KEY);
  }
}
