// What all charts share: colours from the style sheet, tooltips built as elements (the content policy allows no
// inline styles), size and colour changes.

import { element } from "./dom.js";

export function colour(name) {
  return getComputedStyle(document.documentElement).getPropertyValue(`--${name}`).trim();
}

export const opColour = (op) => colour(op ? `op-${op}` : "op-none") || colour("op-none");

export function tooltipOf(title, rows) {
  return element(
    "div",
    { class: "tooltip" },
    element("strong", {}, title),
    element(
      "table",
      {},
      ...rows.filter(([, value]) => value !== "" && value !== "–").map(([name, value]) => element("tr", {}, element("th", {}, name), element("td", {}, value))),
    ),
  );
}

// Keeps a chart drawn by `build()` (an ECharts option) in step with its size and with light and dark.
export class Chart {
  constructor(node, build) {
    this.node = node;
    this.build = build;
    this.chart = null;
    new ResizeObserver(() => this.chart?.resize()).observe(node);
    for (const query of ["(prefers-color-scheme: dark)", "(max-width: 620px)"]) {
      window.matchMedia(query).addEventListener("change", () => this.draw());
    }
  }

  draw() {
    if (this.node.hidden) return;
    if (!this.chart) {
      this.chart = window.echarts.init(this.node, null, { renderer: "canvas" });
      this.onInit?.(this.chart);
    }
    this.chart.setOption({ ...baseOption(), ...this.build() }, { notMerge: true });
  }
}

export const isNarrow = () => window.matchMedia("(max-width: 620px)").matches;

function baseOption() {
  return {
    animation: false,
    textStyle: { fontFamily: getComputedStyle(document.body).fontFamily, color: colour("ink") },
  };
}

export function axis(name, extra = {}) {
  return {
    type: "value",
    name,
    nameLocation: "middle",
    nameTextStyle: { color: colour("muted"), fontSize: 12 },
    axisLine: { show: true, lineStyle: { color: colour("line") } },
    axisTick: { show: false },
    axisLabel: { color: colour("muted"), fontSize: 12, hideOverlap: true, ...hideUneven(extra) },
    splitLine: { lineStyle: { color: colour("line"), opacity: 0.7 } },
    ...extra,
  };
}

// Ends that were fixed for the data's sake fall between the round numbers; labels there would touch their neighbours.
const hideUneven = (extra) => ({ showMinLabel: extra.min === undefined || extra.min === 0, showMaxLabel: extra.max === undefined });

export function tooltip(formatter) {
  return {
    trigger: "item",
    confine: true,
    backgroundColor: colour("card"),
    borderColor: colour("line"),
    textStyle: { color: colour("ink") },
    formatter,
  };
}

// Error bars both ways as a custom series; data rows are [x, y, xLow, xHigh, yLow, yHigh].
export function errorBars(data, stroke) {
  return {
    type: "custom",
    name: "error bars",
    silent: true,
    z: 2,
    data,
    encode: { x: [0, 2, 3], y: [1, 4, 5] },
    renderItem(params, api) {
      const at = (x, y) => api.coord([x, y]);
      const [x, y, xLow, xHigh, yLow, yHigh] = [0, 1, 2, 3, 4, 5].map((i) => api.value(i));
      const style = { stroke, lineWidth: 1.2, opacity: 0.55, fill: null };
      const line = ([x1, y1], [x2, y2]) => ({ type: "line", silent: true, shape: { x1, y1, x2, y2 }, style });
      const cap = 3;
      const children = [];
      if (Number.isFinite(xLow)) {
        const [a, b] = [at(xLow, y), at(xHigh, y)];
        children.push(line(a, b), line([a[0], a[1] - cap], [a[0], a[1] + cap]), line([b[0], b[1] - cap], [b[0], b[1] + cap]));
      }
      if (Number.isFinite(yLow)) {
        const [a, b] = [at(x, yLow), at(x, yHigh)];
        children.push(line(a, b), line([a[0] - cap, a[1]], [a[0] + cap, a[1]]), line([b[0] - cap, b[1]], [b[0] + cap, b[1]]));
      }
      return { type: "group", children };
    },
  };
}
