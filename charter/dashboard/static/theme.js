// The chosen theme, before anything is drawn: "light", "dark", or nothing for what the system says.
"use strict";
try {
  const theme = localStorage.getItem("charter-theme");
  if (theme === "light" || theme === "dark") document.documentElement.dataset.theme = theme;
} catch {
  // Storage is forbidden here: the system's theme it is.
}
document.documentElement.classList.add("with-script");
