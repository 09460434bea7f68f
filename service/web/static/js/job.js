// One job: progress as it happens, the front, the best point within a budget and what it does to the tokens.

import { API, get, getAll, post, remove, watchJob } from "./api.js";
import { byId, clearProblem, element, announce, fillFacts, showProblem } from "./dom.js";
import { ago, duration, interval, macs, milliseconds, percent, points, progressText, times } from "./format.js";
import { bestWithin, candidatesOf, countCandidates, fidelitiesOf, pointsOf } from "./front-data.js";
import { frontChart } from "./front-chart.js";
import { predictedChart } from "./predicted-chart.js";
import { opsOf, staircaseChart } from "./staircase-chart.js";

const REFRESH_MS = 4000; // While a job runs, results are fetched this often at most.
const root = byId("job");
const id = root.dataset.jobId;
const hasFront = root.dataset.kind !== "table";
const path = `/jobs/${encodeURIComponent(id)}`;

const view = { job: null, front: null, trials: [], budget: null, selected: null, schedule: null, isPicked: false, fidelity: "" };

// Job ---------------------------------------------------------------------------------------------------------------

const ACTIONS = [
  ["pause", "Pause", (job) => ["queued", "running"].includes(job.state) && !job.pause_requested && !job.cancel_requested],
  ["resume", "Resume", (job) => job.state === "paused" || (job.pause_requested && job.state === "running")],
  ["retry", "Retry", (job) => ["failed", "cancelled"].includes(job.state)],
  ["clone", "Run again", () => true],
  ["cancel", "Cancel", (job) => ["queued", "running", "paused"].includes(job.state) && !job.cancel_requested],
];

function drawJob() {
  const { job } = view;
  const state = byId("state");
  state.textContent = job.cancel_requested && job.state === "running" ? "cancelling" : job.pause_requested && job.state === "running" ? "pausing" : job.state;
  state.className = `badge badge-${job.state}`;
  const spec = job.spec;
  const facts = [
    ["Model", spec.model?.name ?? spec.configs?.[0]?.model?.name],
    ["Dataset", spec.dataset],
    ["Device", [spec.device, spec.runtime, spec.dtype, `batch ${spec.batch_size}`].join(" · ")],
    ["Submitted", ago(job.created_at)],
    ["Took", job.started_at && job.finished_at ? duration(job.started_at, job.finished_at) : null],
  ];
  byId("facts").replaceChildren(...facts.filter(([, value]) => value).map(([name, value]) => element("span", {}, `${name} `, element("strong", {}, value))));
  drawProgress(job);
  drawActions(job);
  byId("spec").textContent = JSON.stringify(spec, null, 2);
  if (!hasFront) drawTableResult(job);
}

function drawProgress(job) {
  byId("progress").hidden = !["queued", "running", "paused"].includes(job.state);
  byId("stage").textContent = job.stage ?? (job.state === "queued" ? "Waiting for a controller" : job.state);
  byId("progress-text").textContent = progressText(job.progress);
  const bar = byId("progress-bar");
  if (job.progress.total > 0) bar.value = job.progress.done / job.progress.total;
  else if (job.state === "running") bar.removeAttribute("value");
  else bar.value = 0;
  byId("waiting").hidden = !job.waiting_reason;
  byId("waiting").textContent = job.waiting_reason ?? "";
  const failure = byId("failure");
  failure.hidden = !job.failure;
  if (job.failure) {
    failure.replaceChildren(element("strong", {}, "This job failed. "), job.failure.message);
    if (job.failure.log_tail) failure.append(element("details", {}, element("summary", {}, "End of the log"), element("pre", {}, job.failure.log_tail)));
  }
}

function drawActions(job) {
  const buttons = ACTIONS.filter(([, , isPossible]) => isPossible(job)).map(([verb, label]) =>
    element("button", { class: `button${verb === "cancel" ? " button-danger" : ""}`, type: "button", "data-verb": verb, onclick: () => act(verb) }, label),
  );
  if (["succeeded", "failed", "cancelled"].includes(job.state)) {
    buttons.push(element("button", { class: "button button-danger", type: "button", "data-verb": "delete", onclick: confirmDelete }, "Delete"));
  }
  const focused = byId("actions").contains(document.activeElement) ? document.activeElement.dataset.verb : null;
  byId("actions").replaceChildren(...buttons);
  if (focused) byId("actions").querySelector(`[data-verb="${focused}"]`)?.focus();
}

