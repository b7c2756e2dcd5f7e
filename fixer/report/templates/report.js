// The theme buttons work without this; it only remembers the choice where the browser lets a page keep something.
(() => {
  const buttons = [...document.querySelectorAll('input[name="theme"]')];
  try {
    const kept = localStorage.getItem("moefix-theme");
    buttons.filter((button) => button.value === kept).forEach((button) => { button.checked = true; });
    buttons.forEach((button) => button.addEventListener("change", () => localStorage.setItem("moefix-theme", button.value)));
  } catch { /* then it is not remembered */ }
})();
