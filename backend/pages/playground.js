// The playground: one look for one picture and labeling config; sliders then cut its boxes at once.

import { colourOf, cut, draw, element } from "./boxes.js";

const SAMPLES = ["sample-1.jpg", "sample-2.jpg", "sample-3.jpg"];
const FIRST = "ring\nstar\nSquare: purple square, blue square";
const at = (id) => document.getElementById(id);

let picture = ""; // as a data: address
let answer = null;
const thresholds = new Map(); // by control and label

const key = (control, label) => `${control}\n${label}`;
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
  at("go").disabled = true;
  at("busy").textContent = "looking…";
  try {
    const body = JSON.stringify({ image: picture, label_config: asked(), project: project() });
    const reply = await fetch("playground/look", { method: "POST", body, headers: { "Content-Type": "application/json" } });
    const found = await reply.json();
    if (!reply.ok) throw new Error(found.error?.detail || `the web front answered ${reply.status}`);
    take(found);
  } catch (error) {
    say(error instanceof TypeError ? "The web front does not answer." : error.message);
  } finally {
    at("go").disabled = false;
    at("busy").textContent = "";
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
  found.labels.forEach((row) => thresholds.set(key(row.control, row.label), row.threshold));
  at("sliders").replaceChildren(...found.labels.map(slider));
  at("all").value = Math.min(...thresholds.values());
  at("results").hidden = false;
  refresh();
}

function slider(row) {
  const own = key(row.control, row.label), colour = colourOf(row.label, labels());
  const swatch = element("i", { className: "swatch" });
  swatch.style.background = colour;
  const name = element("span", {}, swatch, row.label, element("small", { textContent: row.phrases.join(", ") }));
  const input = element("input", { type: "range", min: 0.05, max: 1, step: 0.01, value: row.threshold, ariaLabel: `threshold of ${row.label}` });
  input.style.setProperty("--own", colour);
  input.dataset.own = own;
  input.addEventListener("input", () => { thresholds.set(own, Number(input.value)); refresh(); });
  return element("label", { className: "slider" }, name, input, element("output"));
}

const labels = () => [...new Set(answer.labels.map((row) => row.label))];

function threshold(control, label) {
  if (label !== null) return thresholds.get(key(control, label)) ?? 1;
  return Math.min(...answer.labels.filter((row) => row.control === control).map((row) => thresholds.get(key(control, row.label))));
}

function refresh() {
  const boxes = cut(answer.boxes, threshold, answer.nms_iou);
  draw(at("frame"), boxes, labels());
  for (const input of at("sliders").querySelectorAll("input")) {
    const [control, label] = input.dataset.own.split("\n");
    const count = boxes.filter((box) => box.control === control && box.label === label).length;
    input.nextElementSibling.textContent = `${Number(input.value).toFixed(2)}, ${count} box${count === 1 ? "" : "es"}`;
  }
  at("all-value").textContent = Number(at("all").value).toFixed(2);
  at("summary").textContent = `${boxes.length} box${boxes.length === 1 ? "" : "es"} by ${answer.model_version}`;
  at("result").value = matching();
}

/** The labeling config that was asked for, with the thresholds that are set now. */
function matching() {
  const config = new DOMParser().parseFromString(asked(), "text/xml");
  if (config.querySelector("parsererror")) return asked();
  for (const tag of config.querySelectorAll("RectangleLabels, Labels")) {
    const control = tag.getAttribute("name");
    for (const label of tag.querySelectorAll("Label")) {
      const own = thresholds.get(key(control, label.getAttribute("alias") || label.getAttribute("value")));
      if (own !== undefined) label.setAttribute("model_score_threshold", String(Math.round(own * 1000) / 1000));
    }
  }
  return isByConfig() ? new XMLSerializer().serializeToString(config.documentElement) : indented(config.documentElement);
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
  await look();
}

async function openSample(name) {
  await open(await (await fetch(`playground/samples/${name}`)).blob());
}

function onFiles(files) {
  if (files.length) open(files[0]);
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
