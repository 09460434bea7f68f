// The list of jobs: what is running moves by itself.

import { get, watchJob } from "./api.js";
import { byId, clearProblem, element, showProblem, stateBadge } from "./dom.js";
import { ago, duration, progressText } from "./format.js";

const REFRESH_MS = 5000;
const MAX_WATCHED = 4; // Browsers open six connections to a server at most.
const PAGE = 30;

const list = byId("jobs");
const filter = byId("state-filter");
const more = byId("more");
const jobs = new Map();
const watched = new Map();
let nextCursor = null;
let isExtended = false;

function row(job) {
  const model = job.spec.model?.name ?? job.spec.configs?.[0]?.model?.name ?? "";
  const meta = [job.kind, model, job.spec.dataset, job.spec.device, job.spec.runtime, `batch ${job.spec.batch_size}`];
  const isMoving = job.state === "running" || (job.state === "queued" && job.progress.total > 0);
  const progress = element("div", { class: "job-progress" });
  if (isMoving) {
    const bar = element("progress", { max: 1, "aria-label": `Progress of ${job.name}` });
    if (job.progress.total > 0) bar.value = job.progress.done / job.progress.total;
    progress.append(element("span", {}, [job.stage, progressText(job.progress)].filter(Boolean).join(" · ")), bar);
  } else if (job.waiting_reason) {
    progress.append(job.waiting_reason);
  } else if (job.failure) {
    progress.append(job.failure.message);
  } else if (job.started_at && job.finished_at) {
    progress.append(`took ${duration(job.started_at, job.finished_at)}`);
  }
  return element(
    "li",
    { class: "card", "data-job-id": job.id },
    element(
      "a",
      { class: "job-row", href: `/jobs/${encodeURIComponent(job.id)}` },
      element(
        "div",
        {},
        element("div", { class: "job-title" }, job.name, stateBadge(job.state)),
        element("div", { class: "job-meta" }, [...new Set(meta.filter(Boolean))].join(" · ")),
      ),
      progress,
      element("div", { class: "job-when" }, ago(job.created_at)),
    ),
  );
}

function draw() {
  const focused = document.activeElement?.closest?.("[data-job-id]")?.dataset.jobId;
  const sorted = [...jobs.values()].sort((a, b) => b.created_at.localeCompare(a.created_at));
  list.replaceChildren(...sorted.map(row));
  list.setAttribute("aria-busy", "false");
  byId("empty").hidden = jobs.size > 0 || filter.value !== "";
  if (!jobs.size && filter.value) list.append(element("li", { class: "card empty" }, element("p", {}, `No job is ${filter.value}.`)));
  more.hidden = !nextCursor;
  if (focused) list.querySelector(`[data-job-id="${CSS.escape(focused)}"] a`)?.focus();
}

function watchRunning() {
  for (const [id, source] of watched) {
    if (jobs.get(id)?.state !== "running") {
      source.close();
      watched.delete(id);
    }
  }
  for (const job of jobs.values()) {
    if (job.state !== "running" || watched.has(job.id) || watched.size >= MAX_WATCHED) continue;
    const onJob = (changed) => {
      jobs.set(changed.id, changed);
      draw();
    };
    watched.set(job.id, watchJob(job.id, { onJob, onEnd: () => watched.delete(job.id) }));
  }
}

async function load(cursor = null) {
  const query = new URLSearchParams({ limit: PAGE });
  if (filter.value) query.set("state", filter.value);
  if (cursor) query.set("cursor", cursor);
  try {
    const page = await get(`/jobs?${query}`);
    if (!cursor && !isExtended) jobs.clear();
    for (const job of page.items) jobs.set(job.id, job);
    if (cursor || !isExtended) nextCursor = page.next_cursor;
    clearProblem();
    draw();
    watchRunning();
  } catch (error) {
    if (!jobs.size) list.replaceChildren();
    showProblem(error);
  }
}

filter.addEventListener("change", () => {
  isExtended = false;
  jobs.clear();
  load();
});
more.addEventListener("click", () => {
  isExtended = true;
  load(nextCursor);
});
await load();
setInterval(() => document.hidden || load(), REFRESH_MS);
