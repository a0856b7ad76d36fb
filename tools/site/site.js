// A search for an option as it is typed (--lr): the search would exclude words that begin with a minus.
addEventListener(
  "input",
  (event) => {
    const field = event.target;
    if (field.matches?.(".md-search__input")) field.value = field.value.replace(/(^|\s)-+(?=\w)/g, "$1");
  },
  true,
);

// A table that is too wide scrolls on its own, and says so. This must not move the place that an address names.
function markTables() {
  for (const place of document.querySelectorAll(".table")) {
    place.toggleAttribute("data-wide", place.querySelector("table").scrollWidth > place.clientWidth + 1);
  }
}
markTables();
addEventListener("load", markTables);
addEventListener("resize", markTables);
