// What the pages do beyond HTML: live events, the frame viewer, keys, and pages that keep themselves fresh.
// Everything shown comes from the server's own HTML, escaped there; nothing here makes markup of data.

const find = (selector, within = document) => within.querySelector(selector);
const all = (selector, within = document) => [...within.querySelectorAll(selector)];
const announce = (text) => { find("#announce").textContent = text; };

async function page(address) {
  const answer = await fetch(address, { headers: { accept: "text/html" }, cache: "no-store" });
  if (answer.redirected && new URL(answer.url).pathname === "/login") location.assign("/login?next=" + encodeURIComponent(location.pathname + location.search));
  if (!answer.ok) throw new Error(`${answer.status}`);
  return new DOMParser().parseFromString(await answer.text(), "text/html");
}

// Ages, in the words of processors/gateway/words.py.

function ago(at, now) {
  const seconds = Math.floor((now - at) / 1000);
  if (seconds < 5) return "just now";
  if (seconds < 60) return `${seconds} s ago`;
  if (seconds < 3600) return `${Math.floor(seconds / 60)} min ago`;
  if (seconds < 172800) return `${Math.floor(seconds / 3600)} h ago`;
  return `${Math.floor(seconds / 86400)} days ago`;
}

function age() {
  const now = Date.now();
  for (const element of all("[data-ago]")) {
    const text = ago(Date.parse(element.dataset.ago), now);
    if (element.textContent !== text) element.textContent = text;
  }
}
setInterval(age, 5000);

// Live events: the stream says that there is something new; what is shown comes from the page's own address.

function live(bar) {
  const list = find("#events");
  const state = find(".live-state", bar);
  const button = find("button", bar);
  const narrowed = bar.dataset.narrowed !== "";
  const cards = (within) => new Map(all("[data-event]", within).map((card) => [card.dataset.event, card]));
  let waiting = null; // the newest page, not shown yet
  let retry = 1000;
  let running = false;
  let again = false;
  let stream = null;

  const say = (name, text) => {
    if (bar.dataset.state === name && state.textContent === text) return;
    bar.dataset.state = name;
    state.textContent = text;
  };
  const reading = () => narrowed || scrollY > 120 || list.contains(document.activeElement);

  function fresh(from) {
    const shown = cards(list);
    return [...cards(from)].filter(([id]) => !shown.has(id)).map(([, card]) => card);
  }

  function show(from) {
    waiting = null;
    button.hidden = true;
    const added = new Set(fresh(from));
    const shown = cards(list);
    const focused = document.activeElement?.closest?.("[data-event]")?.dataset.event;
    for (const [id, card] of cards(from)) {
      if (added.has(card)) card.classList.add("fresh");
      else if (find(".mark", card)?.textContent === find(".mark", shown.get(id))?.textContent) card.replaceWith(shown.get(id));
    }
    list.replaceChildren(...from.childNodes);
    age();
    if (focused) cards(list).get(focused)?.querySelector(".open")?.focus({ preventScroll: true });
    const newest = [...added][0];
    if (newest) {
      const text = (selector) => find(selector, newest)?.textContent.trim().replace(/\s+/g, " ") ?? "";
      announce(`${added.size > 1 ? added.size + " new events; the newest: " : "New event: "}${text(".camera")}, ${text(".risk")}. ${text(".what")}`);
    }
  }

  async function look() {
    if (running) { again = true; return; }
    running = true;
    try {
      do {
        again = false;
        const from = find("#events", await page(location.href));
        const count = fresh(from).length;
        if (!count) continue;
        if (reading()) {
          waiting = from;
          button.textContent = `Show ${count} new`;
          if (button.hidden) announce(`${count} new ${count === 1 ? "event waits" : "events wait"}`);
          button.hidden = false;
        } else {
          show(from);
        }
        await new Promise((done) => setTimeout(done, 700)); // a burst is one look
      } while (again);
    } catch {
      // A connection can be dead without saying so: a new one finds out, and looks again.
      if (stream?.readyState === EventSource.OPEN) connect();
    } finally {
      running = false;
    }
  }

  button.addEventListener("click", () => {
    if (!waiting) return;
    show(waiting);
    scrollTo({ top: 0 });
    find("[data-event] .open", list)?.focus({ preventScroll: true });
  });
  addEventListener("scroll", () => { if (waiting && !reading()) show(waiting); }, { passive: true });

  function connect() {
    stream?.close();
    say("reconnecting", bar.dataset.state ? "reconnecting" : "connecting");
    const mine = stream = new EventSource(bar.dataset.stream);
    stream.addEventListener("open", () => { retry = 1000; say("live", "live"); look(); });
    stream.addEventListener("event", look);
    stream.addEventListener("error", () => {
      say("reconnecting", "reconnecting");
      if (mine !== stream || mine.readyState !== EventSource.CLOSED) return; // the browser tries again by itself
      setTimeout(connect, retry);
      retry = Math.min(retry * 2, 15000);
    });
  }
  addEventListener("pagehide", () => stream.close());
  addEventListener("pageshow", (event) => { if (event.persisted) connect(); });
  addEventListener("online", look);
  document.addEventListener("visibilitychange", () => { if (!document.hidden) look(); });
  setInterval(() => { if (!document.hidden) look(); }, 60000);
  bar.hidden = false;
  connect();
}

