"use strict";
(() => {
  const figures = JSON.parse(document.getElementById("figures").textContent);
  const root = document.documentElement;
  const plots = [...document.querySelectorAll("[data-plot]")];
  const checked = document.querySelector("input[name=metric]:checked");
  let metric = checked ? checked.value : "";

  const variable = (name) => getComputedStyle(root).getPropertyValue(`--${name}`).trim();

  const parts = (hex) => [1, 3, 5].map((start) => parseInt(hex.slice(start, start + 2), 16));
  const faded = (hex, alpha) => `rgba(${parts(hex).join(",")},${alpha})`;

  function scale(solid) {
    const [empty, full] = [parts(variable("sunken")), parts(solid)];
    const end = empty.map((value, place) => Math.round(0.4 * value + 0.6 * full[place]));
    return [[0, `rgb(${empty.join(",")})`], [1, `rgb(${end.join(",")})`]];
  }

  function painted(trace) {
    const solid = variable(trace.meta.colour);
    if (trace.meta.role === "band") return { ...trace, fillcolor: faded(solid, 0.15) };
    if (trace.meta.role === "heat") {
      return { ...trace, colorscale: scale(solid), textfont: { color: variable("text") } };
    }
    const marker = { ...trace.marker, color: solid };
    if (trace.meta.role === "mean") marker.line = { ...marker.line, color: variable("text") };
    const fillcolor = faded(solid, trace.meta.role === "box" ? 0.08 : 0);
    return { ...trace, marker, line: { ...trace.line, color: solid }, fillcolor };
  }

  function themed(layout, width, entries) {
    const axis = {
      gridcolor: variable("grid"),
      linecolor: variable("line"),
      tickcolor: variable("line"),
      tickfont: { color: variable("muted"), size: 12 },
      automargin: true,
    };
    const spike = { spikecolor: variable("muted"), spikethickness: 1, spikedash: "solid" };
    const titled = (own) => ({ ...axis, ...own, title: { ...own.title, font: { color: variable("muted"), size: 12 }, standoff: 10 } });
    return {
      height: width < 500 ? 290 + 28 * entries : 420,
      ...layout,
      xaxis: titled({ ...layout.xaxis, ...(layout.hovermode === "x unified" ? spike : {}) }),
      yaxis: titled(layout.yaxis),
      margin: { l: 8, r: 12, t: 12, b: 8 },
      paper_bgcolor: "rgba(0,0,0,0)",
      plot_bgcolor: "rgba(0,0,0,0)",
      font: { family: getComputedStyle(document.body).fontFamily, color: variable("text"), size: 13 },
      hoverlabel: { bgcolor: variable("raised"), bordercolor: variable("line"), font: { color: variable("text") } },
      modebar: { bgcolor: "rgba(0,0,0,0)", color: variable("muted"), activecolor: variable("text") },
      legend: { orientation: "h", maxheight: 0.9, x: 0, xref: "container", xanchor: "left", y: 0, yref: "container", yanchor: "bottom" },
    };
  }

  function draw(width) {
    for (const element of plots) {
      const drawn = figures[element.dataset.plot];
      const figure = drawn[metric] ?? Object.values(drawn)[0];
      const entries = figure.data.flatMap((trace) => trace.name?.split("<br>") ?? []).length;
      const layout = themed(figure.layout, width ?? element.clientWidth, entries);
      if (width) layout.width = width;
      Plotly.react(element, figure.data.map(painted), layout, {
        responsive: true,
        displaylogo: false,
        displayModeBar: matchMedia("(hover: hover)").matches ? "hover" : false,
        modeBarButtons: [["toImage"]],
        toImageButtonOptions: { format: "svg", filename: element.dataset.plot },
      });
    }
  }

  document.addEventListener("change", (event) => {
    if (event.target.name !== "metric") return;
    metric = event.target.value;
    for (const element of document.querySelectorAll("[data-metric]")) {
      element.hidden = element.dataset.metric !== metric;
    }
    draw();
  });
  matchMedia("(prefers-color-scheme: dark)").addEventListener("change", () => draw());
  addEventListener("beforeprint", () => {
    root.classList.add("printed");
    draw(680);
  });
  addEventListener("afterprint", () => {
    root.classList.remove("printed");
    draw();
  });
  draw();
})();
