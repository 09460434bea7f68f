// The REST API as the page uses it. Errors carry the sentence of the server's problem document.

export const API = "/api/v1";

export class ApiError extends Error {
  constructor(problem) {
    super(problem.detail ?? "The server did not answer as expected.");
    this.code = problem.code ?? "unknown";
    this.status = problem.status ?? 0;
    this.errors = problem.errors ?? [];
  }
}

async function request(path, options = {}) {
  let response;
  try {
    response = await fetch(API + path, { headers: { Accept: "application/json" }, ...options });
  } catch {
    throw new ApiError({ code: "unreachable", detail: "The server does not answer; check that it runs, then reload the page." });
  }
  if (!response.ok) {
    const problem = await response.json().catch(() => ({}));
    throw new ApiError({ status: response.status, ...problem });
  }
  return response.status === 204 ? null : response.json();
}

export const get = (path) => request(path);
export const remove = (path) => request(path, { method: "DELETE" });
export function post(path, body) {
  if (body === undefined) return request(path, { method: "POST" });
  return request(path, {
    method: "POST",
    headers: { Accept: "application/json", "Content-Type": "application/json" },
    body: JSON.stringify(body),
  });
}

// All pages of a cursored list.
export async function getAll(path, limit = 500) {
  const items = [];
  let cursor = null;
  do {
    const page = await get(`${path}?limit=${limit}${cursor ? `&cursor=${encodeURIComponent(cursor)}` : ""}`);
    items.push(...page.items);
    cursor = page.next_cursor;
  } while (cursor);
  return items;
}

// Follows a job until it has ended. The browser connects again by itself and names the last event it has.
export function watchJob(id, { onJob, onEnd = () => {} }) {
  const source = new EventSource(`${API}/jobs/${encodeURIComponent(id)}/events`);
  source.addEventListener("job", (event) => onJob(JSON.parse(event.data)));
  source.addEventListener("end", () => {
    source.close();
    onEnd();
  });
  window.addEventListener("pagehide", () => source.close(), { once: true });
  return source;
}
