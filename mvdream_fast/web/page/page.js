// The page: asks the server for what there is, shows it, and hands on what a person does. All of the state is the
// server's (and the address says which thing is looked at), so that a reload or another tab shows the same.
import {$, call, lasting, list, make, set, show, size, when} from "./base.js";
import {Turner} from "./turner.js";

const BUSY_MS = 800, IDLE_MS = 4000, HIDDEN_MS = 15000, PAGE = 48, MAX_PHOTO_BYTES = 32 << 20;
const STATES = {queued: "Waiting", running: "At work", done: "Done", failed: "Failed", cancelled: "Cancelled"};
const WORDS = {
  views: {running: "Drawing the four views", done: "Four views"},
  asset: {running: "Growing in 3D", done: "The asset is done"},
  subject: {running: "Learning it", done: "It is learned"},
};
const KINDS = {views: "four views", asset: "3D asset", subject: "learned subject"};
const still = matchMedia("(prefers-reduced-motion: reduce)");

let state = null, wanted = PAGE, timer = 0, asked = 0, shown = {}, told = new Map();

// --- The server -------------------------------------------------------------------------------------------------

async function refresh() {
  clearTimeout(timer);
  const turn = ++asked;
  const query = new URLSearchParams({find: $("find").value, limit: wanted, id: chosenId()});
  try {
    const found = await call("GET", `api/state?${query}`);
    if (turn !== asked) return;  // a later question is on its way
    state = found;
    $("offline").hidden = true;
    render();
  } catch (error) {
    if (turn !== asked) return;
    set($("offline"), error.message);
    $("offline").hidden = false;
  }
  const busy = state && (state.running || state.waiting);
  timer = setTimeout(refresh, document.hidden ? HIDDEN_MS : busy ? BUSY_MS : IDLE_MS);
}

// Runs what a button or a form asks for; its error goes to the element `where`. Pressed again meanwhile, it does
// nothing (but keeps the focus, which a disabled button would lose).
async function act(button, where, action) {
  if (button.getAttribute("aria-disabled") === "true") return;
  where.hidden = true;
  button.setAttribute("aria-disabled", "true");
  try {
    const made = await action();
    if (made && made.id) choose(made.id);
    await refresh();
  } catch (error) {
    where.textContent = error.message;
    where.hidden = false;
  } finally {
    button.removeAttribute("aria-disabled");
  }
}

// --- Which thing is looked at -----------------------------------------------------------------------------------

