// The annotator's page. Texts of tasks reach it as JSON and are shown with textContent, never as HTML.
"use strict";

const $ = (id) => document.getElementById(id);
const token = decodeURIComponent(location.hash.slice(1));
const LETTERS = "ABCDEFGHIJKLMNOPQRSTUVWXYZ";
const PREFERENCES = [
  ["A is much better", 3], ["A is better", 2], ["A is slightly better", 1], ["Equal", 0],
  ["B is slightly better", -1], ["B is better", -2], ["B is much better", -3],
];
let session = null; // what the server told at the start
let task = null;
let began = 0; // when the task was shown
let away = 0; // milliseconds that the page was hidden meanwhile
let hiddenSince = 0;
let draft = null; // what is chosen so far: {choice, order, ties, criteria, touched}
let busy = false;

function element(tag, attributes = {}, ...children) {
  const made = document.createElement(tag);
  for (const [name, value] of Object.entries(attributes)) {
    if (name === "text") made.textContent = value;
    else if (name.startsWith("on")) made.addEventListener(name.slice(2), value);
    else if (value === true) made.setAttribute(name, "");
    else if (value !== false && value !== null) made.setAttribute(name, value);
  }
  made.append(...children);
  return made;
}

const say = (text) => { $("status").textContent = text; };
const complain = (text) => { $("trouble").textContent = text; };

// ---- what outlives a reload: the draft of a task, and a label that the server has not acknowledged yet

const key = (what) => `lit-align ${session.annotator} ${what}`;
function keep(what, value) {
  try {
    if (value === null) localStorage.removeItem(key(what));
    else localStorage.setItem(key(what), JSON.stringify(value));
  } catch { /* private windows may have no storage: a reload then begins the task anew */ }
}
function kept(what) {
  try { return JSON.parse(localStorage.getItem(key(what))); } catch { return null; }
}
const saveDraft = () => keep("draft", { task: task.id, draft });

// ---- requests

async function ask(path, body) {
  const options = { headers: { Authorization: `Bearer ${token}` }, cache: "no-store" };
  if (body !== undefined) {
    options.method = "POST";
    options.headers["Content-Type"] = "application/json";
    options.body = JSON.stringify(body);
  }
  const response = await fetch(path, options);
  const answer = await response.json();
  if (response.ok) return answer;
  const error = new Error(answer.error || `status ${response.status}`);
  error.status = response.status;
  error.after = Number(response.headers.get("Retry-After")) || 0;
  throw error;
}

const pause = (seconds) => new Promise((resolve) => setTimeout(resolve, seconds * 1000));

// Send until the server answers: a lost connection loses nothing, and a repeated label is stored once.
async function insist(path, body) {
  for (let wait = 1; ; wait = Math.min(wait * 2, 15)) {
    try {
      const answer = await ask(path, body);
      complain("");
      return answer;
    } catch (error) {
      if (error.status && error.status !== 429 && error.status < 500) throw error;
      complain("No connection: your answer is kept here and is sent again. Do not close the page.");
      await pause(error.after || wait);
    }
  }
}

async function send(label) {
  if (busy) return;
  busy = true;
  buttons();
  keep("pending", label);
  try {
    const answer = await insist("/api/labels", label);
    keep("pending", null);
    keep("draft", null);
    say("Stored.");
    take(answer);
  } catch (error) {
    keep("pending", null);
    complain(`Not stored: ${error.message}`);
  } finally {
    busy = false;
    buttons();
  }
}

// ---- showing a task

function take(answer, said = null) {
  const { done, left, seconds_left } = answer.progress;
  $("bar").max = Math.max(done + left, 1);
  $("bar").value = done;
  const minutes = seconds_left === null ? "" : `, about ${Math.max(1, Math.round(seconds_left / 60))} min left`;
  $("done").textContent = `${done} done, ${left} to go${left ? minutes : ""}`;
  $("undo").disabled = !done;
  task = answer.task;
  $("answer").hidden = !task;
  $("prompt").replaceChildren();
  if (!task) {
    $("task-title").textContent = answer.screened
      ? "Thank you. There are no further tasks for you: please talk to whoever sent you this link."
      : "Thank you. There are no further tasks for you now.";
    return;
  }
  began = Date.now();
  away = 0;
  const saved = kept("draft");
  draft = said ? drafted(said) : saved && saved.task === task.id ? saved.draft : fresh();
  const several = task.completions.length > 2;
  $("task-title").textContent = several ? "Order these completions, the best first" : "Which completion is better?";
  $("prompt").append(...task.prompt.map((turn) => element("section", { class: "turn" },
    element("h3", { text: turn.role === "prompt" ? "Prompt" : turn.role }), block(turn.content, "the prompt"))));
  show();
  $("reasons").hidden = true;
  $("flag").setAttribute("aria-expanded", "false");
  $("reason").value = "";
  $("task").focus({ preventScroll: true });
  scrollTo(0, 0);
}

