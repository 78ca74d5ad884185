// Takes answers by click and key, remembers them where the browser may, and saves the file that `--known` reads.
document.documentElement.classList.add("js");
const main = document.querySelector("[data-asking]");
const cards = Array.from(main.querySelectorAll("article"));
const told = main.querySelector("output");
const bar = main.querySelector("progress");
const keys = main.querySelector("[data-keys]");
const place = `icm-ask-${main.dataset.asking}`;
let current = 0;

const buttons = (card) => Array.from(card.querySelectorAll("[data-cell]"));
const given = (card) => buttons(card).find((one) => one.getAttribute("aria-pressed") === "true");
const cells = () => cards.map((card) => given(card)?.dataset.cell ?? "");

const show = (more) => {
  const count = cards.filter(given).length;
  bar.value = count;
  told.textContent = `${count} of ${cards.length} answered${more ? `; ${more}` : ""}`;
};
const keep = () => {
  try { localStorage.setItem(place, JSON.stringify(cells())); } catch { /* a browser that keeps nothing */ }
};
const press = (card, button) => {
  for (const one of buttons(card)) {
    one.setAttribute("aria-pressed", String(one === button && one.getAttribute("aria-pressed") !== "true"));
  }
  card.classList.toggle("answered", Boolean(given(card)));
};
const go = (at) => {
  current = Math.max(0, Math.min(cards.length - 1, at));
  cards[current].focus();
  cards[current].scrollIntoView({ block: cards[current].offsetHeight > innerHeight / 2 ? "start" : "center" });
};
const answer = (at, button) => {
  press(cards[at], button);
  keep();
  show();
  if (given(cards[at])) go(at + 1); else go(at);
};
const save = () => {
  const lines = cards.map((card) => card.dataset.before + (given(card)?.dataset.cell ?? '""') + card.dataset.after);
  const known = Array.from(main.querySelectorAll("[data-known]"), (one) => one.dataset.known);
  const text = "\ufeff" + [main.dataset.head, ...lines, ...known].map((line) => `${line}\r\n`).join("");
  const link = document.createElement("a");
  link.href = URL.createObjectURL(new Blob([text], { type: "text/csv" }));
  link.download = main.dataset.file;
  link.click();
  setTimeout(() => URL.revokeObjectURL(link.href), 10000);
  show(`${main.dataset.file} saved`);
};

try {
  JSON.parse(localStorage.getItem(place) ?? "[]").forEach((cell, at) => {
    const button = cards[at] && buttons(cards[at]).find((one) => one.dataset.cell === cell);
    if (button) press(cards[at], button);
  });
} catch { /* nothing was kept */ }
cards.forEach((card, at) => {
  card.addEventListener("focusin", () => { current = at; });
  for (const button of buttons(card)) button.addEventListener("click", () => answer(at, button));
});
main.querySelector("[data-save]").addEventListener("click", save);
document.addEventListener("keydown", (event) => {
  if (!keys.checked || event.ctrlKey || event.metaKey || event.altKey) return;
  const button = buttons(cards[current]).find((one) => one.dataset.key === event.key);
  if (button) answer(current, button);
  else if (event.key === "ArrowDown") go(cards[current].contains(document.activeElement) ? current + 1 : current);
  else if (event.key === "ArrowUp") go(cards[current].contains(document.activeElement) ? current - 1 : current);
  else if (event.key === "s") save();
  else return;
  event.preventDefault();
});
show();
const open = Math.max(0, cards.findIndex((card) => !given(card)));
if (open) go(open); else cards[0].focus({ preventScroll: true });
