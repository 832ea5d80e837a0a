// Learning curves: a metric at a time as inline SVG, drawn anew whenever a choice or the width changes.
const drawCurves = () => {
  const source = document.getElementById("curves-data");
  if (!source) return;
  const part = name => document.getElementById(`curves-${name}`);
  const data = JSON.parse(source.textContent);
  for (const metric of data.metrics) {
    metric.curves = metric.curves.map(([cell, seed, steps, values]) => ({cell, seed, steps: data.steps[steps], values}));
  }
  const [select, seeds, log, plot, slider, readout, cells] =
    ["metric", "seeds", "log", "plot", "step", "readout", "cells"].map(part);
  const COLOURS = 8, DASHES = ["", "7 3", "2 3", "9 3 2 3"], FIRST_SHOWN = 8, MOST_READ = 12;
  const HEIGHT = 300, LEFT = 56, RIGHT = 12, TOP = 28, BOTTOM = 38;
  const svg = (tag, attributes, text) => {
    const element = document.createElementNS("http://www.w3.org/2000/svg", tag);
    for (const [name, value] of Object.entries(attributes)) element.setAttribute(name, value);
    if (text !== undefined) element.textContent = text;
    return element;
  };
  const stroke = cell => ({
    stroke: `var(--c${cell % COLOURS})`, "stroke-dasharray": DASHES[Math.floor(cell / COLOURS) % DASHES.length],
  });
  const shown = new Set([...data.cells.keys()].slice(0, FIRST_SHOWN));
  const number = (value, metric) => metric.decimals === null ? `${Number(value.toPrecision(4))}` : value.toFixed(metric.decimals);
  const unit = metric => metric.symbol ? ` ${metric.symbol}` : "";
  let view = null;

  // At most about six round numbers between low and high.
  const ticks = (low, high) => {
    const rough = (high - low) / 5 || 1, power = 10 ** Math.floor(Math.log10(rough));
    const step = [1, 2, 5, 10].map(one => one * power).find(one => one >= rough * 0.999);
    const found = [];
    for (let at = Math.ceil(low / step - 1e-9); at * step <= high + step * 1e-9; at++) found.push(Number((at * step).toPrecision(12)));
    return found;
  };
  const scaleOf = (low, high, from, to) => value => from + (value - low) / (high - low || 1) * (to - from);
  const path = (curve, x, y) => curve.steps.map((step, index) => `${index ? "L" : "M"}${x(step).toFixed(1)} ${y(curve.values[index]).toFixed(1)}`).join("");

  const draw = () => {
    const metric = data.metrics[select.value];
    const positive = metric.curves.every(curve => curve.values.every(value => value > 0));
    log.disabled = !positive;
    const bent = log.checked && positive ? Math.log10 : value => value;
    const curves = metric.curves.filter(curve => shown.has(curve.cell) && (curve.seed === null || seeds.checked || !metric.curves.some(other => other.cell === curve.cell && other.seed === null)));
    const steps = [...new Set(curves.flatMap(curve => curve.steps))].sort((a, b) => a - b);
    const values = curves.flatMap(curve => curve.values).map(bent);
    const width = Math.max(280, plot.clientWidth || 760);
    const root = svg("svg", {viewBox: `0 0 ${width} ${HEIGHT}`, role: "img", "aria-label": `${metric.label} over steps, ${shown.size} of ${data.cells.length} cells`});
    plot.replaceChildren(root);
    slider.max = Math.max(0, steps.length - 1);
    if (!curves.length) {
      root.append(svg("text", {x: width / 2, y: HEIGHT / 2, "text-anchor": "middle"}, "No cell is chosen, or none has this metric."));
      view = null;
      readout.textContent = "";
      return;
    }
    let low = Math.min(...values), high = Math.max(...values);
    if (low === high) { low -= Math.abs(low) * 0.1 || 1; high += Math.abs(high) * 0.1 || 1; }
    const x = scaleOf(steps[0], steps.at(-1), LEFT, width - RIGHT);
    const flat = scaleOf(low, high, HEIGHT - BOTTOM, TOP), y = value => flat(bent(value));
    for (const tick of ticks(low, high)) {
      root.append(svg("line", {class: "grid", x1: LEFT, x2: width - RIGHT, y1: flat(tick), y2: flat(tick)}));
      const value = bent === Math.log10 ? 10 ** tick : tick;
      root.append(svg("text", {x: LEFT - 6, y: flat(tick) + 4, "text-anchor": "end"}, `${Number(value.toPrecision(3))}`.replace("-", "\u2212")));
    }
    root.append(svg("text", {x: 4, y: 14}, `${metric.label}${metric.symbol ? `, ${metric.symbol}` : ""}`));
    root.append(svg("line", {class: "axis", x1: LEFT, x2: width - RIGHT, y1: HEIGHT - BOTTOM, y2: HEIGHT - BOTTOM}));
    for (const tick of ticks(steps[0], steps.at(-1)).filter(Number.isInteger)) {
      root.append(svg("text", {x: x(tick), y: HEIGHT - BOTTOM + 16, "text-anchor": "middle"}, `${tick}`));
    }
    root.append(svg("text", {x: (LEFT + width - RIGHT) / 2, y: HEIGHT - 5, "text-anchor": "middle"}, "step"));
    for (const curve of [...curves].sort((a, b) => (a.seed === null) - (b.seed === null))) {
      const mean = curve.seed === null;
      root.append(svg("path", {...stroke(curve.cell), d: path(curve, x, y), "stroke-width": mean ? 2.4 : 1, opacity: mean ? 1 : 0.55, "data-cell": curve.cell, "data-seed": curve.seed ?? "mean"}));
    }
    const line = svg("line", {class: "at", y1: TOP, y2: HEIGHT - BOTTOM});
    root.append(line);
    view = {metric, curves, steps, x, line, width};
    slider.value = Math.min(slider.value, steps.length - 1);
    read();
  };

  // The values at the step that the slider is at, of the nearest step that a curve has.
  const read = () => {
    if (!view) return;
    const {metric, curves, steps, x, line} = view;
    const step = steps[slider.value];
    line.setAttribute("x1", x(step));
    line.setAttribute("x2", x(step));
    const means = curves.filter(curve => curve.seed === null || !curves.some(other => other.cell === curve.cell && other.seed === null));
    const texts = means.slice(0, MOST_READ).map(curve => {
      const nearest = curve.steps.reduce((best, one, index) => Math.abs(one - step) < Math.abs(curve.steps[best] - step) ? index : best, 0);
      const seed = curve.seed === null ? "" : ` (seed ${curve.seed})`;
      return `${data.cells[curve.cell]}${seed}: ${number(curve.values[nearest], metric)}${unit(metric)}`;
    });
    const rest = means.length - texts.length;
    readout.textContent = `Step ${step}: ${texts.join("; ")}${rest > 0 ? `; and ${rest} more` : ""}`;
    slider.setAttribute("aria-valuetext", `step ${step}`);
  };

  plot.addEventListener("pointermove", event => {
    if (!view) return;
    const box = plot.getBoundingClientRect(), at = (event.clientX - box.left) * view.width / box.width;
    slider.value = view.steps.reduce((best, step, index) => Math.abs(view.x(step) - at) < Math.abs(view.x(view.steps[best]) - at) ? index : best, 0);
    read();
  });
  data.metrics.forEach((metric, index) => select.append(make("option", {value: index, textContent: metric.symbol ? `${metric.label}, ${metric.symbol}` : metric.label, title: metric.name})));
  data.cells.forEach((name, cell) => {
    const box = make("input", {type: "checkbox", checked: shown.has(cell)});
    box.addEventListener("change", () => { box.checked ? shown.add(cell) : shown.delete(cell); draw(); });
    const swatch = svg("svg", {class: "swatch", viewBox: "0 0 28 12", "aria-hidden": "true"});
    swatch.append(svg("path", {...stroke(cell), d: "M0 6H28", "stroke-width": 2.4}));
    cells.append(make("label", {}, box, swatch, name));
  });
  for (const button of part("choice").children) button.addEventListener("click", () => {
    const all = button.dataset.all !== "";
    [...cells.querySelectorAll("input")].forEach((box, cell) => { box.checked = all; all ? shown.add(cell) : shown.delete(cell); });
    draw();
  });
  for (const control of [select, seeds, log]) control.addEventListener("change", () => { slider.value = slider.max; draw(); });
  slider.addEventListener("input", read);
  seeds.parentElement.hidden = data.metrics.every(metric => metric.curves.every(curve => curve.seed === null));
  part("view").hidden = false;
  part("without").hidden = true;
  draw();
  slider.value = slider.max;
  read();
  let width = plot.clientWidth;
  new ResizeObserver(() => { if (plot.clientWidth !== width) { width = plot.clientWidth; draw(); } }).observe(plot);
};
drawCurves();
