// The status page: asks every two seconds, and says so where nobody answers.

import { draw, element } from "./boxes.js";

const EVERY = 2000; // ms
const TRAINING = { queued: "waiting for a fit worker", reading: "reading annotations", loading: "loading pictures",
  measuring: "measuring what serves now", rehearsing: "looking for what the model knows", training: "fine-tuning" };
const STALE = 60; // s without a word after which something is said to be silent
const OLD = 24 * 3600; // s that a training which is over is shown

let seen = ""; // the time of the last picture: they are most of the bytes, and come only when there is another

const at = (id) => document.getElementById(id);
const unfolded = new Map(); // whether people opened or closed a project's labels
const shown = new Map(); // what each part shows, as JSON: a part that has not changed is left alone

function show(id, data, ...children) {
  const now = JSON.stringify(data);
  if (shown.get(id) === now) return;
  shown.set(id, now);
  at(id).replaceChildren(...children.flat());
}

const quiet = (text) => element("p", { className: "quiet", textContent: text });
const ago = (seconds) => seconds < 60 ? "just now" : seconds < 3600 ? `${Math.floor(seconds / 60)} min ago`
  : seconds < 86400 ? `${Math.floor(seconds / 3600)} h ago` : `${Math.floor(seconds / 86400)} d ago`;

function spark(counts) {
  const svg = document.createElementNS("http://www.w3.org/2000/svg", "svg"), most = Math.max(...counts, 1);
  svg.setAttribute("viewBox", `0 0 ${counts.length} 20`);
  svg.setAttribute("preserveAspectRatio", "none");
  svg.setAttribute("class", "spark");
  svg.setAttribute("role", "img");
  svg.setAttribute("aria-label", `tasks in each of the last ${counts.length} minutes, at most ${most}`);
  counts.forEach((count, i) => {
    const bar = document.createElementNS(svg.namespaceURI, "rect");
    const height = count ? Math.max((20 * count) / most, 1) : 0.3;
    Object.entries({ x: i + 0.1, y: 20 - height, width: 0.8, height }).forEach((pair) => bar.setAttribute(...pair));
    svg.append(bar);
  });
  return svg;
}

function card(title, note, ...children) {
  const head = element("h3", {}, element("b", { textContent: title }), element("span", { className: "quiet", textContent: note }));
  return element("div", { className: "card" }, head, ...children);
}

function bar(done, of) {
  const made = element("progress", { max: of || 1 });
  if (of) made.value = done;
  return made;
}

function left(row, now) {
  const rate = (row.done - row.before) / Math.max(now - row.since, 1);
  const seconds = rate ? (row.of - row.done) / rate : 0;
  return rate > 0 && row.done < row.of ? `, about ${seconds < 90 ? `${Math.ceil(seconds)} s` : `${Math.round(seconds / 60)} min`} left` : "";
}

function running(state) {
  const silent = (row) => state.time - row.time > STALE ? `, no word for ${ago(state.time - row.time).replace(" ago", "")}` : "";
  const bulk = state.bulk.map((row) => card(row.what,
    `${row.done} of ${row.of}${row.failed ? `, ${row.failed} failed` : ""}${silent(row) || left(row, state.time)}`, bar(row.done, row.of)));
  const trainings = state.trainings.filter((row) => row.state in TRAINING || state.time - row.time < OLD).map((row) => {
    const title = `training, project ${row.project}`;
    if (row.state in TRAINING) {
      const late = row.state === "queued" ? "" : silent(row);
      return card(title, `${TRAINING[row.state]} ${row.of ? `${row.done} of ${row.of}` : ""}${late}`, bar(row.done, row.of));
    }
    return card(title, `${row.state}, ${ago(state.time - row.time)}`, quiet(row.text || ""));
  });
  return bulk.length + trainings.length ? [...bulk, ...trainings] : [quiet("Nothing but single requests.")];
}

function fates(counts) {
  const given = counts ? counts.kept + counts.changed + counts.deleted : 0;
  if (!given) return [element("span", { className: "quiet", textContent: counts?.drawn ? `${counts.drawn} drawn by hand` : "no annotations yet" })];
  const strip = element("div", { className: "fates" });
  for (const fate of ["kept", "changed", "deleted"]) {
    const part = element("i", { className: fate });
    part.style.width = `${(100 * counts[fate]) / given}%`;
    strip.append(part);
  }
  const text = `${Math.round((100 * counts.kept) / given)}% of ${given} kept, ${counts.changed} changed, ${counts.deleted} deleted, ${counts.drawn} drawn by hand`;
  return [strip, element("span", { className: "quiet", textContent: text })];
}