const fresh = () => ({ choice: null, order: task.completions.map((_, k) => k), ties: [], criteria: {}, touched: false });

// What was said of a task that is shown again, back in the order on the page.
function drafted(said) {
  const made = fresh();
  if (!said.ranks) return made;
  const here = (values) => said.shown.map((k) => values[k]);
  const ranks = here(said.ranks);
  made.order.sort((a, b) => ranks[a] - ranks[b]);
  made.ties = made.order.filter((k, place) => place && ranks[k] === ranks[made.order[place - 1]]);
  made.touched = true;
  if (ranks.length === 2) made.choice = Math.sign(ranks[1] - ranks[0]) * (said.strength || 0);
  for (const name of Object.keys(said.criteria || {})) made.criteria[name] = here(said.criteria[name]);
  return made;
}

function block(text, what) {
  if (!text) return element("div", { class: "text empty", text: "(empty)" });
  // Long texts scroll, and by keyboard too.
  const long = text.length > 1200 || text.split("\n").length > 16;
  return element("div", long
    ? { class: "text", dir: "auto", text, tabindex: "0", role: "region", "aria-label": what }
    : { class: "text", dir: "auto", text });
}

function show() {
  const two = task.completions.length === 2;
  $("completions").className = two ? "two" : "";
  $("completions").replaceChildren(...(two ? cards() : [ranking()]));
  $("choice").replaceChildren(...(two ? [preference()] : []));
  $("criteria").replaceChildren(...session.criteria.map(criterion));
  buttons();
}

const cards = () => task.completions.map((text, k) => element("section", { class: "card" },
  element("h3", { text: `Completion ${LETTERS[k]}` }), block(text, `completion ${LETTERS[k]}`)));

function radio(name, value, checked, text, change) {
  const input = element("input", { type: "radio", name, value, onchange: change });
  input.checked = checked;
  return element("label", {}, input, element("span", { text }));
}

function preference() {
  const choose = (value) => () => { draft.choice = value; draft.touched = true; saveDraft(); buttons(); };
  return element("fieldset", {}, element("legend", { text: "Your preference" }), element("div", { class: "scale seven" },
    ...PREFERENCES.map(([text, value]) => radio("preference", value, draft.choice === value, text, choose(value)))));
}

function criterion(name, n) {
  const scores = (draft.criteria[name] ||= task.completions.map(() => null));
  const score = (k, value) => () => { scores[k] = value; saveDraft(); buttons(); };
  const numbers = Array.from({ length: session.scale }, (_, i) => i + 1);
  return element("fieldset", {}, element("legend", { text: `${name}: 1 is worst, ${session.scale} is best` }),
    ...task.completions.map((_, k) => element("div", { class: "scale short", role: "radiogroup",
      "aria-label": `${name}, completion ${LETTERS[k]}` }, element("strong", { class: "tie", text: LETTERS[k] }),
      ...numbers.map((value) => radio(`criterion ${n} ${k}`, value, scores[k] === value, `${value}`, score(k, value))))));
}

// ---- ranking: an item is moved by dragging its handle, by its buttons, or by the arrow keys on its handle

const placeOf = (k) => draft.order.indexOf(k);

function ranking() {
  const list = element("ol", { class: "ranking", "aria-label": "Completions, the best first" });
  draft.order.forEach((k) => list.append(item(k)));
  return list;
}

