// Boxes on images. A box has label, score, and x, y, width and height in percent of the image.

const COLOURS = ["#e6194b", "#4363d8", "#27753a", "#a8501a", "#911eb4", "#008080", "#9a6324", "#6b7d00"];
const SVG = "http://www.w3.org/2000/svg";

/** Creates an element with properties and children; text is never parsed as HTML. */
export function element(name, properties = {}, ...children) {
  const created = Object.assign(document.createElement(name), properties);
  created.append(...children);
  return created;
}

/** Creates an SVG element with attributes. */
export function svgElement(name, attributes = {}) {
  const created = document.createElementNS(SVG, name);
  Object.entries(attributes).forEach(([attribute, value]) => created.setAttribute(attribute, value));
  return created;
}

/** Returns the colour of a label, one of all `labels`. */
export function colourOf(label, labels) {
  return COLOURS[Math.max(labels.indexOf(label), 0) % COLOURS.length];
}

/** Returns a count with its noun in the singular or plural; the plural ends in `ending`. */
export function count(number, noun, ending = "s") {
  return `${number} ${noun}${number === 1 ? "" : ending}`;
}

/** Draws boxes over the image in `frame`; earlier boxes are removed. */
export function drawBoxes(frame, boxes, labels) {
  frame.querySelectorAll("svg, .tag").forEach((old) => old.remove());
  const svg = svgElement("svg", { viewBox: "0 0 100 100", preserveAspectRatio: "none", "aria-hidden": "true" });
  frame.append(svg);
  for (const box of boxes) {
    const { x, y, width, height } = box, colour = colourOf(box.label, labels);
    svg.append(svgElement("rect", { x, y, width, height, stroke: colour }));
    const tag = element("span", { className: "tag", ariaHidden: "true", textContent: `${box.label} ${box.score.toFixed(2)}` });
    tag.classList.toggle("inside", y < 8); // near the top edge, where a tag above the box would be cut off
    if (x > 55) tag.style.right = `${100 - x - width}%`;
    else tag.style.left = `${x}%`;
    tag.style.top = `${y}%`;
    tag.style.background = colour;
    frame.append(tag);
  }
}

function iou(a, b) {
  const width = Math.min(a.x + a.width, b.x + b.width) - Math.max(a.x, b.x);
  const height = Math.min(a.y + a.height, b.y + b.height) - Math.max(a.y, b.y);
  const intersection = Math.max(width, 0) * Math.max(height, 0);
  const union = a.width * a.height + b.width * b.height - intersection;
  return union > 0 ? intersection / union : 0;
}

/**
 * Filters boxes as the detector does: thresholds first, then suppression. Returns the best box first.
 *
 * @param boxes all boxes of an image, each with its control and its place: the index of its label, or null for a
 *   negative phrase. Boxes of negative phrases suppress others and are then dropped.
 * @param thresholdOf maps a control and a place to a score; boxes below it are dropped.
 * @param nmsIou of the boxes of one control that overlap by more, only the best is kept, whatever their labels.
 */
export function filterBoxes(boxes, thresholdOf, nmsIou) {
  const kept = [];
  for (const box of [...boxes].sort((a, b) => b.score - a.score)) {
    if (box.score < thresholdOf(box.control, box.place)) continue;
    const rivals = nmsIou >= 1 ? [] : kept.filter((better) => better.control === box.control);
    if (rivals.every((better) => iou(box, better) <= nmsIou)) kept.push(box);
  }
  return kept.filter((box) => box.place !== null);
}