function project(card_, now, isFirst) {
  const head = element("tr", { role: "row" }, ...["label", "phrases", "threshold", "annotators kept"].map((text) => element("th", { scope: "col", role: "columnheader", textContent: text })));
  const rows = card_.labels.map((row) => element("tr", { role: "row" }, // roles, because a narrow page lays rows out as grids
    ...[[row.label], [row.phrases.join(", ")], [row.threshold], fates(card_.boxes[row.label])].map((cell) => element("td", { role: "cell" }, ...cell))));
  const table = element("div", { className: "scroll" }, element("table", { role: "table" }, element("thead", {}, head), element("tbody", {}, ...rows)));
  const more = card_.of > card_.labels.length ? quiet(`and ${card_.of - card_.labels.length} more labels`) : "";
  const trial = element("a", { href: `playground?project=${encodeURIComponent(card_.project)}`, textContent: "try it in the playground" });
  const count = `${card_.of} label${card_.of === 1 ? "" : "s"}`;
  const summary = element("summary", { textContent: count });
  const details = element("details", { open: unfolded.get(card_.project) ?? isFirst }, summary, table, more);
  summary.addEventListener("click", () => unfolded.set(card_.project, !details.open));
  return card(`project ${card_.project}`, `${card_.version}, asked ${ago(now - card_.time)}`, details, trial);
}

function picture(row) {
  const frame = element("div", { className: "frame" }, element("img", { src: `data:image/jpeg;base64,${row.jpeg}`, alt: `task ${row.task} with ${row.boxes.length} boxes` }));
  draw(frame, row.boxes, [...new Set(row.boxes.map((box) => box.label))].sort());
  const where = row.project ? `project ${row.project}, task ${row.task}` : `${row.task}`;
  return element("figure", {}, frame, element("figcaption", { className: "quiet", textContent: `${where}: ${row.boxes.length} box${row.boxes.length === 1 ? "" : "es"}` }));
}

function failures(rows, now) {
  const groups = Map.groupBy ? Map.groupBy(rows, (row) => row.detail) : rows.reduce((all, row) => all.set(row.detail, [...(all.get(row.detail) || []), row]), new Map());
  return [...groups].map(([detail, same]) => card(same[0].code,
    `${same.length} of the last tasks, ${ago(now - same[0].time)}`, element("div", { textContent: detail }),
    quiet(`project ${same[0].project || "-"}, tasks ${same.slice(0, 8).map((row) => row.task).join(", ")}${same.length > 8 ? ", …" : ""}`)));
}

function render(state) {
  at("model").textContent = state.model_version;
  if (state.error) throw new Error(state.error.detail);
  const busy = state.workers.filter((row) => row.is_busy).length;
  const devices = state.workers.map((row) => `${row.queue} on ${row.device}`).join(", ") || "start one: nothing is predicted without";
  show("workers", state.workers, `${state.workers.length} alive, ${busy} busy`, element("small", { textContent: devices }));
  show("queue", state.waiting, String(state.waiting), element("small", { textContent: "chunks wait" }));
  show("push", state.to_push, String(state.to_push), element("small", { textContent: "chunks for Label Studio" }));
  const part = (state.time % 60) / 60; // of the present minute
  const perMinute = Math.round(state.rate.at(-2) * (1 - part) + state.rate.at(-1));
  show("rate", [state.rate, perMinute], String(perMinute), spark(state.rate));
  show("running", [state.bulk, state.trainings, Math.floor(state.time / 10)], running(state));
  show("projects", [state.projects, state.projects.map((row) => ago(state.time - row.time))],
    state.projects.length ? state.projects.map((row, i) => project(row, state.time, i === 0)) : [quiet("No project has asked for anything yet: connect this backend in Label Studio under Settings > Model.")]);
  if (state.pictures) {
    seen = state.pictures[0]?.time ?? "";
    const none = state.may_show_pictures ? "None yet." : "They are shown behind a login or a secret path, or with SHOW_PICTURES=true.";
    show("pictures", [state.pictures.map((row) => row.time), none], state.pictures.length ? state.pictures.map(picture) : [quiet(none)]);
  }
  show("failures", [state.failures, state.failures.map((row) => ago(state.time - row.time))], state.failures.length ? failures(state.failures, state.time) : [quiet("None.")]);
}

async function look() {
  const trouble = at("trouble");
  try {
    const answer = await fetch(`status?seen=${seen}`, { headers: { Accept: "application/json" } });
    if (!answer.ok) throw new Error(`the web front answered ${answer.status}`);
    render(await answer.json());
    trouble.hidden = true;
  } catch (error) {
    const text = error instanceof TypeError ? "The web front does not answer." : error.message;
    if (trouble.textContent !== text) trouble.textContent = text; // said once
    trouble.hidden = false;
  }
}

async function watch() {
  if (!document.hidden) await look();
  setTimeout(watch, EVERY);
}

watch();
document.addEventListener("visibilitychange", () => document.hidden || look());