// The frames of one event.

function viewer(stage) {
  const figures = all("figure", stage);
  const links = all("#strip a");
  const play = find("#play");
  let at = Math.max(0, figures.findIndex((figure) => !figure.hidden));
  let timer = null;

  function show(index, { follow = true } = {}) {
    if (index < 0 || index >= figures.length) return false;
    const held = figures[at].contains(document.activeElement) ? document.activeElement.dataset.turn : null;
    figures[at].hidden = true;
    links[at].removeAttribute("aria-current");
    at = index;
    figures[at].hidden = false;
    links[at].setAttribute("aria-current", "true");
    if (held) (find(`[data-turn="${held}"]`, figures[at]) ?? find("[data-turn]", figures[at]))?.focus({ preventScroll: true });
    if (follow) {
      const strip = find("#strip");
      const link = links[at];
      strip.scrollLeft = link.offsetLeft - strip.offsetLeft - (strip.clientWidth - link.offsetWidth) / 2;
    }
    const next = find("img", figures[at + 1] ?? figures[at]);
    if (next) next.loading = "eager";
    return true;
  }

  function stop() {
    clearInterval(timer);
    timer = null;
    play.setAttribute("aria-pressed", "false");
    find("span", play).textContent = "Play";
  }
  function toggle() {
    if (timer) { stop(); return; }
    if (at === figures.length - 1) show(0);
    timer = setInterval(() => { if (!show(at + 1)) stop(); }, 450);
    play.setAttribute("aria-pressed", "true");
    find("span", play).textContent = "Pause";
  }
  const turn = (by) => { stop(); if (show(at + by)) announce(find("figcaption", figures[at]).textContent.trim().replace(/\s+/g, " ")); };

  for (const link of links) link.addEventListener("click", (event) => { if (plain(event)) { event.preventDefault(); stop(); show(+link.dataset.n - 1, { follow: false }); } });
  for (const link of all("[data-turn]", stage)) link.addEventListener("click", (event) => { if (plain(event)) { event.preventDefault(); turn(+link.dataset.turn); } });
  let from = null;
  stage.addEventListener("touchstart", (event) => { from = event.touches.length === 1 ? event.touches[0] : null; }, { passive: true });
  stage.addEventListener("touchend", (event) => {
    const to = event.changedTouches[0];
    if (from && Math.abs(to.clientX - from.clientX) > 40 && Math.abs(to.clientX - from.clientX) > 2 * Math.abs(to.clientY - from.clientY)) turn(to.clientX < from.clientX ? 1 : -1);
    from = null;
  }, { passive: true });
  if (figures.length > 1) {
    play.hidden = false;
    play.addEventListener("click", toggle);
  }
  show(at);
  return { turn, toggle };
}