const chosenId = () => (/^#([0-9a-z-]+)$/.exec(location.hash) || ["", ""])[1];

function choose(id) {
  if (chosenId() !== id) location.hash = id;
}

function say(text) {
  $("status").textContent = text;
}

// Says what came to an end or failed since the last look, and every quarter of what is looked at.
function announce() {
  const things = [...state.queue, ...state.shelf, ...(state.chosen ? [state.chosen] : [])];
  for (const thing of things) {
    const quarter = thing.total ? Math.floor(4 * thing.done / thing.total) : 0, before = told.get(thing.id);
    const now = `${thing.state} ${state.chosen && thing.id === state.chosen.id ? quarter : ""}`.trim();
    told.set(thing.id, now);
    if (before === undefined || before === now) continue;
    const how = thing.state === "running" && quarter ? `${25 * quarter} percent` : STATES[thing.state].toLowerCase();
    say(`${thing.title}, ${KINDS[thing.kind]}: ${how}`);
  }
}

// --- What is shown ----------------------------------------------------------------------------------------------

function render() {
  const {running, waiting, chosen} = state;
  set($("load"), running + waiting ? `${running} at work, ${waiting} waiting` : "Nothing at work");
  set($("place"), state.place);
  renderStage(chosen);
  renderQueue(state.queue);
  renderShelf();
  renderSubjects();
  announce();
  const share = chosen && chosen.total ? `${Math.floor(100 * chosen.done / chosen.total)} % · ` : "";
  document.title = chosen ? `${share}${chosen.title} · mvdream_fast` : "mvdream_fast";
}

function pace(thing) {
  if (thing.state === "queued") return thing.ahead ? `${thing.ahead} before it` : "Next";
  if (!thing.total) return [thing.note, thing.done ? `step ${thing.done}` : ""].filter(Boolean).join(": ");
  const left = thing.left_s === null ? "" : `, ${lasting(thing.left_s)}`;
  return `${thing.note ? `${thing.note}: ` : ""}step ${thing.done} of ${thing.total}${left}`;
}

function renderStage(thing) {
  const focused = document.activeElement;
  $("stage").hidden = !thing;
  if (!thing) return;
  set($("stage-title"), thing.title);
  set($("stage-about"), [KINDS[thing.kind], ...thing.about, when(thing.when)].join(" · "));
  set($("stage-state"), WORDS[thing.kind][thing.state] || STATES[thing.state]);
  const active = thing.state === "running" || thing.state === "queued";
  $("stage-progress").hidden = !active;
  if (thing.total) $("bar").value = thing.done / thing.total;
  else if (thing.state === "running") $("bar").removeAttribute("value");
  else $("bar").value = 0;
  set($("stage-pace"), pace(thing));
  $("stage-error").hidden = thing.state !== "failed" && !shown.error;
  if (thing.state === "failed") set($("stage-error"), thing.error);
  set($("another"), `Draw another (seed ${thing.seed + 1})`);
  for (const name of ["grow", "use", "retry", "another", "cancel"]) $(name).hidden = !thing.can.includes(name);
  renderViews(thing, active);
  renderGrowth(thing);
  renderMesh(thing);
  $("downloads").hidden = !thing.files.length;
  list($("files"), thing.files, (file) => file.url, (child, file) => {
    const bytes = make("span", {}, size(file.bytes));
    child.replaceChildren(make("a", {class: "button", href: file.url, download: file.name}, file.label, bytes));
  });
  if ($("stage").contains(focused) && !focused.checkVisibility()) $("stage-title").focus({preventScroll: true});
}

function renderViews(thing, active) {
  $("views").hidden = !thing.views && !(active && !thing.previews.length);
  const subject = thing.kind === "subject";
  set($("views-caption"), subject ? "What the model draws of it now" : "Four views, as the model draws them");
  show($("views-image"), thing.views, `Four views of ${thing.title}: from the front and in quarter turns`);
  $("views-wait").hidden = Boolean(thing.views);
  set($("views-wait"), thing.state === "queued" ? "Waiting for its turn" : subject ? "Learning …" : "Drawing …");
}

function renderGrowth(thing) {
  const previews = thing.previews, slider = $("growth-step");
  const follows = shown.growth !== thing.id || slider.value === slider.max;
  $("growth").hidden = !previews.length;
  if (!previews.length) return;
  shown.growth = thing.id;
  shown.previews = previews;
  slider.max = previews.length - 1;
  if (follows) slider.value = previews.length - 1;
  renderStep();
}

function renderStep() {
  const {step, url} = shown.previews[$("growth-step").value];
  show($("growth-image"), url, `Four renders of the asset after ${step} steps`);
  set($("growth-at"), `step ${step}`);
  $("growth-step").setAttribute("aria-valuetext", `after ${step} steps`);
}

let turner = null;

async function renderMesh(thing) {
  const spin = document.querySelector("[data-turn=spin]");
  turner ||= new Turner($("canvas"), (on) => spin.setAttribute("aria-pressed", on));
  $("turner").hidden = !thing.mesh || !turner.works;
  $("stage").classList.toggle("made", Boolean(thing.mesh));
  show($("turntable"), turner.works ? "" : thing.turntable, `${thing.title}, turning`);
  if (shown.mesh === thing.mesh) return;
  shown.mesh = thing.mesh;
  if (!turner.works) return;
  turner.clear();
  if (!thing.mesh) return;
  $("canvas").setAttribute("aria-label", `${thing.title}, a 3D asset to turn`);
  try {
    const mesh = await (await fetch(thing.mesh, {credentials: "same-origin"})).arrayBuffer();
    if (shown.mesh !== thing.mesh) return;  // another thing is looked at by now
    turner.reset();
    await turner.show(mesh);
    if (!still.matches) greet();
  } catch {
    shown.mesh = null;  // the server does not answer: with the next look
  }
}

// One turn, so that it is seen to be a thing; not for people who asked for less motion.
function greet() {
  turner.spin(true);
  setTimeout(() => turner.spin(false), 4000);
}

function renderQueue(things) {
  const focused = document.activeElement && $("jobs").contains(document.activeElement);
  $("queue").hidden = !things.length;
  list($("jobs"), things, (thing) => thing.id, (child, thing) => {
    if (!child.firstChild) {
      const cancel = make("button", {type: "button"}, "Cancel"), words = make("p", {class: "hint"});
      const stop = () => call("POST", `api/jobs/${thing.id}/cancel`);
      cancel.addEventListener("click", () => act(cancel, $("ask-error"), stop));
      child.append(make("div", {}, make("a", {href: `#${thing.id}`}), words), make("progress", {max: 1}), cancel);
    }
    set(child.querySelector("a"), thing.title);
    set(child.querySelector("p"), `${KINDS[thing.kind]}: ${pace(thing) || STATES[thing.state].toLowerCase()}`);
    const bar = child.querySelector("progress");
    bar.value = thing.total ? thing.done / thing.total : 0;
    bar.setAttribute("aria-label", `Progress of ${thing.title}`);
    child.querySelector("button").setAttribute("aria-label", `Cancel ${thing.title}, ${KINDS[thing.kind]}`);
  });
  if (focused && !$("jobs").contains(document.activeElement)) $("main").focus();
}

function renderShelf() {
  const cards = state.shelf.map(({id, title, kind, state, when, thumb}) => ({id, title, kind, state, when, thumb}));
  list($("shelf"), cards, (thing) => thing.id, (child, thing) => {
    const image = make("img", {alt: "", loading: "lazy", class: thing.kind === "subject" ? "whole" : ""});
    const about = [thing.state === "done" ? KINDS[thing.kind] : STATES[thing.state], when(thing.when)].join(" · ");
    const link = child.firstChild || child.appendChild(make("a", {href: `#${thing.id}`}));
    if (thing.thumb) image.src = thing.thumb;
    link.replaceChildren(make("span", {class: "thumb"}, ...(thing.thumb ? [image] : [])),
      make("span", {class: "words"}, thing.title), make("span", {class: "when"}, about));
  });
  for (const child of $("shelf").children) {
    const link = child.firstChild;
    if (state.chosen && child.dataset.key === state.chosen.id) link.setAttribute("aria-current", "true");
    else link.removeAttribute("aria-current");
  }
  $("more").hidden = !state.more;
  $("empty").hidden = state.shelf.length > 0;
  set($("empty"), $("find").value ? "Nothing here has these words." : "Nothing yet. What you make is kept here.");
}

function renderSubjects() {
  const menu = $("subject"), kept = menu.value, sign = JSON.stringify(state.subjects);
  if (menu.dataset.sign === sign) return;
  menu.dataset.sign = sign;
  const learned = state.subjects.map((subject) => make("option", {value: subject.id}, subject.title));
  menu.replaceChildren(make("option", {value: ""}, state.model[0].toUpperCase() + state.model.slice(1)), ...learned);
  menu.value = state.subjects.some((subject) => subject.id === kept) ? kept : "";
}

// --- What a person does -----------------------------------------------------------------------------------------

const request = () => ({
  prompt: $("prompt").value, seed: Number($("seed").value), subject: $("subject").value,
  negative_prompt: $("negative").value,
});

$("ask").addEventListener("submit", (event) => {
  event.preventDefault();
  act(event.submitter, $("ask-error"), async () => {
    const made = await call("POST", "api/views", request());
    $("stage-title").focus({preventScroll: true});
    return made;
  });
});

for (const word of document.querySelectorAll("[data-prompt]")) {
  word.addEventListener("click", () => { $("prompt").value = word.dataset.prompt; $("prompt").focus(); });
}

const ofChosen = (id, path, body) => $(id).addEventListener("click", () => {
  shown.error = false;
  act($(id), $("stage-error"), () => call("POST", `api/jobs/${state.chosen.id}/${path}`, body ? body() : {}))
    .finally(() => { shown.error = !$("stage-error").hidden; });
});
ofChosen("grow", "grow", () => ({pace: $("pace").value}));
ofChosen("cancel", "cancel");
ofChosen("retry", "retry");

// The same words with the next seed.
$("another").addEventListener("click", () => {
  const {title, subject, negative_prompt: negative, seed} = state.chosen;
  const fields = {prompt: title, subject, negative, seed: seed + 1};
  for (const [name, value] of Object.entries(fields)) $(name).value = value;
  act($("another"), $("stage-error"), () => call("POST", "api/views", request()));
});

$("use").addEventListener("click", () => {
  $("subject").value = state.chosen.id;
  $("prompt").value = state.chosen.title;
  $("prompt").focus();
});

addEventListener("hashchange", () => {
  shown = {mesh: shown.mesh};
  $("stage-error").hidden = true;
  refresh().then(() => {
    if (!state.chosen) return;
    $("stage").scrollIntoView({behavior: still.matches ? "auto" : "smooth", block: "nearest"});
    $("stage-title").focus({preventScroll: true});
  });
});
$("find").addEventListener("input", () => { wanted = PAGE; refresh(); });
$("more").addEventListener("click", () => { wanted += PAGE; refresh(); });
$("growth-step").addEventListener("input", renderStep);
for (const button of document.querySelectorAll("[data-turn]")) {
  button.addEventListener("click", () => turner.turn(button.dataset.turn));
}
document.addEventListener("visibilitychange", () => { if (!document.hidden) refresh(); });

// --- Photos -----------------------------------------------------------------------------------------------------

const photos = new Map();  // the server's name of a photo -> what the list shows of it

$("photos").addEventListener("change", async (event) => {
  const input = event.target, complaints = [];
  for (const file of input.files) {
    if (file.size > MAX_PHOTO_BYTES) {
      complaints.push(`${file.name} has more than ${MAX_PHOTO_BYTES >> 20} MB`);
      continue;
    }
    try {
      const {id, url} = await call("POST", "api/photos", file);
      if (!photos.has(id)) photos.set(id, addPhoto(id, url, file.name));
    } catch (error) {
      complaints.push(`${file.name}: ${error.message}`);
    }
  }
  input.value = "";
  $("teach-error").textContent = complaints.join("; ");
  $("teach-error").hidden = !complaints.length;
  say(`${photos.size} photos are there`);
});

function addPhoto(id, url, name) {
  const remove = make("button", {type: "button", "aria-label": `Leave out ${name}`}, "Leave out");
  const child = make("li", {}, make("img", {src: url, alt: name}), remove);
  remove.addEventListener("click", () => { photos.delete(id); child.remove(); $("photos").focus(); });
  $("uploads").append(child);
  return child;
}

$("teach").addEventListener("submit", (event) => {
  event.preventDefault();
  act(event.submitter, $("teach-error"), async () => {
    const made = await call("POST", "api/subjects", {noun: $("noun").value, photos: [...photos.keys()]});
    photos.forEach((child) => child.remove());
    photos.clear();
    return made;
  });
});

refresh();
