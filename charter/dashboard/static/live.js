// Refreshes the page without a reload, switches the theme, and shows the values of a chart in a tooltip.
//
// The script requests the page again with its ETag and merges the changes into the current document. Unchanged nodes stay, so
// that focus, selection, scroll position, input and open <details> elements survive. The script never turns text into markup: the
// server escapes all text, DOMParser runs no scripts, and the content security policy allows only the scripts of this server.
"use strict";

const REFRESH_INTERVAL_MS = 2000;
const RETRY_INTERVAL_MS = 8000; // while the server is unreachable
const MAX_LOOKAHEAD = 40; // siblings to search for a matching node; the limit keeps a merge linear
const live = { enabled: document.body.dataset.live !== "off", etag: "", timer: 0, unreachable: false };

// Merge a new document into the current one

function getNodeKey(node) {
  return node.nodeType === Node.ELEMENT_NODE ? node.tagName + "|" + (node.id || node.getAttribute("href") || "") : node.nodeType;
}

function mergeAttributes(current, updated) {
  for (const { name } of [...current.attributes]) {
    if (!updated.hasAttribute(name) && !(name === "open" && current.tagName === "DETAILS")) current.removeAttribute(name);
  }
  for (const { name, value } of updated.attributes) {
    if (current.getAttribute(name) !== value) current.setAttribute(name, value);
  }
}

function merge(current, updated) {
  if (current.isEqualNode(updated)) return;
  if (current.nodeType !== Node.ELEMENT_NODE) {
    if (current.nodeValue !== updated.nodeValue) current.nodeValue = updated.nodeValue;
    return;
  }
  if (current.tagName === "FORM" && current.contains(document.activeElement)) return; // the user edits this form
  mergeAttributes(current, updated);
  const remaining = [...current.childNodes];
  for (const child of updated.childNodes) {
    const index = remaining.findIndex((node, n) => n < MAX_LOOKAHEAD && getNodeKey(node) === getNodeKey(child));
    if (index < 0) {
      current.insertBefore(document.importNode(child, true), remaining[0] || null);
    } else {
      for (const removed of remaining.splice(0, index)) removed.remove();
      merge(remaining.shift(), child);
    }
  }
  for (const removed of remaining) removed.remove();
}

// Refresh the page

function hasSelection() {
  const selection = window.getSelection();
  return selection && !selection.isCollapsed && document.getElementById("main").contains(selection.anchorNode);
}

async function fetchPage() {
  const headers = live.etag ? { "If-None-Match": live.etag } : {};
  const response = await fetch(location.href, { headers, credentials: "same-origin", redirect: "error" });
  live.unreachable = false;
  if (response.status === 304) return;
  if (!(response.headers.get("Content-Type") || "").startsWith("text/html")) throw new Error("the response is not a page");
  const page = new DOMParser().parseFromString(await response.text(), "text/html");
  document.body.dataset.activity = page.body.dataset.activity;
  const main = page.getElementById("main");
  if (!main || hasSelection()) return; // a merge would clear the user's selection
  live.etag = response.headers.get("ETag") || "";
  merge(document.getElementById("main"), main);
  merge(document.querySelector(".run-form"), page.querySelector(".run-form"));
}

function updateLiveButton() {
  const button = document.getElementById("live");
  const activity = document.body.dataset.activity; // whether a stage, a sink or a trainer runs: running, stopped or unknown
  const state = !live.enabled ? "paused" : live.unreachable ? "unreachable" : activity === "running" ? "live" : activity;
  button.dataset.state = state;
  button.setAttribute("aria-pressed", String(live.enabled));
  button.title = {
    live: "Workers run. The page refreshes every 2 seconds. Press to pause.",
    stopped: "No stage, sink or trainer runs. The page refreshes every 2 seconds. Press to pause.",
    unknown: "It is unknown whether workers run. The page refreshes every 2 seconds. Press to pause.",
    paused: "The page does not refresh. Press to resume.",
    unreachable: "The dashboard is unreachable. The page shows the last data.",
  }[state];
  button.querySelector(".state").textContent = {
    live: "live", stopped: "stopped", unknown: "unknown", paused: "paused", unreachable: "offline",
  }[state];
}

async function refresh() {
  if (live.enabled && !document.hidden) {
    try {
      await fetchPage();
    } catch {
      live.unreachable = true; // the button shows it; the timer tries again
    }
    updateLiveButton();
  }
  live.timer = setTimeout(refresh, live.unreachable ? RETRY_INTERVAL_MS : REFRESH_INTERVAL_MS);
}

function refreshNow() {
  clearTimeout(live.timer);
  refresh();
}

// Theme

const THEMES = ["auto", "light", "dark"];

function showTheme(button) {
  const theme = document.documentElement.dataset.theme || "auto";
  button.querySelector(".state").textContent = theme;
  button.title = "Press to switch the theme: auto, light, dark";
}

