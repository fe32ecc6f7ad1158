// Anchors over their positives in one picture, drawn from the sheets of the page by the chosen way, scale and time.
// Without this the sheets themselves are shown.
"use strict";
addEventListener("load", () => {
  const section = document.getElementById("explorer");
  const [columns, steps, height, width] = ["columns", "steps", "height", "width"].map(name => +section.dataset[name]);
  const sheets = [...section.querySelectorAll(".sheets img")];
  const form = section.querySelector("form"), canvas = section.querySelector("canvas");
  const scale = document.getElementById("scale"), time = document.getElementById("time");
  const across = columns / 2, gap = Math.ceil(width / 16);  // two blocks of anchors over positives
  const block = 2 * height + 5 * gap;
  canvas.width = across * (width + gap) - gap;
  canvas.height = 2 * block - 4 * gap;
  const paint = canvas.getContext("2d");

  function draw() {
    const way = (form.querySelector("[name=way]:checked") || form.querySelector("[name=way]")).value;
    const own = sheets.filter(sheet => sheet.dataset.way === way);
    const sheet = own.length > 1 ? own[time.value] : own[0];
    const row = Math.round(scale.value / scale.max * steps);
    for (let column = 0; column < columns; column++) {
      const x = column % across * (width + gap), y = Math.floor(column / across) * block;
      for (const [from, below] of [[0, 0], [row, height + gap]])
        paint.drawImage(sheet, column * width, from * height, width, height, x, y + below, width, height);
    }
    const distance = (scale.value * sheet.dataset.distance).toFixed(2);
    say(scale, `${scale.value} × dz, mean distance ${distance}`);
    if (time) {
      time.disabled = own.length < 2;
      say(time, time.disabled ? "of the navigator alone" : sheet.dataset.time);
    }
    const name = own.length > 1 ? `${way} ${sheet.dataset.time}` : way;
    canvas.setAttribute("aria-label", `Anchors above their positives by ${name} at ${scale.value} times dz`);
  }

  function say(input, text) {
    const output = form.querySelector(`output[for=${input.id}]`);
    if (output.textContent !== text) output.textContent = text;  // which is read out
  }

  form.addEventListener("input", draw);
  form.addEventListener("submit", event => event.preventDefault());
  form.hidden = false;
  section.querySelector(".sheets").hidden = true;
  draw();
});