function item(k) {
  const place = placeOf(k);
  const tied = place > 0 && draft.ties.includes(k);
  const name = `Completion ${LETTERS[k]}`;
  const tie = element("input", { type: "checkbox", id: `tie-${k}`, onchange: () => toggleTie(k, "tie") });
  tie.checked = tied;
  const handle = element("button", { type: "button", class: "handle", "data-k": k, text: `${LETTERS[k]} ⠿`,
    "aria-label": `${name}, place ${place + 1} of ${draft.order.length}${tied ? ", tied with the one above" : ""}. `
      + "Arrow keys move it.", onkeydown: (event) => arrow(event, k), onpointerdown: (event) => drag(event, k) });
  return element("li", { class: tied ? "tied" : "", "data-k": k },
    element("div", { class: "moves" }, handle,
      element("button", { type: "button", "aria-label": `${name} up`, text: "↑", disabled: place === 0, "data-up": k,
        onclick: () => move(k, place - 1, "up") }),
      element("button", { type: "button", "aria-label": `${name} down`, text: "↓", "data-down": k,
        disabled: place === draft.order.length - 1, onclick: () => move(k, place + 1, "down") })),
    element("div", { class: "body" }, element("span", { class: "place", text: tied ? "tied" : `place ${place + 1}` }),
      block(task.completions[k], name),
      ...(place ? [element("label", { class: "tie" }, tie, element("span", { text: "ties with the one above" }))] : [])));
}

function move(k, to, from) {
  if (to < 0 || to >= draft.order.length) return;
  draft.order.splice(placeOf(k), 1);
  draft.order.splice(to, 0, k);
  draft.ties = draft.ties.filter((other) => other !== k && placeOf(other) > 0);
  changed(k, from);
}

function toggleTie(k, from) {
  if (placeOf(k) === 0) return;
  draft.ties = draft.ties.includes(k) ? draft.ties.filter((other) => other !== k) : [...draft.ties, k];
  changed(k, from);
}

function changed(k, from) {
  draft.touched = true;
  saveDraft();
  $("completions").replaceChildren(ranking());
  const wanted = from === "tie" ? `#tie-${k}` : from === "handle" ? `.handle[data-k="${k}"]` : `[data-${from}="${k}"]`;
  const found = document.querySelector(wanted);
  (found && !found.disabled ? found : document.querySelector(`.handle[data-k="${k}"]`)).focus();
  say(`Completion ${LETTERS[k]} is at place ${placeOf(k) + 1} of ${draft.order.length}`
    + (draft.ties.includes(k) ? ", tied with the one above." : "."));
}

function arrow(event, k) {
  const step = { ArrowUp: -1, ArrowDown: 1 }[event.key];
  if (step) move(k, placeOf(k) + step, "handle");
  else if (event.key === "=") toggleTie(k, "handle");
  else return;
  event.preventDefault();
  event.stopPropagation();
}

function drag(event, k) {
  if (event.button !== 0) return;
  const list = document.querySelector("ol.ranking");
  const held = list.querySelector(`li[data-k="${k}"]`);
  const handle = event.currentTarget;
  const others = [...list.children].filter((other) => other !== held);
  let to = placeOf(k);
  held.classList.add("dragged");
  handle.setPointerCapture(event.pointerId); // the list stays as it is until the end: moving the handle would end it
  const follow = (moved) => {
    const above = others.filter((other) => {
      const box = other.getBoundingClientRect();
      return moved.clientY > box.top + box.height / 2;
    });
    to = above.length;
    others.forEach((other, n) => {
      other.classList.toggle("over", n === to);
      other.classList.toggle("under", to === others.length && n === to - 1);
    });
  };
  const end = (ended) => {
    handle.removeEventListener("pointermove", follow);
    held.classList.remove("dragged");
    others.forEach((other) => other.classList.remove("over", "under"));
    if (ended.type === "pointerup" && to !== placeOf(k)) move(k, to, "handle");
  };
  handle.addEventListener("pointermove", follow);
  handle.addEventListener("pointerup", end, { once: true });
  handle.addEventListener("pointercancel", end, { once: true });
}

// ---- answering

const complete = () => session.criteria.every((name) => (draft.criteria[name] || []).every((score) => score !== null));

function buttons() {
  const ready = task && !busy && complete() && (task.completions.length > 2 || draft.choice !== null);
  $("submit").disabled = !ready;
  for (const id of ["skip", "flag", "send-flag"]) $(id).disabled = busy || !task;
}

function label(kind) {
  const id = crypto.getRandomValues(new Uint32Array(5)).reduce((text, n) => text + n.toString(16).padStart(8, "0"), "");
  const hidden = away + (hiddenSince ? Date.now() - hiddenSince : 0);
  return { id, task: task.id, kind, seconds: Math.min(Math.max(0, Date.now() - began - hidden) / 1000, 1e6),
    guideline: session.version };
}