function confirmDelete(event) {
  // The second press within a few seconds deletes.
  const button = event.currentTarget;
  if (button.dataset.isArmed) {
    act("delete");
    return;
  }
  button.dataset.isArmed = "yes";
  button.textContent = "Really delete?";
  announce("Press again to delete this job and its results.");
  setTimeout(() => {
    delete button.dataset.isArmed;
    button.textContent = "Delete";
  }, 4000);
}

async function act(verb) {
  try {
    clearProblem();
    if (verb === "delete") {
      await remove(path);
      window.location.assign("/");
      return;
    }
    const job = await post(`${path}/${verb}`);
    if (verb === "clone") {
      window.location.assign(`/jobs/${encodeURIComponent(job.id)}`);
      return;
    }
    view.job = job;
    drawJob();
    watch();
  } catch (error) {
    showProblem(error);
  }
}

function drawTableResult(job) {
  const tableId = job.result?.table_id ?? job.result?.table;
  if (typeof tableId === "string") {
    byId("table-result").replaceChildren("The table is built: ", element("a", { href: `/latency-tables/${encodeURIComponent(tableId)}` }, "look at it"), ".");
  } else if (job.failure) {
    byId("table-result").textContent = "There is no table: the job failed.";
  }
}

// Front -------------------------------------------------------------------------------------------------------------

const charts = hasFront
  ? {
      front: frontChart(byId("front-chart"), view, (point) => select(point, true)),
      staircase: staircaseChart(byId("staircase"), view),
      predicted: predictedChart(byId("predicted-chart"), view),
    }
  : null;

async function loadResults() {
  const chosen = view.fidelity; // Until somebody chooses, the server's choice follows the job.
  const [front, trials] = await Promise.all([get(`${path}/front${chosen ? `?fidelity=${chosen}` : ""}`), getAll(`${path}/trials`)]);
  Object.assign(view, { front, trials });
  drawFidelities();
  drawFront();
}

function drawFidelities() {
  const menu = byId("fidelity");
  const reached = fidelitiesOf(view.trials);
  if (!reached.includes(view.front.fidelity)) reached.push(view.front.fidelity);
  const labels = { screened: "screened (some images)", evaluated: "evaluated (whole split)", finetuned: "fine-tuned" };
  menu.replaceChildren(...reached.map((name) => element("option", { value: name }, labels[name])));
  menu.value = view.front.fidelity;
}

function drawFront() {
  const { front } = view;
  const all = pointsOf(front);
  byId("front-loading").hidden = true;
  byId("front-empty").hidden = all.length > 0;
  byId("front-chart").hidden = byId("budget").hidden = !all.length;
  const isOver = ["succeeded", "failed", "cancelled"].includes(view.job.state);
  byId("front-empty").replaceChildren(
    element("strong", {}, isOver ? "No point was measured" : "No measured point yet"),
    element("span", {}, isOver ? "The job ended before a schedule was measured at this fidelity." : "Points appear here as soon as the first schedules are measured on the device."),
  );
  byId("notes").replaceChildren(...front.notes.map((note) => element("li", {}, note)));
  drawCounts();
  byId("csv").href = `${API}${path}/trials?format=csv`;
  byId("points").replaceChildren();
  if (!all.length) {
    byId("selected").hidden = true;
    byId("selected-empty").hidden = false;
    return;
  }
  const latencies = all.map((point) => point.measured_ms);
  const [low, high] = [Math.min(...latencies), Math.max(...latencies)];
  const slider = byId("budget-slider");
  // The ends lie a little outside, so that both end points can be reached with the keyboard.
  [slider.min, slider.max] = [low - 0.02 * (high - low), high + 0.02 * (high - low || high)];
  slider.step = Math.max((high - low) / 400, 1e-4);
  if (view.budget === null) view.budget = initialBudget(front, high);
  slider.value = view.budget;
  const kept = view.isPicked && all.find((point) => point.trial === view.selected?.trial);
  if (kept) select(kept, true);
  else applyBudget();
  charts.predicted.node.hidden = !candidatesOf(view).some((item) => item.predicted_ms !== null);
  charts.predicted.draw();
}

