// Sorts and filters the table of volumes. #filter=siemens&sort=mean-hu&order=descending in the address does the same.
(() => {
  const table = document.getElementById("volume-table");
  if (!table) return;
  const body = table.tBodies[0], rows = [...body.rows], heads = [...table.tHead.rows[0].cells];
  const words = rows.map((row) => row.textContent.toLowerCase());
  const form = document.getElementById("filter-form"), input = document.getElementById("filter"), count = document.getElementById("filter-count");
  const value = (row, column) => {
    const cell = row.cells[column], number = cell.dataset.v;
    return number === undefined ? cell.textContent : number === "" ? NaN : Number(number);
  };
  function filter(text) {
    const wanted = text.toLowerCase().split(/\s+/).filter(Boolean);
    let shown = 0;
    rows.forEach((row, i) => {
      row.hidden = !wanted.every((word) => words[i].includes(word));
      shown += row.hidden ? 0 : 1;
    });
    count.textContent = `${shown} of ${rows.length} rows shown`;
  }
  function sort(name, isDescending) {
    const column = heads.findIndex((head) => head.dataset.name === name);
    if (column < 0) return;
    const sign = isDescending ? -1 : 1;
    const keyed = rows.map((row) => [value(row, column), row]);
    keyed.sort(([a], [b]) => {
      if (typeof a === "string") return sign * a.localeCompare(b);
      // What is not known comes last, whichever way the others stand.
      return Number.isNaN(a) - Number.isNaN(b) || (sign * (a - b) || 0);
    });
    body.append(...keyed.map(([, row]) => row));
    heads.forEach((head, i) => head.setAttribute("aria-sort", i === column ? (isDescending ? "descending" : "ascending") : "none"));
  }
  function follow() {
    const wanted = new URLSearchParams(location.hash.slice(1));
    if (wanted.has("filter")) { input.value = wanted.get("filter"); filter(input.value); }
    if (wanted.has("sort")) sort(wanted.get("sort"), wanted.get("order") === "descending");
  }
  heads.forEach((head) => head.querySelector("button").addEventListener("click", () => sort(head.dataset.name, head.getAttribute("aria-sort") === "ascending")));
  input.addEventListener("input", () => filter(input.value));
  form.addEventListener("submit", (event) => event.preventDefault());
  addEventListener("hashchange", follow);
  form.hidden = false;
  filter("");
  follow();
})();
