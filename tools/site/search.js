// A search for an option as it is typed (--lr): the search would exclude words that begin with a minus.
addEventListener(
  "input",
  (event) => {
    const field = event.target;
    if (field.matches?.(".md-search__input")) field.value = field.value.replace(/(^|\s)-+(?=\w)/g, "$1");
  },
  true,
);