const plain = (event) => event.button === 0 && !(event.ctrlKey || event.metaKey || event.shiftKey || event.altKey);

// Keys: single letters, never while something is typed.

function keys(frames) {
  const dialog = find("#keys");
  const help = () => (dialog.open ? dialog.close() : dialog.showModal());
  find("#show-keys").hidden = false;
  find("#show-keys").addEventListener("click", help);

  function step(by) {
    const link = find(by > 0 ? "#older" : "#newer");
    if (link || find("#stage")) { link?.click(); return; }
    const cards = all("[data-event] .open");
    if (!cards.length) return;
    const now = cards.indexOf(document.activeElement);
    const next = cards[now < 0 ? 0 : Math.min(cards.length - 1, Math.max(0, now + by))];
    next.focus({ preventScroll: true });
    next.closest("[data-event]").scrollIntoView({ block: "nearest" });
  }
  function boxes() {
    const choices = all('input[name="boxes"]');
    const now = choices.findIndex((choice) => choice.checked);
    const next = choices[(now + 1) % choices.length];
    if (!next) return;
    next.checked = true;
    announce(`Boxes: ${next.value === "matter" ? "those that mattered" : next.value}`);
  }
  const actions = {
    j: () => step(1),
    k: () => step(-1),
    t: () => find("#true-alarm")?.click(),
    f: () => find("#false-alarm")?.click(),
    p: () => frames?.toggle(),
    b: boxes,
    "?": help,
    ArrowLeft: () => frames?.turn(-1),
    ArrowRight: () => frames?.turn(1),
  };
  addEventListener("keydown", (event) => {
    if (event.ctrlKey || event.metaKey || event.altKey || event.defaultPrevented || event.repeat && !event.key.startsWith("Arrow")) return;
    const typing = event.target.closest?.("input, select, textarea, [contenteditable]");
    if (typing || (dialog.open && event.key !== "?")) return;
    const arrow = event.key.startsWith("Arrow");
    if (arrow && event.target.closest?.("pre, .scroll")) return; // it scrolls
    if (!Object.hasOwn(actions, event.key)) return;
    event.preventDefault();
    actions[event.key]();
  });
}

// A page that keeps itself fresh, and one that comes back when what was away is there again.

function refresh(part) {
  setInterval(async () => {
    if (document.hidden || part.contains(document.activeElement)) return;
    try {
      const from = await page(location.href);
      part.replaceChildren(...find("#fresh", from).childNodes);
      find(".title-row").replaceWith(find(".title-row", from));
      copying(part);
    } catch {
      // Tried again in a few seconds; the age beside the title says how old this is.
    }
  }, part.dataset.every * 1000);
}

function comeBack(part) {
  const state = find("[data-retry-state]", part);
  state.textContent = `Trying again every ${part.dataset.retry} seconds.`;
  setInterval(async () => {
    try {
      await page(location.href);
      location.reload();
    } catch {
      // Still away.
    }
  }, part.dataset.retry * 1000);
}

function copying(within) {
  for (const button of all("[data-copy]", within)) {
    if (!navigator.clipboard) return;
    button.hidden = false;
    button.addEventListener("click", async () => {
      await navigator.clipboard.writeText(find(`#${button.dataset.copy}`).textContent);
      button.textContent = "Copied";
      setTimeout(() => { button.textContent = "Copy"; }, 2000);
    });
  }
}

const bar = find("#live");
if (bar) live(bar);
const stage = find("#stage");
keys(stage ? viewer(stage) : null);
const part = find("#fresh");
if (part) refresh(part);
const away = find("[data-retry]");
if (away) comeBack(away);
copying(document);