function selectNextTheme(button) {
  const theme = THEMES[(THEMES.indexOf(document.documentElement.dataset.theme || "auto") + 1) % THEMES.length];
  if (theme === "auto") delete document.documentElement.dataset.theme;
  else document.documentElement.dataset.theme = theme;
  try {
    localStorage.setItem("charter-theme", theme);
  } catch {
    // Storage is blocked: the theme applies to this page only.
  }
  showTheme(button);
}

// Tooltips of charts

const tooltip = document.createElement("div");
tooltip.className = "tooltip";
tooltip.setAttribute("role", "status");
tooltip.hidden = true;

function getTitle(marker) {
  const title = marker.querySelector("title");
  return title ? title.textContent : "";
}

// Return the marker nearest to the pointer within 24 pixels, or null. In bar charts and dense curves only the x distance counts.
function findNearestMarker(chart, x, y) {
  let nearest = null;
  let minDistance = 24;
  for (const marker of chart.querySelectorAll("circle, rect.bar, rect.dot")) {
    const box = marker.getBoundingClientRect();
    const dx = Math.abs(box.left + box.width / 2 - x);
    const ignoresY = marker.classList.contains("hover-target") || marker.classList.contains("bar");
    const distance = ignoresY ? dx : Math.hypot(dx, box.top + box.height / 2 - y);
    if (distance < minDistance && getTitle(marker)) [nearest, minDistance] = [marker, distance];
  }
  return nearest;
}

function updateTooltip(event) {
  const chart = event.target.closest && event.target.closest("svg.chart, svg.timeline, svg.order-comparison");
  const marker = chart && findNearestMarker(chart, event.clientX, event.clientY);
  for (const other of document.querySelectorAll(".highlighted")) if (other !== marker) other.classList.remove("highlighted");
  tooltip.hidden = !marker;
  if (!marker) return;
  marker.classList.add("highlighted");
  tooltip.textContent = getTitle(marker);
  const box = marker.getBoundingClientRect();
  const halfWidth = tooltip.offsetWidth / 2;
  const center = Math.min(Math.max(box.left + box.width / 2, halfWidth + 8), window.innerWidth - halfWidth - 8);
  tooltip.style.left = center + window.scrollX + "px";
  tooltip.style.top = box.top + window.scrollY - 10 + "px";
}

// Event handlers

document.addEventListener("visibilitychange", () => !document.hidden && refreshNow());
document.addEventListener("pointermove", updateTooltip, { passive: true });
document.addEventListener("change", (event) => {
  const form = event.target.closest("form[data-auto-submit]");
  if (form && event.target.tagName === "SELECT") form.requestSubmit();
});
// Leave empty fields out of the address of a search. Send a form with an action only once.
document.addEventListener("submit", (event) => {
  if (event.target.method === "post") {
    if (event.target.dataset.sent) event.preventDefault();
    event.target.dataset.sent = "1";
  }
  for (const field of event.target.querySelectorAll("input[name], select[name]")) {
    if (event.target.method === "get" && field.value === "") field.disabled = true;
  }
});
// The browser can restore the page from its cache, with the fields still disabled.
window.addEventListener("pageshow", () => {
  for (const field of document.querySelectorAll("form :disabled")) field.disabled = false;
  for (const form of document.querySelectorAll("form[data-sent]")) delete form.dataset.sent;
});
// Press the button or link with this key. A key that is held down must not label the next pair, too.
function pressShortcut(event) {
  if (event.repeat || event.ctrlKey || event.metaKey || event.altKey) return;
  if (/^(INPUT|TEXTAREA|SELECT)$/.test(document.activeElement.tagName)) return;
  for (const target of document.querySelectorAll("[data-key]"))
    if (target.dataset.key === event.key) {
      event.preventDefault(); // the click can focus an empty required field, and the key must not be typed into it
      target.click();
    }
}

document.addEventListener("keydown", pressShortcut);
document.addEventListener("keydown", (event) => {
  if (event.key === "Enter" && (event.ctrlKey || event.metaKey) && event.target.tagName === "TEXTAREA") event.target.form.requestSubmit();
  if (event.key === "/" && !/^(INPUT|TEXTAREA|SELECT)$/.test(document.activeElement.tagName)) {
    const search = document.querySelector("input[type=search]");
    if (search) {
      event.preventDefault();
      search.focus();
    }
  }
});

document.body.append(tooltip);
const themeButton = document.getElementById("theme");
themeButton.hidden = false;
themeButton.addEventListener("click", () => selectNextTheme(themeButton));
showTheme(themeButton);
const liveButton = document.getElementById("live");
if (live.enabled) {
  liveButton.hidden = false;
  liveButton.addEventListener("click", () => {
    live.enabled = !live.enabled;
    updateLiveButton();
    if (live.enabled) refreshNow();
  });
  updateLiveButton();
  live.timer = setTimeout(refresh, REFRESH_INTERVAL_MS);
}
document.querySelector("nav [aria-current]")?.scrollIntoView({ block: "nearest", inline: "center" });
