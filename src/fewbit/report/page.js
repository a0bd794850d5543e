"use strict";
// Tables sort by a click, or Enter or Space, on the name of a column: numbers by value, then back to front.
for (const button of document.querySelectorAll("th > button")) {
  button.addEventListener("click", () => {
    const head = button.parentElement, table = head.closest("table"), body = table.tBodies[0];
    const at = head.cellIndex, number = head.classList.contains("number");
    const before = head.getAttribute("aria-sort");
    const first = number ? "descending" : "ascending", other = number ? "ascending" : "descending";
    const order = before === first ? other : first, sign = order === "ascending" ? 1 : -1;
    const value = (row) => row.cells[at].dataset.v ?? row.cells[at].textContent;
    const rows = Array.from(body.rows);
    rows.sort((a, b) => {
      const x = value(a), y = value(b);
      if (x === "" || y === "") return (x === "") - (y === "");  // what is not known stays below
      return sign * (number ? x - y : x.localeCompare(y, "en", { numeric: true }));
    });
    body.append(...rows);
    for (const th of table.tHead.rows[0].cells) {
      if (th.hasAttribute("aria-sort")) th.setAttribute("aria-sort", th === head ? order : "none");
    }
  });
}
