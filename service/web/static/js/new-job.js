// The form for a search or a table job. The server checks everything; its sentences land at the fields they are about.

import { get, post } from "./api.js";
import { byId, clearProblem, element, showProblem } from "./dom.js";

const form = byId("job-form");
const FIELD_OF = {
  "/model": "model", "/model/name": "model", "/model/checkpoint": "checkpoint", "/dataset": "dataset", "/device": "device",
  "/runtime": "runtime", "/dtype": "dtype", "/batch_size": "batch_size", "/budget/trials": "trials", "/name": "name",
  "/constraints/max_latency_ms": "max_latency_ms", "/constraints/max_memory_mib": "max_memory_mib",
  "/budget/finetune_top": "finetune_top", "/budget/max_minutes": "max_minutes",
};

const number = (name) => (form.elements[name].value === "" ? null : Number(form.elements[name].value));
const kind = () => form.elements.kind.value;

function showKind() {
  for (const node of form.querySelectorAll("[data-kind]")) node.hidden = node.dataset.kind !== kind();
}

function body() {
  const job = {
    kind: kind(),
    model: { name: form.elements.model.value.trim() },
    device: form.elements.device.value,
    runtime: form.elements.runtime.value,
    dtype: form.elements.dtype.value,
    batch_size: number("batch_size"),
  };
  if (form.elements.name.value.trim()) job.name = form.elements.name.value.trim();
  if (form.elements.checkpoint.value) job.model.checkpoint = form.elements.checkpoint.value;
  if (job.kind === "search") {
    job.dataset = form.elements.dataset.value;
    job.space = { methods: [...form.querySelectorAll("[name=method]:checked")].map((box) => box.value) };
    job.constraints = { max_latency_ms: number("max_latency_ms"), max_memory_mib: number("max_memory_mib") };
    job.budget = { trials: number("trials"), finetune_top: number("finetune_top") ?? 0, max_minutes: number("max_minutes") };
  }
  return job;
}

function showFieldErrors(error) {
  for (const item of error.errors ?? []) {
    const field = form.elements[FIELD_OF[item.pointer] ?? (item.pointer.startsWith("/model") ? "model" : "")];
    if (!field || !field.closest) continue;
    field.setAttribute("aria-invalid", "true");
    const id = `error-${field.name}`;
    if (!byId(id)) field.closest(".field")?.append(element("span", { class: "field-error", id }, item.message));
    field.setAttribute("aria-describedby", id);
    field.focus();
  }
}

function clearFieldErrors() {
  clearProblem();
  for (const node of form.querySelectorAll(".field-error")) node.remove();
  for (const node of form.querySelectorAll("[aria-invalid]")) node.removeAttribute("aria-invalid");
}

const option = (value, text = value) => element("option", { value }, text);

// Each list on its own: the slowest must not hold up the others.
function fill() {
  const filled = [
    get("/models").then(({ items, checkpoints }) => {
      byId("models").replaceChildren(...items.map((model) => option(model.name)));
      form.elements.checkpoint.append(...checkpoints.map((item) => option(item.id)));
      const demo = items.find((model) => model.name.startsWith("digit_vit"));
      if (demo && !form.elements.model.value) form.elements.model.value = demo.name;
    }),
    get("/datasets").then(({ items }) => {
      form.elements.dataset.replaceChildren(...items.map((item) => option(item.id, item.problem ? `${item.id} (cannot be read)` : item.id)));
    }),
    get("/devices").then(({ items }) => {
      form.elements.device.replaceChildren(...items.map((item) => option(item.id, item.name === item.id ? item.id : `${item.id} (${item.name})`)));
    }),
    get("/methods").then(({ items }) => byId("methods").replaceChildren(...items.filter((method) => !method.needs_training).map(methodBox))),
  ];
  return Promise.all(filled);
}

function methodBox(method) {
  const box = element("input", { type: "checkbox", name: "method", value: method.name, checked: true });
  const text = element("span", {}, method.title, " ", element("span", { class: "hint" }, method.ops.join(", ")));
  return element("label", {}, box, text);
}

form.addEventListener("change", (event) => event.target.name === "kind" && showKind());
form.addEventListener("submit", async (event) => {
  event.preventDefault();
  clearFieldErrors();
  const button = form.querySelector("[type=submit]");
  button.disabled = true;
  try {
    const job = await post("/jobs", body());
    window.location.assign(`/jobs/${encodeURIComponent(job.id)}`);
  } catch (error) {
    showProblem(error);
    showFieldErrors(error);
    button.disabled = false;
  }
});

if (window.location.hash === "#table") form.elements.kind.value = "table";
showKind();
try {
  await fill();
} catch (error) {
  showProblem(error);
}
