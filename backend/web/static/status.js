// The status page: polls `/status`, and shows an error while the backend does not answer.

import { count, drawBoxes, element, svgElement } from "./boxes.js";

const POLL_INTERVAL = 2000; // ms
const TRAINING_STATES = { queued: "waiting for a training worker", reading: "reading annotations", loading: "loading images",
  measuring: "evaluating the current version", rehearsing: "pseudo-labeling images", training: "fine-tuning" };
const SILENT_AFTER = 60; // s without a report, after which the page says so
const MAX_TRAINING_AGE = 24 * 3600; // s for which a finished training is shown
const MAX_FAILED_TASKS = 8; // task ids shown for one reason

let newestImageTime = ""; // sent with each request: images are most of the bytes, and come only when there is a newer one

const byId = (id) => document.getElementById(id);
const isUnfolded = new Map(); // by project: whether people opened or closed its labels
const shown = new Map(); // by element id: the data that it shows, as JSON

/** Replaces the content of an element, unless it shows the same data already: a replaced element loses its focus. */
function show(id, data, ...children) {
  const json = JSON.stringify(data);
  if (shown.get(id) === json) return;
  shown.set(id, json);
  byId(id).replaceChildren(...children.flat());
}

const makeNote = (text) => element("p", { className: "quiet", textContent: text });

function formatDuration(seconds) {
  if (seconds < 3600) return `${Math.floor(seconds / 60)} min`;
  return seconds < 86400 ? `${Math.floor(seconds / 3600)} h` : `${Math.floor(seconds / 86400)} d`;
}

const formatAge = (seconds) => seconds < 60 ? "just now" : `${formatDuration(seconds)} ago`;

function makeCard(title, note, ...children) {
  const head = element("h3", {}, element("b", { textContent: title }), element("span", { className: "quiet", textContent: note }));
  return element("div", { className: "card" }, head, ...children);
}

/** Makes a bar chart of the tasks of each minute. */
function makeSparkline(counts) {
  const highest = Math.max(...counts, 1);
  const svg = svgElement("svg", { viewBox: `0 0 ${counts.length} 20`, preserveAspectRatio: "none", class: "sparkline", role: "img",
    "aria-label": `tasks in each of the last ${counts.length} minutes, at most ${highest}` });
  svg.append(...counts.map((tasks, i) => {
    const height = tasks ? Math.max((20 * tasks) / highest, 1) : 0.3;
    return svgElement("rect", { x: i + 0.1, y: 20 - height, width: 0.8, height });
  }));
  return svg;
}

// -- running commands and trainings --------------------------------------------------------------------------------

function makeProgressBar(done, total) {
  const bar = element("progress", { max: total || 1 });
  if (total) bar.value = done; // else the bar is indeterminate
  return bar;
}

function describeRemainingTime(row, now) {
  const rate = (row.done - row.before) / Math.max(now - row.since, 1);
  if (rate <= 0 || row.done >= row.of) return "";
  const seconds = (row.of - row.done) / rate;
  return `, about ${seconds < 90 ? `${Math.ceil(seconds)} s` : `${Math.round(seconds / 60)} min`} left`;
}

function describeSilence(row, now) {
  return now - row.time > SILENT_AFTER ? `, no report for ${formatDuration(now - row.time)}` : "";
}

function makeBulkCard(row, now) {
  const failed = row.failed ? `, ${row.failed} failed` : "";
  const note = `${row.done} of ${row.of}${failed}${describeSilence(row, now) || describeRemainingTime(row, now)}`;
  return makeCard(row.what, note, makeProgressBar(row.done, row.of));
}

function makeTrainingCard(row, now) {
  const title = `training, project ${row.project}`;
  if (!(row.state in TRAINING_STATES)) return makeCard(title, `${row.state}, ${formatAge(now - row.time)}`, makeNote(row.text || ""));
  const silence = row.state === "queued" ? "" : describeSilence(row, now);
  return makeCard(title, `${TRAINING_STATES[row.state]} ${row.of ? `${row.done} of ${row.of}` : ""}${silence}`, makeProgressBar(row.done, row.of));
}

