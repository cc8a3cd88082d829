// The playground: one prediction for an image and a labeling config; the sliders then filter its boxes in the browser.

import { colourOf, count, drawBoxes, element, filterBoxes } from "./boxes.js";

const SAMPLES = ["sample-1.jpg", "sample-2.jpg", "sample-3.jpg"];
const INITIAL_PHRASES = "ring\nstar\nSquare: purple square, blue square"; // which the bundled model knows
const byId = (id) => document.getElementById(id);

let image = ""; // a data: URI
let answer = null; // the backend's last response, its labeling config, and whether that came from the config tab
let requests = 0; // sent so far: the answer to any but the last one is ignored
const thresholds = new Map(); // by `keyOf` a label: controls that share their labels share the thresholds too

const keyOf = (label) => `${label.holder}\n${label.number}`;
const isConfigTab = () => byId("tab-config").getAttribute("aria-selected") === "true";

// -- the request ---------------------------------------------------------------------------------------------------

/** Makes a labeling config from lines of "label" or "label: phrase, phrase". */
function makeConfig(lines) {
  const xml = document.implementation.createDocument(null, "View"), root = xml.documentElement;
  const addTag = (parent, name, attributes) => {
    const tag = xml.createElement(name);
    Object.entries(attributes).forEach(([attribute, value]) => tag.setAttribute(attribute, value));
    parent.append(tag);
    return tag;
  };
  addTag(root, "Image", { name: "image", value: "$image" });
  const control = addTag(root, "RectangleLabels", { name: "label", toName: "image" });
  for (const line of lines.split("\n").filter((text) => text.trim())) {
    const [value, phrases] = line.includes(":") ? line.split(/:(.*)/s) : [line, ""];
    addTag(control, "Label", { value: value.trim(), ...(phrases.trim() ? { predicted_values: phrases.trim() } : {}) });
  }
  return formatXml(root);
}

function formatXml(tag, depth = 0) {
  const indent = "  ".repeat(depth), children = [...tag.children];
  const emptyTag = new XMLSerializer().serializeToString(tag.cloneNode(false));
  if (!children.length) return indent + emptyTag;
  const openingTag = emptyTag.replace(/\s*\/>$/, ">").replace(new RegExp(`</${tag.tagName}>$`), "");
  return `${indent}${openingTag}\n${children.map((child) => formatXml(child, depth + 1)).join("\n")}\n${indent}</${tag.tagName}>`;
}

async function detect() {
  showError("");
  if (!image) return showError("Choose an image first.");
  const number = ++requests, isByConfig = isConfigTab();
  const config = isByConfig ? byId("config").value : makeConfig(byId("phrases").value);
  byId("progress").textContent = "detecting…";
  try {
    const body = JSON.stringify({ image, label_config: config, project: getProject() });
    const response = await fetch("playground/look", { method: "POST", body, headers: { "Content-Type": "application/json" } });
    const result = await response.json();
    if (number !== requests) return;
    if (!response.ok) throw new Error(result.error?.detail || `The backend answered HTTP ${response.status}.`);
    showAnswer({ ...result, config, isByConfig });
  } catch (error) {
    if (number === requests) showError(error instanceof TypeError ? "The backend does not answer." : error.message);
  } finally {
    if (number === requests) byId("progress").textContent = "";
  }
}

function showError(text) {
  byId("error").textContent = text;
  byId("error").hidden = !text;
}

// -- the answer ----------------------------------------------------------------------------------------------------

function showAnswer(newAnswer) {
  answer = newAnswer;
  thresholds.clear();
  const labelsByKey = new Map(); // the first of those that share a threshold
  for (const label of answer.labels) {
    thresholds.set(keyOf(label), label.threshold);
    if (!labelsByKey.has(keyOf(label))) labelsByKey.set(keyOf(label), label);
  }
  byId("sliders").replaceChildren(...[...labelsByKey.values()].map(makeSlider));
  byId("all").min = answer.lowest;
  byId("all").value = Math.min(...thresholds.values());
  byId("results").hidden = false;
  refresh();
}

function makeSlider(label) {
  const swatch = element("i", { className: "swatch" }), colour = colourOf(label.label, getLabelNames());
  swatch.style.background = colour;
  const name = element("span", {}, swatch, label.label, element("small", { textContent: label.phrases.join(", ") }));
  const input = element("input", { type: "range", min: answer.lowest, max: 1, step: 0.01, value: label.threshold, ariaLabel: `threshold of ${label.label}` });
  input.style.setProperty("--slider-colour", colour);
  input.dataset.key = keyOf(label);
  input.addEventListener("input", () => { thresholds.set(keyOf(label), Number(input.value)); refresh(); });
  return element("label", { className: "slider" }, name, input, element("output"));
}

const getLabelNames = () => [...new Set(answer.labels.map((label) => label.label))];

/** Returns the threshold of a label by its place; a negative phrase has the lowest threshold of its control. */
function thresholdOf(control, place) {
  if (place !== null) return thresholds.get(keyOf(answer.labels[place]));
  return Math.min(...answer.labels.filter((label) => label.control === control).map((label) => thresholds.get(keyOf(label))));
}

