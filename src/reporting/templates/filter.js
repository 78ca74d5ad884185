// Filters the tables of claims. Without it every claim is there, in the run's order.
document.documentElement.classList.add("js");
for (const section of document.querySelectorAll("[data-claims]")) {
  const body = section.querySelector("tbody");
  const rows = Array.from(body.rows);
  const [text, label, gold, least, order] = ["text", "label", "gold", "least", "order"]
    .map((name) => section.querySelector(`[data-filter=${name}]`));
  const shown = section.querySelector("output");
  let texts = null; // lower-cased once, when first asked for
  const filter = () => {
    texts ??= rows.map((row) => row.textContent.toLowerCase());
    const wanted = text.value.toLowerCase();
    const margin = parseFloat(least.value) || 0;
    let count = 0;
    rows.forEach((row, at) => {
      const fits = (!wanted || texts[at].includes(wanted))
        && (!label.value || row.dataset.label === label.value)
        && (!gold.value || row.dataset.agrees === gold.value)
        && (!margin || parseFloat(row.dataset.margin) >= margin);
      if (row.hidden === fits) row.hidden = !fits;
      count += fits;
    });
    shown.textContent = `${count} of ${rows.length} claims`;
  };
  const sort = () => {
    const margin = (row) => parseFloat(row.dataset.margin || "0");
    const sorted = order.value === "run" ? rows
      : rows.slice().sort((a, b) => (order.value === "least" ? 1 : -1) * (margin(a) - margin(b)));
    body.append(...sorted);
  };
  for (const field of [text, label, gold, least]) field.addEventListener("input", filter);
  order.addEventListener("input", sort);
  shown.textContent = `${rows.length} of ${rows.length} claims`;
}
