// Small pieces of building a page: elements, messages, announcements. Text is always set as text, never as HTML.

export const byId = (id) => document.getElementById(id);

export function element(tag, properties = {}, ...children) {
  const node = document.createElement(tag);
  for (const [name, value] of Object.entries(properties)) {
    if (value === undefined || value === null) continue;
    if (name === "class") node.className = value;
    else if (name.startsWith("on")) node.addEventListener(name.slice(2), value);
    else if (name in node && typeof value !== "string") node[name] = value;
    else node.setAttribute(name, value);
  }
  node.append(...children.filter((child) => child !== null && child !== undefined));
  return node;
}

export function showProblem(error) {
  const box = byId("problem");
  box.replaceChildren(element("span", {}, error.message));
  const others = (error.errors ?? []).slice(1);
  if (others.length) box.append(element("ul", {}, ...others.map((item) => element("li", {}, `${item.pointer}: ${item.message}`))));
  box.hidden = false;
}

export function clearProblem() {
  byId("problem").hidden = true;
}

export function announce(text) {
  byId("announcer").textContent = text;
}

// Facts as <dt>/<dd> pairs; a fact is [name, value] or [name, value, small print].
export function fillFacts(list, facts) {
  list.replaceChildren(
    ...facts.map(([name, value, small]) =>
      element("div", {}, element("dt", {}, name), element("dd", {}, value, small ? element("small", {}, small) : null)),
    ),
  );
}

export function stateBadge(state) {
  return element("span", { class: `badge badge-${state}` }, state);
}