function makeRunning(status) {
  const trainings = status.trainings.filter((row) => row.state in TRAINING_STATES || status.time - row.time < MAX_TRAINING_AGE);
  const cards = [...status.bulk.map((row) => makeBulkCard(row, status.time)), ...trainings.map((row) => makeTrainingCard(row, status.time))];
  return cards.length ? cards : [makeNote("No command and no training.")];
}

// -- what needs attention ------------------------------------------------------------------------------------------

/** Makes a card for each project that pauses or has given tasks up, and for each worker that serves another model. */
function makeTrouble(status) {
  const others = status.workers.filter((worker) => worker.queue === "predict" && worker.checkpoint !== status.checkpoint);
  return [
    ...status.pauses.map((pause) => makeCard(`${pause.work} of project ${pause.project} pauses`, `tries again within ${pause.seconds} s`,
      element("div", { textContent: pause.reason }))),
    ...Object.entries(status.given_up).map(([project, tasks]) => makeCard(`${count(tasks, "task")} of project ${project} given up`, "",
      element("div", {}, "The reasons, and another attempt: ", element("code", { textContent: `python -m backend failures --project ${project}` })))),
    ...others.map((worker) => makeCard(`worker ${worker.name} serves another model`, "",
      element("div", { textContent: `${worker.model}; it takes nothing from the queue of ${status.model}` }))),
  ];
}

// -- projects ------------------------------------------------------------------------------------------------------

/** Shows what annotators made of the predicted boxes of one label. */
function makeOutcomes(counts) {
  const predicted = counts ? counts.kept + counts.changed + counts.deleted : 0;
  if (!predicted) return [element("span", { className: "quiet", textContent: counts?.drawn ? `${counts.drawn} drawn by hand` : "no annotations yet" })];
  const strip = element("div", { className: "outcomes" });
  for (const outcome of ["kept", "changed", "deleted"]) {
    const part = element("i", { className: outcome });
    part.style.width = `${(100 * counts[outcome]) / predicted}%`;
    strip.append(part);
  }
  const text = `${Math.round((100 * counts.kept) / predicted)}% of ${predicted} kept, ${counts.changed} changed, ${counts.deleted} deleted, ${counts.drawn} drawn by hand`;
  return [strip, element("span", { className: "quiet", textContent: text })];
}

function makeLabelTable(project) {
  // The roles are explicit because a narrow page lays out rows as grids, which then are no table for screen readers.
  const titles = ["label", "phrases", "threshold", "kept by annotators"];
  const head = element("tr", { role: "row" }, ...titles.map((title) => element("th", { scope: "col", role: "columnheader", textContent: title })));
  const rows = project.labels.map((label) => {
    const cells = [[label.label], [label.phrases.join(", ")], [label.threshold], makeOutcomes(project.boxes[label.label])];
    return element("tr", { role: "row" }, ...cells.map((cell) => element("td", { role: "cell" }, ...cell)));
  });
  return element("div", { className: "scroll" }, element("table", { role: "table" }, element("thead", {}, head), element("tbody", {}, ...rows)));
}

function makeProjectCard(project, now, isFirst) {
  const hidden = project.of - project.labels.length;
  const summary = element("summary", { textContent: count(project.of, "label") });
  const details = element("details", { open: isUnfolded.get(project.project) ?? isFirst }, summary,
    makeLabelTable(project), hidden > 0 ? makeNote(`and ${count(hidden, "more label")}`) : "");
  summary.addEventListener("click", () => isUnfolded.set(project.project, !details.open));
  const link = element("a", { href: `playground?project=${encodeURIComponent(project.project)}`, textContent: "try it in the playground" });
  return makeCard(`project ${project.project}`, `${project.version}, last used ${formatAge(now - project.time)}`, details, link);
}

// -- recent predictions and failures -------------------------------------------------------------------------------

