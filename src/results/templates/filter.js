// Filters and sorts the tables of claims. Without it every claim is there, in the run's order.
document.documentElement.classList.add("js");
for (const section of document.querySelectorAll("[data-claims]")) {
  const bodies = Array.from(section.querySelectorAll("tbody"));
  const rows = bodies.flatMap((body) => Array.from(body.rows));
  const [text, label, gold, least, order] = ["text", "label", "gold", "least", "order"]
    .map((name) => section.querySelector(`[data-filter=${name}]`));
  const shown = section.querySelector("output");
  const margin = (row) => parseFloat(row.dataset.margin || "0");
  let texts = null; // of each row, lower-cased once, when first asked for
  const fits = (row, at, wanted, nats) => (!wanted || texts[at].includes(wanted))
    && (!label.value || row.dataset.label === label.value)
    && (!gold.value || row.dataset.agrees === gold.value)
    && (!nats || margin(row) >= nats);
  const apply = () => {
    texts ??= rows.map((row) => row.textContent.toLowerCase());
    const wanted = text.value.toLowerCase();
    const nats = parseFloat(least.value) || 0;
    let kept = rows.filter((row, at) => fits(row, at, wanted, nats));
    if (order.value !== "run") {
      const sign = order.value === "least" ? 1 : -1;
      kept = kept.slice().sort((a, b) => sign * (margin(a) - margin(b)));
    }
    // The rows that fit fill the tables from the first on; the others are out of the page until they fit again.
    const size = Math.ceil(rows.length / bodies.length);
    bodies.forEach((body, at) => {
      body.replaceChildren(...kept.slice(at * size, (at + 1) * size));
      body.closest(".chunk").hidden = at > 0 && at * size >= kept.length;
    });
    section.classList.toggle("filtered", kept.length <= size);
    shown.textContent = `${kept.length} of ${rows.length} claims`;
  };
  for (const field of [text, label, gold, least, order]) field.addEventListener("input", apply);
  shown.textContent = `${rows.length} of ${rows.length} claims`;
}
