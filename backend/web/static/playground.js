// The playground: one look for one picture and labeling config; sliders then cut its boxes at once.

import { colourOf, cut, draw, element } from "./boxes.js";

const SAMPLES = ["sample-1.jpg", "sample-2.jpg", "sample-3.jpg"];
const FIRST = "ring\nstar\nSquare: purple square, blue square";
const at = (id) => document.getElementById(id);

let picture = ""; // as a data: address
let answer = null; // with the question: the labeling config, and which of the two tabs it came from
let looks = 0; // so many were begun: an answer to an earlier one comes too late
const thresholds = new Map(); // by the tag that holds a label and its place there: two controls may share one

const keyOf = (row) => `${row.holder}\n${row.number}`;
const isByConfig = () => at("tab-config").getAttribute("aria-selected") === "true";

// -- what is asked ---------------------------------------------------------------------------------------------------

function configOf(lines) {
  const view = document.implementation.createDocument(null, "View"), root = view.documentElement;
  const tag = (parent, name, attributes) => {
    const made = view.createElement(name);
    Object.entries(attributes).forEach((pair) => made.setAttribute(...pair));
    parent.append(made);
    return made;
  };
  tag(root, "Image", { name: "image", value: "$image" });
  const control = tag(root, "RectangleLabels", { name: "label", toName: "image" });
  for (const line of lines.split("\n").filter((text) => text.trim())) {
    const [value, phrases] = line.includes(":") ? line.split(/:(.*)/s) : [line, ""];
    tag(control, "Label", { value: value.trim(), ...(phrases.trim() ? { predicted_values: phrases.trim() } : {}) });
  }
  return indented(root);
}

function indented(tag, depth = 0) {
  const space = "  ".repeat(depth), children = [...tag.children];
  const empty = tag.cloneNode(false);
  const text = new XMLSerializer().serializeToString(empty);
  if (!children.length) return space + text;
  const open = text.replace(/\s*\/>$/, ">").replace(new RegExp(`</${tag.tagName}>$`), "");
  return `${space}${open}\n${children.map((child) => indented(child, depth + 1)).join("\n")}\n${space}</${tag.tagName}>`;
}

const asked = () => (isByConfig() ? at("config").value : configOf(at("phrases").value));

async function look() {
  say("");
  if (!picture) return say("Choose a picture first.");
  const number = ++looks, question = { config: asked(), isByConfig: isByConfig() };
  at("busy").textContent = "looking…";
  try {
    const body = JSON.stringify({ image: picture, label_config: question.config, project: project() });
    const reply = await fetch("playground/look", { method: "POST", body, headers: { "Content-Type": "application/json" } });
    const found = await reply.json();
    if (number !== looks) return;
    if (!reply.ok) throw new Error(found.error?.detail || `the web front answered ${reply.status}`);
    take({ ...found, ...question });
  } catch (error) {
    if (number === looks) say(error instanceof TypeError ? "The web front does not answer." : error.message);
  } finally {
    if (number === looks) at("busy").textContent = "";
  }
}

function say(text) {
  at("trouble").textContent = text;
  at("trouble").hidden = !text;
}

// -- what is seen ----------------------------------------------------------------------------------------------------

function take(found) {
  answer = found;
  thresholds.clear();
  found.labels.forEach((row) => thresholds.set(keyOf(row), row.threshold));
  const own = found.labels.filter((row, i) => found.labels.findIndex((other) => keyOf(other) === keyOf(row)) === i);
  at("sliders").replaceChildren(...own.map(slider));
  at("all").min = found.lowest;
  at("all").value = Math.min(...thresholds.values());
  at("results").hidden = false;
  refresh();
}

function slider(row) {
  const swatch = element("i", { className: "swatch" }), colour = colourOf(row.label, labels());
  swatch.style.background = colour;
  const name = element("span", {}, swatch, row.label, element("small", { textContent: row.phrases.join(", ") }));
  const input = element("input", { type: "range", min: answer.lowest, max: 1, step: 0.01, value: row.threshold, ariaLabel: `threshold of ${row.label}` });
  input.style.setProperty("--own", colour);
  input.dataset.own = keyOf(row);
  input.addEventListener("input", () => { thresholds.set(keyOf(row), Number(input.value)); refresh(); });
  return element("label", { className: "slider" }, name, input, element("output"));
}

const labels = () => [...new Set(answer.labels.map((row) => row.label))];

function threshold(control, place) {
  if (place !== null) return thresholds.get(keyOf(answer.labels[place]));
  return Math.min(...answer.labels.filter((row) => row.control === control).map((row) => thresholds.get(keyOf(row))));
}

