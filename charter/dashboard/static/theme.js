// Apply the stored theme ("light" or "dark") before the browser paints the page. Without it the theme of the system applies.
"use strict";
try {
  const theme = localStorage.getItem("charter-theme");
  if (theme === "light" || theme === "dark") document.documentElement.dataset.theme = theme;
} catch {
  // Storage is blocked: use the theme of the system.
}
document.documentElement.classList.add("with-script");