// The job's own budget if it has one; else the most accurate point that is clearly faster than dense.
function initialBudget(front, highest) {
  const wanted = view.job.spec.constraints?.max_latency_ms;
  if (wanted) return Math.min(wanted, highest);
  if (!front.dense) return highest;
  const faster = front.points.filter((point) => point.speedup >= 1.1);
  const best = bestWithin({ ...front, dense: null, points: faster }, Infinity);
  return best ? Math.min(best.measured_ms * 1.01, highest) : highest;
}

function applyBudget() {
  const slider = byId("budget-slider");
  view.budget = Number(slider.value);
  const text = milliseconds(view.budget);
  byId("budget-value").textContent = text;
  slider.setAttribute("aria-valuetext", text);
  select(bestWithin(view.front, view.budget), false);
}

function select(point, isPicked) {
  view.selected = point;
  view.isPicked = isPicked && Boolean(point);
  byId("budget-value").textContent = milliseconds(view.budget);
  charts.front.draw();
  drawSelected();
  drawPoints();
}

function drawSelected() {
  const point = view.selected;
  byId("selected-title").textContent = view.isPicked ? "Selected point" : "Best within the budget";
  byId("selected").hidden = !point;
  byId("selected-empty").hidden = Boolean(point);
  byId("selected-empty").textContent = "No measured point is this fast; move the budget to the right.";
  if (!point) return;
  const { dense } = view.front;
  const isOnFront = view.front.points.some((other) => other.trial === point.trial);
  byId("selected-label").textContent = point.label;
  const badge = byId("selected-badge");
  badge.textContent = isOnFront ? "on the front" : (ORIGINS[point.origin] ?? "behind the front");
  badge.className = `badge badge-${isOnFront ? "front" : "mark"}`;
  fillFacts(byId("selected-facts"), [
    ["Top-1", percent(point.top1, 2), interval(point.top1_ci)],
    ["Against dense", points(point.top1_delta), point.top1_delta_ci ? `${points(point.top1_delta_ci[0])} to ${points(point.top1_delta_ci[1])}` : dense ? "" : "dense was not measured"],
    ["Measured latency", milliseconds(point.measured_ms), `IQR ${milliseconds(point.iqr_ms)}`],
    ["Speedup", times(point.speedup), dense ? `dense ${milliseconds(dense.measured_ms)}` : ""],
    ["Predicted latency", milliseconds(point.predicted_ms), point.predicted_ms ? `${points(point.predicted_ms / point.measured_ms - 1).replace("pt", "%")} off` : ""],
    ["MACs per image", macs(point.macs), dense ? `${percent(point.macs / dense.macs, 0)} of dense` : ""],
  ]);
  const config = `${API}${path}/trials/${point.trial}/config?download=true`;
  byId("download-json").href = `${config}&format=json`;
  byId("download-yaml").href = `${config}&format=yaml`;
  byId("download-checkpoint").hidden = point.fidelity !== "finetuned";
  byId("download-checkpoint").href = `${API}${path}/trials/${point.trial}/checkpoint`;
  byId("command").textContent = `prunefront best ${id} --max-latency-ms ${roundUp(view.isPicked ? point.measured_ms : view.budget)} --out best.json`;
  loadSchedule(point.trial);
}

// A budget written with few digits must still include the point it stands for.
const roundUp = (value) => String(Math.ceil(value * 1000) / 1000);

async function loadSchedule(trial) {
  try {
    const detail = await get(`${path}/trials/${trial}`);
    if (view.selected?.trial !== trial) return;
    view.schedule = detail.schedule;
    charts.staircase.draw();
    const ops = opsOf(detail.schedule);
    byId("ops").replaceChildren(...(ops.length ? ops : [null]).map((op) => element("li", {}, element("i", { "data-op": op ?? "none" }), op ?? "every token stays")));
    const counts = detail.schedule.map((block) => block.tokens_out);
    byId("staircase").setAttribute("aria-label", `Tokens leaving each block: ${counts.join(", ")}`);
  } catch (error) {
    showProblem(error);
  }
}

