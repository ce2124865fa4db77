"use strict";

const SVG = "http://www.w3.org/2000/svg";
const at = (id) => document.getElementById(id);
const file = at("file"), drop = at("drop"), threshold = at("threshold"), photo = at("photo"), overlay = at("overlay");

let result = null; // the server's answer: width, height, seconds, texts
let name = "image.jpg";
let shownUrl = null;
let turn = 0; // counts photographs: an answer to an earlier one is dropped
let chosen = -1; // index of the text that is pointed out

function say(text, busy = false) {
  at("status").textContent = text;
  at("status").classList.toggle("busy", busy);
}

function complain(text) {
  at("error").textContent = text;
  at("error").hidden = !text;
}

function visible() {
  const lowest = Number(threshold.value);
  return result.texts.map((text, index) => ({ ...text, index })).filter((text) => text.score >= lowest);
}

async function post(path, body, type) {
  let answer;
  try {
    answer = await fetch(path, { method: "POST", body, headers: { "Content-Type": type } });
  } catch {
    throw new Error("The program does not answer. Is it still running in its terminal?");
  }
  if (!answer.ok) {
    const told = await answer.json().catch(() => ({}));
    throw new Error(told.error || `The program answered with status ${answer.status}.`);
  }
  return answer;
}

async function look(blob, called) {
  const mine = ++turn;
  complain("");
  result = null;
  chosen = -1;
  at("controls").hidden = true;
  at("stage").hidden = true;
  at("placeholder").hidden = false;
  at("placeholder").textContent = "Looking for text …";
  say(`Looking for text in ${called} …`, true);
  try {
    const answer = await (await post("/detect", blob, "application/octet-stream")).json();
    if (mine !== turn) return;
    if (shownUrl) URL.revokeObjectURL(shownUrl);
    shownUrl = URL.createObjectURL(blob);
    photo.src = shownUrl;
    at("stage").style.aspectRatio = `${answer.width} / ${answer.height}`;
    await photo.decode().catch(() => complain("This browser cannot show pictures of this format; the outlines are right all the same."));
    if (mine !== turn) return;
    result = answer;
    name = called;
    at("stage").hidden = false;
    at("placeholder").hidden = true;
    at("controls").hidden = false;
    draw();
  } catch (error) {
    if (mine !== turn) return;
    say("");
    complain(`${called}: ${error.message}`);
    at("placeholder").textContent = "The outlines appear here.";
  }
}

function draw() {
  const texts = visible();
  const size = letterSize();
  overlay.setAttribute("viewBox", `0 0 ${result.width} ${result.height}`);
  overlay.replaceChildren(...texts.map((text) => {
    const group = document.createElementNS(SVG, "g");
    if (text.index === chosen) group.classList.add("chosen");
    const polygon = document.createElementNS(SVG, "polygon");
    polygon.setAttribute("points", text.points.map((p) => p.join(",")).join(" "));
    const title = document.createElementNS(SVG, "title");
    title.textContent = `Text ${text.index + 1}, score ${text.score.toFixed(2)}`;
    polygon.append(title);
    group.append(polygon);
    if (at("scores").checked || text.index === chosen) {
      const [x, y] = labelPlace(text.points, size);
      const label = document.createElementNS(SVG, "text");
      label.setAttribute("x", x);
      label.setAttribute("y", y);
      label.setAttribute("font-size", size);
      label.setAttribute("stroke-width", size / 6);
      label.textContent = text.score.toFixed(2);
      group.append(label);
    }
    return group;
  }));
  const focused = document.activeElement?.dataset?.index;
  at("list").replaceChildren(...texts.map((text) => {
    const item = document.createElement("li");
    const button = document.createElement("button");
    button.type = "button";
    button.dataset.index = text.index;
    button.textContent = text.score.toFixed(2);
    button.setAttribute("aria-label", `Point out text ${text.index + 1}, score ${text.score.toFixed(2)}`);
    button.setAttribute("aria-pressed", String(text.index === chosen));
    item.append(button);
    return item;
  }));
  if (focused !== undefined) at("list").querySelector(`[data-index="${focused}"]`)?.focus();
  at("threshold-value").textContent = Number(threshold.value).toFixed(2);
  const all = result.texts.length;
  at("list-title").textContent = `Texts (${texts.length} of ${all})`;
  say(`${texts.length} of ${all} texts shown, found in ${result.seconds.toFixed(1)}\u00a0s.`);
}

