// Boxes on pictures. A box has label, score, and x, y, width, height in percent of the picture.

const COLOURS = ["#e6194b", "#4363d8", "#27753a", "#a8501a", "#911eb4", "#008080", "#9a6324", "#6b7d00"];
const SVG = "http://www.w3.org/2000/svg";

/** A new element with properties and children; text is never taken as HTML. */
export function element(name, properties = {}, ...children) {
  const made = Object.assign(document.createElement(name), properties);
  made.append(...children);
  return made;
}

/** The colour of a label among all of them. */
export function colourOf(label, labels) {
  const place = labels.indexOf(label);
  return COLOURS[(place < 0 ? 0 : place) % COLOURS.length];
}

/** Draws boxes over the picture in `frame`, in place of those that are there. */
export function draw(frame, boxes, labels) {
  frame.querySelectorAll("svg, .tag").forEach((old) => old.remove());
  const svg = document.createElementNS(SVG, "svg");
  svg.setAttribute("viewBox", "0 0 100 100");
  svg.setAttribute("preserveAspectRatio", "none");
  svg.setAttribute("aria-hidden", "true");
  frame.append(svg);
  for (const box of boxes) {
    const rect = document.createElementNS(SVG, "rect");
    for (const edge of ["x", "y", "width", "height"]) rect.setAttribute(edge, box[edge]);
    rect.setAttribute("stroke", colourOf(box.label, labels));
    svg.append(rect);
    const tag = element("span", { className: "tag", ariaHidden: "true", textContent: `${box.label} ${box.score.toFixed(2)}` });
    tag.classList.toggle("inside", box.y < 8);
    if (box.x > 55) tag.style.right = `${100 - box.x - box.width}%`;
    else tag.style.left = `${box.x}%`;
    tag.style.top = `${box.y}%`;
    tag.style.background = colourOf(box.label, labels);
    frame.append(tag);
  }
}

function overlap(a, b) {
  const width = Math.min(a.x + a.width, b.x + b.width) - Math.max(a.x, b.x);
  const height = Math.min(a.y + a.height, b.y + b.height) - Math.max(a.y, b.y);
  const both = Math.max(width, 0) * Math.max(height, 0);
  const either = a.width * a.height + b.width * b.height - both;
  return either > 0 ? both / either : 0;
}

/**
 * The boxes that `/predict` answers with these thresholds, best first.
 *
 * @param boxes all of a picture, each with its control and the place of its label; null is that of negative phrases.
 * @param threshold gives that of a place; a negative phrase has the lowest of its control.
 * @param nmsIou of boxes of one control that overlap more only the best stays, whatever their labels.
 */
export function cut(boxes, threshold, nmsIou) {
  const kept = [];
  for (const box of [...boxes].sort((a, b) => b.score - a.score)) {
    if (box.score < threshold(box.control, box.place)) continue;
    const rivals = nmsIou >= 1 ? [] : kept.filter((better) => better.control === box.control);
    if (rivals.every((better) => overlap(box, better) <= nmsIou)) kept.push(box);
  }
  return kept.filter((box) => box.place !== null);
}