function makeFigure(row) {
  const boxes = count(row.boxes.length, "box", "es");
  const frame = element("div", { className: "frame" }, element("img", { src: `data:image/jpeg;base64,${row.jpeg}`, alt: `task ${row.task} with ${boxes}` }));
  drawBoxes(frame, row.boxes, [...new Set(row.boxes.map((box) => box.label))].sort());
  const place = row.project ? `project ${row.project}, task ${row.task}` : `${row.task}`;
  return element("figure", {}, frame, element("figcaption", { className: "quiet", textContent: `${place}: ${boxes}` }));
}

/** Makes one card for each reason, with the tasks that failed for it; failures come newest first. */
function makeFailureCards(failures, now) {
  const byReason = new Map();
  for (const failure of failures) byReason.set(failure.detail, [...(byReason.get(failure.detail) || []), failure]);
  return [...byReason].map(([reason, same]) => {
    const [newest] = same, tasks = same.slice(0, MAX_FAILED_TASKS).map((failure) => failure.task).join(", ");
    return makeCard(newest.code, `${count(same.length, "recent task")}, ${formatAge(now - newest.time)}`, element("div", { textContent: reason }),
      makeNote(`project ${newest.project || "-"}, tasks ${tasks}${same.length > MAX_FAILED_TASKS ? ", …" : ""}`));
  });
}

// -- the whole page ------------------------------------------------------------------------------------------------

function render(status) {
  byId("model").textContent = status.model_version;
  if (status.error) throw new Error(status.error.detail);
  const busy = status.workers.filter((worker) => worker.is_busy).length;
  const devices = status.workers.map((worker) => `${worker.queue} on ${worker.device}`).join(", ") || "start one: nothing is predicted without a worker";
  show("workers", status.workers, `${status.workers.length} alive, ${busy} busy`, element("small", { textContent: devices }));
  show("queue", status.waiting, String(status.waiting), element("small", { textContent: "chunks waiting" }));
  show("push", status.to_push, String(status.to_push), element("small", { textContent: "chunks for Label Studio" }));
  const elapsed = (status.time % 60) / 60; // of the current minute; the rest of the 60 s lies in the minute before
  const perMinute = Math.round(status.rate.at(-2) * (1 - elapsed) + status.rate.at(-1));
  show("rate", [status.rate, perMinute], String(perMinute), makeSparkline(status.rate));
  const trouble = makeTrouble(status);
  byId("trouble-section").hidden = !trouble.length;
  show("trouble", [status.pauses, status.given_up, status.workers.map((worker) => worker.checkpoint)], trouble);
  show("running", [status.bulk, status.trainings, Math.floor(status.time / 10)], makeRunning(status));
  show("projects", [status.projects, status.projects.map((project) => formatAge(status.time - project.time))],
    status.projects.length ? status.projects.map((project, i) => makeProjectCard(project, status.time, i === 0))
      : [makeNote("No project yet: connect this backend in Label Studio under Settings > Model.")]);
  if (status.pictures) {
    newestImageTime = status.pictures[0]?.time ?? "";
    const reason = status.may_show_pictures ? "None yet." : "Images are shown only behind a login or a secret path, or with SHOW_PICTURES=true.";
    show("images", [status.pictures.map((row) => row.time), reason], status.pictures.length ? status.pictures.map(makeFigure) : [makeNote(reason)]);
  }
  show("failures", [status.failures, status.failures.map((failure) => formatAge(status.time - failure.time))],
    status.failures.length ? makeFailureCards(status.failures, status.time) : [makeNote("None.")]);
}

async function refresh() {
  const message = byId("error");
  try {
    const response = await fetch(`status?seen=${newestImageTime}`, { headers: { Accept: "application/json" } });
    if (!response.ok) throw new Error(`The backend answered HTTP ${response.status}.`);
    render(await response.json());
    message.hidden = true;
  } catch (error) {
    const text = error instanceof TypeError ? "The backend does not answer." : error.message;
    if (message.textContent !== text) message.textContent = text; // a screen reader reads each change aloud
    message.hidden = false;
  }
}

async function poll() {
  if (!document.hidden) await refresh();
  setTimeout(poll, POLL_INTERVAL);
}

poll();
document.addEventListener("visibilitychange", () => document.hidden || refresh());
