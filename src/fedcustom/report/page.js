"use strict";
(() => {
  document.addEventListener("change", (event) => {
    if (event.target.name !== "metric") return;
    for (const element of document.querySelectorAll("[data-metric]")) {
      element.hidden = !element.dataset.metric.split(" ").includes(event.target.value);
    }
  });

  // What the pointer or a finger is nearest to, of a chart's marks.
  const reach = 36;
  const tip = document.createElement("div");
  tip.className = "tip";
  tip.setAttribute("role", "status");
  tip.hidden = true;
  document.body.append(tip);

  function distance(box, event) {
    const across = Math.max(box.left - event.clientX, 0, event.clientX - box.right);
    const along = Math.max(box.top - event.clientY, 0, event.clientY - box.bottom);
    return Math.hypot(across, along);
  }

  function show(event) {
    let nearest = null;
    let least = reach;
    for (const mark of event.currentTarget.querySelectorAll("[data-tip]")) {
      const away = distance(mark.getBoundingClientRect(), event);
      if (away < least) [nearest, least] = [mark, away];
    }
    tip.hidden = !nearest;
    if (!nearest) return;
    const name = nearest.parentNode.dataset.name;
    tip.textContent = name ? `${name}, ${nearest.dataset.tip}` : nearest.dataset.tip;
    const { width, height } = tip.getBoundingClientRect();
    const room = document.documentElement.clientWidth - width - 8;
    tip.style.left = `${Math.max(8, Math.min(event.clientX + 14, room))}px`;
    tip.style.top = `${event.clientY - height - 12 > 8 ? event.clientY - height - 12 : event.clientY + 20}px`;
  }

  for (const area of document.querySelectorAll(".area")) {
    area.addEventListener("pointermove", show);
    area.addEventListener("pointerdown", show);
    area.addEventListener("pointerleave", () => { tip.hidden = true; });
  }
  addEventListener("scroll", () => { tip.hidden = true; }, { passive: true });

  // Tables that are wider than the page say that they can be moved, until their end is seen.
  function hint(element) {
    const beyond = element.scrollWidth - element.clientWidth;
    element.classList.toggle("wider", beyond > 4);
    element.classList.toggle("ended", beyond - element.scrollLeft <= 4);
  }
  const watch = new ResizeObserver((entries) => {
    requestAnimationFrame(() => entries.forEach((entry) => hint(entry.target))); // a hint changes the size
  });
  for (const element of document.querySelectorAll(".scroll")) {
    watch.observe(element);
    element.addEventListener("scroll", () => hint(element), { passive: true });
  }
})();