/** Shows what the thresholds keep: boxes, their numbers, and the labeling config. */
function refresh() {
  const boxes = filterBoxes(answer.boxes, thresholdOf, answer.nms_iou).map((box) => {
    const label = answer.labels[box.place];
    return { ...box, label: label.label, key: keyOf(label) };
  });
  drawBoxes(byId("frame"), boxes, getLabelNames());
  for (const input of byId("sliders").querySelectorAll("input")) {
    const key = input.dataset.key, boxesOfLabel = boxes.filter((box) => box.key === key);
    input.nextElementSibling.textContent = `${thresholds.get(key).toFixed(2)}, ${count(boxesOfLabel.length, "box", "es")}`;
  }
  byId("all-value").textContent = Number(byId("all").value).toFixed(2);
  byId("summary").textContent = `${count(boxes.length, "box", "es")} by ${answer.model_version}`;
  byId("result").value = makeConfigWithThresholds();
}

/** Returns the labeling config of the answer, with the thresholds of the sliders. */
function makeConfigWithThresholds() {
  const config = new DOMParser().parseFromString(answer.config, "text/xml");
  for (const label of answer.labels) {
    const holder = [...config.querySelectorAll("RectangleLabels, Labels")].find((tag) => (tag.getAttribute("name") || "") === label.holder);
    const labelTags = [...(holder?.querySelectorAll("Label") || [])].filter((tag) => tag.getAttribute("alias") || tag.getAttribute("value"));
    labelTags[label.number]?.setAttribute("model_score_threshold", String(Math.round(thresholds.get(keyOf(label)) * 1000) / 1000));
  }
  // A config that people wrote keeps its layout.
  return answer.isByConfig ? new XMLSerializer().serializeToString(config.documentElement) : formatXml(config.documentElement);
}

async function copyConfig() {
  byId("result").select();
  try {
    await navigator.clipboard.writeText(byId("result").value);
    byId("copied").textContent = "copied";
  } catch { // no clipboard on a page without HTTPS
    byId("copied").textContent = document.execCommand("copy") ? "copied" : "press Ctrl+C";
  }
  setTimeout(() => { byId("copied").textContent = ""; }, 3000);
}

// -- the input -----------------------------------------------------------------------------------------------------

async function openImage(blob) {
  showError("");
  image = await new Promise((resolve, reject) => {
    const reader = new FileReader();
    reader.onload = () => resolve(reader.result);
    reader.onerror = reject;
    reader.readAsDataURL(blob);
  });
  byId("image").src = image;
  byId("frame").hidden = false;
  byId("invitation").hidden = true;
  drawBoxes(byId("frame"), [], []);
  byId("results").hidden = true; // they belong to the previous image
  byId("summary").textContent = "";
  byId("drop").ariaLabel = "Choose another image";
  await detect();
}

async function openSample(name) {
  await openImage(await (await fetch(`playground/samples/${name}`)).blob());
}

function openFirst(files) {
  if (files.length) openImage(files[0]);
  byId("file").value = ""; // so that the same file can be chosen again
}

function selectTab(name) {
  for (const other of ["phrases", "config"]) {
    const tab = byId(`tab-${other}`), isSelected = other === name;
    tab.setAttribute("aria-selected", String(isSelected));
    tab.tabIndex = isSelected ? 0 : -1;
    byId(`panel-${other}`).hidden = !isSelected;
  }
  if (name === "config" && !byId("config").value) byId("config").value = makeConfig(byId("phrases").value);
}

const getProject = () => new URLSearchParams(location.search).get("project") || "";

/** Shows the labeling config of the project that the page's URL names. */
async function openProject() {
  if (!getProject()) return;
  const response = await fetch(`playground/config/${encodeURIComponent(getProject())}`);
  const result = await response.json();
  if (!response.ok) return showError(result.error.detail);
  byId("config").value = result.label_config;
  selectTab("config");
}

function addListeners() {
  const drop = byId("drop");
  for (const kind of ["dragover", "drop"]) document.addEventListener(kind, (event) => event.preventDefault()); // a file dropped beside the frame would replace the page
  drop.addEventListener("click", () => byId("file").click());
  byId("file").addEventListener("change", () => openFirst(byId("file").files));
  drop.addEventListener("dragover", (event) => { event.preventDefault(); drop.classList.add("over"); });
  drop.addEventListener("dragleave", () => drop.classList.remove("over"));
  drop.addEventListener("drop", (event) => { event.preventDefault(); drop.classList.remove("over"); openFirst(event.dataTransfer.files); });
  document.addEventListener("paste", (event) => openFirst(event.clipboardData.files));
  byId("detect").addEventListener("click", detect);
  document.addEventListener("keydown", (event) => { if (event.ctrlKey && event.key === "Enter") detect(); });
  byId("copy").addEventListener("click", copyConfig);
  byId("all").addEventListener("input", () => {
    for (const input of byId("sliders").querySelectorAll("input")) {
      input.value = byId("all").value;
      thresholds.set(input.dataset.key, Number(input.value));
    }
    refresh();
  });
  for (const name of ["phrases", "config"]) byId(`tab-${name}`).addEventListener("click", () => selectTab(name));
  document.querySelector("[role=tablist]").addEventListener("keydown", (event) => {
    if (!["ArrowLeft", "ArrowRight"].includes(event.key)) return;
    const other = isConfigTab() ? "phrases" : "config";
    selectTab(other);
    byId(`tab-${other}`).focus();
  });
}

byId("phrases").value = INITIAL_PHRASES;
byId("samples").append(...SAMPLES.map((name, i) => {
  const button = element("button", { type: "button", ariaLabel: `sample ${i + 1}` }, element("img", { src: `playground/samples/${name}`, alt: "" }));
  button.addEventListener("click", () => openSample(name));
  return button;
}));
addListeners();
openProject();
