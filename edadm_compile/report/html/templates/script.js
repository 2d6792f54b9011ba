"use strict";
(() => {
  const get = (id) => document.getElementById(id);
  const read = (key) => { const block = get("data-" + key); return block ? JSON.parse(block.textContent) : null; };

  // Download links: the data is in the page already.
  for (const link of document.querySelectorAll("a[data-json]")) {
    const text = get("data-" + link.dataset.json).textContent;
    link.href = URL.createObjectURL(new Blob([text], { type: "application/json" }));
  }

  // Colours: as the system, or chosen.
  const theme = get("theme");
  const names = { auto: "Auto", light: "Light", dark: "Dark" };
  let chosen = "auto";
  const apply = () => {
    if (chosen === "auto") delete document.documentElement.dataset.theme;
    else document.documentElement.dataset.theme = chosen;
    theme.querySelector("span").textContent = names[chosen];
    theme.setAttribute("aria-label", "Colours: " + (chosen === "auto" ? "as the system" : chosen));
  };
  try { chosen = names[localStorage.getItem("edadm-theme")] ? localStorage.getItem("edadm-theme") : "auto"; } catch { /* no storage for files here */ }
  theme.hidden = false;
  theme.addEventListener("click", () => {
    chosen = { auto: "dark", dark: "light", light: "auto" }[chosen];
    try { localStorage.setItem("edadm-theme", chosen); } catch { /* the choice lasts as long as the page */ }
    apply();
  });
  apply();

  // Table of layers: sort and filter.
  const table = get("truth"), body = table.tBodies[0], rows = [...body.rows];
  const value = (row, index, numeric) => {
    const cell = row.cells[index];
    if (!numeric) return cell.textContent.trim();
    return cell.dataset.value === "" ? NaN : Number(cell.dataset.value);
  };
  const compare = (a, b, index, numeric, sign) => {
    const x = value(a, index, numeric), y = value(b, index, numeric);
    if (!numeric) return sign * x.localeCompare(y, "en", { numeric: true });
    if (Number.isNaN(x) || Number.isNaN(y)) return Number.isNaN(x) - Number.isNaN(y);  // what is missing comes last
    return sign * (x - y);
  };
  const heads = [...table.tHead.rows[0].cells];
  heads.forEach((head, index) => {
    const button = document.createElement("button");
    button.type = "button";
    button.textContent = head.textContent;
    head.replaceChildren(button);
    button.addEventListener("click", () => {
      const now = head.getAttribute("aria-sort");
      const numeric = head.dataset.kind === "n";
      const next = now ? (now === "ascending" ? "descending" : "ascending") : numeric && index ? "descending" : "ascending";
      heads.forEach((other) => other.removeAttribute("aria-sort"));
      head.setAttribute("aria-sort", next);
      const sign = next === "ascending" ? 1 : -1;
      body.append(...rows.sort((a, b) => compare(a, b, index, numeric, sign) || value(a, 0, true) - value(b, 0, true)));
    });
  });
  const filter = get("layer-filter"), runs = get("layer-runs"), count = get("layer-count");
  get("layer-controls").hidden = false;
  const refilter = () => {
    const words = filter.value.toLowerCase().split(/\s+/).filter(Boolean);
    let shown = 0;
    for (const row of rows) {
      const text = row.textContent.toLowerCase();
      row.hidden = !(words.every((word) => text.includes(word)) && (!runs.value || row.dataset.runs === runs.value));
      shown += !row.hidden;
    }
    count.textContent = `${shown} of ${rows.length} layers`;
  };
  filter.addEventListener("input", refilter);
  runs.addEventListener("change", refilter);

  // Activation ranges: the drawing of charts.py again, for the layer that is chosen and the width there is.
  const ranges = read("ranges"), select = get("range-layer");
  if (ranges && select) {
    const chart = get("range-chart"), svg = "http://www.w3.org/2000/svg";
    const short = (v) => Number(v.toPrecision(4)).toString().replace("-", "−");
    const ticksOf = (low, high) => {
      if (!(high > low)) { low -= 0.5; high += 0.5; }
      const rough = (high - low) / 5, power = 10 ** Math.floor(Math.log10(rough));
      const step = power * [1, 2, 5, 10].find((s) => power * s >= rough * (1 - 1e-9));
      const first = Math.floor(low / step + 1e-9), last = Math.ceil(high / step - 1e-9);
      return Array.from({ length: last - first + 1 }, (_, k) => (first + k) * step);
    };
    const draw = () => {
      const layer = ranges.layers[Number(select.value)], t = ranges.timesteps, limits = layer.quantizer || [];
      const width = Math.max(300, Math.round(chart.clientWidth || 980)), height = 290;
      const left = 46, right = 12, top = 26, bottom = 40;
      const ticks = ticksOf(Math.min(...layer.low, ...limits), Math.max(...layer.high, ...limits));
      const x = (i) => left + (i + 0.5) / t.length * (width - left - right);
      const y = (v) => height - bottom - (v - ticks[0]) / (ticks.at(-1) - ticks[0]) * (height - bottom - top);
      const root = document.createElementNS(svg, "svg");
      const add = (name, attributes, text) => {
        const element = document.createElementNS(svg, name);
        for (const [key, v] of Object.entries(attributes)) element.setAttribute(key, v);
        if (text !== undefined) element.textContent = text;
        root.append(element);
        return element;
      };
      for (const [key, v] of Object.entries({ class: "chart", viewBox: `0 0 ${width} ${height}`, role: "img",
        "aria-label": `Range of what ${layer.layer} reads over the timesteps` })) root.setAttribute(key, v);
      add("text", { class: "axis-label", x: left, y: top - 12 }, "value");
      for (const tick of ticks) {
        add("path", { class: "grid", d: `M${left} ${y(tick)}H${width - right}` });
        add("text", { class: "tick end", x: left - 6, y: y(tick) + 4 }, short(tick));
      }
      const labels = Math.min(t.length, width < 560 ? 4 : 8);
      for (let k = 0; k < labels; k++) {
        const i = Math.round(k * (t.length - 1) / Math.max(1, labels - 1));
        add("text", { class: "tick middle", x: x(i), y: height - 22 }, short(t[i]));
      }
      add("text", { class: "axis-label middle", x: (left + width - right) / 2, y: height - 5 }, "timestep t, noisiest first");
      const band = (low, high, name) => add("path", { class: "band " + name, d: "M" + [
        ...high.map((v, i) => `${x(i)} ${y(v)}`), ...low.map((v, i) => `${x(i)} ${y(v)}`).reverse()].join("L") + "Z" });
      band(layer.low, layer.high, "all");
      band(layer.lower, layer.upper, "most");
      for (const limit of limits) add("path", { class: "level limit", d: `M${left} ${y(limit)}H${width - right}` });
      t.forEach((time, i) => {
        const strip = add("rect", { class: "hover", x: x(i - 0.5), y: top, width: x(1) - x(0), height: height - top - bottom });
        const title = document.createElementNS(svg, "title");
        title.textContent = `step ${i + 1} of ${t.length}, t = ${short(time)}: max ${short(layer.high[i])}, 99 % ${short(layer.upper[i])}, 1 % ${short(layer.lower[i])}, min ${short(layer.low[i])}`;
        strip.append(title);
      });
      chart.replaceChildren(root);
      get("range-name").textContent = layer.layer;
      get("range-codes").textContent = layer.quantizer ? `codes stand for ${short(layer.quantizer[0])} to ${short(layer.quantizer[1])}` : "";
    };
    const pick = (index) => { select.value = String((index + ranges.layers.length) % ranges.layers.length); draw(); };
    get("range-controls").hidden = false;
    select.addEventListener("change", draw);
    get("range-previous").addEventListener("click", () => pick(Number(select.value) - 1));
    get("range-next").addEventListener("click", () => pick(Number(select.value) + 1));
    document.querySelectorAll("a[data-layer]").forEach((link) => link.addEventListener("click", () =>
      pick(ranges.layers.findIndex((layer) => layer.layer === link.dataset.layer))));
    let last = 0;
    new ResizeObserver(() => { if (chart.clientWidth !== last) { last = chart.clientWidth; draw(); } }).observe(chart);
    addEventListener("beforeprint", draw);
  }

  // On paper names and settings are open; the long tails of lists stay closed.
  addEventListener("beforeprint", () => document.querySelectorAll("details.paper").forEach((d) => { d.open = true; }));
})();
