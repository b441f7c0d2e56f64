// What the page is written with: asking the server, making and changing elements, numbers as people read them.

export const $ = (id) => document.getElementById(id);

const AWAY = "The server does not answer. It is asked again every few seconds; nothing that was made is lost.";
const PATIENCE_MS = 60000;

// Raises an Error with the server's sentence, or with one that says that there is no server.
export async function call(method, path, body) {
  const json = body !== undefined && !(body instanceof Blob);
  const request = {
    method, credentials: "same-origin", signal: AbortSignal.timeout(PATIENCE_MS),
    body: json ? JSON.stringify(body) : body,
    headers: body ? {"Content-Type": json ? "application/json" : "application/octet-stream"} : {},
  };
  const away = () => { throw new Error(AWAY); };
  const answer = await fetch(path, request).catch(away);
  if (answer.status === 401) location.reload();  // the page that asks for the token
  const data = await answer.json().catch(away);
  if (!answer.ok) throw new Error(data.error);
  return data;
}

export function set(element, text) {
  if (element.textContent !== text) element.textContent = text;
}

// An element with its attributes and children; text is only ever text.
export function make(tag, attributes = {}, ...children) {
  const element = document.createElement(tag);
  for (const [name, value] of Object.entries(attributes)) element.setAttribute(name, value);
  element.append(...children);
  return element;
}

export function show(image, address, alt) {
  image.alt = alt;
  if (address && image.dataset.address !== address) {
    image.dataset.address = address;
    image.src = address;
  }
  image.hidden = !address;
}

export function when(seconds) {
  const then = new Date(1000 * seconds), midnight = new Date().setHours(0, 0, 0, 0);
  const days = Math.round((midnight - new Date(then).setHours(0, 0, 0, 0)) / 864e5);
  if (!days) return then.toLocaleTimeString([], {hour: "2-digit", minute: "2-digit"});
  return days === 1 ? "yesterday" : then.toLocaleDateString([], {day: "numeric", month: "short", year: "numeric"});
}

export const lasting = (s) => `about ${s < 90 ? `${Math.ceil(s)} s` : `${Math.round(s / 60)} min`} left`;
export const size = (bytes) => bytes < 1e5 ? `${Math.ceil(bytes / 1e3)} KB` : `${(bytes / 1e6).toFixed(1)} MB`;

// Makes a list's children those of `items` with as few changes as will do, so that the focus stays where it is.
export function list(parent, items, key, change) {
  const old = new Map([...parent.children].map((child) => [child.dataset.key, child]));
  items.forEach((item, i) => {
    const child = old.get(key(item)) || make("li", {"data-key": key(item)});
    old.delete(key(item));
    if (parent.children[i] !== child) parent.insertBefore(child, parent.children[i] || null);
    const sign = JSON.stringify(item);
    if (child.dataset.sign !== sign) {
      child.dataset.sign = sign;
      change(child, item);
    }
  });
  old.forEach((child) => child.remove());
}