const ORIGINS = { dense: "dense", published: "published", resolution: "lower resolution", sibling: "smaller model" };

function originBadge(point) {
  return point.origin in ORIGINS && point.label !== ORIGINS[point.origin] ? element("span", { class: "badge badge-mark" }, ORIGINS[point.origin]) : null;
}

function drawPoints() {
  const { front, selected } = view;
  const focused = document.activeElement?.dataset?.trial;
  byId("points").replaceChildren(
    ...pointsOf(front).map((point) =>
      element(
        "tr",
        { "aria-selected": String(point.trial === selected?.trial) },
        element("td", {}, element("button", { class: "link-button", type: "button", "data-trial": String(point.trial), onclick: () => select(point, true) }, point.label), originBadge(point)),
        element("td", {}, percent(point.top1, 2)),
        element("td", {}, points(point.top1_delta)),
        element("td", {}, `${milliseconds(point.measured_ms)} ± ${(point.iqr_ms / 2).toPrecision(1)}`),
        element("td", {}, times(point.speedup)),
        element("td", {}, macs(point.macs)),
      ),
    ),
  );
  if (focused) byId("points").querySelector(`[data-trial="${focused}"]`)?.focus();
}

function drawCounts() {
  const counts = countCandidates(view.trials);
  fillFacts(byId("counts"), [
    ["Candidates", String(counts.candidates)],
    ["Measured", String(counts.measured)],
    ["Noisy", String(counts.noisy), counts.noisy ? "kept off the front" : ""],
    ["Failed", String(counts.failed)],
    ["Fine-tuned", String(counts.finetuned)],
  ]);
  const compared = candidatesOf(view).filter((item) => item.predicted_ms !== null);
  const error = compared.reduce((sum, item) => sum + Math.abs(item.predicted_ms / item.measured_ms - 1), 0) / compared.length;
  byId("predicted-text").textContent = compared.length
    ? `The latency table is ${percent(error)} off on average over ${compared.length} measured schedule${compared.length > 1 ? "s" : ""}.`
    : "Predictions are compared here once schedules are measured.";
}

// Life --------------------------------------------------------------------------------------------------------------

let source = null;
let refreshTimer = null;
let lastRefresh = 0;

function refreshSoon() {
  if (!hasFront || refreshTimer) return;
  const wait = Math.max(0, REFRESH_MS - (Date.now() - lastRefresh));
  refreshTimer = setTimeout(async () => {
    refreshTimer = null;
    await refresh();
  }, wait);
}

async function refresh() {
  lastRefresh = Date.now();
  try {
    await loadResults();
  } catch (error) {
    byId("front-loading").hidden = true;
    showProblem(error);
  }
}

function watch() {
  source?.close();
  source = watchJob(id, {
    onJob: (job) => {
      const wasRunning = view.job?.state;
      view.job = job;
      drawJob();
      if (wasRunning && wasRunning !== job.state) announce(`The job is ${job.state}.`);
      refreshSoon();
    },
    onEnd: refreshSoon,
  });
}

if (hasFront) {
  byId("fidelity").addEventListener("change", () => {
    view.fidelity = byId("fidelity").value;
    refresh();
  });
  byId("budget-slider").addEventListener("input", applyBudget);
  byId("copy").addEventListener("click", async () => {
    const text = byId("command").textContent;
    try {
      await navigator.clipboard.writeText(text);
      byId("copy").textContent = "Copied";
      announce("Command copied.");
      setTimeout(() => (byId("copy").textContent = "Copy"), 2000);
    } catch {
      getSelection().selectAllChildren(byId("command")); // No clipboard here: mark it, so that Ctrl-C takes it.
    }
  });
}

try {
  view.job = await get(path);
  drawJob();
  if (hasFront) await refresh();
  if (!["succeeded", "failed", "cancelled"].includes(view.job.state)) watch();
} catch (error) {
  showProblem(error);
}
