// Tells a page what runs have written: server-sent events, only while the page can be seen, so that many open tabs hold
// no connection each (a browser opens six to a server).

export function follow(address, handlers) {
  let source = null;

  const open = () => {
    if (source) return;
    source = new EventSource(typeof address === "function" ? address() : address);
    source.onopen = () => handlers.found?.();
    source.onerror = () => handlers.lost?.();
    for (const [name, handle] of Object.entries(handlers)) {
      if (name === "found" || name === "lost") continue; // of the connection, not of a run
      source.addEventListener(name, (event) => handle(JSON.parse(event.data)));
    }
  };
  const close = () => {
    source?.close();
    source = null;
  };
  document.addEventListener("visibilitychange", () => (document.hidden ? close() : open()));
  addEventListener("pagehide", close);
  addEventListener("pageshow", () => document.hidden || open());
  if (!document.hidden) open();
  return { reopen: () => (close(), document.hidden || open()) };
}
