// For: the switch between the system's colours, light and dark, kept in this browser.
// Not for: the first drawing (early.js) nor the colours themselves (style.css).

import { forGood } from "./storage.js";

const NAME = "minigpt4.theme";

/** @param {string} theme auto, light or dark */
function show(theme) {
  if (theme === "auto") delete document.documentElement.dataset.theme;
  else document.documentElement.dataset.theme = theme;
  for (const radio of document.querySelectorAll("input[name=theme]")) {
    radio.checked = radio.value === theme;
  }
}

/** Wires the switch; other tabs follow. */
export function startTheme() {
  show(forGood.get(NAME) ?? "auto");
  for (const radio of document.querySelectorAll("input[name=theme]")) {
    radio.addEventListener("change", () => {
      forGood.set(NAME, radio.value);
      show(radio.value);
    });
  }
  addEventListener("storage", (event) => {
    if (event.key === NAME) show(event.newValue ?? "auto");
  });
}
