// Draw a picture with the tokens that are kept: they stay in colour, the rest fades; dots where tokens were merged.
function drawKept(canvas, image, grid, kept, anchors) {
  const [rows, columns] = grid, scale = Math.max(1, Math.ceil(320 / image.naturalWidth));
  const width = scale * image.naturalWidth, height = scale * image.naturalHeight;
  canvas.width = width; canvas.height = height;
  const context = canvas.getContext("2d");
  const x = c => Math.round(c * width / columns), y = r => Math.round(r * height / rows);
  const on = new Set(kept), has = (r, c) => r < 0 || c < 0 || r >= rows || c >= columns || on.has(r * columns + c);
  context.drawImage(image, 0, 0, width, height);
  context.fillStyle = anchors ? "rgba(246, 246, 244, .35)" : "rgba(246, 246, 244, .84)";
  if (anchors) context.fillRect(0, 0, width, height);
  context.strokeStyle = "#e63c1e";
  context.lineWidth = 2;
  for (let r = 0; r < rows; r++) for (let c = 0; c < columns; c++) {
    if (anchors) {
      if (!on.has(r * columns + c)) continue;
      context.beginPath();
      context.arc(x(c + .5), y(r + .5), 4.5, 0, 7);
      context.fillStyle = "#e63c1e";
      context.fill();
      context.strokeStyle = "#fff";
      context.stroke();
    } else if (!on.has(r * columns + c)) {
      context.fillRect(x(c), y(r), x(c + 1) - x(c), y(r + 1) - y(r));
    } else {
      context.beginPath();
      if (!has(r - 1, c)) { context.moveTo(x(c), y(r)); context.lineTo(x(c + 1), y(r)); }
      if (!has(r + 1, c)) { context.moveTo(x(c), y(r + 1)); context.lineTo(x(c + 1), y(r + 1)); }
      if (!has(r, c - 1)) { context.moveTo(x(c), y(r)); context.lineTo(x(c), y(r + 1)); }
      if (!has(r, c + 1)) { context.moveTo(x(c + 1), y(r)); context.lineTo(x(c + 1), y(r + 1)); }
      context.stroke();
    }
  }
}
