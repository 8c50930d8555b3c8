"use strict";
document.documentElement.classList.add("js");
document.addEventListener("DOMContentLoaded", () => {
  for (const box of document.querySelectorAll(".records")) {
    const body = box.querySelector("tbody"), input = box.querySelector("input"), select = box.querySelector("select");
    const count = box.querySelector(".count"), step = 100;  // rows beyond it have the class `over` in the page
    const fold = text => text.normalize("NFKC").toLowerCase();
    const rows = [...body.rows].map((row, at) => ({ row, at, state: row.dataset.state, text: null }));
    const text = one => one.text ??= fold(one.row.textContent);
    const more = document.createElement("button");
    more.type = "button";
    more.className = "more";
    let limit = step;

    const show = () => {
      const words = fold(input.value).split(/\s+/).filter(Boolean), state = select ? select.value : "";
      let found = 0;
      for (const one of rows) {
        const fits = (!state || one.state === state) && words.every(word => text(one).includes(word));
        one.row.hidden = !fits;
        one.row.classList.toggle("over", fits && ++found > limit);
      }
      const of = rows.length.toLocaleString("en"), these = found.toLocaleString("en");
      count.textContent = (found < rows.length ? `${these} of ${of}` : of) + (found > limit ? `; first ${limit} shown` : "");
      more.hidden = found <= limit;
      more.textContent = `Show all ${these}`;
    };

    const value = (one, column) => {
      const cell = one.row.cells[column].textContent.trim(), figure = Number(cell);
      return cell !== "" && Number.isFinite(figure) ? figure : fold(cell);
    };
    const compare = (a, b) => typeof a === typeof b
      ? (typeof a === "number" ? a - b : a < b ? -1 : a > b ? 1 : 0)
      : typeof a === "number" ? -1 : 1;
    const sort = (header, column) => {
      const down = header.getAttribute("aria-sort") === "ascending";
      for (const other of header.parentNode.cells) other.removeAttribute("aria-sort");
      header.setAttribute("aria-sort", down ? "descending" : "ascending");
      const keys = new Map(rows.map(one => [one, value(one, column)]));
      rows.sort((a, b) => (down ? -1 : 1) * compare(keys.get(a), keys.get(b)) || a.at - b.at);
      const all = document.createDocumentFragment();
      for (const one of rows) all.append(one.row);
      body.append(all);
      show();
    };

    [...box.querySelector("thead").rows[0].cells].forEach((header, column) => {
      if (!header.hasAttribute("data-sort")) return;
      const button = document.createElement("button");
      button.type = "button";
      button.append(...header.childNodes);
      button.addEventListener("click", () => sort(header, column));
      header.append(button);
    });
    let timer = 0;
    const start = () => { limit = step; show(); };
    input.addEventListener("input", () => { clearTimeout(timer); timer = setTimeout(start, 80); });
    if (select) select.addEventListener("change", start);
    more.addEventListener("click", () => { limit = Infinity; show(); });
    box.append(more);
    show();
  }
});
