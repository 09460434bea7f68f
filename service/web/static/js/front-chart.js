// Accuracy against measured latency: the front as steps, papers' schedules and dense as labelled marks, error bars
// both ways, the budget as a line.

import { Chart, axis, colour, errorBars, isNarrow, tooltip, tooltipOf } from "./chart.js";
import { interval, macs, milliseconds, percent, points as pointsText, times } from "./format.js";
import { candidatesOf, pointsOf } from "./front-data.js";

const bar = (point) => [
  point.measured_ms,
  100 * point.top1,
  point.measured_ms - point.iqr_ms / 2,
  point.measured_ms + point.iqr_ms / 2,
  point.top1_ci ? 100 * point.top1_ci[0] : NaN,
  point.top1_ci ? 100 * point.top1_ci[1] : NaN,
];

const row = (point) => ({ value: [point.measured_ms, 100 * point.top1], point });

function describe(point) {
  return tooltipOf(point.label, [
    ["top-1", percent(point.top1, 2)],
    ["95 % interval", interval(point.top1_ci)],
    ["against dense", pointsText(point.top1_delta)],
    ["measured", `${milliseconds(point.measured_ms)} (IQR ${milliseconds(point.iqr_ms)})`],
    ["predicted", milliseconds(point.predicted_ms)],
    ["speedup", times(point.speedup)],
    ["MACs", macs(point.macs)],
    ["candidate", point.trial === undefined ? "" : String(point.trial)],
  ]);
}

function series(view) {
  const { front, selected, budget } = view;
  const marks = [...front.marks];
  const longest = isNarrow() ? 16 : 34;
  const label = (text, position) => ({
    show: true,
    formatter: ({ data }) => (data.point.label.length > longest ? `${data.point.label.slice(0, longest - 1)}…` : data.point.label),
    position,
    color: colour(text),
    fontSize: isNarrow() ? 10 : 11,
    distance: 8,
  });
  const onFront = new Set(pointsOf(front).map((point) => point.trial));
  const others = candidatesOf(view).filter((item) => item.top1 !== null && !onFront.has(item.trial));
  return [
    {
      name: "other candidates",
      type: "scatter",
      symbolSize: 6,
      z: 1,
      itemStyle: { color: colour("chart-other"), opacity: 0.55 },
      data: others.map((item) => ({ value: [item.measured_ms, 100 * item.top1], point: { ...item, top1_delta: null } })),
    },
    errorBars([...front.points].map(bar), colour("chart-front")),
    errorBars([...marks, ...(front.dense ? [front.dense] : [])].map(bar), colour("chart-mark")),
    {
      name: "front",
      type: "line",
      // The accuracy to be had for a budget stays that of the last point until the next one is affordable.
      step: "end",
      symbol: "circle",
      symbolSize: 10,
      z: 4,
      lineStyle: { color: colour("chart-front"), width: 2 },
      itemStyle: { color: colour("chart-front"), borderColor: colour("card"), borderWidth: 1.5 },
      data: [...front.points].sort((a, b) => a.measured_ms - b.measured_ms).map(row),
      markLine: {
        silent: true,
        symbol: "none",
        animation: false,
        label: { show: false },
        lineStyle: { color: colour("chart-selected"), type: "dashed", width: 1.5 },
        data: budget === null ? [] : [{ xAxis: budget }],
      },
    },
    {
      name: "published and lower resolution",
      type: "scatter",
      symbol: "diamond",
      symbolSize: 13,
      z: 5,
      itemStyle: { color: colour("chart-mark"), borderColor: colour("card"), borderWidth: 1 },
      label: label("chart-mark", "right"),
      labelLayout: { hideOverlap: true, moveOverlap: "shiftY" },
      data: marks.map(row),
    },
    {
      name: "dense",
      type: "scatter",
      symbol: "rect",
      symbolSize: 12,
      z: 6,
      itemStyle: { color: colour("chart-dense") },
      label: { ...label("chart-dense", "top"), fontWeight: 600 },
      labelLayout: { hideOverlap: false },
      data: front.dense ? [row(front.dense)] : [],
    },
    {
      name: "selected",
      type: "scatter",
      silent: true,
      symbol: "circle",
      symbolSize: 24,
      z: 7,
      itemStyle: { color: "transparent", borderColor: colour("chart-selected"), borderWidth: 3 },
      data: selected ? [row(selected)] : [],
    },
  ];
}

export function frontChart(node, view, onSelect) {
  const chart = new Chart(node, () => {
    const all = pointsOf(view.front);
    const best = view.selected;
    node.setAttribute(
      "aria-label",
      `Pareto front of ${view.front.points.length} points, ${view.front.marks.length} marks; the table below lists them.` +
        (best ? ` Selected: ${best.label}, ${percent(best.top1, 2)} at ${milliseconds(best.measured_ms)}.` : ""),
    );
    const shown = all.flatMap((point) => [100 * point.top1, ...(point.top1_ci ?? []).map((value) => 100 * value)]);
    const spread = Math.max(...shown) - Math.min(...shown) || 1;
    return {
      grid: { left: isNarrow() ? 54 : 64, right: isNarrow() ? 14 : 28, top: 58, bottom: 52 },
      legend: {
        top: 0,
        left: 0,
        itemGap: isNarrow() ? 10 : 18,
        itemWidth: 16,
        itemHeight: 10,
        textStyle: { color: colour("muted"), fontSize: 12 },
        data: ["front", "published and lower resolution", "dense", "other candidates"],
      },
      tooltip: tooltip(({ data }) => (data?.point ? describe(data.point) : "")),
      xAxis: axis(`measured latency, ms per batch of ${view.front.batch_size}`, { scale: true, nameGap: 32 }),
      yAxis: axis("top-1, %", {
        scale: true,
        nameGap: isNarrow() ? 40 : 46,
        min: Math.max(0, Math.floor((Math.min(...shown) - 0.06 * spread) * 10) / 10),
        max: Math.min(100, Math.ceil((Math.max(...shown) + 0.06 * spread) * 10) / 10),
      }),
      series: series(view),
    };
  });
  chart.onInit = (echart) => {
    echart.on("click", ({ data }) => {
      const point = data?.point && pointsOf(view.front).find((other) => other.trial === data.point.trial);
      if (point) onSelect(point);
    });
  };
  return chart;
}
