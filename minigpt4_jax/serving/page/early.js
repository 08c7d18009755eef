// For: the chosen colours before anything is drawn, so that a dark page never flashes white. Loaded as a plain script
// because modules run too late for that. Not for: changing them (theme.js).
try {
  const chosen = localStorage.getItem("minigpt4.theme");
  if (chosen === "light" || chosen === "dark") document.documentElement.dataset.theme = chosen;
} catch {
  // A browser that keeps nothing for this page: the system's colours hold (storage.js says so when it matters).
}
