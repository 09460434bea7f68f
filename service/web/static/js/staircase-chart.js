// Tokens per block: the whole bar enters the block, the solid part leaves it, the colour says by which operation.

import { Chart, axis, colour, opColour, tooltip, tooltipOf } from "./chart.js";

export const opsOf = (schedule) => [...new Set(schedule.flatMap((block) => block.ops))];

export function staircaseChart(node, view) {
  return new Chart(node, () => {
    const schedule = view.schedule ?? [];
    const bars = (value, opacity) =>
      schedule.map((block) => ({ value: value(block), block, itemStyle: { color: opColour(block.ops[0]), opacity } }));
    return {
      grid: { left: 46, right: 6, top: 12, bottom: 38 },
      tooltip: tooltip(({ data }) =>
        tooltipOf(`Block ${data.block.block}`, [
          ["tokens in", String(data.block.tokens_in)],
          ["tokens out", String(data.block.tokens_out)],
          ["operation", data.block.ops.join(", ") || "none"],
        ]),
      ),
      xAxis: axis("block", { type: "category", data: schedule.map((block) => String(block.block)), nameGap: 24, splitLine: { show: false } }),
      yAxis: axis("tokens", { nameGap: 34, minInterval: 1 }),
      series: [
        { type: "bar", stack: "tokens", name: "leave", barCategoryGap: "22%", data: bars((block) => block.tokens_out, 1) },
        {
          type: "bar",
          stack: "tokens",
          name: "removed",
          data: bars((block) => Math.max(0, block.tokens_in - block.tokens_out), 0.28),
        },
      ],
    };
  });
}
