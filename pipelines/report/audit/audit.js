// Decisions: by keys or buttons, kept in this browser, downloaded as a table. Nothing leaves the page.
const audit = JSON.parse(document.getElementById("rows").textContent);
const cards = [...document.querySelectorAll(".finding")];
const store = `mhe-audit-${audit.digest}`;
let decisions = {};
let current = -1;
try { decisions = JSON.parse(localStorage.getItem(store) || "{}"); } catch { /* a browser may forbid it */ }

function show(number) {
  const decision = decisions[number] || "";
  cards[number].dataset.decision = decision;
  for (const button of cards[number].querySelectorAll("button")) {
    button.setAttribute("aria-pressed", String(button.dataset.decision === decision));
  }
  const count = Object.keys(decisions).length;
  document.getElementById("decided").textContent = count.toLocaleString("en");
  document.getElementById("download").disabled = !count;
}

function decide(number, decision) {
  if (decision && decisions[number] !== decision) decisions[number] = decision;
  else delete decisions[number];
  try { localStorage.setItem(store, JSON.stringify(decisions)); } catch { /* then until the page closes */ }
  show(number);
}

function mark(number) {
  cards[current]?.classList.remove("current");
  current = number;
  cards[current].classList.add("current");
}

function go(number) {
  if (!cards.length) return;
  mark(Math.min(Math.max(number, 0), cards.length - 1));
  cards[current].focus({preventScroll: true});
  cards[current].scrollIntoView({block: "nearest"});
}

function table() {
  const cell = text => /[",\r\n]/.test(text) ? `"${text.replaceAll('"', '""')}"` : text;
  const lines = [[...audit.columns, "decision"]];
  for (const number of Object.keys(decisions).map(Number).sort((a, b) => a - b)) {
    for (const row of audit.rows[number]) lines.push([...row, decisions[number]]);
  }
  return lines.map(line => line.map(cell).join(",")).join("\n") + "\n";
}

function download() {
  const link = document.createElement("a");
  link.href = URL.createObjectURL(new Blob([table()], {type: "text/csv"}));
  link.download = "decisions.csv";
  link.click();
  URL.revokeObjectURL(link.href);
}

cards.forEach((card, number) => {
  if (decisions[number]) show(number);
  card.addEventListener("focusin", () => mark(number));
  for (const button of card.querySelectorAll("button")) {
    button.addEventListener("click", () => decide(number, button.dataset.decision));
  }
});
document.getElementById("findings").textContent = cards.length.toLocaleString("en");
document.getElementById("previous").addEventListener("click", () => go(current - 1));
document.getElementById("next").addEventListener("click", () => go(current + 1));
document.getElementById("download").addEventListener("click", download);
document.addEventListener("keydown", event => {
  if (event.ctrlKey || event.metaKey || event.altKey) return;
  const key = event.key.toLowerCase();
  if (key === "j") go(current + 1);
  else if (key === "k") go(current - 1);
  else if (current >= 0 && key === "u") decide(current, "");
  else if (current >= 0 && (key === "a" || key === "r")) {
    const decision = key === "a" ? "accept" : "reject";
    if (decisions[current] !== decision) decide(current, decision);
    go(current + 1);
  } else return;
  event.preventDefault();
});
