// One latency table: its curves over the token count, and its error on whole models it has not seen.

import { get } from "./api.js";
import { Chart, axis, colour, errorBars, isNarrow, tooltip, tooltipOf } from "./chart.js";
import { byId, element, fillFacts, showProblem } from "./dom.js";
import { ago, milliseconds, percent } from "./format.js";
import { diagonalOption } from "./predicted-chart.js";

const id = byId("table").dataset.tableId;
const path = `/latency-tables/${encodeURIComponent(id)}`;
const COLOURS = ["chart-front", "chart-mark", "info", "op-pool_or_prune", "op-prune", "op-merge_mean", "chart-selected", "chart-other"];
let table = null;

// Entries by name; a group is what the menu shows at once.
function groups() {
  const names = [...new Set(table.document.entries.map((entry) => entry.entry))];
  const reductions = names.filter((name) => name.startsWith("block."));
  const parts = names.filter((name) => !name.startsWith("block."));
  return { ...(parts.length ? { "parts of a block": parts } : {}), ...(reductions.length ? { "blocks that reduce": reductions } : {}) };
}

function curve(name, index) {
  const stroke = colour(COLOURS[index % COLOURS.length]);
  const entries = table.document.entries.filter((entry) => entry.entry === name && entry.median_ms !== null).sort((a, b) => a.tokens_in - b.tokens_in || a.tokens_out - b.tokens_out);
  const isReduction = name.startsWith("block.");
  const rows = entries.map((entry) => ({
    value: [entry.tokens_in, entry.median_ms],
    entry,
    symbol: entry.state === "noisy" ? "emptyCircle" : "circle",
  }));
  return [
    errorBars(entries.map((entry) => [entry.tokens_in, entry.median_ms, NaN, NaN, entry.median_ms - entry.iqr_ms / 2, entry.median_ms + entry.iqr_ms / 2]), stroke),
    {
      name,
      // A reduction has an entry per pair of counts: a cloud, no line.
      type: isReduction ? "scatter" : "line",
      symbolSize: 7,
      lineStyle: { color: stroke, width: 2 },
      itemStyle: { color: stroke },
      data: rows,
    },
  ];
}

const chart = new Chart(byId("curve"), () => ({
  grid: { left: isNarrow() ? 50 : 62, right: 20, top: 58, bottom: 52 },
  legend: { type: "scroll", top: 0, left: 0, textStyle: { color: colour("muted"), fontSize: 12 }, data: groups()[byId("entries").value] },
  tooltip: tooltip(({ data }) =>
    data?.entry
      ? tooltipOf(data.entry.entry, [
          ["tokens in", String(data.entry.tokens_in)],
          ["tokens out", String(data.entry.tokens_out)],
          ["median", milliseconds(data.entry.median_ms)],
          ["IQR", milliseconds(data.entry.iqr_ms)],
          ["samples", String(data.entry.samples)],
          ["state", data.entry.state],
        ])
      : "",
  ),
  xAxis: axis("tokens in, prefix included", { scale: true, nameGap: 32 }),
  yAxis: axis(`ms per batch of ${table.batch_size}`, { nameGap: isNarrow() ? 36 : 46, min: 0 }),
  series: groups()[byId("entries").value].flatMap(curve),
}));

const validationChart = new Chart(byId("validation-chart"), () =>
  diagonalOption(
    table.document.validation.points.map((point, index) => ({ ...point, label: `${point.config.method}, held-out schedule ${index + 1}` })),
  ),
);

function drawValidation() {
  const report = table.document.validation;
  if (!report) {
    byId("validation-text").textContent = "This table was not validated: nobody measured whole models that it has not seen. `prunefront table validate` does.";
    return;
  }
  byId("validation-text").textContent = `Predicted and measured latency of ${report.num_schedules} whole models that no part of the table has seen.`;
  fillFacts(byId("validation"), [
    ["Mean error", percent(report.mape)],
    ["Bias", percent(report.bias)],
    ["Within ±5 %", percent(report.within_5_percent, 0)],
    ["Within ±10 %", percent(report.within_10_percent, 0)],
    ["Rank agreement", report.kendall_tau === null ? "–" : report.kendall_tau.toFixed(2), "Kendall's tau"],
    ["Error of speed-ups", report.speedup_mape === null ? "–" : percent(report.speedup_mape), "drift does not move it"],
    ["Machine's drift", report.dense_drift === null ? "–" : percent(report.dense_drift, 0), "of the dense model"],
    ["Measured again", report.remeasured_mape === null ? "–" : percent(report.remeasured_mape), "how far measuring differs from itself"],
    ["Noise", percent(report.noise), "spread within a run"],
  ]);
  byId("validation-chart").hidden = false;
  validationChart.draw();
}

try {
  table = await get(path);
  const facts = [
    ["Device", table.device_name],
    ["Runtime", `${table.runtime} · ${table.dtype} · batch ${table.batch_size}`],
    ["Measured with", table.document.model.name],
    ["From", table.source],
    ["Made", ago(table.created_at)],
  ];
  byId("facts").replaceChildren(...facts.map(([name, value]) => element("span", {}, `${name} `, element("strong", {}, value))));
  // The table itself, as `prunefront table` reads it, without what the store added.
  byId("download").href = URL.createObjectURL(new Blob([JSON.stringify(table.document, null, 1)], { type: "application/json" }));
  byId("entries").replaceChildren(...Object.keys(groups()).map((name) => element("option", {}, name)));
  byId("entries").addEventListener("change", () => chart.draw());
  const unfit = table.document.entries.filter((entry) => entry.state === "out_of_memory").length;
  const noisy = table.document.entries.filter((entry) => entry.state === "noisy").length;
  byId("noisy").textContent = `${table.document.entries.length} entries${noisy ? `, ${noisy} of them noisy (hollow)` : ""}${unfit ? `; ${unfit} ran out of memory and have no latency` : ""}.`;
  byId("curve-loading").hidden = true;
  byId("curve").hidden = false;
  chart.draw();
  drawValidation();
} catch (error) {
  byId("curve-loading").hidden = true;
  showProblem(error);
}
