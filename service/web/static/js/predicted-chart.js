// Predicted against measured latency; on the diagonal the table was right.

import { Chart, axis, colour, tooltip, tooltipOf } from "./chart.js";
import { milliseconds, points } from "./format.js";
import { candidatesOf } from "./front-data.js";

// Items are {label, predicted_ms, measured_ms}.
export function diagonalOption(items) {
  const values = items.flatMap((item) => [item.predicted_ms, item.measured_ms]);
  const [low, high] = [Math.min(...values), Math.max(...values)];
  const pad = 0.06 * (high - low || high);
  const range = { min: Math.max(0, Number((low - pad).toPrecision(3))), max: Number((high + pad).toPrecision(3)) };
  return {
    grid: { left: 54, right: 14, top: 12, bottom: 42 },
    tooltip: tooltip(({ data }) =>
      data?.item
        ? tooltipOf(data.item.label, [
            ["predicted", milliseconds(data.item.predicted_ms)],
            ["measured", milliseconds(data.item.measured_ms)],
            ["off by", points(data.item.predicted_ms / data.item.measured_ms - 1).replace("pt", "%")],
          ])
        : "",
    ),
    xAxis: axis("measured, ms", { ...range, nameGap: 26 }),
    yAxis: axis("predicted, ms", { ...range, nameGap: 40 }),
    series: [
      {
        type: "line",
        silent: true,
        symbol: "none",
        lineStyle: { color: colour("chart-other"), type: "dashed", width: 1 },
        data: [
          [range.min, range.min],
          [range.max, range.max],
        ],
      },
      {
        type: "scatter",
        symbolSize: 8,
        itemStyle: { color: colour("chart-front"), opacity: 0.8 },
        data: items.map((item) => ({ value: [item.measured_ms, item.predicted_ms], item })),
      },
    ],
  };
}

export function predictedChart(node, view) {
  return new Chart(node, () => diagonalOption(candidatesOf(view).filter((item) => item.predicted_ms !== null)));
}
