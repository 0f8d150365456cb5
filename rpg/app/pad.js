// A canvas to draw on; every finished stroke is sent as a picture, on white paper.
const canvas = element.querySelector("canvas"), pen = canvas.getContext("2d");
let last = null;
function clear() { pen.fillStyle = "#ffffff"; pen.fillRect(0, 0, canvas.width, canvas.height); }
function place(event) {
  const box = canvas.getBoundingClientRect();
  return [(event.clientX - box.left) * canvas.width / box.width, (event.clientY - box.top) * canvas.height / box.height];
}
function stroke(to) {
  pen.strokeStyle = "#000000"; pen.lineWidth = 26; pen.lineCap = pen.lineJoin = "round";
  pen.beginPath(); pen.moveTo(...(last || to)); pen.lineTo(...to); pen.stroke();
  last = to;
}
canvas.addEventListener("pointerdown", (event) => {
  event.preventDefault(); canvas.setPointerCapture(event.pointerId); last = null; stroke(place(event));
});
canvas.addEventListener("pointermove", (event) => { if (last) { stroke(place(event)); } });
canvas.addEventListener("pointerup", () => { if (last) { last = null; trigger("input", {image: canvas.toDataURL("image/png")}); } });
canvas.addEventListener("pointercancel", () => { last = null; });
element.querySelector(".pad-clear").addEventListener("click", clear);
clear();
