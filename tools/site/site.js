// A search for an option as it is typed (--lr): the search would exclude words that begin with a minus.
addEventListener(
  "input",
  (event) => {
    const field = event.target;
    if (field.matches?.(".md-search__input")) field.value = field.value.replace(/(^|\s)-+(?=\w)/g, "$1");
  },
  true,
);

// A table that is too wide scrolls, and says so; the header of any other stays below that of the page.
function markTables() {
  for (const place of document.querySelectorAll(".table")) {
    const table = place.querySelector("table");
    place.removeAttribute("data-fits");
    place.toggleAttribute("data-fits", table.scrollWidth <= table.clientWidth + 1);
  }
}
addEventListener("load", markTables);
addEventListener("resize", markTables);
