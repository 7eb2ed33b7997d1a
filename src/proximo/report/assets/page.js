"use strict";
// The script of a run's page. What it draws is in #data; a page that is served while a run goes on asks for more.
(() => {
  const data = JSON.parse(document.getElementById("data").textContent);
  const byId = (id) => document.getElementById(id);
  const SMOOTHINGS = [0, 0.01, 0.02, 0.03, 0.05, 0.08, 0.12, 0.2, 0.3]; // share of the curve that a mean is over
  const DASHES = [[], [7, 3], [2, 3], [8, 3, 2, 3]];
  const PLOT_HEIGHT = 210;
  const MOST_IN_LEGEND = 40;
  const IGNORED = new Set(["iteration", "env_steps", "seconds", "n_iterations", "n_responses", "n_episodes", "epoch"]);
  const state = {
    axis: Object.keys(data.axes)[0],
    smoothing: 2,
    log: false,
    view: data.groups.length ? "groups" : "runs",
    range: null,
    hidden: { runs: new Set(), groups: new Set() },
  };
  let charts = [];
  for (const run of data.runs) {
    for (const part of ["columns", "means", "last"]) if (run[part]) run[part] = named(run[part]);
  }
  data.groups = data.groups.map((group) => {
    if (group.run !== undefined) return { ...data.runs[group.run], label: group.label };
    return { ...group, columns: named(group.columns), bands: named(group.bands), last: named(group.last) };
  });

  // --- small things --------------------------------------------------------------------------------------------------

  function make(tag, className, text) {
    const element = document.createElement(tag);
    if (className) element.className = className;
    if (text !== undefined) element.textContent = text;
    return element;
  }

  /** Values by names of metrics, which may be any: "constructor" is no different from others. */
  function named(values) {
    return Object.assign(Object.create(null), values);
  }

  function isNumber(value) {
    return typeof value === "number" && Number.isFinite(value);
  }

  /** A number as people read it: five digits that count, thousands separated. */
  function told(value, percent) {
    if (!isNumber(value)) return "-";
    if (percent) return `${told(100 * value)} %`;
    const size = Math.abs(value);
    if (size !== 0 && (size < 1e-4 || size >= 1e12)) return value.toExponential(3);
    if (size >= 1e4) value = Math.round(value * 10) / 10;
    return value.toLocaleString("en-GB", { maximumSignificantDigits: size >= 1e4 ? 12 : 5 });
  }

  /** The same in few letters, for an axis whose ticks lie `step` apart and go up to `largest`, which decides the unit. */
  function short(value, step, percent, largest = value) {
    if (value === null || value === undefined) return "";
    if (percent) return `${short(100 * value, 100 * step)} %`;
    const size = Math.abs(largest);
    if (value === 0) return "0";
    if (size < 1e-3 || size >= 1e12) return value.toExponential(Math.min(2, digitsAfter(value))).replace("e+", "e");
    for (const [unit, letter] of [[1e9, "G"], [1e6, "M"], [1e3, "k"]]) {
      if (size >= 10 * unit || (size >= unit && letter !== "k")) return `${trimmed(value / unit, step / unit)}${letter}`;
    }
    return trimmed(value, step);
  }

  function digitsAfter(value) {
    const mantissa = value.toExponential().split("e")[0];
    return mantissa.includes(".") ? mantissa.split(".")[1].length : 0;
  }

  function trimmed(value, step) {
    const digits = Math.min(6, Math.max(0, Math.ceil(-Math.log10(step || 1) - 1e-9)));
    return value.toLocaleString("en-GB", { maximumFractionDigits: digits + (step % 1 && step < 10 ? 1 : 0) });
  }

  function readable(metric) {
    const words = metric.replaceAll("_", " ");
    return words.charAt(0).toUpperCase() + words.slice(1);
  }

  // --- what there is to draw -------------------------------------------------------------------------------------------

  /** Runs, or groups of runs, that are shown; each with its place among all, which decides its colour. */
  function entities() {
    const all = data[state.view];
    return all.map((entity, place) => ({ entity, place })).filter(({ place }) => !state.hidden[state.view].has(place));
  }

  /** Where the points of an entity lie: never twice at the same place, as a chart needs it. */
  function positions(entity) {
    const known = entity.x[state.axis];
    if (!known) return null;
    if (entity.unique && entity.unique.axis === state.axis && entity.unique.x.length === known.length) return entity.unique.x;
    const x = new Array(known.length);
    const least = Math.max(Math.abs(known[known.length - 1] || 1), 1e-9) * 1e-9;
    let before = -Infinity;
    for (let i = 0; i < known.length; i++) {
      const value = known[i] === null || known[i] === undefined ? (i ? before : 0) : known[i];
      x[i] = value <= before ? before + least : value;
      before = x[i];
    }
    entity.unique = { axis: state.axis, x };
    return x;
  }

  /** Values of a line; of a phase that holds others, what is left of it. */
  function valuesOf(entity, panel, metric) {
    const values = entity.columns[metric];
    const parts = (panel.parts[metric] || []).map((name) => entity.columns[name]).filter(Boolean);
    if (!values || !parts.length) return values;
    return values.map((value, i) => (isNumber(value) ? Math.max(0, parts.reduce((left, part) => left - (part[i] || 0), value)) : null));
  }

  function hasNumbers(panel) {
    const lines = entities().flatMap(({ entity }) => panel.lines.map((line) => entity.columns[line.metric]).filter(Boolean));
    const known = lines.some((values) => values.some(isNumber));
    if (!known || !panel.varies) return known;
    return lines.some((values) => {
      const first = values.find(isNumber);
      return values.some((value) => isNumber(value) && value !== first);
    });
  }

  /** Whatever else was measured gets a chart of its own. */
  function otherPanels() {
    const covered = new Set(data.panels.flatMap((panel) => [panel.band, ...panel.lines.map((line) => line.metric)]));
    const names = new Set([...data.runs, ...data.groups].flatMap((entity) => Object.keys(entity.columns)));
    return [...names]
      .filter((name) => !covered.has(name) && !IGNORED.has(name))
      .map((name) => ({
        title: readable(name), section: "Everything else that was measured", hint: "", unit: name, lines: [{ metric: name, label: "" }],
        noisy: true, log: false, floor: null, ceiling: null, reference: null, level: null, fromZero: false,
        percent: false, stacked: false, parts: named({}), varies: true, band: null,
      }));
  }

  /** The mean of the known values around each one; with few of them, or none asked for, the values themselves. */
  function smoothed(values, means) {
    const share = SMOOTHINGS[state.smoothing];
    const repeats = means ? 2 : 1; // thinned curves have two extremes for each mean
    const source = means || values;
    const reach = Math.floor((share * source.length) / 2);
    if (!share || reach < 1) return means && share ? spread(means, values) : null;
    const sums = new Float64Array(source.length + 1);
    const counts = new Int32Array(source.length + 1);
    source.forEach((value, i) => {
      sums[i + 1] = sums[i] + (isNumber(value) ? value : 0);
      counts[i + 1] = counts[i] + (isNumber(value) ? 1 : 0);
    });
    return values.map((value, i) => {
      if (!isNumber(value)) return null;
      const middle = Math.floor(i / repeats);
      const first = Math.max(0, middle - reach), last = Math.min(source.length, middle + reach + 1);
      const count = counts[last] - counts[first];
      return count ? (sums[last] - sums[first]) / count : null;
    });
  }

  function spread(means, values) {
    return values.map((value, i) => (isNumber(value) ? means[i >> 1] : null));
  }

  /** A band around the curve: what was measured, or else how far the values nearby lie apart. */
  function bandOf(entity, panel, metric, values, alone) {
    if (entity.bands) return entity.bands[metric] || null;
    if (!alone || !panel.band || panel.lines[0].metric !== metric) return null;
    const std = entity.columns[panel.band];
    if (std) return [-1, 1].map((side) => values.map((value, i) => (isNumber(value) && isNumber(std[i]) ? value + side * std[i] : null)));
    if (values.length < 20) return null;
    const reach = Math.max(3, Math.floor(values.length / 40));
    const nearby = values.map((value, i) => {
      if (!isNumber(value)) return null;
      return Float64Array.from(values.slice(Math.max(0, i - reach), i + reach + 1).filter(isNumber)).sort();
    });
    return [0.1, 0.9].map((share) => nearby.map((near) => (near ? near[Math.round(share * (near.length - 1))] : null)));
  }

  function bandInWords(panel) {
    const shown = entities();
    if (panel.stacked) return "";
    if (state.view === "groups") {
      const summed = data.groups.filter((group) => group.bands);
      const few = summed.filter((group) => group.few).length;
      if (few === summed.length) return "mean of the seeds, shaded from the lowest to the highest";
      const many = "interquartile mean, shaded: its 95 % interval";
      return few ? `of 5 seeds and more: ${many}; of fewer: mean, shaded from the lowest to the highest` : many;
    }
    if (!panel.band || shown.length !== 1) return "";
    if (shown[0].entity.columns[panel.band]) return "shaded: one standard deviation";
    const first = shown[0].entity.columns[panel.lines[0].metric] || [];
    return first.length < 20 ? "" : "shaded: eight tenths of the values nearby";
  }

  // --- a chart ---------------------------------------------------------------------------------------------------------

  /** The curves of a panel: `raw` are the numbers, `drawn` what is drawn of them. */
  function curvesOf(panel) {
    const shown = entities();
    const curves = [];
    for (const { entity, place } of shown) {
      const x = positions(entity);
      if (!x) continue;
      let below = null;
      panel.lines.forEach((line, index) => {
        const raw = valuesOf(entity, panel, line.metric);
        if (!raw || !raw.some(isNumber)) return;
        const means = entity.means && !panel.parts[line.metric] ? entity.means[line.metric] : null;
        const several = shown.length > 1;
        const stacked = panel.stacked && !several;
        const smooth = smoothed(raw, means);
        const trend = stacked ? null : smooth;
        const curve = {
          x, raw, trend, place, several, drawn: raw, base: null,
          colour: several ? place % 7 : index % 7,
          dash: several ? (place >= 7 ? 1 : 0) + index : 0,
          label: [several ? entity.label : "", line.label || (several ? "" : panel.unit)].filter(Boolean).join(", "),
          band: panel.stacked ? null : bandOf(entity, panel, line.metric, raw, !several),
          last: entity.last && isNumber(entity.last[line.metric]) && !panel.parts[line.metric] ? entity.last[line.metric] : null,
          reference: panel.reference ? entity.references[panel.reference] : undefined,
        };
        if (stacked) {
          const base = below;
          curve.drawn = (smooth || raw).map((value, i) => (isNumber(value) ? value + (base && isNumber(base[i]) ? base[i] : 0) : null));
          curve.base = base || raw.map((value) => (isNumber(value) ? 0 : null));
          below = curve.drawn;
        }
        if (curve.band && trend) curve.band = curve.band.map((end) => smoothed(end, null) || end);
        curves.push(curve);
      });
    }
    return curves;
  }

  function isLog(panel, curves) {
    return state.log && !panel.stacked && curves.some((curve) => curve.raw.some((value) => isNumber(value) && value > 0));
  }

  let inks = null;

  /** The colours of the style, read once until another theme is chosen. */
  function colours() {
    inks = inks || readColours();
    return inks;
  }

  function readColours() {
    const probe = byId("panels");
    const found = { lines: [] };
    const read = (className, property) => {
      const element = make("span", className);
      probe.append(element);
      const value = getComputedStyle(element)[property];
      element.remove();
      return value;
    };
    for (let i = 0; i < 7; i++) found.lines.push(read(`k${i}`, "color"));
    const css = (name) => {
      const element = make("span");
      element.style.color = `var(--${name})`;
      probe.append(element);
      const value = getComputedStyle(element).color;
      element.remove();
      return value;
    };
    return Object.assign(found, { grid: css("grid"), soft: css("soft"), ink: css("ink"), sheet: css("sheet") });
  }

  function faded(colour, alpha) {
    const numbers = colour.match(/[\d.]+/g) || [0, 0, 0];
    return `rgba(${numbers[0]}, ${numbers[1]}, ${numbers[2]}, ${alpha})`;
  }

  /** Data and series for uPlot: a band first, then the raw values, then the trend, for each curve. */
  function plotted(panel, curves, log, ink) {
    const tables = [];
    const series = [{}];
    const bands = [];
    const cleaned = (values) => (log ? values.map((value) => (isNumber(value) && value > 0 ? value : null)) : values);
    for (const curve of curves) {
      const colour = ink.lines[curve.colour];
      const dash = DASHES[curve.dash % DASHES.length];
      const columns = [curve.x];
      const known = curve.raw.reduce((count, value) => count + (isNumber(value) ? 1 : 0), 0);
      const sparse = known < 0.5 * curve.raw.length;
      const add = (values, options) => {
        columns.push(cleaned(values));
        series.push({ spanGaps: sparse, points: { show: false }, width: 1.6, ...options });
        return series.length - 1;
      };
      if (curve.band) {
        const low = add(curve.band[0], { stroke: null, width: 0, band: true });
        const high = add(curve.band[1], { stroke: null, width: 0, band: true });
        bands.push({ series: [high, low], fill: faded(colour, 0.17) });
      }
      if (curve.base) {
        const low = add(curve.base, { stroke: null, width: 0, band: true });
        const high = add(curve.drawn, { stroke: colour, width: 1 });
        bands.push({ series: [high, low], fill: faded(colour, 0.55) });
        curve.series = high;
      } else {
        const faint = curve.trend !== null;
        const marks = {
          show: (u, index) => sparse,
          filter: (u, index, show) => (show ? null : lonely(u.data[index], u.series[0].idxs)),
          size: 5, width: 1, stroke: colour, fill: colour,
        };
        curve.series = add(curve.drawn, {
          stroke: faint ? faded(colour, curve.several ? 0.16 : 0.3) : colour, dash: faint ? [] : dash, width: faint ? 1 : 1.6, points: marks,
        });
        if (faint) add(curve.trend, { stroke: colour, dash, width: 2 });
      }
      tables.push(columns);
    }
    const same = tables.every((table) => table[0] === tables[0][0]);
    const joined = same ? [tables[0][0], ...tables.flatMap((table) => table.slice(1))] : uPlot.join(tables);
    return { joined, series, bands };
  }

  /** Points with a gap on both sides, which no line shows. */
  function lonely(values, [first, last]) {
    const found = [];
    const before = (i) => { while (i >= first && values[i] === undefined) i--; return i >= first && isNumber(values[i]); };
    const after = (i) => { while (i <= last && values[i] === undefined) i++; return i <= last && isNumber(values[i]); };
    for (let i = first; i <= last; i++) if (isNumber(values[i]) && !before(i - 1) && !after(i + 1)) found.push(i);
    return found.length ? found : null;
  }

  /** Limits within which the bulk of the visible values can be told apart; wild ones are left outside, and counted. */
  function limits(panel, chart, u) {
    const values = [];
    const [first, last] = u.series[0].idxs || [0, u.data[0].length - 1];
    for (let s = 1; s < u.data.length; s++) {
      for (let i = first; i <= last; i++) if (isNumber(u.data[s][i])) values.push(u.data[s][i]);
    }
    chart.outside = "";
    if (!values.length) return [0, 1];
    values.sort((a, b) => a - b);
    let low = values[0], high = values[values.length - 1];
    const at = (share) => values[Math.round(share * (values.length - 1))];
    const reach = 2 * (at(0.95) - at(0.05));
    const inner = [Math.max(low, at(0.05) - reach), Math.min(high, at(0.95) + reach)];
    if (panel.floor !== null || panel.ceiling !== null) {
      if (panel.floor !== null) low = Math.min(Math.max(low, panel.floor), high);
      if (panel.ceiling !== null) high = Math.max(Math.min(high, panel.ceiling), low);
    } else if (panel.noisy && reach > 0 && high - low > 1.5 * (inner[1] - inner[0])) {
      [low, high] = inner;
    }
    const wild = values.filter((value) => value < low || value > high);
    if (wild.length) {
      const furthest = Math.abs(wild[0] - low) > Math.abs(wild[wild.length - 1] - high) && wild[0] < low ? wild[0] : wild[wild.length - 1];
      chart.outside = `${wild.length} beyond the axis, furthest ${told(furthest, panel.percent)}`;
    }
    for (const level of chart.levels) {
      low = Math.min(low, level.value);
      high = Math.max(high, level.value);
    }
    if (panel.fromZero && low >= 0) low = 0;
    const margin = 0.05 * (high - low) || 0.05 * Math.abs(high) || 0.05;
    return [panel.fromZero && low === 0 ? 0 : low - margin, high + margin];
  }

  function levelsOf(panel, curves) {
    const levels = panel.level === null || state.log ? [] : [{ value: panel.level, words: "" }];
    const top = Math.max(...curves.flatMap((curve) => curve.raw.filter(isNumber)).slice(-5000), 0);
    const references = new Set(curves.map((curve) => curve.reference).filter(isNumber));
    for (const value of references) {
      if (value <= 3 * top) levels.push({ value, words: `${panel.reference} ${told(value)}` });
    }
    return levels;
  }

  function fullRange() {
    let low = Infinity, high = -Infinity;
    for (const { entity } of entities()) {
      const x = positions(entity);
      if (x && x.length) { low = Math.min(low, x[0]); high = Math.max(high, x[x.length - 1]); }
    }
    if (low > high) return [0, 1];
    return low === high ? [low - 0.5, high + 0.5] : [low, high];
  }

  function drawLevels(u, chart, ink) {
    const context = u.ctx;
    context.save();
    context.font = `${11 * devicePixelRatio}px system-ui, sans-serif`;
    for (const level of chart.levels) {
      const y = u.valToPos(level.value, "y", true);
      if (!(y >= u.bbox.top && y <= u.bbox.top + u.bbox.height)) continue;
      context.strokeStyle = ink.soft;
      context.lineWidth = devicePixelRatio;
      context.setLineDash(level.words ? [5 * devicePixelRatio, 4 * devicePixelRatio] : []);
      context.globalAlpha = level.words ? 0.9 : 0.45;
      context.beginPath();
      context.moveTo(u.bbox.left, y);
      context.lineTo(u.bbox.left + u.bbox.width, y);
      context.stroke();
      if (level.words) {
        context.fillStyle = ink.soft;
        context.textAlign = "right";
        context.fillText(level.words, u.bbox.left + u.bbox.width - 4, y - 4 * devicePixelRatio);
      }
    }
    context.restore();
  }

  function axesOf(panel, ink, log) {
    const font = "11px system-ui, sans-serif";
    const common = { stroke: ink.soft, font, ticks: { show: false }, grid: { stroke: ink.grid, width: 1 } };
    const largestOf = (splits) => Math.max(...splits.map(Math.abs));
    const stepOf = (splits) => (splits.length > 1 ? Math.abs(splits[1] - splits[0]) : 1);
    return [
      { ...common, size: 24, gap: 4, space: 62, grid: { show: false }, values: (u, splits) => splits.map((value) => short(value, stepOf(splits), false, largestOf(splits))) },
      {
        ...common, gap: 6, space: 34,
        size: (u, values) => Math.max(34, 12 + 6.4 * Math.max(0, ...(values || []).map((text) => (text || "").length))),
        values: (u, splits) => splits.map((value) => (log && !isRound(value) ? "" : short(value, log ? value : stepOf(splits), panel.percent, log ? value : largestOf(splits)))),
      },
    ];
  }

  function isRound(value) {
    const power = Math.log10(value);
    return Math.abs(power - Math.round(power)) < 1e-6;
  }

  /** The nearest point of a series, for curves whose points lie at other places than the cursor's. */
  function nearest(u, series, index) {
    const values = u.data[series];
    if (!values || isNumber(values[index])) return index;
    const x = u.data[0];
    let left = index, right = index;
    while (left >= 0 && !isNumber(values[left])) left--;
    while (right < values.length && !isNumber(values[right])) right++;
    if (left < 0 && right >= values.length) return index;
    if (left < 0) return right;
    if (right >= values.length) return left;
    return x[index] - x[left] <= x[right] - x[index] ? left : right;
  }

  /** Draw a chart; one that has the same lines as before only gets its new numbers. */
  function build(chart, ink) {
    const { panel, plot } = chart;
    chart.stale = false;
    chart.curves = curvesOf(panel);
    const log = isLog(panel, chart.curves);
    chart.levels = levelsOf(panel, chart.curves);
    const { joined, series, bands } = plotted(panel, chart.curves, log, ink);
    const range = state.range || fullRange();
    const shape = JSON.stringify([log, ink, series, bands]);
    if (log) chart.outside = "";
    chart.range = range;
    plot.dataset.points = String(joined[0].length);
    if (chart.u && chart.shape === shape) chart.u.setData(joined, false); else replace(chart, ink, log, joined, series, bands);
    chart.shape = shape;
    chart.u.setScale("x", { min: range[0], max: range[1] });
    describe(chart);
    writeLegend(chart);
  }

  function replace(chart, ink, log, joined, series, bands) {
    const { panel, plot } = chart;
    const cursor = chart.u && chart.u.cursor.left >= 0 ? { left: chart.u.cursor.left, top: chart.u.cursor.top } : null;
    if (chart.u) chart.u.destroy();
    const options = {
      width: Math.max(plot.clientWidth, 160), height: PLOT_HEIGHT, legend: { show: false }, series, bands,
      padding: [12, 10, 0, 0],
      scales: {
        x: { time: false },
        y: log ? { distr: 3 } : { range: (u) => limits(panel, chart, u) },
      },
      axes: axesOf(panel, ink, log),
      cursor: {
        y: false, drag: { x: true, y: false, dist: 6 }, dataIdx: nearest,
        points: { size: 7, width: 0, show: (u, s) => (u.series[s].band ? undefined : make("div", "u-cursor-pt")) },
        sync: { key: "curves", filters: { pub: (type) => type === "mousemove" || type === "mouseleave" } },
        bind: { dblclick: () => () => { zoom(null); return null; } },
      },
      hooks: {
        setScale: [(u, key) => { if (key === "x") zoomed(u); }],
        setCursor: [() => writeLegend(chart)],
        draw: [(u) => { drawLevels(u, chart, ink); writeLegend(chart); }],
      },
    };
    chart.u = new uPlot(options, joined, plot);
    if (cursor) chart.u.setCursor(cursor);
  }

  /** A chart in words, for those who do not see it. */
  function describe(chart) {
    const { panel, curves } = chart;
    const said = curves.slice(0, 8).map((curve) => {
      const known = curve.raw.filter(isNumber);
      const highest = known.reduce((a, b) => Math.max(a, b), -Infinity), lowest = known.reduce((a, b) => Math.min(a, b), Infinity);
      const last = curve.last === null ? known[known.length - 1] : curve.last;
      return `${curve.label}: from ${told(known[0], panel.percent)} to ${told(last, panel.percent)}, lowest ${told(lowest, panel.percent)}, highest ${told(highest, panel.percent)}`;
    });
    chart.plot.setAttribute("aria-label", `Chart of ${panel.title.toLowerCase()} over ${data.axes[state.axis]}. ${said.join(". ")}.`);
  }

  // --- what stands below a chart -----------------------------------------------------------------------------------------

  function writeLegend(chart) {
    const { u, panel, legend, curves } = chart;
    if (!u) return;
    const index = u.cursor.idx;
    const at = index === null || index === undefined || u.cursor.left < 0 ? null : index;
    const lines = [];
    const where = make("li");
    where.append(make("span", "where", at === null ? "last values" : `${data.axes[state.axis]} ${told(u.data[0][at])}`));
    if (chart.outside) where.append(make("span", "where beyond", chart.outside));
    lines.push(where);
    for (const curve of curves.slice(0, MOST_IN_LEGEND)) {
      const line = make("li");
      const swatch = make("span", `swatch k${curve.colour} dash${curve.dash % 4}`);
      swatch.setAttribute("aria-hidden", "true");
      const value = make("span", "value");
      let number = curve.last, mean;
      if (at !== null) {
        const row = rowOf(curve, u.data[0][at]);
        number = curve.raw[row];
        mean = curve.trend ? curve.trend[row] : undefined;
      } else if (number === null) {
        number = lastOf(curve.raw);
      }
      value.textContent = told(number, panel.percent);
      if (isNumber(mean)) value.append(make("small", "", `  mean ${told(Number(mean.toPrecision(4)), panel.percent)}`));
      const name = make("span", "name", curve.label);
      name.title = curve.label;
      line.append(swatch, name, value);
      lines.push(line);
    }
    if (curves.length > MOST_IN_LEGEND) lines.push(make("li", "where", `and ${curves.length - MOST_IN_LEGEND} more`));
    legend.replaceChildren(...lines);
  }

  /** The row of a curve that lies nearest to `x`, among those with a number. */
  function rowOf(curve, x) {
    let low = 0, high = curve.x.length - 1;
    while (low < high) {
      const middle = (low + high) >> 1;
      if (curve.x[middle] < x) low = middle + 1; else high = middle;
    }
    if (low > 0 && x - curve.x[low - 1] < curve.x[low] - x) low--;
    for (let away = 0; away < curve.x.length; away++) {
      if (isNumber(curve.raw[low - away])) return low - away;
      if (isNumber(curve.raw[low + away])) return low + away;
    }
    return low;
  }

  function lastOf(values) {
    for (let i = values.length - 1; i >= 0; i--) if (isNumber(values[i])) return values[i];
    return null;
  }

  // --- looking closer ------------------------------------------------------------------------------------------------------

  function zoomed(u) {
    const chart = charts.find((each) => each.u === u);
    if (!chart) return;
    const { min, max } = u.scales.x;
    const [low, high] = chart.range;
    if (min === low && max === high) return;
    zoom([min, max]);
  }

  /** Show the same part of the x-axis in all charts; all of it for null. */
  function zoom(range) {
    const full = fullRange();
    if (range) range = [Math.max(range[0], full[0]), Math.min(range[1], full[1])];
    if (range && !(range[1] > range[0])) return;
    state.range = range && (range[0] > full[0] || range[1] < full[1]) ? range : null;
    const [min, max] = state.range || full;
    for (const chart of charts) {
      chart.range = [min, max];
      if (chart.u) chart.u.setScale("x", { min, max });
    }
    byId("reset").disabled = state.range === null;
  }

  function onKey(event, chart) {
    const u = chart.u;
    if (!u || event.ctrlKey || event.metaKey || event.altKey) return;
    const [first, last] = u.series[0].idxs || [0, u.data[0].length - 1];
    const now = u.cursor.idx === null || u.cursor.idx === undefined || u.cursor.left < 0 ? null : u.cursor.idx;
    const [min, max] = state.range || fullRange();
    const middle = now === null ? (min + max) / 2 : u.data[0][now];
    const stride = event.shiftKey ? Math.max(1, Math.round((last - first) / 10)) : 1;
    const moves = {
      ArrowRight: () => moveTo(chart, now === null ? first : Math.min(last, now + stride)),
      ArrowLeft: () => moveTo(chart, now === null ? last : Math.max(first, now - stride)),
      Home: () => moveTo(chart, first),
      End: () => moveTo(chart, last),
      "+": () => zoom([middle - (max - min) / 4, middle + (max - min) / 4]),
      "=": () => zoom([middle - (max - min) / 4, middle + (max - min) / 4]),
      "-": () => zoom([middle - (max - min), middle + (max - min)]),
      Escape: () => zoom(null),
    };
    if (!moves[event.key]) return;
    event.preventDefault();
    moves[event.key]();
  }

  function moveTo(chart, index) {
    const u = chart.u;
    u.setCursor({ left: u.valToPos(u.data[0][index], "x"), top: 20 });
    byId("announce").textContent = [...chart.legend.children].map((line) => line.textContent).join(", ");
  }

  // --- all charts ----------------------------------------------------------------------------------------------------------

  function rebuild() {
    const ink = colours();
    const shown = [...data.panels, ...otherPanels()].filter(hasNumbers);
    const keys = shown.map((panel) => panel.title + panel.lines[0].metric).join("|");
    if (keys !== rebuild.keys) layOut(shown);
    rebuild.keys = keys;
    for (const chart of charts) {
      if (data.live && !isNear(chart.figure)) chart.stale = true; else build(chart, ink);
    }
    byId("controls").hidden = charts.length === 0;
    byId("nothing").hidden = charts.length > 0;
    byId("smoothing-said").textContent = SMOOTHINGS[state.smoothing] ? `mean over ${100 * SMOOTHINGS[state.smoothing]} %` : "none";
    byId("reset").disabled = state.range === null;
  }

  const MARGIN = 200; // pixels beyond the window that count as seen

  function isNear(element) {
    const box = element.getBoundingClientRect();
    return box.bottom > -MARGIN && box.top < innerHeight + MARGIN;
  }

  /** What was out of sight while the run went on is drawn when it comes into sight. */
  const watcher = new IntersectionObserver((entries) => {
    for (const { isIntersecting, target } of entries) {
      if (!isIntersecting) continue;
      const chart = charts.find((each) => each.figure === target);
      if (chart && chart.stale) build(chart, colours());
      if (target === byId("frontier-section") && frontierIsStale) buildFrontier();
    }
  }, { rootMargin: `${MARGIN}px` });

  function layOut(panels) {
    const focused = charts.find((chart) => chart.plot === document.activeElement);
    watcher.disconnect();
    for (const chart of charts) if (chart.u) chart.u.destroy();
    const root = byId("panels");
    root.replaceChildren();
    charts = panels.map((panel) => {
      const figure = make("figure", "panel");
      figure.dataset.metric = panel.lines[0].metric;
      const caption = make("figcaption");
      const hint = make("p", "hint");
      const plot = make("div", "plot");
      plot.tabIndex = 0;
      plot.setAttribute("role", "img");
      const legend = make("ul", "legend");
      caption.append(make("h3", "", panel.title), hint);
      figure.append(caption, plot, legend);
      hint.textContent = [panel.hint.replace("; shaded: one standard deviation of theirs", ""), bandInWords(panel)].filter(Boolean).join("; ");
      const chart = { panel, figure, plot, legend, hint, u: null, curves: [], levels: [], outside: "", range: [0, 1], shape: "", stale: false };
      plot.addEventListener("keydown", (event) => onKey(event, chart));
      return chart;
    });
    for (const section of new Set(panels.map((panel) => panel.section))) {
      const grid = make("div", "grid");
      const count = panels.filter((panel) => panel.section === section).length;
      if (count === 2 || count === 4) grid.classList.add("two");
      grid.append(...charts.filter((chart) => chart.panel.section === section).map((chart) => chart.figure));
      root.append(make("h3", "part", section), grid);
    }
    const again = focused && charts.find((chart) => chart.figure.dataset.metric === focused.figure.dataset.metric);
    if (again) again.plot.focus({ preventScroll: true });
    if (data.live) for (const element of [...charts.map((chart) => chart.figure), byId("frontier-section")]) watcher.observe(element);
  }

  function listEntities() {
    const list = byId("entities");
    const all = data[state.view];
    list.hidden = all.length < 2;
    list.replaceChildren(...all.map((entity, place) => {
      const item = make("li");
      const button = make("button", "quiet");
      button.type = "button";
      button.setAttribute("aria-pressed", String(!state.hidden[state.view].has(place)));
      const swatch = make("span", `swatch k${place % 7} dash${place >= 7 ? 1 : 0}`);
      button.append(swatch, make("span", "", entity.label));
      button.addEventListener("click", () => {
        const hidden = state.hidden[state.view];
        if (!hidden.delete(place)) hidden.add(place);
        if (hidden.size === all.length) hidden.clear();
        listEntities();
        rebuild();
        list.children[place].firstChild.focus();
      });
      item.append(button);
      return item;
    }));
  }

  function segments(root, name, options, chosen, change) {
    root.replaceChildren(...Object.entries(options).map(([value, words]) => {
      const label = make("label");
      const input = make("input");
      input.type = "radio";
      input.name = name;
      input.value = value;
      input.checked = value === chosen;
      input.addEventListener("change", () => change(value));
      label.append(input, make("span", "", words));
      return label;
    }));
  }

  function startControls() {
    const slider = byId("smoothing");
    slider.value = String(state.smoothing);
    slider.addEventListener("input", () => { state.smoothing = Number(slider.value); rebuild(); });
    byId("log").addEventListener("change", (event) => { state.log = event.target.checked; rebuild(); });
    byId("reset").addEventListener("click", () => zoom(null));
    byId("controls").addEventListener("submit", (event) => event.preventDefault());
    const axes = { steps: "steps", seconds: "seconds", iterations: "iterations" };
    const known = Object.keys(data.axes).filter((name) => data.live || data.runs.some((run) => run.x[name]));
    if (!known.includes(state.axis)) state.axis = known[0] || "iterations";
    segments(byId("axis"), "axis", Object.fromEntries(known.map((name) => [name, axes[name]])), state.axis, (value) => {
      state.axis = value;
      state.range = null;
      rebuild();
    });
    if (data.groups.length) {
      byId("view-set").hidden = false;
      segments(byId("view"), "view", { groups: "means over seeds", runs: "each run" }, state.view, (value) => {
        state.view = value;
        state.range = null;
        rebuild.keys = "";
        listEntities();
        rebuild();
      });
    }
    new ResizeObserver(() => {
      for (const chart of charts) {
        const width = chart.plot.clientWidth;
        if (chart.u && width && Math.abs(width - chart.u.width) > 1) chart.u.setSize({ width, height: PLOT_HEIGHT });
      }
      for (const u of frontiers) {
        const width = u.root.parentElement.clientWidth;
        if (width && Math.abs(width - u.width) > 1) u.setSize({ width, height: 280 });
      }
    }).observe(byId("panels"));
  }

  // --- reward against KL -----------------------------------------------------------------------------------------------------

  let frontiers = [];
  let frontierIsStale = false;

  function buildFrontier() {
    frontierIsStale = false;
    for (const u of frontiers) u.destroy();
    frontiers = [];
    const root = byId("frontier");
    root.replaceChildren();
    byId("frontier-section").hidden = false; // what is hidden has no width
    const ink = colours();
    const points = (run, metric) => {
      const kl = run.columns.kl_to_reference || [], reward = run.columns[metric] || [];
      return kl.map((value, i) => ({ x: value, y: reward[i], iteration: (run.x.iterations || [])[i] })).filter((p) => isNumber(p.x) && isNumber(p.y));
    };
    for (const [metric, title] of [["reward_mean", "Reward"], ["gold_mean", "Gold score"]]) {
      const clouds = data.runs.map((run, place) => ({ run, place, points: points(run, metric) })).filter((cloud) => cloud.points.length > 1);
      if (clouds.length) frontiers.push(frontierChart(root, ink, clouds, metric, title));
    }
    byId("frontier-section").hidden = root.children.length === 0;
  }

  function frontierChart(root, ink, clouds, metric, title) {
    const figure = make("figure", "panel");
    const plot = make("div", "plot");
    plot.setAttribute("role", "img");
    plot.tabIndex = 0;
    const said = clouds.map(({ run, points }) => `${run.label}: from ${told(points[0].y)} at ${told(points[0].x)} nats to ${told(points[points.length - 1].y)} at ${told(points[points.length - 1].x)} nats`);
    plot.setAttribute("aria-label", `${title} against KL to the reference. ${said.join(". ")}.`);
    const legend = make("ul", "legend");
    figure.append(make("h3", "", `${title} against KL`), make("p", "hint", "across: KL to the reference, nats per response"), plot, legend);
    root.append(figure);
    const all = clouds.flatMap((cloud) => cloud.points.map((point) => ({ ...point, place: cloud.place }))).sort((a, b) => a.x - b.x);
    let before = -Infinity;
    const x = all.map((point) => { before = point.x <= before ? before + 1e-9 : point.x; return before; });
    const paths = clouds.map((cloud) => ({ ...cloud, path: runningMeans(cloud.points) }));
    const options = {
      width: Math.max(plot.clientWidth, 160), height: 280, legend: { show: false }, padding: [12, 14, 0, 0],
      scales: { x: { time: false, range: (u, low, high) => padded(Math.min(low, 0), high) }, y: { range: (u, low, high) => padded(low, high) } },
      axes: axesOf({ percent: false }, ink, false),
      cursor: { y: false, drag: { x: false, y: false }, points: { size: 8, width: 0 } },
      series: [{}, { stroke: ink.soft, paths: () => null, points: { show: false } }],
      hooks: {
        draw: [(u) => drawPaths(u, paths, ink)],
        setCursor: [(u) => {
          const point = u.cursor.left >= 0 && isNumber(u.cursor.idx) ? all[u.cursor.idx] : null;
          const words = point ? `iteration ${told(point.iteration)}: ${metric} ${told(point.y)} at ${told(point.x)} nats` : `${all.length} iterations`;
          const lines = [make("li", "where", words)];
          if (clouds.length > 1) {
            for (const { run, place } of clouds) {
              const line = make("li");
              line.append(make("span", `swatch k${place % 7}`), make("span", "name", run.label));
              lines.push(line);
            }
          }
          legend.replaceChildren(...lines);
        }],
      },
    };
    const u = new uPlot(options, [x, all.map((point) => point.y)], plot);
    u.setCursor({ left: -10, top: -10 });
    return u;
  }

  function buildRatings() {
    const root = byId("ratings");
    root.replaceChildren();
    byId("ratings-section").hidden = data.ratings.length === 0;
    const ink = colours();
    for (const { label, players } of data.ratings) {
      const x = players.map((player) => player.step);
      const y = players.map((player) => player.rating);
      const figure = make("figure", "panel");
      const plot = make("div", "plot");
      plot.setAttribute("role", "img");
      plot.tabIndex = 0;
      plot.setAttribute("aria-label", `Ratings of ${label}: ${players.map((player) => `${told(Math.round(player.rating))} at step ${told(player.step)}`).join(", ")}.`);
      const legend = make("ul", "legend");
      figure.append(make("h3", "", label), make("p", "hint", "Elo over environment steps"), plot, legend);
      root.append(figure);
      const side = (sign) => players.map((player) => player.rating + 2 * sign * player.standard_error);
      frontiers.push(new uPlot({
        width: Math.max(plot.clientWidth, 160), height: 280, legend: { show: false }, padding: [12, 14, 0, 0],
        scales: { x: { time: false, range: (u, low, high) => padded(low, high) }, y: { range: (u, low, high) => padded(Math.min(low, 0), Math.max(high, 0)) } },
        axes: axesOf({ percent: false }, ink, false),
        cursor: { y: false, drag: { x: false, y: false }, points: { size: 8, width: 0 } },
        series: [{}, { width: 0, points: { show: false } }, { width: 0, points: { show: false } },
          { stroke: ink.lines[0], width: 2, points: { show: true, size: 6, fill: ink.lines[0] } }],
        bands: [{ series: [2, 1], fill: faded(ink.lines[0], 0.17) }],
        hooks: { setCursor: [(u) => {
          const at = u.cursor.left >= 0 && isNumber(u.cursor.idx) ? players[u.cursor.idx] : players[players.length - 1];
          legend.replaceChildren(make("li", "where", `step ${told(at.step)}: ${told(Math.round(at.rating))} ± ${told(Math.round(at.standard_error))}`));
        }] },
      }, [x, side(-1), side(1), y], plot));
      frontiers[frontiers.length - 1].setCursor({ left: -10, top: -10 });
    }
  }

  function padded(low, high) {
    const margin = 0.05 * (high - low) || 0.05 * Math.abs(high) || 0.05;
    return [low - margin, high + margin];
  }

  function runningMeans(points) {
    const reach = Math.max(1, Math.floor(points.length / 40));
    const mean = (part, name) => part.reduce((sum, point) => sum + point[name], 0) / part.length;
    return points.map((point, i) => {
      const near = points.slice(Math.max(0, i - reach), i + reach + 1);
      return { x: mean(near, "x"), y: mean(near, "y") };
    });
  }

  function drawPaths(u, clouds, ink) {
    const context = u.ctx;
    const at = (point) => [u.valToPos(point.x, "x", true), u.valToPos(point.y, "y", true)];
    context.save();
    for (const { place, points, path } of clouds) {
      const colour = ink.lines[place % 7];
      context.fillStyle = faded(colour, 0.35);
      for (const point of points) {
        const [x, y] = at(point);
        context.beginPath();
        context.arc(x, y, 2.4 * devicePixelRatio, 0, 2 * Math.PI);
        context.fill();
      }
      context.strokeStyle = colour;
      context.lineWidth = 2 * devicePixelRatio;
      context.lineJoin = "round";
      context.beginPath();
      path.forEach((point, i) => (i ? context.lineTo(...at(point)) : context.moveTo(...at(point))));
      context.stroke();
      for (const [point, fill] of [[path[0], ink.sheet], [path[path.length - 1], colour]]) {
        context.beginPath();
        context.arc(...at(point), 5 * devicePixelRatio, 0, 2 * Math.PI);
        context.fillStyle = fill;
        context.fill();
        context.stroke();
      }
    }
    context.restore();
  }

  // --- samples -----------------------------------------------------------------------------------------------------------------

  const chosen = { run: 0, looks: new Map(), cards: new Map() };

  /** The cards of the chosen run; those that are there already only get what is new, and keep what the reader chose. */
  function buildSamples() {
    const known = data.samples.filter((each) => each.samples.length);
    byId("samples-section").hidden = known.length === 0;
    if (!known.length) return;
    const samples = known[Math.min(chosen.run, known.length - 1)].samples;
    buildSampleControls(known, samples.some((sample) => sample.tokens));
    const prompts = new Map();
    for (const sample of samples) {
      if (!prompts.has(sample.prompt)) prompts.set(sample.prompt, []);
      prompts.get(sample.prompt).push(sample);
    }
    for (const [prompt, looks] of prompts) {
      if (!chosen.cards.has(prompt)) {
        const card = promptCard(prompt, chosen.cards.size);
        chosen.cards.set(prompt, card);
        byId("samples").append(card.element);
      }
      chosen.cards.get(prompt).take(looks);
    }
  }

  function buildSampleControls(known, coloured) {
    const controls = byId("sample-controls");
    if (!controls.querySelector("select") && known.length > 1) {
      const label = make("label", "", "Run ");
      const select = make("select");
      known.forEach((each, i) => { const option = make("option", "", each.label); option.value = String(i); select.append(option); });
      select.value = String(chosen.run);
      select.addEventListener("change", () => {
        chosen.run = Number(select.value);
        chosen.looks.clear();
        chosen.cards.clear();
        byId("samples").replaceChildren();
        buildSamples();
      });
      label.append(select);
      controls.prepend(label);
    }
    const there = controls.querySelector(".scale");
    if (there) there.hidden = !coloured;
    if (coloured && !there) {
      const scale = make("span", "scale");
      const bar = make("span", "scale-bar");
      bar.setAttribute("aria-hidden", "true");
      scale.append(make("span", "", "less likely than to the reference"), bar, make("span", "", "more likely"));
      controls.append(scale);
      byId("samples-how").textContent = "Each prompt is answered with the same seed at every look. A token's colour is log-prob of the policy minus log-prob of the reference, full at 2 nats; the number shows when the token is pointed at.";
    }
    controls.hidden = !controls.children.length;
  }

  /** One prompt: the first answer, one that is chosen, and the last, side by side. */
  function promptCard(prompt, number) {
    const element = make("article", "prompt");
    const columns = make("div", "looks");
    const line = make("div", "control");
    const slider = make("input");
    slider.type = "range";
    slider.min = "1";
    slider.id = `look-${number}`;
    const label = make("label", "", "Look in the middle");
    label.htmlFor = slider.id;
    const said = make("output");
    line.append(label, slider, said);
    element.append(make("p", "asked", prompt), line, columns);
    let looks = [], drawn = [];
    const show = () => {
      const now = Number(slider.value);
      const shown = looks.length > 3 ? [looks[0], looks[now], looks[looks.length - 1]] : looks;
      said.textContent = looks.length > 3 ? `iteration ${looks[now].iteration}` : "";
      slider.setAttribute("aria-valuetext", said.textContent);
      shown.forEach((sample, i) => {
        if (!columns.children[i]) columns.append(lookAt(sample));
        else if (drawn[i] !== sample) columns.children[i].replaceWith(lookAt(sample));
      });
      drawn = [...shown];
    };
    slider.addEventListener("input", () => { chosen.looks.set(prompt, Number(slider.value)); show(); });
    const take = (all) => {
      looks = all;
      line.hidden = looks.length <= 3;
      const middle = document.activeElement === slider ? Number(slider.value) : Math.floor(looks.length / 2);
      slider.max = String(Math.max(looks.length - 2, 1));
      slider.value = String(Math.min(chosen.looks.get(prompt) || middle, looks.length - 2));
      show();
    };
    return { element, take };
  }

  function lookAt(sample) {
    const look = make("div", "look");
    const head = make("h4");
    head.append(make("span", "", `iteration ${told(sample.iteration)}`), make("span", "", `score ${told(sample.score)}`));
    if (isNumber(sample.kl)) head.append(make("span", "", `KL ${told(Number(sample.kl.toPrecision(4)))}`));
    const text = make("p");
    if (sample.tokens) {
      sample.tokens.forEach((token, i) => {
        const ratio = sample.log_ratios[i];
        const piece = make("span", "token", token);
        const strength = Math.min(Math.abs(ratio) / 2, 1) * 0.6;
        piece.style.backgroundColor = ratio > 0 ? `rgba(213, 94, 0, ${strength})` : `rgba(0, 114, 178, ${strength})`;
        piece.title = `${ratio > 0 ? "+" : ""}${told(Number(ratio.toPrecision(3)))} nats`;
        text.append(piece);
      });
      if (sample.cut) text.append("...");
    } else {
      text.textContent = sample.response || "(empty)";
    }
    look.append(head, text);
    return look;
  }

  // --- light and dark ------------------------------------------------------------------------------------------------------

  function startTheme() {
    const root = document.documentElement;
    const system = matchMedia("(prefers-color-scheme: dark)");
    let wish = null;
    try { wish = localStorage.getItem("proximo-theme"); } catch { wish = null; }
    const isDark = () => (wish ? wish === "dark" : system.matches);
    const apply = () => {
      root.dataset.theme = isDark() ? "dark" : "light";
      inks = null;
      byId("theme").setAttribute("aria-pressed", String(isDark()));
    };
    apply();
    byId("theme").addEventListener("click", () => {
      wish = isDark() ? "light" : "dark";
      try { localStorage.setItem("proximo-theme", wish); } catch { /* a page from the disk may not be allowed to */ }
      apply();
      redraw();
    });
    system.addEventListener("change", () => { apply(); redraw(); });
  }

  function redraw() {
    rebuild();
    buildFrontier();
    buildRatings();
  }

  // --- while the run goes on ---------------------------------------------------------------------------------------------------

  const EVERY = 2000; // milliseconds between two questions; a thousandth second for each iteration once that is more
  const SELDOM = 15000;
  const read = { metrics: 0, samples: 0, news: 0, summary: "", shown: "", misses: 0, rows: 0, drawn: 0, held: false };
  const all = { x: {}, columns: named({}) }; // every row, of which the charts may show fewer

  function take(row) {
    const names = { steps: "env_steps", seconds: "seconds", iterations: "iteration" };
    for (const [name, metric] of Object.entries(names)) {
      if (!isNumber(row[metric])) continue;
      all.x[name] = all.x[name] || new Array(read.rows).fill(null);
      all.x[name].push(row[metric]);
    }
    for (const name of Object.values(names)) delete row[name];
    for (const [name, value] of Object.entries(row)) {
      if (!isNumber(value) && value !== null) continue;
      all.columns[name] = all.columns[name] || new Array(read.rows).fill(null);
      all.columns[name].push(value);
    }
    read.rows++;
    for (const values of [...Object.values(all.columns), ...Object.values(all.x)]) {
      if (values.length < read.rows) values.push(values === all.x.steps || values === all.x.seconds ? values[values.length - 1] : null);
    }
  }

  /** The lowest and the highest value of each group of `size`, in their order, and the means, as page_data.py has them. */
  function grouped(values, size) {
    const extremes = [], means = [];
    for (let start = 0; start < values.length; start += size) {
      let low = -1, high = -1, sum = 0, count = 0;
      for (let i = start; i < Math.min(start + size, values.length); i++) {
        const value = values[i];
        if (!isNumber(value)) continue;
        if (low < 0 || value < values[low]) low = i;
        if (high < 0 || value > values[high]) high = i;
        sum += value;
        count++;
      }
      extremes.push(count ? values[Math.min(low, high)] : null, count ? values[Math.max(low, high)] : null);
      means.push(count ? sum / count : null);
    }
    return { extremes, means };
  }

  /** Give the charts what has been read: all rows, or as many as a page that is written at the end shows. */
  function thin() {
    const run = data.runs[0];
    const metrics = Object.keys(all.columns);
    const most = Math.min(data.most.rows, Math.floor(data.most.numbers / Math.max(metrics.length, 1)));
    const size = read.rows <= most ? 1 : Math.ceil((3 * read.rows) / most);
    run.unique = null;
    if (size === 1) return Object.assign(run, { x: all.x, columns: all.columns });
    const ends = (values) => {
      const found = [];
      for (let start = 0; start < values.length; start += size) found.push(values[start], values[Math.min(start + size, values.length) - 1]);
      return found;
    };
    run.x = Object.fromEntries(Object.entries(all.x).map(([name, values]) => [name, ends(values)]));
    Object.assign(run, { columns: named({}), means: named({}), last: named({}) });
    for (const name of metrics) {
      const { extremes, means } = grouped(all.columns[name], size);
      run.columns[name] = extremes;
      run.means[name] = means;
      run.last[name] = lastOf(all.columns[name]);
    }
    return run;
  }

  async function asked(address) {
    const answer = await fetch(address, { cache: "no-store" });
    if (answer.ok) return answer;
    throw Object.assign(new Error(String(answer.status)), { told: (await answer.text()).slice(0, 500) });
  }

  /** New lines of a file of the run; the number of them. */
  async function fresh(name, use) {
    const answer = await asked(`${name}?from=${read[name]}`);
    if (answer.headers.get("X-From") !== String(read[name])) { location.reload(); return 0; } // the run began anew
    const text = await answer.text();
    read[name] = Number(answer.headers.get("X-Next"));
    let count = 0;
    for (const line of text.split("\n")) {
      if (!line) continue;
      try { use(JSON.parse(line)); count++; } catch { /* a line that is none */ }
    }
    return count;
  }

  function takeSample(sample) {
    if (!sample || !Number.isInteger(sample.iteration)) return;
    const cut = (text) => (text.length > data.most.characters ? `${text.slice(0, data.most.characters)}...` : text);
    const prompt = cut(Array.isArray(sample.prompt)
      ? sample.prompt.filter((one) => one && typeof one === "object").map((one) => `${one.role}: ${one.content}`).join("\n")
      : String(sample.prompt));
    const samples = data.samples[0].samples;
    const prompts = new Set(samples.map((each) => each.prompt));
    if (!prompts.has(prompt) && prompts.size >= data.most.prompts) return;
    const { tokens, log_ratios: ratios } = sample;
    const good = Array.isArray(tokens) && Array.isArray(ratios) && tokens.length === ratios.length && ratios.every(isNumber);
    const clean = { iteration: sample.iteration, prompt, response: cut(String(sample.response)), score: sample.score, kl: sample.kl };
    let n = 0, room = data.most.characters;
    while (good && n < Math.min(tokens.length, data.most.tokens) && (room -= String(tokens[n]).length) >= 0) n++;
    samples.push(n ? { ...clean, tokens: tokens.slice(0, n).map(String), log_ratios: ratios.slice(0, n), cut: n < tokens.length } : clean);
  }

  /** Bring what was read to the page, but not under the hand of a reader, and not where nobody looks. */
  function showNews() {
    if (read.held || document.hidden) return;
    if (read.rows !== read.drawn) {
      read.drawn = read.rows;
      thin();
      rebuild();
      frontierIsStale = !data.control;
      const section = byId("frontier-section");
      if (frontierIsStale && (section.hidden || isNear(section))) buildFrontier();
    }
    if (read.news) buildSamples();
    read.news = 0;
    const root = byId("summary"), selection = getSelection();
    const inUse = root.contains(document.activeElement) || (!selection.isCollapsed && root.contains(selection.anchorNode));
    if (read.summary === read.shown || inUse) return;
    root.innerHTML = read.summary; // escaped by the server, as the page is
    read.shown = read.summary;
  }

  async function poll() {
    const badge = byId("live-state");
    let more = false;
    try {
      const rows = await fresh("metrics", take);
      read.news += await fresh("samples", takeSample);
      more = rows > 500;
      if (!more) {
        showNews();
        document.documentElement.dataset.rows = String(read.rows);
        read.summary = await (await asked("summary")).text();
        showNews();
      }
      read.misses = 0;
      badge.textContent = "live";
      badge.classList.remove("over");
    } catch (error) {
      read.misses++;
      badge.textContent = error.told || (read.misses > 1 ? "the run has ended: its page is report/index.html" : "live");
      badge.classList.toggle("over", Boolean(error.told) || read.misses > 1);
    }
    setTimeout(poll, more ? 50 : Math.min(Math.max(EVERY, read.rows) * (1 + read.misses), SELDOM));
  }

  function start() {
    startTheme();
    if (data.live) {
      data.samples = [{ label: data.runs[0].label, samples: [] }];
      Object.assign(data.runs[0], { x: {}, columns: named({}), last: named({}) });
      delete data.runs[0].means;
    }
    startControls();
    listEntities();
    redraw();
    buildSamples();
    if (data.live) {
      addEventListener("pointerdown", () => { read.held = true; });
      const release = () => { read.held = false; setTimeout(showNews); };
      for (const name of ["pointerup", "pointercancel", "blur"]) addEventListener(name, release);
      document.addEventListener("visibilitychange", showNews);
      poll();
    }
  }

  start();
})();
