// For: the question that is being written: text, pictures, keys, dropping and pasting.
// Not for: sending it (app.js) nor what a picture may be (pictures.js).

import { announce, byId, note } from "./dom.js";
import { LIMITS, PictureRefused, readPicture } from "./pictures.js";
import { showThumbs } from "./view.js";

/** @typedef {import("./chat.js").Picture} Picture */

export class Composer {
  /**
   * @param {{send: () => void, others: () => Picture[]}} app `others`: pictures that the request carries beside these
   */
  constructor({ send, others }) {
    this.text = /** @type {HTMLTextAreaElement} */ (byId("question"));
    /** @type {Picture[]} */
    this.pictures = [];
    this.others = others;
    this.reading = 0;
    /** Counts the questions that were put here: what is still read for another one is left out. */
    this.questions = 0;
    this.text.addEventListener("input", () => this.changed());
    this.text.addEventListener("keydown", (event) => {
      // An input method's Enter ends its own word and sends nothing.
      if (event.key !== "Enter" || event.shiftKey || event.isComposing) return;
      event.preventDefault();
      send();
    });
    byId("composer").addEventListener("submit", (event) => {
      event.preventDefault();
      send();
    });
    this.startPicking();
    this.startDropping();
    document.addEventListener("paste", (event) => this.paste(event));
    this.changed();
  }

  /** @returns {boolean} whether there is something to send */
  get ready() {
    return this.reading === 0 && (this.text.value.trim() !== "" || this.pictures.length > 0);
  }

  /** @returns {boolean} whether nothing is there that could be lost */
  get empty() {
    return this.reading === 0 && this.text.value === "" && this.pictures.length === 0;
  }

  /** @returns {{text: string, pictures: Picture[]}} */
  get question() {
    return { text: this.text.value.trim(), pictures: [...this.pictures] };
  }

  /** @param {{text: string, pictures: Picture[]}} question */
  set({ text, pictures }) {
    this.questions += 1;
    this.text.value = text;
    this.pictures = [...pictures];
    this.changed();
  }

  focus() {
    this.text.focus();
  }

  changed() {
    this.text.style.height = "auto";
    this.text.style.height = `${this.text.scrollHeight}px`;
    showThumbs(this.pictures, (picture) => this.remove(picture));
    const button = /** @type {HTMLButtonElement} */ (byId("send"));
    button.setAttribute("aria-disabled", String(!this.ready));
  }

  /** @param {Picture} picture */
  remove(picture) {
    this.pictures = this.pictures.filter((each) => each !== picture);
    announce(`${picture.name} removed`);
    this.changed();
    this.focus();
  }

  /**
   * Reads files one after the other, in their order.
   * @param {File[]} files
   */
  async add(files) {
    const remarks = [];
    this.reading += 1;
    this.changed();
    try {
      for (const file of files) {
        const remark = await this.addOne(file);
        if (remark) remarks.push(remark);
      }
    } finally {
      this.reading -= 1;
      this.changed();
    }
    if (remarks.length > 0) note(remarks.join(" "));
    else if (files.length > 0) announce(files.length === 1 ? "Picture added" : `${files.length} pictures added`);
    this.focus();
  }

  /**
   * @param {File} file
   * @returns {Promise<string>} what is to be said about it, "" for nothing
   */
  async addOne(file) {
    const before = [...this.others(), ...this.pictures];
    if (before.length >= LIMITS.count) {
      return `One request takes ${LIMITS.count} pictures, earlier questions' too; ${file.name} was left out.`;
    }
    const { questions } = this;
    const taken = before.reduce((sum, { blob }) => sum + blob.size, 0);
    try {
      const { picture, remark } = await readPicture(file, taken);
      if (questions !== this.questions) return `${picture.name} was left out: it was for another question.`;
      this.pictures.push(picture);
      return remark;
    } catch (error) {
      if (error instanceof PictureRefused) return error.message;
      throw error;
    }
  }

  startPicking() {
    const pairs = { pick: "files", shoot: "camera", "welcome-pick": "files" };
    for (const [button, input] of Object.entries(pairs)) byId(button).onclick = () => byId(input).click();
    for (const id of ["files", "camera"]) {
      const input = /** @type {HTMLInputElement} */ (byId(id));
      input.onchange = async () => {
        await this.add([...input.files]);
        input.value = ""; // else the same file again would be no change
      };
    }
  }

  startDropping() {
    const cover = byId("drop");
    const hasFiles = (event) => event.dataTransfer?.types.includes("Files");
    addEventListener("dragover", (event) => {
      if (!hasFiles(event)) return;
      event.preventDefault();
      cover.hidden = false;
    });
    addEventListener("dragleave", (event) => {
      if (!event.relatedTarget) cover.hidden = true;
    });
    addEventListener("drop", (event) => {
      if (!hasFiles(event)) return;
      event.preventDefault();
      cover.hidden = true;
      if (!document.querySelector("dialog[open]")) this.add([...event.dataTransfer.files]);
    });
  }

  /** @param {ClipboardEvent} event */
  paste(event) {
    const files = [...(event.clipboardData?.files ?? [])];
    if (files.length === 0 || document.querySelector("dialog[open]")) return;
    event.preventDefault();
    this.add(files);
  }
}
