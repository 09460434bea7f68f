// The list of latency tables.

import { get } from "./api.js";
import { byId, element, showProblem } from "./dom.js";
import { ago } from "./format.js";

const body = byId("tables");
let nextCursor = null;

function row(table) {
  return element(
    "tr",
    {},
    element("td", {}, element("a", { href: `/latency-tables/${encodeURIComponent(table.id)}` }, table.name)),
    ...[table.device_name, table.runtime, table.dtype, String(table.batch_size), table.source, ago(table.created_at)].map((text) => element("td", {}, text)),
  );
}

async function load() {
  try {
    const page = await get(`/latency-tables?limit=100${nextCursor ? `&cursor=${encodeURIComponent(nextCursor)}` : ""}`);
    if (!nextCursor) body.replaceChildren();
    body.append(...page.items.map(row));
    nextCursor = page.next_cursor;
    byId("more").hidden = !nextCursor;
    byId("empty").hidden = body.childElementCount > 0;
    byId("tables-card").hidden = body.childElementCount === 0;
    byId("tables-card").setAttribute("aria-busy", "false");
  } catch (error) {
    body.replaceChildren();
    byId("tables-card").hidden = true;
    showProblem(error);
  }
}

byId("more").addEventListener("click", load);
await load();