/** Pixels of the photograph that are as high as a small letter on the screen. */
function letterSize() {
  const { width, height } = at("stage").getBoundingClientRect();
  const scale = Math.min(width / result.width, height / result.height);
  return (width < 500 ? 10 : 13) / (scale || 1);
}

/** Above the highest point of the outline, inside the picture. */
function labelPlace(points, size) {
  const [x, y] = points.reduce((best, p) => (p[0] + p[1] < best[0] + best[1] ? p : best));
  return [Math.min(Math.max(x, 0), result.width - 2.5 * size), Math.max(y - size / 4, size)];
}

function save(blob, called) {
  const link = document.createElement("a");
  link.href = URL.createObjectURL(blob);
  link.download = called;
  link.click();
  setTimeout(() => URL.revokeObjectURL(link.href), 10000);
}

function picture() {
  const canvas = document.createElement("canvas");
  canvas.width = result.width;
  canvas.height = result.height;
  const pen = canvas.getContext("2d");
  if (photo.naturalWidth) pen.drawImage(photo, 0, 0, canvas.width, canvas.height);
  const size = Math.max(canvas.width, canvas.height) / 60;
  pen.lineWidth = Math.max(1.5, size / 8);
  pen.lineJoin = "round";
  pen.font = `600 ${size}px system-ui, sans-serif`;
  for (const text of visible()) {
    pen.beginPath();
    text.points.forEach(([x, y]) => pen.lineTo(x, y));
    pen.closePath();
    pen.strokeStyle = "#00d15a";
    pen.stroke();
    if (at("scores").checked) {
      const [x, y] = labelPlace(text.points, size);
      pen.save();
      pen.lineWidth = size / 6;
      pen.strokeStyle = "#000";
      pen.strokeText(text.score.toFixed(2), x, y);
      pen.fillStyle = "#fff";
      pen.fillText(text.score.toFixed(2), x, y);
      pen.restore();
    }
  }
  return new Promise((resolve, reject) =>
    canvas.toBlob((blob) => (blob ? resolve(blob) : reject(new Error("The browser cannot draw a picture of this size."))), "image/png"));
}

async function download(format) {
  complain("");
  const stem = name.replace(/\.[^.]*$/, "") || "image";
  try {
    if (format === "picture") {
      save(await picture(), `${stem}_texts.png`);
      return;
    }
    const texts = visible().map(({ points, score }) => ({ points, score }));
    const body = JSON.stringify({ format, name, height: result.height, width: result.width, texts });
    const answer = await post("/labels", body, "application/json");
    save(await answer.blob(), format === "labelme" ? `${stem}.json` : `${stem}_${format}.json`);
  } catch (error) {
    complain(error.message);
  }
}

file.addEventListener("change", () => {
  if (file.files.length) look(file.files[0], file.files[0].name);
  file.value = ""; // the same file may be chosen again
});
for (const kind of ["dragenter", "dragover"]) {
  document.addEventListener(kind, (event) => {
    event.preventDefault();
    drop.classList.add("over");
  });
}
document.addEventListener("dragleave", (event) => {
  if (!event.relatedTarget) drop.classList.remove("over");
});
document.addEventListener("drop", (event) => {
  event.preventDefault();
  drop.classList.remove("over");
  const dropped = event.dataTransfer.files[0];
  if (dropped) look(dropped, dropped.name);
  else complain("Nothing to look at was dropped: drop an image file.");
});
document.addEventListener("paste", (event) => {
  const pasted = event.clipboardData.files[0];
  if (pasted) look(pasted, pasted.name || "pasted.png");
});
threshold.addEventListener("input", draw);
at("scores").addEventListener("change", draw);
window.addEventListener("resize", () => {
  if (result) draw();
});
at("list").addEventListener("click", (event) => {
  const index = event.target.dataset.index;
  if (index === undefined) return;
  chosen = Number(index) === chosen ? -1 : Number(index);
  draw();
});
document.querySelectorAll("[data-format]").forEach((button) => button.addEventListener("click", () => download(button.dataset.format)));
