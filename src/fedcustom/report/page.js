"use strict";
(() => {
  document.addEventListener("change", (event) => {
    if (event.target.name !== "metric") return;
    for (const element of document.querySelectorAll("[data-metric]")) {
      element.hidden = !element.dataset.metric.split(" ").includes(event.target.value);
    }
  });

  // Each table as a file of comma-separated values, made here: a page on a disk needs no server.
  function quoted(text) {
    const plain = text.replace(/\s+/g, " ").trim();
    // A spreadsheet takes such a text for a formula; numbers stay.
    const safe = /^[=+\-@\t\r]/.test(plain) && Number.isNaN(Number(plain)) ? `'${plain}` : plain;
    return /[",\n]/.test(safe) ? `"${safe.replaceAll('"', '""')}"` : safe;
  }

  function words(cell) {
    if (cell.dataset.value !== undefined) return cell.dataset.value;
    return [...cell.childNodes].map((node) => node.textContent.trim()).filter(Boolean).join(" ");
  }

  function csv(table) {
    const heads = table.tHead ? [...table.tHead.rows] : [];
    const rows = [...table.tBodies].flatMap((body) => [...body.rows])
      .filter((row) => !row.classList.contains("section"))
      .map((row) => [...row.cells]);
    const named = heads.length > 1 ? [heads[0].cells[0], ...heads.at(-1).cells] : [...(heads[0]?.cells ?? [])];
    const names = named.map((cell) => cell.dataset.name ?? words(cell));
    const width = Math.max(names.length, ...rows.map((row) => row.length));
    const columns = [];
    for (let place = 0; place < width; place += 1) {
      const name = names[place] ?? "";
      if (place && name && names.indexOf(name) < place) continue; // shown once for each metric
      columns.push([name, (cell) => (cell ? words(cell) : ""), place]);
      if (rows.some((row) => row[place]?.dataset.interval)) {
        columns.push([`${name}_interval`, (cell) => cell?.dataset.interval ?? "", place]);
      }
    }
    const lines = rows.map((row) => columns.map(([, read, place]) => quoted(read(row[place]))));
    const head = names.length ? [columns.map(([name]) => quoted(name))] : [];
    return [...head, ...lines].map((line) => line.join(",")).join("\r\n") + "\r\n";
  }

  function file(table) {
    const title = table.caption?.textContent || table.closest("section")?.querySelector("h2")?.textContent || "";
    const name = table.closest("section")?.querySelector("h2")?.textContent ?? "table";
    return [title.replace(/\s+/g, " ").trim(), `${name.toLowerCase().replace(/[^a-z0-9]+/g, "-")}.csv`];
  }

  function offer(root) {
    for (const table of root.querySelectorAll("table")) {
      const place = table.closest(".scroll") ?? table;
      if (place.nextElementSibling?.classList.contains("actions")) continue;
      const [title] = file(table);
      const line = document.createElement("p");
      const button = document.createElement("button");
      line.className = "actions";
      if (place.dataset.metric) line.dataset.metric = place.dataset.metric;
      line.hidden = place.hidden;
      button.type = "button";
      button.className = "csv";
      button.textContent = "Download as CSV";
      button.setAttribute("aria-label", `Download as CSV: ${title}`);
      line.append(button);
      place.after(line);
    }
  }

  document.addEventListener("click", (event) => {
    const button = event.target.closest?.("button.csv");
    if (!button) return;
    const place = button.parentNode.previousElementSibling;
    const table = place.matches("table") ? place : place.querySelector("table");
    const link = document.createElement("a");
    link.href = URL.createObjectURL(new Blob(["\ufeff", csv(table)], { type: "text/csv" }));
    link.download = file(table)[1];
    link.click();
    setTimeout(() => URL.revokeObjectURL(link.href), 10000);
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

  // Makes a part of the page answer: at first all of it, in a page that is kept up to date each new part.
  function enliven(root) {
    for (const area of root.querySelectorAll(".area")) {
      area.addEventListener("pointermove", show);
      area.addEventListener("pointerdown", show);
      area.addEventListener("pointerleave", () => { tip.hidden = true; });
    }
    for (const element of root.querySelectorAll(".scroll")) {
      watch.observe(element);
      element.addEventListener("scroll", () => hint(element), { passive: true });
    }
    offer(root);
  }
  enliven(document);
  document.addEventListener("renewed", (event) => enliven(event.target));
})();
