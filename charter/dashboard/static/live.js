// Keeps a page up to date without reloading it, switches the theme, and shows a chart's figures under the pointer.
//
// The page is asked for again with its ETag. What has changed is merged into the page that stands: nodes are kept where they
// are the same, so that what is focused, selected, scrolled, typed or unfolded stays. No text is ever made into markup here: the
// server escapes it, the parser that reads the answer runs no scripts, and the policy of the page allows none but this file.
"use strict";

const EVERY_MS = 2000;
const AWAY_MS = 8000;
const live = { on: document.body.dataset.live !== "off", tag: "", timer: 0, failed: 0, at: Date.now() };

// Merging

function keyOf(node) {
  return node.nodeType === Node.ELEMENT_NODE ? node.tagName + "|" + (node.id || node.getAttribute("href") || "") : node.nodeType;
}

function mergeAttributes(old, fresh) {
  for (const { name } of [...old.attributes]) {
    if (!fresh.hasAttribute(name) && !(name === "open" && old.tagName === "DETAILS")) old.removeAttribute(name);
  }
  for (const { name, value } of fresh.attributes) {
    if (old.getAttribute(name) !== value) old.setAttribute(name, value);
  }
}

function merge(old, fresh) {
  if (old.isEqualNode(fresh)) return;
  if (old.nodeType !== Node.ELEMENT_NODE) {
    if (old.nodeValue !== fresh.nodeValue) old.nodeValue = fresh.nodeValue;
    return;
  }
  if (old.tagName === "FORM" && old.contains(document.activeElement)) return;
  mergeAttributes(old, fresh);
  const wanted = [...fresh.childNodes];
  const there = [...old.childNodes];
  wanted.forEach((child, place) => {
    const at = there.findIndex((node, n) => n < 40 && keyOf(node) === keyOf(child));
    if (at < 0) {
      old.insertBefore(document.importNode(child, true), there[0] || null);
    } else {
      for (const gone of there.splice(0, at)) gone.remove();
      merge(there.shift(), child);
    }
  });
  for (const gone of there) gone.remove();
}

// Asking again

function selecting() {
  const chosen = window.getSelection();
  return chosen && !chosen.isCollapsed && document.getElementById("main").contains(chosen.anchorNode);
}

async function look() {
  const headers = live.tag ? { "If-None-Match": live.tag } : {};
  const answer = await fetch(location.href, { headers, credentials: "same-origin", redirect: "error" });
  live.failed = 0;
  live.at = Date.now();
  if (answer.status === 304) return;
  if (!(answer.headers.get("Content-Type") || "").startsWith("text/html")) throw new Error("no page");
  const page = new DOMParser().parseFromString(await answer.text(), "text/html");
  const main = page.getElementById("main");
  if (!main || selecting()) return;
  live.tag = answer.headers.get("ETag") || "";
  merge(document.getElementById("main"), main);
  merge(document.querySelector(".run-form"), page.querySelector(".run-form"));
}

function show() {
  const button = document.getElementById("live");
  const state = !live.on ? "paused" : live.failed ? "away" : "live";
  button.dataset.state = state;
  button.setAttribute("aria-pressed", String(live.on));
  button.title = state === "away" ? "The dashboard does not answer; the page shows what was known last" : "Press to pause or go on";
  button.querySelector(".state").textContent = state;
}

async function turn() {
  if (live.on && !document.hidden) {
    try {
      await look();
    } catch {
      live.failed += 1; // the server is away: shown on the button, and asked again
    }
    show();
  }
  live.timer = setTimeout(turn, live.failed ? AWAY_MS : EVERY_MS);
}

function goOn() {
  clearTimeout(live.timer);
  turn();
}

// The theme

const THEMES = ["auto", "light", "dark"];

function showTheme(button) {
  const theme = document.documentElement.dataset.theme || "auto";
  button.textContent = { auto: "Auto", light: "Light", dark: "Dark" }[theme];
  button.title = "Theme: " + theme;
}

function nextTheme(button) {
  const theme = THEMES[(THEMES.indexOf(document.documentElement.dataset.theme || "auto") + 1) % THEMES.length];
  if (theme === "auto") delete document.documentElement.dataset.theme;
  else document.documentElement.dataset.theme = theme;
  try {
    localStorage.setItem("charter-theme", theme);
  } catch {
    // Storage is forbidden here: the choice lasts as long as the page.
  }
  showTheme(button);
}

// Figures under the pointer

const tip = document.createElement("div");
tip.className = "tip";
tip.setAttribute("role", "status");
tip.hidden = true;

function titleOf(mark) {
  const title = mark.querySelector("title");
  return title ? title.textContent : "";
}

function nearest(chart, x, y) {
  let best = null;
  let least = 24;
  for (const mark of chart.querySelectorAll("circle, rect.bar, rect.dot")) {
    const box = mark.getBoundingClientRect();
    const across = Math.abs(box.left + box.width / 2 - x);
    const away = mark.classList.contains("hit") || mark.classList.contains("bar") ? across : Math.hypot(across, box.top + box.height / 2 - y);
    if (away < least && titleOf(mark)) [best, least] = [mark, away];
  }
  return best;
}

function point(event) {
  const chart = event.target.closest && event.target.closest("svg.chart, svg.timeline, svg.orders");
  const mark = chart && nearest(chart, event.clientX, event.clientY);
  for (const lit of document.querySelectorAll(".lit")) if (lit !== mark) lit.classList.remove("lit");
  tip.hidden = !mark;
  if (!mark) return;
  mark.classList.add("lit");
  tip.textContent = titleOf(mark);
  const box = mark.getBoundingClientRect();
  const half = tip.offsetWidth / 2;
  tip.style.left = Math.min(Math.max(box.left + box.width / 2, half + 8), window.innerWidth - half - 8) + window.scrollX + "px";
  tip.style.top = box.top + window.scrollY - 10 + "px";
}

// Everything in its place

document.addEventListener("visibilitychange", () => !document.hidden && goOn());
document.addEventListener("pointermove", point, { passive: true });
document.addEventListener("change", (event) => {
  const form = event.target.closest("form[data-auto]");
  if (form && event.target.tagName === "SELECT") form.requestSubmit();
});
document.addEventListener("submit", (event) => {
  for (const field of event.target.querySelectorAll("input[name], select[name]")) {
    if (event.target.method === "get" && field.value === "") field.disabled = true;
  }
});
window.addEventListener("pageshow", () => {
  for (const field of document.querySelectorAll("form :disabled")) field.disabled = false;
});
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

document.body.append(tip);
const themeButton = document.getElementById("theme");
themeButton.hidden = false;
themeButton.addEventListener("click", () => nextTheme(themeButton));
showTheme(themeButton);
const liveButton = document.getElementById("live");
if (live.on) {
  liveButton.hidden = false;
  liveButton.addEventListener("click", () => {
    live.on = !live.on;
    show();
    if (live.on) goOn();
  });
  show();
  live.timer = setTimeout(turn, EVERY_MS);
}
document.querySelector("nav [aria-current]")?.scrollIntoView({ block: "nearest", inline: "center" });
