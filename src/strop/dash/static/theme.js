// The theme that this browser has stored: auto, light or dark. Not a module, so that it runs before the page is painted.

{
  const KEY = "strop-dash-theme";
  const MEDIA = { auto: "(prefers-color-scheme: dark)", light: "not all", dark: "all" };
  const get = () => (Object.hasOwn(MEDIA, localStorage.getItem(KEY)) ? localStorage.getItem(KEY) : "auto");
  const apply = () => {
    document.getElementById("dark").media = MEDIA[get()];
    document.querySelector("meta[name=color-scheme]").content = { auto: "light dark" }[get()] ?? get();
  };
  const set = (name) => {
    localStorage.setItem(KEY, name);
    apply();
    dispatchEvent(new Event("themechange"));
  };
  globalThis.theme = { names: Object.keys(MEDIA), get, set };
  apply();
}
