// The page of a report: the budget's slider, the gallery, tables that sort, curves that hide, light and dark.
const data = JSON.parse(document.getElementById("data").textContent);
const element = (tag, className, text) => Object.assign(document.createElement(tag), { className, textContent: text ?? "" });
const verdict = (right, answer) => element("div", "answer " + (right ? "good" : "bad"), (right ? "✓ " : "✗ ") + (answer || "(nothing)"));
const cells = [];

function enlarges(picture, name) {
  const open = () => {
    const large = document.getElementById("large"), image = large.firstElementChild;
    image.src = picture.src ?? picture.toDataURL(); image.alt = name;
    large.showModal();
  };
  picture.tabIndex = 0;
  picture.addEventListener("click", open);
  picture.addEventListener("keydown", event => { if (event.key === "Enter") open(); });
}
document.getElementById("large")?.addEventListener("click", event => event.currentTarget.close());

for (const example of data.examples) {
  const box = element("div", "example"), left = element("div"), grid = element("div", "grid"), image = new Image();
  image.alt = "the picture"; image.src = example.picture;
  left.append(element("div", "group", example.group), image);
  for (const [question, answer] of example.turns) {
    const turn = element("div", "turn", question + " ");
    turn.append(element("b", "", answer));
    left.append(turn);
  }
  enlarges(image, example.turns[0][0]);
  left.append(element("div", "turn soft", `all ${example.tokens} tokens:`), verdict(example.right, example.answer));
  for (const name of data.pruners) {
    const cell = element("div", "cell"), canvas = document.createElement("canvas"), below = element("div");
    canvas.setAttribute("role", "img");
    enlarges(canvas, `what ${name} keeps`);
    cell.append(element("b", "", name), canvas, below);
    grid.append(cell);
    cells.push({ example, name, image, canvas, below });
  }
  box.append(left, grid);
  document.getElementById("gallery").append(box);
}

function show(budget) {
  for (const slider of document.querySelectorAll(".budget")) {
    slider.value = budget;
    slider.setAttribute("aria-valuetext", data.labels[budget]);
    slider.nextElementSibling.textContent = data.labels[budget];
  }
  for (const table of document.querySelectorAll("[data-keep]")) table.hidden = +table.dataset.keep !== budget;
  for (const { example, name, image, canvas, below } of cells) {
    const shown = example.shown[budget].find(one => one.name === name);
    const draw = () => { if (canvas.dataset.budget === String(budget)) drawKept(canvas, image, example.grid, shown.kept, shown.anchors); };
    canvas.dataset.budget = budget;
    canvas.dataset.kept = shown.kept.length;
    canvas.setAttribute("aria-label", `${shown.kept.length} tokens kept by ${name}`);
    image.complete && image.naturalWidth ? draw() : image.addEventListener("load", draw, { once: true });
    below.replaceChildren(verdict(shown.right, shown.answer));
  }
}
for (const slider of document.querySelectorAll(".budget")) slider.addEventListener("input", () => show(+slider.value));
show(data.preferred);

for (const table of document.querySelectorAll("table.sorts")) {
  const headings = [...table.tHead.rows[0].cells], body = table.tBodies[0];
  const value = (row, column) => {
    const cell = row.cells[column], number = parseFloat(cell.dataset.value ?? cell.textContent);
    return column ? (Number.isNaN(number) ? -Infinity : number) : cell.textContent;
  };
  const sort = column => {
    const falling = headings[column].ariaSort !== "descending" && column > 0 || headings[column].ariaSort === "ascending";
    for (const heading of headings) heading.removeAttribute("aria-sort");
    headings[column].ariaSort = falling ? "descending" : "ascending";
    const order = (a, b) => { const x = value(a, column), y = value(b, column); return x < y ? -1 : x > y ? 1 : 0; };
    body.append(...[...body.rows].sort((a, b) => falling ? order(b, a) : order(a, b)));
  };
  headings.forEach((heading, column) => {
    heading.addEventListener("click", () => sort(column));
    heading.addEventListener("keydown", event => { if (event.key === "Enter") sort(column); });
  });
}

for (const part of document.querySelectorAll("[data-pruner]")) for (const [event, on] of [["pointerenter", true], ["pointerleave", false]])
  part.addEventListener(event, () => {
    for (const other of document.querySelectorAll(`[data-pruner="${part.dataset.pruner}"]`)) other.classList.toggle("lit", on);
  });
document.getElementById("panel")?.addEventListener("change", event => {
  [...document.querySelectorAll(".panels svg")].forEach((panel, number) => panel.classList.toggle("chosen", number === event.target.selectedIndex));
});

for (const button of document.querySelectorAll(".legend button")) button.addEventListener("click", () => {
  const on = button.ariaPressed !== "true";
  button.ariaPressed = on;
  for (const curve of document.querySelectorAll(`svg [data-pruner="${button.dataset.pruner}"]`)) curve.style.display = on ? "" : "none";
});

document.getElementById("theme").addEventListener("click", () => {
  const root = document.documentElement, dark = matchMedia("(prefers-color-scheme: dark)").matches;
  const now = root.style.colorScheme || (dark ? "dark" : "light");
  root.style.colorScheme = now === "dark" ? "light" : "dark";
});