function submit() {
  if ($("submit").disabled) return;
  const made = label("label");
  if (session.criteria.length) made.criteria = Object.fromEntries(session.criteria.map((n) => [n, draft.criteria[n]]));
  if (task.completions.length === 2) {
    made.ranks = draft.choice === 0 ? [0, 0] : draft.choice > 0 ? [0, 1] : [1, 0];
    if (draft.choice) made.strength = Math.abs(draft.choice);
  } else if (!draft.touched) {
    draft.touched = true; // an order that nobody has looked at is no label
    say("You have moved nothing. Submit again if this order is right.");
    return;
  } else {
    made.ranks = Array(draft.order.length);
    let rank = 0;
    draft.order.forEach((k, place) => {
      if (place && !draft.ties.includes(k)) rank = place;
      made.ranks[k] = rank;
    });
  }
  send(made);
}

function flag(open = $("reasons").hidden) {
  $("reasons").hidden = !open;
  $("flag").setAttribute("aria-expanded", String(open));
  if (open) $("reason").focus();
}

async function undo() {
  if (busy) return;
  busy = true;
  try {
    const answer = await ask("/api/undo", {});
    take(answer, answer.said);
    say("Your last answer is withdrawn: change it and submit again.");
  } catch (error) {
    complain(error.status ? error.message : "No connection: nothing was undone.");
  } finally {
    busy = false;
    buttons();
  }
}

function toggle(button, panel) {
  $(panel).hidden = !$(panel).hidden;
  $(button).setAttribute("aria-expanded", String(!$(panel).hidden));
}

document.addEventListener("keydown", (event) => {
  if (!task || event.ctrlKey || event.metaKey) return;
  const pressed = event.key.toLowerCase();
  if (event.altKey) {
    const call = { s: () => send(label("skip")), f: () => flag(), u: undo, g: () => toggle("guide", "guideline") }[pressed];
    if (call) { event.preventDefault(); call(); }
    return;
  }
  if (event.target.closest("textarea")) return;
  const typing = event.target.closest("button, a, input[type=checkbox]");
  if (event.key === "Enter" && !typing) { event.preventDefault(); submit(); return; }
  if (task.completions.length === 2 && pressed >= "1" && pressed <= "7" && !event.target.name?.startsWith("criterion")) {
    document.querySelectorAll("#choice input")[Number(pressed) - 1].click();
    return;
  }
  const handle = document.querySelector(`.handle[data-k="${pressed.length === 1 ? LETTERS.toLowerCase().indexOf(pressed) : -1}"]`);
  if (handle) handle.focus();
});

document.addEventListener("visibilitychange", () => {
  if (document.hidden) hiddenSince = Date.now();
  else if (hiddenSince) { away += Date.now() - hiddenSince; hiddenSince = 0; }
});

$("answer").addEventListener("submit", (event) => { event.preventDefault(); submit(); });
$("skip").addEventListener("click", () => send(label("skip")));
$("flag").addEventListener("click", () => flag());
$("send-flag").addEventListener("click", () => {
  const reason = $("reason").value.trim();
  if (reason) send({ ...label("flag"), reason });
  else complain("Write what is wrong with the task.");
});
$("undo").addEventListener("click", undo);
$("guide").addEventListener("click", () => toggle("guide", "guideline"));
$("help").addEventListener("click", () => toggle("help", "keys"));

async function begin() {
  if (!token) {
    $("task-title").textContent = "Open the whole link that you were given";
    $("answer").hidden = true;
    return;
  }
  try {
    session = await insist("/api/session");
  } catch (error) {
    $("task-title").textContent = "This page cannot be opened";
    $("answer").hidden = true;
    complain(error.message);
    return;
  }
  $("guideline").innerHTML = session.guideline; // made by the server from Markdown, raw HTML escaped
  $("guideline").querySelectorAll("a").forEach((a) => { a.target = "_blank"; a.rel = "noopener noreferrer"; });
  if (matchMedia("(max-width: 760px)").matches) toggle("guide", "guideline");
  const pending = kept("pending");
  take(session);
  if (pending) await send(pending); // stored before the reload or not: the server knows its id
}

begin();