function refresh() {
  const boxes = cut(answer.boxes, threshold, answer.nms_iou).map((box) => ({ ...box, ...pick(answer.labels[box.place]) }));
  draw(at("frame"), boxes, labels());
  for (const input of at("sliders").querySelectorAll("input")) {
    const own = input.dataset.own, count = boxes.filter((box) => box.key === own).length;
    input.nextElementSibling.textContent = `${thresholds.get(own).toFixed(2)}, ${count} box${count === 1 ? "" : "es"}`;
  }
  at("all-value").textContent = Number(at("all").value).toFixed(2);
  at("summary").textContent = `${boxes.length} box${boxes.length === 1 ? "" : "es"} by ${answer.model_version}`;
  at("result").value = matching();
}

const pick = (row) => ({ label: row.label, key: keyOf(row) });

/** The labeling config that was looked at, with the thresholds that are set now. */
function matching() {
  const config = new DOMParser().parseFromString(answer.config, "text/xml");
  for (const row of answer.labels) {
    const holder = [...config.querySelectorAll("RectangleLabels, Labels")].find((tag) => (tag.getAttribute("name") || "") === row.holder);
    const named = [...(holder?.querySelectorAll("Label") || [])].filter((tag) => tag.getAttribute("alias") || tag.getAttribute("value"));
    named[row.number]?.setAttribute("model_score_threshold", String(Math.round(thresholds.get(keyOf(row)) * 1000) / 1000));
  }
  return answer.isByConfig ? new XMLSerializer().serializeToString(config.documentElement) : indented(config.documentElement);
}

async function copy() {
  at("result").select();
  try {
    await navigator.clipboard.writeText(at("result").value);
    at("copied").textContent = "copied";
  } catch {
    at("copied").textContent = document.execCommand("copy") ? "copied" : "press Ctrl+C";
  }
  setTimeout(() => { at("copied").textContent = ""; }, 3000);
}

// -- pictures --------------------------------------------------------------------------------------------------------

async function open(blob) {
  say("");
  picture = await new Promise((done, failed) => {
    const reader = new FileReader();
    reader.onload = () => done(reader.result);
    reader.onerror = failed;
    reader.readAsDataURL(blob);
  });
  at("picture").src = picture;
  at("frame").hidden = false;
  at("invitation").hidden = true;
  draw(at("frame"), [], []);
  at("results").hidden = true; // what is there belongs to another picture
  at("summary").textContent = "";
  at("drop").ariaLabel = "Choose another picture";
  await look();
}

async function openSample(name) {
  await open(await (await fetch(`playground/samples/${name}`)).blob());
}

function onFiles(files) {
  if (files.length) open(files[0]);
  at("file").value = ""; // the same file may be chosen again
}

function selectTab(name) {
  for (const own of ["phrases", "config"]) {
    const tab = at(`tab-${own}`), is = own === name;
    tab.setAttribute("aria-selected", String(is));
    tab.tabIndex = is ? 0 : -1;
    at(`by-${own}`).hidden = !is;
  }
  if (name === "config" && !at("config").value) at("config").value = configOf(at("phrases").value);
}

const project = () => new URLSearchParams(location.search).get("project") || "";

async function openProject() {
  if (!project()) return;
  const reply = await fetch(`playground/config/${encodeURIComponent(project())}`);
  const found = await reply.json();
  if (!reply.ok) return say(found.error.detail);
  at("config").value = found.label_config;
  selectTab("config");
}

function listen() {
  const drop = at("drop");
  for (const kind of ["dragover", "drop"]) document.addEventListener(kind, (event) => event.preventDefault()); // beside it the browser would leave the page
  drop.addEventListener("click", () => at("file").click());
  at("file").addEventListener("change", () => onFiles(at("file").files));
  drop.addEventListener("dragover", (event) => { event.preventDefault(); drop.classList.add("over"); });
  drop.addEventListener("dragleave", () => drop.classList.remove("over"));
  drop.addEventListener("drop", (event) => { event.preventDefault(); drop.classList.remove("over"); onFiles(event.dataTransfer.files); });
  document.addEventListener("paste", (event) => onFiles(event.clipboardData.files));
  at("go").addEventListener("click", look);
  document.addEventListener("keydown", (event) => { if (event.ctrlKey && event.key === "Enter") look(); });
  at("copy").addEventListener("click", copy);
  at("all").addEventListener("input", () => {
    for (const input of at("sliders").querySelectorAll("input")) {
      input.value = at("all").value;
      thresholds.set(input.dataset.own, Number(input.value));
    }
    refresh();
  });
  for (const name of ["phrases", "config"]) at(`tab-${name}`).addEventListener("click", () => selectTab(name));
  document.querySelector("[role=tablist]").addEventListener("keydown", (event) => {
    if (!["ArrowLeft", "ArrowRight"].includes(event.key)) return;
    const other = isByConfig() ? "phrases" : "config";
    selectTab(other);
    at(`tab-${other}`).focus();
  });
}

at("phrases").value = FIRST;
at("samples").append(...SAMPLES.map((name, i) => {
  const button = element("button", { type: "button", ariaLabel: `sample ${i + 1}` }, element("img", { src: `playground/samples/${name}`, alt: "" }));
  button.addEventListener("click", () => openSample(name));
  return button;
}));
listen();
openProject();
