"use strict";
// Tables sort by a click on a heading: numbers by value, the rest by their text, empty cells last.
for (const table of document.querySelectorAll("table.sortable")) {
  const body = table.tBodies[0];
  const headings = [...table.tHead.rows[0].cells];
  headings.forEach((heading, column) => {
    heading.querySelector("button").addEventListener("click", () => {
      const down = heading.getAttribute("aria-sort") === "none" && heading.classList.contains("number");
      const descending = down || heading.getAttribute("aria-sort") === "ascending";
      const key = (row) => {
        const cell = row.cells[column];
        return cell.dataset.value === undefined ? cell.textContent.trim() : Number(cell.dataset.value);
      };
      const rows = [...body.rows].sort((a, b) => {
        const [x, y] = [key(a), key(b)];
        if (x === "–" || y === "–") return (x === "–") - (y === "–");
        const order = typeof x === "number" && typeof y === "number" ? x - y
          : String(x).localeCompare(String(y), undefined, { numeric: true });
        return descending ? -order : order;
      });
      headings.forEach((other) => other.setAttribute("aria-sort", "none"));
      heading.setAttribute("aria-sort", descending ? "descending" : "ascending");
      table.classList.add("sorted");
      body.append(...rows);
    });
  });
}

// What a box of a graph was made from, and what was made of it, stands out while the box is pointed at or in focus.
for (const graph of document.querySelectorAll("svg.graph")) {
  const edges = [...graph.querySelectorAll(".edge")].map((line) => ({
    line, from: line.dataset.from.split(" "), to: line.dataset.to.split(" "),
  }));
  const boxes = new Map([...graph.querySelectorAll(".node")].map((box) => [box.dataset.node, box]));
  const reached = (start, near, far) => {
    const found = new Set([start]);
    for (let grew = true; grew; ) {
      grew = false;
      for (const edge of edges) {
        // Lines to and from a joint name all models beyond it: one of their two ends is always a single model.
        if (edge[near].some((key) => found.has(key))) {
          for (const key of edge[far]) if (!found.has(key)) { found.add(key); grew = true; }
        }
      }
    }
    return found;
  };
  const show = (key) => {
    const above = reached(key, "to", "from");
    const below = reached(key, "from", "to");
    for (const [other, box] of boxes) box.classList.toggle("near", above.has(other) || below.has(other));
    for (const { line, from, to } of edges) {
      const up = to.some((k) => above.has(k)) && from.every((k) => above.has(k));
      const down = from.some((k) => below.has(k)) && to.some((k) => below.has(k));
      line.classList.toggle("near", up || down);
    }
    graph.classList.add("lit");
  };
  // Listened for outside the drawing: an element of SVG that listens for focus would become a stop of its own.
  const around = graph.parentElement;
  for (const event of ["pointerover", "focusin"]) {
    around.addEventListener(event, ({ target }) => {
      const box = target.closest(".node");
      if (box) show(box.dataset.node);
      else graph.classList.remove("lit");
    });
  }
  for (const event of ["pointerleave", "focusout"]) {
    around.addEventListener(event, () => graph.classList.remove("lit"));
  }
}

// A link to a folded entry opens it, and printing opens everything.
const open = (anchor) => {
  const target = anchor && document.getElementById(anchor.slice(1));
  if (target instanceof HTMLDetailsElement) {
    target.open = true;
    target.querySelector("summary").focus({ preventScroll: true });
    target.scrollIntoView();
  }
};
addEventListener("hashchange", () => open(location.hash));
for (const link of document.querySelectorAll("a[href^='#']")) {
  link.addEventListener("click", () => open(link.getAttribute("href")));
}
open(location.hash);
addEventListener("beforeprint", () => {
  for (const one of document.querySelectorAll("details")) one.open = true;
});
