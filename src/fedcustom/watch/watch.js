"use strict";
(() => {
  // Asks for the parts of the page that have changed, and puts them in their place. What a reader has opened,
  // chosen, focused and scrolled to stays.
  const seconds = Number(document.body.dataset.seconds);
  const line = document.getElementById("connection");
  const ok = line.textContent;
  let versions = {};

  function choose(root) {
    const chosen = document.querySelector("input[name=metric]:checked");
    if (!chosen) return;
    for (const element of root.querySelectorAll("[data-metric]")) {
      element.hidden = !element.dataset.metric.split(" ").includes(chosen.value);
    }
  }

  function renew(place, html) {
    const opened = new Map([...place.querySelectorAll("details")].map((each) => [each.dataset.key, each.open]));
    const metric = place.querySelector("input[name=metric]:checked")?.value;
    const moved = [...place.querySelectorAll(".scroll")].map((each) => each.scrollLeft);
    const focusable = "a, button, input, summary, [tabindex]";
    const focused = [...place.querySelectorAll(focusable)].indexOf(document.activeElement);
    place.innerHTML = html; // escaped by the server; the page's policy lets no script in it run
    for (const each of place.querySelectorAll("details")) {
      if (opened.has(each.dataset.key)) each.open = opened.get(each.dataset.key);
    }
    const same = metric && place.querySelector(`input[name=metric][value="${CSS.escape(metric)}"]`);
    if (same) same.checked = true;
    choose(place);
    place.dispatchEvent(new Event("renewed", { bubbles: true }));
    place.querySelectorAll(".scroll").forEach((each, number) => { each.scrollLeft = moved[number] ?? 0; });
    if (focused >= 0) [...place.querySelectorAll(focusable)][focused]?.focus({ preventScroll: true });
  }

  async function look() {
    if (!document.hidden) {
      try {
        const answer = await fetch("/data", { cache: "no-store" });
        if (!answer.ok) throw new Error(String(answer.status));
        const found = await answer.json();
        for (const [name, html] of Object.entries(found)) {
          if (versions[name] === html) continue;
          versions[name] = html;
          renew(document.getElementById(`part-${name}`), html);
        }
        line.textContent = ok;
        line.classList.remove("lost");
      } catch {
        line.textContent = "No connection: fedcustom watch has ended, or does not answer. What is shown may be old.";
        line.classList.add("lost");
      }
    }
    setTimeout(look, 1000 * seconds);
  }
  look();
})();
